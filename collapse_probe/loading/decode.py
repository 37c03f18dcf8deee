"""Image files to 8-bit PIL images as a viewer would show them, or an error with the reason.

EXIF rotation is applied, transparency is composited on white, 16-bit pixels are scaled to 8 bits, palettes and CMYK
become RGB, grey becomes RGB (or everything becomes grey for models of one channel), and of animations the first frame
counts. Colour profiles are not applied, as in timm and torchvision.

Whatever a file holds, there is one error. Sizes are judged by the header, before the picture is unpacked.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from collapse_probe.errors import ImageFileError
from collapse_probe.words import neutral

#: What is done to pixels before the model's own preprocessing, for the provenance.
DECODING = (
    "EXIF rotation applied, transparency composited on white, 16 bits scaled to 8, first frame of animations, "
    "colour profiles not applied"
)

# PIL recognises these and cannot decode them, or starts Ghostscript to do so; old versions unpack FITS without bound.
_NOT_DECODED = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
# Resizing the shorter side of a sliver to 224 pixels would make the longer one enormous.
_MAX_ASPECT = 100
_LONGEST_REASON = 200
# TIFF 6.0, section 8: BitsPerSample, PhotometricInterpretation.
_BITS, _PHOTOMETRIC = 258, 262


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

    16-bit colours lose their lower byte in PIL, where 16-bit grey is rounded: at most one step of 255 lies between.

    Raises:
        ImageFileError: for everything that is wrong with the file, whatever its content. The message is the reason in
            words, without the path.
    """
    try:
        return _decoded(path, channels)
    except ImageFileError:
        raise
    except Exception as error:  # decoders raise anything on broken files
        raise ImageFileError(_reason(error, path)) from None


def _decoded(path: Path, channels: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Only a warning between one and two times PIL's limit: too large is too large.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=image_formats()) as image:
            _check_shape(image.size)
            image.load()
            _check_shape(image.size)  # icons say only now how large they are
            _check_scaled(image)
            return _flatten(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")


def _check_shape(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise ImageFileError(f"{size[0]} x {size[1]} pixels: there is nothing to see")
    if max(size) > _MAX_ASPECT * min(size):
        raise ImageFileError(f"{size[0]} x {size[1]} pixels: one side is more than {_MAX_ASPECT} times the other")


def _reason(error: Exception, path: Path) -> str:
    """What went wrong, in words."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels, which may be a decompression bomb"
    if isinstance(error, UnidentifiedImageError):
        return "the file is empty" if _size(path) == 0 else "no picture of a format that is read"
    if isinstance(error, FileNotFoundError):
        return "no such file: it is gone, or a link leads nowhere"
    if isinstance(error, OSError) and error.strerror:
        return f"the file cannot be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return "the picture does not fit into memory"
    message = str(error).replace(str(path), "the file")
    if not message or not isinstance(error, (OSError, SyntaxError, ValueError)):  # those have sentences
        message = f"{type(error).__name__} {message}".strip()
    return f"the picture cannot be decoded: {neutral(message)[:_LONGEST_REASON]}"


def _size(path: Path) -> int | None:
    """Of the file in bytes; None where it has gone since."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _check_scaled(image: Image.Image) -> None:
    """Of TIFFs with more than 8 bits, Pillow hands out the numbers as they are, whatever they mean."""
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") and (tags.get(_BITS, (16,))[0] != 16 or tags.get(_PHOTOMETRIC, 1) == 0):
        raise ImageFileError("a TIFF of other than 16 bits, or with white as zero, which Pillow does not scale")


def _flatten(image: Image.Image) -> Image.Image:
    """8 bits per channel, no transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image)
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit integers by 255/65535; floats as 0..1. Wider values have no stated range.

    Of grey PNGs one value can be transparent: it is white.
    """
    pixels = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not (pixels.min() >= 0 and pixels.max() <= top):
        raise ImageFileError(f"pixels of mode {image.mode} lie outside 0..{top:g}, so their range is unknown")
    pixels[pixels == _transparent(image.info)] = top
    return Image.fromarray(np.rint(pixels * (255.0 / top)).astype(np.uint8))


def _transparent(info: Mapping[Any, Any]) -> float:
    value = info.get("transparency")
    return float(value) if isinstance(value, int) else np.nan
