"""Image files of every format, and tiny ones that claim to be huge."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(form: str, mode: str = "RGB", **how) -> bytes:
    """A file of 40 x 30 pixels."""
    y, x = np.mgrid[:30, :40]
    image = Image.fromarray(np.stack([x * 6, y * 8, 240 - x * 3 - y * 4], -1).astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) << 8) + 7)
    file = io.BytesIO()
    (image if mode == "I;16" else image.convert(mode)).save(file, form, **how)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int) -> bytes:
    """A tiny PNG that claims that size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    content = bytearray(picture("JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def bmp_of(width: int, height: int) -> bytes:
    content = bytearray(picture("BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def gif_of(width: int, height: int) -> bytes:
    content = bytearray(picture("GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def tiff_of(width: int, height: int) -> bytes:
    content = bytearray(picture("TIFF"))
    (directory,) = struct.unpack_from("<I", content, 4)
    for entry in range(struct.unpack_from("<H", content, directory)[0]):
        place = directory + 2 + 12 * entry
        if (tag := struct.unpack_from("<H", content, place)[0]) in (256, 257):
            struct.pack_into("<HII", content, place + 2, 4, 1, width if tag == 256 else height)
    return bytes(content)


def ppm_of(width: int, height: int) -> bytes:
    return b"P6 %d %d 255\n" % (width, height) + bytes(1000)


def webp_of(width: int, height: int) -> bytes:
    """As large as WebP can say."""
    content = bytearray(picture("WEBP", lossless=True))
    content[21:25] = struct.pack("<I", min(width, 16384) - 1 | (min(height, 16384) - 1) << 14)
    return bytes(content)


BOMBS = {"png": png_of, "jpg": jpeg_of, "bmp": bmp_of, "gif": gif_of, "tif": tiff_of, "ppm": ppm_of, "webp": webp_of}
