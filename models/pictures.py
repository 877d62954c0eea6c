"""What people hold as a picture, a file, a PIL image, an array or a tensor, as RGB pixels, and back as that kind."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dereflect.util.photographs import read_photograph

Picture = TypeVar("Picture", str, Path, Image.Image, np.ndarray, Tensor)

_LUMINANCE = np.float32([0.299, 0.587, 0.114])  # of red, green and blue, as PIL makes grey

Change = Callable[[np.ndarray], np.ndarray]
"""RGB (H, W, 3), uint8, uint16 or floating point in 0..1, to float32 (H, W, 3) around 0..1."""


def apply(change: Change, picture):
    """A picture with its colours changed, of its own kind; a file gives a PIL image. See `Separator.__call__`.

    Raises:
        ValueError, TypeError: it is no such picture.
        UserError: the file can't be read.
    """
    if isinstance(picture, str | Path):
        photograph = read_photograph(Path(picture))
        return _to_pil(change(photograph.pixels), photograph.alpha)
    if isinstance(picture, Image.Image) and picture.mode.startswith("I;16"):
        return _change_deep(change, picture)
    if isinstance(picture, Image.Image):
        alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
        return _to_pil(change(_rgb_of(picture)), None if alpha is None else np.asarray(alpha))
    if isinstance(picture, np.ndarray):
        return _change_array(change, picture)
    if isinstance(picture, Tensor):
        return _change_tensor(change, picture)
    raise TypeError(f"a picture is a path, a PIL image, an array or a tensor, not {type(picture).__name__}")


def _rgb_of(picture: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3)"""
    if picture.mode in ("I", "F"):
        raise ValueError(f"a PIL image of mode {picture.mode} doesn't say what white is; make it an array in 0..1")
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.asarray(picture.convert("RGB"))


def _change_deep(change: Change, picture: Image.Image) -> Image.Image:
    """A grey image of 16 bits, the only kind of that depth that PIL has, into another one."""
    pixels = np.repeat(np.asarray(picture).astype(np.uint16)[..., None], 3, axis=2)
    return Image.fromarray(_as_type(change(pixels) @ _LUMINANCE, pixels.dtype))


def _to_pil(pixels: np.ndarray, alpha: np.ndarray | None) -> Image.Image:
    """An 8-bit image, as PIL has no colours of 16 bits; alpha is uint8 or uint16 (H, W)."""
    image = Image.fromarray(_as_type(pixels, np.dtype(np.uint8)))
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha if alpha.dtype == np.uint8 else (alpha // 257).astype(np.uint8)))
    return image


def _change_array(change: Change, array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4), of the type that was given; grey comes back as RGB."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"an array must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), not {array.shape}")
    colours = array if array.ndim == 3 else array[..., None]
    alpha = colours[..., 3:]
    colours = np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours[..., :3]
    return np.concatenate([_as_type(change(colours), array.dtype), alpha], axis=2)


def _change_tensor(change: Change, tensor: Tensor) -> Tensor:
    """(3, H, W) or (B, 3, H, W), of the type and on the device that were given."""
    if tensor.ndim == 4:
        return torch.stack([_change_tensor(change, image) for image in tensor]) if len(tensor) else tensor
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"a tensor must be (3, H, W) or (B, 3, H, W), not {tuple(tensor.shape)}")
    pixels = tensor.detach().permute(1, 2, 0)
    pixels = (pixels.float() if tensor.is_floating_point() else pixels).cpu().numpy()
    changed = torch.from_numpy(np.ascontiguousarray(_as_type(change(pixels), pixels.dtype)))
    return changed.permute(2, 0, 1).to(tensor.device, tensor.dtype)


def _as_type(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Clipped to 0..1; whole numbers of 8 or 16 bits are rounded."""
    pixels = np.clip(pixels, 0, 1)
    if np.issubdtype(dtype, np.floating):
        return pixels.astype(dtype)
    return (pixels * np.iinfo(dtype).max + 0.5).astype(dtype)
