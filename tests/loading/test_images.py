"""Folders, tensors and loaders as one kind of source: order, index, shards, skipping, sizes, workers."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from collapse_probe.errors import ImagesError, UsageError
from collapse_probe.loading import ImageSource, check_skipped, open_images
from collapse_probe.loading.folder import list_images
from collapse_probe.shards import Shard
from tests.loading.broken_images import BOMBS, BROKEN, write

CONFIG = {
    "input_size": (3, 8, 8),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def _picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures, nested and not."""
    for number in range(10):
        _picture(tmp_path / "images" / ("" if number < 4 else f"class{number % 3}") / f"{number}.png", number)
    return tmp_path / "images"


def _all(source: ImageSource) -> torch.Tensor:
    return torch.cat([batch.images for batch in source.batches()])


def _open(source: Any, **kwargs: Any) -> ImageSource:
    return open_images(source, config=CONFIG, **kwargs)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_order_hangs_on_seed_and_relative_path(folder: Path) -> None:
    source = _open(folder, seed=3)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.png")]
    expected = sorted(names, key=lambda name: hashlib.blake2b(f"3:{name}".encode(), digest_size=16).digest())
    assert source.paths == expected
    assert source.count == 10
    assert _open(folder, seed=4).paths != expected
    assert _open(folder, seed=3, num_samples=4).paths == expected[:4]
    assert _open(folder, num_samples=99).count == 10


