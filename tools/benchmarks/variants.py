"""What `step` and `memory` measure: the networks in several variants, as training steps and as predictions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dereflect.models import build_model, check_backends
from dereflect.models.arch import create_model
from dereflect.models.arch.plain import plain_forward
from dereflect.models.dsrnet_model_sirs import DSRNetModel
from dereflect.models.scan import Mamba, set_backend
from dereflect.options import train_parser
from dereflect.tools.benchmarks.published import PublishedNetwork
from dereflect.tools.inspection.costs import FORMULAS
from dereflect.tools.inspection.field import scaled_at_random
from dereflect.util.errors import UserError
from dereflect.util.optim import parameter_groups

PRECISIONS = ("fp32", "bf16")
EXTRAS = ("compile", "graphs", "checkpoint")  # that change the training step only
PUBLISHED = "published"  # the network of the published code; only --against brings it
LOOP = "sequential"  # with the scan's plain loop over the pixels

Images = list[Tensor]
"""Mixtures, target transmissions and target reflections, (B, 3, H, W) each."""

Work = Callable[[Images], object]


@dataclass(frozen=True)
class Variant:
    """A way to compute a step."""

    name: str

    @property
    def parts(self) -> set[str]:
        return set(self.name.split("+"))

    @property
    def precision(self) -> str:
        """Of the matrix products, "fp32" or "bf16"."""
        return "bf16" if "bf16" in self.parts else "fp32"

    @property
    def is_other(self) -> bool:
        """Whether it is another implementation of the network."""
        return self.name in ("plain", PUBLISHED)

    @property
    def is_compiled(self) -> bool:
        return bool(self.parts & {"compile", "graphs"})


def check_variant(name: str, device: str, forward_only: bool) -> Variant:
    """The variant of that name.

    Raises:
        UserError: there is none, or not on this device, or not of a prediction.
    """
    variant, parts = Variant(name), name.split("+")
    known = set(parts) <= {*PRECISIONS, *EXTRAS, LOOP} and len(variant.parts) == len(parts)
    if name != "plain" and not (known and len(variant.parts & set(PRECISIONS)) == 1):
        raise UserError(
            f"--variants {name}: no such variant; there are 'plain', and {' or '.join(PRECISIONS)} with any of "
            f"{', '.join(EXTRAS)}, {LOOP}, such as bf16+compile+checkpoint"
        )
    if "graphs" in parts and device == "cpu":
        raise UserError(f"--variants {name}: CUDA graphs need a GPU")
    if forward_only and variant.parts & set(EXTRAS):
        raise UserError(f"--variants {name}: {', '.join(EXTRAS)} change the training step, not --forward_only")
    return variant


def has_mamba(name: str) -> bool:
    with torch.device("meta"):
        return any(isinstance(module, Mamba) for module in create_model(name).modules())


class OtherModel(nn.Module):
    """What a DSRNetModel does in fp32, with another implementation of its network.

    Args:
        model: whose features and losses are taken.
        network: with the parameters.
        separate: (mixture, features) -> transmission, reflection and residue.
    """

    def __init__(self, model: DSRNetModel, network: nn.Module, separate: Callable):
        super().__init__()
        self.network, self.separate = network.to(memory_format=torch.contiguous_format), separate
        self.features, self.loss = model.features, model.loss

    def forward(self, image: Tensor, target_t: Tensor, target_r: Tensor) -> dict[str, Tensor]:
        return self.loss(*self.predict(image), image, target_t, target_r)

    def predict(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            features = [f.contiguous() for f in self.features(image)]
        return self.separate(image, features)


def build(
    name: str, variant: Variant, device: str, against: Path | None = None, given: Sequence[str] = ()
) -> nn.Module:
    """The model with random weights, on the device; `against` is a clone of the published code, `given` are options
    of a training."""
    extras = ["--checkpoint_activations"] if "checkpoint" in variant.parts else []
    options = train_parser().parse_args(["--vgg_weights=random", *given, f"--inet={name}", *extras])
    model = build_model(options, bf16=variant.precision == "bf16")
    check_backends(model.network, device)
    scaled_at_random(model.network, std=0.1)  # at their initial 0 some gradients vanish
    if variant.name == PUBLISHED:
        network = PublishedNetwork(against, name, model.network, device)
        return OtherModel(model, network, network).to(device)
    if variant.is_other:
        return OtherModel(model, model.network, partial(plain_forward, model.network)).to(device)
    model.to(device)
    if variant.is_compiled:
        model.compile(fullgraph=True, dynamic=False, mode="reduce-overhead" if "graphs" in variant.parts else None)
    return model


def training(name: str, variant: Variant, device: str, against: Path | None = None, given: Sequence[str] = ()) -> Work:
    """A training step that keeps its weights and its optimiser's state, and nothing else, from call to call."""
    model = build(name, variant, device, against, given)
    settings = {} if variant.is_other else {"fused": True}
    optimizer = torch.optim.AdamW(parameter_groups(model.network, 1e-2), lr=1e-6, **settings)

    def step(images: Images) -> None:
        try:
            sum(model(*images).values()).backward()
            nn.utils.clip_grad_norm_(model.network.parameters(), math.inf)
            optimizer.step()
        finally:
            optimizer.zero_grad(set_to_none=True)

    return with_scan(variant, step)


def prediction(
    name: str, variant: Variant, device: str, against: Path | None = None, given: Sequence[str] = ()
) -> Work:
    """`predict` of the mixtures."""
    model = build(name, variant, device, against, given).eval()
    return with_scan(variant, torch.no_grad()(lambda images: model.predict(images[0])))


def with_scan(variant: Variant, work: Work) -> Work:
    """Run `work` with the scan backend of the variant."""

    def scanning(images: Images) -> None:
        set_backend("reference" if LOOP in variant.parts else None)
        try:
            work(images)
        finally:
            set_backend(None)

    return scanning


def random_images(batch: int, size: int, device: str) -> Images:
    return [torch.rand(batch, 3, size, size, device=device) for _ in range(3)]


def count_flops(model: str, size: int, device: str, forward_only: bool, given: Sequence[str] = ()) -> int | None:
    """Floating-point operations of one image's step in fp32: those of products, convolutions and scans.

    None where even that doesn't fit into memory.
    """
    try:
        work = (prediction if forward_only else training)(model, Variant("fp32"), device, given=given)
        images = random_images(1, size, device)
        with FlopCounterMode(display=False, custom_mapping=FORMULAS_BOTH_WAYS) as counter:
            work(images)
    except torch.cuda.OutOfMemoryError:
        return None
    return counter.get_total_flops()


def _backward_flops(
    grad_shape, x_shape, w_shape, _bias, _stride, _padding, _dilation, transposed, _out, _groups, mask, **_
) -> int:
    """FLOPs of a convolution's backward pass: for each gradient as many as forward. torch's own formula ignores the
    groups of a depthwise convolution when it counts the weights' gradient, so that its count is too high by their
    number."""
    forward = 2 * math.prod(w_shape) * grad_shape[0] * math.prod((x_shape if transposed else grad_shape)[2:])
    return forward * sum(mask[:2])


FORMULAS_BOTH_WAYS = FORMULAS | {torch.ops.aten.convolution_backward: _backward_flops}
"""FLOPs of operators that torch's counter doesn't know, or counts wrongly."""
