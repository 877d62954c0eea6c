"""Networks as files that run without this project: ONNX models and torch's programs."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dereflect.models import exported
from dereflect.models.arch import create_model
from dereflect.models.arch.blocks import NAF
from dereflect.models.arch.mamba import ImageMamba
from dereflect.models.dsrnet_model_sirs import DSRNetModel
from dereflect.models.features import build_features
from dereflect.models.scan import selective_scan_reference
from dereflect.models.scan.exported import CHUNK, selective_scan_exported
from dereflect.options import PRETRAINED
from dereflect.tools import export
from dereflect.util import program
from dereflect.util.errors import UserError
from tests.helpers import ROOT, errors

SIZES = [(48, 64), (33, 101), (95, 50), (64, 64)]
CLOSE = 1e-5  # of values around 1; what was seen is below 5e-7
# torch 2.11 turns pixel_unshuffle into another operator, with its own exporter as with onnxscript's newest.
TO_ONNX = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

onnxruntime = pytest.importorskip("onnxruntime")


class Small(nn.Module):
    """Stands in for a network: a block and a scan there and back at a quarter of the size."""

    features = None

    def __init__(self):
        super().__init__()
        self.narrow, self.widen = nn.Conv2d(48, 8, 1), nn.Conv2d(8, 96, 3, padding=1)
        self.block, self.mamba = NAF(8), ImageMamba(8, "bidirectional")

    def forward(self, image, features):
        x = self.mamba(self.block(self.narrow(F.pixel_unshuffle(image, 4))))
        transmission, reflection = F.pixel_shuffle(self.widen(x), 4).chunk(2, 1)
        return image + transmission, reflection, torch.zeros_like(image)


class Times(nn.Module):
    """Stands in for a network: a multiplication."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, image, features):
        return image * self.factor, image, torch.zeros_like(image)


def check(network, folder) -> None:
    """Both files give what the model gives, at sizes that aren't those that were traced."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # scales that start as 0 would hide the blocks
    features = build_features(network.features, "random")
    model = DSRNetModel(network, features, loss=None).eval()
    made = exported.export_program(network, features)
    exported.write_torch(made, folder / "x.pt2")
    programs = [torch.export.load(folder / "x.pt2").module()]
    if TO_ONNX:
        assert exported.write_onnx(made, folder / "x.onnx") >= 18
        session = onnxruntime.InferenceSession(folder / "x.onnx", providers=["CPUExecutionProvider"])
        assert [each.name for each in session.get_outputs()] == list(exported.OUTPUTS)
        programs.append(lambda image: session.run(None, {exported.INPUT: image.numpy()}))
    else:
        with pytest.raises(UserError, match="nothing is written"):
            exported.write_onnx(made, folder / "x.onnx")
    for file in folder.glob("x.*"):
        assert str(ROOT).encode() not in file.read_bytes(), "nothing of the machine"
    for size in SIZES:
        image = torch.rand(1, 3, *size)
        expected = model.predict(image)[:2]
        assert expected[0].std() > 0.1
        for compute in programs:
            for found, wanted in zip(compute(image), expected, strict=True):
                torch.testing.assert_close(torch.as_tensor(found), wanted, atol=CLOSE, rtol=0)


def test_both_files_at_any_size(tmp_path):
    check(Small(), tmp_path)


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    """As some versions of torch make them."""
    one, other = (exported.export_program(Times(factor), None) for factor in (1, 1.01))
    to_onnx = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda _, **more: to_onnx(one, **more))
    with pytest.raises(
        UserError, match=r"ONNX export of torch .* off by \d\.\de-0[23], where 0\.0001 is allowed; nothing"
    ):
        exported.write_onnx(other, tmp_path / "x.onnx")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="onnxruntime can't load; nothing is written"):
        patch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: 1 / 0)
        exported.write_onnx(other, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: one)
    with pytest.raises(UserError, match=r"torch\.export of torch"):
        exported.export_program(Times(1.01), None)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "name", ["dsrnet_s", "mdsrnet_s", "dsrnet_xs", "mdsrnet_xs", "mdsrnet2d_xs", "dsrnet_mobile_xs", "madsrnet_xs"]
)
def test_both_files_of_the_named_networks(name, tmp_path):
    check(create_model(name), tmp_path)


@pytest.mark.parametrize("length", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_scan_in_chunks_is_the_recurrence(length, reverse):
    """Steps that are long, too, which a sum of logarithms taken back would not survive."""
    batch, d, n = 2, 3, 4
    u, delta, z = torch.randn(3, batch, d, length)
    B, C = torch.randn(2, batch, n, length)
    given = u, 30 * delta, -torch.rand(d, n) * 10, B, C, torch.randn(d), z, torch.randn(d)
    ours = selective_scan_exported(*given, delta_softplus=True, reverse=reverse)
    expected, _ = selective_scan_reference(*given, delta_softplus=True, reverse=reverse)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_bundled_network_and_the_example_in_docs(tmp_path, monkeypatch, capsys, pixels):
    if not TO_ONNX:
        pytest.skip("torch is too old for this")
    monkeypatch.chdir(tmp_path)
    assert program.run(export.main, [str(PRETRAINED), "--to", "onnx", "-o", "madsrnet_xs.onnx"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"madsrnet_xs\.onnx: madsrnet_xs, ONNX, opset \d+, \d+\.\d MB", line)
    photograph = np.tile(pixels, (3, 2, 1))
    Image.fromarray(photograph).save("photograph.jpg")
    text = (ROOT / "docs/tools.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "onnxruntime" in block)
    exec(example, {})
    assert np.asarray(Image.open("transmission.png")).shape == photograph.shape


@pytest.mark.parametrize(("more", "said"), [
    (["--to", "onnx", "-o", "x.pt2"], "must end in .onnx"),
    (["--to", "torch", "-o", "x.onnx"], "must end in .pt2"),
    (["--to", "onnx", "-o", "x.onnx", "--half"], "--half"),
    (["--to", "onnx", "-o", "x.onnx", "--sizes", "480"], "--sizes"),
    (["-o", "x.safetensors", "--vgg_weights", "random"], "--vgg_weights"),
    (["another.pt", "--to", "onnx", "-o", "x.onnx"], "another.pt: several checkpoints"),
])  # fmt: skip
def test_options_that_do_not_fit_are_told(more, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        export.main([str(PRETRAINED), *more])
    assert said in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    assert program.run(export.main, [str(PRETRAINED), "--to", "onnx", "-o", str(tmp_path / "x.onnx")]) == 2
    assert "pip install onnx onnxscript onnxruntime" in errors(capsys)
