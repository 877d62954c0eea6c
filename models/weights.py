"""Load any checkpoint, published or our own, into a network. Published parameter names are translated only here."""

import functools
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from dereflect.models.arch import create_model, list_models
from dereflect.util.errors import UserError
from dereflect.util.run import checkpoint

# Under which a checkpoint holds a state dict; BasicSR's are params_ema and params.
_KEYS = ("ema", "network", "weight", "state_dict", "model", "icnn", "params_ema", "params")
_TRAINED = ("net_g_ema.", "net_g.")  # the network among what else XReflection's state dict holds, such as VGG19

# From published parameter names to ours; all are applied to a name, one after the other. The published code names a
# layer by its position in nested nn.Sequential.
_PREFIXES = re.compile(r"^(?:(?:module|net|network|_orig_mod)\.)+")
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # LRM names every shared tensor twice, as seq_l and seq_r.
        (r"\.seq_[lr]\.", ".seq."),
        (r"^lrm\.intro\.seq\.0\.", "residue.expand."),
        (r"^lrm\.blocks_inter\.", "residue.interact."),
        (r"^lrm\.blocks_merge\.", "residue.merge."),
        (r"^lrm\.tail\.0\.", "residue.head."),
        # The blocks.
        (r"(^|\.)([ab])_l$", r"\1\2.0"),
        (r"(^|\.)([ab])_r$", r"\1\2.1"),
        (r"(^|\.)([ab])$", r"\1\2.0"),
        (r"(^|\.)block([12])\.0\.seq\.0\.mamba_model\.", r"\1mamba\2.mamba_model."),
        (r"(^|\.)block1\.2\.seq\.0\.mamba_model\.", r"\1mamba.mamba_model."),
        (r"(^|\.)block([12])\.1\.mamba\.", r"\1gate\2.mamba."),
        (r"(^|\.)block([12])\.1\.conv\.", r"\1gate\2.project."),
        (r"(^|\.)block([12])\.0\.seq\.0\.", r"\1norm\2."),
        (r"(^|\.)block([12])\.0\.seq\.1\.", r"\1expand\2."),
        (r"(^|\.)block1\.0\.seq\.2\.", r"\1depthwise."),
        (r"(^|\.)block1\.2\.seq\.0\.ca\.1\.", r"\1attention."),
        (r"(^|\.)block1\.3\.seq\.0\.", r"\1project1."),
        (r"(^|\.)block2\.2\.seq\.0\.", r"\1project2."),
        # NAF's, without the wrapper of the two streams.
        (r"(^|\.)block([12])\.0\.(weight|bias)$", r"\1norm\2.\3"),
        (r"(^|\.)block([12])\.1\.(weight|bias)$", r"\1expand\2.\3"),
        (r"(^|\.)block1\.2\.(weight|bias)$", r"\1depthwise.\2"),
        (r"(^|\.)block1\.4\.ca\.1\.", r"\1attention."),
        (r"(^|\.)block1\.5\.", r"\1project1."),
        (r"(^|\.)block2\.3\.", r"\1project2."),
        # The pyramid.
        (r"^intro\.block_intro\.0\.seq\.0\.", "pyramid.image.0."),
        (r"^intro\.block_intro\.1\.", "pyramid.image.1."),
        (r"^intro\.block([1-5])\.0\.", lambda m: f"pyramid.lateral.{int(m[1]) - 1}."),
        (r"^intro\.ch_map([1-4])\.0\.seq\.0\.", lambda m: f"pyramid.fuse.{int(m[1]) - 1}."),
        (r"^intro\.ch_map([1-4])\.1\.", lambda m: f"pyramid.refine.{int(m[1]) - 1}."),
        (r"^intro\.ch_map1\.2\.seq\.0\.", "pyramid.narrow."),
        (r"^intro\.ch_map1\.3\.", "pyramid.refine_narrow."),
        (r"^intro\.ch_map0\.seq\.0\.", "pyramid.fuse_image."),
        # The U-Net.
        (r"^(encoders|decoders)\.", r"unet.\1."),
        (r"^middle_blks\.", "unet.middle."),
        (r"^(ups|downs)\.(\d+)\.seq\.0\.", r"unet.\1.\2."),
        (r"^ending\.seq\.0\.", "head."),
    )
]


