"""Separate photographs: files, folders, patterns; any size; at their own resolution and depth.

    python tools/infer.py photograph.jpg holiday/ --checkpoint checkpoints/dsrnet_s/best.pt -o separated

From Python: `from dereflect.tools.infer import load_separator, remove_reflection`; see `models.separator`.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options import parse_infer, separator_settings
from dereflect.options.arguments import STRIDE
from dereflect.util import disk
from dereflect.util.errors import UserError, printable
from dereflect.util.jobs import Job, Plan, find_jobs, status
from dereflect.util.program import Interrupted, run, starting

if TYPE_CHECKING:
    import numpy as np

    from dereflect.models.separator import Separator
    from dereflect.util.photographs import Photograph
    from dereflect.util.progress import Progress

_PART = {"t": "transmission", "r": "reflection", "residue": "residue"}


def __getattr__(name: str):
    """Names of `models.separator` for Python programs; imported on demand, so that --help is fast."""
    if name not in {"Separation", "Separator", "load_separator", "remove_reflection"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dereflect.models import separator

    return getattr(separator, name)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 1 if some photographs failed."""
    options = parse_infer(argv)
    try:
        return infer(options)
    except Interrupted as stop:
        print(f"{stop}; --resume separates the photographs that are left", file=sys.stderr)
        return 128 + stop.number


def infer(options: Namespace) -> int:
    """Separate all photographs that the options name.

    Returns:
        0, or 1 if some photographs could not be read, separated or written; each is reported.

    Raises:
        UserError: a path names no photograph, or the network can't be loaded.
    """
    plan = find_jobs(options)
    if options.output:
        disk.check_folder(options.output, "-o")
    todo, skipped, problems = _todo(plan, options)
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    began = time.monotonic()
    done, failed = 0, len(problems)
    if todo:
        with starting():
            separator = _load(options)
        from dereflect.util.device import release_freed_memory
        from dereflect.util.progress import Progress

        progress = Progress("separating", len(todo))
        for job in todo:
            made, whole = _try(separator, job, progress)
            done, failed = done + made, failed + (not whole)
            release_freed_memory()  # the next photograph may be of another size
            progress.step(f"{progress.done / (time.monotonic() - began):.2f} images/s")
        progress.close()
    seconds = time.monotonic() - began
    rate = f" in {seconds:.1f} s, {done / seconds:.2f} images/s" if done else ""
    counts = [f"; {count} {what}" for count, what in ((skipped, "done before"), (failed, "failed")) if count]
    print(f"{done} separated{rate}{''.join(counts)}{_left_out(plan)}")
    return 1 if failed else 0


def _try(separator: "Separator", job: Job, progress: "Progress") -> tuple[bool, bool]:
    """Do a job, and tell what is wrong; whether anything was made, and whether everything was."""
    refused, made = [], []

    def refuse(line: str) -> None:
        refused.append(line)
        progress.log(f"error: {line}", wrong=True)

    try:
        note = lambda line: progress.log(f"note: {printable(job.source)}: {line}")  # noqa: E731
        separate_file(separator, job, refuse, note, made=made.append)
    except UserError as error:
        progress.log(f"error: {error}", wrong=True)
        return False, False
    progress.log(f"{printable(job.source)} -> {', '.join(map(printable, made))}")
    return True, not refused


def _left_out(plan: Plan) -> str:
    """How many files were passed over, for the closing line, and which."""
    parts = ""
    for files, why in ((plan.made, "as made by an earlier call"), (plan.unread, "as of formats that are not read")):
        if files:
            names = ", ".join(printable(file) for file in files[:3]) + (", ..." if len(files) > 3 else "")
            parts += f"; {len(files)} left out {why} ({names})"
    return parts


def _todo(plan: Plan, options: Namespace) -> tuple[list[Job], int, list[str]]:
    """The jobs that are left to do, how many are done, and a line for each that can't be done.

    Raises:
        UserError: the format that was asked for can't be written here.
    """
    from dereflect.util.photographs import check_format

    if options.format:
        check_format(options.format)
    todo, skipped, problems = [], 0, list(plan.problems)
    for job in plan.jobs:
        try:
            existing = [kind for kind, path in job.outputs.items() if status(path)]
        except UserError as error:
            problems.append(str(error))
            continue
        if options.resume and len(existing) == len(job.outputs):
            skipped += 1
        elif existing and not (options.overwrite or options.resume):
            problems.append(f"{job.outputs[existing[0]]} exists; --overwrite or --resume")
        else:
            missing = {k: path for k, path in job.outputs.items() if options.overwrite or k not in existing}
            todo.append(Job(job.source, job.form, missing))
    return todo, skipped, problems


