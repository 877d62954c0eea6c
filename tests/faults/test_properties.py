"""Anything at all goes into what reads files and command lines: out comes success, or the project's own error.

The default set tries each with a hundred cases, the slow one with thousands; `--hypothesis-seed=N` repeats a failure.
"""

import contextlib
import io
import json
import pickle
import pickletools
import string
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dereflect.models.weights import architecture_of, load_weights
from dereflect.options import parse_evaluate, parse_infer, parse_train, train_parser
from dereflect.tools import summarize
from dereflect.util import program
from dereflect.util.errors import UserError
from dereflect.util.run import checkpoint
from dereflect.util.run.reader import read_metrics, read_run, table
from dereflect.util.run.record import Record

MANY = [pytest.param(100, id="some"), pytest.param(2500, id="many", marks=pytest.mark.slow)]


def check(cases: int, strategy: st.SearchStrategy, test) -> None:
    """Run a test with so many cases of a strategy."""
    calm = settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    calm(given(strategy)(test))()


# ---- command lines ----------------------------------------------------------------------------------------------

OPTIONS = [option for action in train_parser()._actions for option in action.option_strings if option != "-h"]
OPTIONS.remove("--help")
ODD_NUMBERS = st.sampled_from(["1e400", "9" * 5000, "nan", "-0"])
NUMBERS = st.one_of(st.integers(-5, 5000), st.integers(), st.floats(), ODD_NUMBERS)
# What an operating system hands over: no zero bytes, and what is no UTF-8 as surrogates.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=[]), max_size=20).filter(
    lambda text: not any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for c in text)
)
ODD_WORDS = st.sampled_from(["", ".", "..", "/", "a/b", "auto", "fp32", "losses", "-1", "0,1"])
WORDS = st.one_of(NUMBERS.map(str), TEXT, ODD_WORDS)
PAIRS = st.tuples(st.sampled_from(OPTIONS), WORDS)
ARGUMENTS = st.lists(st.one_of(st.sampled_from(OPTIONS), WORDS, PAIRS.map("=".join)))


