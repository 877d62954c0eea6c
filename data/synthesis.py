"""Blend two photographs into one that looks as if it were taken through glass.

The recipe of the published training data: Fan et al. (CEILNet, ICCV 2017) for the clipped sum, Hu and Guo
(YTMT, NeurIPS 2021; DSRNet, ICCV 2023) for the screen blend and the probabilities. `Blend.draw_wide` adds further
effects of real glass.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

KERNEL_SIZES = (5, 7, 9, 11)
KERNEL_ODDS = (0.1, 0.2, 0.3, 0.4)
SCREEN_ODDS = 0.7
GRID = 3
_FARTHEST_GHOST = 6  # pixels


@dataclass(frozen=True)
class Blend:
    """Everything that is random about a synthetic mixture.

    Attributes:
        kernel_size: side of the Gaussian that blurs the reflection, odd, in pixels.
        sigma: its standard deviation, in pixels.
        alpha: strength of the transmission.
        beta: strength of the reflection.
        screen: screen blend if true, else a sum, darkened and clipped where it exceeds 1.
        gamma: exponent under which the layers are added: 1 adds pixel values, 2.2 adds light.
        ghost: shift of the second reflection, which the pane's other surface makes, (down, right) in pixels.
        ghost_strength: share of the second reflection in the whole reflection.
        falloff: strength of the reflection from 0 to 1 on a grid of GRID x GRID points, interpolated between them;
            empty for 1 everywhere.
    """

    kernel_size: int
    sigma: float
    alpha: float
    beta: float
    screen: bool
    gamma: float = 1.0
    ghost: tuple[int, int] = (0, 0)
    ghost_strength: float = 0.0
    falloff: tuple[float, ...] = ()

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

    @classmethod
    def draw_wide(cls, rng: np.random.Generator) -> "Blend":
        """A blend from the published distribution in half of all draws, else from a wider one.

        A wide blend is always a sum, whose transmission isn't dimmed, so that nothing is to be changed where there is
        no reflection. Of the wide blends, half are sharper, half are weaker, half add light (gamma 2.2), half have a
        strength that varies over the image, and a third have a second reflection, from the pane's other surface
        (Shih et al., "Reflection removal using ghosting cues", CVPR 2015).
        """
        blend = cls.draw(rng)
        if rng.random() < 0.5:
            return blend
        changes: dict[str, object] = {"alpha": 1.0, "screen": False}
        if rng.random() < 0.5:
            changes["sigma"] = rng.uniform(0.3, 2)
        if rng.random() < 0.5:
            changes["beta"] = rng.uniform(0.1, 0.6)
        if rng.random() < 0.5:
            changes["gamma"] = 2.2
        if rng.random() < 1 / 3:
            down, right = rng.integers(-_FARTHEST_GHOST, _FARTHEST_GHOST, 2, endpoint=True).tolist()
            changes |= {"ghost": (down, right), "ghost_strength": rng.uniform(0.2, 0.5)}
        if rng.random() < 0.5:
            changes["falloff"] = tuple(rng.uniform(0, 1, GRID * GRID).tolist())
        return replace(blend, **changes)


def synthesize(t: np.ndarray, r: np.ndarray, blend: Blend) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mix a transmission with a blurred reflection.

    Args:
        t: transmission, float32 (H, W, 3) in 0..1.
        r: photograph that is reflected, same.
        blend: how.

    Returns:
        The mixture, the given transmission and the blurred reflection, second reflection included: float32 (H, W, 3)
        in 0..1. The two layers, which are the targets, are not scaled by their strengths.
    """
    taps = _gaussian(blend.kernel_size, blend.sigma)
    # a 2-D Gaussian is the product of two 1-D ones: 2k multiplications a pixel instead of k^2
    blurred = cv2.sepFilter2D(r, cv2.CV_32F, taps, taps, borderType=cv2.BORDER_CONSTANT)
    if blend.ghost_strength:
        shift = np.float32([[1, 0, blend.ghost[1]], [0, 1, blend.ghost[0]]])
        second = cv2.warpAffine(blurred, shift, blurred.shape[1::-1], borderMode=cv2.BORDER_REFLECT)
        blurred = cv2.addWeighted(blurred, 1 - blend.ghost_strength, second, blend.ghost_strength, 0)
    gamma = np.float32(blend.gamma)
    light = (lambda x: x) if gamma == 1 else (lambda x: x**gamma)
    behind, mirrored = np.float32(blend.alpha) * light(t), np.float32(blend.beta) * light(blurred)
    if blend.falloff:
        points = np.float32(blend.falloff).reshape(GRID, GRID)
        strength = cv2.resize(points, mirrored.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        mirrored *= strength[..., None]
    mixture = (_screen if blend.screen else _clipped_sum)(behind, mirrored)
    return mixture if gamma == 1 else mixture ** (1 / gamma), t, blurred


def _gaussian(size: int, sigma: float) -> np.ndarray:
    """(size,) float32 weights that sum to 1."""
    offsets = np.arange(size) - size // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def _screen(behind: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """b + m - b m, written into `mirrored`."""
    mirrored *= 1 - behind
    mirrored += behind
    return mirrored


def _clipped_sum(behind: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """b + m; if that exceeds 1 anywhere, 1.3 times the mean excess is first subtracted from m. Written into
    `mirrored`."""
    total = behind + mirrored
    excess = total[total > 1]
    if not excess.size:
        return total
    mirrored -= 1.3 * (excess.mean() - 1)
    np.clip(mirrored, 0, 1, out=mirrored)
    mirrored += behind
    return np.clip(mirrored, 0, 1, out=mirrored)
