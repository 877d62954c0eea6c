"""The short causal convolution over each channel that precedes the scan in a Mamba layer."""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("scan")


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, reverse: bool = False
) -> Tensor:
    """y_t = activation(sum_k weight_k x_{t - width + 1 + k} + bias), each channel by itself.

    Args:
        x: (batch, d, length).
        weight: (d, width).
        bias: (d).
        activation: "silu" or None.
        reverse: whether to go from the last step to the first: x_{t + width - 1 - k} instead.

    Uses the CUDA kernel of the `causal_conv1d` package where it works (tried once on a tiny tensor), else torch. In
    reverse it always uses torch, as the package's kernel would need a flipped copy of x.

    Raises:
        ValueError: for another activation.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation is {activation!r}, not 'silu' or None")
    if x.is_cuda and not reverse and package_works():
        return _package()(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), activation=activation)
    width = weight.shape[1]
    weight = weight.flip(-1) if reverse else weight
    y = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=len(weight))
    y = y[..., width - 1 :] if reverse else y[..., : x.shape[2]]
    return y if activation is None else F.silu(y)


def _package():
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn


def package_works() -> bool:
    """Whether the `causal_conv1d` package can be imported and its kernel runs."""
    return _try_package()


package_works._dynamo_marked_constant = True  # see models.scan.backends


@cache
def _try_package() -> bool:
    try:
        x = torch.ones(1, 8, 8, device="cuda")
        _package()(x, x[0, :, :4].contiguous(), x[0, :, 0].contiguous(), activation="silu")
        torch.cuda.synchronize()
    except Exception as error:  # whatever an installation can get wrong
        logger.info("causal convolution: torch, not causal_conv1d: %s: %s", type(error).__name__, error)
        return False
    logger.info("causal convolution: the CUDA kernel of causal_conv1d")
    return True
