"""Two photographs into one that looks as if taken through glass.

The recipe of the published training data: Fan et al. (CEILNet, ICCV 2017) for the clipped sum, Hu and Guo
(YTMT, NeurIPS 2021; DSRNet, ICCV 2023) for the screen blend and the probabilities.
"""

from dataclasses import dataclass

import cv2
import numpy as np

KERNEL_SIZES = (5, 7, 9, 11)
KERNEL_ODDS = (0.1, 0.2, 0.3, 0.4)
SCREEN_ODDS = 0.7


@dataclass(frozen=True)
class Blend:
    """Everything that is random about a synthetic mixture.

    Attributes:
        kernel_size: side of the Gaussian that blurs the reflection, odd, in pixels.
        sigma: its standard deviation, in pixels.
        alpha: strength of the transmission.
        beta: strength of the reflection.
        screen: screen blend if true, else a sum, darkened and clipped where it exceeds 1.
    """

    kernel_size: int
    sigma: float
    alpha: float
    beta: float
    screen: bool

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Blend":
        """A blend from the published distribution."""
        return cls(
            kernel_size=int(rng.choice(KERNEL_SIZES, p=KERNEL_ODDS)),
            sigma=rng.uniform(2, 5),
            alpha=rng.uniform(0.8, 1),
            beta=rng.uniform(0.4, 1),
            screen=bool(rng.random() < SCREEN_ODDS),
        )


def synthesize(t: np.ndarray, r: np.ndarray, blend: Blend) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mix a transmission with a blurred reflection.

    Args:
        t: transmission, float32 (H, W, 3) in 0..1.
        r: photograph that is reflected, same.
        blend: how.

    Returns:
        The mixture, the transmission as given and the blurred reflection: float32 (H, W, 3) in 0..1. Neither
        layer is scaled by its strength: these are the targets.
    """
    taps = _gaussian(blend.kernel_size, blend.sigma)
    # a 2-D Gaussian is two 1-D ones: 2k multiplications a pixel instead of k^2
    blurred = cv2.sepFilter2D(r, cv2.CV_32F, taps, taps, borderType=cv2.BORDER_CONSTANT)
    behind, mirrored = np.float32(blend.alpha) * t, np.float32(blend.beta) * blurred
    mix = _screen if blend.screen else _clipped_sum
    return mix(behind, mirrored), t, blurred


def _gaussian(size: int, sigma: float) -> np.ndarray:
    """(size,) float32 weights that sum to 1."""
    offsets = np.arange(size) - size // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def _screen(behind: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """b + m - b m, in `mirrored`'s memory."""
    mirrored *= 1 - behind
    mirrored += behind
    return mirrored


def _clipped_sum(behind: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """b + m; where that exceeds 1, every m first loses 1.3 times the mean excess. In `mirrored`'s memory."""
    total = behind + mirrored
    excess = total[total > 1]
    if not excess.size:
        return total
    mirrored -= 1.3 * (excess.mean() - 1)
    np.clip(mirrored, 0, 1, out=mirrored)
    mirrored += behind
    return np.clip(mirrored, 0, 1, out=mirrored)
