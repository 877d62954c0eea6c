"""Physical synthesis: what is drawn, that applying it is pure, light that adds, and the options around it."""

import dataclasses

import numpy as np
import pytest

from dereflect.data import physical
from dereflect.data.folders import discover
from dereflect.data.physical import Exposure, Glass, Mask
from dereflect.data.sirs_dataset import TrainSet
from dereflect.data.synthesis import Blend
from dereflect.options import parse_train

SIDE = 64
PLAIN = Glass(
    behind=Exposure(), mirrored=Exposure(), gamma=2.2, lamps=0.0, darkening=1.0, sigma=0.0, ghost=(0.0, 0.0),
    ghost_strength=0.0, ratio=0.5, veil=(0.0, 0.0, 0.0), mask=None, alpha=1.0,
)  # fmt: skip


@pytest.fixture
def layers():
    rng = np.random.default_rng(0)
    return tuple(rng.random((SIDE, SIDE, 3), dtype=np.float32) for _ in range(2))


def test_draws_depend_on_the_generator_alone_and_stay_in_their_ranges():
    blends = [physical.draw(np.random.default_rng(seed)) for seed in range(400)]
    assert blends == [physical.draw(np.random.default_rng(seed)) for seed in range(400)]
    sums = [blend for blend in blends if isinstance(blend, Blend)]
    glasses = [blend for blend in blends if isinstance(blend, Glass)]
    assert abs(len(sums) / len(blends) - physical.SUM_SHARE) < 0.1
    assert all(b.kernel_size == 11 and 2 <= b.sigma <= 5 and (b.alpha, b.beta, b.screen) == (1, 1, False) for b in sums)
    assert all(0.12 <= g.ratio <= 1.2 and 0.82 <= g.alpha <= 1 and 0 <= g.sigma <= 20 for g in glasses)
    assert {g.gamma for g in glasses} == {1.0, 2.2}
    assert {g.mask.kind for g in glasses if g.mask} == {"grid", "half", "pane"}
    for share, chosen in ((0.3, "lamps"), (1 / 3, "ghost_strength"), (0.5, "mask")):
        assert abs(sum(bool(getattr(g, chosen)) for g in glasses) / len(glasses) - share) < 0.12
    faded = [g.behind for g in glasses if g.behind.white < 1]
    assert abs(len(faded) / len(glasses) - 0.35) < 0.12
    assert all(min(b.black) > 0 and max(b.black) <= 0.35 and b.white >= 0.75 for b in faded)
    assert abs(sum(g.gamma > 1 for g in glasses) / len(glasses) - 0.95) < 0.05
    assert abs(sum(g.alpha < 1 for g in glasses) / len(glasses) - 0.75) < 0.12


@pytest.mark.parametrize("seed", range(12))
def test_shine_is_pure_and_keeps_the_range(layers, seed):
    rng = np.random.default_rng(seed)
    glass, copies = Glass.draw(rng), [layer.copy() for layer in layers]
    one, two = physical.shine(*layers, glass), physical.shine(*layers, glass)
    for first, second in zip(one, two, strict=True):
        assert np.array_equal(first, second)
        assert first.dtype == np.float32 and first.shape == layers[0].shape and 0 <= first.min() <= first.max() <= 1
    assert all(np.array_equal(layer, copy) for layer, copy in zip(layers, copies, strict=True))


def test_light_adds(layers):
    t, r = (0.5 * layer for layer in layers)
    mixture, same, reflection = physical.shine(t, r, PLAIN)
    assert np.array_equal(same, t)
    np.testing.assert_allclose(mixture**2.2, t**2.2 + reflection**2.2, atol=1e-6)
    ratio = (reflection.astype(np.float64) ** 2.2).mean() / (t.astype(np.float64) ** 2.2).mean()
    assert PLAIN.ratio <= ratio <= 1.35 * PLAIN.ratio  # a bit more over dark layers
    dimmed, whole, _ = physical.shine(t, r, dataclasses.replace(PLAIN, alpha=0.9))
    assert np.array_equal(whole, t) and (dimmed <= mixture).all()


def test_a_faded_scene_is_what_is_behind_the_glass(layers):
    t, r = layers
    faded = Exposure(black=(0.1, 0.2, 0.3), white=0.9)
    mixture, behind, _ = physical.shine(t, 0 * r, dataclasses.replace(PLAIN, behind=faded))
    assert (behind >= np.float32([0.1, 0.2, 0.3]) - 1e-6).all() and behind.max() <= 0.9 + 1e-6
    np.testing.assert_allclose(behind[..., 2], 0.3 + 0.6 * t[..., 2], atol=1e-6)
    np.testing.assert_allclose(mixture, behind, atol=1e-5)


def test_a_mask_confines_the_reflection(layers):
    t, r = (0.5 * layer for layer in layers)
    left = Mask("half", (np.pi, 0.0), softness=1.0)
    mixture, _, _ = physical.shine(t, r, dataclasses.replace(PLAIN, mask=left))
    np.testing.assert_allclose(mixture[:, SIDE - 8 :], t[:, SIDE - 8 :], atol=1e-3)
    assert (mixture[:, :8] - t[:, :8]).mean() > 0.05
    pane = Mask("pane", (0.25, 0.75, 0.25, 0.75), softness=1.0).strength(SIDE, SIDE)
    assert pane[SIDE // 2, SIDE // 2] > 0.99 and pane[0, 0] < 0.01


def test_a_transplanted_reflection_is_the_light_that_the_pair_gained():
    t, transmission = (np.full((SIDE, SIDE, 3), value, np.float32) for value in (0.3, 0.5))
    mixture = (transmission**2.2 + np.float32(0.1)) ** np.float32(1 / 2.2)
    moved, same, reflection = physical.transplant(t, mixture, transmission, strength=1.0)
    assert np.array_equal(same, t)
    np.testing.assert_allclose(moved**2.2 - t**2.2, 0.1, atol=1e-4)
    np.testing.assert_allclose(reflection**2.2, 0.1, atol=1e-4)


def test_tone_is_the_glass_not_the_reflection():
    rng = np.random.default_rng(0)
    transmission = rng.uniform(0.2, 0.7, (SIDE, SIDE, 3)).astype(np.float32)
    factor = np.float32([0.9, 0.8, 1.1])
    mixture = transmission * factor
    mixture[: SIDE // 2] += 0.15  # a reflection over half of the picture
    np.testing.assert_allclose(physical.tone(mixture, transmission), factor, atol=0.02)
    assert np.array_equal(physical.tone(np.ones_like(mixture), transmission), np.ones(3, np.float32))


def test_options_change_the_targets(tiny_data):
    def samples(*arguments):
        options = parse_train(["--base_dir", str(tiny_data), "--crop_size", "32", "--val_split", "0", *arguments])
        found = TrainSet(options, discover(options))
        return [found[0, index] for index in range(24)]

    for sample in samples("--identity", "0.999"):
        assert (sample["mixture"] == sample["target_t"]).all() and not sample["target_r"].any()
    options = ("--synthesis", "physical", "--transplant", "0.3", "--reflection", "difference", "--match_tone")
    for sample in samples(*options):
        assert (sample["target_r"] == sample["mixture"] - sample["target_t"]).all()
    plain, toned = samples(), samples("--match_tone")
    changed = [bool((a["target_t"] != b["target_t"]).any()) for a, b in zip(plain, toned, strict=True)]
    real = [not sample["name"].startswith("synthetic") for sample in plain]
    assert any(changed) and not any(c and not r for c, r in zip(changed, real, strict=True))
