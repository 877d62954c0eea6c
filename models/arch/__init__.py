"""The named networks: every public function here is one, can be named with --inet, is listed and tested."""

import inspect
import sys
from functools import partial

from dereflect.models.arch.blocks import Block, MuGI, MuGIM, MuGIM2, MuGIMA, MuGIMG
from dereflect.models.arch.dsrnet import DSRNet
from dereflect.models.arch.mamba import Order

_SMALL = {"width": 32, "encoder": (2, 2, 2), "middle": 4, "decoder": (2, 2, 2), "split": True}
_MEDIUM = {"width": 64, "encoder": (2, 2, 2, 2), "middle": 4, "decoder": (2, 2, 2, 2), "split": False}
_LARGE = {"width": 64, "encoder": (2, 2, 4, 8), "middle": 12, "decoder": (2, 2, 2, 2), "split": False}
# Without VGG19, at a quarter of the resolution, as full and half resolution are too slow for a laptop.
_TINY = {"width": 48, "split": True, "shuffle": 4, "residue": (0, 0), "residual": True}
_TINY_CONVOLUTIONS = {"encoder": (1, 2), "middle": 3, "decoder": (2, 1), "stem": (32, 64, 96), "neck": 32}
_TINY_MAMBA = {"encoder": (1, 1), "middle": 2, "decoder": (1, 1), "stem": (24, 48, 64), "neck": 24}
_MOBILE = {"width": 64, "encoder": (1, 2), "middle": 4, "decoder": (2, 1), "split": True, "shuffle": 4, "neck": 48}
_MOBILE |= {"features": "mobilenet", "residue": None, "residual": True, "detail": 8}
_WIDE = {"width": 80, "neck": 56}
_HALF = {"width": 32, "shuffle": 2, "neck": 32}


def dsrnet_xs() -> DSRNet:
    """DSRNet with a stem of its own instead of VGG19, for laptops: 1.8 M parameters."""
    return DSRNet(**_TINY | _TINY_CONVOLUTIONS)


def dsrnet_no_residue_xs() -> DSRNet:
    """dsrnet_xs without residue, to study what the residue is good for."""
    return DSRNet(**_TINY | _TINY_CONVOLUTIONS | {"residue": None})


def dsrnet_frozen_stem_xs() -> DSRNet:
    """dsrnet_xs whose stem keeps its random weights, to study what learning the stem is good for."""
    network = dsrnet_xs()
    network.stem.requires_grad_(False)
    return network


def mdsrnet_xs() -> DSRNet:
    """dsrnet_xs with Mamba from half of its resolution down, and fewer blocks: 1.7 M parameters."""
    return _mdsrnet_xs("raster")


def mdsrnet_bidirectional_xs() -> DSRNet:
    """mdsrnet_xs that scans along rows, there and back."""
    return _mdsrnet_xs("bidirectional")


def mdsrnet2d_xs() -> DSRNet:
    """mdsrnet_xs that scans along rows and columns, there and back."""
    return _mdsrnet_xs("cross")


def _mdsrnet_xs(order: Order) -> DSRNet:
    def block(channels: int, split: bool) -> Block:
        return MuGI(channels, split) if channels == _TINY["width"] else MuGIM2(channels, split, order)

    return DSRNet(**_TINY | _TINY_MAMBA, block=block)


def dsrnet_mobile_xs() -> DSRNet:
    """DSRNet on MobileNetV2's features, at a quarter of the resolution: 3.9 M parameters."""
    return DSRNet(**_MOBILE)


def dsrnet_mobile80_xs() -> DSRNet:
    """dsrnet_mobile_xs with 80 channels instead of 64: 5.5 M parameters."""
    return DSRNet(**_MOBILE | _WIDE)


def dsrnet_mobile_half_xs() -> DSRNet:
    """dsrnet_mobile_xs at half of the resolution, with 32 channels: 1.8 M parameters."""
    return DSRNet(**_MOBILE | _HALF)


def mdsrnet_mobile_xs() -> DSRNet:
    """dsrnet_mobile_xs with an image Mamba, there and back, instead of attention below the finest level: 6.1 M."""

    def block(channels: int, split: bool) -> Block:
        return MuGI(channels, split) if channels == _MOBILE["width"] else MuGIM2(channels, split, "bidirectional")

    return DSRNet(**_MOBILE, block=block)


def madsrnet_xs() -> DSRNet:
    """dsrnet_mobile_xs whose attention, below the finest level, scans the image at a sixteenth of its size: 4.3 M."""
    return _madsrnet_xs()