def separate_file(
    separator: "Separator",
    job: Job,
    refuse: Callable[[str], None] | None = None,
    note: Callable[[str], None] = lambda line: None,
    watch: Callable[[Iterable, int], Iterable] | None = None,
    made: Callable[[Path], None] = lambda path: None,
) -> "Photograph":
    """Make a photograph's files; the photograph and its files are held at 8 or 16 bits, all else in bands of rows.

    Args:
        separator: the network.
        job: the photograph.
        refuse: called, before anything is computed, with a line for each file that the format can't hold; the others
            are made. Without it, and where there are no others, that is an error.
        note: called with a line for everything that the photograph's file says and that is left out.
        watch: as of `models.tiles.blend`; without it, progress is shown on the terminal.
        made: called with every file that has been written.

    Returns:
        The photograph.

    Raises:
        UserError: it can't be read, separated or written.
    """
    import numpy as np

    from dereflect.util.photographs import as_type, depth_of, read_photograph, write_photograph
    from dereflect.util.progress import track

    photograph = read_photograph(job.source)
    job = _fitting(job, photograph, refuse)
    depth = depth_of(photograph, job.form)
    height, width = photograph.pixels.shape[:2]
    if "sidebyside" in job.outputs:
        whole = np.empty((height, 4 * width, 3), depth)
        whole[:, :width] = as_type(photograph.pixels, depth)
        parts = zip(("t", "r", "residue"), np.split(whole, 4, axis=1)[1:], strict=True)
        images = {"sidebyside": whole, **dict(parts)}
    else:
        images = {kind: np.empty((height, width, 3), depth) for kind in job.outputs}
    kinds = [kind for kind in images if kind in _PART]

    def show(places: Iterable, total: int) -> Iterable:
        return track(places, f"{job.source.name}, tiles", total, quiet=total == 1)

    for top, bands in separator.bands(photograph.pixels, [_PART[kind] for kind in kinds], watch or show):
        for kind, band in zip(kinds, bands, strict=True):
            shown = band / 2 + 0.5 if kind == "residue" else band
            images[kind][top : top + len(band)] = _quantised(shown, depth)
    notes = list(photograph.notes)
    for kind, path in job.outputs.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: cannot be made: {error.strerror}") from error
        notes += write_photograph(path, images[kind], photograph, job.form)
        made(path)
    for line in dict.fromkeys(notes):
        note(line)
    return photograph


def _fitting(job: Job, photograph: "Photograph", refuse: Callable[[str], None] | None) -> Job:
    """The job without the files that the format can't hold."""
    from dereflect.util.photographs import check_fits, check_format

    check_format(job.form)
    height, width = photograph.pixels.shape[:2]
    outputs, refused = {}, []
    for kind, path in job.outputs.items():
        try:
            check_fits(path, 4 * width if kind == "sidebyside" else width, height, job.form)
            outputs[kind] = path
        except UserError as error:
            refused.append(error)
    if refused and (not refuse or not outputs):
        raise refused[0]
    for error in refused:
        refuse(str(error))
    return Job(job.source, job.form, outputs)


def _load(options: Namespace) -> "Separator":
    import numpy as np

    from dereflect.models.separator import load_separator
    from dereflect.util.device import keep_freed_memory

    keep_freed_memory()
    separator = load_separator(options.checkpoint, **separator_settings(options))
    separator.separate(np.zeros((STRIDE, STRIDE, 3), np.uint8))  # loads the compiled kernels
    print(f"{separator.inet} on {separator.device}", flush=True)
    return separator


def _quantised(band: "np.ndarray", depth: "np.dtype") -> "np.ndarray":
    """Round values in 0..1 to integers of 8 or 16 bits."""
    import numpy as np

    peak = np.iinfo(depth).max
    return (np.clip(band, 0, 1) * peak + 0.5).astype(depth)


program = partial(run, main)
"""The command `dereflect` of the installed package."""

if __name__ == "__main__":
    sys.exit(program())
