"""Image files that are broken, disguised or hostile, made from scratch: name -> (content, what the reason must say)."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

#: More pixels than twice PIL's limit, and a side that fits into 16 bits.
HUGE = 60_000

CANNOT, NO_PICTURE, TOO_MANY = "cannot be decoded", "no picture of a format", "decompression bomb"


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Colours without any pattern."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The picture as the content of a file."""
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def png(width: int, height: int, pixels: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header says that size, whatever pixels follow."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def bmp(width: int, height: int) -> bytes:
    """A BMP header of that size, and no pixels."""
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def gif(width: int, height: int, frame: tuple[int, int] | None = None) -> bytes:
    """A GIF whose canvas has that size, and its only frame another one if wished."""
    sides = frame or (width, height)
    canvas = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return canvas + b"," + struct.pack("<HHHHB", 0, 0, *sides, 0) + b"\x02\x02\x4c\x01\x00;"


def jpeg(width: int, height: int) -> bytes:
    """A JPEG of another size whose header was changed."""
    content = bytearray(encoded(noise(), "JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def tiff(width: int, height: int) -> bytes:
    """A grey TIFF of one strip of four bytes whose directory says that size."""
    tags = ((256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 4), (279, 4, 4))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\x00" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def icon(sides: int) -> bytes:
    """A Windows icon that claims 16 x 16 pixels and holds a PNG of another size."""
    inside = png(sides, sides)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 24, len(inside), 22) + inside


def _cut(kind: str, **options: object) -> bytes:
    whole = encoded(noise(), kind, **options)
    return whole[: len(whole) // 2]


def _text_bomb() -> bytes:
    """A PNG with a compressed comment that unpacks to 64 MiB."""
    text = b"zTXtcomment\x00\x00" + zlib.compress(bytes(1 << 26))
    whole = png(1, 1, bytes(4))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return whole[:33] + chunk + whole[33:]


#: Refused by what their headers say: unpacked they would fill the memory.
BOMBS: dict[str, tuple[bytes, str]] = {
    "huge.png": (png(HUGE, HUGE), TOO_MANY),
    "huge.bmp": (bmp(HUGE, HUGE), TOO_MANY),
    "huge.gif": (gif(HUGE, HUGE), TOO_MANY),
    "frame.gif": (gif(8, 8, (HUGE, HUGE)), TOO_MANY),
    "huge.jpg": (jpeg(HUGE, HUGE), TOO_MANY),
    "huge.tif": (tiff(HUGE, HUGE), TOO_MANY),
    "largest.png": (png(2**31 - 1, 2**31 - 1), TOO_MANY),
    "inside.ico": (icon(HUGE), TOO_MANY),
    "comment.png": (_text_bomb(), CANNOT),
}

#: Everything else that is wrong with a file.
BROKEN: dict[str, tuple[bytes, str]] = {
    "zero.png": (b"", "the file is empty"),
    "zero.jpg": (b"", "the file is empty"),
    "text.jpg": (b"this is no picture", NO_PICTURE),
    "page.png": (b"<!DOCTYPE html><html><body>404</body></html>", NO_PICTURE),
    "postscript.jpg": (encoded(noise(), "EPS"), NO_PICTURE),
    "pdf.png": (encoded(noise(), "PDF"), NO_PICTURE),
    "astronomy.png": (b"SIMPLE  =                    T".ljust(80) + bytes(2800), NO_PICTURE),
    "nulls.webp": (bytes(4096), NO_PICTURE),
    "signature.png": (b"\x89PNG\r\n\x1a\n", NO_PICTURE),
    "cut.png": (_cut("PNG"), CANNOT),
    "cut.jpg": (_cut("JPEG"), CANNOT),
    "cut.gif": (_cut("GIF"), CANNOT),
    "cut.tif": (_cut("TIFF"), CANNOT),
    "cut.bmp": (_cut("BMP"), CANNOT),
    "cut.webp": (_cut("WEBP", lossless=True), CANNOT),
    "flat.png": (png(0, 7), NO_PICTURE),
    "sliver.png": (png(2000, 1, bytes(6001)), "one side is more than 100 times the other"),
}


def write(folder: Path, files: dict[str, tuple[bytes, str]]) -> None:
    """The files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
