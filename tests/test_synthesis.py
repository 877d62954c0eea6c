"""Synthesis against golden numbers, a second implementation and a clock."""

import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import convolve2d

from dereflect.data.synthesis import KERNEL_ODDS, KERNEL_SIZES, Blend, synthesize
from tests.golden.fill import image

GOLDEN = Path(__file__).parent / "golden" / "synthesis.npz"


def photograph(name: str, height: int, width: int) -> np.ndarray:
    return np.ascontiguousarray(image(name, height, width)[0].transpose(1, 2, 0))


def blur_2d(pixels: np.ndarray, size: int, sigma: float) -> np.ndarray:
    """The textbook way: one 2-D convolution a channel, zeros around."""
    y, x = np.mgrid[:size, :size] - size // 2
    kernel = np.exp(-(x**2 + y**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    return np.stack([convolve2d(pixels[..., c], kernel, mode="same") for c in range(3)], axis=-1)


@pytest.mark.parametrize("case", range(5))
def test_equals_the_published_result(case):
    golden = np.load(GOLDEN)
    size, sigma, alpha, beta, screen = golden[f"params_{case}"]
    t, r = photograph("synthesis_t", 24, 32), photograph("synthesis_r", 24, 32)
    mixture, target_t, target_r = synthesize(t, r, Blend(int(size), sigma, alpha, beta, bool(screen)))
    assert mixture.dtype == target_r.dtype == np.float32
    # float32 against the published float64
    np.testing.assert_allclose(mixture, golden[f"blend_{case}"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(target_r, golden[f"reflection_{case}"], atol=1e-5, rtol=0)
    assert target_t is t


@pytest.mark.parametrize("size", KERNEL_SIZES)
def test_blur_equals_a_2d_convolution(size):
    r = photograph("r", 33, 40)
    _, _, blurred = synthesize(r, r, Blend(size, 3.7, 0.9, 0.8, True))
    np.testing.assert_allclose(blurred, blur_2d(r, size, 3.7), atol=2e-6, rtol=0)


def test_clipped_sum_is_a_plain_sum_where_nothing_exceeds_one():
    t, r = photograph("t", 16, 16) * 0.4, photograph("r", 16, 16) * 0.4
    mixture, _, blurred = synthesize(t, r, Blend(5, 2.0, 0.9, 0.8, False))
    np.testing.assert_allclose(mixture, 0.9 * t + 0.8 * blurred, atol=1e-6)


def test_photographs_are_left_as_they_were():
    t, r = photograph("t", 16, 16), photograph("r", 16, 16)
    before = t.copy(), r.copy()
    for screen in (True, False):
        synthesize(t, r, Blend(11, 2.0, 1.0, 1.0, screen))
    np.testing.assert_array_equal(t, before[0])
    np.testing.assert_array_equal(r, before[1])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), height=st.integers(1, 30), width=st.integers(1, 30), screen=st.booleans())
def test_stays_within_zero_and_one(seed, height, width, screen):
    rng = np.random.default_rng(seed)
    t, r = rng.integers(0, 2, (2, height, width, 3)).astype(np.float32)  # the extremes
    mixture, _, blurred = synthesize(t, r, replace(Blend.draw(rng), screen=screen))
    for layer in (mixture, blurred):
        assert layer.shape == (height, width, 3)
        assert layer.min() >= 0
        assert layer.max() <= 1 + 1e-6


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), height=st.integers(2, 30), width=st.integers(2, 30))
def test_wide_draws_stay_within_zero_and_one(seed, height, width):
    rng = np.random.default_rng(seed)
    t, r = rng.integers(0, 2, (2, height, width, 3)).astype(np.float32)
    mixture, target, blurred = synthesize(t, r, Blend.draw_wide(rng))
    assert target is t
    for layer in (mixture, blurred):
        assert layer.shape == (height, width, 3) and layer.dtype == np.float32
        assert np.isfinite(layer).all() and layer.min() >= 0 and layer.max() <= 1 + 1e-6


