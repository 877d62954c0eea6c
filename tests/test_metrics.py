"""The four measures against golden numbers, other implementations and what must hold."""

from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dereflect.tools.benchmarks.metrics import published
from dereflect.util.metrics import PSNR_LIMIT, aligned_psnr, joint_psnr, quality_assess

GOLDEN = Path(__file__).parent / "golden" / "metrics.npz"


def images(height: int, width: int, noise: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(height * width)
    target = rng.uniform(0, 255, (height, width, 3))
    return np.clip(target + noise * rng.standard_normal(target.shape), 0, 255), target


def test_equals_the_published_measures():
    golden = np.load(GOLDEN)
    measured = quality_assess(golden["estimate"], golden["target"])
    assert set(measured) == {"PSNR", "SSIM", "LMSE", "NCC"}
    for name, value in measured.items():
        assert type(value) is float
        assert value == pytest.approx(float(golden[name]), rel=1e-4), name  # published sums are float32


@pytest.mark.parametrize("size", [(20, 20), (29, 30), (40, 53), (61, 49), (416, 544)])
@pytest.mark.parametrize("noise", [0.01, 20, 200])
def test_equals_the_published_computation(size, noise):
    estimate, target = images(*size, noise)
    assert quality_assess(estimate, target) == pytest.approx(published(estimate, target), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("height", [59, 60, 61, 65, 66, 67, 69, 70, 71, 79, 80, 119, 120, 126, 130])
def test_bands_of_rows_change_nothing(height):
    """500 pixels wide, an image is measured 60 rows at a time; SSIM and LMSE look 6 and 10 rows further."""
    estimate, target = images(height, 500)
    assert quality_assess(estimate, target) == pytest.approx(published(estimate, target), rel=1e-9)


@pytest.mark.parametrize("size", [(7, 7), (8, 31), (40, 53), (61, 60)])
def test_equals_scikit_image_channel_by_channel(size):
    estimate, target = images(*size)
    measured = quality_assess(estimate, target)
    pairs = [(target[..., c], estimate[..., c]) for c in range(3)]
    psnr = np.mean([peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs])
    ssim = np.mean([structural_similarity(*pair, data_range=255) for pair in pairs])
    assert measured["PSNR"] == pytest.approx(psnr, rel=1e-9)
    assert measured["SSIM"] == pytest.approx(ssim, rel=1e-9)


@pytest.mark.parametrize("of", ["estimate", "target"])
@pytest.mark.parametrize("value", [0.0, 25.5, 0.1, 255.0])
def test_images_without_contrast(of, value):
    flat, other = np.full((73, 501, 3), value), images(73, 501)[1]
    pair = (flat, other) if of == "estimate" else (other, flat)
    measured = quality_assess(*pair)
    assert measured["NCC"] == 0, "there is nothing to correlate"
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = published(*pair)
    for name in ("PSNR", "SSIM", *(["LMSE"] if pair[1].any() else [])):
        assert measured[name] == pytest.approx(expected[name], rel=1e-9), name
    assert quality_assess(flat, flat)["NCC"] == 0


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_whole_levels_and_layers_of_other_strides_are_measured_alike(kind):
    estimate, target = (np.floor(image).astype(kind) for image in images(75, 400))
    expected = published(estimate, target)
    assert quality_assess(estimate, target) == pytest.approx(expected, rel=1e-9)
    turned = [np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0) for image in (estimate, target)]
    assert quality_assess(*turned) == pytest.approx(expected, rel=1e-9)


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


def test_joint_and_aligned_psnr():
    estimate, target = images(40, 53)
    joint = peak_signal_noise_ratio(target, estimate, data_range=255)
    assert joint_psnr(estimate, target) == pytest.approx(joint, rel=1e-9)
    channels = [(estimate[..., c].ravel(), target[..., c].ravel()) for c in range(3)]
    fitted = np.stack([np.polyval(np.polyfit(*pair, 1), pair[0]) for pair in channels])
    aligned = peak_signal_noise_ratio(np.stack([pair[1] for pair in channels]), fitted, data_range=255)
    assert aligned_psnr(estimate, target) == pytest.approx(aligned, rel=1e-9)
    assert aligned_psnr(0.3 * target + 7, target) == aligned_psnr(target, target) == PSNR_LIMIT


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
