"""The separator as Python programs call it: every kind of picture, every way to name a network."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dereflect.data.demo import write_examples
from dereflect.models import hub, separator
from dereflect.models.separator import Separator, load_separator
from dereflect.options import PRETRAINED
from dereflect.util import photographs
from dereflect.util.errors import UserError
from dereflect.util.images import read_image
from tests.helpers import ROOT, Local, Malicious


class Darker(Local):
    """T is half of the image."""

    @torch.no_grad()
    def predict(self, image, part=None):
        return image / 2, image, image


@pytest.fixture
def halve() -> Separator:
    return Separator(Darker(), tile=64)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_an_array_gives_an_array_of_its_type(halve, pixels, dtype, channels):
    peak = 1 if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
    rgba = np.dstack([pixels, pixels[..., 1]])
    array = (rgba[..., 0] if channels is None else rgba[..., :channels]).astype(np.float64) / 255 * peak
    result = halve(array.astype(dtype))
    grey = array[..., None] if channels is None else array
    assert result.dtype == dtype and result.shape == (*pixels.shape[:2], 4 if channels == 4 else 3)
    colours = grey[..., :3] if grey.shape[2] > 1 else grey.repeat(3, 2)
    tolerance = 1e-3 if peak == 1 else 1
    np.testing.assert_allclose(result[..., :3].astype(float), colours / 2, atol=tolerance)
    if channels == 4:
        np.testing.assert_array_equal(result[..., 3], array[..., 3].astype(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [None, 0, 1, 2])
def test_a_tensor_gives_a_tensor_of_its_type_and_shape(halve, pixels, dtype, batch):
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    image = image if dtype == torch.uint8 else (image / 255).to(dtype)
    given = image if batch is None else torch.stack([image] * 2)[:batch]
    result = halve(given)
    assert result.dtype == dtype and result.shape == given.shape
    torch.testing.assert_close(result.float(), given.float() / 2, atol=1 if dtype == torch.uint8 else 4e-3, rtol=0)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1"])
def test_a_pil_image_gives_one_with_its_alpha(halve, pixels, mode):
    image = Image.fromarray(pixels).convert("RGBA")
    image.putalpha(Image.fromarray(pixels[..., 0]))
    image = image.convert(mode)
    result = halve(image)
    assert result.mode == ("RGBA" if mode in ("RGBA", "LA", "P") else "RGB") and result.size == image.size
    expected = np.asarray(image.convert("RGB"), np.float64) / 2
    np.testing.assert_allclose(np.asarray(result.convert("RGB")), expected, atol=1)
    if mode in ("RGBA", "LA"):
        np.testing.assert_array_equal(np.asarray(result.getchannel("A")), pixels[..., 0])


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_gives_a_pil_image_upright(halve, pixels, kind, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    result = halve(kind(tmp_path / "x.png"))
    np.testing.assert_allclose(np.asarray(result), np.rot90(pixels, -1) / 2, atol=1)


@pytest.mark.parametrize("bad", [np.full((8, 8, 3), 200.0), torch.full((3, 8, 8), 200.0), np.zeros((8, 8, 2)),
                                 np.zeros((8, 8, 3), int), torch.zeros(8, 8, 3), torch.zeros(1, 8, 8),
                                 Image.new("F", (8, 8))])  # fmt: skip
def test_what_is_no_picture_is_refused(halve, bad):
    with pytest.raises(ValueError, match=r"must be|doesn't say"):
        halve(bad)
    with pytest.raises(TypeError, match="not list"):
        halve([1, 2])


def test_a_pil_image_of_sixteen_bits_keeps_them(halve, pixels):
    deep = pixels[..., 0].astype(np.uint16) * 257 + 3
    made = halve(Image.fromarray(deep))
    assert made.mode == "I;16" and np.abs(np.asarray(made) - deep / 2).max() <= 1


def test_paths_may_be_text(pixels, tmp_path):
    deep = photographs.Photograph(pixels.astype(np.uint16) * 257)
    path = f"{tmp_path}/a.png"
    assert photographs.suffix_for(path, photographs.format_of(path)) == ".png"
    photographs.write_photograph(path, deep.pixels, deep, "png")
    np.testing.assert_array_equal(photographs.read_photograph(path).pixels, deep.pixels)
    assert all(path.is_file() for path in write_examples(str(tmp_path)))


def test_a_missing_file_is_named(halve, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        halve(tmp_path / "gone.png")


@pytest.mark.parametrize("name", [None, "madsrnet_xs", PRETRAINED, str(PRETRAINED)])
def test_the_bundled_network_by_any_name(name):
    given = () if name is None else (name,)
    assert load_separator(*given, gpu_ids=[]).inet == "madsrnet_xs"


@pytest.mark.parametrize("name", ["mobilenet_v2", "nothing", "checkpoints/none/best.pt", "a/b.pt"])
def test_what_is_nowhere_is_told(name):
    with pytest.raises(UserError, match="there is no such file, and no bundled network of that name but madsrnet"):
        load_separator(name)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A stand-in for huggingface_hub, with a folder for all repositories."""

    def download(repository, file):
        path = tmp_path / repository / file
        if not path.is_file():
            raise OSError("404 Client Error\nRequest ID: 1")
        return str(path)

    def upload(path_or_fileobj, path_in_repo, repo_id):
        (tmp_path / repo_id / path_in_repo).write_bytes(Path(path_or_fileobj).read_bytes())
        return "https://example.org/commit/1"

    def create(repository, private, exist_ok):
        (tmp_path / repository).mkdir(parents=True, exist_ok=exist_ok)

    stub = SimpleNamespace(hf_hub_download=download, upload_file=upload, create_repo=create)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    return tmp_path / "someone/net"