def test_order_does_not_hang_on_the_listing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _open(folder).paths
    walk = os.walk

    def reversed_walk(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for root, folders, names in walk(*args, **kwargs):
            folders.reverse()
            yield root, folders, names[::-1]

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert _open(folder).paths == expected


def test_batches_hold_the_pixels_of_the_files(folder: Path) -> None:
    source = _open(folder, batch_size=4)
    batches = list(source.batches())
    assert [len(batch.images) for batch in batches] == [4, 4, 2]
    images = torch.cat([batch.images for batch in batches])
    assert images.shape == (10, 3, 8, 8)
    for image, path in zip(images, source.paths, strict=True):
        # The shorter side, 10 pixels, becomes 8; then the centre is cut out.
        resized = Image.open(folder / path).resize((9, 8), Image.Resampling.BICUBIC)
        expected = np.asarray(resized, dtype=np.float32)[:, 0:8] / 127.5 - 1
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() < 1e-5
    assert torch.equal(images, _all(source))  # a second pass gives the same


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_does_not_change_images(folder: Path, batch_size: int) -> None:
    assert torch.equal(_all(_open(folder, batch_size=batch_size)), _all(_open(folder)))


def test_workers_do_not_change_results_and_end_when_closed_early(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    one, two = _open(folder, batch_size=2), _open(folder, batch_size=2, workers=2)
    assert torch.equal(_all(one), _all(two))
    assert one.skipped == two.skipped != []
    before = set(multiprocessing.active_children())
    batches = two.batches()
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    deadline = time.monotonic() + 5
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not set(multiprocessing.active_children()) - before


def test_dataset_can_be_sent_to_a_spawned_worker(folder: Path) -> None:
    loader = DataLoader(_open(folder).dataset(), num_workers=1, batch_size=None, multiprocessing_context="spawn")
    assert len(list(loader)) == 10


def test_hidden_files_and_others_are_left_out(folder: Path) -> None:
    expected = _open(folder).paths
    _picture(folder / ".hidden.png", 50)
    _picture(folder / ".thumbnails" / "a.png", 51)
    (folder / "labels.csv").write_text("a,b")
    _picture(folder / "UPPER.PNG", 52)
    source = _open(folder)
    assert sorted(source.paths) == sorted([*expected, "UPPER.PNG"])
    assert source.describe()["other_files"] == 1


def test_links_are_followed_and_loops_end(folder: Path, tmp_path: Path) -> None:
    _picture(tmp_path / "elsewhere" / "linked.png", 60)
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "class0" / "up").symlink_to(folder)
    found, _ = list_images(folder)
    assert len(found) == 11
    assert "more/linked.png" in found


def test_pipes_are_not_opened_and_dangling_links_are_reported(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "dangling.png").symlink_to(folder / "gone")
    source = _open(folder)
    assert len(_all(source)) == 10
    assert [entry["path"] for entry in source.skipped] == ["dangling.png"]
    assert "no such file" in source.skipped[0]["reason"]


def test_links_to_themselves_are_reported(folder: Path) -> None:
    (folder / "a.png").symlink_to("b.png")
    (folder / "b.png").symlink_to("a.png")
    source = _open(folder)
    assert len(_all(source)) == 10
    assert sorted(entry["path"] for entry in source.skipped) == ["a.png", "b.png"]
    assert all("symbolic links" in entry["reason"] for entry in source.skipped)


def test_files_that_are_gone_since_they_were_listed(folder: Path) -> None:
    source = _open(folder)
    gone = source.paths[4]
    (folder / gone).unlink()
    assert len(_all(source)) == 9
    assert source.skipped == [{"path": gone, "reason": "no such file: it is gone, or a link leads nowhere"}]


def test_folders_that_are_gone_since_they_were_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = os.walk

    def vanishing(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for root, folders, names in walk(*args, **kwargs):
            if root != str(folder):
                shutil.rmtree(root)
            yield root, folders, names

    monkeypatch.setattr(os, "walk", vanishing)
    source = _open(folder)
    assert len(_all(source)) == 4  # those in the root
    assert {entry["path"] for entry in source.skipped} == {"class0/", "class1/", "class2/"}
    assert all(entry["reason"].startswith("no such file") for entry in source.skipped)


def test_folders_that_may_not_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir, lists = os.scandir, []

    def guarded(path: str) -> Any:  # root would be let through
        lists.append(str(path))
        if str(path).endswith(forbidden):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    forbidden = "class1"
    source = _open(folder)
    assert len(_all(source)) == 8
    assert [entry["path"] for entry in source.skipped] == ["class1/"]
    assert source.folders == ["", "class0", "class1", "class2"]
    forbidden = str(folder)
    with pytest.raises(ImagesError, match=r"Cannot list .*: Permission denied"):
        _open(folder)


def test_files_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _open(folder)
    forbidden = source.paths[2]
    opened = Image.open

    def guarded(path: Path, **kwargs: Any) -> Image.Image:  # root would be let through
        if path == folder / forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, **kwargs)

    monkeypatch.setattr(Image, "open", guarded)
    assert len(_all(source)) == 9
    assert source.skipped == [{"path": forbidden, "reason": "the file cannot be read: Permission denied"}]


def test_the_longest_names(folder: Path) -> None:
    _picture(folder / ("ä" * 125 + ".png"), 70)  # 254 bytes of the 255 that a name may have
    deep = folder
    while len(str(deep)) < 3900:
        deep /= "d" * 100
    deep.mkdir(parents=True)
    deep /= "e" * (4090 - len(str(deep)))  # fits in itself, and nothing beneath does
    deep.mkdir()
    here = os.open(deep, os.O_DIRECTORY)
    try:
        os.close(os.open("too_long.png", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    finally:
        os.close(here)
    _picture(deep.parent / "deep.png", 71)
    source = _open(folder)
    assert len(_all(source)) == 12
    assert [(Path(entry["path"]).name, entry["reason"]) for entry in source.skipped] == [
        ("too_long.png", "the file cannot be read: File name too long")
    ]


@pytest.mark.parametrize(
    "name", ["日本 🐈‍⬛.png", "a\nb.png", "[bold red]x[/].png", "\x1b[31mred.png", "‮gnp.png", "'\"$(x) .png"]
)
def test_strange_names_are_read_and_skipped_like_others(folder: Path, name: str) -> None:
    _picture(folder / name, 72)
    assert len(_all(_open(folder))) == 11
    (folder / name).write_bytes(b"no picture")
    source = _open(folder)
    assert len(_all(source)) == 10
    assert source.skipped == [{"path": name, "reason": "no picture of a format that is read"}]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_broken_file_is_skipped_with_its_reason(folder: Path, workers: int) -> None:
    write(folder / "broken", {**BROKEN, **BOMBS})
    source = _open(folder, workers=workers)
    assert len(_all(source)) == 10
    reasons = {entry["path"]: entry["reason"] for entry in source.skipped}
    assert reasons.keys() == {f"broken/{name}" for name in {**BROKEN, **BOMBS}}
    for name, (_, fragment) in {**BROKEN, **BOMBS}.items():
        assert fragment in reasons[f"broken/{name}"]


def test_an_error_of_ours_is_no_broken_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> Any:
        raise ZeroDivisionError

    source = _open(folder)
    monkeypatch.setattr("collapse_probe.loading.folder.make_transform", lambda _: wrong)
    with pytest.raises(ZeroDivisionError):
        _all(source)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(1, 1), (100, 1), (1, 100)])
def test_the_smallest_pictures_become_images(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "a.png")
    config = {**CONFIG, "crop_mode": mode, "crop_pct": 0.9, "input_size": (3, 200, 200)}
    images = _all(open_images(tmp_path, config=config))
    assert images.shape == (1, 3, 200, 200)
    assert images[0, 0, 100, 100] == 1


def test_a_sliver_that_resizing_would_leave_without_width_is_skipped(folder: Path) -> None:
    Image.new("RGB", (100, 1)).save(folder / "sliver.png")
    source = open_images(folder, config={**CONFIG, "crop_mode": "border"})
    assert len(_all(source)) == 10
    assert source.skipped[0]["path"] == "sliver.png"
    assert source.skipped[0]["reason"].startswith("100 x 1 pixels cannot be resized: ")


def test_names_that_are_no_utf8(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png")).write_bytes((folder / "0.png").read_bytes())
    source = _open(folder)
    assert len(_all(source)) == 11
    json.dumps(source.describe())


def test_unreadable_files_are_skipped_with_path_and_reason(folder: Path) -> None:
    (folder / "zero.png").write_bytes(b"")
    (folder / "class1" / "text.jpg").write_text("this is no picture")
    whole = (folder / "1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    clean = _open(folder)
    clean.paths = [path for path in clean.paths if Path(path).name not in ("zero.png", "text.jpg", "cut.png")]
    source = _open(folder, batch_size=3)
    assert torch.equal(_all(source), _all(clean))
    assert {entry["path"] for entry in source.skipped} == {"zero.png", "class1/text.jpg", "cut.png"}
    assert all(entry["reason"] and str(folder) not in entry["reason"] for entry in source.skipped)
    assert source.count == 13
    assert source.delivered == source.describe()["count"] == 10
    list(source.batches())
    assert len(source.skipped) == 3  # counted per pass


def test_too_many_skipped(folder: Path) -> None:
    source = _open(folder)
    list(source.batches())
    check_skipped(source)
    (folder / "zero.png").write_bytes(b"")
    source = _open(folder)
    list(source.batches())
    check_skipped(source, allowed=0.1)
    with pytest.raises(
        ImagesError, match=r"1 of 11 images could not be read, more than 1%: zero.png: the file is empty"
    ):
        check_skipped(source)


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ImagesError, match=r"The folder delivered no readable image. a.png: the file is empty"):
        list(_open(tmp_path).batches())


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="does not exist; expected a folder of images"):
        _open(tmp_path / "missing")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ImagesError, match=r"holds no image: of its 1 files none has one of the \d+ extensions .*\.jpg"):
        _open(tmp_path)
    with pytest.raises(ImagesError, match="is a file; expected a folder"):
        _open(tmp_path / "a.txt")
    with pytest.raises(ImagesError, match="Cannot read"):
        _open("x" * 5000)


