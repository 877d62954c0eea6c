"""`python -m tests.pictures docs/demo.png` makes the README's picture, of the demo set and the bundled network."""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dereflect import load_separator
from dereflect.data.demo import build_demo
from dereflect.util.images import read_image

WIDTH, HEIGHT, GAP = 180, 150, 6  # pixels
MOST, LEAST = 3, 2


def main(path: str) -> None:
    """Rows of mixture, transmission, its target, what was taken away, the mirrored photograph; prints their gains."""
    separator = load_separator()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        build_demo(Path(folder) / "demo")
        for mixture in sorted(Path(folder).glob("demo/test/*/blended/*")):
            I, T, R = (
                read_image(next((mixture.parents[1] / kind).glob(f"{mixture.stem}.*")))
                for kind in ("blended", "transmission_layer", "reflection_layer")
            )
            found = np.clip(separator.separate(I).transmission, 0, 1)
            gain = psnr(found, T) - psnr(I, T)
            rows.append((gain, mixture.parents[1].name, [I, found, T, np.clip(I - found, 0, 1), R]))
    rows.sort(key=lambda row: -row[0])
    chosen = rows[:MOST] + rows[-LEAST:]
    for gain, name, _ in rows:
        print(f"{gain:+.1f} dB  {name}")
    sheet = np.full((len(chosen) * (HEIGHT + GAP) - GAP, 5 * (WIDTH + GAP) - GAP, 3), 255, np.uint8)
    for y, (_, _, images) in enumerate(chosen):
        for x, image in enumerate(images):
            small = Image.fromarray((image * 255 + 0.5).astype(np.uint8)).resize(
                (WIDTH, HEIGHT), Image.Resampling.LANCZOS
            )
            sheet[y * (HEIGHT + GAP) :, x * (WIDTH + GAP) :][:HEIGHT, :WIDTH] = np.asarray(small)
    Image.fromarray(sheet).save(path, optimize=True)


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    """Of all channels together."""
    return -10 * float(np.log10(np.mean((image.astype(np.float64) - target) ** 2)))


if __name__ == "__main__":
    main(*sys.argv[1:])
