"""Measure checkpoints on every test set of a folder, beside the untouched input and the published figures.

    python tools/evaluate.py checkpoints/*/best.pt --base_dir dataset/reflection-removal -o results

Two protocols. `published`: mixtures and targets resized to multiples of 32, estimates not rounded, as the published
figures were measured and as a training with --if_align records. `native`: every pixel, estimates rounded to 8 bits, as
tools/infer.py saves them. PSNR is the mean over the channels, as published; PSNR_joint is of all channels together;
PSNR_aligned is that after the best brightness and contrast of each channel, so that only structure counts; worse is the
share of images whose PSNR_joint falls by more than 0.1 dB; median_gain is of PSNR_joint. Beside the untouched input
stand two changes that cost nothing: a network that doesn't beat them has learnt to darken.
"""

import fnmatch
import functools
import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options import parse_evaluate, separator_settings
from dereflect.util import disk, tables
from dereflect.util.errors import UserError
from dereflect.util.program import run
from dereflect.util.published import AVERAGE, AVERAGE_PUBLISHED, AVERAGED_SETS, FIGURES, TEST_SETS, averaged_sets

if TYPE_CHECKING:
    from dereflect.data.loader import Loader
    from dereflect.models.separator import Separator
    from dereflect.util.evaluation import Separated
    from dereflect.util.metrics import Distance

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
    from dereflect import data
    from dereflect.data.folders import find_images
    from dereflect.models.separator import load_separator
    from dereflect.util.device import keep_freed_memory, set_deterministic
    from dereflect.util.evaluation import BASELINES
    from dereflect.util.metrics import load_lpips

    set_deterministic(seed=0)
    keep_freed_memory()
    if options.output:
        disk.check_folder(options.output, "-o")
    photographs = find_images(options.clean) if options.clean else []
    if options.clean and not photographs:
        raise UserError(f"--clean {options.clean}: no photograph in it")
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
    clean: dict[str, list[float]] = {}
    lpips = None
    for checkpoint in options.checkpoints:
        separator = load_separator(checkpoint, **separator_settings(options))
        if options.silence:
            silence(separator, options.silence)
        if not lines:
            lpips, missing = load_lpips(separator.device)
            warnings += [missing] if missing else []
        print(f"{checkpoint}: {separator.inet} on {separator.device}", flush=True)
        kinds = (INPUT, *BASELINES, "model") if not lines else ("model",)
        measured = {
            name: measure_set(separator, loader, name, options.protocol, lpips, () if rows else tuple(BASELINES))
            for name, loader in data.build_test_loaders(chosen, sets).items()
        }
        for kind in kinds:
            of_model = (str(checkpoint), separator.inet, separator.epoch)
            estimate = of_model if kind == "model" else (kind, "", None)
            lines += summarise(*estimate, {n: [row[kind] for row in found] for n, found in measured.items()})
        rows += [{"checkpoint": str(checkpoint), "set": n, **row} for n, found in measured.items() for row in found]
        if photographs:
            clean |= measure_clean(separator, str(checkpoint), photographs, not clean)
    show = functools.partial(tables.as_text, left=1, width=tables.TERMINAL)
    print("\n" + as_tables(lines, warnings, options, lambda rows: show(rows) + "\n") + clean_as_table(clean, show))
    if options.output:
        text = as_tables(lines, warnings, options, tables.as_markdown) + clean_as_table(clean, tables.as_markdown)
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


def silence(separator: "Separator", pattern: str) -> None:
    """Set the network's parameters to 0 whose names match, to see what they are good for.

    Raises:
        UserError: there are none.
    """
    parameters = dict(separator.model.network.named_parameters())
    names = fnmatch.filter(parameters, pattern)
    if not names:
        raise UserError(f"--silence {pattern}: no parameter of {separator.inet} has such a name, as {min(parameters)}")
    for name in names:
        parameters[name].data.zero_()
    print(f"{len(names)} of {len(parameters)} parameters set to 0")


def measure_set(
    separator: "Separator",
    loader: "Loader",
    name: str,
    protocol: str,
    lpips: "Distance | None",
    baselines: Sequence[str],
) -> list[dict]:
    """Measure every image of a set, its untouched input and what the baselines make of that.

    Returns:
        Sorted by name: {"name": ..., "model": {metric: value}, "input": {metric: value}, baseline: ...}.
    """
    from dereflect.util.evaluation import estimates_of, judge, measure_images, pixels, separate_batches
    from dereflect.util.progress import track

    native = protocol == "native"
    distances: dict[str, dict] = {}

    def images() -> Iterator["Separated"]:
        for one in separate_batches(track(loader, f"evaluating {name}", len(loader)), separator.predict):
            if lpips:  # not in a thread: LPIPS computes on the GPU
                estimates = estimates_of(one, native, baselines)
                distances[one.name] = {kind: {"LPIPS": lpips(e, pixels(one.target_t))} for kind, e in estimates.items()}
            yield one

    def measure(one: "Separated") -> dict[str, dict[str, float]]:
        return judge(estimates_of(one, native, baselines), pixels(one.target_t))

    rows = measure_images(images(), separator.device, measure)
    for row in rows:
        for kind, found in distances.get(row["name"], {}).items():
            row[kind] |= found
    return rows


