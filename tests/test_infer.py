"""Photographs of any size and kind through tools/infer.py."""

import functools
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from models import separator as separators
from models import tiles, weights
from models.arch import create_model, list_models
from models.separator import Separator, load_separator
from models.weights import architecture_of
from options import parse_infer
from options.arguments import STRIDE
from tests.helpers import GOLDEN, UPRIGHT, Local, children_seconds, exif_chunk, published_state
from tools import infer
from util import photographs, program
from util.errors import UserError
from util.photographs import read_photograph

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 40, 24


@pytest.fixture
def pixels() -> np.ndarray:
    """uint8 (24, 40, 3), smooth, different in every corner and channel."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 6, y * 10, 240 - x * 3 - y * 4], -1).astype(np.uint8)


class Drifting(Local):
    """Every call's result is brighter than the last one's, as a network's is that looks at the whole tile."""

    @torch.no_grad()
    def predict(self, image: Tensor) -> tuple[Tensor, ...]:
        self.seen.append(tuple(image.shape[2:]))
        return (torch.full_like(image, float(len(self.seen) % 2)),) * 3


@pytest.fixture
def stand_in(monkeypatch) -> Local:
    """tools/infer.py with a stand-in for the network; T is then the photograph."""
    model = Local()
    with torch.no_grad():
        model.kernel.zero_()[:, :, 2, 2] = 1
    monkeypatch.setattr(infer, "_load", lambda options: Separator(model, options.tile or 512, options.overlap))
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of dsrnet_s as a training leaves it, with random weights."""
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    torch.manual_seed(0)
    state = create_model("dsrnet_s").state_dict()
    average = {name: value * 1.01 for name, value in state.items()}
    recorded = {"inet": "dsrnet_s", "vgg_weights": "random"}
    content = {"format": 1, "inet": "dsrnet_s", "options": recorded, "epoch": 3, "network": state, "ema": average}
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def real(trained) -> Separator:
    return load_separator(trained, gpu_ids=[], precision="fp32", tile=64)


def test_precision_is_that_of_the_training(trained, tmp_path):
    content = torch.load(trained)
    content["options"]["precision"] = "bf16"
    torch.save(content, tmp_path / "bf16.pt")
    assert not load_separator(trained, gpu_ids=[]).model.bf16, "nothing is said"
    assert load_separator(tmp_path / "bf16.pt", gpu_ids=[]).model.bf16
    assert not load_separator(tmp_path / "bf16.pt", gpu_ids=[], precision="fp32").model.bf16


def run(tmp_path: Path, *arguments: object) -> int:
    (tmp_path / "weights.pt").touch()
    return program.run(infer.main, ["--checkpoint", str(tmp_path / "weights.pt"), *map(str, arguments)])


# ---- tiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tile", "overlap"), [(32, 16), (64, 16), (96, 48), (1024, 256)])
def test_tiles_cover_everything_and_their_weights_sum_to_one(tile, overlap):
    for length in [*range(1, 400), 1025, 9000, 12000]:
        spans = tiles.spans(length, tile, overlap)
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(end - start <= tile and start % STRIDE == 0 for start, end in spans)
        assert all(end - following >= min(overlap, tile) for (_, end), (following, _) in pairwise(spans))
        total = np.zeros(length)
        for (start, end), weight in zip(spans, tiles.weights(spans), strict=True):
            assert weight.shape == (end - start,) and weight.min() >= 0
            total[start:end] += weight
        np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (131, 1), (64, 64), (65, 64), (201, 137)])
def test_tiled_is_whole_for_a_local_network(size):
    """But for the rounding of float32: what a tile lacks of its surroundings has no weight."""
    image = np.random.default_rng(0).random((*size, 3), dtype=np.float32)
    model = Local()
    tiled = Separator(model, tile=64, overlap=32).separate(image)
    assert max(max(shape) for shape in model.seen) <= 64
    whole = Separator(model, tile=1024).separate(image)
    for part in separators.PARTS:
        assert getattr(tiled, part).dtype == np.float32
        np.testing.assert_allclose(getattr(tiled, part), getattr(whole, part), atol=1e-6)


def test_tiles_that_differ_fade_into_each_other():
    """The worst case: neighbours are 0 and 1. No step is larger than the steepest of a half cosine."""
    image = np.zeros((60, 500, 3), np.uint8)
    model = Drifting()
    t = Separator(model, tile=128, overlap=64).separate(image).transmission[30, :, 0]
    assert len(model.seen) > 3 and t.min() < 1e-6 and t.max() > 1 - 1e-6
    assert np.abs(np.diff(t)).max() < np.pi / 2 / (0.75 * 64) * 1.01
    assert np.abs(np.diff(t, 2)).max() < 0.003, "no kinks"


def test_memory_is_a_band_of_tiles_whatever_the_height():
    image = np.broadcast_to(np.uint8(100), (3000, 80, 3))
    model = Local()
    shapes = []
    for _, (band,) in Separator(model, tile=64, overlap=16).bands(image, ["reflection"]):
        shapes.append(band.base.shape)
    assert len(shapes) > 50 and set(shapes) == {(64, 80, 3)}, "one band is held, of the wanted part only"
    assert max(max(size) for size in model.seen) <= 64


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_arrays_of_any_type(pixels, dtype):
    peak = 1 if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
    image = (pixels / 255 * peak).astype(dtype)
    result = Separator(Local(), tile=64).separate(image)
    np.testing.assert_allclose(result.reflection, image.astype(np.float64) / peak, atol=1e-7)


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros((4, 4, 4)), np.zeros((4, 4, 3), int), np.zeros((0, 4, 3))])
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(ValueError, match="an image must be"):
        Separator(Local(), tile=64).separate(bad)


def test_tiles_are_as_large_as_the_memory_allows(real, monkeypatch):
    def tile(memory: int) -> int:
        monkeypatch.setattr(separators, "available_memory", lambda device: memory)
        return separators.default_tile(real.model, torch.device("cpu"))

    sides = [tile(gigabytes * 2**30) for gigabytes in (0, 4, 16, 400)]
    assert sides == sorted(sides) and sides[0] == 128 and sides[1] < sides[2] < sides[3] == 1024
    assert all(side % 16 == 0 for side in sides)


def test_memory_that_runs_out_is_told(monkeypatch):
    def fail(image):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = Local()
    monkeypatch.setattr(model, "predict", fail)
    with pytest.raises(UserError, match="--tile 32 or less"):
        Separator(model, tile=64).separate(np.zeros((64, 64, 3)))


# ---- networks ---------------------------------------------------------------------------------------------------


def test_whole_image_is_the_models_prediction(real, pixels):
    image = torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None]
    for part, expected in zip(separators.PARTS, real.model.predict(image), strict=True):
        np.testing.assert_array_equal(getattr(real.separate(pixels), part), expected[0].permute(1, 2, 0))


@pytest.mark.parametrize("size", [(1, 1), (17, 3), (70, 20)])
def test_real_network_at_any_size(real, size):
    result = real.separate(np.full((*size, 3), 100, np.uint8))
    for part in separators.PARTS:
        assert getattr(result, part).shape == (*size, 3) and np.isfinite(getattr(result, part)).all()


def test_self_ensemble_is_the_mean_of_eight(real, pixels):
    pixels = pixels[:10, :20]
    ensemble = Separator(real.model, tile=64, self_ensemble=True).separate(pixels)
    for part in separators.PARTS:
        parts = []
        for turns in range(4):
            turned = np.rot90(pixels, turns)
            parts.append(np.rot90(getattr(real.separate(turned), part), -turns))
            parts.append(np.rot90(getattr(real.separate(turned[:, ::-1]), part)[:, ::-1], -turns))
        np.testing.assert_allclose(getattr(ensemble, part), np.mean(parts, 0), atol=1e-6)


def test_checkpoint_says_what_it_is(real, trained):
    assert (real.inet, real.epoch) == ("dsrnet_s", 3)
    network = real.model.network.state_dict()
    average = torch.load(trained, weights_only=True)["ema"]
    assert all(torch.equal(network[name], value) for name, value in average.items()), "the moving average is taken"


def test_vgg_of_the_training_must_be_there(trained, tmp_path):
    content = torch.load(trained, weights_only=True)
    content["options"] = {"vgg_weights": "/nowhere/vgg19.pth"}
    torch.save(content, tmp_path / "moved.pt")
    with pytest.raises(UserError, match=r"moved\.pt.*/nowhere/vgg19\.pth.*--vgg_weights"):
        load_separator(tmp_path / "moved.pt", gpu_ids=[])
    assert load_separator(tmp_path / "moved.pt", vgg_weights="random", gpu_ids=[], tile=64).inet == "dsrnet_s"


def test_architecture_is_found_by_the_published_parameters():
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
    for name in ("dsrnet_s", "mdsrnet_l"):
        state = {key: torch.zeros(()).expand(shape) for key, shape in shapes[name].items() if "seq_r" not in key}
        assert architecture_of({"icnn": state}, "x.pt") == name


def test_every_architecture_is_found_and_unique():
    for name in set(list_models()) - {"dsrnet_frozen_stem_xs"}:  # has dsrnet_xs's parameters
        state = {key: torch.zeros(()).expand(shape) for key, shape in weights._shapes(name).items()}
        assert architecture_of({"network": state}, "x.pt") == name


def test_foreign_weights_are_named(tmp_path):
    torch.save({"weight": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: its 1 parameters .* --inet"):
        load_separator(tmp_path / "other.pt", gpu_ids=[])
    with pytest.raises(UserError, match=r"other\.pt: .*left over: conv\.weight"):
        load_separator(tmp_path / "other.pt", inet="dsrnet_s", gpu_ids=[])
    with pytest.raises(UserError, match="--inet dsrnet_xxl"):
        load_separator(tmp_path / "other.pt", inet="dsrnet_xxl", gpu_ids=[])


def test_published_checkpoint(tmp_path):
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text())["dsrnet_s"]
    torch.save({"icnn": published_state(shapes), "epoch": 18}, tmp_path / "published.pt")
    separator = load_separator(tmp_path / "published.pt", vgg_weights="random", gpu_ids=[], tile=64)
    assert (separator.inet, separator.epoch) == ("dsrnet_s", 18)


def test_networks_with_their_own_stem_need_no_vgg(tmp_path, pixels):
    network = create_model("dsrnet_xs")
    torch.save({"inet": "dsrnet_xs", "network": network.state_dict()}, tmp_path / "xs.pt")
    separator = load_separator(tmp_path / "xs.pt", gpu_ids=[])
    assert separator.model.vgg is None
    assert separator.separate(pixels).transmission.shape == pixels.shape


def test_from_python(trained, pixels, real):
    result = infer.remove_reflection(pixels, trained, gpu_ids=[], precision="fp32", tile=64)
    np.testing.assert_array_equal(result.transmission, real.separate(pixels).transmission)
    assert infer.load_separator is load_separator
    with pytest.raises(AttributeError):
        _ = infer.nonsense


# ---- files ------------------------------------------------------------------------------------------------------


@functools.cache
def profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def facts(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[271] = "A camera"
    exif.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
    exif.get_ifd(0x8769)[0xA002] = WIDTH
    exif.get_ifd(0x8769)[0xA003] = HEIGHT
    exif.get_ifd(0x8825)[1] = "N"
    whole = Image.Exif()
    whole.load(exif.tobytes())  # what PIL needs to write the directories into a TIFF
    return whole


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_photograph_keeps_what_it_says(tmp_path, pixels, stand_in, suffix, orientation):
    exif = facts(orientation)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif, icc_profile=profile(), quality=98)
    assert run(tmp_path, tmp_path / f"a.{suffix}") == 0
    upright = UPRIGHT[orientation](pixels)
    with Image.open(tmp_path / f"a_t.{suffix}") as made:
        assert made.format == Image.open(tmp_path / f"a.{suffix}").format
        assert made.info["icc_profile"] == profile()
        told = made.getexif()
        assert told[0x0112] == 1, "it is upright already"
        assert told[271] == "A camera"
        assert told.get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"
        assert told.get_ifd(0x8769)[0xA002] == upright.shape[1]
        assert told.get_ifd(0x8825)[1] == "N"
        lossless = suffix in {"png", "tif"}
        assert np.abs(np.asarray(made).astype(int) - upright).max() <= (0 if lossless else 24)


@pytest.mark.parametrize("suffix", ["bmp", "png", "tiff", "JPG"])
def test_format_follows_the_photograph(tmp_path, pixels, stand_in, suffix):
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    assert run(tmp_path, tmp_path / f"a.{suffix}", "-o", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"a_t.{suffix}"]
    assert np.abs(np.asarray(Image.open(tmp_path / f"out/a_t.{suffix}")).astype(int) - pixels).max() < 20


@pytest.mark.parametrize("form", photographs.FORMATS)
def test_format_on_request(tmp_path, pixels, stand_in, form):
    if form == "heic":
        pytest.importorskip("pillow_heif")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert run(tmp_path, tmp_path / "a.png", "--format", form) == 0
    path = tmp_path / f"a_t{photographs.FORMATS[form]}"
    assert np.abs(read_photograph(path).pixels.astype(int) - pixels).max() < 24


def test_heic_without_its_reader_is_told(tmp_path, stand_in, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"")
    assert run(tmp_path, tmp_path / "a.heic") == 1
    assert "pip install pillow-heif" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["png", "tif"])
@pytest.mark.parametrize("form", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_stay(tmp_path, stand_in, source, form, channels):
    deep = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH, channels), dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / f"a.{source}"), deep.squeeze())
    assert run(tmp_path, tmp_path / f"a.{source}", "--format", form, "--tile", 32) == 0
    made = cv2.imread(str(tmp_path / f"a_t{infer_suffix(source, form)}"), cv2.IMREAD_UNCHANGED)
    assert made.dtype == np.uint16
    expected = np.repeat(deep, 3, 2) if channels == 1 else deep
    assert made.shape == expected.shape
    assert np.abs(made.astype(int) - expected).max() <= 1, "the blending of tiles is float32's"
    if channels == 4:
        np.testing.assert_array_equal(made[..., 3], deep[..., 3])


def infer_suffix(source: str, form: str) -> str:
    return photographs.suffix_for(Path(f"a.{source}"), form)


def test_sixteen_bits_become_eight_where_the_format_has_no_more(tmp_path, stand_in):
    deep = np.full((HEIGHT, WIDTH, 4), 30000, np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), deep)
    assert run(tmp_path, tmp_path / "a.png", "--format", "webp", "--save", "t", "sidebyside") == 0
    made = np.asarray(Image.open(tmp_path / "a_t.webp"))
    assert made.shape == (HEIGHT, WIDTH, 4) and abs(int(made[5, 5, 0]) - 117) <= 1
    assert np.all(made[..., 3] == 117)


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_sixteen_bits_are_turned_and_keep_what_they_say(tmp_path, pixels, stand_in, orientation, kind):
    deep = pixels.astype(np.uint16) * 257
    exif = facts(orientation)
    if kind == "png":
        cv2.imwrite(str(tmp_path / "plain.png"), deep[..., ::-1])
        plain = (tmp_path / "plain.png").read_bytes()
        (tmp_path / "a.png").write_bytes(plain[:33] + exif_chunk(exif) + plain[33:])
    else:
        told = photographs.Photograph(deep, exif=exif.tobytes())
        photographs.write_photograph(tmp_path / "a.tif", deep, told, "tiff")
    assert run(tmp_path, tmp_path / f"a.{kind}") == 0
    made = read_photograph(tmp_path / f"a_t.{kind}")
    np.testing.assert_array_equal(made.pixels, UPRIGHT[orientation](deep))
    exif = Image.Exif()
    exif.load(made.exif)
    assert exif[0x0112] == 1 and exif.get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_alpha_is_carried_over(tmp_path, pixels, stand_in, suffix):
    alpha = pixels[::-1, ::-1, :1]
    Image.fromarray(np.concatenate([pixels, alpha], -1)).save(tmp_path / f"a.{suffix}", lossless=True, exif=facts(6))
    assert run(tmp_path, tmp_path / f"a.{suffix}") == 0
    with Image.open(tmp_path / f"a_t.{suffix}") as made:
        assert made.mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(made)[..., 3], UPRIGHT[6](alpha)[..., 0])


def test_profile_of_other_colours_is_not_kept(tmp_path, pixels, stand_in):
    grey = profile()[:16] + b"GRAY" + profile()[20:]
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.png", icc_profile=grey)
    assert run(tmp_path, tmp_path / "a.png") == 0
    made = Image.open(tmp_path / "a_t.png")
    assert "icc_profile" not in made.info and made.mode == "RGB"


def test_everything_that_can_be_saved(tmp_path, pixels, stand_in):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert run(tmp_path, tmp_path / "a.png", "--save", "t", "r", "residue", "sidebyside") == 0
    made = {path.stem: np.asarray(Image.open(path)).astype(int) for path in tmp_path.glob("a_*.png")}
    assert set(made) == {"a_t", "a_r", "a_residue", "a_sidebyside"}
    np.testing.assert_allclose(made["a_residue"], (pixels / 255 / 8 + 0.5) * 255, atol=0.501)
    row = np.concatenate([pixels, made["a_t"], made["a_r"], made["a_residue"]], axis=1)
    np.testing.assert_array_equal(made["a_sidebyside"], row)


# ---- the program ------------------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path, pixels) -> Path:
    for name in ("one.png", "deep/two.jpg", "deep/.hidden.png", "letter.txt"):
        (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "album" / name, format="PNG" if "png" in name else "JPEG")
    return tmp_path / "album"


def made_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*_*") if path.is_file()}


def test_folders_keep_their_layout(tmp_path, album, stand_in):
    assert run(tmp_path, album, album / "one.png", "-o", tmp_path / "out") == 0
    assert made_in(tmp_path / "out") == {"one_t.png", "deep/two_t.jpg"}
    assert len(stand_in.seen) == 2, "a photograph named twice is separated once"


def test_patterns(tmp_path, album, stand_in):
    assert run(tmp_path, f"{album}/**/*.[jp]*g", "-o", tmp_path / "out") == 0
    assert made_in(tmp_path / "out") == {"one_t.png", "two_t.jpg"}


def test_nothing_is_overwritten(tmp_path, album, stand_in, capsys):
    assert run(tmp_path, album) == 0
    before = (album / "one_t.png").read_bytes()
    Image.new("RGB", (9, 9)).save(album / "one.png")
    assert run(tmp_path, album) == 1
    assert "one_t.png exists; --overwrite or --resume" in capsys.readouterr().err
    assert (album / "one_t.png").read_bytes() == before
    assert made_in(album) == {"one_t.png", "deep/two_t.jpg"}, "what was made is no photograph to separate"
    assert run(tmp_path, album, "--overwrite") == 0
    assert (album / "one_t.png").read_bytes() != before


def test_resume_makes_what_is_missing(tmp_path, album, stand_in, capsys):
    assert run(tmp_path, album) == 0
    (album / "deep/two_t.jpg").unlink()
    stand_in.seen.clear()
    assert run(tmp_path, album, "--resume") == 0
    assert len(stand_in.seen) == 1 and (album / "deep/two_t.jpg").exists()
    assert "1 done before" in capsys.readouterr().out
    before = (album / "one_t.png").stat().st_mtime_ns
    assert run(tmp_path, album, "--resume", "--save", "t", "r") == 0
    assert (album / "one_r.png").exists() and (album / "one_t.png").stat().st_mtime_ns == before


def test_a_bad_file_does_not_stop_the_rest(tmp_path, album, stand_in, capsys):
    (album / "broken.png").write_bytes(b"\x89PNG not really")
    assert run(tmp_path, album) == 1
    told = capsys.readouterr().out
    assert "broken.png" in told and "2 separated" in told and "1 failed" in told
    assert made_in(album) == {"one_t.png", "deep/two_t.jpg"}


def test_what_a_format_cannot_hold_is_told_and_leaves_nothing(tmp_path, stand_in, capsys):
    Image.new("RGB", (17000, 1)).save(tmp_path / "long.png")
    assert run(tmp_path, tmp_path / "long.png", "--format", "webp") == 1
    assert "long_t.webp: cannot be written" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"long.png", "weights.pt"}


def test_outputs_of_one_name_are_refused(tmp_path, album, pixels, stand_in, capsys):
    Image.fromarray(pixels).save(album / "one.jpg")
    assert run(tmp_path, album) == 0
    assert run(tmp_path, album, "--format", "webp") == 2
    assert "would both become" in capsys.readouterr().err


def test_paths_that_lead_nowhere(tmp_path, stand_in, capsys):
    (tmp_path / "empty").mkdir()
    for path, told in (("nowhere.png", "no such file"), ("empty", "no photographs"), ("*.jpg", "no such file")):
        assert run(tmp_path, tmp_path / path) == 2
        assert told in capsys.readouterr().err


def test_the_whole_program(tmp_path, pixels, trained, real):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    command = [sys.executable, "tools/infer.py", tmp_path / "a.png", "--checkpoint", trained, "--gpu_ids", "-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "dsrnet_s on cpu" in done.stdout and "images/s" in done.stdout
    made = np.asarray(Image.open(tmp_path / "a_t.png")).astype(int)
    expected = np.clip(real.separate(pixels).transmission, 0, 1) * 255
    assert np.abs(made - expected).max() <= 0.51


def test_broken_checkpoint_is_a_line(tmp_path, pixels, capsys):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert run(tmp_path, tmp_path / "a.png") == 2
    told = capsys.readouterr().err
    assert "weights.pt" in told and len(told.splitlines()) == 1


def test_help_and_errors_are_quick():
    code = "import sys\nfrom tools import infer, evaluate\n"
    code += "for program in (infer, evaluate):\n"
    code += " for line in (['--help'], ['x', '--checkpoint', 'nowhere']):\n"
    code += "  try: program.main(line)\n  except SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'models', 'data') if m in sys.modules])"
    began = children_seconds()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert children_seconds() - began < 2
    assert done.stdout.strip().endswith("[]") and "--self_ensemble" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tile", "100"], "multiple of 16"),
        (["--tile", "0"], "at least 1"),
        (["--overlap", "32"], "needs a --tile of at least 64"),
        (["--tile", "64", "--overlap", "48"], "needs a --tile of at least 96"),
        (["--vgg_weights", "nowhere.pth"], "nowhere.pth"),
        (["--save", "x"], "--save"),
        (["--overwrite", "--resume"], "--resume"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_usage_errors(arguments, told, tmp_path, capsys):
    (tmp_path / "w.pt").touch()
    with pytest.raises(SystemExit) as stop:
        parse_infer(["a.png", "--checkpoint", str(tmp_path / "w.pt"), *arguments])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