def test_one_channel(folder: Path) -> None:
    config = {**CONFIG, "input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    assert _all(open_images(folder, config=config)).shape == (10, 1, 8, 8)
    with pytest.raises(ImagesError, match="Image files give 1 or 3 channels and the model takes 4"):
        open_images(folder, config={**CONFIG, "input_size": (4, 8, 8)})


def test_description_of_a_folder(folder: Path) -> None:
    source = _open(str(folder), num_samples=5, seed=2)
    assert source.describe() == {
        "kind": "folder",
        "count": 5,
        "skipped": [],
        "order": "blake2b of seed (2) and relative path",
        "preprocessing": CONFIG,
        "root": str(folder),
        "other_files": 0,
        "seed": 2,
        "decoding": "EXIF rotation applied, transparency composited on white, 16 bits scaled to 8, first frame of "
        "animations, colour profiles not applied",
    }
    assert _open(str(folder), num_samples=5, seed=2, shard=Shard(3, 4)).describe() == {
        **source.describe(),
        "count": 0,
        "shard": "3/4",
    }


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_tensor_order_hangs_on_content_alone() -> None:
    images = torch.randn(9, 3, 8, 8)
    source = _open(images, batch_size=4)
    assert [len(batch.images) for batch in source.batches()] == [4, 4, 1]
    got = _all(source)
    assert torch.equal(got, images[source.indices])
    assert sorted(source.indices) == list(range(9))
    assert torch.equal(got, _all(_open(images[torch.randperm(9)])))
    assert torch.equal(got[:5], _all(_open(images.flip(0), num_samples=5)))
    assert not torch.equal(got, _all(_open(images, seed=1)))
    assert source.count == 9
    assert source.describe()["kind"] == "tensor"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_keep_their_precision(dtype: torch.dtype) -> None:
    images = torch.randn(3, 3, 8, 8, dtype=dtype, requires_grad=True)
    got = _all(_open(images))
    assert got.dtype == dtype
    assert not got.requires_grad


@pytest.mark.parametrize(
    ("shape", "fragment"),
    [
        ((2, 1, 8, 8), r"delivered images of size \(1, 8, 8\) .*; the model takes \(3, 8, 8\)"),
        ((2, 3, 16, 8), r"delivered images of size \(3, 16, 8\)"),
        ((3, 8, 8), r"shape \[3, 8, 8\]; expected \[images, channels, height, width\]"),
        ((0, 3, 8, 8), "The tensor holds no image"),
    ],
)
def test_tensors_that_do_not_fit(shape: tuple[int, ...], fragment: str) -> None:
    with pytest.raises(ImagesError, match=fragment):
        _open(torch.zeros(shape))


def test_raw_bytes_are_not_normalised_images() -> None:
    with pytest.raises(ImagesError, match=r"of type torch.uint8; expected floats"):
        _open(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_a_model_that_states_no_size_takes_any_tensor_and_no_folder(folder: Path) -> None:
    images = torch.randn(3, 5, 7, 9)
    assert sorted(map(torch.sum, _all(open_images(images, config={})))) == sorted(map(torch.sum, images))
    with pytest.raises(UsageError, match="the model does not say how it wants its images: give img_size"):
        open_images(folder, config={})


# -- loaders -----------------------------------------------------------------------------------------------------------

IMAGES = torch.arange(10 * 3 * 8 * 8, dtype=torch.float32).reshape(10, 3, 8, 8)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda images: images,
        lambda images: (images, torch.zeros(len(images))),
        lambda images: [images, "label"],
        lambda images: {"pixel_values": images, "labels": 0},
        lambda images: {"image": images},
        lambda images: {"images": images},
    ],
)
def test_every_usual_item(wrap: Any) -> None:
    source = _open([wrap(IMAGES[:6]), wrap(IMAGES[6:])])
    assert torch.equal(_all(source), IMAGES)
    assert source.count is None
    assert source.describe()["count"] == 10


