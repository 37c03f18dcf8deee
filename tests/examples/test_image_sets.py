"""Images to train on: what is read, how it is split, and what is said where a source does not hold images."""

from __future__ import annotations

import io
from types import SimpleNamespace

import image_sets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from collapse_probe.errors import ImagesError, UsageError


def prepared(tmp_path, name, source=None, size=8):
    image_sets.prepare(name, source or tmp_path, size, tmp_path / "data", lambda *_: None)
    return image_sets.load(tmp_path / "data")


def webp_archive(path, train=6, test=4):
    """Pictures of one colour each, compressed without loss, as the npz of CIFAR-10 holds them."""
    arrays, colours = {}, {}
    for part, count in (("train", train), ("test", test)):
        colours[part] = np.random.default_rng(count).integers(0, 255, (count, 3), dtype=np.uint8)
        files = []
        for colour in colours[part]:
            stream = io.BytesIO()
            Image.new("RGB", (32, 32), tuple(map(int, colour))).save(stream, "webp", lossless=True)
            files.append(np.frombuffer(stream.getvalue(), dtype=np.uint8))
        arrays[f"{part}_bytes"] = np.concatenate(files)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_labels"] = np.arange(count) % 10
    np.savez(path, **arrays)
    return colours


def pictures(root, classes=("cat", "dog"), count=5, size=(40, 30)):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (number * 100, index * 20, 7)).save(root / name / f"{index}.png")


def test_digits_are_split_by_class_and_keep_their_values(tmp_path):
    data = prepared(tmp_path, "digits")
    assert data.train_images.shape == (1347, 1, 8, 8)
    assert data.test_images.shape == (450, 1, 8, 8)
    assert data.train_images.dtype == torch.uint8
    digits = load_digits()
    everything = {(tuple((image * 16 / 255).round().ravel())) for image in np.rint(digits.images * 255 / 16)}
    for images in (data.train_images, data.test_images):
        assert {tuple((image.double() * 16 / 255).round().flatten().tolist()) for image in images} <= everything
    counts = torch.bincount(data.test_labels, minlength=10)
    assert counts.min() >= 43
    assert counts.max() <= 46
    train, test = image_sets.digits_split(digits.target)
    assert not set(train) & set(test)
    assert len(train) + len(test) == 1797


def test_mean_and_deviation_are_those_of_the_training_images(tmp_path):
    data = prepared(tmp_path, "digits")
    pixels = data.train_images.double() / 255
    assert data.mean == pytest.approx((pixels.mean().item(),), abs=6e-4)
    assert data.std == pytest.approx((pixels.std(correction=0).item(),), abs=6e-4)


def test_compressed_cifar_images_are_decoded_in_order(tmp_path):
    colours = webp_archive(tmp_path / "cifar.npz")
    data = prepared(tmp_path, "cifar10", tmp_path / "cifar.npz", size=32)
    assert data.train_images.shape == (6, 3, 32, 32)
    np.testing.assert_array_equal(data.train_images[:, :, 5, 5], colours["train"])
    np.testing.assert_array_equal(data.test_images[:, :, 31, 0], colours["test"])
    assert data.test_labels.tolist() == [0, 1, 2, 3]


def test_torchvision_s_cifar_images_come_channels_first(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)

    def download(_, train, download):
        assert download
        return SimpleNamespace(data=pixels if train else pixels[:2], targets=[3, 1, 4, 1, 5][: 5 if train else 2])

    monkeypatch.setattr(image_sets, "CIFAR10", download)
    data = prepared(tmp_path, "cifar10", size=32)
    np.testing.assert_array_equal(data.train_images[4, 2], pixels[4, :, :, 2])
    assert data.test_labels.tolist() == [3, 1]


