"""Convert MobileNetV2's ImageNet weights from a quantised TensorFlow Lite file.

The file is mobilenet_v2_1.0_224_quant.tflite of google-coral/test_data (Apache-2.0). A value of it is
scale * (q - zero point). Needs the package tflite.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dereflect.options.arguments import is_file
from dereflect.options.parser import Parser
from dereflect.util.program import run


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="convert_mobilenet.py", description=__doc__)
    parser.add_argument("file", type=Path, help="the .tflite file")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the weights go (default: beside the "
                        "other bundled ones)")  # fmt: skip
    convert(parser.parse_args(argv))


def convert(options: argparse.Namespace) -> None:
    """Convert the file.

    Raises:
        UserError: it can't be read, or the package tflite is missing.
    """
    import numpy as np
    import torch

    from dereflect.models.mobilenet import WEIGHTS, MobileNetV2, SameConv2d
    from dereflect.util.errors import UserError
    from dereflect.util.run import checkpoint

    try:
        import tflite
    except ImportError as error:
        raise UserError("the package tflite is missing: pip install tflite") from error
    if not is_file(options.file):
        raise UserError(f"{options.file}: there is no such file")

    def values(tensor) -> np.ndarray:
        """The float32 values of a quantised tensor."""
        kinds = {0: np.float32, 2: np.int32, 3: np.uint8, 9: np.int8}
        raw = graph_of.Buffers(tensor.Buffer()).DataAsNumpy().view(kinds[tensor.Type()])
        scale, zero = tensor.Quantization().ScaleAsNumpy(), tensor.Quantization().ZeroPointAsNumpy()
        return (np.float32(scale) * (raw.astype(np.float32) - np.float32(zero))).reshape(tensor.ShapeAsNumpy())

    graph_of = tflite.Model.GetRootAsModel(options.file.read_bytes(), 0)
    graph = graph_of.Subgraphs(0)
    convolutions = []
    for i in range(graph.OperatorsLength()):
        operator = graph.Operators(i)
        code = graph_of.OperatorCodes(operator.OpcodeIndex())
        kind = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if kind in (tflite.BuiltinOperator.CONV_2D, tflite.BuiltinOperator.DEPTHWISE_CONV_2D):
            weight, bias = (values(graph.Tensors(operator.Inputs(k))) for k in (1, 2))
            # (out, h, w, in), or (1, h, w, channels) of a depthwise one
            depthwise = kind == tflite.BuiltinOperator.DEPTHWISE_CONV_2D
            convolutions.append((weight.transpose((3, 0, 1, 2) if depthwise else (0, 3, 1, 2)), bias))
    network = MobileNetV2(None)
    ours = [(name, part) for name, part in network.named_modules() if isinstance(part, SameConv2d)]
    state = {}
    # The last two are the classifier's, which no feature needs.
    for (name, _), (weight, bias) in zip(ours, convolutions[:-2], strict=True):
        state |= {f"{name}.weight": torch.from_numpy(weight.copy()), f"{name}.bias": torch.from_numpy(bias)}
    network.load_state_dict(state)
    about = {"origin": "mobilenet_v2_1.0_224_quant.tflite, google-coral/test_data", "licence": "Apache-2.0"}
    checkpoint.save_weights({name: value.half() for name, value in state.items()}, about, options.output or WEIGHTS)


if __name__ == "__main__":
    sys.exit(run(main))
