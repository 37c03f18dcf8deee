"""Folders, tensors and loaders as one kind of source: order, skipping, sizes, workers."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from collapse_probe.errors import ImagesError, UsageError
from collapse_probe.loading import ImageSource, check_skipped, open_images
from collapse_probe.loading.folder import list_images

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
    return torch.cat(list(source.batches()))


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
    assert [len(batch) for batch in batches] == [4, 4, 2]
    images = torch.cat(batches)
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
    assert "FileNotFoundError" in source.skipped[0]["reason"]


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
    with pytest.raises(ImagesError, match=r"1 of 11 images could not be read, more than 1%: zero.png: Unidentified"):
        check_skipped(source)


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ImagesError, match=r"The folder delivered no readable image. a.png: UnidentifiedImageError"):
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
    }


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_tensor_order_hangs_on_content_alone() -> None:
    images = torch.randn(9, 3, 8, 8)
    source = _open(images, batch_size=4)
    assert [len(batch) for batch in source.batches()] == [4, 4, 1]
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
