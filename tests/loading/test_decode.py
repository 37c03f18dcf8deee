"""Every kind of image file comes out as a viewer shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from collapse_probe.loading.decode import decode, image_extensions

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def _noise(mode: str = "RGB", size: tuple[int, int] = (12, 8), seed: int = 0) -> Image.Image:
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def _saved(image: Image.Image, path: Path, **kwargs: object) -> Path:
    image.save(path, **kwargs)
    return path


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "webp", "ppm", "tga"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, extension: str) -> None:
    image = _noise()
    options = {"lossless": True} if extension == "webp" else {}
    read = decode(_saved(image, tmp_path / f"x.{extension}", **options))
    assert read.mode == "RGB"
    assert np.array_equal(np.asarray(read), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    upright = _noise()
    # How a camera stores the upright picture for each value of the tag (EXIF 2.3, orientation).
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[::-1],
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: a.swapaxes(0, 1)[:, ::-1],
    }[orientation](np.asarray(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _saved(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(decode(path)), np.asarray(upright))


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    read = decode(_saved(image, tmp_path / "x.png"))
    assert read.getpixel((0, 0)) == RED
    assert read.getpixel((1, 0)) == WHITE
    assert read.getpixel((2, 0)) == pytest.approx((127, 127, 127), abs=1)


def test_transparent_grey_and_palette(tmp_path: Path) -> None:
    assert decode(_saved(Image.new("LA", (1, 1), (0, 0)), tmp_path / "la.png")).getpixel((0, 0)) == WHITE
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    path = _saved(palette, tmp_path / "p.png", transparency=1)
    assert [decode(path).getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]
    path = _saved(Image.new("RGB", (1, 1), RED), tmp_path / "rgb.png", transparency=RED)
    assert decode(path).getpixel((0, 0)) == WHITE


def test_palette_without_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (1, 1))
    palette.putpalette([1, 2, 3])
    assert decode(_saved(palette, tmp_path / "x.png")).getpixel((0, 0)) == (1, 2, 3)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535, 128, 129]], dtype=np.uint16)
    for name in ("x.png", "x.tiff"):
        read = np.asarray(decode(_saved(Image.fromarray(values), tmp_path / name)))
        assert read[0, :, 0].tolist() == [0, 1, 128, 255, 0, 1]
        assert (read == read[..., :1]).all()


def test_float_pixels(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert np.asarray(decode(_saved(Image.fromarray(values), tmp_path / "x.tiff")))[0, :, 0].tolist() == [0, 128, 255]
    for broken in (values * 300, values - 1, values * np.nan):
        with pytest.raises(ValueError, match=r"outside 0..1"):
            decode(_saved(Image.fromarray(broken), tmp_path / "x.tiff"))


def test_wide_integers_have_no_range(tmp_path: Path) -> None:
    values = np.array([[0, 70_000]], dtype=np.int32)
    with pytest.raises(ValueError, match=r"outside 0..65535"):
        decode(_saved(Image.fromarray(values), tmp_path / "x.tiff"))


def test_cmyk(tmp_path: Path) -> None:
    path = _saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "x.tiff")
    assert decode(path).getpixel((8, 8)) == RED


def test_one_bit_and_grey(tmp_path: Path) -> None:
    assert decode(_saved(Image.new("1", (2, 2), 1), tmp_path / "x.png")).getpixel((0, 0)) == WHITE
    read = decode(_saved(Image.new("L", (2, 2), 77), tmp_path / "x.png"))
    assert read.getpixel((0, 0)) == (77, 77, 77)


def test_one_channel(tmp_path: Path) -> None:
    grey = _noise("L")
    read = decode(_saved(grey, tmp_path / "x.png"), channels=1)
    assert read.mode == "L"
    assert np.array_equal(np.asarray(read), np.asarray(grey))
    assert decode(_saved(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), tmp_path / "x.png"), 1).getpixel((0, 0)) == 255
    sixteen = Image.fromarray(np.array([[65535]], dtype=np.uint16))
    assert decode(_saved(sixteen, tmp_path / "x.png"), 1).getpixel((0, 0)) == 255


@pytest.mark.parametrize("extension", ["gif", "png", "webp"])
def test_first_frame_of_an_animation(tmp_path: Path, extension: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLACK)]
    path = _saved(frames[0], tmp_path / f"x.{extension}", save_all=True, append_images=frames[1:])
    assert decode(path).getpixel((1, 1)) == pytest.approx(RED, abs=2)


def test_garbage_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    path = _saved(_noise(), tmp_path / "x.jpg", exif=b"Exif\x00\x00this is no TIFF header", quality=95)
    assert decode(path).size == (12, 8)


@pytest.mark.parametrize("factor", [1.5, 3])
def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    path = _saved(Image.new("RGB", (100, 100)), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 * 100 / factor))
    with pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning), match="exceeds limit"):
        decode(path)


def test_slivers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2000 x 1 pixels: one side is more than 100 times the other"):
        decode(_saved(Image.new("RGB", (2000, 1)), tmp_path / "x.png"))


def test_formats_that_start_programs_or_never_decode_are_not_read(tmp_path: Path) -> None:
    extensions = image_extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".gif", ".bmp"} <= set(extensions)
    assert not {".eps", ".ps", ".mpg", ".h5", ".pdf", ".txt", ".json"} & set(extensions)
    disguised = tmp_path / "x.jpg"
    Image.new("RGB", (4, 4)).save(disguised, format="EPS")
    with pytest.raises(Image.UnidentifiedImageError):
        decode(disguised)
