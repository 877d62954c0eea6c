"""One picture in some hundred kinds of files, each with the pixels it must be read as."""

import io
import struct
import zlib
from collections.abc import Callable
from itertools import product

import numpy as np
import tifffile
from PIL import Image

from dereflect.util.formats.png import SIGNATURE, chunk

WIDTH, HEIGHT = 64, 48
_y, _x = np.mgrid[:HEIGHT, :WIDTH]
RAMP = np.stack([_x / (WIDTH - 1), _y / (HEIGHT - 1), (_x + _y) / (WIDTH + HEIGHT - 2)], -1)
"""(48, 64, 3) in 0..1, different in every corner and channel."""

OPAQUE = 40000 / 65535
"""The alpha of files that have one."""

Case = tuple[Callable[[], bytes], np.ndarray, float]


def whole(values: np.ndarray, most: int) -> np.ndarray:
    """0..1 as whole numbers."""
    return (values * most).round().astype(np.uint8 if most < 256 else np.uint16)


def grey(values: np.ndarray = RAMP) -> np.ndarray:
    """The green channel in all three."""
    return np.repeat(values[..., 1:2], 3, axis=2)


def png(samples: np.ndarray, kind: int, *before: bytes) -> bytes:
    """(H, W, channels) of 8 or 16 bits as a PNG of a colour type, with chunks before its pixels."""
    rows = samples.astype(samples.dtype.newbyteorder(">")).reshape(len(samples), -1)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 8 * samples.itemsize, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(before) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(samples: np.ndarray, photometric: str, planar: bool = False, **how) -> bytes:
    """(H, W[, channels]) as a TIFF."""
    file = io.BytesIO()
    if samples.ndim == 3:
        how["planarconfig"] = "separate" if planar else "contig"
        samples = np.moveaxis(samples, 2, 0) if planar else samples
    tifffile.imwrite(file, samples, photometric=photometric, **how)
    return file.getvalue()


