"""The published datasets: synthetic and real pairs, mixed, to train; folders of pairs, to test."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dereflect.data import physical
from dereflect.data.cache import ImageCache
from dereflect.data.folders import Pair, Sets
from dereflect.data.sampling import Purpose, generator, partners
from dereflect.data.synthesis import Blend, synthesize
from dereflect.data.transforms import Augmentation, augment
from dereflect.util.errors import UserError
from dereflect.util.images import read_image, read_rgb

_ALIGNMENT = 32  # the published protocol evaluates images whose sides are multiples of this

_TONE_SIDE = 160  # of the small copies by which exposures are compared, in pixels

Sample = dict[str, torch.Tensor | str]


class TrainSet(Dataset[Sample]):
    """Crops of synthetic, real and nature pairs, mixed at random.

    A sample is a function of (seed, epoch, index) and the files alone. It is a dict of `mixture`,
    `target_t` and `target_r`, float32 (3, crop_size, crop_size), and `name`, the files it comes from. Mixture and
    transmission are in 0..1. The reflection of a synthetic sample is the blurred photograph, in 0..1; that of
    a real pair is mixture minus transmission, in -1..1.

    Args:
        options: seed, crop_size, max_scale, epoch_size, synthesis, transplant, identity, reflection, match_tone,
            cache_images and nThreads are used.
        sets: the images to train on, and their mix.
    """

    def __init__(self, options: Namespace, sets: Sets) -> None:
        self.seed = options.seed
        self.crop_size, self.max_scale = options.crop_size, options.max_scale
        self.draw = {"published": Blend.draw, "wide": Blend.draw_wide, "physical": physical.draw}[options.synthesis]
        self.transplant, self.identity = options.transplant, options.identity
        self.difference, self.match_tone = options.reflection == "difference", options.match_tone
        self.tones: dict[Path, np.ndarray] = {}
        self.photographs = sets.photographs
        self.pairs = sets.pairs
        self.sources = list(sets.mix)
        self.bounds = np.cumsum(list(sets.mix.values()))[:-1]
        self.length = options.epoch_size or sum(sets.sizes.values())
        files = [*self.photographs, *(f for pairs in self.pairs.values() for p in pairs for f in p.files[:2])]
        budget = int(options.cache_images * 2**30)
        self.images = ImageCache(files, budget, options.nThreads, least=int(self.max_scale * self.crop_size))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        rng = generator(self.seed, epoch, index, Purpose.SAMPLE)
        source = self.sources[np.searchsorted(self.bounds, rng.random(), side="right")]
        augmentation = Augmentation.draw(rng, self.crop_size, self.max_scale)
        identity = bool(self.identity) and rng.random() < self.identity
        if source == "synthetic":
            files = [self.photographs[i] for i in partners(self.seed, epoch, index, len(self.photographs))]
            t, r = (augment(self.images.read(file), augmentation) for file in files)
            mixture, t, r = self._mix(t, r, rng)
            name = "+".join(file.stem for file in files)
        else:
            pair = self.pairs[source][index % len(self.pairs[source])]
            mixture, t = self._real(pair, augmentation)
            r, name = mixture - t, pair.name
        if identity:
            mixture, r = t, np.zeros_like(t)
        elif self.difference:
            r = mixture - t
        return _sample(mixture, t, r, f"{source}/{name}")

    def _mix(self, t: np.ndarray, r: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mixture, transmission and reflection of two photographs or, by --transplant, of one and a real pair."""
        if self.transplant and rng.random() < self.transplant:
            pairs = [pair for pairs in self.pairs.values() for pair in pairs]
            pair = pairs[rng.integers(len(pairs))]
            augmentation = Augmentation.draw(rng, self.crop_size, self.max_scale)
            return physical.transplant(t, *self._real(pair, augmentation), rng.uniform(0.5, 1.3))
        blend = self.draw(rng)
        return synthesize(t, r, blend) if isinstance(blend, Blend) else physical.shine(t, r, blend)

    def _real(self, pair: Pair, augmentation: Augmentation) -> tuple[np.ndarray, np.ndarray]:
        """Mixture and transmission of a real pair, the latter in the mixture's tone with --match_tone."""
        mixture, t = (augment(self.images.read(file), augmentation) for file in (pair.mixture, pair.transmission))
        if not self.match_tone:
            return mixture, t
        if pair.mixture not in self.tones:
            files = (pair.mixture, pair.transmission)
            images = (Image.fromarray(self.images.read(file).pixels) for file in files)
            small = (np.float32(image.resize((_TONE_SIDE, _TONE_SIDE))) / 255 for image in images)
            self.tones[pair.mixture] = physical.tone(*small)
        return mixture, np.clip(t * self.tones[pair.mixture], 0, 1)


class TestSet(Dataset[Sample]):
    """Whole images of a list of pairs.

    A sample is a dict as of `TrainSet`, but of whole images, (3, H, W). They have their own size or, with `--if_align`
    (the published protocol), are resized to multiples of 32, rounded down. The reflection is the reflection layer if
    the pair has one, otherwise mixture minus transmission. `name` is the name of the pair.

    Args:
        options: if_align is used.
        pairs: the files.
    """

    __test__ = False  # pytest must not take this for a class of tests

    def __init__(self, options: Namespace, pairs: list[Pair]) -> None:
        self.align = options.if_align
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        read = _read_aligned if self.align else read_image
        mixture, t = read(pair.mixture), read(pair.transmission)
        if mixture.shape != t.shape:
            raise UserError(f"{pair.mixture} and {pair.transmission}: are not of one size any more")
        r = read(pair.reflection) if pair.reflection else mixture - t
        return _sample(mixture, t, r, pair.name)


def _read_aligned(path: Path) -> np.ndarray:
    """Read an image and resize it as published: 8 bits, bicubic, both sides rounded down to multiples of 32."""
    image = read_rgb(path)
    size = [max(_ALIGNMENT, side // _ALIGNMENT * _ALIGNMENT) for side in image.size]
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32) / 255


def _sample(mixture: np.ndarray, t: np.ndarray, r: np.ndarray, name: str) -> Sample:
    """(H, W, 3) arrays as contiguous (3, H, W) tensors under the names that the training step expects."""
    tensors = (torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) for image in (mixture, t, r))
    return {**dict(zip(("mixture", "target_t", "target_r"), tensors, strict=True)), "name": name}