def translate(name: str) -> str:
    """Our name of a parameter, from its published name; our own names stay as they are."""
    name = _PREFIXES.sub("", name)
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def load_weights(network: nn.Module, source: str | Path | dict, where: str = "the given weights") -> dict:
    """Load a checkpoint, published or our own, into a network.

    Args:
        network: of `models.arch.create_model`.
        source: a file or its content: a state dict, bare or under "weight", "ema", "network", "state_dict", "model" or
            "icnn", "params_ema" or "params"; names may start with "module.", "net." or "network.", or with "net_g.", as
            XReflection's do. Where there is a moving average, it is taken.
        where: what messages call the source.

    Returns:
        The rest of the checkpoint, such as its epoch.

    Raises:
        UserError: the file can't be read, holds anything but plain data, doesn't fit the network or isn't finite;
            the message names what is missing, left over, of another shape, NaN or infinite.
    """
    if not isinstance(source, dict):
        where, source = str(source), checkpoint.load(source)
    state, rest = _find_state(source, where)
    translated = _translated(state, where)
    checkpoint.check_fit(network.state_dict(), translated, where)
    checkpoint.check_finite(translated, where)
    network.load_state_dict(translated)
    return rest


def architecture_of(content: dict, where: str) -> str:
    """The name, of `models.arch.list_models`, of the network that a checkpoint's weights belong to.

    Args:
        content: of the checkpoint. Our own hold the name; for others, the names and shapes of the parameters are
            compared with those of all networks. Of networks that differ only in how they are trained, the result is
            the one with the shortest name.
        where: the file, for messages.

    Raises:
        UserError: no network has these parameters.
    """
    name = content.get("inet")
    if isinstance(name, str):
        if name not in list_models():
            raise UserError(f"{where}: of a model {name}, which there is none of; there are {', '.join(list_models())}")
        return name
    state, _ = _find_state(content, where)
    shapes = {name: value.shape for name, value in _translated(state, where).items()}
    for name in sorted(list_models(), key=len):
        if shapes == _shapes(name):
            return name
    raise UserError(
        f"{where}: its {len(shapes)} parameters are none of DSRNet's family ({', '.join(list_models())}); "
        "name the network with --inet to see what doesn't fit"
    )


@functools.cache
def _shapes(name: str) -> dict[str, torch.Size]:
    """The shapes of a network's parameters, by name."""
    with torch.device("meta"):
        return {key: value.shape for key, value in create_model(name).state_dict().items()}


def _translated(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """A state dict under our names."""
    translated: dict[str, Tensor] = {}
    for name, value in state.items():
        ours = translate(name)
        if ours in translated and not _equal(translated[ours], value):
            raise UserError(f"{where}: two different tensors are meant to be {ours}; one of them is {name}")
        translated[ours] = value
    return translated


def _find_state(content: dict, where: str) -> tuple[dict[str, Tensor], dict]:
    """The state dict in a checkpoint, and the rest."""
    key = next((key for key in _KEYS if isinstance(content.get(key), dict)), None)
    state = content if key is None else content[key]
    if state and all(isinstance(name, str) for name in state):
        state = _of_network(state)
    if state and all(isinstance(name, str) and checkpoint.is_plain(value) for name, value in state.items()):
        return state, {} if key is None else {name: value for name, value in content.items() if name != key}
    raise UserError(f"{where}: no state dict in it; its keys are {', '.join(map(str, list(content)[:8])) or 'none'}")


def _of_network(state: dict[str, object]) -> dict[str, object]:
    """What of a state dict belongs to the network: not the perceptual loss's VGG19 that may be saved with it."""
    for prefix in _TRAINED:
        if chosen := {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}:
            return chosen
    return {name: value for name, value in state.items() if not name.startswith("vgg.")}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
