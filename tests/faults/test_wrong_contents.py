"""Whole checkpoints of wrong contents: --resume refuses each with one line and takes the checkpoint before."""

import copy
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from dereflect.models.arch import create_model
from dereflect.options import parse_train
from dereflect.util.distributed import join
from dereflect.util.errors import UserError
from dereflect.util.optim import build_optimizer, load_optimizer
from dereflect.util.run import checkpoint, resume
from dereflect.util.run.folder import RunFolder
from dereflect.util.stability import Guard
from tests.helpers import same

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture
def options() -> Namespace:
    return parse_train(["--inet", "small", "--ema", "0.9", "--guard", "--base_dir", ".", "--vgg_weights", "random"])


@pytest.fixture
def parts(options) -> tuple:
    """A network, its optimiser after a step, and their run's identity."""
    network = create_model("small")
    optimizer = build_optimizer(network, options)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return network, optimizer, resume.identity(options, {"pairs": {"files": 2, "hash": "0"}}, 1)


@pytest.fixture
def state(parts) -> dict:
    network, optimizer, identity = parts
    counts = {"epoch": 1, "step": 0, "global_step": 3, "ema_updates": 3, "best": 20.0}
    weights = {"network": network.state_dict(), "ema": copy.deepcopy(network.state_dict())}
    more = {"optimizer": optimizer.state_dict(), "guard": Guard().state(), "random": torch.get_rng_state()}
    return {"format": 1, **identity, **counts, **weights, **more, "random_cuda": None}


def put(state: dict, path: str, value: object) -> dict:
    """A copy with another value at "a/0/b"."""
    state = copy.deepcopy(state)
    *above, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place = state
    for key in above:
        place = place[key]
    place[last] = value
    return state


COUNTS = ("epoch", "step", "global_step", "ema_updates", "samples_per_step")
SHAPE = (16, 3, 3, 3)
NAN, ODD = torch.tensor(math.nan), (None, "x", [], {}, -1, 1.5, True, 2**70, torch.ones(2))
MOMENT = "optimizer/state/0/exp_avg"
WRONG = [
    *(
        (name, value)
        for name in ("epoch", "step", "global_step", "ema_updates", "samples_per_step")
        for value in ODD[1:]
    ),
    *((name, value) for name in ("network", "ema", "optimizer", "random") for value in ODD if value != {}),
    *(
        (name, value)
        for name in ("options", "data", "code", "guard")
        for value in ("x", [1], 3, {1: 2}, {"x": {"y": 1}})
    ),
    *(("best", value) for value in ("x", math.nan, [1.0])),
    *(("inet", value) for value in (None, 3, ["small"])),
    *((MOMENT, value) for value in (None, 3, torch.ones(1), NAN.expand(SHAPE).clone(), torch.ones(SHAPE).int())),
    *(("optimizer/state/0/exp_avg_sq", torch.full(SHAPE, value)) for value in (-1.0, math.inf)),
    *(("optimizer/state/0/step", value) for value in (NAN, torch.ones(2), 3, torch.tensor(-1.0))),
    *(("optimizer/state/0", value) for value in ({}, [], None, {"x": 1})),
    *(("optimizer/state", value) for value in ([], None, {"a": {}}, {99: {}})),
    *(("optimizer/param_groups", value) for value in ([], None, {}, [{}, {}], [{"params": [0]}], [1, 2])),
    *(("optimizer/param_groups/0/lr", value) for value in (None, "x", math.nan, torch.ones(2))),
    *(("optimizer/param_groups/0/params", value) for value in (None, [0, 0], ["a", "b"], [[1], [2]])),
    *(("network/layers.0.weight", value) for value in (None, 3, "x", torch.ones(SHAPE).int(), [1.0])),
    *(("network/layers.0.weight", torch.ones(SHAPE, **kind)) for kind in ({"device": "meta"}, {"dtype": torch.cfloat})),
    ("network/3", torch.ones(1)),
    ("options/3", 1),
    ("options/lr", {"x": 1}),
    ("options/batchSize", "many"),
    ("data/pairs", 3),
    ("data/pairs/files", "x"),
    ("guard/mean", math.nan),
    ("guard/skipped", [None]),
    ("guard/other", 1),
    ("random", torch.zeros(5, dtype=torch.uint8)),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_contents_are_refused_and_the_checkpoint_before_is_taken(number, state, parts, options, tmp_path):
    path, value = WRONG[number]
    network, optimizer, identity = parts
    run = RunFolder(tmp_path)
    checkpoint.save(state, run.previous)
    torch.save(put(state, path, value), run.last)
    loaded, messages = run.load_newest(join([]), options, network, optimizer, identity)
    assert same(loaded, state) and run.refused.exists() and not run.last.exists(), path
    assert len(messages) == 2 and str(run.last) in messages[0] and "\n" not in "".join(messages)
    assert str(run.previous) in messages[1]
    load_optimizer(optimizer, loaded["optimizer"])


def test_without_one_before_it_is_one_line(state, parts, options, tmp_path):
    run = RunFolder(tmp_path)
    checkpoint.save(put(state, MOMENT, NAN.expand(SHAPE).clone()), run.last)
    with pytest.raises(UserError, match="exp_avg of parameter 0 has values that are NaN"):
        run.load_newest(join([]), options, *parts)


def test_what_is_right_is_taken(state, parts, options, tmp_path):
    """Without what older versions did not write, too."""
    run = RunFolder(Path(tmp_path))
    for absent in ((), ("guard", "data", "code", "samples_per_step"), ("random_cuda",)):
        checkpoint.save({key: value for key, value in state.items() if key not in absent}, run.last)
        assert run.load_newest(join([]), options, *parts)[0].keys() == state.keys() - set(absent)
