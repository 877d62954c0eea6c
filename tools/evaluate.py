"""Measure checkpoints on every test set of a folder, beside the untouched input and the published figures.

    python tools/evaluate.py checkpoints/*/best.pt --base_dir dataset/reflection-removal -o results

Two protocols. `published`: mixtures and targets resized to multiples of 32, estimates not rounded, as the published
figures were measured and as a training with --if_align records. `native`: every pixel, estimates rounded to 8 bits, as
tools/infer.py saves them. PSNR is the mean over the channels, as published; PSNR_joint is of all channels together.
"""

import functools
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options import parse_evaluate, separator_settings
from util import disk, tables
from util.program import run
from util.published import AVERAGE, AVERAGE_PUBLISHED, AVERAGED_SETS, FIGURES, TEST_SETS, averaged_sets

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.loader import Loader
    from models.separator import Separator
    from util.evaluation import Separated

INPUT = "input"


@dataclass(frozen=True)
class Line:
    """The mean metrics of one estimate over all images of one set or of several sets."""

    estimate: str  # the checkpoint, or INPUT
    inet: str
    epoch: int | None
    set: str
    count: int
    values: dict[str, float]

    def plain(self) -> dict[str, object]:
        """Plain values, as the files of -o have them."""
        head = {"estimate": self.estimate, "inet": self.inet, "epoch": self.epoch, "set": self.set}
        return head | {"images": self.count} | self.values


def main(argv: Sequence[str] | None = None) -> None:
    evaluate(parse_evaluate(argv))


def evaluate(options: Namespace) -> None:
    """Measure, show and, with -o, write.

    Raises:
        UserError: there is no test set, a file can't be used, or the results can't be written.
    """
    import data
    from models.separator import load_separator
    from util.device import keep_freed_memory, set_deterministic

    set_deterministic(seed=0)
    keep_freed_memory()
    # All options that `discover` and the loaders read; `demo` silences the warnings that `doubts` gives.
    chosen = Namespace(
        **vars(options),
        demo=True,
        nEpochs=0,
        dataset="sirs_dataset",
        if_align=options.protocol == "published",
        skip_bad_images=False,
    )
    sets = data.discover(chosen)
    counts = {name: len(pairs) for name, pairs in sets.tests.items()}
    warnings = doubts(counts, options.protocol)
    lines: list[Line] = []
    rows: list[dict] = []
    lpips = None
    for checkpoint in options.checkpoints:
        separator = load_separator(checkpoint, **separator_settings(options))
        if not lines:
            lpips, missing = load_lpips(separator.device)
            warnings += [missing] if missing else []
        print(f"{checkpoint}: {separator.inet} on {separator.device}", flush=True)
        measured = {
            name: measure_set(separator, loader, name, options.protocol, lpips)
            for name, loader in data.build_test_loaders(chosen, sets).items()
        }
        if not lines:
            lines += summarise(INPUT, "", None, {n: [row["input"] for row in found] for n, found in measured.items()})
        models = {name: [row["model"] for row in found] for name, found in measured.items()}
        lines += summarise(str(checkpoint), separator.inet, separator.epoch, models)
        rows += [{"checkpoint": str(checkpoint), "set": n, **row} for n, found in measured.items() for row in found]
    text = as_markdown(lines, warnings, options)
    print("\n" + text)
    if options.output:
        write(options, lines, rows, warnings, text)


def doubts(counts: Mapping[str, int], protocol: str) -> list[str]:
    """The reasons why figures measured on sets of these names and sizes can't be compared with the published ones."""
    wrong = []
    for name in AVERAGED_SETS:
        if name not in counts:
            wrong.append(f"{name} is missing")
        elif counts[name] != TEST_SETS[name].images:
            wrong.append(f"{name} has {counts[name]} images instead of {TEST_SETS[name].images}")
    others = sorted(set(counts) - set(TEST_SETS))
    if others:
        wrong.append(f"{', '.join(others)} {'is' if len(others) == 1 else 'are'} none of them")
    warnings = []
    if wrong:
        warnings.append(
            f"WARNING: these are not the published test sets ({'; '.join(wrong)}): don't compare the figures."
        )
    if protocol == "native":
        warnings.append("WARNING: the published figures were measured by --protocol published, these were not.")
    return warnings


def measure_set(
    separator: "Separator",
    loader: "Loader",
    name: str,
    protocol: str,
    lpips: Callable[["Tensor", "Tensor"], float] | None,
) -> list[dict]:
    """Measure every image of a set, and its untouched input.

    Returns:
        Sorted by name: {"name": ..., "model": {metric: value}, "input": {metric: value}}.
    """
    from util.evaluation import measure, measure_images, separate_batches
    from util.progress import track

    native = protocol == "native"
    predict = separator.predict if native else lambda image: separator.model.predict(image.to(separator.device))
    further: dict[str, dict] = {}

    def images() -> Iterator["Separated"]:
        for one in separate_batches(track(loader, f"evaluating {name}", len(loader)), predict):
            further[one.name] = _further(one, native, lpips)  # not in a thread: LPIPS computes on the GPU
            yield one

    rows = measure_images(images(), separator.device, functools.partial(measure, rounded=native))
    return [row | {kind: row[kind] | further[row["name"]][kind] for kind in ("model", "input")} for row in rows]


