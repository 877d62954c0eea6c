"""tools/benchmark.py: every subcommand on little, and what its figures must add up to."""

import functools
import json
import math
import sys
import textwrap
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dereflect.data import discover
from dereflect.models import dsrnet_model_sirs as model_module
from dereflect.tools.benchmark import main
from dereflect.tools.benchmarks import common, machine, variants
from dereflect.tools.benchmarks.common import Measurement
from dereflect.tools.benchmarks.published import PublishedNetwork, published_samples
from dereflect.util import program
from dereflect.util.errors import UserError
from tests.helpers import options_for


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch):
    """Rates that nobody needs to measure: 100 GFLOP/s, in bfloat16 200."""
    rates = {torch.float32: 1e11, torch.bfloat16: 2e11}
    monkeypatch.setattr(machine, "matrix_rate", lambda device, dtype: rates[dtype])
    monkeypatch.setattr(machine, "copy_rate", lambda device: 1e10)


@pytest.fixture
def run(tmp_path):
    """Runs a subcommand; returns what it writes as JSON and as Markdown."""

    def run(*arguments: str) -> tuple[dict, str]:
        files = tmp_path / "result.json", tmp_path / "result.md"
        assert not main([*arguments, "--json", str(files[0]), "--markdown", str(files[1])])
        record = json.loads(files[0].read_text())
        header = {"command", "machine", "threads", "torch", "date"}
        assert header <= set(record["setting"])
        assert record["setting"]["command"].startswith(f"python tools/benchmark.py {arguments[0]} ")
        return record, files[1].read_text()

    return run


def test_scan(run, tmp_path):
    picture = tmp_path / "scan.png"
    record, markdown = run(
        "scan", "--gpu_ids", "-1", "--shapes", "1,4,64", "1,4,128", "--backends", "cpu", "reference",
        "--repeats", "2", "--plot", str(picture),
    )  # fmt: skip
    assert record["setting"]["rate"] == "share is of 100 GFLOP/s, measured with a 2048 x 2048 matrix product"
    found = record["measurements"]
    assert [(m["backend"], m["length"]) for m in found] == 2 * [("cpu", 64), ("reference", 64)] + 2 * [
        ("cpu", 128),
        ("reference", 128),
    ]
    assert {m["direction"] for m in found} == {"forward", "forward + backward"}
    assert all(m["milliseconds"] > 0 and m["repeats"] == 2 and m["share"] > 0 for m in found)
    assert "forward + backward (cpu, 16 states)" in markdown
    assert picture.stat().st_size > 0


def test_step(run, tmp_path):
    picture = tmp_path / "step.png"
    record, markdown = run(
        "step", "--gpu_ids", "-1", "--sizes", "32", "--variants", "plain", "fp32", "bf16+checkpoint",
        "--repeats", "1", "--no-keep_freed_memory", "--plot", str(picture),
    )  # fmt: skip
    plain, fp32, bf16 = record["measurements"]
    assert [m["variant"] for m in (plain, fp32, bf16)] == ["plain", "fp32", "bf16+checkpoint"]
    for m in (plain, fp32, bf16):
        assert m["milliseconds"] > 0
        assert m["ratio"] == pytest.approx(plain["milliseconds"] / m["milliseconds"])
        assert m["images_a_second"] == pytest.approx(1e3 / m["milliseconds"])
        assert m["share"] == pytest.approx(m["floor"] / m["milliseconds"])
    assert plain["ratio"] == 1
    # The variants do the same work, although one of them does much of it twice.
    assert plain["flops"] == fp32["flops"] == bf16["flops"]
    assert fp32["floor"] == pytest.approx(1e3 * fp32["flops"] / 1e11) == 2 * bf16["floor"]
    if not math.isnan(plain["peak_GiB"]):
        gradients = 4 * 9.9e6 / 2**30
        assert gradients < bf16["peak_GiB"] < fp32["peak_GiB"] < plain["peak_GiB"]
    assert "| training step | dsrnet_s | plain | 32 | 1 |" in markdown
    assert picture.stat().st_size > 0


