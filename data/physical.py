"""Mixtures as glass makes them: two exposures added as light, not as display values.

Each layer gets an exposure and a white balance of its own. The mirrored layer may hold lamps far brighter than white,
may be out of focus by up to 20 pixels, doubled by the pane's second surface (Shih et al., CVPR 2015), veiled, and
confined to a part of the picture. Its strength is drawn as a ratio of the layers' mean light, so neither hides the
other by accident.
"""

from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np

from dereflect.data.synthesis import Blend

DISPLAY_GAMMA = 2.2
SUM_SHARE = 0.3
"""How often a mixture is CEILNet's clipped sum (Fan et al., ICCV 2017)."""

_FEWEST_PIXELS = 200  # well exposed ones by which two exposures are compared

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Exposure:
    """How a camera takes a layer: display values times `gain` per channel, clipped, to the power `contrast`.

    What is 0 then becomes `black` and what is 1 becomes `white`, as in haze or on a print: a scene that has no black
    must not be taken for a veil.
    """

    gain: Colour = (1.0, 1.0, 1.0)
    contrast: float = 1.0
    black: Colour = (0.0, 0.0, 0.0)
    white: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator, stops: tuple[float, float], balance: float, contrast: float) -> "Exposure":
        """A gain of exp(U(stops)), times exp(N(0, balance)) per channel, and a power of exp(U(-contrast, contrast))."""
        gain = np.exp(rng.uniform(*stops)) * np.exp(rng.normal(0, balance, 3))
        return cls(tuple(gain.tolist()), float(np.exp(rng.uniform(-contrast, contrast))))

    def faded(self, rng: np.random.Generator) -> "Exposure":
        """The same with a black of U(0.03, 0.28) times exp(N(0, 0.15)) per channel, and a white of U(0.75, 1)."""
        black = np.clip(rng.uniform(0.03, 0.28) * np.exp(rng.normal(0, 0.15, 3)), 0, 0.35)
        return replace(self, black=tuple(black.tolist()), white=float(rng.uniform(0.75, 1)))

    def apply(self, layer: np.ndarray) -> np.ndarray:
        """float32 (H, W, 3) in 0..1 -> the same."""
        if self == Exposure():
            return layer
        layer = np.clip(layer * np.float32(self.gain), 0, 1) ** np.float32(self.contrast)
        black = np.float32(self.black)
        return black + (np.float32(self.white) - black) * layer


