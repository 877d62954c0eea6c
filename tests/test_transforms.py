"""Augmentation: what it draws, and what it makes of an image."""

import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dereflect import data
from dereflect.data import transforms
from dereflect.data.transforms import Augmentation, Photograph, augment, scaled_size
from dereflect.util.images import read_rgb


@pytest.mark.parametrize("size", [(48, 33), (33, 48), (40, 40), (9, 12), (500, 201)])
def test_equals_scaling_first_and_cropping_then(size):
    rng = np.random.default_rng(3)
    noise = rng.integers(60, 200, (size[1] // 3, size[0] // 3, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    for _ in range(10):
        draw = Augmentation.draw(rng, 32)
        whole = image.resize(scaled_size(*size, draw.short_side), Image.Resampling.BICUBIC)
        left = int(draw.across * (whole.width - 32 + 1))
        top = int(draw.down * (whole.height - 32 + 1))
        expected = whole.crop((left, top, left + 32, top + 32))
        if draw.flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected = expected.rotate(90 * draw.turns)
        result = augment(Photograph.of(image), draw)
        assert result.dtype == np.float32
        assert result.flags.c_contiguous
        # PIL rounds between its two passes, whose order differs between releases: mostly nothing, seldom
        # a level or two, where a crop that is off by a pixel would differ by dozens
        difference = np.abs(result * 255 - np.asarray(expected))
        assert difference.max() < 2.01
        assert difference.mean() < 0.35


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    edges=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    side=st.sampled_from([1, 16, 48]),
)
def test_scaling_is_that_of_pil(width, height, edges, side):
    """To the bit: whole numbers, rounded alike. PIL may be compiled to fuse operations, which moves a weight's last
    place, and with it, rarely, a pixel by a level."""
    assert transforms._compiled(), "numba works here"
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    left, right = sorted(np.float32(edges[:2]) * np.float32(width))
    top, bottom = sorted(np.float32(edges[2:]) * np.float32(height))
    box = left, top, max(right, left + width / 50), max(bottom, top + height / 50)
    if box[2] > width or box[3] > height:
        box = 0, 0, width, height
    ours, pil = transforms.scale_part(pixels, box, side), transforms._by_pil(pixels, box, side)
    difference = np.abs(ours - np.float32(pil))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("found", [False, True])
def test_without_numba_pil_scales(monkeypatch, found):
    """Where it is missing, and where it computes something else."""
    monkeypatch.setattr(transforms, "_compiled", transforms._compiled.__wrapped__)
    fake = SimpleNamespace(scale_part=lambda *arguments: arguments[-1].fill(0)) if found else None
    monkeypatch.setitem(sys.modules, "dereflect.data.bicubic", fake)
    monkeypatch.delattr(data, "bicubic", raising=False)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC, box=(1, 2, 19, 20))
    np.testing.assert_array_equal(transforms.scale_part(pixels, (1, 2, 19, 20), 16), expected)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    seed=st.integers(0, 2**32),
    crop=st.sampled_from([16, 32]),
)
def test_any_size_of_photograph_works(width, height, seed, crop):
    if max(width, height) > 20 * min(width, height):
        width = height
    image = Image.new("RGB", (width, height), (10, 20, 250))
    result = augment(Photograph.of(image), Augmentation.draw(np.random.default_rng(seed), crop))
    assert result.shape == (crop, crop, 3)
    np.testing.assert_allclose(result, np.broadcast_to(np.array([10, 20, 250]) / 255, result.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((481, 321), 224, (336, 224)),  # 335.6, cut to 335, made even
        ((321, 481), 224, (224, 336)),
        ((500, 375), 300, (400, 300)),
        ((224, 224), 448, (448, 448)),
        ((10, 20), 32, (32, 64)),
    ],
)
def test_scaled_size(size, short_side, expected):
    assert scaled_size(*size, short_side) == expected


def test_draws_cover_what_they_should_evenly():
    rng = np.random.default_rng(0)
    draws = [Augmentation.draw(rng, 32) for _ in range(4000)]
    sides = Counter(draw.short_side for draw in draws)
    assert set(sides) == set(range(32, 65, 2))
    assert max(sides.values()) < 1.5 * min(sides.values())  # 235 each expected, standard deviation 15
    assert np.mean([draw.flip for draw in draws]) == pytest.approx(0.5, abs=0.04)
    turns = Counter(draw.turns for draw in draws)
    assert turns[0] / 4000 == pytest.approx(1 / 2, abs=0.04)
    assert all(turns[i] / 4000 == pytest.approx(1 / 6, abs=0.03) for i in (1, 2, 3))


def test_crops_reach_every_edge():
    """The outermost rows of the image turn up at both ends."""
    rows = np.arange(0, 240, 8, dtype=np.uint8)
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(rows[:, None, None], (30, 30, 3))))
    low, high = (augment(Photograph.of(image), Augmentation(16, 30, 0.5, down, False, 0)) for down in (0.0, 1 - 1e-9))
    assert low[0, 0, 0] == 0
    assert high[-1, 0, 0] == pytest.approx(232 / 255)


def test_large_jpegs_are_decoded_at_reduced_size(tmp_path):
    y, x = np.mgrid[:600, :900] / 50
    image = Image.fromarray((127 + 60 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)).astype(np.uint8))
    image.save(tmp_path / "large.jpg", quality=95)
    image.save(tmp_path / "large.png")
    assert read_rgb(tmp_path / "large.jpg").size == (900, 600)
    assert read_rgb(tmp_path / "large.jpg", least=301).size == (900, 600)
    assert read_rgb(tmp_path / "large.jpg", least=300).size == (450, 300)
    assert read_rgb(tmp_path / "large.jpg", least=32).size == (113, 75)
    assert read_rgb(tmp_path / "large.png", least=32).size == (900, 600)
    draw = Augmentation(crop_size=64, short_side=100, across=0.3, down=0.6, flip=True, turns=1)
    crops = [augment(Photograph.of(read_rgb(tmp_path / "large.jpg", least)), draw) for least in (0, 128)]
    assert np.abs(crops[0] - crops[1]).max() < 0.03