def test_what_wide_draws_add():
    """Each as it is defined, one at a time."""
    t, r = photograph("t", 24, 32), photograph("r", 24, 32)
    plain = Blend(5, 2.0, 0.9, 0.5, True)
    _, _, blurred = synthesize(t, r, plain)

    mixture, _, _ = synthesize(t, r, replace(plain, gamma=2.2))
    behind, mirrored = 0.9 * t**2.2, 0.5 * blurred**2.2
    np.testing.assert_allclose(mixture, (behind + mirrored - behind * mirrored) ** (1 / 2.2), atol=1e-5)

    _, _, doubled = synthesize(t, r, replace(plain, ghost=(2, -3), ghost_strength=0.3))
    np.testing.assert_allclose(doubled[4:, :-4], 0.7 * blurred[4:, :-4] + 0.3 * blurred[2:-2, 3:-1], atol=1e-5)

    mixture, _, _ = synthesize(t, r, replace(plain, falloff=(0.0,) * 9))
    np.testing.assert_allclose(mixture, 0.9 * t, atol=1e-6)
    whole, half = (synthesize(t, r, replace(plain, falloff=(share,) * 9))[0] for share in (1.0, 0.5))
    np.testing.assert_allclose(whole, synthesize(t, r, plain)[0], atol=1e-6)
    np.testing.assert_allclose(half, synthesize(t, r, replace(plain, beta=0.25))[0], atol=1e-6)


def test_wide_draws_have_the_published_ones_within():
    rng = np.random.default_rng(0)
    draws = [Blend.draw_wide(rng) for _ in range(2000)]
    published = [d for d in draws if d.alpha < 1]
    assert 0.46 < len(published) / len(draws) < 0.54
    for draw in published:
        assert draw.sigma >= 2 and draw.beta >= 0.4 and draw.gamma == 1 and not draw.falloff and not draw.ghost_strength
    assert all(draw.alpha == 1 and not draw.screen for draw in draws if draw not in published)
    assert 0.21 < np.mean([d.gamma == 2.2 for d in draws]) < 0.29
    assert 0.13 < np.mean([d.ghost_strength > 0 for d in draws]) < 0.20


def test_draws_follow_the_published_distribution():
    rng = np.random.default_rng(0)
    draws = [Blend.draw(rng) for _ in range(4000)]
    # 4000 draws: standard deviation of a share is below 0.008
    for size, odds in zip(KERNEL_SIZES, KERNEL_ODDS, strict=True):
        assert np.mean([draw.kernel_size == size for draw in draws]) == pytest.approx(odds, abs=0.03)
    assert np.mean([draw.screen for draw in draws]) == pytest.approx(0.7, abs=0.03)
    for field, low, high in (("sigma", 2, 5), ("alpha", 0.8, 1), ("beta", 0.4, 1)):
        values = np.array([getattr(draw, field) for draw in draws])
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))


def test_same_generator_same_blend():
    assert Blend.draw(np.random.default_rng(7)) == Blend.draw(np.random.default_rng(7))
    assert Blend.draw(np.random.default_rng(7)) != Blend.draw(np.random.default_rng(8))


def test_five_times_as_fast_as_a_2d_convolution():
    """The whole synthesis on one core against the 2-D convolution alone, interleaved, medians."""
    t, r = photograph("t", 224, 224), photograph("r", 224, 224)
    blend = Blend(9, 3.0, 0.9, 0.8, True)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        ours, theirs = [], []
        for _ in range(7):
            start = time.thread_time()
            synthesize(t, r, blend)
            middle = time.thread_time()
            blur_2d(r, blend.kernel_size, blend.sigma)
            ours.append(middle - start)
            theirs.append(time.thread_time() - middle)
    finally:
        cv2.setNumThreads(threads)
    assert np.median(theirs) > 5 * np.median(ours)
