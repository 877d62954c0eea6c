"""The four measures against golden numbers, other implementations and what must hold."""

from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from util.metrics import PSNR_LIMIT, quality_assess

GOLDEN = Path(__file__).parent / "golden" / "metrics.npz"


def images(height: int, width: int, noise: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(height * width)
    target = rng.uniform(0, 255, (height, width, 3))
    return np.clip(target + noise * rng.standard_normal(target.shape), 0, 255), target


def lmse_by_loops(estimate: np.ndarray, target: np.ndarray) -> float:
    error = energy = 0.0
    for c in range(3):
        for i in range(0, target.shape[0] - 19, 10):
            for j in range(0, target.shape[1] - 19, 10):
                e, t = (v[i : i + 20, j : j + 20, c] for v in (estimate, target))
                scale = np.linalg.lstsq(e.reshape(-1, 1), t.reshape(-1), rcond=None)[0]
                error += np.sum((t - scale * e) ** 2)
                energy += np.sum(t**2)
    return error / energy


def test_equals_the_published_measures():
    golden = np.load(GOLDEN)
    measured = quality_assess(golden["estimate"], golden["target"])
    assert set(measured) == {"PSNR", "SSIM", "LMSE", "NCC"}
    for name, value in measured.items():
        assert type(value) is float
        assert value == pytest.approx(float(golden[name]), rel=1e-4), name  # published sums are float32


@pytest.mark.parametrize("size", [(7, 7), (8, 31), (40, 53), (61, 60)])
def test_equals_scikit_image_channel_by_channel(size):
    estimate, target = images(*size)
    measured = quality_assess(estimate, target)
    pairs = [(target[..., c], estimate[..., c]) for c in range(3)]
    psnr = np.mean([peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs])
    ssim = np.mean([structural_similarity(*pair, data_range=255) for pair in pairs])
    assert measured["PSNR"] == pytest.approx(psnr, rel=1e-9)
    assert measured["SSIM"] == pytest.approx(ssim, rel=1e-9)


@pytest.mark.parametrize("size", [(20, 20), (29, 30), (40, 53), (61, 49)])
def test_lmse_equals_loops_over_windows(size):
    estimate, target = images(*size)
    assert quality_assess(estimate, target)["LMSE"] == pytest.approx(lmse_by_loops(estimate, target), rel=1e-9)


def test_lmse_forgives_brightness_and_ncc_contrast_too():
    _, target = images(40, 50)
    assert quality_assess(0.5 * target, target)["LMSE"] == pytest.approx(0, abs=1e-12)
    assert quality_assess(0.5 * target + 20, target)["NCC"] == pytest.approx(1)
    assert quality_assess(255 - target, target)["NCC"] == pytest.approx(-1)


def test_equal_images_are_finite_and_best():
    _, target = images(24, 32)
    assert quality_assess(target, target) == {
        "PSNR": PSNR_LIMIT,
        "SSIM": pytest.approx(1),
        "LMSE": pytest.approx(0, abs=1e-12),
        "NCC": pytest.approx(1),
    }


def test_blank_estimates_are_finite():
    _, target = images(24, 32)
    black = quality_assess(np.zeros_like(target), target)
    assert black["LMSE"] == pytest.approx(1)
    assert black["NCC"] == 0
    assert np.isfinite(list(quality_assess(target, np.zeros_like(target)).values())).all()


def test_images_below_a_window_of_lmse_are_one():
    estimate, target = images(12, 15)
    scale = np.sum(estimate * target, (0, 1)) / np.sum(estimate**2, (0, 1))
    expected = np.sum((target - scale * estimate) ** 2) / np.sum(target**2)
    assert quality_assess(estimate, target)["LMSE"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("estimate", "target", "says"),
    [
        ((6, 40, 3), (6, 40, 3), "40x6 pixels"),
        ((20, 20, 3), (20, 21, 3), "differ in shape"),
        ((3, 20, 20), (3, 20, 20), r"must be \(H, W, 3\)"),
    ],
)
def test_refuses(estimate, target, says):
    with pytest.raises(ValueError, match=says):
        quality_assess(np.zeros(estimate), np.zeros(target))
