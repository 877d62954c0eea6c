"""Picture files by what they say: the format by its content, whatever the name; then kind, depth, planes and alpha.

Each format has a module. All give a `Picture`, whose pixels are right, or refuse the file with a line that names its
kind and a way out. Metadata is read apart from the pixels, so that none of it can cost a photograph.
"""

from __future__ import annotations

import re

from PIL import Image

from dereflect.util.formats import jpeg, netpbm, png, tiff
from dereflect.util.formats.picture import About, Picture, PilPicture, check_size
from dereflect.util.formats.source import RefusedError, Source

SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".heic", ".heif", ".avif",
})  # fmt: skip
"""Names of what is taken for a photograph in a folder."""

UNREAD_SUFFIXES = frozenset({
    ".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2", ".raf", ".orf", ".rw2", ".pef", ".srw", ".x3f",
    ".3fr", ".iiq", ".erf", ".mrw", ".kdc", ".dcr", ".raw", ".jp2", ".j2k", ".jxl", ".psd", ".exr", ".hdr", ".pfm",
    ".svg", ".tga", ".ico",
})  # fmt: skip
"""Names of pictures that can't be read."""

NO_HEIC = "HEIC needs a package: pip install pillow-heif; or convert the file"

_CONVERT = "convert it to PNG or TIFF"
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
_FOREIGN = (  # how a file of another kind begins, and what it is
    (rb"\xff\x0a|\0\0\0\x0cJXL ", f"a JPEG XL file, which is not read; {_CONVERT}"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", f"a JPEG 2000 file, which is not read; {_CONVERT}"),
    (rb"8BPS", f"a Photoshop file, which is not read; {_CONVERT}"),
    (rb"\x76\x2f\x31\x01|#\?RADIANCE|#\?RGBE", "floating-point images are not supported; convert it to 16 bits"),
    (rb"FUJIFILMCCD-RAW|IIU\0|IIRO|IIRS|MMOR|FOVb|\0MRM|.{4}ftypcrx |II\x1a\0\0\0HEAPCCDR", tiff.RAW),
    (rb"%PDF", "a PDF, not an image"),
    (rb"\s*(?:<\?xml[^>]*>\s*)?<svg", f"an SVG drawing, which is not read; {_CONVERT}"),
    (rb"\s*<(?:!doctype html|html)", "a web page, not an image"),
    (rb".{4}ftyp", "a video, not an image"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the image; do: git lfs pull"),
)


def open_picture(source: Source) -> Picture:
    """The picture in a file.

    Raises:
        RefusedError: it is none, is damaged, or is of a kind that isn't read.
    """
    head = source.upto(0, 512)
    if head.startswith(png.SIGNATURE):
        return png.open_png(source)
    if head.startswith(b"\xff\xd8\xff"):
        return jpeg.open_jpeg(source)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return tiff.open_tiff(source)
    if re.match(rb"P[1-6][\s#]|P7\r?\n|P[FfG]\n", head):
        return netpbm.open_netpbm(source)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        length = int.from_bytes(head[4:8], "little")
        check_size(*_size_of_webp(head), source)  # PIL makes room for all of it as soon as it opens it
        return _by_pil("WEBP", source, length + 8 <= source.size)
    if re.match(rb"GIF8[79]a", head):
        return _by_pil("GIF", source, source.at(source.size - 1, 1) == b";")
    if head[:2] == b"BM":
        return _by_pil("BMP", source, int.from_bytes(head[2:6], "little") <= source.size and head[30:34] == bytes(4))
    if head[4:8] == b"ftyp" and (kind := _kind_of_boxes(head)):
        return _by_pil(kind, source, False)
    for pattern, words in _FOREIGN:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            raise RefusedError(words)
    raise RefusedError("not an image, or damaged")


def _by_pil(kind: str, source: Source, whole: bool) -> Picture:
    """A file that PIL reads right, with all that it says."""
    source.file.seek(0)
    return PilPicture(kind, source, source.file, lambda: whole)


def _size_of_webp(head: bytes) -> tuple[int, int]:
    """Width and height that a WebP's first chunk claims."""
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _kind_of_boxes(head: bytes) -> str | None:
    """HEIF or AVIF, by the brands in the first box, where it is one of them."""
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[place : place + 4] for place in range(16, length - 3, 4))]
    if {b"avif", b"avis"} & set(brands):
        Image.init()
        if "AVIF" not in Image.OPEN:
            raise RefusedError(f"AVIF needs Pillow 11.3 or newer; or {_CONVERT}")
        return "AVIF"
    if not _HEIC_BRANDS & set(brands):
        return None
    if not prepare_heic():
        raise RefusedError(NO_HEIC)
    return "HEIF"


def prepare_heic() -> bool:
    """Teach PIL to read and write HEIC; whether that can be done."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


__all__ = ["NO_HEIC", "SUFFIXES", "UNREAD_SUFFIXES", "About", "Picture", "RefusedError", "Source", "open_picture",
           "prepare_heic"]  # fmt: skip
