"""A trained network, ready for photographs of any size. Programs that use a network without training it load this."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dereflect.models import check_backends, hub, pictures, tiles, views
from dereflect.models.arch import create_model, list_models
from dereflect.models.arch.whole import TURNS, Place, Turn, Whole, turned
from dereflect.models.dsrnet_model_sirs import DSRNetModel
from dereflect.models.features import build_features
from dereflect.models.memory import bytes_per_pixel
from dereflect.models.pictures import Picture
from dereflect.models.weights import architecture_of, load_weights
from dereflect.options import PRETRAINED
from dereflect.options.arguments import STRIDE, TILE_STRIDE, is_file
from dereflect.util.device import enough_memory, total_memory, wants_bf16
from dereflect.util.distributed import join
from dereflect.util.errors import UserError
from dereflect.util.run.checkpoint import FORMAT, load

PARTS = ("transmission", "reflection", "residue")

_SHARE = 0.5  # of the machine's memory that a forward pass may take
_LEAST_TILE = 256  # pixels, whatever the memory
_BEYOND = 0.5  # by which an image of floating point may leave 0..1, as one that was resized or sharpened does
_USUAL_OVERLAP = 192  # pixels; with more, results come no closer to those of the whole image
_MARGIN = 128  # pixels around a tile that only the features see


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
    """Separates images of any size; what the memory is not enough for in tiles that are blended (see `models.tiles`).

    Args:
        model: with its trained weights, on the device where it runs.
        tile: side of the tiles, a multiple of 32, in which larger images are separated; None takes an image whole where
            half of the device's memory is enough, and else tiles as large as that allows.
        overlap: of neighbouring tiles, a multiple of 32 and at most half a tile; None takes 192, but not more
            than a quarter of a tile.
        self_ensemble: separate all eight flips and rotations of the image and take the mean.
        strength: how much of the reflection is removed, from 0 to 1: the transmission is I + strength * (T - I).
        sizes: short sides, in pixels, the largest first, of the views that the network is shown of an image (see
            `models.views`); empty, or 0, for the image as it is.

    Attributes:
        inet: the network's name, if `load_separator` has made this separator.
        epoch: the training's epoch that the checkpoint states, or None.

    Raises:
        UserError: tile, overlap or sizes are not allowed.
    """

    def __init__(
        self,
        model: DSRNetModel,
        tile: int | None = None,
        overlap: int | None = None,
        self_ensemble: bool = False,
        strength: float = 1.0,
        sizes: Sequence[int] = (),
        inet: str = "",
        epoch: int | None = None,
    ):
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.tile, self.overlap = tile, overlap
        self.self_ensemble, self.strength = self_ensemble, strength
        self.sizes = tuple(sizes)
        views.check(self.sizes)
        self.inet, self.epoch = inet, epoch
        self._bytes_per_pixel: float | None = None
        overlap_at_least = overlap or TILE_STRIDE
        if (tile or 0) % TILE_STRIDE or overlap_at_least % TILE_STRIDE or (tile and 2 * overlap_at_least > tile):
            raise UserError(
                f"--tile {tile} and --overlap {overlap}: must be multiples of {TILE_STRIDE}, "
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
        about = {"format": FORMAT, "inet": self.inet, "options": {"sizes": list(self.sizes)}}
        about |= {} if self.epoch is None else {"epoch": self.epoch}
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
        size = image.shape[:2]
        shown = views.views_of(self.sizes, *size)
        if not shown:
            yield from self._bands(image, wanted, watch)
            return
        found = [(view, self._removed(view.of(image), wanted, watch)) for view in shown]
        for top in range(0, size[0], views.ROWS):
            bottom = min(top + views.ROWS, size[0])
            bands = [
                sum(view.back(parts[index], top, bottom, size) for view, parts in found) / np.float32(len(found))
                for index in range(len(wanted))
            ]
            pixels = _in_floats(image[top:bottom])
            yield top, [pixels - band if part == PARTS[0] else band for part, band in zip(wanted, bands, strict=True)]

    def _removed(self, image: np.ndarray, wanted: Sequence[str], watch: Callable[[Iterable, int], Iterable]) -> list:
        """The wanted parts of an image as it is, float32 (H, W, 3); of the transmission, what it is less."""
        found = [np.empty(image.shape, np.float32) for _ in wanted]
        for top, bands in self._bands(image, wanted, watch):
            rows = slice(top, top + len(bands[0]))
            for name, part, band in zip(wanted, found, bands, strict=True):
                part[rows] = _in_floats(image[rows]) - band if name == PARTS[0] else band
        return found

    def _bands(
        self, image: np.ndarray, wanted: Sequence[str], watch: Callable[[Iterable, int], Iterable]
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """As `bands`, of the image as it is."""
        height, width = size = image.shape[:2]
        tile = self.tile_for(height, width)
        overlap = self.overlap_for(height, width)
        tiled = max(size) > tile
        if tiled:  # so that features and tiles fit, whichever way the image is turned
            multiple = TILE_STRIDE if self.self_ensemble else STRIDE
            image = np.pad(image, ((0, -height % multiple), (0, -width % multiple), (0, 0)), "edge")
        turns = TURNS if self.self_ensemble else TURNS[:1]
        wholes = [Whole() for _ in turns]
        indices = [PARTS.index(part) for part in wanted]
        looked = 0

        def look(place: Place, last: bool) -> None:
            nonlocal looked
            looked += last
            for turn, whole in zip(turns, wholes, strict=True):
                self._separate(image, place, turn, whole)
                if last:
                    whole.finish(looked == tiles.LOOKS)

        def separate_tile(place: Place) -> list[np.ndarray]:
            sums = None
            for turn, whole in zip(turns, wholes, strict=True):
                outputs = self._separate(image, place, turn, whole if tiled else None)
                sums = outputs if sums is None else [a + b for a, b in zip(sums, outputs, strict=True)]
            return [(sums[index] / len(turns))[0].permute(1, 2, 0).cpu().numpy() for index in indices]

        for top, bands in tiles.blend(image.shape[:2], separate_tile, tile, overlap, watch, look):
            if top < height:
                yield top, [band[: height - top, :width] for band in bands]

    def tile_for(self, height: int, width: int) -> int:
        """The side of the tiles in which an image of that size is separated; at least its longer side if it is whole.

        Where no tile was asked for, that depends on the network and on how much memory the machine has in all, not
        on what else is running, so that results don't either.
        """
        if self.tile:
            return self.tile
        whole = -(-max(height, width) // TILE_STRIDE) * TILE_STRIDE
        if height * width <= _LEAST_TILE**2:
            return whole
        if self._bytes_per_pixel is None:
            self._bytes_per_pixel = bytes_per_pixel(self.model)
        pixels = _SHARE * total_memory(self.device) / self._bytes_per_pixel
        if height * width <= pixels:
            return whole
        return max(math.isqrt(int(pixels)) // TILE_STRIDE * TILE_STRIDE, _LEAST_TILE)

    def overlap_for(self, height: int, width: int) -> int:
        """The overlap of those tiles."""
        quarter = self.tile_for(height, width) // 4 // TILE_STRIDE * TILE_STRIDE
        return self.overlap or min(max(TILE_STRIDE, quarter), _USUAL_OVERLAP)

    def _separate(self, image: np.ndarray, place: Place, turn: Turn, whole: Whole | None) -> Sequence[Tensor]:
        """The three parts of a tile, (1, 3, h, w), from the image turned and back.

        Args:
            image: as of `bands`.
            place: of the tile.
            turn: as of `whole.turned`.
            whole: what is known of the image turned, None if the tile is all of it.
        """
        around = [side.widened(_MARGIN) for side in place] if whole else [slice(*side.span) for side in place]
        height, width = (side.span[1] - side.span[0] for side in place)
        smaller = max(2 * TILE_STRIDE, max(height, width) // 2 // TILE_STRIDE * TILE_STRIDE)
        with enough_memory(
            lambda: f"not enough memory to separate {width}x{height} pixels at once: use --tile {smaller} or less"
        ):
            pixels = _turned(_to_tensor(image[tuple(around)], self.device), turn)
            if whole is None:
                outputs = self._predict(pixels)
            else:
                place = turned(place, *turn)
                part = tuple(side.within(_MARGIN) for side in place)
                with whole.tile(place):
                    outputs = self._predict(pixels, part)
            return [_turned_back(output, turn) for output in outputs]

    def _predict(self, images: Tensor, part: tuple[slice, slice] | None = None) -> tuple[Tensor, ...]:
        """What `DSRNetModel.predict` gives, at the separator's strength."""
        transmission, *rest = self.model.predict(images, part=part)
        images = images[(..., *part)] if part else images
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
    sizes: Sequence[int] | None = None,
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
        sizes: as of `Separator`; None takes those that the checkpoint states, the image as it is if it states none.

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
    if sizes is None:
        sizes = views.stated(rest)
    settings = tile, overlap, self_ensemble, strength, sizes
    return Separator(model, *settings, name, epoch if isinstance(epoch, int) else None)


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
    return torch.from_numpy(np.ascontiguousarray(_in_floats(image).transpose(2, 0, 1)))[None].to(device)


def _in_floats(image: np.ndarray) -> np.ndarray:
    """Pixels of any type to float32 in 0..1."""
    peak = 1 if np.issubdtype(image.dtype, np.floating) else np.iinfo(image.dtype).max
    return np.divide(image, peak, dtype=np.float32, casting="same_kind")


def _turned(x: Tensor, turn: Turn) -> Tensor:
    turns, flipped = turn
    x = torch.rot90(x, turns, (2, 3))
    return x.flip(3) if flipped else x


def _turned_back(x: Tensor, turn: Turn) -> Tensor:
    turns, flipped = turn
    return torch.rot90(x.flip(3) if flipped else x, -turns, (2, 3))