@pytest.fixture
def clone(tmp_path):
    """A folder like a clone of a published repository, whose network is a convolution, a scan and its residue."""
    files = {
        "models/__init__.py": "raise_when_ours = 'published'\n",
        "models/arch/__init__.py": """
            from mamba_ssm import Mamba
            from models.arch.tiny import DSRNet
            from util.numbers import CHANNELS

            def tiny():
                assert Mamba(16, d_state=16, d_conv=4, expand=2).cuda().D.device.type == "cpu"
                return DSRNet(CHANNELS)
            """,
        "models/arch/tiny.py": """
            import torch
            from torch import nn

            class DSRNet(nn.Module):
                def __init__(self, channels, lrm_blk_nums=[]):
                    super().__init__()
                    assert lrm_blk_nums[1] == 4, "as published, dsrnet_s gives none"
                    self.ending = nn.Module()
                    self.ending.seq = nn.Sequential(nn.Conv2d(3, channels, 1))

                def forward(self, image, features, fn=None):
                    out = self.ending.seq(image.cuda())
                    assert len(features) == 5
                    return out, image - out, torch.zeros(1).cuda() * out
            """,
        "util/numbers.py": "CHANNELS = 3\n",
        "data/sirs_dataset.py": """
            import os
            import kornia
            import torch
            from tensorboardX import SummaryWriter

            class DSRDataset:
                def __init__(self, folder):
                    self.value, self.count = 0, len(os.listdir(folder)) // 2

            class DSRTestDataset:
                def __init__(self, folder, enable_transforms=False):
                    assert enable_transforms
                    self.value, self.count = 1, len(os.listdir(os.path.join(folder, "blended")))

            class FusionDataset:
                def __init__(self, datasets, ratios):
                    print("a fusion dataset")
                    self.datasets, self.ratios = datasets, ratios

                def __len__(self):
                    return sum(dataset.count for dataset in self.datasets)

                def __getitem__(self, index):
                    return {"input": torch.full((3, 16, 16), index)}
            """,
        "train_sirs.py": "raise RuntimeError('nobody runs this')\n",
    }
    for name, text in files.items():
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_text(textwrap.dedent(text))
    return tmp_path / "clone"


class Head(nn.Module):
    """Our network of that name: `head` is published as `ending.seq.0`."""

    features = "vgg19"

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 3, 1)

    def forward(self, image, features):
        out = self.head(image)
        return out, image - out, torch.zeros_like(out)


def test_against_a_clone_of_the_published_code(clone):
    ours, before = Head(), set(sys.modules)
    network = PublishedNetwork(clone, "tiny", ours, "cpu")
    assert "models.arch.tiny" not in sys.modules and "mamba_ssm" not in sys.modules
    assert set(sys.modules) == before and str(clone) not in sys.path
    image = torch.rand(1, 3, 16, 32)
    for mine, theirs in zip(ours(image, None), network(image, [image] * 5), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        image.cuda()  # elsewhere the calls are what they were


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda clone: (clone / "models/arch/__init__.py").unlink(), "no models/arch in it"),
        (lambda clone: (clone / "models/arch/__init__.py").write_text(""), "has no tiny"),
        (lambda clone: (clone / "models/arch/__init__.py").write_text("import no_such_thing"), "no_such_thing"),
        (lambda clone: (clone / "util/numbers.py").write_text("CHANNELS = []"), "its models.arch fails: TypeError: "),
        (lambda clone: (clone / "util/numbers.py").write_text("CHANNELS = 4"), "another network than ours.*ending"),
    ],
)
def test_a_clone_that_cannot_be_run_is_told(clone, change, told):
    change(clone)
    with pytest.raises(UserError, match=told):
        PublishedNetwork(clone, "tiny", Head(), "cpu")


