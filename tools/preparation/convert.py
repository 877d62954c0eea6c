"""Stock data sets, brought into the published shape."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from dereflect.data.folders import MIXTURE, PHOTOGRAPHS, TRANSMISSION, find_images, find_pairs
from dereflect.util import disk
from dereflect.util.errors import UserError
from dereflect.util.images import read_rgb
from dereflect.util.progress import track

CROP = 224
SHORT_SIDE = 420

_THREADS = 4


def voc(source: Path, base: Path) -> None:
    """Crop the centres, 224 x 224 pixels, of a folder's photographs; smaller photographs are left out.

    Raises:
        UserError: there are none, or some can't be read.
    """
    files = find_images(source)
    if not files:
        raise UserError(f"{source}: no photographs in it; name VOC2012's folder JPEGImages")
    target = base / PHOTOGRAPHS
    jobs = {target / f"{file.stem}.png": file for file in files}
    if len(jobs) < len(files):
        raise UserError(f"{source}: {len(files) - len(jobs)} photographs differ in their suffix only; rename them")
    small = _convert(jobs, _crop_centre, target, "cropping")
    if small:
        print(f"{small} photographs have a side below {CROP} pixels and were left out")


def real20(source: Path, base: Path) -> None:
    """Resize pairs to a short side of 420 pixels, bicubic; the long side is rounded.

    Raises:
        UserError: there are none, or files that lack their partner or can't be read.
    """
    problems: list[str] = []
    pairs = find_pairs(source, problems)
    if problems:
        raise UserError(f"{source}: {len(problems)} files can't be used, the first: {problems[0]}")
    if not pairs:
        raise UserError(f"{source}: no pairs in it; expected {MIXTURE}/ and {TRANSMISSION}/")
    target = base / "test/real20_420"
    jobs = {target / MIXTURE / f"{pair.name}.png": pair.mixture for pair in pairs}
    jobs |= {target / TRANSMISSION / f"{pair.name}.png": pair.transmission for pair in pairs}
    _convert(jobs, _shrink, target, "resizing")


def _crop_centre(image: Image.Image) -> Image.Image | None:
    """The middle of an image; None where it is too small."""
    if min(image.size) < CROP:
        return None
    left, top = ((side - CROP) // 2 for side in image.size)
    return image.crop((left, top, left + CROP, top + CROP))


def _shrink(image: Image.Image) -> Image.Image:
    scale = SHORT_SIDE / min(image.size)
    return image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)


def _convert(
    jobs: dict[Path, Path], change: Callable[[Image.Image], Image.Image | None], target: Path, title: str
) -> int:
    """Write each target file from its source; files that are there already stay as they are.

    Returns:
        How many were left out because `change` returned None.

    Raises:
        UserError: a file can't be read or written; all are tried.
    """

    def convert(job: tuple[Path, Path]) -> str | UserError:
        path, source = job
        try:
            if path.exists():
                return "there"
            changed = change(read_rgb(source))
            if changed is None:
                return "left out"
            with disk.replacing(path) as temporary:
                changed.save(temporary, "PNG")
            return "written"
        except UserError as error:
            return error

    for folder in {path.parent for path in jobs}:
        with disk.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        outcomes = list(track(pool.map(convert, jobs.items()), title, len(jobs)))
    errors = [outcome for outcome in outcomes if isinstance(outcome, UserError)]
    if errors:
        raise UserError(f"{len(errors)} files can't be converted, all others are; the first: {errors[0]}")
    print(f"{target}: {outcomes.count('written')} files written, {outcomes.count('there')} were there")
    return outcomes.count("left out")