def test_what_was_pushed_comes_back_from_the_hub(repository):
    ours = load_separator(gpu_ids=[])
    assert ours.push_to_hub("someone/net").endswith("commit/1")
    assert [path.name for path in repository.iterdir()] == [hub.FILE]
    for theirs in (load_separator("someone/net", gpu_ids=[]), Separator.from_pretrained("someone/net", gpu_ids=[])):
        assert theirs.inet == ours.inet
        pairs = zip(ours.model.network.parameters(), theirs.model.network.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("content", [Malicious(), {"conv.weight": torch.zeros(3)}])
def test_nothing_of_the_hub_is_unpickled(repository, capsys, content):
    repository.mkdir(parents=True)
    torch.save({"network": content}, repository / hub.FILE)
    with pytest.raises(UserError, match="of another format"):
        load_separator("someone/net", gpu_ids=[])
    assert "executed" not in capsys.readouterr().out


def test_the_hub_without_the_package_or_the_repository(repository, monkeypatch):
    with pytest.raises(UserError, match=r"someone/net: .*model\.safetensors at Hugging Face: 404 Client Error$"):
        load_separator("someone/net")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in (lambda: load_separator("someone/net"), lambda: Separator.from_pretrained("someone/net")):
        with pytest.raises(UserError, match="pip install huggingface_hub"):
            act()


def test_remove_reflection_needs_no_checkpoint(pixels):
    result = separator.remove_reflection(pixels, gpu_ids=[])
    assert result.transmission.shape == pixels.shape


def test_the_examples_of_the_page_in_docs(pixels, tmp_path, monkeypatch):
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    before, _, _ = text.partition("<!-- not run")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pixels).save("photograph.jpg")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", before, re.DOTALL):
        exec(block, names)
    assert read_image("transmission.png").shape == read_image(Path("reflection.png")).shape == pixels.shape


def test_the_cells_of_the_notebook():
    cells = json.loads((ROOT / "docs/notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    assert len(cells) == 10 and not any(cell.get("outputs") for cell in cells)
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    mixture, clean, gentle = (names[name].astype(float) for name in ("pixels", "clean", "gentle"))
    assert 0 < np.abs(gentle - mixture).mean() < np.abs(clean - mixture).mean()
