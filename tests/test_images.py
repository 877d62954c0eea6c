"""Every kind of image file is read right, and what is no image is named."""

import cv2
import numpy as np
import pytest
from PIL import Image

from dereflect.util.errors import UserError
from dereflect.util.images import check_image, read_image, read_rgb, write_image
from tests.helpers import UPRIGHT, exif_chunk

WIDTH, HEIGHT = 24, 16


@pytest.fixture
def pixels() -> np.ndarray:
    """uint8 (16, 24, 3), smooth enough for JPEG, different in every corner and channel."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 10, y * 15, 240 - x * 5 - y * 5], -1).astype(np.uint8)


def assert_reads(path, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    """Both ways of reading give `expected` (0..1), and the check its size."""
    read = read_image(path)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, expected, atol=tolerance, rtol=0)
    eight = read_rgb(path)
    assert eight.mode == "RGB"
    np.testing.assert_allclose(np.asarray(eight) / 255, expected, atol=max(tolerance, 0.51 / 255), rtol=0)
    assert check_image(path) == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_colour(tmp_path, pixels, suffix):
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    assert_reads(tmp_path / f"a.{suffix}", pixels / 255)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_lossy_colour(tmp_path, pixels, suffix):
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", quality=98)
    assert_reads(tmp_path / f"a.{suffix}", pixels / 255, tolerance=0.06)


def test_grey(tmp_path, pixels):
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", np.repeat(pixels[..., :1], 3, -1) / 255)


def test_black_and_white(tmp_path, pixels):
    Image.fromarray(pixels[..., 0] > 100).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", np.repeat(pixels[..., :1] > 100, 3, -1).astype(float))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 250, 10))])
def test_palette(tmp_path, pixels, transparency):
    indices = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 25
    colours = pixels.reshape(-1, 3)[::15][:25]
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    assert Image.open(tmp_path / "a.png").mode == "P"
    assert_reads(tmp_path / "a.png", colours[indices] / 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped(tmp_path, pixels, mode):
    alpha = np.full((HEIGHT, WIDTH, 1), 77, np.uint8)
    colour = pixels if mode == "RGBA" else pixels[..., :1]
    Image.fromarray(np.concatenate([colour, alpha], -1), mode=mode).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", np.broadcast_to(colour, pixels.shape) / 255)


def test_cmyk(tmp_path, pixels):
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "a.jpg", quality=98)
    assert_reads(tmp_path / "a.jpg", pixels / 255, tolerance=0.06)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_kept(tmp_path, channels, suffix):
    deep = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH, channels), dtype=np.uint16)
    if channels == 4:
        deep[..., 3] = 65535
    assert cv2.imwrite(str(tmp_path / f"a.{suffix}"), deep.squeeze())
    colour = np.broadcast_to(deep, (HEIGHT, WIDTH, 3)) if channels == 1 else deep[..., 2::-1]
    assert_reads(tmp_path / f"a.{suffix}", colour / 65535)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation(tmp_path, pixels, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif, quality=98)
    assert_reads(tmp_path / f"a.{suffix}", UPRIGHT[orientation](pixels) / 255, tolerance=0.06)


def test_orientation_of_a_plain_tiff_with_transparency(tmp_path, pixels):
    """Which PIL maps into memory."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.dstack([pixels, pixels[..., 0]])).save(tmp_path / "a.tif", exif=exif)
    assert_reads(tmp_path / "a.tif", np.rot90(pixels, -1) / 255)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_of_sixteen_bits(tmp_path, pixels, orientation):
    deep = pixels.astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = orientation
    cv2.imwrite(str(tmp_path / "plain.png"), deep[..., ::-1])
    plain = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "a.png").write_bytes(plain[:33] + exif_chunk(exif) + plain[33:])  # behind signature and header
    assert_reads(tmp_path / "a.png", UPRIGHT[orientation](pixels) / 255)


def test_orientation_behind_the_pixels(tmp_path, pixels):
    """EXIF may follow a PNG's pixels, where a look at the header misses it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    plain = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "a.png").write_bytes(plain[:-12] + exif_chunk(exif) + plain[-12:])
    assert_reads(tmp_path / "a.png", np.rot90(pixels, -1) / 255)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp"])
def test_truncated_files_are_found(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"broken.{suffix}"
    Image.fromarray(noise).save(path)
    check_image(path)
    path.write_bytes(path.read_bytes()[:-3000])
    for use in (check_image, read_image, read_rgb):
        with pytest.raises(UserError, match=rf"broken\.{suffix}: "):
            use(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xd9"])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "letter.png").write_bytes(content)
    for use in (check_image, read_image, read_rgb):
        with pytest.raises(UserError, match=r"letter\.png"):
            use(tmp_path / "letter.png")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png: there is no such file"):
        read_image(tmp_path / "nowhere.png")


def test_bytes_behind_a_jpegs_end_are_fine(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=98)
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(bytes(5000))  # as some cameras do
    assert_reads(tmp_path / "a.jpg", pixels / 255, tolerance=0.06)


def test_decompression_bombs_are_refused(tmp_path, pixels, monkeypatch):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2 - 1)
    for use in (check_image, read_image):
        with pytest.raises(UserError, match=r"a\.png: more than 382 pixels"):
            use(tmp_path / "a.png")


def test_floating_point_files_are_refused(tmp_path, pixels):
    Image.fromarray(pixels[..., 0].astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="not supported"):
        check_image(tmp_path / "a.tif")


def test_writing_rounds_and_clips(tmp_path, pixels):
    write_image(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels.astype(np.float32) / 255)
    write_image(tmp_path / "b.png", pixels / 255 + 0.4 / 255)
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "b.png")), pixels)
    write_image(tmp_path / "c.png", pixels * 2.0 - 250)
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "c.png")), (pixels > 125) * 255)


@pytest.mark.parametrize("name", ["a.nonsense", "no/such/folder/a.png"])
def test_what_cannot_be_written_is_named(tmp_path, pixels, name):
    with pytest.raises(UserError, match=name):
        write_image(tmp_path / name, pixels)
