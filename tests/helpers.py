"""What several test files share: tiny runs, faults on demand, small data sets and files, golden numbers."""

import io
import json
import math
import re
import resource
import subprocess
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dereflect.data import build_train_loader, discover
from dereflect.models.losses import ReflectionLoss
from dereflect.options import parse_train
from dereflect.tools import report
from dereflect.train_sirs import train
from dereflect.util import program
from dereflect.util.run import checkpoint
from tests.golden.fill import fill

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden"
PHOTOGRAPHS = "train/VOCdevkit/VOC2012/PNGImages"


def project_table() -> dict:
    """`[project]` of pyproject.toml."""
    try:
        import tomllib
    except ImportError:  # before Python 3.11, where pytest brings this
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# ---- runs ---------------------------------------------------------------------------------------------------------


def arguments(data_folder: Path, runs: Path, *more: str) -> list[str]:
    """A run of a few tiny steps, of the smallest network."""
    fixed = "--inet dsrnet_xs --gpu_ids -1 --crop_size 32 --vgg_weights random --epoch_size 4 --nThreads 0 "
    fixed += f"--val_split 0.2 --panels 1 --log_every 2 --base_dir {data_folder} --checkpoints_dir {runs}"
    return [*fixed.split(), "--comment", "a test", *more]


def run(data_folder: Path, runs: Path, *more: str) -> tuple[int, Path]:
    """Train in this process; the exit status and the run's folder."""
    options = parse_train(arguments(data_folder, runs, *more))
    return train(options), runs / options.name


def state_of(folder: Path) -> dict:
    """What a run's last checkpoint holds, except the options, which contain the run's name."""
    return {key: value for key, value in checkpoint.load(folder / "last.pt").items() if key != "options"}


def same(a, b) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def wait_for_writes(path: Path, process: subprocess.Popen, count: int, seconds: float = 120) -> None:
    """Wait until a file was replaced `count` times."""
    seen = set()
    deadline = time.monotonic() + seconds
    while len(seen) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        if path.exists():
            seen.add(path.stat().st_ino)
        time.sleep(0.002)


# ---- faults -------------------------------------------------------------------------------------------------------


def flipped(data: bytes, bit: int) -> bytes:
    """The data with one bit turned."""
    copy = bytearray(data)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


class Malicious:
    """Executes something when it is unpickled."""

    def __reduce__(self):
        return (print, ("executed",))


def at_call(monkeypatch, where: object, name: str, number: int, act) -> None:
    """Call `act` just before the `number`-th call of a function."""
    plain, calls = getattr(where, name), iter(range(1, 1000))

    def call(*given, **named):
        if next(calls) == number:
            act()
        return plain(*given, **named)

    monkeypatch.setattr(where, name, call)


class _Poisoned(torch.autograd.Function):
    """The identity, with a gradient that is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def poison(monkeypatch, factors: dict[int, float]) -> None:
    """Multiply the gradients, or with NaN the losses, of these steps."""
    calls = iter(range(1000))
    plain = ReflectionLoss.forward

    def forward(self, transmission, *others):
        factor = factors.get(next(calls), 1.0)
        transmission = transmission * factor if math.isnan(factor) else _Poisoned.apply(transmission, factor)
        return plain(self, transmission, *others)

    monkeypatch.setattr(ReflectionLoss, "forward", forward)


# ---- data ---------------------------------------------------------------------------------------------------------


def write_noise(path: Path, seed: int, width: int = 28, height: int = 20) -> None:
    """Write a small image of smoothed noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(path)


def write_pairs(folder: Path, names, layers=("blended", "transmission_layer"), **size) -> None:
    """Write the layers of a set, an image of noise for each name."""
    for i, name in enumerate(names):
        for j, layer in enumerate(layers):
            write_noise(folder / layer / f"{name}.png", 100 * i + j, **size)


def options_for(base: Path, *more: str):
    """The options of a training on crops of 16 pixels."""
    return parse_train(["--base_dir", str(base), "--crop_size", "16", "--nThreads", "0", *map(str, more)])


def loader_of(base: Path, *more: str):
    """The train loader of these options."""
    options = options_for(base, *more)
    return build_train_loader(options, discover(options))


def batches(loader, epoch: int = 0, step: int = 0) -> list[dict]:
    """The batches of an epoch from a step on."""
    loader.batch_sampler.seek(epoch, step)
    return list(loader)


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    """Batches, or samples, are equal bit for bit."""
    assert [batch["name"] for batch in ours] == [batch["name"] for batch in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("mixture", "target_t", "target_r"):
            assert torch.equal(mine[key], other[key])


# ---- files ----------------------------------------------------------------------------------------------------------


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    """Write a ZIP archive with a folder and these files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sirs/", "")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, files: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    """Write a compressed tar archive with a folder, these files and other members."""
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in others:
            archive.addfile(info)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}
"""How a viewer turns each EXIF orientation: stored to upright pixels."""


def exif_chunk(exif: Image.Exif) -> bytes:
    """EXIF as a PNG holds it."""
    content = b"eXIf" + exif.tobytes()[len(b"Exif\0\0") :]
    return (len(content) - 4).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")


# ---- networks and numbers -------------------------------------------------------------------------------------------


class Local(nn.Module):
    """Stands in for a model: T is a 5x5 convolution of the image, R is the image itself, the residue a quarter of it.

    Attributes:
        seen: heights and widths of the images it got.
    """

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(3, 1, 5, 5) / 25)
        self.seen: list[tuple[int, int]] = []

    @torch.no_grad()
    def predict(self, image: Tensor, part: tuple[slice, slice] | None = None) -> tuple[Tensor, ...]:
        image = image[(..., *part)] if part else image
        self.seen.append(tuple(image.shape[2:]))
        padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
        return F.conv2d(padded, self.kernel, groups=3), image, image / 4


def children_seconds() -> float:
    """The processor's time of all processes that have been started and have ended; other work doesn't add to it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def golden(name: str) -> dict[str, np.ndarray]:
    """A file of golden numbers."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def published_state(shapes: dict[str, list[int]], prefix: str = "") -> dict[str, torch.Tensor]:
    """The state dict that the golden numbers were computed with, under its published names."""
    return {
        name: torch.from_numpy(fill((prefix + name).replace("seq_r", "seq_l"), tuple(shape)))
        for name, shape in shapes.items()
    }


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference, over the largest expected value."""
    actual = actual.detach().double().cpu().numpy()
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# ---- errors ---------------------------------------------------------------------------------------------------


def errors(capsys) -> str:
    """What was said on stderr, one line."""
    said = capsys.readouterr().err.strip()
    assert said.startswith("error:") and "\n" not in said
    return said


# ---- report -----------------------------------------------------------------------------------------------------

COMMENT = "</script><script>alert(1)</script> <!-- \u2028 & ' \" -->"


def make_page(folder: Path, output: Path, *arguments: str) -> str:
    """The page's text."""
    assert program.run(report.main, [str(folder), "-o", str(output), "--gpu_ids", "-1", *arguments]) == 0
    return output.read_text(encoding="utf-8")


def embedded(page: str, name: str) -> dict:
    """What a script element of data holds, as a browser finds it: up to the first end tag."""
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script', page, re.DOTALL)[1])
