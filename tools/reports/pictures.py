"""The test images of a run: the mixtures, what the network made of them, and the truth."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dereflect import data
from dereflect.models.separator import load_separator
from dereflect.options import PUBLISHED_DATA
from dereflect.options.arguments import train_parser
from dereflect.options.config import parsed
from dereflect.util.errors import UserError
from dereflect.util.evaluation import BASELINES, Separated, estimates_of, pixels
from dereflect.util.images import read_image
from dereflect.util.metrics import quality_assess
from dereflect.util.progress import track
from dereflect.util.run import checkpoint
from dereflect.util.run.folder import RunFolder
from dereflect.util.run.reader import Run

Separate = Callable[[dict, str], Separated]
"""(sample of a test set, name of the set) -> the sample with the network's results."""


@dataclass
class Shown:
    """A test image on the page.

    Attributes:
        set, name: of the test set and of the image.
        layers: pictures by kind, (H, W, 3) around 0..1: input, transmission, target, reflection, and residue if it was
            computed.
        scores: the metrics of `util.metrics.quality_assess` by estimate: of the transmission as "model", of the
            untouched "input", and of what each of `util.evaluation.BASELINES` makes of it.
    """

    set: str
    name: str
    layers: dict[str, np.ndarray]
    scores: dict[str, dict[str, float]]


def of_run(run: Run, options: argparse.Namespace) -> tuple[Iterator[Shown], str]:
    """A run's test images, and in words where their pictures come from.

    Args:
        run: the run.
        options: those of tools/report.py: pictures, checkpoint, base_dir, vgg_weights and gpu_ids.

    Raises:
        UserError: something that the pictures need is missing; the message says what to do.
    """
    recipe = _recipe(run, options)
    files = RunFolder(run.folder)
    weights = options.checkpoint or next((path for path in (files.best, files.last) if path.exists()), None)
    state = checkpoint.load(weights) if weights and options.pictures != "saved" else None
    if _takes_saved(run, options, state):
        separate, source = _saved(files), f"images/, epoch {_last_epoch(run)}"
    elif state is None:
        raise UserError(f"{run.folder}: neither weights nor images/; name --checkpoint FILE, or --pictures none")
    else:
        separate = _separator(weights, state.get("inet", recipe.inet), recipe, options)
        source = f"{weights.name}, epoch {state.get('epoch', '?')}"
    loaders = data.build_test_loaders(recipe, data.discover(recipe))
    return _all(loaders, separate), source


def _recipe(run: Run, options: argparse.Namespace) -> argparse.Namespace:
    """The run's options, with defaults for those it lacks, changed so that they only evaluate."""
    if not run.options:
        raise UserError(f"{run.folder}: {run.problems[0]}; without it there is only --pictures none")
    parser = train_parser()
    defaults = {action.dest: action.default for action in parser._actions}
    known = {key: value for key, value in run.options.items() if key in defaults and value is not None}
    values = defaults | parsed(parser, known, str(RunFolder(run.folder).options))
    values["base_dir"] = options.base_dir or values["base_dir"] or PUBLISHED_DATA
    values["vgg_weights"] = options.vgg_weights or values["vgg_weights"]
    if not values["base_dir"].is_dir():
        raise UserError(f"--base_dir {values['base_dir']}: there is no such folder; say where the run's data is now")
    values |= {
        "demo": True,
        "nEpochs": 0,
        "eval_batch": 1,
        "nThreads": 0,
        "gpu_ids": [],
    }  # demo: don't report missing sets
    return argparse.Namespace(**values)


def _last_epoch(run: Run) -> int | None:
    """The epoch that was evaluated last; the run's images/ are of this epoch."""
    epochs = [line["epoch"] for line in run.lines if line["estimate"] == "model"]
    return epochs[-1] if epochs else None


def _takes_saved(run: Run, options: argparse.Namespace, state: dict | None) -> bool:
    """Whether the pictures are read from the run's images/ and not computed from weights."""
    there = RunFolder(run.folder).images.is_dir()
    if options.pictures == "saved" and not there:
        raise UserError(f"--pictures saved: {run.folder}/images is not there; --save_images writes it")
    if options.pictures != "auto" or not there:
        return there and options.pictures == "saved"
    return state is None or (options.checkpoint is None and state.get("epoch") == _last_epoch(run))


def _saved(folder: RunFolder) -> Separate:
    """A function that reads the files of --save_images."""

    def read(sample: dict, set_name: str) -> Separated:
        layers = {}
        for kind, file in folder.layers(set_name, sample["name"]).items():
            layers[kind] = torch.from_numpy(read_image(file)).permute(2, 0, 1)
            if layers[kind].shape != sample["mixture"].shape:
                raise UserError(f"{file}: not of its test image's size; use --pictures weights")
        return Separated(**sample, **layers, residue=None)

    return read


def _separator(weights: Path, inet: str, recipe: argparse.Namespace, options: argparse.Namespace) -> Separate:
    """A function that computes with the weights of a checkpoint."""
    separator = load_separator(weights, inet, recipe.vgg_weights, recipe.precision, options.gpu_ids)

    def separate(sample: dict, _: str) -> Separated:
        outputs = separator.model.predict(sample["mixture"][None].to(separator.device))
        t, r, residue = (output[0].cpu().nan_to_num() for output in outputs)
        return Separated(**sample, transmission=t, reflection=r, residue=residue)

    return separate


def _all(loaders: dict, separate: Separate) -> Iterator[Shown]:
    samples = ((sample, set_name) for set_name, loader in loaders.items() for sample in loader.dataset)
    for sample, set_name in track(samples, "test images", sum(len(loader.dataset) for loader in loaders.values())):
        yield _shown(separate(sample, set_name), set_name)


def _shown(one: Separated, set_name: str) -> Shown:
    """The image with metrics of the pixels that the page shows, at full size."""
    target, estimates = pixels(one.target_t), estimates_of(one, False, list(BASELINES))
    scores = {name: quality_assess(estimate, target) for name, estimate in estimates.items()}
    layers = {"input": one.mixture, "target": one.target_t}
    layers |= {"transmission": one.transmission, "reflection": one.reflection}
    layers |= {} if one.residue is None else {"residue": one.residue / 2 + 0.5}
    arrays = {kind: layer.permute(1, 2, 0).numpy() for kind, layer in layers.items()}
    return Shown(set_name, one.name, arrays, scores)
