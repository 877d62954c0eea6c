"""Photographs of any size and kind through tools/infer.py."""

import functools
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from dereflect.models.separator import Separator, load_separator
from dereflect.options import PRETRAINED, parse_infer
from dereflect.tools import infer
from dereflect.util import photographs, program
from dereflect.util.photographs import read_photograph
from tests.helpers import UPRIGHT, Local, children_seconds, exif_chunk

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 40, 24


@pytest.fixture
def stand_in(monkeypatch) -> Local:
    """tools/infer.py with a stand-in for the network; T is then the photograph."""
    model = Local()
    with torch.no_grad():
        model.kernel.zero_()[:, :, 2, 2] = 1
    monkeypatch.setattr(infer, "_load", lambda options: Separator(model, options.tile or 512, options.overlap))
    return model


def run(tmp_path: Path, *arguments: object) -> int:
    (tmp_path / "weights.pt").touch()
    return program.run(infer.main, ["--checkpoint", str(tmp_path / "weights.pt"), *map(str, arguments)])


def test_from_python(pixels):
    settings = {"gpu_ids": [], "precision": "fp32", "tile": 64}
    result = infer.remove_reflection(pixels, PRETRAINED, **settings)
    expected = load_separator(PRETRAINED, **settings).separate(pixels)
    np.testing.assert_array_equal(result.transmission, expected.transmission)
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
    with Image.open(tmp_path / f"a_behind_glass.{suffix}") as made:
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
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"a_behind_glass.{suffix}"]
    assert np.abs(np.asarray(Image.open(tmp_path / f"out/a_behind_glass.{suffix}")).astype(int) - pixels).max() < 20


@pytest.mark.parametrize("form", photographs.FORMATS)
def test_format_on_request(tmp_path, pixels, stand_in, form):
    if form == "heic":
        pytest.importorskip("pillow_heif")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert run(tmp_path, tmp_path / "a.png", "--format", form) == 0
    path = tmp_path / f"a_behind_glass{photographs.FORMATS[form]}"
    assert np.abs(read_photograph(path).pixels.astype(int) - pixels).max() < 24


def test_heic_without_its_reader_is_told(tmp_path, stand_in, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    assert run(tmp_path, tmp_path / "a.heic") == 1
    assert "a.heic: HEIC needs a package: pip install pillow-heif" in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert run(tmp_path, tmp_path / "a.png", "--format", "heic") == 2, "before anything is loaded"
    assert not stand_in.seen and "pip install pillow-heif" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["png", "tif"])
@pytest.mark.parametrize("form", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_stay(tmp_path, stand_in, source, form, channels):
    deep = np.random.default_rng(0).integers(0, 2**16, (2 * HEIGHT, 2 * WIDTH, channels), dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / f"a.{source}"), deep.squeeze())
    assert run(tmp_path, tmp_path / f"a.{source}", "--format", form, "--tile", 64) == 0
    made = cv2.imread(str(tmp_path / f"a_behind_glass{infer_suffix(source, form)}"), cv2.IMREAD_UNCHANGED)
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
    made = np.asarray(Image.open(tmp_path / "a_behind_glass.webp"))
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
    made = read_photograph(tmp_path / f"a_behind_glass.{kind}")
    np.testing.assert_array_equal(made.pixels, UPRIGHT[orientation](deep))
    exif = Image.Exif()
    exif.load(made.exif)
    assert exif[0x0112] == 1 and exif.get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_alpha_is_carried_over(tmp_path, pixels, stand_in, suffix):
    alpha = pixels[::-1, ::-1, :1]
    Image.fromarray(np.concatenate([pixels, alpha], -1)).save(tmp_path / f"a.{suffix}", lossless=True, exif=facts(6))
    assert run(tmp_path, tmp_path / f"a.{suffix}") == 0
    with Image.open(tmp_path / f"a_behind_glass.{suffix}") as made:
        assert made.mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(made)[..., 3], UPRIGHT[6](alpha)[..., 0])


def test_profile_of_other_colours_is_not_kept(tmp_path, pixels, stand_in):
    grey = profile()[:16] + b"GRAY" + profile()[20:]
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.png", icc_profile=grey)
    assert run(tmp_path, tmp_path / "a.png") == 0
    made = Image.open(tmp_path / "a_behind_glass.png")
    assert "icc_profile" not in made.info and made.mode == "RGB"


def test_everything_that_can_be_saved(tmp_path, pixels, stand_in):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert run(tmp_path, tmp_path / "a.png", "--save", "t", "r", "residue", "sidebyside") == 0
    made = {path.stem: np.asarray(Image.open(path)).astype(int) for path in tmp_path.glob("a_*.png")}
    assert set(made) == {"a_behind_glass", "a_reflection", "a_residue", "a_sidebyside"}
    np.testing.assert_allclose(made["a_residue"], (pixels / 255 / 8 + 0.5) * 255, atol=0.501)
    row = np.concatenate([pixels, made["a_behind_glass"], made["a_reflection"], made["a_residue"]], axis=1)
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
    assert made_in(tmp_path / "out") == {"one_behind_glass.png", "deep/two_behind_glass.jpg"}
    assert len(stand_in.seen) == 2, "a photograph named twice is separated once"


def test_patterns(tmp_path, album, stand_in):
    assert run(tmp_path, f"{album}/**/*.[jp]*g", "-o", tmp_path / "out") == 0
    assert made_in(tmp_path / "out") == {"one_behind_glass.png", "deep/two_behind_glass.jpg"}