@pytest.mark.parametrize("number", [1, 3, 4, 5, 10, 99])
def test_loader_is_cut_at_num_samples(number: int) -> None:
    taken: list[int] = []

    def loader() -> Iterator[torch.Tensor]:
        for start in range(0, 10, 4):
            taken.append(start)
            yield IMAGES[start : start + 4]

    source = _open(loader(), num_samples=number)
    assert torch.equal(_all(source), IMAGES[:number])
    assert taken == list(range(0, min(number, 10), 4))  # no batch more than needed is asked for


def test_inputs_of_another_shape_are_cut_at_num_samples_too() -> None:
    tokens = torch.randn(10, 5, 48)
    source = open_images([tokens[:4], tokens[4:8], tokens[8:]], config={}, num_samples=6)
    assert torch.equal(_all(source), tokens[:6])
    assert source.delivered == 6


def test_count_of_a_data_loader() -> None:
    data = TensorDataset(IMAGES)
    assert _open(DataLoader(data, batch_size=4)).count == 10
    assert _open(DataLoader(data, batch_size=4), num_samples=7).count == 7
    assert _open(DataLoader(data, batch_size=4, drop_last=True)).count == 8
    assert len(_all(_open(DataLoader(data, batch_size=4, drop_last=True)))) == 8

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(IMAGES)

    assert _open(DataLoader(Stream(), batch_size=4)).count is None


