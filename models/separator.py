"""A trained network, ready for photographs of any size. Programs that use a network without training it load this."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dereflect.models import check_backends, hub, pictures, tiles
from dereflect.models.arch import create_model, list_models
from dereflect.models.dsrnet_model_sirs import DSRNetModel
from dereflect.models.features import build_features
from dereflect.models.pictures import Picture
from dereflect.models.weights import architecture_of, load_weights
from dereflect.options import PRETRAINED
from dereflect.options.arguments import STRIDE, is_file
from dereflect.util.device import available_memory, enough_memory, wants_bf16
from dereflect.util.distributed import join
from dereflect.util.errors import UserError
from dereflect.util.run.checkpoint import FORMAT, load

PARTS = ("transmission", "reflection", "residue")

# Memory that a forward pass takes for every pixel, in bytes, in fp32 and in bf16, including freed memory that torch
# keeps. Rounded up from measurements on a CPU (fp32: dsrnet_s 18,000, dsrnet_l 18,100; bf16: dsrnet_s 6,600, mdsrnet_s
# 6,700, dsrnet_l 6,400).
_BYTES_PER_PIXEL = (18_500, 7_000)
_SHARE = 0.5  # of the free memory that is used
_LEAST_TILE, _MOST_TILE = 128, 1024  # pixels; larger ones are no faster, and no closer to the crops of the training
_BEYOND = 0.5  # by which an image of floating point may leave 0..1, as one that was resized or sharpened does
_USUAL_OVERLAP = 128  # pixels; with more, results come no closer to those of the whole image


@dataclass(frozen=True)
class Separation:
    """The three parts whose sum an image is, float32 (H, W, 3) each, not clipped.

    Attributes:
        transmission, reflection: around 0..1.
        residue: the rest, in -1..1.
    """

    transmission: np.ndarray
    reflection: np.ndarray
    residue: np.ndarray


class Separator:
    """Separates images of any size; an image larger than a tile in tiles that are blended (see `models.tiles`).

    Args:
        model: with its trained weights, on the device where it runs.
        tile: side of the tiles, a multiple of 16; None takes the largest for which the free memory is enough.
        overlap: of neighbouring tiles, a multiple of 16 and at most half a tile; None takes 128, but not more
            than a quarter of a tile.
        self_ensemble: separate all eight flips and rotations of the image and take the mean.
        strength: how much of the reflection is removed, from 0 to 1: the transmission is I + strength * (T - I).

    Attributes:
        inet: the network's name, if `load_separator` has made this separator.
        epoch: the training's epoch that the checkpoint states, or None.

    Raises:
        UserError: tile or overlap is not allowed.
    """

    def __init__(
        self,
        model: DSRNetModel,
        tile: int | None = None,
        overlap: int | None = None,
        self_ensemble: bool = False,
        strength: float = 1.0,
        inet: str = "",
        epoch: int | None = None,
    ):
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.tile = tile or default_tile(model, self.device)
        quarter = max(STRIDE, self.tile // 4 // STRIDE * STRIDE)
        self.overlap = overlap or min(quarter, _USUAL_OVERLAP)
        self.self_ensemble, self.strength = self_ensemble, strength
        self.inet, self.epoch = inet, epoch
        if self.tile % STRIDE or self.overlap % STRIDE or not 0 < 2 * self.overlap <= self.tile:
            raise UserError(
                f"--tile {self.tile} and --overlap {self.overlap}: must be multiples of {STRIDE}, "
                "the tile at least twice the overlap"
            )

    @classmethod
    def from_pretrained(cls, repository: str, **settings) -> "Separator":
        """The separator of a Hugging Face repository; settings as of `load_separator`.

        Raises:
            UserError: huggingface_hub isn't installed, or the repository has no weights.
        """
        return load_separator(hub.download(repository), **settings)

    def push_to_hub(self, repository: str, private: bool = False) -> str:
        """Upload the network's weights to a Hugging Face repository, which is made if there is none.

        Returns:
            The address of the commit.

        Raises:
            UserError: huggingface_hub isn't installed, or the upload fails.
        """
        about = {"format": FORMAT, "inet": self.inet} | ({} if self.epoch is None else {"epoch": self.epoch})
        return hub.upload(repository, self.model.network.state_dict(), about, private)

    def __call__(self, image: Picture) -> Picture:
        """The transmission of an image, of the image's own kind, clipped to what that kind holds.

        Args:
            image: a file (str or Path), which gives a PIL image; a PIL image, which gives one with its alpha channel;
                numpy (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8, uint16 or floating point in 0..1; torch
                (3, H, W) or (B, 3, H, W), uint8 or floating point in 0..1, on any device. Grey becomes RGB, except in
                a PIL image of 16 bits, as PIL has no colours of that depth; alpha is kept as it is.

        Raises:
            ValueError, TypeError: the image is no such thing, such as one of floating point in 0..255.
            UserError: the file can't be read, or the memory is not enough.
        """
        return pictures.apply(lambda pixels: self.separate(pixels).transmission, image)

    def separate(self, image: np.ndarray) -> Separation:
        """Separate an image.

        Args:
            image: RGB (H, W, 3), uint8, uint16, or floating point in 0..1.

        Raises:
            ValueError: the image is not such an array, such as one of floating point in 0..255, or it holds NaN.
            UserError: the memory is not enough for a tile.
        """
        parts = [np.empty(image.shape, np.float32) for _ in PARTS]
        for top, bands in self.bands(image):
            for part, band in zip(parts, bands, strict=True):
                part[top : top + len(band)] = band
        return Separation(*parts)

    def predict(self, images: Tensor) -> tuple[Tensor, ...]:
        """Separate (B, 3, H, W) in 0..1 on the CPU into transmissions, reflections and residues of that shape."""
        separations = [self.separate(image.permute(1, 2, 0).numpy()) for image in images]
        return tuple(
            torch.from_numpy(np.stack([getattr(each, part) for each in separations])).permute(0, 3, 1, 2)
            for part in PARTS
        )

    def bands(
        self,
        image: np.ndarray,
        wanted: Sequence[str] = PARTS,
        watch: Callable[[Iterable, int], Iterable] = lambda places, total: places,
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Separate an image band by band from top to bottom, so that no part is ever in memory as a whole.

        Args:
            image: as of `separate`.
            wanted: of PARTS.
            watch: as of `models.tiles.blend`.

        Yields:
            As `models.tiles.blend`.
        """
        _check(image)
        indices = [PARTS.index(part) for part in wanted]

        def separate_tile(tile: np.ndarray) -> list[np.ndarray]:
            outputs = self._separate(_to_tensor(tile, self.device))
            return [outputs[index][0].permute(1, 2, 0).cpu().numpy() for index in indices]

        return tiles.blend(image, separate_tile, self.tile, self.overlap, watch)

    def _separate(self, image: Tensor) -> Sequence[Tensor]:
        """(1, 3, H, W) -> the three parts, of the same shape."""
        height, width = image.shape[-2:]
        smaller = max(STRIDE, max(height, width) // 2 // STRIDE * STRIDE)
        with enough_memory(
            lambda: f"not enough memory to separate {width}x{height} pixels at once: use --tile {smaller} or less"
        ):
            predict = self.predict_whole
            return _mean_of_eight(image, predict) if self.self_ensemble else predict(image)

    def predict_whole(self, images: Tensor) -> tuple[Tensor, ...]:
        """Separate (B, 3, H, W) in 0..1, on the separator's device, without tiles, at its strength."""
        transmission, *rest = self.model.predict(images)
        return images + self.strength * (transmission - images) if self.strength < 1 else transmission, *rest


def load_separator(
    checkpoint: str | Path | None = None,
    inet: str | None = None,
    vgg_weights: str | None = None,
    precision: str | None = None,
    gpu_ids: list[int] | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    self_ensemble: bool = False,
    strength: float = 1.0,
) -> Separator:
    """Load a checkpoint, published or our own, for use; of our own the moving average, if there is one.

    Args:
        checkpoint: None for the bundled network, the name of a bundled one ("madsrnet_xs"), a file, or a Hugging Face
            id ("someone/some-network", see `models.hub`). A file of that name goes first.
        inet: the network; None takes the name in the checkpoint or, if there is none, the network with the same
            parameters.
        vgg_weights: as of `models.vgg.Vgg19`; None takes those of the training, "imagenet" if they are not recorded.
        precision: "fp32", "bf16", or "auto": bf16 where the hardware multiplies it natively; None takes that of the
            training, "fp32" if it is not recorded.
        gpu_ids: as of `util.distributed.join`: None for a GPU if there is one, [] for the CPU.
        tile, overlap, self_ensemble, strength: as of `Separator`.

    Raises:
        UserError: there is no such checkpoint, it can't be read or doesn't fit, VGG19's weights are missing, or there
            is no such GPU.
    """
    checkpoint = _find(checkpoint)
    content = load(checkpoint)
    name = inet or architecture_of(content, str(checkpoint))
    if name not in list_models():
        raise UserError(f"--inet {name}: there is no such model ({checkpoint}); there are {', '.join(list_models())}")
    network = create_model(name)
    rest = load_weights(network, content, str(checkpoint))
    recorded = rest.get("options")
    recorded = recorded if isinstance(recorded, dict) else {}
    if network.features == "vgg19":
        vgg_weights = vgg_weights or _trained_with(recorded.get("vgg_weights", "imagenet"), checkpoint)
    features = build_features(network.features, vgg_weights)
    device = join(gpu_ids).device
    check_backends(network, device.type)
    bf16 = wants_bf16(precision or recorded.get("precision", "fp32"), device)
    model = DSRNetModel(network, features, loss=None, bf16=bf16).to(device)
    epoch = rest.get("epoch")
    return Separator(model, tile, overlap, self_ensemble, strength, name, epoch if isinstance(epoch, int) else None)


def remove_reflection(image: np.ndarray, checkpoint: str | Path | None = None, **settings) -> Separation:
    """Separate one image; for several images, call `load_separator` once and use its result.

    Args:
        image: RGB (H, W, 3), uint8, uint16, or floating point in 0..1.
        checkpoint, settings: as of `load_separator`.
    """
    return load_separator(checkpoint, **settings).separate(image)


def _find(checkpoint: str | Path | None) -> Path:
    """The file that `load_separator` is to load.

    Raises:
        UserError: there is none.
    """
    if checkpoint is None:
        return PRETRAINED
    if is_file(checkpoint):
        return Path(checkpoint)
    name = str(checkpoint)
    bundled = {path.stem: path for path in PRETRAINED.parent.glob("*.safetensors") if path.stem in list_models()}
    if name in bundled:
        return bundled[name]
    if hub.is_id(name):
        return hub.download(name)
    raise UserError(f"{name}: there is no such file, and no bundled network of that name but {', '.join(bundled)}")


def default_tile(model: DSRNetModel, device: torch.device) -> int:
    """The side of the largest square for which half of the device's free memory is enough, within fixed limits."""
    pixels = _SHARE * available_memory(device) / _BYTES_PER_PIXEL[model.bf16]
    side = int(math.sqrt(max(pixels, 0))) // STRIDE * STRIDE
    return min(max(side, _LEAST_TILE), _MOST_TILE)


def _trained_with(weights: str, checkpoint: str | Path) -> str:
    """The VGG19 weights that a checkpoint was trained with; a UserError if that file is missing."""
    if weights not in ("imagenet", "random") and not (isinstance(weights, str) and Path(weights).is_file()):
        raise UserError(
            f"{checkpoint}: was trained with the VGG19 weights in {weights}, and there is no such file; "
            "name the file with --vgg_weights"
        )
    return weights


def _check(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image must be (H, W, 3), not {image.shape}")
    if image.dtype not in (np.uint8, np.uint16) and not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"an image must be uint8, uint16 or floating point, not {image.dtype}")
    if np.issubdtype(image.dtype, np.floating):
        least, most = float(image.min()), float(image.max())
        if not (least >= -_BEYOND and most <= 1 + _BEYOND):
            raise ValueError(
                f"an image of floating point must be in 0..1, not {least:g}..{most:g}: divide one of 0..255 by 255"
            )


def _to_tensor(image: np.ndarray, device: torch.device) -> Tensor:
    """(H, W, 3) of any type to float32 (1, 3, H, W) in 0..1."""
    peak = 1 if np.issubdtype(image.dtype, np.floating) else np.iinfo(image.dtype).max
    pixels = np.divide(image, peak, dtype=np.float32, casting="same_kind")
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].to(device)


def _mean_of_eight(image: Tensor, predict: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
    """The mean over all flips and rotations of the image, each turned back."""
    sums: list[Tensor] = []
    for turns in range(4):
        for flipped in (False, True):
            turned = torch.rot90(image, turns, (2, 3))
            outputs = predict(turned.flip(3) if flipped else turned)
            upright = [torch.rot90(x.flip(3) if flipped else x, -turns, (2, 3)) for x in outputs]
            sums = [total + x for total, x in zip(sums, upright, strict=True)] if sums else upright
    return [total / 8 for total in sums]
