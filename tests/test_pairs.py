"""Pairs of any two files: names in either of Unicode's forms, JPEG beside PNG, images too small to be measured."""

import unicodedata

import cv2
import numpy as np
import pytest
from PIL import Image

from dereflect.data.cache import ImageCache
from dereflect.data.folders import discover, find_images, find_pairs
from dereflect.data.transforms import Augmentation, augment
from dereflect.options import PRETRAINED
from dereflect.tools import evaluate
from dereflect.util.errors import UserError
from dereflect.util.images import read_rgb
from tests.helpers import options_for, write_noise, write_pairs

SIZES = [(1501, 1003), (1003, 1501), (2048, 1536), (2015, 1513)]


@pytest.mark.parametrize("name", ["é", "Ångström", "が"])
def test_names_that_a_mac_takes_apart_are_pairs(tmp_path, name):
    composed, apart = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    assert composed != apart
    write_noise(tmp_path / "blended" / f"{composed}.png", 1)
    write_noise(tmp_path / "transmission_layer" / f"{apart}.png", 2)
    problems = []
    (pair,) = find_pairs(tmp_path, problems)
    assert not problems and pair.name == composed
    write_noise(tmp_path / "blended" / f"{apart}.png", 1)
    assert not find_pairs(tmp_path, problems) and "2 files of that name" in problems[0]


@pytest.mark.parametrize("name", ["t.jfif", "u.JPE", "v.pnm", "w.pbm", "x.dib", "y.mpo", "z.apng", "p.pam", "q.heic"])
def test_all_names_of_pictures_are_found(tmp_path, name):
    (tmp_path / name).touch()
    assert [file.name for file in find_images(tmp_path)] == [name]


def test_pictures_that_are_not_read_are_told(tmp_path):
    write_pairs(tmp_path / "train/real", "ab")
    for name in ("c.NEF", "d.dng"):
        (tmp_path / "train/real/blended" / name).touch()
    told = "\n".join(discover(options_for(tmp_path)).describe())
    assert "2 pictures are of formats that are not read, and left out" in told and "c.NEF" in told


def test_images_too_small_to_be_measured_are_named_before_training(tmp_path):
    write_pairs(tmp_path / "train/real", "abcd")
    write_pairs(tmp_path / "test/mine", ["thin"], width=60, height=6)
    write_pairs(tmp_path / "test/mine", ["fine"])
    with pytest.raises(UserError, match="2 files cannot be used") as error:
        discover(options_for(tmp_path))
    assert str(error.value).count("60x6 pixels; SSIM needs 7 a side") == 2
    sets = discover(options_for(tmp_path, "--skip_bad_images"))
    assert [pair.name for pair in sets.tests["mine"]] == ["fine"] and len(sets.left_out) == 2
    assert len(discover(options_for(tmp_path, "--if_align")).tests["mine"]) == 2, "they become 32 high"
    with pytest.raises(UserError, match="thin"):
        evaluate.main([str(PRETRAINED), "--base_dir", str(tmp_path), "--protocol", "native", "--gpu_ids", "-1"])


def smooth(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).random((height // 8, width // 8, 3), dtype=np.float32)
    blurred = cv2.resize(cv2.GaussianBlur(noise, (0, 0), 2), (width, height), interpolation=cv2.INTER_CUBIC)
    return Image.fromarray((255 * (blurred - blurred.min()) / np.ptp(blurred)).astype(np.uint8))


def shift(one: np.ndarray, other: np.ndarray) -> float:
    """Pixels by which one grey image is shifted against another, by least squares over their gradients."""
    gradients = np.stack([np.gradient(other, axis=axis).ravel() for axis in (1, 0)], 1)
    return float(np.hypot(*np.linalg.lstsq(gradients, (one - other).ravel(), rcond=None)[0]))


@pytest.mark.parametrize(
    ("size", "orientation", "cached"),
    [*((size, 1, cached) for size in SIZES for cached in (False, True)), *((SIZES[0], n, n == 3) for n in range(2, 9))],
)
def test_pairs_of_a_jpeg_and_a_png_are_aligned(tmp_path, size, orientation, cached):
    image, exif = smooth(*size), Image.Exif()
    exif[0x0112] = orientation
    files = [tmp_path / "a.jpg", tmp_path / "a.png"]
    image.save(files[0], quality=98, subsampling=0, exif=exif)
    image.save(files[1], exif=exif, compress_level=1)
    cache = ImageCache(files, 2**27 if cached else 0, 0, least=256)
    for _ in range(2):
        jpeg, png = (cache.read(file) for file in files)
        assert jpeg.pixels.shape != png.pixels.shape, "one is decoded at a smaller size"
        for seed in range(6):
            how = Augmentation.draw(np.random.default_rng(seed), 128, 2)
            one, other = (augment(image, how)[..., 0].astype(np.float64) for image in (jpeg, png))
            assert shift(one, other) < 0.02


def test_what_is_decoded_smaller_remembers_its_size(tmp_path):
    smooth(1501, 1003).save(tmp_path / "a.jpg")
    small = read_rgb(tmp_path / "a.jpg", least=300)
    assert small.size == (751, 502) and small.info == {"size": (1501, 1003), "extent": (0, 0, 750.5, 501.5)}
    assert read_rgb(tmp_path / "a.jpg").info == {}