@pytest.mark.parametrize(
    ("item", "fragment"),
    [
        ("text", "delivered a str; expected a tensor"),
        ((), "delivered a tuple"),
        ({"x": IMAGES}, "delivered a mapping with 'x'; expected a tensor under one of 'pixel_values'"),
        ({"image": [1]}, "delivered a mapping with 'image'"),
        (IMAGES[0], r"shape \[3, 8, 8\].*Batch single images with torch.utils.data.DataLoader"),
        (IMAGES[:, :1], r"size \(1, 8, 8\)"),
    ],
)
def test_items_that_are_no_images(item: Any, fragment: str) -> None:
    with pytest.raises(ImagesError, match=fragment):
        list(_open(itertools.repeat(item, 2), num_samples=2).batches())


def test_exhausted_loader() -> None:
    source = _open(iter([IMAGES]))
    list(source.batches())
    with pytest.raises(ImagesError, match="The loader delivered no readable image"):
        list(source.batches())


# -- index and shards --------------------------------------------------------------------------------------------------

UNREADABLE = {3, 8, 17, 18, 40}


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 files: number n is a flat picture of grey n, and five are no pictures."""
    root = tmp_path_factory.mktemp("numbered")
    for number in range(45):
        if number in UNREADABLE:
            (root / f"{number}.png").write_bytes(b"no picture")
        else:
            Image.new("RGB", (9, 9), (number, number, number)).save(root / f"{number}.png")
    return root


def _reference_order(names: list[str], seed: int = 0) -> list[str]:
    return sorted(names, key=lambda name: hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest())


def _reference_owned(indices: list[int], number: int, count: int) -> list[int]:
    """Which of the indices a shard has, eight neighbours at a time."""
    units = [range(start, start + 8) for start in range(0, max(indices, default=0) + 1, 8)]
    own = {index for unit in units[number - 1 :: count] for index in unit}
    return [index for index in indices if index in own]


def _numbers_by_index(source: ImageSource, scale: float = 1, offset: float = 0) -> list[tuple[int, int]]:
    """The index of every image as delivered, and the number that all its pixels tell."""
    pairs = []
    for batch in source.batches():
        assert batch.index.dtype == torch.int64
        assert batch.index.device.type == "cpu"
        assert batch.index.shape == (len(batch.images),)
        for index, image in zip(batch.index.tolist(), batch.images, strict=True):
            number = image.double() * scale + offset
            assert (number - number.mean()).abs().max() < 1e-3
            pairs.append((index, round(float(number.mean()))))
    return pairs


def _grey(source: ImageSource) -> list[tuple[int, int]]:
    """As :func:`_numbers_by_index`, for the pictures of `numbered`."""
    return _numbers_by_index(source, 127.5, 127.5)


def _lengths(source: ImageSource) -> list[int]:
    return [len(batch.images) for batch in source.batches()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("num_samples", [None, 20])
def test_index_of_a_file_is_its_place_in_the_order(
    numbered: Path, batch_size: int, workers: int, num_samples: int | None
) -> None:
    names = _reference_order([f"{number}.png" for number in range(45)])[:num_samples]
    expected = [(index, int(Path(name).stem)) for index, name in enumerate(names)]
    expected = [(index, number) for index, number in expected if number not in UNREADABLE]
    assert len(expected) < len(names)
    source = _open(numbered, batch_size=batch_size, workers=workers, num_samples=num_samples)
    assert _grey(source) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 20])
@pytest.mark.parametrize(("batch_size", "workers", "num_samples"), [(1, 0, None), (5, 0, 29), (16, 2, None)])
def test_shards_of_a_folder(numbered: Path, count: int, batch_size: int, workers: int, num_samples: int | None) -> None:
    if workers and count not in (2, 20):
        workers = 0  # starting them takes its time
    arguments = {"batch_size": batch_size, "num_samples": num_samples}
    whole = _grey(_open(numbered, **arguments))
    total = num_samples or 45
    skipped = []
    for number in range(1, count + 1):
        source = _open(numbered, workers=workers, shard=Shard(number, count), **arguments)
        files = _reference_owned(list(range(total)), number, count)
        assert (source.count, source.total) == (len(files), total)
        expected = [(index, grey) for index, grey in whole if index in files]
        assert _grey(source) == expected
        assert source.delivered == source.describe()["count"] == len(expected)
        assert len(source.skipped) == len(files) - len(expected)
        assert source.describe().get("shard") == (None if count == 1 else f"{number}/{count}")
        skipped += [entry["path"] for entry in source.skipped]
    reference = _open(numbered, **arguments)
    list(reference.batches())
    assert sorted(skipped) == sorted(entry["path"] for entry in reference.skipped)
    assert skipped


def test_a_shard_opens_its_own_files_only(numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def watched(path: Path, channels: int) -> Image.Image:
        opened.append((path.name, channels))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("collapse_probe.loading.folder.decode", watched)
    assert _lengths(_open(numbered, batch_size=7, shard=Shard(2, 3))) == [7, 7, 2]
    names = _reference_order([f"{number}.png" for number in range(45)])
    assert opened == [(name, 3) for name in names[8:16] + names[32:40]]


@given(
    total=st.integers(1, 50),
    count=st.integers(1, 9),
    batch_size=st.integers(1, 20),
    num_samples=st.none() | st.integers(1, 60),
    seed=st.integers(0, 3),
)
def test_shards_of_a_tensor(total: int, count: int, batch_size: int, num_samples: int | None, seed: int) -> None:
    images = torch.arange(total, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 8, 8)
    content = [hashlib.blake2b(f"{seed}:".encode() + image.numpy().tobytes(), digest_size=16).digest()
               for image in images.contiguous()]  # fmt: skip
    order = sorted(range(total), key=content.__getitem__)[:num_samples]
    for number in range(1, count + 1):
        source = _open(images, batch_size=batch_size, num_samples=num_samples, seed=seed, shard=Shard(number, count))
        own = _reference_owned(list(range(len(order))), number, count)
        assert _numbers_by_index(source) == [(index, order[index]) for index in own]
        assert (source.count, source.total) == (len(own), len(order))
        # Every batch is full but the last.
        assert _lengths(source) == [len(own[start : start + batch_size]) for start in range(0, len(own), batch_size)]


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=9),
    count=st.integers(2, 6),
    num_samples=st.none() | st.integers(1, 60),
)
def test_shards_of_a_loader(sizes: list[int], count: int, num_samples: int | None) -> None:
    images = torch.arange(sum(sizes), dtype=torch.float64)[:, None, None, None].expand(-1, 3, 8, 8)
    items = list(images.split(sizes))
    total = min(sum(sizes), num_samples or sum(sizes))
    if total:
        whole = _open(items, num_samples=num_samples)
        assert _numbers_by_index(whole) == [(index, index) for index in range(total)]
        assert _lengths(whole) == [len(item) for item in items][: len(_lengths(whole))][:-1] + _lengths(whole)[-1:]
    for number in range(1, count + 1):
        source = _open(items, num_samples=num_samples, shard=Shard(number, count))
        own = _reference_owned(list(range(total)), number, count)
        assert _numbers_by_index(source) == [(index, index) for index in own]
        assert (source.count, source.total) == (None, None)
        assert source.delivered == source.describe()["count"] == len(own)
        assert all(0 < length <= max(sizes) for length in _lengths(source))


@pytest.mark.parametrize(("batch_size", "lengths"), [(1, [1] * 20), (3, [3] * 6 + [2]), (16, [16, 4]), (64, [20])])
def test_a_shard_of_a_data_loader_has_batches_of_the_loaders_size(batch_size: int, lengths: list[int]) -> None:
    loader = DataLoader(TensorDataset(IMAGES[:1].expand(60, -1, -1, -1)), batch_size=batch_size)
    source = _open(loader, shard=Shard(3, 3), num_samples=44)
    assert (source.count, source.total) == (44 - 2 * 16, 44)
    source = _open(loader, shard=Shard(2, 3))
    assert (source.count, source.total) == (20, 60)
    assert _lengths(source) == lengths


def test_a_shard_of_a_loader_asks_for_no_batch_more_than_needed_and_keeps_sizes_apart() -> None:
    taken: list[int] = []

    def loader() -> Iterator[torch.Tensor]:
        for start in range(0, 40, 6):
            taken.append(start)
            yield torch.zeros(6, 3, 8, 8 if start < 12 else 9)

    source = open_images(loader(), config={}, num_samples=23, shard=Shard(1, 2))
    batches = list(source.batches())
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2, 3, 4, 5], [6, 7], [16, 17, 18, 19, 20, 21], [22]]
    assert [batch.images.shape[3] for batch in batches] == [8, 8, 9, 9]
    assert taken == [0, 6, 12, 18]


def test_what_another_shard_takes_is_checked_too() -> None:
    with pytest.raises(ImagesError, match=r"delivered images of size \(1, 8, 8\)"):
        list(_open([IMAGES[:8], IMAGES[:8, :1], IMAGES[:8]], shard=Shard(1, 2)).batches())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_without_images_delivers_none(numbered: Path, workers: int) -> None:
    for given_images in (numbered, IMAGES, [IMAGES], iter([])):
        source = _open(given_images, workers=workers, shard=Shard(7, 7))
        assert list(source.batches()) == []
        check_skipped(source)
        assert source.describe()["count"] == source.delivered == 0


def test_a_shard_of_unreadable_files_delivers_none(tmp_path: Path) -> None:
    for number in range(20):
        _picture(tmp_path / f"{number}.png", number)
    order = _open(tmp_path).paths
    for name in order[8:16]:
        (tmp_path / name).write_bytes(b"")
    source = _open(tmp_path, batch_size=3, shard=Shard(2, 3))
    assert list(source.batches()) == []
    assert [entry["path"] for entry in source.skipped] == order[8:16]
    assert source.count == 8
    assert source.describe()["count"] == 0
    check_skipped(source, allowed=0.4)
    with pytest.raises(ImagesError, match=r"8 of 20 images could not be read in shard 2/3 alone, more than 39%"):
        check_skipped(source, allowed=0.39)


def test_a_shard_fails_only_where_the_whole_would(tmp_path: Path) -> None:
    for number in range(120):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    order = _open(tmp_path).paths
    (tmp_path / order[9]).write_bytes(b"")
    few = _open(tmp_path, shard=Shard(2, 15))
    assert len(list(few.batches())) == 1
    assert (few.delivered, len(few.skipped)) == (7, 1)  # of its own images an eighth, of all less than a hundredth
    check_skipped(few)
    # Two of 120 are too many: a shard that has both says so, shards with one each leave it to the whole.
    (tmp_path / order[100]).write_bytes(b"")
    for shard in (Shard(2, 15), Shard(13, 15)):
        source = _open(tmp_path, shard=shard)
        list(source.batches())
        check_skipped(source)
    for shard, where in ((Shard(), ""), (Shard(2, 11), " in shard 2/11 alone")):
        source = _open(tmp_path, shard=shard)
        list(source.batches())
        with pytest.raises(ImagesError, match=f"^2 of 120 images could not be read{where}, more than 1%"):
            check_skipped(source)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number, 1 or more"),
        ({"num_samples": 0}, "num_samples=0 must be a whole number, 1 or more"),
        ({"workers": -1}, "workers=-1 must be a whole number, 0 or more"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UsageError, match=fragment):
        _open(IMAGES, **arguments)


@pytest.mark.parametrize("source", [3, None, {"image": IMAGES}, b"folder"])
def test_sources_of_no_known_kind(source: Any) -> None:
    with pytest.raises(
        UsageError, match=r"Images cannot be a .*: give a folder, a tensor \[N, C, H, W\] or a DataLoader"
    ):
        _open(source)
