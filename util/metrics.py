"""How close an estimated transmission is to the truth: the four metrics that the field reports."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    import torch

Distance = Callable[[np.ndarray, np.ndarray], float]

PEAK = 255.0
PSNR_LIMIT = 100.0

_SSIM_WINDOW = 7
_LMSE_WINDOW = 20
_LMSE_STEP = 10
_BAND = 3e4  # pixels whose float64 values and the products of these stay in a processor's cache
_FLAT = 1e-9  # grey levels of contrast that are rounding


def quality_assess(estimate: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """PSNR, SSIM, LMSE and NCC of an estimate.

    Args:
        estimate: (H, W, 3) in 0..255, rounded or not.
        target: the truth, same shape and range.

    Returns:
        `PSNR` in dB and `SSIM` (Wang et al., 2004, uniform 7x7 windows), each the mean over the channels;
        `LMSE`, the error that remains after every 20x20 window got its best brightness (Grosse et al., ICCV 2009), 0
        is best; `NCC`, the correlation of all values, 1 is best, and 0 for an image without any contrast.
        The PSNR of a channel is at most 100 dB, so that averages stay finite when images are equal.

    Raises:
        ValueError: shapes differ, are not (H, W, 3), or a side is shorter than SSIM's window of 7 pixels.
    """
    if estimate.shape != target.shape:
        raise ValueError(f"estimate {estimate.shape} and target {target.shape} differ in shape")
    if target.ndim != 3 or target.shape[2] != 3:
        raise ValueError(f"images must be (H, W, 3), not {target.shape}")
    height, width = target.shape[:2]
    if min(height, width) < _SSIM_WINDOW:
        raise ValueError(f"{width}x{height} pixels are fewer than SSIM's {_SSIM_WINDOW}x{_SSIM_WINDOW}")
    means = tuple(float(image.mean(dtype=np.float64)) for image in (estimate, target))
    errors, similarity, local, moments = np.zeros(3), 0.0, np.zeros(2), np.zeros(3)
    # A band is as high as a number of LMSE's steps, and has the rows below with it that its windows reach into.
    band = _LMSE_STEP * max(2, int(_BAND / width / _LMSE_STEP))
    for top in range(0, height, band):
        # float64 throughout, because SSIM and LMSE are differences of sums of squares
        rows = slice(top, top + band + _LMSE_WINDOW - _LMSE_STEP)
        x, y = (np.ascontiguousarray(image[rows], np.float64) for image in (estimate, target))
        xx, yy, xy = x * x, y * y, x * y
        if len(x) >= min(_LMSE_WINDOW, height):
            local += _local_errors(xx, yy, xy)
        if len(x) >= _SSIM_WINDOW:
            windows = slice(band + _SSIM_WINDOW - 1)
            similarity += _similarities(x[windows], y[windows], (xx + yy)[windows], xy[windows])
        x, y = x[:band], y[:band]
        errors += cv2.sumElems(np.square(x - y))[:3]
        moments += _moments(x, y, *means)
    windows = (height - _SSIM_WINDOW + 1) * (width - _SSIM_WINDOW + 1)
    return {
        "PSNR": float(np.mean([_decibels(error / (height * width)) for error in errors])),
        "SSIM": float(similarity / (3 * windows)),
        "LMSE": float(local[0] / local[1]) if local[1] > 0 else 0.0,
        "NCC": _correlation(moments / target.size),
    }


def load_lpips(device: "torch.device") -> tuple[Distance | None, str]:
    """LPIPS with AlexNet (Zhang et al., CVPR 2018) of two (H, W, 3) images in 0..255, or why there is none."""
    try:
        import lpips

        network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except ImportError:
        return None, "LPIPS is left out: pip install lpips."
    except Exception as error:  # whatever fetching its weights runs into
        return None, f"LPIPS is left out: its weights can't be had ({' '.join(str(error).split())})."

    import torch

    @torch.no_grad()
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        images = (torch.from_numpy(x).permute(2, 0, 1)[None].float().to(device) for x in (a, b))
        return float(network(*(x / 127.5 - 1 for x in images)))

    return distance, ""


def joint_psnr(estimate: np.ndarray, target: np.ndarray) -> float:
    """PSNR in dB of all channels together, at most 100; (H, W, 3) in 0..255.

    The published PSNR is the mean over the channels, which one almost perfect channel can dominate.
    """
    difference = (estimate.astype(np.float64) - target).ravel()
    return _decibels(difference @ difference / difference.size)


def aligned_psnr(estimate: np.ndarray, target: np.ndarray) -> float:
    """`joint_psnr` of the estimate with the brightness and contrast of each channel that fit the target best.

    So only structure counts: an estimate that is merely darker or paler loses nothing.
    """
    x, y = (np.ascontiguousarray(image.reshape(-1, 3).T, np.float64) for image in (estimate, target))
    error = 0.0
    for a, b in zip(x, y, strict=True):
        a, b = a - a.mean(), b - b.mean()
        energy = a @ a
        rest = (a @ b / energy * a if energy > 0 else 0) - b
        error += rest @ rest
    return _decibels(error / x.size)


def _decibels(error: float) -> float:
    """PSNR of a mean squared error, at most PSNR_LIMIT."""
    return float(10 * np.log10(PEAK**2 / max(error, PEAK**2 / 10 ** (PSNR_LIMIT / 10))))


def _similarities(x: np.ndarray, y: np.ndarray, squares: np.ndarray, xy: np.ndarray) -> float:
    """The sum of SSIM over all windows and channels; squares is x * x + y * y."""
    margin = slice(_SSIM_WINDOW // 2, -(_SSIM_WINDOW // 2))
    x, y, squares, xy = (cv2.blur(v, (_SSIM_WINDOW, _SSIM_WINDOW))[margin, margin] for v in (x, y, squares, xy))
    unbiased = _SSIM_WINDOW**2 / (_SSIM_WINDOW**2 - 1)
    # (2 x y + c1) (2 cov(x, y) + c2) / ((x^2 + y^2 + c1) (var(x) + var(y) + c2)), step by step without new arrays
    product = x * y
    means = np.add(np.multiply(x, x, out=x), np.multiply(y, y, out=y), out=x)
    covariance, variances = np.subtract(xy, product, out=xy), np.subtract(squares, means, out=squares)
    for value, factor, constant in (
        (product, 2, 0.01),
        (means, 1, 0.01),
        (covariance, 2 * unbiased, 0.03),
        (variances, unbiased, 0.03),
    ):
        value *= factor
        value += (constant * PEAK) ** 2
    product *= covariance
    means *= variances
    product /= means
    return product.sum()


def _local_errors(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> tuple[float, float]:
    """The errors of LMSE's windows at their best scales, and their energies; a side below 20 pixels is one window."""
    high, wide = (min(_LMSE_WINDOW, side) for side in xx.shape[:2])

    def sums(values: np.ndarray) -> np.ndarray:
        boxes = cv2.boxFilter(values, cv2.CV_64F, (wide, high), anchor=(0, 0), normalize=False)
        return boxes[: len(values) - high + 1 : _LMSE_STEP, : values.shape[1] - wide + 1 : _LMSE_STEP]

    xx, yy, xy = sums(xx), sums(yy), sums(xy)
    # The minimum over s of |s x - y|^2 is yy - xy^2 / xx, and yy for a black estimate.
    explained = np.divide(xy * xy, xx, out=np.zeros_like(xx), where=xx > 1e-5)
    return np.maximum(yy - explained, 0).sum(), yy.sum()


def _moments(x: np.ndarray, y: np.ndarray, mean_x: float, mean_y: float) -> tuple[float, float, float]:
    """Sums over all values of the squared distances from the means, and of their product."""
    x, y = (x - mean_x).ravel(), (y - mean_y).ravel()
    return x @ x, y @ y, x @ y


def _correlation(moments: np.ndarray) -> float:
    """NCC from two variances and a covariance."""
    x, y, xy = moments
    return float(xy / np.sqrt(x * y)) if min(x, y) > _FLAT**2 else 0.0
