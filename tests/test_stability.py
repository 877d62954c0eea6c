"""The guard: its judgement by itself, and a training that blows up with and without it."""

import copy
import math

import numpy as np
import pytest
import torch

from dereflect import engine
from dereflect.models.arch.blocks import MuGI, MuGIM, MuGIM2, MuGIMG
from dereflect.util.run import checkpoint
from dereflect.util.run.reader import read_metrics
from dereflect.util.stability import Guard, Verdict
from tests.helpers import poison, run, same, state_of


def usual(guard: Guard, steps: int, spread: float = 0.5) -> None:
    """So many gradients with norms around 2."""
    for step, value in enumerate(np.random.default_rng(0).normal(math.log(2), spread, steps)):
        assert guard.judge(step, math.exp(value)) is Verdict.STEP


def test_it_learns_the_distribution():
    guard = Guard()
    usual(guard, 1000)
    assert math.exp(guard.mean) == pytest.approx(2, rel=0.2)
    assert math.sqrt(guard.square) == pytest.approx(0.5, rel=0.3)
    assert guard.limit(6) == pytest.approx(math.exp(guard.mean + 6 * math.sqrt(guard.square)))


def test_far_out_and_not_finite_norms_are_skipped_and_not_learnt_from():
    guard = Guard()
    usual(guard, 200)
    before = guard.mean, guard.square
    for norm in (1e3, math.inf, math.nan):
        assert guard.judge(200, norm) is Verdict.SKIP
    assert (guard.mean, guard.square) == before
    assert not guard.is_calm(220) and guard.is_calm(260)


def test_several_skips_in_a_short_time_ask_for_the_return():
    guard = Guard()
    usual(guard, 200)
    far_apart = [guard.judge(1000 + guard.WINDOW * i, 1e3) for i in range(20)]
    assert set(far_apart) == {Verdict.SKIP}
    guard.skipped.clear()
    close = [guard.judge(5000 + i, 1e3) for i in range(guard.PATIENCE)]
    assert close == [Verdict.SKIP] * (guard.PATIENCE - 1) + [Verdict.RETURN]
    guard.returned()
    assert guard.rate == 0.5 and guard.judge(5010, 1e3) is Verdict.SKIP


def test_nothing_finite_is_judged_before_the_warm_up():
    guard = Guard()
    assert guard.judge(0, 1e-3) is Verdict.STEP and guard.judge(1, 1e6) is Verdict.STEP
    assert guard.limit(2) == math.inf and guard.judge(2, math.nan) is Verdict.SKIP


def test_a_steady_norm_does_not_make_it_nervous():
    guard = Guard()
    usual(guard, 500, spread=1e-3)
    assert guard.judge(500, 2 * 1.5) is Verdict.STEP


def test_its_state_is_all_it_knows():
    guard = Guard()
    usual(guard, 100)
    guard.judge(100, 1e4)
    twin = Guard(**guard.state())
    norms = np.exp(np.random.default_rng(1).normal(1, 2, 300))
    assert [guard.judge(101 + i, n) for i, n in enumerate(norms)] == [
        twin.judge(101 + i, n) for i, n in enumerate(norms)
    ]
    assert guard == twin


SETTINGS = ("--nEpochs", "1", "--epoch_size", "10", "--save_steps", "1", "--lr", "1e-4", "--guard", "--ema", "0.9")


def test_a_skipped_step_changes_nothing(tiny_data, tmp_path, monkeypatch, capsys, quick_guard):
    poison(monkeypatch, {7: 1e9})
    states = {}
    save = checkpoint.save

    def keep(state, path, previous=None):
        states.setdefault(state["global_step"], copy.deepcopy(state))
        save(state, path, previous)

    monkeypatch.setattr(checkpoint, "save", keep)
    monkeypatch.setattr(engine.Engine, "_evaluate_all", lambda self, epoch: self.record.lines.clear())
    status, _ = run(tiny_data, tmp_path, *SETTINGS, "--name", "spike", "--epoch_size", "9", "--nEpochs", "1")
    assert status == 0
    told = capsys.readouterr().out
    assert "step 8: skipped" in told and "back to" not in told
    assert states[8]["guard"]["skipped"] == [7] and states[9]["guard"]["seen"] == 8
    for part in ("network", "ema", "optimizer"):
        assert same(states[7][part], states[8][part]) and not same(states[8][part], states[9][part])


