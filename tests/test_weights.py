"""Checkpoints, published and own, into networks."""

import json
import pickle

import pytest
import torch

from dereflect.models.arch import create_model
from dereflect.models.weights import load_weights
from dereflect.options import PRETRAINED
from dereflect.tools import export
from dereflect.util import program
from dereflect.util.errors import UserError
from dereflect.util.run import checkpoint
from tests.helpers import GOLDEN, published_state

SHAPES = json.loads((GOLDEN / "state_dict_shapes.json").read_text())["dsrnet_s"]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return published_state(SHAPES)


@pytest.fixture(scope="module")
def expected(state) -> dict[str, torch.Tensor]:
    net = create_model("dsrnet_s")
    load_weights(net, state)
    return net.state_dict()


def load_into(name: str, source) -> dict[str, torch.Tensor]:
    net = create_model(name)
    load_weights(net, source)
    return net.state_dict()


def load(source) -> dict[str, torch.Tensor]:
    return load_into("dsrnet_s", source)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"weight": s, "epoch": 18},
        lambda s: {"icnn": s, "epoch": 18, "iterations": 3},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"net.module.{k}": v for k, v in s.items()}},
        lambda s: {f"network.{k}": v for k, v in s.items()},
        lambda s: {k: v for k, v in s.items() if "seq_r" not in k},
    ],
)
def test_published_layouts(wrap, state, expected, tmp_path):
    torch.save(wrap(state), tmp_path / "published.pt")
    assert same(load(tmp_path / "published.pt"), expected)


def test_own_layout_and_moving_average(expected):
    doubled = {key: 2 * value for key, value in expected.items()}
    assert same(load({"network": expected, "ema": None}), expected)
    assert same(load({"network": expected, "ema": doubled}), doubled)


def test_the_rest_of_a_checkpoint_is_returned(state):
    assert load_weights(create_model("dsrnet_s"), {"weight": state, "epoch": 18}) == {"epoch": 18}


def test_misfits_are_named(state, tmp_path):
    broken = dict(state)
    del broken["ending.seq.0.bias"]
    broken["extra.weight"] = torch.zeros(1)
    broken["ups.0.seq.0.weight"] = torch.zeros(2, 2, 1, 1)
    with pytest.raises(UserError) as error:
        load(broken)
    for told in ("1 missing: head.bias", "1 left over: extra.weight", "unet.ups.0.weight (2, 2, 1, 1)", "--inet"):
        assert told in str(error.value)


def test_doubled_names_must_agree(state):
    broken = dict(state)
    broken["lrm.intro.seq_r.0.bias"] = broken["lrm.intro.seq_r.0.bias"] + 1
    with pytest.raises(UserError, match=r"residue\.expand\.bias"):
        load(broken)


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_not_executed(tmp_path, capsys):
    torch.save({"weight": Malicious()}, tmp_path / "bad.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("bad.pt", "pickle.pt"):
        with pytest.raises(UserError, match=name):
            load(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_unreadable_files_are_named(content, tmp_path):
    path = tmp_path / "weights.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pt"):
        load(path)


def test_no_weights_in_it():
    with pytest.raises(UserError, match="its keys are epoch"):
        load({"epoch": 3})


def test_writing_replaces_only_when_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save({"step": 1}, path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space"):
        checkpoint.save({"step": 2}, path)
    assert checkpoint.load(path) == {"step": 1}


def test_exported_weights_are_the_averaged_ones_and_say_whose(tmp_path, capsys):
    net, other = create_model("dsrnet_xs"), create_model("dsrnet_xs")
    options = {"lr": 1e-3, "precision": "bf16", "base_dir": "/home/me", "name": "mine"}
    state = {"format": 1, "inet": "dsrnet_xs", "epoch": 3, "global_step": 70, "options": options}
    checkpoint.save(state | {"network": other.state_dict(), "ema": net.state_dict()}, tmp_path / "last.pt")
    target = tmp_path / "small.safetensors"
    assert program.run(export.main, [str(tmp_path / "last.pt"), "-o", str(target)]) == 0
    assert "small.safetensors: dsrnet_xs, 7.1 MB" in capsys.readouterr().out
    content = checkpoint.load(target)
    assert same(content.pop("network"), net.state_dict())
    assert content == state | {"options": {"lr": 1e-3, "precision": "bf16"}}
    assert same(load_into("dsrnet_xs", target), net.state_dict())

    data = target.read_bytes()
    for damaged in (b"", data[:5], data[:1000], data[:-4], b"\xff" * 100):
        target.write_bytes(damaged)
        with pytest.raises(UserError, match=r"small\.safetensors: not a readable checkpoint"):
            checkpoint.load(target)
    assert program.run(export.main, [str(target), "-o", str(tmp_path / "again.safetensors")]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_mean_of_several_checkpoints_is_exported(tmp_path, capsys):
    one, two = (create_model("dsrnet_xs").state_dict() for _ in range(2))
    other = create_model("mdsrnet_xs").state_dict()
    sources = []
    for index, (inet, network) in enumerate((("dsrnet_xs", one), ("dsrnet_xs", two), ("mdsrnet_xs", other))):
        path = tmp_path / f"{index}.pt"
        checkpoint.save({"format": 1, "inet": inet, "epoch": index, "network": network}, path)
        sources.append(str(path))
    target = tmp_path / "mean.safetensors"
    assert program.run(export.main, [*sources[:2], "-o", str(target)]) == 0
    content = checkpoint.load(target)
    assert content["epoch"] == 1
    for key, value in content["network"].items():
        torch.testing.assert_close(value, (one[key] + two[key]) / 2, rtol=1e-6, atol=1e-7)
    capsys.readouterr()
    assert program.run(export.main, [*sources, "-o", str(target)]) == 2
    assert "2.pt: of mdsrnet_xs, but" in capsys.readouterr().err


def test_the_weights_in_the_box():
    """Small, of the network that they say, and a model card beside them."""
    assert PRETRAINED.stat().st_size <= 16e6
    content = checkpoint.load(PRETRAINED)
    assert content["inet"] == PRETRAINED.stem
    load_into(PRETRAINED.stem, content)
    assert PRETRAINED.stem in (PRETRAINED.parent / "README.md").read_text(encoding="utf-8")
    assert not {"base_dir", "checkpoints_dir"} & content["options"].keys()
