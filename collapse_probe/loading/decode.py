"""Image files to 8-bit PIL images as a viewer would show them, or an error with the reason.

EXIF rotation is applied, transparency is composited on white, 16-bit pixels are scaled to 8 bits, palettes and CMYK
become RGB, grey becomes RGB (or everything becomes grey for models of one channel), and of animations the first frame
counts. Colour profiles are not applied, as in timm and torchvision.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# PIL recognises these and cannot decode them, or starts Ghostscript to do so.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Resizing the shorter side of a sliver to 224 pixels would make the longer one enormous.
_MAX_ASPECT = 100


def image_formats() -> list[str]:
    """The formats that are read, by PIL's names."""
    Image.init()
    return sorted(set(Image.OPEN) - _NOT_DECODED)


def image_extensions() -> list[str]:
    """File name extensions of those formats, lower case, with the dot."""
    formats = set(image_formats())
    return sorted(ext for ext, name in Image.registered_extensions().items() if name in formats)


def decode(path: Path, channels: int = 3) -> Image.Image:
    """The picture as mode ``"RGB"`` (3 channels) or ``"L"`` (1 channel).

    Raises:
        Exception: of any type that PIL has for broken files; ValueError where the pixels have no stated range.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Only a warning between one and two times PIL's limit: too large is too large.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=image_formats()) as image:
            _check_shape(image.size)
            image.load()
            return _flatten(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")


def _check_shape(size: tuple[int, int]) -> None:
    if max(size) > _MAX_ASPECT * min(size):
        raise ValueError(f"{size[0]} x {size[1]} pixels: one side is more than {_MAX_ASPECT} times the other")


def _flatten(image: Image.Image) -> Image.Image:
    """8 bits per channel, no transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image)
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit integers by 255/65535; floats as 0..1. Wider values have no stated range."""
    pixels = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not (pixels.min() >= 0 and pixels.max() <= top):
        raise ValueError(f"pixels of mode {image.mode} lie outside 0..{top:g}, so their range is unknown")
    return Image.fromarray(np.rint(pixels * (255.0 / top)).astype(np.uint8))
