"""Every kind of image file comes out as a viewer shows it, or one error says why it cannot be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from collapse_probe.errors import ImageFileError
from collapse_probe.loading.decode import decode, image_extensions
from tests.loading.broken_images import BOMBS, BROKEN, encoded, noise, png, write

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


def test_16_bit_colours_lose_their_lower_byte(tmp_path: Path) -> None:
    values = np.array([[[0, 255, 256], [32768, 65279, 65535]]], dtype=">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "x.png").write_bytes(png(2, 1, rows, depth=16))
    assert np.asarray(decode(tmp_path / "x.png")).tolist() == [[[0, 0, 1], [128, 254, 255]]]


def test_the_transparent_value_of_16_bit_grey_is_white(tmp_path: Path) -> None:
    values = np.array([[0, 1000, 1001]], dtype=np.uint16)
    path = _saved(Image.fromarray(values), tmp_path / "x.png", transparency=1000)
    assert np.asarray(decode(path))[0, :, 0].tolist() == [0, 255, 4]


def test_float_pixels(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert np.asarray(decode(_saved(Image.fromarray(values), tmp_path / "x.tiff")))[0, :, 0].tolist() == [0, 128, 255]
    for broken in (values * 300, values - 1, values * np.nan):
        with pytest.raises(ImageFileError, match=r"outside 0..1"):
            decode(_saved(Image.fromarray(broken), tmp_path / "x.tiff"))


def test_wide_integers_have_no_range(tmp_path: Path) -> None:
    values = np.array([[0, 70_000]], dtype=np.int32)
    with pytest.raises(ImageFileError, match=r"outside 0..65535"):
        decode(_saved(Image.fromarray(values), tmp_path / "x.tiff"))


def test_cmyk(tmp_path: Path) -> None:
    for name in ("x.tiff", "x.jpg"):  # in JPEGs inverted, as Adobe does it
        path = _saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / name)
        assert decode(path).getpixel((8, 8)) == pytest.approx(RED, abs=3)


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
    with pytest.raises(ImageFileError, match=f"more than {int(10_000 / factor)} pixels.* decompression bomb"):
        decode(path)


@pytest.mark.parametrize("size", [(2000, 1), (1, 101)])
def test_slivers(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ImageFileError, match=f"{size[0]} x {size[1]} pixels: one side is more than 100 times"):
        decode(_saved(Image.new("RGB", size), tmp_path / "x.png"))


@pytest.mark.parametrize("size", [(1, 1), (100, 1), (1, 100)])
def test_the_smallest_pictures(tmp_path: Path, size: tuple[int, int]) -> None:
    read = decode(_saved(Image.new("RGB", size, RED), tmp_path / "x.png"))
    assert read.size == size
    assert read.getpixel((0, 0)) == RED


def test_formats_that_start_programs_or_never_decode_are_not_read(tmp_path: Path) -> None:
    extensions = image_extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".gif", ".bmp"} <= set(extensions)
    assert not {".eps", ".ps", ".mpg", ".h5", ".fits", ".pdf", ".txt", ".json"} & set(extensions)
    disguised = tmp_path / "x.jpg"
    Image.new("RGB", (4, 4)).save(disguised, format="EPS")
    with pytest.raises(ImageFileError, match="no picture of a format that is read"):
        decode(disguised)


# -- broken files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_have_a_reason_without_their_path(tmp_path: Path, name: str) -> None:
    content, fragment = BROKEN[name]
    write(tmp_path, {name: BROKEN[name]})
    with pytest.raises(ImageFileError, match=fragment) as caught:
        decode(tmp_path / name)
    assert (tmp_path / name).read_bytes() == content
    assert str(tmp_path) not in str(caught.value)
    assert str(caught.value).isprintable()


_MEMORY = """
import resource, sys
from pathlib import Path
from collapse_probe.errors import ImageFileError
from collapse_probe.loading.decode import decode
folder = Path(sys.argv[1])
decode(folder / "good.png")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(folder.iterdir()):
    try:
        decode(path)
        print(path.name, "decoded")
    except ImageFileError as error:
        print(path.name, error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_are_refused_before_memory_is_spent(tmp_path: Path) -> None:
    write(tmp_path, {**BOMBS, "good.png": (encoded(noise(), "PNG"), "decoded")})
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    *lines, grown = done.stdout.splitlines()
    for name, (_, fragment) in BOMBS.items():
        assert any(line.startswith(f"{name} ") and fragment in line for line in lines), name
    assert "good.png decoded" in lines
    assert int(grown) < 100  # MiB; the smallest bomb would take 3.6 GB


@pytest.mark.parametrize(
    ("error", "fragment"),
    [
        (KeyError("mode"), "cannot be decoded: KeyError 'mode'"),
        (IndexError(), "cannot be decoded: IndexError$"),
        (SyntaxError("broken \x1b[31m chunk"), r"cannot be decoded: broken �\[31m chunk"),
        (OSError("image file is truncated"), "cannot be decoded: image file is truncated$"),
        (PermissionError(13, "Permission denied"), "the file cannot be read: Permission denied$"),
        (OSError(5, "Input/output error", "a.png"), "the file cannot be read: Input/output error$"),
        (MemoryError(), "does not fit into memory"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError"),
        (ValueError("x" * 1000), "^the picture cannot be decoded: x{200}$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_whatever_a_decoder_raises_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, fragment: str
) -> None:
    path = _saved(_noise(), tmp_path / "x.png")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    with pytest.raises(ImageFileError, match=fragment):
        decode(path)


def test_interruption_is_no_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode(_saved(_noise(), tmp_path / "x.png"))


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to("gone")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for path, fragment in (
        (tmp_path / "dangling.png", "no such file"),
        (tmp_path / "loop.png", "symbolic links"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / ("y/" * 3000), "File name too long"),
        (tmp_path / "\0.png", "null byte"),
    ):
        with pytest.raises(ImageFileError, match=fragment) as caught:
            decode(path)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(tmp_path: Path) -> None:
    path = _saved(_noise(), tmp_path / "x.png")
    path.chmod(0)
    with pytest.raises(ImageFileError, match="cannot be read: Permission denied"):
        decode(path)


# -- mutated files -----------------------------------------------------------------------------------------------------

_WHOLE = {
    "JPEG": (encoded(noise(), "JPEG"), encoded(noise().convert("CMYK"), "JPEG"),
             encoded(noise(), "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")),
    "PNG": (encoded(noise(), "PNG"), encoded(noise().quantize(7), "PNG", transparency=3),
            encoded(noise(), "PNG", save_all=True, append_images=[noise(seed=1)])),
    "GIF": (encoded(noise().quantize(9), "GIF"),
            encoded(noise(), "GIF", save_all=True, append_images=[noise(seed=1)])),
    "WEBP": (encoded(noise(), "WEBP"), encoded(noise().convert("RGBA"), "WEBP", lossless=True)),
    "TIFF": (encoded(noise(), "TIFF"), encoded(noise(), "TIFF", compression="tiff_lzw"),
             encoded(noise().convert("I"), "TIFF")),
    "BMP": (encoded(noise(), "BMP"), encoded(noise().quantize(16), "BMP")),
}  # fmt: skip


def _mutated(whole: bytes, draw: st.DataObject) -> bytes:
    """Bits flipped, the end cut off, or a piece put elsewhere."""
    place = st.integers(0, len(whole) - 1) | st.integers(0, 80)  # headers are where it matters
    content = bytearray(whole)
    for _ in range(draw.draw(st.integers(1, 4))):
        kind = draw.draw(st.sampled_from(["flip", "byte", "cut", "splice"]))
        at = min(draw.draw(place), len(content) - 1)
        if kind == "flip":
            content[at] ^= 1 << draw.draw(st.integers(0, 7))
        elif kind == "byte":
            content[at] = draw.draw(st.sampled_from([0, 1, 127, 128, 255]))
        elif kind == "cut":
            del content[max(at, 1) :]
        else:
            start, length = draw.draw(place), draw.draw(st.integers(1, 64))
            content[at:at] = whole[start : start + length]
    return bytes(content)


def _survives(path: Path, kind: str, data: st.DataObject) -> None:
    path.write_bytes(_mutated(data.draw(st.sampled_from(_WHOLE[kind])), data))
    reason = None
    try:
        read = decode(path)
    except ImageFileError as error:
        reason = str(error)
    if reason is None:
        assert read.mode == "RGB"
        assert 0 < read.width * read.height <= 1 << 20
    else:
        assert reason
        assert str(path) not in reason


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one mutated header cannot ask for hundreds of megabytes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)


@pytest.fixture(scope="module")
def mutant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutants") / "x.jpg"


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("kind", _WHOLE)
def test_whole_files_are_read(mutant: Path, kind: str) -> None:
    for whole in _WHOLE[kind]:
        mutant.write_bytes(whole)
        assert decode(mutant).size == (40, 30)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("kind", _WHOLE)
def test_mutated_files_are_read_or_refused(mutant: Path, kind: str) -> None:
    @settings(max_examples=60, derandomize=True, deadline=None, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        _survives(mutant, kind, data)

    check()


@pytest.mark.sweep
@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("kind", _WHOLE)
def test_thousands_of_mutated_files_are_read_or_refused(mutant: Path, kind: str) -> None:
    @settings(max_examples=5000, derandomize=True, deadline=None, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        _survives(mutant, kind, data)

    check()


def test_tiff_of_16_bits_that_are_not_scaled(tmp_path: Path) -> None:
    """White as zero, and 12 bits: Pillow hands both out as they are."""
    path = tmp_path / "grey.tif"
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(path)
    assert decode(path).getpixel((0, 0)) == (16, 16, 16)
    whole = path.read_bytes()
    for tag, value in ((262, 0), (258, 12)):  # a short: tag, type 3, count 1, value
        entry = tag.to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
        at = whole.index(entry) + len(entry)
        path.write_bytes(whole[:at] + value.to_bytes(2, "little") + whole[at + 2 :])
        with pytest.raises(ImageFileError, match="a TIFF of other than 16 bits, or with white as zero"):
            decode(path)
