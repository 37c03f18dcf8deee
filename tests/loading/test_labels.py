"""Classes of files where names tell them, and none where names could mean several things."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

from collapse_probe.loading import labels_of, open_images
from collapse_probe.loading.labels import UNKNOWN, Labels

CONFIG = {"input_size": (3, 8, 8), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
SYNSETS = ImageNetInfo("imagenet-1k").label_names()


def _folder(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / path)
    return root


def _labels(root: Path, classes: int, model: nn.Module | None = None, **arguments: int) -> Labels | None:
    source = open_images(root, config=CONFIG, **arguments)
    return labels_of(source, model or nn.Identity(), classes)


def _by_path(root: Path, classes: int, **arguments: int) -> dict[str, int] | None:
    """Path -> class."""
    source = open_images(root, config=CONFIG, **arguments)
    found = labels_of(source, nn.Identity(), classes)
    return None if found is None else dict(zip(source.paths, found.index.tolist(), strict=True))


# -- synsets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("n02086240_17.png", "file"),
        ("0155_n02086240_Shih-Tzu.png", "file"),
        ("ILSVRC2012_val_00000293_n02086240.png", "file"),
        ("n02086240/1.png", "folder"),
        ("val/n02086240/more/1.png", "folder"),
        ("n02086240-dogs/n02086240_1.png", "file"),
        ("n00015388/n02086240/1.png", "folder"),  # above it in WordNet, and no class
    ],
)
def test_synsets(tmp_path: Path, path: str, source: str) -> None:
    found = _labels(_folder(tmp_path, path), 1000)
    assert found is not None
    assert found.index.tolist() == [155] == [SYNSETS.index("n02086240")]
    assert found.source == f"ImageNet synsets in {source} names"
    assert found.classes == 1000


@pytest.mark.parametrize(
    "path",
    [
        "0155_Shih-Tzu.png",  # an index alone is no label
        "n0208624.png",
        "n020862401.png",
        "xn02086240.png",
        "N02086240.png",
        "n99999999/1.png",
        "n02086240/n01440764_1.png",  # two classes
    ],
)
def test_names_that_are_no_synset_of_the_model(tmp_path: Path, path: str) -> None:
    assert _labels(_folder(tmp_path, path), 1000) is None


def test_files_without_a_synset_stay_unknown(tmp_path: Path) -> None:
    _folder(tmp_path, "n01440764_1.png", "other.png", "n01443537/2.png", "n02086240/n01440764_1.png")
    assert _by_path(tmp_path, 1000) == {
        "n01440764_1.png": 0, "n01443537/2.png": 1, "other.png": UNKNOWN, "n02086240/n01440764_1.png": UNKNOWN,
    }  # fmt: skip
    found = _labels(tmp_path, 1000)
    assert found is not None
    assert found.source == "ImageNet synsets in file and folder names"


def test_the_folder_of_one_class_may_be_the_root(tmp_path: Path) -> None:
    assert _by_path(_folder(tmp_path / "n01443537", "1.png"), 1000) == {"1.png": 1}


def test_synsets_mean_the_classes_of_the_list_with_as_many(tmp_path: Path) -> None:
    _folder(tmp_path, "n01443537/1.png")
    larger = ImageNetInfo("imagenet-12k").label_names().index("n01443537")
    assert _by_path(tmp_path, 11821) == {"n01443537/1.png": larger}
    assert larger != 1
    assert _by_path(tmp_path, 999) is None


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_for_each_class_in_sorted_order(tmp_path: Path) -> None:
    _folder(tmp_path, "dog/a.png", "cat/b.png", "cat/more/c.png", "emu/d.png")
    assert _by_path(tmp_path, 3) == {"cat/b.png": 0, "cat/more/c.png": 0, "dog/a.png": 1, "emu/d.png": 2}
    found = _labels(tmp_path, 3)
    assert found is not None
    assert found.source == "3 class folders in sorted order"


def test_all_folders_count_whichever_files_are_drawn(tmp_path: Path) -> None:
    _folder(tmp_path, *(f"{letter}/{number}.png" for letter in "abcdef" for number in range(2)))
    drawn = _by_path(tmp_path, 6, num_samples=3)
    assert drawn is not None
    assert drawn == {path: "abcdef".index(path[0]) for path in drawn}
    assert len(drawn) == 3


def test_numbers_that_sort_in_two_ways_are_no_labels(tmp_path: Path) -> None:
    """torchvision's order is 1, 10, 11, 12, 2…, timm's 1, 2, 3…"""
    _folder(tmp_path / "plain", *(f"{number}/a.png" for number in range(1, 13)))
    assert _labels(tmp_path / "plain", 12) is None
    _folder(tmp_path / "padded", *(f"{number:02}/a.png" for number in range(1, 13)))
    assert _by_path(tmp_path / "padded", 12) == {f"{number:02}/a.png": number - 1 for number in range(1, 13)}


def test_digits_that_are_no_numbers(tmp_path: Path) -> None:
    _folder(tmp_path, "a/a.png", "b/b.png", "²/c.png")
    assert _labels(tmp_path, 3) is None


def test_fewer_folders_than_classes_are_indices_if_all_are_numbers(tmp_path: Path) -> None:
    _folder(tmp_path, "3/a.png", "007/b.png", "11/c.png")
    assert _by_path(tmp_path, 12) == {"3/a.png": 3, "007/b.png": 7, "11/c.png": 11}
    found = _labels(tmp_path, 12)
    assert found is not None
    assert found.source == "names of folders are class indices"
    assert _labels(tmp_path, 11) is None


@pytest.mark.parametrize(
    ("paths", "classes"),
    [
        (["cat/a.png", "dog/b.png"], 3),  # too few
        (["cat/a.png", "dog/b.png", "emu/c.png"], 2),  # too many
        (["cat/a.png", "dog/b.png", "c.png"], 2),  # a file outside
        (["cat/a.png", "dog/b.png", "c.png"], 3),
        (["0/a.png", "1/b.png", "emu/c.png"], 5),  # not all are numbers
        (["1/a.png", "01/b.png"], 2),  # one number twice
        (["1/a.png", "01/b.png"], 5),
        (["c1/a.png", "c2/a.png", "c10/a.png"], 3),  # torchvision: c1 c10 c2; timm: c1 c2 c10
        (["B/a.png", "a/b.png"], 2),  # torchvision: B a; timm: a B
        (["train/a.png", "val/b.png"], 2),  # no classes
        (["²/a.png", "³/a.png"], 9),  # digits to some
        (["224/a.png", "384/a.png", "518/a.png"], 1000),  # one set in several sizes
        (["a.png", "b.png"], 2),
        (["all/cat/a.png", "all/dog/b.png"], 2),
        (["all/a.png"], 1),
    ],
)
def test_what_could_mean_several_things_means_nothing(tmp_path: Path, paths: list[str], classes: int) -> None:
    assert _labels(_folder(tmp_path, *paths), classes) is None


def test_only_folders_and_classifiers_have_labels(tmp_path: Path) -> None:
    _folder(tmp_path, "cat/a.png", "dog/b.png")
    model = nn.Identity()
    for classes, known in ((2, True), (0, False), (192, False)):
        model.num_classes = classes  # type: ignore[assignment]
        assert (_labels(tmp_path, 2, model) is not None) == known
    tensor = open_images(torch.zeros(2, 3, 8, 8), config=CONFIG)
    assert labels_of(tensor, nn.Identity(), 2) is None
