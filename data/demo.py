"""A small data set in the published layout, made of the photographs that come with scikit-image."""

import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dereflect.data.folders import LAYERS, PAIR_SETS, PHOTOGRAPHS
from dereflect.data.physical import DISPLAY_GAMMA, Exposure, Glass, shine
from dereflect.data.synthesis import Blend, synthesize
from dereflect.util.errors import UserError
from dereflect.util.images import read_rgb, write_image

# No photograph is in both lists. The grey ones add bright texture: the other training photographs are dark, and a
# network trained on them alone darkens its results.
TRAIN_PHOTOGRAPHS = ("astronaut.png", "brick.png", "motorcycle_left.png", "camera.png", "rocket.jpg", "gravel.png")
TEST_PHOTOGRAPHS = ("chelsea.png", "coffee.png")

_SEED = 2018
_PHOTOGRAPH_SIZE = (224, 224)  # width, height
_PAIR_SIZE = (192, 160)
_TEST_SIZE = (180, 150)  # not multiples of 16, so that padding is used
_PHOTOGRAPHS, _PAIRS, _TESTS = 40, 10, 6  # images of each set
_EXAMPLE_SIZE = (576, 384)

_README = f"""Demo data, made from the photographs that come with scikit-image. Version 1.

Every mixture here is synthetic, those under train/real and train/nature included, which only stand in for
photographs through real glass: numbers measured on this set show that a program works, not how well a
model does.

train: crops of {", ".join(TRAIN_PHOTOGRAPHS)}
test:  crops of {", ".join(TEST_PHOTOGRAPHS)}; demo_screen by screen blending, demo_clip by a clipped sum

Their sources and licences (public domain or CC0) are listed in the README of scikit-image's data folder.
"""


def build_demo(folder: str | Path) -> None:
    """Make the demo set unless it exists: some megabytes, the same every time.

    The folder appears only when it is complete. Several processes may call this at once.

    Raises:
        UserError: the folder holds something else or can't be written, or scikit-image lacks its photographs.
    """
    folder = Path(folder)
    if _is_complete(folder):
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not a demo set of this version; remove it, and it is made again")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            finished = Path(scratch) / "finished"
            _write(finished)
            try:
                finished.rename(folder)
            except OSError:
                if not _is_complete(folder):  # otherwise another process was faster
                    raise
    except OSError as error:
        raise UserError(f"{folder}: the demo set cannot be written: {error}") from error


def write_examples(folder: str | Path) -> list[Path]:
    """Write some larger mixtures of photographs that the demo set doesn't train on; the same every time.

    A soft reflection, of which much can be taken away; lamps and a sharp one, which stay in part; and none, where
    nothing is to be taken away. What a file's name has after its number says which.

    Args:
        folder: an existing folder.

    Returns:
        The files.

    Raises:
        UserError: the folder can't be written, or scikit-image lacks its photographs.
    """
    cat, cup, coins = (
        np.asarray(ImageOps.fit(image, _EXAMPLE_SIZE), np.float32) / 255
        for image in _load((*TEST_PHOTOGRAPHS, "coins.png"))
    )
    soft = Glass(
        behind=Exposure(), mirrored=Exposure(), gamma=DISPLAY_GAMMA, lamps=0.0, darkening=1.0, sigma=5.0,
        ghost=(3.0, 5.0), ghost_strength=0.0, ratio=0.4, veil=(0.0, 0.0, 0.0), mask=None, alpha=1.0,
    )  # fmt: skip
    examples = {
        "example_1_soft": (cup, cat, soft),
        "example_2_lamps": (cat, cup, replace(soft, lamps=5.0, darkening=2.0, ghost_strength=0.3, ratio=0.5)),
        "example_3_sharp": (coins, cat, replace(soft, sigma=1.0, ratio=0.5)),
        "example_4_none": (cat, cup, replace(soft, ratio=0.0)),
    }
    paths = [Path(folder) / f"{name}.jpg" for name in examples]
    for path, (t, r, glass) in zip(paths, examples.values(), strict=True):
        write_image(path, shine(t, r, glass)[0])
    return paths


def _is_complete(folder: Path) -> bool:
    readme = folder / "README.txt"
    return readme.is_file() and readme.read_text(encoding="utf-8", errors="replace") == _README


def _write(folder: Path) -> None:
    """Write all images, and the README last."""
    rng = np.random.Generator(np.random.PCG64(_SEED))
    train, test = _load(TRAIN_PHOTOGRAPHS), _load(TEST_PHOTOGRAPHS)
    (folder / PHOTOGRAPHS).mkdir(parents=True)
    for i in range(_PHOTOGRAPHS):
        write_image(folder / PHOTOGRAPHS / f"{i:02}.png", _crop(train[i % len(train)], _PHOTOGRAPH_SIZE, rng))
    for place in PAIR_SETS.values():
        _write_set(folder / place, train, _PAIR_SIZE, _PAIRS, rng)
    for name, screen in (("demo_screen", True), ("demo_clip", False)):
        _write_set(folder / "test" / name, test, _TEST_SIZE, _TESTS, rng, screen)
    (folder / "README.txt").write_text(_README, encoding="utf-8")


def _write_set(
    folder: Path,
    photographs: list[Image.Image],
    size: tuple[int, int],
    count: int,
    rng: np.random.Generator,
    screen: bool | None = None,
) -> None:
    """Write synthetic triples, each made of two photographs; `screen`, if given, says how all are blended."""
    for layer in LAYERS:
        (folder / layer).mkdir(parents=True)
    for i in range(count):
        t, r = (_crop(photographs[(i + other) % len(photographs)], size, rng) for other in (0, 1))
        blend = Blend.draw(rng)
        if screen is not None:
            blend = replace(blend, screen=screen)
        mixture, t, r = synthesize(t, r, blend)
        for layer, image in zip(LAYERS, (mixture, t, r), strict=True):
            write_image(folder / layer / f"{i:02}.png", image)


def _crop(photograph: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random part of a photograph, one to two times as large as `size` (width, height), scaled to `size`."""
    most = min(2.0, photograph.width / size[0], photograph.height / size[1])
    scale = rng.uniform(1, most)
    width, height = (scale * side for side in size)
    left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
    box = (left, top, min(left + width, photograph.width), min(top + height, photograph.height))
    return np.asarray(photograph.resize(size, Image.Resampling.BICUBIC, box=box), np.float32) / 255


def _load(names: tuple[str, ...]) -> list[Image.Image]:
    """Photographs from the installed scikit-image; nothing is downloaded."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UserError("the demo set is made of photographs of scikit-image, which is not installed")
    return [read_rgb(Path(spec.origin).parent / "data" / name) for name in names]