def load_lpips(device: "torch.device") -> tuple[Callable[["Tensor", "Tensor"], float] | None, str]:
    """LPIPS with AlexNet (Zhang et al., CVPR 2018) of two (3, H, W) images in 0..1, or why there is none."""
    try:
        import lpips

        network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except ImportError:
        return None, "LPIPS is left out: the package lpips is not installed."
    except Exception as error:  # whatever fetching its weights runs into
        return None, f"LPIPS is left out: its weights can't be had ({' '.join(str(error).split())})."

    import torch

    @torch.no_grad()
    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(network(*(2 * x[None].to(device) - 1 for x in (a, b))))

    return distance, ""


def _further(one: "Separated", rounded: bool, lpips: Callable | None) -> dict[str, dict[str, float]]:
    """The metrics that the published figures don't have."""
    from util.metrics import PSNR_LIMIT

    estimate = one.transmission.clamp(0, 1)
    if rounded:
        estimate = (estimate * 255 + 0.5).floor() / 255
    found: dict[str, dict[str, float]] = {}
    for kind, image in (("model", estimate), ("input", one.mixture)):
        # The published PSNR is the mean over the channels, which one almost perfect channel can dominate.
        mse = max(float((image - one.target_t).square().mean()), 10 ** (-PSNR_LIMIT / 10))
        found[kind] = {"PSNR_joint": -10 * math.log10(mse)} | ({"LPIPS": lpips(image, one.target_t)} if lpips else {})
    return found


def summarise(estimate: str, inet: str, epoch: int | None, measured: Mapping[str, list[dict]]) -> list[Line]:
    """A line for each set, one for all images and, if all published sets are there, one for their images."""
    from util.evaluation import mean_over_images, mean_over_sets

    sets = {name: mean_over_images(rows) for name, rows in measured.items()}
    averages = {title: mean_over_sets([sets[name] for name in names]) for title, names in averaged_sets(sets).items()}
    return [Line(estimate, inet, epoch, title, *mean) for title, mean in (sets | averages).items()]


def as_markdown(lines: Sequence[Line], warnings: Sequence[str], options: Namespace) -> str:
    """Tables of the measured figures and of the published ones."""
    title = f"# {options.base_dir}, protocol {options.protocol}\n"
    parts = [title, "\n".join(f"{line}\n" for line in warnings)] if warnings else [title]
    titles = {line.set: f"{line.set} ({line.count})" for line in lines}
    estimates = list(dict.fromkeys(line.estimate for line in lines))
    metrics = list(lines[0].values)
    found = {(line.estimate, line.set): line for line in lines}
    for pair in [metrics[:2], metrics[2:4], metrics[4:]]:
        rows = []
        for estimate in estimates:
            line = found[estimate, AVERAGE]
            name = estimate + (f" ({line.inet})" if line.inet else "")
            rows.append([name, *(_figures([found[estimate, title].values[m] for m in pair], pair) for title in titles)])
        parts += [tables.as_markdown([[" / ".join(pair), *titles.values()], *rows])]
    averaged = [TEST_SETS[name] for name in AVERAGED_SETS]
    heads = [f"{known.title} ({known.images})" for known in averaged]
    heads.append(f"average ({sum(known.images for known in averaged)})")
    published = [[name, *(_figures(values, metrics[:2]) for values in sets)] for name, sets in FIGURES.items()]
    parts += ["Published, by their authors:\n", tables.as_markdown([["PSNR / SSIM", *heads], *published])]
    return "\n".join(parts)


def _figures(values: Sequence[float | None], metrics: Sequence[str]) -> str:
    digits = {"PSNR": 2, "PSNR_joint": 2}
    shown = zip(values, metrics, strict=True)
    return " / ".join("-" if value is None else f"{value:.{digits.get(metric, 3)}f}" for value, metric in shown)


def write(options: Namespace, lines: Sequence[Line], rows: Sequence[dict], warnings: Sequence[str], text: str) -> None:
    """The four files of -o.

    Raises:
        UserError: they can't be written.
    """
    plain = [line.plain() for line in lines]
    metrics = list(lines[0].values)
    images = [
        {key: row[key] for key in ("checkpoint", "set", "name")}
        | {metric: row["model"][metric] for metric in metrics}
        | {f"input_{metric}": row["input"][metric] for metric in metrics}
        for row in rows
    ]
    published = {
        name: dict(zip((*AVERAGED_SETS, AVERAGE_PUBLISHED), sets, strict=True)) for name, sets in FIGURES.items()
    }
    about = {"base_dir": str(options.base_dir), "protocol": options.protocol, "warnings": list(warnings)}
    whole = json.dumps(about | {"measured": plain, "published": published}, indent=1) + "\n"
    files = {"evaluation.md": text, "evaluation.csv": tables.as_csv(plain), "evaluation.json": whole}
    with disk.writing(options.output, "-o"):
        options.output.mkdir(parents=True, exist_ok=True)
    for name, content in {**files, "per_image.csv": tables.as_csv(images)}.items():
        with disk.replacing(options.output / name, "-o") as path:
            path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run(main))