@dataclass(frozen=True)
class Mask:
    """Where the reflection is, from 0 to 1.

    Attributes:
        kind: "grid": smooth between n x n values; "half": one side of a line; "pane": a rectangle.
        values: of the grid, row by row; else of the line (angle in radians, distance from the middle as a share of the
            side) or of the pane (left, right, top, bottom as shares).
        softness: width of the edge in pixels, of a line or a pane.
    """

    kind: Literal["grid", "half", "pane"]
    values: tuple[float, ...]
    softness: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Mask":
        """A grid half of the time, a line or a pane a quarter each."""
        kind = rng.choice(("grid", "half", "pane"), p=(0.5, 0.25, 0.25))
        if kind == "grid":
            values = rng.uniform(0, 1, int(rng.integers(2, 6)) ** 2)
            if rng.random() < 0.5:
                values = np.clip(1.6 * values - 0.4, 0, 1)
        elif kind == "half":
            values = np.array([rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)])
        else:
            values = np.concatenate([np.sort(rng.uniform(-0.2, 1.2, 2)), np.sort(rng.uniform(-0.2, 1.2, 2))])
        return cls(str(kind), tuple(values.tolist()), float(np.exp(rng.uniform(0, 3))))

    def strength(self, height: int, width: int) -> np.ndarray:
        """float32 (H, W, 1) in 0..1."""
        if self.kind == "grid":
            side = round(len(self.values) ** 0.5)
            points = np.float32(self.values).reshape(side, side)
            mask = cv2.resize(points, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
            return mask[..., None]
        y, x = (np.arange(n, dtype=np.float32) for n in (height, width))
        y = y[:, None]
        if self.kind == "half":
            angle, offset = self.values
            inside = (x - (0.5 + offset) * width) * np.float32(np.cos(angle))
            inside = inside + (y - (0.5 + offset) * height) * np.float32(np.sin(angle))
            return self._edge(inside)[..., None]
        left, right, top, bottom = (np.float32(v) for v in self.values)
        across = self._edge(x - left * width) * self._edge(right * width - x)
        return (across * self._edge(y - top * height) * self._edge(bottom * height - y))[..., None]

    def _edge(self, inside: np.ndarray) -> np.ndarray:
        return 0.5 + 0.5 * np.tanh(inside / np.float32(2 * self.softness))


@dataclass(frozen=True)
class Glass:
    """Everything that is random about a mixture made by light.

    Attributes:
        behind, mirrored: exposures of the two layers.
        gamma: display values to this power are light; 1 adds display values.
        lamps: how much brighter than white the mirrored layer's brightest spots are; 0 for not at all.
        darkening: power of the mirrored light, above 1 for a mostly dark scene with bright spots.
        sigma: of the Gaussian blur of the mirrored layer, in pixels; 0 for a sharp one.
        ghost: where the pane's second surface mirrors the same again, (down, right) in pixels.
        ghost_strength: how much of the mirrored light comes from there.
        ratio: mean light of the mirrored layer over that of the one behind.
        veil: even light added to the mirrored layer.
        mask: where the reflection is; None for everywhere.
        alpha: share of the light that passes the glass.
    """

    behind: Exposure
    mirrored: Exposure
    gamma: float
    lamps: float
    darkening: float
    sigma: float
    ghost: tuple[float, float]
    ghost_strength: float
    ratio: float
    veil: Colour
    mask: Mask | None
    alpha: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Glass":
        """One of the distribution that the bundled network is trained on."""

        def sometimes(share: float, value: float, otherwise: float) -> float:
            return value if rng.random() < share else otherwise

        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(1, 10)
        kind = rng.random()
        sharp, soft, wide = rng.uniform(0.3, 2), rng.uniform(2, 6), rng.uniform(6, 20)
        veil = rng.uniform(0.02, 0.15) * np.exp(rng.normal(0, 0.15, 3))
        behind = Exposure.draw(rng, (-0.9, 0.1), 0.05, 0.2) if rng.random() < 0.5 else Exposure()
        return cls(
            behind=behind.faded(rng) if rng.random() < 0.35 else behind,
            mirrored=Exposure.draw(rng, (-0.2, 0.3), 0.15, 0.2) if rng.random() < 0.7 else Exposure(),
            gamma=sometimes(0.95, DISPLAY_GAMMA, 1.0),
            lamps=sometimes(0.3, rng.uniform(1, 6), 0.0),
            darkening=sometimes(0.3, rng.uniform(1.3, 2), 1.0),
            sigma=0.0 if kind < 0.12 else sharp if kind < 0.4 else soft if kind < 0.85 else wide,
            ghost=(distance * np.sin(angle), distance * np.cos(angle)),
            ghost_strength=sometimes(1 / 3, rng.uniform(0.2, 0.5), 0.0),
            ratio=float(np.exp(rng.uniform(np.log(0.12), np.log(1.2)))),
            veil=tuple(veil.tolist()) if rng.random() < 0.2 else (0.0, 0.0, 0.0),
            mask=Mask.draw(rng) if rng.random() < 0.5 else None,
            alpha=sometimes(0.75, rng.uniform(0.82, 1), 1.0),
        )


def draw(rng: np.random.Generator) -> Blend | Glass:
    """CEILNet's clipped sum, undimmed, with its kernel of 11 pixels, in `SUM_SHARE` of the cases; else a `Glass`."""
    if rng.random() < SUM_SHARE:
        return Blend(kernel_size=11, sigma=rng.uniform(2, 5), alpha=1.0, beta=1.0, screen=False)
    return Glass.draw(rng)


def shine(t: np.ndarray, r: np.ndarray, glass: Glass) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mix two photographs as light.

    Args:
        t: what is behind the glass, float32 (H, W, 3) in 0..1.
        r: what is mirrored, same.
        glass: how.

    Returns:
        The mixture, the transmission (exposed, not dimmed by the glass) and the reflection as it would look alone:
        float32 (H, W, 3) in 0..1.
    """
    t, r = glass.behind.apply(t), glass.mirrored.apply(r)
    gamma = np.float32(glass.gamma)
    behind, light = t**gamma, r**gamma
    if glass.lamps:
        white = np.clip((light.max(axis=2, keepdims=True) - 0.85) / 0.15, 0, 1)
        light = light * (1 + np.float32(glass.lamps) * white)
    if glass.darkening != 1:
        light = light ** np.float32(glass.darkening)
    light = _ghosted(_blurred(light, glass.sigma), glass)
    beta = min(glass.ratio * (behind.mean() + 0.02) / (light.mean() + 1e-3), 1.2)
    light = np.float32(beta) * light + np.float32(glass.veil)
    if glass.mask:
        light = light * glass.mask.strength(*t.shape[:2])
    mixture = np.clip(np.float32(glass.alpha) * behind + light, 0, 1) ** (1 / gamma)
    return mixture, t, np.clip(light, 0, 1) ** (1 / gamma)


def _blurred(light: np.ndarray, sigma: float) -> np.ndarray:
    if sigma < 0.3:
        return light
    side = min(2 * int(np.ceil(2.5 * sigma)) + 1, 2 * (min(light.shape[:2]) // 2) - 1)
    return cv2.GaussianBlur(light, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)


def _ghosted(light: np.ndarray, glass: Glass) -> np.ndarray:
    if not glass.ghost_strength:
        return light
    down, right = glass.ghost
    shift = np.float32([[1, 0, right], [0, 1, down]])
    second = cv2.warpAffine(light, shift, light.shape[1::-1], borderMode=cv2.BORDER_REFLECT)
    return cv2.addWeighted(light, 1 - glass.ghost_strength, second, glass.ghost_strength, 0)


def transplant(t: np.ndarray, mixture: np.ndarray, transmission: np.ndarray, strength: float) -> tuple[np.ndarray, ...]:
    """Move a real reflection onto another photograph: the light that a real pair's mixture has beyond its transmission,
    times `strength`, is added to t's. Arguments and results as of `shine`."""
    gamma = np.float32(DISPLAY_GAMMA)
    light = np.clip(cv2.GaussianBlur(mixture**gamma - transmission**gamma, (5, 5), 0.8), 0, 1) * np.float32(strength)
    return np.clip(t**gamma + light, 0, 1) ** (1 / gamma), t, np.clip(light, 0, 1) ** (1 / gamma)


def tone(mixture: np.ndarray, transmission: np.ndarray) -> np.ndarray:
    """The factor per channel that brings a transmission, taken without the glass, to its mixture's exposure.

    Reflections only add light, so the lowest ratios of mixture to transmission are the glass's and the camera's own.
    The factor is their 20th percentile where both images are well exposed, held within 0.7..1.35.

    Args:
        mixture, transmission: float32 (H, W, 3) in 0..1.

    Returns:
        float32 (3,); 1 where too few pixels are well exposed.
    """
    factors = np.ones(3, np.float32)
    for channel in range(3):
        m, t = mixture[..., channel], transmission[..., channel]
        well = (t > 0.08) & (t < 0.92) & (m > 0.05) & (m < 0.95)
        if well.sum() >= _FEWEST_PIXELS:
            factors[channel] = np.clip(np.percentile(m[well] / t[well], 20), 0.7, 1.35)
    return factors