def by_pil(image: Image.Image, form: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def netpbm(magic: str, samples: np.ndarray, most: int) -> bytes:
    """Whole numbers as PBM, PGM or PPM, in letters or bytes."""
    head = f"{magic}\n# a comment, of 7 words and 2 numbers\n{samples.shape[1]} {samples.shape[0]}\n"
    head += "" if magic in ("P1", "P4") else f"{most}\n"
    if magic in ("P1", "P2", "P3"):
        rows = "\n# another 3\n".join(" ".join(map(str, row.reshape(-1))) for row in samples)
        return (head + rows + "\n").encode()
    if magic == "P4":
        return head.encode() + np.packbits(samples.astype(bool), axis=1).tobytes()
    return head.encode() + samples.astype(">u2" if most > 255 else np.uint8).tobytes()


def pam(samples: np.ndarray, most: int, kind: str) -> bytes:
    head = f"P7\nWIDTH {WIDTH}\nHEIGHT {HEIGHT}\nDEPTH {samples.shape[2]}\nMAXVAL {most}\nTUPLTYPE {kind}\nENDHDR\n"
    return head.encode() + samples.astype(">u2" if most > 255 else np.uint8).tobytes()


def packed(samples: np.ndarray, bits: int, photometric: int, order: str) -> bytes:
    """(H, W, channels) of any number of bits as an uncompressed TIFF in strips of 10 rows."""
    spread = (samples[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(spread.reshape(len(samples), -1).astype(np.uint8), axis=1)
    strips = [rows[top : top + 10].tobytes() for top in range(0, len(rows), 10)]
    places = [8 + sum(map(len, strips[:n])) for n in range(len(strips))]
    values = {256: [WIDTH], 257: [HEIGHT], 258: [bits] * samples.shape[2], 259: [1], 262: [photometric], 273: places,
              277: [samples.shape[2]], 278: [10], 279: [len(strip) for strip in strips]}  # fmt: skip
    start = 8 + sum(map(len, strips))
    entries, more = b"", b""
    for tag, numbers in values.items():
        content = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(content) > 4:
            more, content = more + content, struct.pack(f"{order}I", start + 6 + 12 * len(values) + len(more))
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + content
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, start)
    return head + b"".join(strips) + struct.pack(f"{order}H", len(values)) + entries + bytes(4) + more


def _tiffs() -> dict[str, Case]:
    cases = {}
    for most, planar, tile, order, compression in product((255, 65535), (False, True), (None, (16, 32)), "<>",
                                                          (None, "zlib")):  # fmt: skip
        how = {"planar": planar, "tile": tile, "byteorder": order, "compression": compression,
               "predictor": compression == "zlib", "rowsperstrip": None if tile else 10}  # fmt: skip
        rgb, alpha = whole(RAMP, most), np.full((HEIGHT, WIDTH), whole(np.array(OPAQUE), most))
        bits = 8 if most == 255 else 16
        name = f"{bits} bits, {order}, {compression}" + ", planar" * planar + ", tiled" * bool(tile)

        def add(kind, samples, photometric, expected=RAMP, tolerance=0.0, how=how, most=most, name=name, **more):
            make = lambda: tiff(samples, photometric, **how, **more)  # noqa: E731
            cases[f"TIFF {kind}, {name}"] = (make, expected, 0.501 / most + tolerance)

        add("RGB", rgb, "rgb")
        add("RGBA", np.dstack([rgb, alpha]), "rgb", extrasamples=["unassalpha"])
        dark = (rgb * (alpha[..., None] / most)).round().astype(rgb.dtype)
        add("RGBA multiplied", np.dstack([dark, alpha]), "rgb", tolerance=1 / most, extrasamples=["assocalpha"])
        add("RGB and two more", np.dstack([rgb, alpha, alpha]), "rgb", extrasamples=["unassalpha", "unspecified"])
        add("CMYK", np.dstack([most - rgb, np.zeros_like(alpha)]), "separated")
        add("grey and alpha", np.dstack([rgb[..., 1], alpha]), "minisblack", grey(), extrasamples=["unassalpha"])
        if not planar:
            add("grey", rgb[..., 1], "minisblack", grey())
            add("white is zero", most - rgb[..., 1], "miniswhite", grey())
    stored = np.asarray(Image.fromarray(whole(RAMP, 255)).convert("LAB"))
    colours = np.asarray(Image.fromarray(stored, "LAB").convert("RGB")) / 255
    for planar in (False, True):
        make = lambda planar=planar: tiff(stored, "cielab", planar)  # noqa: E731
        cases["TIFF Lab" + ", planar" * planar] = (make, colours, 0)
    cases["TIFF lzma"] = (lambda: tiff(whole(RAMP, 65535), "rgb", compression="lzma"), RAMP, 0.501 / 65535)
    for bits, order in product((1, 2, 4, 6, 8, 10, 12, 14, 16), "<>"):
        if bits == 16 and order == ">":
            continue  # bytes of 16 bits have an order of their own
        samples = (RAMP * (2**bits - 1)).round().astype(np.uint32)
        if bits == 16:
            samples = samples.astype("<u2").view(">u2").astype(np.uint32)
        expected = (RAMP * (2**bits - 1)).round() / (2**bits - 1)
        one = samples[..., 1:2]
        step = 0.501 / (255 if bits <= 8 else 65535)
        cases[f"TIFF RGB of {bits} bits, {order}"] = (lambda a=(samples, bits, 2, order): packed(*a), expected, step)
        cases[f"TIFF grey of {bits} bits, {order}"] = (lambda a=(one, bits, 1, order): packed(*a), grey(expected), step)
        if bits < 16:
            negative = 2**bits - 1 - one
            make = lambda a=(negative, bits, 0, order): packed(*a)  # noqa: E731
            cases[f"TIFF white is zero of {bits} bits, {order}"] = (make, grey(expected), step)
    return cases


def _pngs() -> dict[str, Case]:
    cases = {}
    for most in (255, 65535):
        rgb, alpha = whole(RAMP, most), np.full((HEIGHT, WIDTH, 1), whole(np.array(OPAQUE), most))
        key = b"".join(int(v).to_bytes(2, "big") for v in rgb[3, 3])
        both, four = np.dstack([rgb[..., 1:2], alpha]), np.dstack([rgb, alpha])
        gamma = chunk(b"gAMA", struct.pack(">I", 100_000))
        makes = {
            "RGB": (rgb, 2),
            "RGBA": (four, 6),
            "grey": (rgb[..., 1:2], 0),
            "grey and alpha": (both, 4),
            "RGB with a transparent colour": (rgb, 2, chunk(b"tRNS", key)),
            "grey with a transparent colour": (rgb[..., 1:2], 0, chunk(b"tRNS", key[2:4])),
            "RGB with gamma": (rgb, 2, gamma),
        }
        for name, made in makes.items():
            expected = grey() if name.startswith("grey") else RAMP
            cases[f"PNG {name}, {most}"] = (lambda made=made: png(*made), expected, 0.501 / most)
    return cases


def _netpbms() -> dict[str, Case]:
    cases = {}
    for most in (1, 7, 100, 255, 256, 1023, 4095, 16383, 65534, 65535):
        rgb = (RAMP * most).round().astype(np.int64)
        seen, step = rgb / most, 0.501 / (255 if most < 256 else 65535)
        for letters, bytes_ in (("P2", "P5"), ("P3", "P6")):
            for magic in (letters, bytes_):
                samples, expected = (rgb, seen) if magic in ("P3", "P6") else (rgb[..., 1], grey(seen))
                cases[f"{magic} up to {most}"] = (lambda a=(magic, samples, most): netpbm(*a), expected, step)
        alpha = np.full((HEIGHT, WIDTH, 1), round(OPAQUE * most))
        cases[f"PAM RGB up to {most}"] = (lambda a=(rgb, most, "RGB"): pam(*a), seen, step)
        four = np.dstack([rgb, alpha])
        cases[f"PAM RGBA up to {most}"] = (lambda a=(four, most, "RGB_ALPHA"): pam(*a), seen, step)
    rgb, size = whole(RAMP, 255), b"%d %d" % (WIDTH, HEIGHT)
    heads = {
        "CRLF": b"P6\r\n%b\r\n255\r\n",
        "a comment behind": b"P6 %b 255 # by x\n",
        "a line behind": b"P6\n%b\n255\n# by x\n",
        "one line": b"P6 %b 255 ",
    }
    for name, head in heads.items():
        cases[f"P6 with {name}"] = (lambda head=head: head % size + rgb.tobytes(), RAMP, 0.002)
    head = pam(rgb, 255, "RGB")[: -rgb.size]
    cases["PAM with a comment"] = (lambda: head.replace(b"P7\n", b"P7\n#ENDHDR\n") + rgb.tobytes(), RAMP, 0.002)
    cases["PAM with CRLF"] = (lambda: head.replace(b"\n", b"\r\n") + rgb.tobytes(), RAMP, 0.002)
    dark = (RAMP[..., 1] < 0.5).astype(np.int64)
    for magic in ("P1", "P4"):
        cases[magic] = (lambda a=(magic, dark, 1): netpbm(*a), np.repeat(1.0 - dark[..., None], 3, 2), 0)
    return cases


def _by_pil() -> dict[str, Case]:
    image = Image.fromarray(whole(RAMP, 255))
    palette, bits = image.quantize(16), image.getchannel("G").convert("1")
    coloured, black = (np.asarray(i.convert("RGB")) / 255 for i in (palette, bits))
    other = Image.fromarray(255 - whole(RAMP, 255))
    flat = image.copy()
    flat.paste((128, 128, 128), (0, HEIGHT // 2, WIDTH, HEIGHT))
    makes = {
        **{f"{form} palette": (palette, form, {}, coloured, 0) for form in ("PNG", "GIF", "TIFF", "BMP")},
        "PNG palette with transparency": (palette, "PNG", {"transparency": bytes([0, 50, 255])}, coloured, 0),
        **{f"{form} black and white": (bits, form, {}, black, 0) for form in ("PNG", "TIFF", "BMP")},
        **{f"TIFF {how}": (bits, "TIFF", {"compression": how}, black, 0) for how in ("group3", "group4")},
        **{f"TIFF {how}": (image, "TIFF", {"compression": how}, RAMP, 0.002) for how in ("tiff_lzw", "packbits")},
        "TIFF jpeg": (image, "TIFF", {"compression": "jpeg", "quality": 98}, RAMP, 0.05),
        "TIFF YCbCr": (image.convert("YCbCr"), "TIFF", {}, RAMP, 0.02),
        "JPEG": (image, "JPEG", {"quality": 98, "subsampling": 0}, RAMP, 0.03),
        "JPEG progressive": (image, "JPEG", {"quality": 98, "subsampling": 0, "progressive": True}, RAMP, 0.03),
        "JPEG that ends in grey": (flat, "JPEG", {"quality": 98, "subsampling": 0}, np.asarray(flat) / 255, 0.03),
        "JPEG grey": (image.getchannel("G"), "JPEG", {"quality": 98}, grey(), 0.03),
        "JPEG CMYK": (image.convert("CMYK"), "JPEG", {"quality": 98}, RAMP, 0.03),
        "MPO": (image, "MPO", {"save_all": True, "append_images": [other], "quality": 98}, RAMP, 0.05),
        "WebP": (image, "WEBP", {"lossless": True}, RAMP, 0.002),
        "WebP animated": (image, "WEBP", {"lossless": True, "save_all": True, "append_images": [other]}, RAMP, 0.002),
        "BMP": (image, "BMP", {}, RAMP, 0.002),
        "PNG animated": (image, "PNG", {"save_all": True, "append_images": [other]}, RAMP, 0.002),
    }  # fmt: skip
    return {name: (lambda a=(what, form), how=how: by_pil(*a, **how), expected, tolerance)
            for name, (what, form, how, expected, tolerance) in makes.items()}  # fmt: skip


CASES = _tiffs() | _pngs() | _netpbms() | _by_pil()
