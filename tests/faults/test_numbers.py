"""What isn't finite, wherever it comes from, is found at its step; the guard acts, or the step is kept for a replay."""

import math
import sys
from types import ModuleType

import pytest
import torch

from dereflect import engine
from dereflect.data.sirs_dataset import TrainSet
from dereflect.models import losses
from dereflect.models.arch import create_model
from dereflect.options import as_text, parse_train
from dereflect.tools import replay
from dereflect.util import program
from dereflect.util.errors import UserError
from dereflect.util.run import checkpoint
from tests.helpers import at_call, poison, run

STEP = 4  # from 1
SETTINGS = ("--nEpochs", "1", "--epoch_size", "7", "--save_steps", "1", "--lr", "1e-4", "--val_split", "0.5")


def spoil_weight(monkeypatch) -> None:
    engines = []
    plain = engine.Engine.__init__

    def keep(self, *given):
        plain(self, *given)
        engines.append(self)

    monkeypatch.setattr(engine.Engine, "__init__", keep)

    def act() -> None:
        with torch.no_grad():
            engines[0].network.head.bias[0] = math.nan

    at_call(monkeypatch, engine.Engine, "_gradient", STEP, act)


def spoil_sample(monkeypatch) -> None:
    plain, calls = TrainSet.__getitem__, iter(range(1, 100))

    def item(self, which):
        sample = plain(self, which)
        if next(calls) == STEP:
            sample["mixture"][1, 2, 3] = math.inf
        return sample

    monkeypatch.setattr(TrainSet, "__getitem__", item)


SPOIL = {
    "a weight": spoil_weight,
    "a loss": lambda monkeypatch: poison(monkeypatch, {STEP - 1: math.nan}),
    "a gradient": lambda monkeypatch: poison(monkeypatch, {STEP - 1: math.inf}),
    "a sample": spoil_sample,
}


@pytest.fixture(autouse=True)
def _no_evaluation(monkeypatch):
    monkeypatch.setattr(engine.Engine, "_evaluate_all", lambda self, epoch: None)


@pytest.mark.parametrize("kind", SPOIL)
def test_without_the_guard_the_run_stops_and_the_step_can_be_replayed(kind, tiny_data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        SPOIL[kind](patched)
        status, folder = run(tiny_data, tmp_path, *SETTINGS, "--accumulate", "1", "--name", "a")
    assert status == 1
    told = capsys.readouterr().err
    what = "gradient" if kind == "a gradient" else "loss"
    assert f"the {what} of step {STEP - 1} is not finite" in told and "tools/replay.py" in told
    path = folder / f"nonfinite_step_{STEP - 1}_rank_0.pt"
    saved, last = checkpoint.load(path), checkpoint.load(folder / "last.pt")
    assert saved["global_step"] == last["global_step"] == STEP - 1
    assert all(p.isfinite().all() for p in last["network"].values()), "the step before is what --resume takes"
    assert program.run(replay.main, [str(path)]) == 0
    told = capsys.readouterr().out
    assert saved["names"][0] in told
    if kind == "a weight":
        assert "weights: not finite in head.bias and 1 in all" in told
    if kind == "a sample":
        assert "  <- the first that isn't finite" in told


def test_with_accumulation_all_batches_of_the_step_are_saved(tiny_data, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3: math.inf})
    more = ("--epoch_size", "8", "--accumulate", "2", "--batchSize", "2", "--name", "a")
    status, folder = run(tiny_data, tmp_path, *SETTINGS, *more)
    assert status == 1
    saved = checkpoint.load(folder / "nonfinite_step_1_rank_0.pt")
    assert saved["batch"]["mixture"].shape == (4, 3, 32, 32) and len(saved["names"]) == 4


@pytest.mark.parametrize("kind", SPOIL)
def test_with_the_guard_the_run_goes_on(kind, tiny_data, tmp_path, monkeypatch, capsys, quick_guard):
    SPOIL[kind](monkeypatch)
    status, folder = run(tiny_data, tmp_path, *SETTINGS, "--guard", "--name", "a")
    assert status == 0
    told = capsys.readouterr().out
    assert f"step {STEP}: skipped" in told
    assert ("back to the weights of step" in told) == (kind == "a weight")
    last = checkpoint.load(folder / "last.pt")
    assert last["global_step"] == 7 and all(p.isfinite().all() for p in last["network"].values())


def test_replay_is_of_the_runs_own_loss(tmp_path, monkeypatch, capsys):
    """And of its own --model, which builds it."""

    class Doubled(losses.ReflectionLoss):
        def forward(self, *given):
            return {key: 2 * value for key, value in super().forward(*given).items()}

    module = ModuleType("dereflect.models.doubled")
    module.ReflectionLoss = Doubled
    monkeypatch.setitem(sys.modules, module.__name__, module)
    options = as_text(parse_train(["--base_dir", ".", "--inet", "dsrnet_xs", "--lambda_vgg", "0"]))
    batch = {key: torch.rand(1, 3, 16, 16) for key in ("mixture", "target_t", "target_r")}
    state = {"format": checkpoint.FORMAT, "inet": "dsrnet_xs", "global_step": 3, "names": ["x"], "batch": batch}
    state |= {"network": create_model("dsrnet_xs").state_dict()}
    totals = []
    for number, loss in enumerate(("losses", "doubled")):
        checkpoint.save(state | {"options": options | {"loss": loss}}, tmp_path / f"{number}.pt")
        assert program.run(replay.main, [str(tmp_path / f"{number}.pt")]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("losses:"))
        totals.append(sum(float(part.split()[-1]) for part in line.split(",")))
    assert totals[1] == pytest.approx(2 * totals[0], rel=1e-2)


def test_replay_names_where_a_gradient_begins_to_be_infinite(capsys):
    rows = {name: {"out": 1.0, "grad out": 1.0, "grad in": 1.0} for name in "abc"}
    rows["b"]["grad in"] = rows["a"]["grad out"] = rows["a"]["grad in"] = math.inf
    assert replay._marks(rows) == {"b": "  <- the first gradient that isn't finite"}
    rows["c"]["grad out"] = math.nan
    assert list(replay._marks(rows)) == ["c"]
    rows["b"]["out"] = math.nan
    assert replay._marks(rows) == {"b": "  <- the first that isn't finite"}


@pytest.mark.parametrize("how", ["--resume", "--weight_path", "ema"])
def test_weights_that_are_not_finite_are_refused_by_name(how, tiny_data, tmp_path):
    ema = ("--ema", "0.9") if how == "ema" else ()
    folder = run(tiny_data, tmp_path, "--nEpochs", "1", "--epoch_size", "1", *ema, "--name", "a")[1]
    state = checkpoint.load(folder / "last.pt")
    state["ema" if how == "ema" else "network"]["unet.ups.0.weight"][0, 0] = -math.inf
    checkpoint.save(state, folder / "last.pt")
    (folder / "previous.pt").unlink(missing_ok=True)
    start = ("--weight_path", str(folder / "last.pt")) if how == "--weight_path" else ("--resume",)
    with pytest.raises(UserError, match=r"last\.pt.*1 parameters are NaN or infinite: unet\.ups\.0\.weight"):
        run(tiny_data, tmp_path, "--nEpochs", "2", "--epoch_size", "1", "--name", "a", *ema, *start)