def measure_clean(separator: "Separator", name: str, files: Sequence[Path], baselines: bool) -> dict[str, list[float]]:
    """PSNR_joint of what comes out of photographs without reflections, against what went in, by estimate.

    Raises:
        UserError: one can't be read.
    """
    from dereflect.util.evaluation import BASELINES
    from dereflect.util.images import read_image
    from dereflect.util.metrics import joint_psnr
    from dereflect.util.progress import track

    found: dict[str, list[float]] = {}
    for file in track(files, "clean photographs", len(files)):
        image = read_image(file)
        estimates = {kind: change(image) for kind, change in BASELINES.items()} if baselines else {}
        for kind, estimate in {**estimates, name: separator.separate(image).transmission}.items():
            rounded = (estimate.clip(0, 1) * 255 + 0.5).astype("uint8")
            found.setdefault(kind, []).append(joint_psnr(rounded, image * 255))
    return found


def summarise(estimate: str, inet: str, epoch: int | None, measured: Mapping[str, list[dict]]) -> list[Line]:
    """A line for each set, one for all images and, if all published sets are there, one for their images."""
    from dereflect.util.evaluation import mean_over_images, mean_over_sets

    sets = {name: mean_over_images(rows) for name, rows in measured.items()}
    averaged = averaged_sets(sets)
    averages = {title: mean_over_sets([sets[name] for name in names]) for title, names in averaged.items()}
    lines = []
    for title, (count, values) in (sets | averages).items():
        gains = [row["gain"] for name in averaged.get(title, [title]) for row in measured[name]]
        values = {metric: value for metric, value in values.items() if metric != "gain"}
        values["median_gain"] = statistics.median(gains)
        lines.append(Line(estimate, inet, epoch, title, count, values))
    return lines


def as_tables(
    lines: Sequence[Line], warnings: Sequence[str], options: Namespace, form: Callable[[tables.Rows], str]
) -> str:
    """Tables of the measured figures and of the published ones, each made by `form`."""
    title = f"# {options.base_dir}, protocol {options.protocol}\n"
    parts = [title, "\n".join(f"{line}\n" for line in warnings)] if warnings else [title]
    titles = {line.set: f"{line.set} ({line.count})" for line in lines}
    estimates = list(dict.fromkeys(line.estimate for line in lines))
    metrics = list(lines[0].values)
    found = {(line.estimate, line.set): line for line in lines}
    for pair in [metrics[:2], metrics[2:4], metrics[4:6], metrics[6:]]:
        rows = []
        for estimate in estimates:
            line = found[estimate, AVERAGE]
            name = estimate + (f" ({line.inet})" if line.inet else "")
            rows.append([name, *(_figures([found[estimate, title].values[m] for m in pair], pair) for title in titles)])
        parts += [form([[" / ".join(pair), *titles.values()], *rows])]
    averaged = [TEST_SETS[name] for name in AVERAGED_SETS]
    heads = [f"{known.title} ({known.images})" for known in averaged]
    heads.append(f"average ({sum(known.images for known in averaged)})")
    published = [[name, *(_figures(values, metrics[:2]) for values in sets)] for name, sets in FIGURES.items()]
    parts += ["Published, by their authors:\n", form([["PSNR / SSIM", *heads], *published])]
    return "\n".join(parts)


def clean_as_table(clean: Mapping[str, Sequence[float]], form: Callable[[tables.Rows], str]) -> str:
    """A table, made by `form`, of `measure_clean`, or nothing."""
    if not clean:
        return ""
    count = len(next(iter(clean.values())))
    rows = [[name, f"{statistics.mean(found):.1f}", f"{min(found):.1f}"] for name, found in clean.items()]
    return "\n" + form([[f"PSNR_joint of clean photographs ({count})", "mean", "worst"], *rows])


def _figures(values: Sequence[float | None], metrics: Sequence[str]) -> str:
    digits = {"PSNR": 2, "PSNR_joint": 2, "PSNR_aligned": 2, "median_gain": 2}
    shown = zip(values, metrics, strict=True)
    return " / ".join("-" if value is None else f"{value:.{digits.get(metric, 3)}f}" for value, metric in shown)


def write(options: Namespace, lines: Sequence[Line], rows: Sequence[dict], warnings: Sequence[str], text: str) -> None:
    """The four files of -o.

    Raises:
        UserError: they can't be written.
    """
    plain = [line.plain() for line in lines]
    metrics = list(rows[0]["model"])
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


program = partial(run, main)
"""The command `dereflect-evaluate` of the installed package."""

if __name__ == "__main__":
    sys.exit(program())
