"""A run's curves: TensorBoard's scalars over the steps, the sets' metrics over the epochs."""

import math

import numpy as np

from dereflect.util.run.reader import SCORES, Run

# Title of a chart, prefix of its tags, whether its axis is logarithmic.
_CHARTS = (
    ("losses", "train/loss_", True),
    ("learning rate", "train/lr", False),
    ("gradient norm", "train/gradient_norm", True),
    ("images per second", "speed/images_per_second", False),
    ("peak memory, GiB", "speed/peak_memory_GiB", False),
)
_MOST_POINTS = 600  # of a curve; of more, neighbours are averaged


def curves(run: Run) -> list[dict]:
    """The charts, each with a title, the unit of x, whether it is logarithmic, and series: a name and points [x, y]."""
    scalars = _scalars(run)
    charts = []
    for metric in SCORES:
        series = [{"name": name, "points": _by_epoch(run, name, metric)} for name in run.sets]
        charts.append({"title": metric + ", dB" * (metric == "PSNR"), "x": "epoch", "log": False, "series": series})
    for title, start, log in _CHARTS:
        series = [
            {"name": tag.removeprefix(start) or title, "points": _thin(points)}
            for tag, points in scalars.items()
            if tag.startswith(start)
        ]
        charts.append({"title": title, "x": "step", "log": log, "series": series})
    return [chart for chart in charts if any(series["points"] for series in chart["series"])]


def _by_epoch(run: Run, name: str, metric: str) -> list[list]:
    lines = (run.line(name, epoch) for epoch in sorted({line["epoch"] for line in run.lines}))
    return [[line["epoch"], _finite(line[metric])] for line in lines if line]


def _scalars(run: Run) -> dict[str, list[tuple[int, float]]]:
    """All scalars of the events by tag; an error in reading them is added to the run's problems."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if len(run.events) < len(list(run.folder.glob("*tfevents*"))):  # TensorBoard would wait for a pipe for ever
        run.problems.append("TensorBoard's events: not all of them are regular files")
        return {}
    kinds = ("images", "tensors", "audio", "histograms", "compressedHistograms")
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0} | dict.fromkeys(kinds, 1))
    try:
        events.Reload()
        return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    except Exception as error:  # whatever a damaged file makes of TensorBoard's reader
        run.problems.append(f"TensorBoard's events: {type(error).__name__}: {error}")
        return {}


def _thin(points: list[tuple[int, float]]) -> list[list]:
    """At most _MOST_POINTS points, each the mean of neighbouring ones."""
    group = math.ceil(len(points) / _MOST_POINTS)
    parts = (points[i : i + group] for i in range(0, len(points), group or 1))
    return [[part[-1][0], _finite(float(np.mean([value for _, value in part])))] for part in parts]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