def test_a_folder_without_parts_gives_a_fifth_of_each_class_for_testing(tmp_path):
    pictures(tmp_path / "pictures", count=10)
    data = prepared(tmp_path, "folder", tmp_path / "pictures", size=16)
    assert data.classes == 2
    assert data.train_images.shape == (16, 3, 16, 16)
    assert torch.bincount(data.test_labels).tolist() == [2, 2]
    assert set(data.test_labels[:2].tolist()) | set(data.train_labels[:6].tolist()) == {0, 1}  # not class by class
    seen = torch.cat([data.train_images, data.test_images])[:, :, 8, 8]
    assert len({tuple(colour.tolist()) for colour in seen}) == 20


def test_the_parts_of_a_folder_are_kept_apart(tmp_path):
    pictures(tmp_path / "pictures" / "train", count=3)
    pictures(tmp_path / "pictures" / "val", count=1)
    data = prepared(tmp_path, "folder", tmp_path / "pictures", size=16)
    assert (len(data.train_images), len(data.test_images)) == (6, 2)
    assert sorted(data.test_images[:, 0, 0, 0].tolist()) == [0, 100]
    assert (data.test_images[:, 0, 0, 0] == 100 * data.test_labels).all()


def test_the_first_images_of_a_folder_are_of_all_classes(tmp_path):
    pictures(tmp_path / "pictures" / "train", classes=("a", "b", "c"), count=30)
    pictures(tmp_path / "pictures" / "val", classes=("a", "b", "c"), count=30)
    data = prepared(tmp_path, "folder", tmp_path / "pictures")
    assert set(data.test_labels[:20].tolist()) == set(data.limited(20).train_labels.tolist()) == {0, 1, 2}
    assert (data.train_images[:, 0, 4, 4] == 100 * data.train_labels).all()


def test_pictures_are_decoded_as_the_analysis_decodes_them(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "pictures" / part / "odd").mkdir(parents=True)
        Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "pictures" / part / "odd" / "clear.png")
    data = prepared(tmp_path, "folder", tmp_path / "pictures")
    assert (data.train_images == 255).all()  # transparent is white, whatever colour hides there


def test_what_is_prepared_is_not_prepared_again_unless_something_else_is_wanted(tmp_path):
    pictures(tmp_path / "pictures")
    source = tmp_path / "pictures"
    first = prepared(tmp_path, "folder", source, size=16)
    (source / "cat" / "0.png").write_bytes(b"no picture any more")
    assert torch.equal(prepared(tmp_path, "folder", source, size=16).train_images, first.train_images)
    with pytest.raises(UsageError, match="holds other images"):
        prepared(tmp_path, "folder", source, size=8)
    assert torch.equal(image_sets.load(tmp_path / "data").train_images, first.train_images)
    with pytest.raises(ImagesError, match=r"0\.png cannot be read as an image"):
        image_sets.prepare("folder", source, 8, tmp_path / "other", lambda *_: None)
    (tmp_path / "data" / "about.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        prepared(tmp_path, "folder", source, size=16)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root.mkdir(), "holds no images in folders named by class"),
        (lambda root: pictures(root / "train"), "not both"),
        (lambda root: pictures(root, count=1), "too few images"),
        (
            lambda root: (pictures(root / "train"), pictures(root / "val", classes=("cat",))),
            "hold different classes",
        ),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, words):
    make(tmp_path / "pictures")
    with pytest.raises(ImagesError, match=words):
        prepared(tmp_path, "folder", tmp_path / "pictures")
    assert not (tmp_path / "data" / "about.json").exists()


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_archives_that_cannot_be_used(tmp_path, content):
    if content is None:
        np.savez(tmp_path / "cifar.npz", something=np.arange(3))
    else:
        (tmp_path / "cifar.npz").write_bytes(content)
    with pytest.raises(ImagesError, match="no npz of compressed CIFAR-10 images"):
        prepared(tmp_path, "cifar10", tmp_path / "cifar.npz")


def test_cifar_that_cannot_be_fetched(tmp_path, monkeypatch):
    def download(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(image_sets, "CIFAR10", download)
    with pytest.raises(ImagesError, match="could not be fetched"):
        prepared(tmp_path, "cifar10")