def test_nothing_is_overwritten(tmp_path, album, stand_in, capsys):
    assert run(tmp_path, album) == 0
    before = (album / "one_behind_glass.png").read_bytes()
    Image.new("RGB", (9, 9)).save(album / "one.png")
    assert run(tmp_path, album) == 1
    assert "one_behind_glass.png exists; --overwrite or --resume" in capsys.readouterr().err
    assert (album / "one_behind_glass.png").read_bytes() == before
    assert made_in(album) == {"one_behind_glass.png", "deep/two_behind_glass.jpg"}, (
        "what was made is no photograph to separate"
    )
    assert run(tmp_path, album, "--overwrite") == 0
    assert (album / "one_behind_glass.png").read_bytes() != before


def test_resume_makes_what_is_missing(tmp_path, album, stand_in, capsys):
    assert run(tmp_path, album) == 0
    (album / "deep/two_behind_glass.jpg").unlink()
    stand_in.seen.clear()
    assert run(tmp_path, album, "--resume") == 0
    assert len(stand_in.seen) == 1 and (album / "deep/two_behind_glass.jpg").exists()
    told = capsys.readouterr().out
    two = album / "deep/two"
    assert f"{two}.jpg -> {two}_behind_glass.jpg\n" in told, "where it went"
    assert "1 done before" in told and "failed" not in told and "left out" in told
    before = (album / "one_behind_glass.png").stat().st_mtime_ns
    assert run(tmp_path, album, "--resume", "--save", "t", "r") == 0
    assert (album / "one_reflection.png").exists() and (album / "one_behind_glass.png").stat().st_mtime_ns == before


def test_a_bad_file_does_not_stop_the_rest(tmp_path, album, stand_in, capsys):
    (album / "broken.png").write_bytes(b"\x89PNG not really")
    assert run(tmp_path, album) == 1
    told = capsys.readouterr()
    assert "2 separated" in told.out and "1 failed" in told.out
    assert told.err.startswith(f"error: {album / 'broken.png'}: ") and "broken.png" not in told.out
    assert made_in(album) == {"one_behind_glass.png", "deep/two_behind_glass.jpg"}


def test_what_a_format_cannot_hold_is_told_and_leaves_nothing(tmp_path, stand_in, capsys):
    Image.new("RGB", (17000, 1)).save(tmp_path / "long.png")
    assert run(tmp_path, tmp_path / "long.png", "--format", "webp") == 1
    assert "long_behind_glass.webp: 17,000 x 1 pixels, but WEBP holds at most 16,383 a side" in capsys.readouterr().err
    assert not stand_in.seen, "before anything is computed"
    assert {path.name for path in tmp_path.iterdir()} == {"long.png", "weights.pt"}


def test_outputs_of_one_name_get_two(tmp_path, album, pixels, stand_in):
    Image.fromarray(pixels).save(album / "one.jpg")
    assert run(tmp_path, album) == 0
    assert run(tmp_path, album, "--format", "webp") == 0
    made = ("one.png", "one.jpg", "deep/two.jpg", "one_png.webp", "one_jpg.webp", "deep/two.webp")
    assert made_in(album) == {name.replace(".", "_behind_glass.") for name in made}


def test_paths_that_lead_nowhere(tmp_path, stand_in, capsys):
    (tmp_path / "empty").mkdir()
    for path, told in (("nowhere.png", "no such file"), ("empty", "no photographs"), ("*.jpg", "no such file")):
        assert run(tmp_path, tmp_path / path) == 2
        assert told in capsys.readouterr().err


def test_the_whole_program(tmp_path, pixels):
    """With the bundled weights."""
    Image.fromarray(pixels).save(tmp_path / "a.png")
    command = [sys.executable, "tools/infer.py", tmp_path / "a.png", "--gpu_ids", "-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "madsrnet_xs on cpu\n" in done.stdout and "1 separated in" in done.stdout
    assert not any(word in done.stdout for word in ("tile", "done before", "failed", "left out")), (
        "nothing that is noise"
    )
    made = np.asarray(Image.open(tmp_path / "a_behind_glass.png")).astype(int)
    expected = np.clip(load_separator(PRETRAINED, gpu_ids=[]).separate(pixels).transmission, 0, 1) * 255
    assert np.abs(made - expected).max() <= 0.51


def test_separating_imports_no_more_than_it_needs(tmp_path, pixels):
    """torch's compiler, torchvision and Triton take two seconds to import, as long as all of the rest."""
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    code = (
        "import sys\n"
        "for name in ('torch._dynamo', 'torchvision', 'triton', 'skimage', 'matplotlib', 'tensorboard', 'lpips'):\n"
        "    sys.modules[name] = None\n"
        "from dereflect.tools import infer\n"
        f"sys.exit(infer.main([{str(tmp_path / 'photo.jpg')!r}, '--gpu_ids', '-1']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "photo_behind_glass.jpg").exists(), done.stdout


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
    code += "print([m for m in ('torch', 'numpy', 'dereflect.models', 'dereflect.data') if m in sys.modules])"
    began = children_seconds()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert children_seconds() - began < 2
    assert done.stdout.strip().endswith("[]") and "--self_ensemble" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tile", "100"], "multiple of 32"),
        (["--tile", "0"], "at least 1"),
        (["--overlap", "32"], "needs a --tile of at least 64"),
        (["--tile", "96", "--overlap", "64"], "needs a --tile of at least 128"),
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