@pytest.mark.parametrize("factor", [1e9, math.nan])
def test_repeated_skips_return_to_the_last_good_checkpoint(
    tiny_data, tmp_path, monkeypatch, capsys, quick_guard, factor
):
    poison(monkeypatch, {5: factor, 6: factor})
    status, folder = run(tiny_data, tmp_path, *SETTINGS, "--name", "spikes")
    assert status == 0
    told = capsys.readouterr().out
    assert "step 7: skipped" in told and "back to the weights of step 5" in told and "0.5 times" in told
    last = checkpoint.load(folder / "last.pt")
    assert last["guard"]["rate"] == 0.5 and last["guard"]["returns"] == 1
    assert last["optimizer"]["param_groups"][0]["lr"] < 0.6e-4
    assert all(p.isfinite().all() for p in last["network"].values())
    assert math.isfinite(read_metrics(folder)[-1]["PSNR"])


def test_it_gives_up_when_returning_does_not_help(tiny_data, tmp_path, monkeypatch, capsys, quick_guard):
    poison(monkeypatch, dict.fromkeys(range(5, 10), math.nan))
    status, folder = run(tiny_data, tmp_path, *SETTINGS, "--name", "lost")
    assert status == 1
    assert "--lr" in capsys.readouterr().err
    assert all(p.isfinite().all() for p in checkpoint.load(folder / "good.pt")["network"].values())


def test_a_guarded_run_resumes_bit_for_bit(tiny_data, tmp_path, quick_guard, monkeypatch):
    monkeypatch.setattr(engine.Engine, "_evaluate_all", lambda self, epoch: None)
    half = [*SETTINGS, "--scheduler", "none", "--epoch_size", "4"]
    whole = run(tiny_data, tmp_path, *half, "--nEpochs", "2", "--name", "whole")[1]
    run(tiny_data, tmp_path, *half, "--nEpochs", "1", "--name", "parts")
    parts = run(tiny_data, tmp_path, *half, "--nEpochs", "2", "--name", "parts", "--resume")[1]
    a, b = state_of(whole), state_of(parts)
    assert a["guard"]["seen"] > 0 and same(a, b)


@pytest.mark.parametrize("step", [1, 2])
def test_why_v1_blows_up(step):
    """What a block adds to its input, where that is 1, 2, 4, 8, 16 times as large: the same behind a norm; in MDSRNet
    v1, which has none, more than a hundred times as much between 8 and 16 (pytest -s shows the numbers)."""
    sizes = (1, 2, 4, 8, 16)

    def spread(block, size: float) -> float:
        torch.manual_seed(0)
        x = size * torch.randn(2, 64, 16, 16)
        added = (block.step1(x) if step == 1 else block.step2(x)) - x
        return (added - added.mean((0, 2, 3), keepdim=True)).std().item()

    for block in (MuGI, MuGIM2, MuGIMG, MuGIM):
        torch.manual_seed(0)
        instance = block(64)
        for scale in (*instance.a, *instance.b):
            torch.nn.init.ones_(scale)
        with torch.no_grad():
            spreads = [spread(instance, size) for size in sizes]
        print(f"{block.__name__}, step {step}: " + ", ".join(f"{value:.3g}" for value in spreads))
        if block is MuGIM:
            assert spreads[-1] > 100 * spreads[-2]
        else:
            assert spreads == pytest.approx([spreads[0]] * len(sizes), rel=1e-3)
