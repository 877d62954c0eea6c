"""Checkpoints of others: other toolboxes' are loaded, other files named, hostile and damaged ones refused at once."""

import json
import os
import zipfile
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch

from dereflect.models.arch import create_model
from dereflect.models.weights import architecture_of, load_weights
from dereflect.options import PRETRAINED
from dereflect.util.errors import UserError
from dereflect.util.run import checkpoint
from tests.helpers import GOLDEN, Malicious, flipped, published_state, same


def published(name: str) -> dict[str, torch.Tensor]:
    return published_state(json.loads((GOLDEN / "state_dict_shapes.json").read_text())[name])


def as_xreflection(state: dict[str, torch.Tensor]) -> dict:
    """As Lightning saves the toolbox's module: the network, and the perceptual loss's VGG19."""
    ours = {}
    for name, value in state.items():
        if name.startswith("lrm") or ".seq_r." not in name:
            ours["net_g." + (name if name.startswith("lrm") else name.replace(".seq_l.", ".seq."))] = value
    ours |= {"vgg.slice1.0.weight": torch.ones(2), "cri_pix.weight": torch.ones(1)}
    more = {"hyper_parameters": {"opt": {"path": PurePosixPath("x")}}, "optimizer_states": []}
    return {"epoch": 33, "pytorch-lightning_version": "2.5.1", "state_dict": ours, **more}


@pytest.mark.parametrize(
    "kind", [as_xreflection, lambda s: {"params": s}, lambda s: {"params": {"x": torch.ones(1)}, "params_ema": s}]
)
def test_weights_of_other_toolboxes_are_loaded(kind, tmp_path):
    state = published("dsrnet_s")
    torch.save(kind(state), tmp_path / "other.ckpt")
    content = checkpoint.load(tmp_path / "other.ckpt")
    assert architecture_of(content, "other.ckpt") == "dsrnet_s"
    net, expected = create_model("dsrnet_s"), create_model("dsrnet_s")
    load_weights(net, content)
    load_weights(expected, state)
    assert same(net.state_dict(), expected.state_dict())


def _script(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


FOREIGN = {
    "a web page": lambda path: path.write_text("\n<!DOCTYPE html><html>Virus scan warning</html>"),
    "a git-lfs pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\n"),
    "a whole pickled module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "TorchScript": _script,
    "NumPy": lambda path: np.savez(path.open("wb"), a=1),
    "holds .*, which is code": lambda path: torch.save({"x": Malicious()}, path),
    "none of DSRNet's family": lambda path: torch.save({"params": {"intro.weight": torch.ones(3, 3)}}, path),
    "a model gone, which": lambda path: torch.save({"inet": "gone", "network": {}}, path),
    "not a regular file": lambda path: os.mkfifo(path),
    "not a regular file ": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_what_a_foreign_file_is_is_said_in_a_line(what, name, tmp_path):
    path = tmp_path / name
    FOREIGN[what](path)
    with pytest.raises(UserError, match=rf"a\.\w+: .*({what.strip()})") as error:
        architecture_of(checkpoint.load(path), str(path))
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_every_turned_bit_of_exported_weights_is_noticed(tmp_path):
    """Of every tenth byte; safetensors itself notices those of its table alone."""
    state, about = {"w": torch.arange(64.0), "b": torch.ones(3, dtype=torch.bfloat16)}, {"inet": "x", "epoch": 3}
    path = tmp_path / "a.safetensors"
    checkpoint.save_weights(state, about, path)
    data = path.read_bytes()
    unnoticed = []
    for bit in range(0, 8 * len(data), 7):
        path.write_bytes(flipped(data, bit))
        try:
            if not same(checkpoint.load(path), about | {"network": state}):
                unnoticed.append(bit)
        except UserError:
            pass
    assert unnoticed == []


@pytest.mark.parametrize("path", sorted(PRETRAINED.parent.glob("*.safetensors")), ids=lambda path: path.stem)
def test_the_weights_that_come_with_the_code_have_a_digest(path, tmp_path):
    data = path.read_bytes()
    assert same(checkpoint.load(path), checkpoint.load(path))
    copy = tmp_path / path.name
    copy.write_bytes(flipped(data, 8 * (len(data) - 1000)))
    with pytest.raises(UserError, match="its digest says"):
        checkpoint.load(copy)


def _deep_list(shared: bool) -> list:
    value: list = []
    for _ in range(60):
        value = [value, value] if shared else [value]
    return value


def _slowly_hashed(path):
    """A dict whose key is a tuple that holds the empty tuple 2 ** 60 times, in some 200 bytes."""
    pickled = b"\x80\x02})" + b"".join(b"q\x00h\x00\x86" for _ in range(60)) + b"K\x01s."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", b"3\n")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "make",
    [
        _slowly_hashed,
        lambda path: path.write_bytes(b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."),
        lambda path: torch.save({"options": _deep_list(shared=True)}, path),
        lambda path: torch.save({"network": {"w": torch.ones(1).expand(10**6, 10**6)}}, path),
        lambda path: torch.save({"network": dict.fromkeys(range(1000), torch.ones(1).expand(10**6))}, path),
        lambda path: torch.save({"options": _cycle()}, path),
    ],
)
def test_what_would_take_for_ever_is_refused_at_once(make, tmp_path):
    make(tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"nested too deeply|repeat|within itself"):
        checkpoint.load(tmp_path / "a.pt")


def _cycle() -> list:
    value: list = []
    value.append(value)
    return value
