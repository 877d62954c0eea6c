"""Separate photographs: files, folders, patterns; any size; at their own resolution and depth.

    python tools/infer.py photograph.jpg holiday/ --checkpoint checkpoints/dsrnet_s/best.pt -o separated

From Python: `from tools.infer import load_separator, remove_reflection`; see `models.separator`.
"""

import glob
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options import parse_infer, separator_settings
from util.errors import UserError
from util.program import Interrupted, run

if TYPE_CHECKING:
    import numpy as np

    from models.separator import Separator
    from util.photographs import Photograph

_KINDS = ("t", "r", "residue", "sidebyside")
_PART = {"t": "transmission", "r": "reflection", "residue": "residue"}


def __getattr__(name: str):
    """Names of `models.separator` for Python programs; imported on demand, so that --help is fast."""
    if name not in {"Separation", "Separator", "load_separator", "remove_reflection"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from models import separator

    return getattr(separator, name)


@dataclass(frozen=True)
class Job:
    """A photograph, the format of the results, and their files by kind."""

    source: Path
    form: str
    outputs: dict[str, Path]


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
    from util.device import release_freed_memory
    from util.progress import Progress

    jobs = find_jobs(options)
    todo, skipped, failed = [], 0, 0
    for job in jobs:
        existing = [kind for kind, path in job.outputs.items() if path.exists()]
        if options.resume and len(existing) == len(job.outputs):
            skipped += 1
        elif existing and not (options.overwrite or options.resume):
            print(f"error: {job.outputs[existing[0]]} exists; --overwrite or --resume", file=sys.stderr)
            failed += 1
        else:
            missing = {k: path for k, path in job.outputs.items() if options.overwrite or k not in existing}
            todo.append(Job(job.source, job.form, missing))
    began = time.monotonic()
    done = 0
    if todo:
        separator = _load(options)
        progress = Progress("separating", len(todo))
        for job in todo:
            try:
                separate_file(separator, job)
                done += 1
            except UserError as error:
                failed += 1
                progress.log(f"error: {error}")
            release_freed_memory()  # the next photograph may be of another size
            progress.step(f"{progress.done / (time.monotonic() - began):.2f} images/s")
        progress.close()
    seconds = time.monotonic() - began
    rate = f" in {seconds:.1f} s, {done / seconds:.2f} images/s" if done else ""
    print(f"{done} separated{rate}; {skipped} done before, {failed} failed")
    return 1 if failed else 0


def find_jobs(options: Namespace) -> list[Job]:
    """The photographs and their results, in order.

    Raises:
        UserError: a path names no photograph, or two photographs have the same output.
    """
    from util.photographs import format_of, suffix_for

    jobs, made = [], set()
    for source, folder, found in _sources(options.paths):
        form = options.format or format_of(source)
        suffix = suffix_for(source, form)
        place = options.output / folder if options.output else source.parent
        outputs = {kind: place / f"{source.stem}_{kind}{suffix}" for kind in _KINDS}
        made |= {(path.parent.resolve(), path.stem) for path in outputs.values()}
        jobs.append((Job(source, form, {kind: outputs[kind] for kind in options.save}), found))
    # The results of an earlier call are not photographs to separate.
    kept = [job for job, found in jobs if not (found and (job.source.parent.resolve(), job.source.stem) in made)]
    counts = Counter(path for job in kept for path in job.outputs.values())
    for path, count in counts.items():
        if count > 1:
            sources = [str(job.source) for job in kept if path in job.outputs.values()]
            raise UserError(f"{' and '.join(sources[:2])} would both become {path}; separate them one after the other")
    return kept


def separate_file(separator: "Separator", job: Job) -> "Photograph":
    """Separate a photograph and write the results.

    To save memory, the photograph and the results are held at 8 or 16 bits, and everything else in bands of rows.

    Returns:
        The photograph.

    Raises:
        UserError: it can't be read, separated or written.
    """
    import numpy as np

    from util.photographs import as_type, depth_of, read_photograph, write_photograph
    from util.progress import track

    photograph = read_photograph(job.source)
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

    def watch(places: list, total: int) -> Iterable:
        return track(places, f"{job.source.name}, tiles", total, quiet=total == 1)

    for top, bands in separator.bands(photograph.pixels, [_PART[kind] for kind in kinds], watch):
        for kind, band in zip(kinds, bands, strict=True):
            shown = band / 2 + 0.5 if kind == "residue" else band
            images[kind][top : top + len(band)] = _quantised(shown, depth)
    for kind, path in job.outputs.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: cannot be made: {error.strerror}") from error
        write_photograph(path, images[kind], photograph, job.form)
    return photograph


def _load(options: Namespace) -> "Separator":
    from models.separator import load_separator
    from util.device import keep_freed_memory

    keep_freed_memory()
    separator = load_separator(options.checkpoint, **separator_settings(options))
    print(f"{separator.inet} on {separator.device}, tiles of {separator.tile} pixels", flush=True)
    return separator


def _sources(paths: list[str]) -> Iterator[tuple[Path, Path, bool]]:
    """Each photograph once: the file, its folder relative to the named one, and whether a folder or pattern had it."""
    from util.photographs import READABLE

    seen = set()
    for path in paths:
        top = Path(path)
        if top.is_dir():
            files = [(file, file.parent.relative_to(top), True) for file in sorted(top.rglob("*"))]
        elif top.is_file():
            files = [(top, Path(), False)]
        else:
            files = [(Path(name), Path(), True) for name in sorted(glob.glob(path, recursive=True))]  # noqa: PTH207
        if not top.is_file():
            files = [f for f in files if f[0].suffix.lower() in READABLE and f[0].name[0] != "." and f[0].is_file()]
        if not files:
            raise UserError(f"{path}: " + ("has no photographs in it" if top.is_dir() else "there is no such file"))
        for file, folder, found in files:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file, folder, found


def _quantised(band: "np.ndarray", depth: "np.dtype") -> "np.ndarray":
    """Round values in 0..1 to integers of 8 or 16 bits."""
    import numpy as np

    peak = np.iinfo(depth).max
    return (np.clip(band, 0, 1) * peak + 0.5).astype(depth)


if __name__ == "__main__":
    sys.exit(run(main))