def refused_or_parsed(parse, arguments: list[str]) -> str | None:
    """What is said to arguments that are refused; None where they are not."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            parse(arguments)
    except SystemExit as stop:
        assert stop.code == 2
        return told.getvalue().removeprefix("error: ")
    return None


@pytest.mark.parametrize("cases", MANY)
@pytest.mark.parametrize("parse", [parse_train, parse_infer, parse_evaluate])
def test_any_command_line(parse, cases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def test(arguments: list[str]) -> None:
        told = refused_or_parsed(parse, [word for word in arguments if word not in ("--help", "-h")])
        assert told is None or told
        assert not list(tmp_path.iterdir())

    check(cases, ARGUMENTS, test)


@pytest.mark.parametrize("cases", MANY)
def test_one_wrong_value_is_refused_by_its_options_name(cases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def test(given_: tuple[str, str]) -> None:
        option, value = given_
        told = refused_or_parsed(parse_train, ["--base_dir", ".", f"{option}={value}"])
        assert told is None or option in told

    check(cases, PAIRS, test)


TIMES = st.one_of(st.dates(), st.datetimes())
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20), TIMES, st.binary(max_size=9))
TREES = st.recursive(PLAIN, lambda inner: st.one_of(st.lists(inner), st.dictionaries(PLAIN, inner)), max_leaves=8)
KEYS = st.one_of(st.sampled_from([option.lstrip("-") for option in OPTIONS]), st.sampled_from(["demo", "help"]), PLAIN)
HOSTILE_YAML = [
    "a: " + "[" * 1000,
    "!!int x",
    "!!bool x",
    "!!timestamp x",
    "!!float",
    "!!python/object/apply:os.system [touch harmed]",
    "? [1]: 2",
    "a: &a [*a]",
    "2001-99-99",
    "{",
    "\t",
    "\0",
    "\x85",
    "lr: !!binary '?'",
    "mix: ['--help', 1, 2]",
    "a: &a [x, x]\nb: &b [*a, *a]\nmix: [*b, *b, *b]",
    'comment: "\\ud800"',
    'name: "\\0"',
]
YAML = (
    st.one_of(
        st.dictionaries(KEYS, TREES, max_size=4).map(lambda values: yaml.safe_dump(values)),
        st.text(),
        st.sampled_from(HOSTILE_YAML),
    ).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary()
)


@pytest.mark.parametrize("cases", MANY)
def test_any_config(cases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").touch()

    def test(text: bytes) -> None:
        Path("c.yaml").write_bytes(text)
        told = refused_or_parsed(parse_train, ["--config", "c.yaml", "--base_dir", "."])
        assert told is None or told
        assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]

    check(cases, YAML, test)


# ---- checkpoints ------------------------------------------------------------------------------------------------

HARMED = Path("harmed")


class Harmful:
    def __reduce__(self):
        return (Path.touch, (HARMED,))


def harmful_pickles() -> list[bytes]:
    torch_file = io.BytesIO()
    torch.save({"network": Harmful()}, torch_file)
    return [pickle.dumps(Harmful(), protocol) for protocol in (0, 2, 4)] + [torch_file.getvalue()]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[bytes]:
    """Files of which some part is then changed: a small checkpoint, and some that mean harm."""
    path = tmp_path_factory.mktemp("checkpoints") / "small.pt"
    state = {"format": 1, "inet": "dsrnet_s", "network": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}}
    checkpoint.save(state | {"options": {"lr": 1e-4, "mix": [1, 2]}, "ema": None}, path)
    return [path.read_bytes(), *harmful_pickles()]


@st.composite
def damaged(draw, files: list[bytes]) -> bytes:
    """A file with bytes changed, taken out or put in, or cut off; or within it, its pickle; or bytes of no meaning."""
    data = draw(st.sampled_from(files))
    kind = draw(st.sampled_from(["bytes", "pickle", "anything"]))
    if kind == "anything":
        return draw(st.binary(max_size=200)) + data[: draw(st.integers(0, 40))]
    if kind == "pickle" and zipfile.is_zipfile(io.BytesIO(data)):
        return _with_other_pickle(data, lambda content: draw(mutated(content)))
    return draw(mutated(data))


@st.composite
def mutated(draw, data: bytes) -> bytes:
    opcodes = [code.code.encode("latin-1") for code in pickletools.opcodes]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        piece = draw(st.one_of(st.binary(max_size=4), st.sampled_from(opcodes), st.just(data[at : at + 20])))
        data = data[:at] + piece + data[at + draw(st.sampled_from([0, len(piece), 1, 10**6])) :]
    return data


def _with_other_pickle(data: bytes, change) -> bytes:
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, change(content) if info.filename.endswith("data.pkl") else content)
    return changed.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", MANY)
def test_any_checkpoint(cases, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def test(data: bytes) -> None:
        Path("x.pt").write_bytes(data)
        try:
            assert isinstance(checkpoint.load(Path("x.pt")), dict)
        except UserError as error:
            assert "x.pt" in str(error)
        assert not HARMED.exists(), "code in it was executed"

    check(cases, damaged(checkpoints), test)


def test_the_harmful_pickles_would_do_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(harmful_pickles()[0])
    assert HARMED.exists()


# ---- weights ----------------------------------------------------------------------------------------------------

SMALL = nn.ModuleDict({"head": nn.Conv2d(2, 2, 1), "unet": nn.ModuleDict({"middle": nn.Linear(3, 1)})})
NAMES = st.one_of(
    st.sampled_from([*SMALL.state_dict(), "ending.seq.0.weight", "module.net.head.bias", "lrm.intro.seq_l.0.bias",
                     "lrm.intro.seq_r.0.bias", "ema", "network", "state_dict", "epoch"]),
    st.text(string.ascii_lowercase + "._0123456789", max_size=12),
    st.integers(),
    st.none(),
)  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
DTYPES += [torch.float8_e4m3fn]
TENSORS = st.builds(
    lambda shape, dtype, fill, kind: _tensor(shape, dtype, fill, kind),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
    st.sampled_from(["plain"] * 4 + ["sparse", "meta", "quantized", "expanded"]),
)


def _tensor(shape: list[int], dtype: torch.dtype, fill: float, kind: str) -> torch.Tensor:
    if kind == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if kind == "quantized":
        return torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, torch.qint8)
    tensor = torch.full(shape, 0.0 if dtype in (torch.int64, torch.bool) else fill).to(dtype)
    if kind == "sparse" and dtype is torch.float32:
        return tensor.to_sparse()
    return tensor[None].expand(2, *shape) if kind == "expanded" else tensor


OWN = st.fixed_dictionaries(
    {name: st.one_of(st.just(value), st.just(value.double()), TENSORS) for name, value in SMALL.state_dict().items()}
)
STATES = st.one_of(OWN, st.dictionaries(NAMES, st.one_of(TENSORS, PLAIN, st.dictionaries(NAMES, TENSORS)), max_size=5))
WRAPPED = st.one_of(STATES, st.dictionaries(NAMES, STATES, max_size=3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", MANY)
def test_any_state_dict(cases):
    before = {name: value.clone() for name, value in SMALL.state_dict().items()}

    def test(state: dict) -> None:
        try:
            load_weights(SMALL, state, "x.pt")
        except UserError as error:
            assert "x.pt" in str(error)
        assert all(value.isfinite().all() for value in SMALL.state_dict().values())
        SMALL.load_state_dict(before)
        try:
            assert isinstance(architecture_of(state, "x.pt"), str)
        except UserError as error:
            assert "x.pt" in str(error)

    check(cases, WRAPPED, test)


# ---- records ----------------------------------------------------------------------------------------------------

LINE = {"epoch": 1, "step": 4, "set": "demo", "estimate": "model", "count": 2}
LINE |= {"PSNR": 20.0, "SSIM": 0.9, "LMSE": 0.1, "NCC": 0.9, "seconds": 1.0}
ODD_VALUES = st.sampled_from([None, 10**400, [], {}])
VALUES = st.one_of(ODD_VALUES, st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
ENTRIES = st.one_of(
    st.dictionaries(st.sampled_from([*LINE, "other"]), VALUES).map(lambda changes: LINE | changes),
    st.builds(lambda name, epoch, how: LINE | {"set": name, "epoch": epoch, "estimate": how},
              st.sampled_from(["demo", "val", "average", "average_published"]), st.integers(0, 3),
              st.sampled_from(["model", "input"])),
    VALUES,
)  # fmt: skip
TEXTS = st.one_of(ENTRIES.map(json.dumps).map(str.encode), st.binary(max_size=30), st.just(b"[" * 100000))
LINES = st.lists(TEXTS, max_size=6).map(b"\n".join)
HEAD = b"# '', started 2026-01-01 00:00:00, torch 2.11, Linux\n"
STARTS = st.one_of(st.just(b""), LINES, st.builds(lambda comment: json.dumps({"comment": comment}).encode(), VALUES))
RUNS = st.tuples(LINES, st.one_of(YAML, YAML.map(HEAD.__add__)), st.binary(max_size=60), STARTS)
FILES = ("metrics.jsonl", "options.yaml", "events.out.tfevents.1", "starts.jsonl")


@pytest.mark.parametrize("wrong", [{"step": False}, {"epoch": True}, {"count": True}, {"PSNR": False}])
def test_a_bool_is_no_number_of_a_line(wrong, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | wrong) + "\n")
    assert len(read_metrics(tmp_path)) == 1
    Record(tmp_path, parse_train(["--base_dir", "."]), 2, 0).close()


@pytest.mark.parametrize("cases", MANY)
def test_any_run(cases, tmp_path, capsys):
    folder = tmp_path / "runs/a"
    folder.mkdir(parents=True)
    parsed = parse_train(["--base_dir", "."])

    def test(files: tuple[bytes, ...]) -> None:
        for path in folder.glob("events*"):
            path.unlink()
        for name, content in zip(FILES, files, strict=True):
            (folder / name).write_bytes(content)
        table(read_metrics(folder))
        run = read_run(folder)
        assert run.problems or run.lines
        outputs = [f"--{kind}={tmp_path / kind}" for kind in ("markdown", "csv", "json")]
        assert program.run(summarize.main, [str(tmp_path / "runs"), *outputs]) == 0
        Record(folder, parsed, 2, 0).close()
        capsys.readouterr()

    check(cases, RUNS, test)
