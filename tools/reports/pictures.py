"""The test images of a run: what was seen, what was separated, what was to be found."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

import data
from models.separator import load_separator
from options.arguments import train_parser
from util.errors import UserError
from util.images import read_image
from util.metrics import quality_assess
from util.progress import Progress
from util.run import checkpoint
from util.run.reader import Run

Separate = Callable[[Tensor, str, str], dict[str, np.ndarray]]
"""(mixture (3, H, W), set, name) -> pictures by kind, (H, W, 3) each."""


@dataclass
class Shown:
    """A test image.

    Attributes:
        set, name: which.
        layers: pictures by kind, (H, W, 3) around 0..1: input, transmission, target, reflection, residue (the last
            one only where it was computed).
        metrics: of the transmission, as `util.metrics.quality_assess`.
        before: of the untouched input.
    """

    set: str
    name: str
    layers: dict[str, np.ndarray]
    metrics: dict[str, float]
    before: dict[str, float]


def of_run(run: Run, options: argparse.Namespace) -> tuple[Iterator[Shown], str]:
    """A run's test images, and where they come from, in words.

    Args:
        run: the run.
        options: pictures, checkpoint, base_dir, vgg_weights and gpu_ids, as of tools/report.py.

    Raises:
        UserError: what is needed for the pictures is missing; the message says what to do.
    """
    recipe = _recipe(run, options)
    weights = options.checkpoint or next((p for n in ("best", "last") if (p := run.folder / f"{n}.pt").exists()), None)
    state = checkpoint.load(weights) if weights and options.pictures != "saved" else None
    if _takes_saved(run, options, state):
        separate, source = _saved(run.folder / "images"), f"images/, epoch {_last_epoch(run)}"
    elif state is None:
        raise UserError(f"{run.folder}: neither weights nor images/; name --checkpoint FILE, or --pictures none")
    else:
        separate = _separator(weights, state.get("inet", recipe.inet), recipe, options)
        source = f"{weights.name}, epoch {state.get('epoch', '?')}"
    loaders = data.build_test_loaders(recipe, data.discover(recipe))
    return _all(loaders, separate), source


def _recipe(run: Run, options: argparse.Namespace) -> argparse.Namespace:
    """The run's options, those that it lacks at their defaults, set to evaluate only."""
    if not run.options:
        raise UserError(f"{run.folder}: {run.problems[0]}; without it there is only --pictures none")
    values = {action.dest: action.default for action in train_parser()._actions} | run.options
    values["base_dir"] = options.base_dir or Path(str(values["base_dir"]))
    values["vgg_weights"] = options.vgg_weights or values["vgg_weights"]
    if not values["base_dir"].is_dir():
        raise UserError(f"--base_dir {values['base_dir']}: there is no such folder; say where the run's data is now")
    values |= {"demo": True, "nEpochs": 0, "eval_batch": 1, "nThreads": 0, "gpu_ids": []}  # demo: no missing sets told
    return argparse.Namespace(**values)


def _last_epoch(run: Run) -> int | None:
    """The epoch that was evaluated last, of which images/ is."""
    epochs = [line["epoch"] for line in run.lines if line["estimate"] == "model"]
    return epochs[-1] if epochs else None


def _takes_saved(run: Run, options: argparse.Namespace, state: dict | None) -> bool:
    there = (run.folder / "images").is_dir()
    if options.pictures == "saved" and not there:
        raise UserError(f"--pictures saved: {run.folder}/images is not there; --save_images writes it")
    if options.pictures != "auto" or not there:
        return there and options.pictures == "saved"
    return state is None or (options.checkpoint is None and state.get("epoch") == _last_epoch(run))


def _saved(folder: Path) -> Separate:
    """Reads what --save_images has written."""

    def read(mixture: Tensor, set_name: str, name: str) -> dict[str, np.ndarray]:
        stem = folder / set_name / name
        files = {"transmission": stem.with_name(f"{name}_t.png"), "reflection": stem.with_name(f"{name}_r.png")}
        layers = {kind: read_image(file) for kind, file in files.items()}
        for kind, layer in layers.items():
            if layer.shape[:2] != tuple(mixture.shape[1:]):
                raise UserError(f"{files[kind]}: not of its test image's size; use --pictures weights")
        return layers

    return read


def _separator(weights: Path, inet: str, recipe: argparse.Namespace, options: argparse.Namespace) -> Separate:
    """Computes, with the weights of a checkpoint."""
    separator = load_separator(weights, inet, recipe.vgg_weights, recipe.precision, options.gpu_ids)

    def separate(mixture: Tensor, *_) -> dict[str, np.ndarray]:
        t, r, residue = (_array(x[0]) for x in separator.model.predict(mixture[None].to(separator.device)))
        return {"transmission": t, "reflection": r, "residue": residue / 2 + 0.5}

    return separate


def _all(loaders: dict, separate: Separate) -> Iterator[Shown]:
    progress = Progress("test images", sum(len(loader.dataset) for loader in loaders.values()))
    try:
        for set_name, loader in loaders.items():
            for sample in loader.dataset:
                yield _shown(sample, set_name, separate)
                progress.step()
    finally:
        progress.close()


def _shown(sample: dict, set_name: str, separate: Separate) -> Shown:
    """Separated and measured; measured are the pixels that are shown, at full size."""
    mixture, target = _array(sample["mixture"]), _array(sample["target_t"])
    layers = {
        kind: np.nan_to_num(layer) for kind, layer in separate(sample["mixture"], set_name, sample["name"]).items()
    }
    metrics = quality_assess(layers["transmission"].clip(0, 1) * 255, target * 255)
    before = quality_assess(mixture * 255, target * 255)
    return Shown(set_name, sample["name"], {"input": mixture, "target": target, **layers}, metrics, before)


def _array(image: Tensor) -> np.ndarray:
    """(3, H, W) to (H, W, 3)."""
    return image.detach().cpu().permute(1, 2, 0).numpy()
