"""A network as one file that runs without this project, on images of any size: torch.export's program, or ONNX."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dereflect.options.arguments import STRIDE
from dereflect.util import disk
from dereflect.util.errors import UserError

INPUT, OUTPUTS = "image", ("transmission", "reflection")
CLOSE = 1e-4  # between a network and its file, of values around 1; what was seen is below 5e-7
LEAST = 2 * STRIDE + 1  # pixels of a side: sizes of one pixel would be a case of their own, at the coarsest level, too


class _Exported(nn.Module):
    """What the file computes: (1, 3, H, W) in 0..1 into transmission and reflection of the same shape, not clipped."""

    def __init__(self, network: nn.Module, features: nn.Module | None):
        super().__init__()
        self.network, self.features = network, features

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        height, width = image.shape[-2:]
        high, wide = ((side + STRIDE - 1) // STRIDE * STRIDE - side for side in (height, width))
        image = F.pad(image, (0, wide, 0, high), mode="replicate")
        outputs = self.network(image, self.features(image) if self.features else None)
        return tuple(output[..., :height, :width] for output in outputs[: len(OUTPUTS)])


def check_onnx() -> None:
    """See whether ONNX models can be made, and be checked, here.

    Raises:
        UserError: packages are missing; the message names them.
    """
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def export_program(network: nn.Module, features: nn.Module | None) -> torch.export.ExportedProgram:
    """The network on the CPU in float32, its frozen features included, as torch.export's program for any size.

    Its argument is the image, (1, 3, H, W) in 0..1, both sides at least LEAST; it returns what OUTPUTS names.

    Raises:
        UserError: this version of torch makes a program that computes something else.
    """
    model = _Exported(network, features).cpu().float().eval().requires_grad_(False)
    sides = {2: torch.export.Dim("height", min=LEAST), 3: torch.export.Dim("width", min=LEAST)}
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            model,
            (torch.rand(1, 3, 72, 104),),
            dynamic_shapes=({**sides},),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    # Among what torch.export asserts is that the memory's layout is as of the size that it has traced, such as that a
    # side differs from another; results don't depend on it.
    for part in program.graph_module.modules():
        for node in list(part.graph.nodes) if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names folders of this machine
            if node.target is torch.ops.aten._assert_scalar.default:
                part.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    _check("torch.export", program.module(), model)
    return program


def _check(maker: str, ours: Callable[[Tensor], Sequence], expected: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Compare at a size that isn't the one traced: a wrong file must not be written."""
    image = torch.rand(1, 3, LEAST, LEAST + 12)
    with torch.no_grad():
        pairs = zip(ours(image), expected(image), strict=True)
    off = max((torch.as_tensor(found) - wanted).abs().max().item() for found, wanted in pairs)
    if not off <= CLOSE:
        raise _refusal(maker, f"gives results that are off by {off:.1e}, where {CLOSE} is allowed")


def _refusal(maker: str, what: str) -> UserError:
    advice = "nothing is written. A newer torch may do it: 2.13 and 2.14 are tested"
    return UserError(f"{maker} of torch {torch.__version__} {what}; {advice}")


def write_torch(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program as a .pt2 file: `torch.export.load(path).module()(image)`.

    Raises:
        UserError: the file can't be written.
    """
    with disk.replacing(path) as temporary, temporary.open("wb") as file, _quiet():
        torch.export.save(program, file)


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> int:
    """Write a program as an ONNX model, its input and outputs named as INPUT and OUTPUTS say; returns its opset.

    Raises:
        UserError: the file can't be written, or computes something else.
    """
    import onnxruntime

    with _quiet():
        # Runtimes optimise it as they load it; the exporter's own optimiser takes minutes where there are scans.
        model = torch.onnx.export(
            program, input_names=[INPUT], output_names=OUTPUTS, dynamo=True, optimize=False, verbose=False
        )
    for graph in (model.model.graph, *model.model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()  # where in the source it comes from: half of the file
    try:
        session = onnxruntime.InferenceSession(
            model.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # of classes of onnxruntime's own
        raise _refusal("ONNX export", "makes a model that onnxruntime can't load") from error
    _check("ONNX export", lambda image: session.run(None, {INPUT: image.numpy()}), program.module())
    with disk.replacing(path) as temporary:
        model.save(temporary, external_data=False)
    return model.model.opset_imports[""]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own notes."""
    logger = logging.getLogger("torch._export.serde.serialize")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