def madsrnet_raster_xs() -> DSRNet:
    """madsrnet_xs that scans along rows, in one direction."""
    return _madsrnet_xs("raster")


def madsrnet_cross_xs() -> DSRNet:
    """madsrnet_xs that scans along rows and columns, there and back."""
    return _madsrnet_xs("cross")


def madsrnet80_xs() -> DSRNet:
    """madsrnet_xs with 80 channels instead of 64: 6.0 M parameters."""
    return _madsrnet_xs(**_WIDE)


def madsrnet_half_xs() -> DSRNet:
    """madsrnet_xs at half of the resolution, with 32 channels: 2.0 M parameters."""
    return _madsrnet_xs(**_HALF)


def _madsrnet_xs(order: Order = "bidirectional", **changes) -> DSRNet:
    layout = _MOBILE | changes
    finest, side = layout["width"], 16 // layout["shuffle"]  # the scans' pixels are 16 of the image's wide

    def block(channels: int, split: bool) -> Block:
        if channels == finest:
            return MuGI(channels, split)
        return MuGIMA(channels, split, side * finest // channels, order)

    return DSRNet(**layout, block=block)


def dsrnet_s() -> DSRNet:
    """DSRNet, small: 9.9 M parameters."""
    return DSRNet(**_SMALL)


def dsrnet_m() -> DSRNet:
    """DSRNet, medium: 53.6 M parameters."""
    return DSRNet(**_MEDIUM)


def dsrnet_l() -> DSRNet:
    """DSRNet of the ICCV 2023 paper: 124.6 M parameters."""
    return DSRNet(**_LARGE)


def dsrnet_l_nature() -> DSRNet:
    """dsrnet_l as published with the nature pairs: two blocks fewer in the residue module, 123.7 M parameters."""
    return DSRNet(**_LARGE, residue=(2, 2))


def mdsrnet_s() -> DSRNet:
    """M2DSRNet in the small layout."""
    return DSRNet(**_SMALL, block=MuGIM2)


def mdsrnet_m() -> DSRNet:
    """M2DSRNet in the medium layout."""
    return DSRNet(**_MEDIUM, block=MuGIM2)


def mdsrnet_l() -> DSRNet:
    """M2DSRNet: Mamba instead of channel attention in the U-Net, 209.1 M parameters."""
    return DSRNet(**_LARGE, block=MuGIM2)


def mdsrnet2d_s() -> DSRNet:
    """mdsrnet_s that scans along rows and columns, there and back."""
    return DSRNet(**_SMALL, block=partial(MuGIM2, order="cross"))


def mdsrnet2d_m() -> DSRNet:
    """mdsrnet_m that scans along rows and columns, there and back."""
    return DSRNet(**_MEDIUM, block=partial(MuGIM2, order="cross"))


def mdsrnet2d_l() -> DSRNet:
    """mdsrnet_l that scans along rows and columns, there and back: 227.3 M parameters."""
    return DSRNet(**_LARGE, block=partial(MuGIM2, order="cross"))


def mdsrnet_v1_s() -> DSRNet:
    """MDSRNet v1 in the small layout, to study why it trains badly."""
    return DSRNet(**_SMALL, block=MuGIM)


def mdsrnet_v1_l() -> DSRNet:
    """MDSRNet v1: Mamba instead of norm and expansion, 262.5 M parameters. Trains badly."""
    return DSRNet(**_LARGE, block=MuGIM)


def mxdsrnet_l() -> DSRNet:
    """MXDSRNet: M2DSRNet with Mamba in the pyramid, too, 213.1 M parameters."""
    return DSRNet(**_LARGE, block=MuGIM2, pyramid_block=MuGIM2)


def mgdsrnet_l() -> DSRNet:
    """MGDSRNet: Mamba gates in the U-Net, 340.6 M parameters."""
    return DSRNet(**_LARGE, block=MuGIMG)


def _models() -> dict:
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    return {
        name: function
        for name, function in functions
        if function.__module__ == __name__ and name not in {"list_models", "create_model"} and name[0] != "_"
    }


def list_models() -> list[str]:
    """Names that `create_model` and --inet take, sorted."""
    return sorted(_models())


def create_model(name: str) -> DSRNet:
    """A network by name, freshly initialised.

    Returns:
        net(image, features) -> (transmission, reflection, residue); see `DSRNet.forward`.

    Raises:
        KeyError: there is no such name; the message lists those there are.
    """
    models = _models()
    if name not in models:
        raise KeyError(f"there is no model '{name}'; there are {', '.join(sorted(models))}")
    return models[name]()
