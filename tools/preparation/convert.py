"""Stock data sets, brought into the published shape."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from data.folders import MIXTURE, PHOTOGRAPHS, TRANSMISSION, find_images, find_pairs
from util import disk
from util.errors import UserError
from util.images import read_rgb
from util.progress import track

CROP = 224
SHORT_SIDE = 420

_THREADS = 4


def voc(source: Path, base: Path) -> None:
    """The centres, 224 x 224 pixels, of a folder's photographs; smaller ones are left out.

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
    outcomes = _convert(jobs, _centre, "cropping")
    small = outcomes.count("small")
    _tell(target, outcomes)
    if small:
        print(f"{small} photographs have a side below {CROP} pixels and were left out")


def real20(source: Path, base: Path) -> None:
    """Pairs with a short side of 420 pixels, bicubic, the long one rounded.

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
    layers = {MIXTURE: "mixture", TRANSMISSION: "transmission"}
    jobs = {
        target / layer / f"{pair.name}.png": getattr(pair, attribute)
        for pair in pairs
        for layer, attribute in layers.items()
    }
    _tell(target, _convert(jobs, _shrink, "resizing"))


def _centre(image: Image.Image) -> Image.Image | None:
    """The middle of an image; None where it is too small."""
    if min(image.size) < CROP:
        return None
    left, top = ((side - CROP) // 2 for side in image.size)
    return image.crop((left, top, left + CROP, top + CROP))


def _shrink(image: Image.Image) -> Image.Image:
    scale = SHORT_SIDE / min(image.size)
    return image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)


def _convert(jobs: dict[Path, Path], change: Callable, title: str) -> list[str]:
    """Target files from their sources, those that are there left as they are.

    Returns:
        For each "new", "there" or "small".

    Raises:
        UserError: a file can't be read or written; all are tried.
    """

    def one(job: tuple[Path, Path]) -> str:
        target, source = job
        if target.exists():
            return "there"
        try:
            changed = change(read_rgb(source))
            return _write(changed, target) if changed else "small"
        except UserError as error:
            return f"error: {error}"
        except OSError as error:
            return f"error: {target}: cannot be written: {error.strerror}"

    for folder in {target.parent for target in jobs}:
        _make(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        outcomes = list(track(pool.map(one, jobs.items()), title, len(jobs)))
    errors = [outcome.removeprefix("error: ") for outcome in outcomes if outcome.startswith("error: ")]
    if errors:
        raise UserError(f"{len(errors)} files can't be converted, all others are; the first: {errors[0]}")
    return outcomes


def _make(folder: Path) -> None:
    with disk.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _write(image: Image.Image, target: Path) -> str:
    """Written whole or not at all, so that a file that is there is a good one."""
    with disk.replacing(target) as temporary:
        image.save(temporary, "PNG")
    return "new"


def _tell(target: Path, outcomes: Iterable[str]) -> None:
    outcomes = list(outcomes)
    print(f"{target}: {outcomes.count('new')} files written, {outcomes.count('there')} were there")