def test_step_against(run, clone, monkeypatch):
    monkeypatch.setattr(common, "list_models", lambda: ["tiny"])
    monkeypatch.setattr(variants, "create_model", lambda name: Head())
    monkeypatch.setattr(model_module, "create_model", lambda name: Head())
    found = run("step", "--against", str(clone), "--inet", "tiny", "--gpu_ids", "-1", "--sizes", "32", "--repeats", "1",
                "--no-keep_freed_memory")[0]["measurements"]  # fmt: skip
    assert [m["variant"] for m in found] == ["published", "fp32", "bf16"]
    assert found[1]["ratio"] == pytest.approx(found[0]["milliseconds"] / found[1]["milliseconds"])
    assert all(m["share"] > 0 for m in found)


def test_step_with_options_of_a_training(run):
    arguments = ("--inet", "dsrnet_xs", "--gpu_ids", "-1", "--sizes", "32", "--variants", "fp32", "--repeats", "1",
                 "--no-keep_freed_memory")  # fmt: skip
    (whole,), (part,) = (
        run("step", *arguments, *given)[0]["measurements"] for given in ((), ("--training=--lambda_vgg 0",))
    )
    assert part["flops"] < whole["flops"] / 2  # without VGG19


def test_step_forward_only(run, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    record, markdown = run(
        "step", "--inet", "dsrnet_xs", "--gpu_ids", "-1", "--forward_only", "--sizes", "32", "--batches", "1", "2",
        "--variants", "fp32",
        "--repeats", "3", "--no-keep_freed_memory", "--operators", "--profile", str(trace),
    )  # fmt: skip
    one, two, _, *operators = record["measurements"]
    assert (one["batch"], two["batch"]) == (1, 2)
    assert two["flops"] == 2 * one["flops"]
    assert one["nanoseconds_a_pixel"] == pytest.approx(1e6 * one["milliseconds"] / 32**2)
    assert two["nanoseconds_a_pixel"] == pytest.approx(1e6 * two["milliseconds"] / (2 * 32**2))
    assert one["repeats"] == 3 and 0 < one["fastest"] <= one["milliseconds"] <= one["slowest"]
    assert "### nanoseconds a pixel" in markdown
    by_name = {m["operator"]: m for m in operators}
    parts = [m["milliseconds"] for name, m in by_name.items() if name != "all operators"]
    assert by_name["all operators"]["milliseconds"] == pytest.approx(sum(parts))
    # Products are nearly all of the arithmetic, and only they are told by it.
    products = {name: m for name, m in by_name.items() if name in ("aten::addmm", "aten::convolution")}
    assert 0.3 * two["floor"] < sum(m["floor"] for m in products.values()) <= two["floor"]
    assert by_name["aten::addmm"]["calls"] >= 38  # of each step's expansion
    assert json.loads(trace.read_text())["traceEvents"]
    assert "Self CPU" in capsys.readouterr().out


def test_metrics(run):
    published, ours = run("metrics", "--size", "64", "48", "--repeats", "2")[0]["measurements"]
    assert (published["what"], ours["what"]) == ("published", "ours")
    assert ours["ratio"] == pytest.approx(published["milliseconds"] / ours["milliseconds"])
    assert all(ours[name] == pytest.approx(published[name]) for name in ("PSNR", "SSIM", "LMSE", "NCC"))


def test_memory(run, tmp_path):
    picture = tmp_path / "memory.png"
    record, markdown = run(
        "memory", "--inet", "dsrnet_xs", "--gpu_ids", "-1", "--sizes", "32", "128", "--variants", "bf16+checkpoint",
        "--no-keep_freed_memory", "--plot", str(picture),
    )  # fmt: skip
    found = record["measurements"]
    assert [(m["kind"], m["variant"], m["size"]) for m in found] == [
        ("training step", "bf16+checkpoint", 32),
        ("training step", "bf16+checkpoint", 128),
        ("prediction", "bf16", 32),
        ("prediction", "bf16", 128),
    ]
    assert "bytes/pixel" in markdown
    assert picture.stat().st_size > 0
    trained, trained_128, predicted, predicted_128 = (m["peak_GiB"] * 2**30 for m in found)
    if not math.isnan(trained):
        assert predicted < predicted_128 < trained_128
        assert trained < trained_128
        assert found[0]["bytes_a_pixel"] == pytest.approx((trained_128 - trained) / (128**2 - 32**2))


def test_data(run, tiny_data):
    little = ("data", "--base_dir", str(tiny_data), "--crop_size", "16", "--seconds", "0.2")
    record, markdown = run(*little, "--nThreads", "0", "--cache_images", "0", "0.01")
    found = record["measurements"]
    assert [(m["code"], m["workers"], m["cache GiB"]) for m in found] == [("ours", 0, 0), ("ours", 0, 0.01)]
    assert 0 < found[1]["reading"] < found[0]["reading"] < 1
    assert "| code | workers | cache GiB |" in markdown
    record, _ = run(*little, "--nThreads", "2", "--cache_images", "0")
    (alone,) = record["measurements"]
    assert "reading" not in alone
    assert alone["rate_a_core"] == alone["rate"] / 2
    for m in (*found, alone):
        assert m["samples"] > 1 and m["milliseconds"] >= 200
        assert m["rate"] == pytest.approx(1e3 * m["samples"] / m["milliseconds"])


def test_data_against(run, tiny_data, clone, capsys):
    record, markdown = run(
        "data", "--base_dir", str(tiny_data), "--crop_size", "16", "--seconds", "0.2", "--nThreads", "0", "1",
        "--cache_images", "0", "--against", str(clone),
    )  # fmt: skip
    found = record["measurements"]
    assert [(m["code"], m["workers"]) for m in found] == [("published", 0), ("ours", 0), ("published", 0), ("ours", 1)]
    for theirs, ours in zip(found[::2], found[1::2], strict=True):
        assert theirs["ratio"] == 1 and ours["ratio"] == pytest.approx(ours["rate"] / theirs["rate"])
        assert all(m["rate"] == pytest.approx(1e3 * m["samples"] / m["milliseconds"]) for m in (theirs, ours))
    assert "x published" in markdown and "a fusion dataset" not in capsys.readouterr().out


def test_published_samples_come_from_our_folders(clone, base):
    sets = discover(options_for(base, "--mix", 6, 4, 0))
    dataset = published_samples(clone, sets)
    assert dataset.ratios == [0.6, 0.4]
    assert [(part.value, part.count) for part in dataset.datasets] == [(0, len(sets.photographs) // 2), (1, 5)]
    assert "data.sirs_dataset" not in sys.modules and "kornia" not in sys.modules
    (clone / "data/sirs_dataset.py").unlink()
    with pytest.raises(UserError, match="there is no data/sirs_dataset in it"):
        published_samples(clone, sets)


def test_data_without_room_for_the_cache(run, tiny_data):
    record, markdown = run(
        "data", "--base_dir", str(tiny_data), "--crop_size", "16", "--nThreads", "0", "--cache_images", "1e6",
        "--seconds", "0.1",
    )  # fmt: skip
    (m,) = record["measurements"]
    assert "samples" not in m and m["note"] in markdown and "1e+06" in m["note"]


def test_eval(run):
    record, markdown = run(
        "eval", "--inet", "dsrnet_xs", "--gpu_ids", "-1", "--images", "3", "--size", "40", "32", "--eval_batch", "2",
        "--save_images", "--repeats", "1",
    )  # fmt: skip
    whole, forwards = record["measurements"]
    assert [m["what"] for m in (whole, forwards)] == ["evaluation", "forward passes"]
    for m in (whole, forwards):
        assert m["images"] == 3 and m["repeats"] == 1 and m["milliseconds"] > 0
        assert m["images_a_second"] == pytest.approx(3e3 / m["milliseconds"])
        assert m["overhead"] == m["milliseconds"] / forwards["milliseconds"]
    assert "dsrnet_xs, 3 images of 40 x 32 (cpu)" in markdown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("step --inet dsrnet_xl", ", dsrnet_l, "),
        ("step --variants fp16", "compile, graphs, checkpoint"),
        ("step --variants fp32+bf16", "no such variant"),
        ("step --variants compile", "no such variant"),
        ("step --inet mdsrnet_s --variants plain fp32", "has no Mamba layers, and mdsrnet_s has"),
        ("step --variants fp32+graphs --gpu_ids -1", "CUDA graphs need a GPU"),
        ("step --variants fp32+compile --forward_only", "change the training step"),
        ("eval --inet dsrnet_xl", ", dsrnet_l, "),
        ("data --base_dir nowhere", "there is no such folder"),
        ("scan --gpu_ids -1 --backends nothing", "no such backend"),
        ("scan --gpu_ids -1 --shapes 1,1,9999999999999999", "too little memory"),
        ("scan --gpu_ids -1 --shapes 1,9999999999,9999999999", "too little memory"),
        ("metrics --size 19 40", "fewer pixels than LMSE's windows"),
        ("metrics --json /dev/null/x.json", "--json /dev/null: cannot be written"),
    ],
)
def test_one_line_for_what_is_wrong(arguments, told, capsys):
    assert program.run(main, arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line


def test_mamba_has_no_plain_variant():
    assert variants.has_mamba("mdsrnet_s") and not variants.has_mamba("dsrnet_s")


@pytest.mark.parametrize("groups", [1, 8])
def test_backward_of_a_convolution_counts_twice(groups):
    conv, x = nn.Conv2d(8, 8, 3, padding=1, groups=groups), torch.randn(2, 8, 6, 6, requires_grad=True)
    formulas = {torch.ops.aten.convolution_backward: variants._backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        conv(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * conv.weight.numel() * 2 * 6 * 6


def test_a_size_that_the_networks_cannot_take(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["step", "--sizes", "40"])
    assert stop.value.code == 2 and "40 is not a multiple of 16" in capsys.readouterr().err


def measured(variant: str, size: int, milliseconds: float, peak: float, batch: int = 1) -> Measurement:
    what = {"model": "m", "variant": variant, "size": size, "batch": batch}
    return Measurement(what, batch * size**2, [milliseconds / 1e3], peak)


def test_what_is_foreseen_as_too_much_is_left_out():
    called = []
    known = {"slow": (11e3, 0), "big": (1e3, 1e18), "small": (1e3, 1)}
    earlier = [measured(name, 16, *cost) for name, cost in known.items()]
    blank = {name: Measurement({"model": "m", "variant": name, "size": 16, "batch": 1}, 16**2) for name in known}
    calls = [(m, functools.partial(called.append, name)) for name, m in blank.items()]
    assert common.compare(calls, Namespace(repeats=3, max_seconds=10), "cpu", earlier) == list(blank.values())
    assert set(called) == {"small"}
    assert blank["slow"].note == "left out, about 11 s" and not blank["slow"].seconds
    assert blank["big"].note.endswith(" GiB") and not blank["big"].seconds
    assert len(blank["small"].seconds) == 3 and not blank["small"].note


def test_foreseen_along_a_line():
    earlier = [measured("fp32", size, 100 + size**2, 5 + 2 * size**2) for size in (16, 32)]
    wanted = measured("fp32", 64, 0, 0, batch=2)
    assert common.foresee(wanted, earlier) == pytest.approx(((100 + 2 * 64**2) / 1e3, 5 + 4 * 64**2))
    assert common.foresee(wanted, earlier[:1]) == pytest.approx(((100 + 256) * 32 / 1e3, (5 + 512) * 32))
    assert common.foresee(measured("bf16", 64, 0, 0), earlier) == (0, 0)


def test_peak_memory_is_what_a_call_holds():
    peak = common.peak_memory(lambda: torch.ones(1 << 24).sum(), "cpu")
    if not math.isnan(peak):
        assert 0.9 * 2**26 < peak < 1.3 * 2**26


def test_turns_are_taken():
    order = []
    found = {name: Measurement({"name": name}) for name in "ab"}
    calls = [(m, functools.partial(order.append, name)) for name, m in found.items()]
    common.take_turns(calls, [3, 2], "cpu")
    assert order == ["a", "b", "a", "b", "a"]
    assert {name: len(m.seconds) for name, m in found.items()} == {"a": 3, "b": 2}
