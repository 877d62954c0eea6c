"""JPEGs of which a part is missing: refused even where an end mark was put behind what is left, and no others are."""

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from dereflect.util.errors import UserError
from dereflect.util.images import check_image, read_image, read_rgb
from dereflect.util.photographs import read_photograph
from tests.formats import RAMP, by_pil, whole

END = b"\xff\xd9"
SIDE = 160


def photograph() -> Image.Image:
    """Some detail everywhere, so that every part needs bytes."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(RAMP.astype(np.float32), (SIDE, SIDE))
    return Image.fromarray(whole(np.clip(smooth + rng.normal(0, 0.05, smooth.shape), 0, 1), 255))


def by_opencv(*how: int) -> bytes:
    return cv2.imencode(".jpg", np.asarray(photograph())[..., ::-1], how)[1].tobytes()


MAKES = {
    "plain": lambda: by_pil(photograph(), "JPEG"),
    "of full colours": lambda: by_pil(photograph(), "JPEG", quality=98, subsampling=0),
    "grey": lambda: by_pil(photograph().convert("L"), "JPEG"),
    "CMYK": lambda: by_pil(photograph().convert("CMYK"), "JPEG"),
    "progressive": lambda: by_pil(photograph(), "JPEG", progressive=True),
    "with restarts": lambda: by_opencv(cv2.IMWRITE_JPEG_RST_INTERVAL, 3),
    "progressive with restarts": lambda: by_opencv(cv2.IMWRITE_JPEG_RST_INTERVAL, 3, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
}
READERS = {
    "image": read_image,
    "photograph": read_photograph,
    "check": lambda path: check_image(path, decoded=True),
    "RGB": read_rgb,
}


def jpeg_in_tiff(content: bytes) -> bytes:
    """A JPEG as the only strip of a TIFF."""
    values = {256: SIDE, 257: SIDE, 258: 8, 259: 7, 262: 6, 273: 8, 277: 3, 278: SIDE, 279: len(content), 530: 0x20002}
    kinds = {530: (3, 2)}
    entries = b"".join(struct.pack("<HHII", tag, *kinds.get(tag, (4, 1)), value) for tag, value in values.items())
    start = 8 + len(content) + len(content) % 2
    head = struct.pack("<2sHI", b"II", 42, start) + content.ljust(start - 8, b"\0")
    return head + struct.pack("<H", len(values)) + entries + bytes(4)


@pytest.mark.parametrize("end", [END, b""], ids=["ended", "not ended"])
@pytest.mark.parametrize("kind", MAKES)
def test_what_is_cut_is_refused(kind, end, tmp_path):
    content, path = MAKES[kind](), tmp_path / "a.jpg"
    start = content.rindex(b"\xff\xda") + 14 if "progressive" not in kind else content.index(b"\xff\xda") + 14
    for part in (0.05, 0.3, 0.6, 0.9):
        path.write_bytes(content[: start + int((len(content) - start) * part)].rstrip(b"\xff") + end)
        for name, read in READERS.items():
            with pytest.raises(UserError, match=r"a\.jpg: .*(truncated|damaged)"):
                read(path)
                pytest.fail(f"{name} takes {part} of it")


@pytest.mark.parametrize("kind", MAKES)
def test_what_is_whole_is_read(kind, tmp_path):
    """Whatever stands behind it; also without its end mark, where that is all that is missing."""
    content, path = MAKES[kind](), tmp_path / "a.jpg"
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) / np.float32(255)
    afterwards = [b"", bytes(100_000), b"SEFT" * 300, content]
    cut = [content[:-2], content[:-1]] if "progressive" not in kind else []
    for whole_file in [content + more for more in afterwards] + cut:
        path.write_bytes(whole_file)
        np.testing.assert_array_equal(read_image(path), expected)
        for read in READERS.values():
            read(path)


@pytest.mark.parametrize("quality", [1, 30, 75, 100])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("grey", [127, 128, 129])
def test_what_ends_in_grey_is_read(grey, progressive, quality, tmp_path):
    image = photograph()
    image.paste((grey,) * 3, (0, SIDE // 3, SIDE, SIDE))
    (tmp_path / "a.jpg").write_bytes(by_pil(image, "JPEG", quality=quality, progressive=progressive))
    for read in READERS.values():
        read(tmp_path / "a.jpg")
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg")[-8:], grey / 255, atol=0.05)


@pytest.mark.parametrize("end", [END, b""], ids=["ended", "not ended"])
def test_a_jpeg_in_a_tiff(end, tmp_path, capfd):
    content, path = by_pil(photograph(), "JPEG"), tmp_path / "a.tif"
    path.write_bytes(jpeg_in_tiff(content))
    np.testing.assert_allclose(read_image(path), np.asarray(photograph()) / 255, atol=0.35)
    path.write_bytes(jpeg_in_tiff(content[: len(content) * 2 // 3] + end))
    for read in READERS.values():
        with pytest.raises(UserError, match=r"a\.tif: truncated: its pixels are not all there"):
            read(path)
    assert capfd.readouterr().err == ""
