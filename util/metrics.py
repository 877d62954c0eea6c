"""How close an estimated transmission is to the truth: the four metrics that the field reports."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import cv2
import numpy as np
from skimage.metrics import structural_similarity

if TYPE_CHECKING:
    import torch

Distance = Callable[[np.ndarray, np.ndarray], float]

PEAK = 255.0
PSNR_LIMIT = 100.0

_SSIM_WINDOW = 7
_LMSE_WINDOW = 20
_LMSE_STEP = 10


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
    if min(target.shape[:2]) < _SSIM_WINDOW:
        raise ValueError(
            f"{target.shape[1]}x{target.shape[0]} pixels are fewer than SSIM's {_SSIM_WINDOW}x{_SSIM_WINDOW}"
        )
    # float64 throughout, because SSIM and LMSE are differences of sums of squares
    x, y = (np.ascontiguousarray(image, np.float64) for image in (estimate, target))
    return {
        "PSNR": _psnr(x, y),
        "SSIM": float(structural_similarity(x, y, data_range=PEAK, channel_axis=2)),
        "LMSE": _lmse(x, y),
        "NCC": _ncc(x, y),
    }


def load_lpips(device: "torch.device") -> tuple[Distance | None, str]:
    """LPIPS with AlexNet (Zhang et al., CVPR 2018) of two (H, W, 3) images in 0..255, or why there is none."""
    try:
        import lpips

        network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except ImportError:
        return None, "LPIPS is left out: the package lpips is not installed."
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
    error = np.mean(np.square(estimate.astype(np.float64) - target))
    return float(10 * np.log10(PEAK**2 / max(error, PEAK**2 / 10 ** (PSNR_LIMIT / 10))))


def aligned_psnr(estimate: np.ndarray, target: np.ndarray) -> float:
    """`joint_psnr` of the estimate with the brightness and contrast of each channel that fit the target best.

    So only structure counts: an estimate that is merely darker or paler loses nothing.
    """
    x, y = (image.reshape(-1, 3).astype(np.float64) for image in (estimate, target))
    x, y = x - x.mean(0), y - y.mean(0)
    energy = np.square(x).sum(0)
    slope = np.divide((x * y).sum(0), energy, out=np.zeros(3), where=energy > 0)
    return joint_psnr(slope * x, y)


def _psnr(x: np.ndarray, y: np.ndarray) -> float:
    error = np.square(x - y).mean((0, 1))
    floor = PEAK**2 / 10 ** (PSNR_LIMIT / 10)
    return float(np.mean(10 * np.log10(PEAK**2 / np.maximum(error, floor))))


def _lmse(x: np.ndarray, y: np.ndarray) -> float:
    """The errors of all windows at their best scales, divided by their energies; a side below 20 px is one window."""
    xx, yy, xy = (_sums(v, _LMSE_WINDOW)[::_LMSE_STEP, ::_LMSE_STEP] for v in (x * x, y * y, x * y))
    # The minimum over s of |s x - y|^2 is yy - xy^2 / xx, and yy for a black estimate.
    explained = np.divide(xy * xy, xx, out=np.zeros_like(xx), where=xx > 1e-5)
    energy = yy.sum()
    return float(np.maximum(yy - explained, 0).sum() / energy) if energy > 0 else 0.0


def _ncc(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt(np.square(x).sum() * np.square(y).sum())
    return float(np.sum(x * y) / scale) if scale > 0 else 0.0


def _sums(values: np.ndarray, window: int) -> np.ndarray:
    """Sums over all square windows inside (H, W, 3): (H - window + 1, W - window + 1, 3)."""
    high, wide = (min(window, side) for side in values.shape[:2])
    sums = cv2.boxFilter(values, cv2.CV_64F, (wide, high), anchor=(0, 0), normalize=False)
    return sums[: values.shape[0] - high + 1, : values.shape[1] - wide + 1]
