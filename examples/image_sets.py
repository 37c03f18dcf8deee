"""Images to train on, prepared once: uint8 arrays on disk that every training process maps into memory.

`digits` comes with scikit-learn, `cifar10` from torchvision's download or from an npz file, anything else from a folder
`<train>/<class>/<image>`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2

from collapse_probe.errors import ImagesError, UsageError
from collapse_probe.files import write_atomically
from collapse_probe.loading.decode import decode

#: Called with the number of images read and of all images.
Watch = Callable[[int, int], None]
Split = tuple[NDArray[np.uint8], NDArray[np.int64]]

TRAIN_FOLDERS, TEST_FOLDERS = ("train",), ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class ImageSet:
    """Images ``[N, C, S, S]`` as uint8, labels ``[N]``.

    Attributes:
        name: what the images are, in words.
        classes: how many there are.
        train_images, train_labels, test_images, test_labels: tensors on top of files; do not write to them.
        mean, std: of the training images' pixels, scaled to 0..1, by channel.
    """

    name: str
    classes: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def limited(self, count: int | None) -> ImageSet:
        """The same with at most so many training images."""
        return replace(self, train_images=self.train_images[:count], train_labels=self.train_labels[:count])


def prepare(name: str, source: Path, size: int, folder: Path, watch: Watch) -> None:
    """Write the images of a data set into a folder, unless they are there already.

    Args:
        name: ``"digits"``, ``"cifar10"`` or ``"folder"``.
        source: where they are: for CIFAR-10 the folder of torchvision's download (fetched if need be) or the npz.
        size: side in pixels to which the images of a folder are brought.
        folder: where they go.
        watch: progress.

    Raises:
        ImagesError: the source does not hold such images.
        UsageError: the folder holds other images.
    """
    wanted = {"name": name, "source": "scikit-learn" if name == "digits" else str(source.resolve()), "size": size}
    if (folder / "about.json").exists():
        if about(folder).items() >= wanted.items():
            return
        raise UsageError(f"{folder} holds other images (see about.json): choose another --out, or remove the folder.")
    if name == "digits":
        train, test = _digits()
        classes = 10
    elif name == "cifar10":
        train, test = _cifar10_npz(source, watch) if source.suffix == ".npz" else _cifar10(source)
        classes = 10
    else:
        train, test, classes = _folder(source, size, watch)
    folder.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in (("train", train), ("test", test)):
        np.save(folder / f"{part}_images.npy", images)
        np.save(folder / f"{part}_labels.npy", labels)
    mean, std = _statistics(train[0])
    write_atomically(folder / "about.json", json.dumps({**wanted, "classes": classes, "mean": mean, "std": std}))


def load(folder: Path) -> ImageSet:
    """What :func:`prepare` wrote."""
    stored = about(folder)
    arrays = {
        # Copy on write: torch warns of arrays that cannot be written to.
        f"{part}_{what}": torch.from_numpy(np.load(folder / f"{part}_{what}.npy", mmap_mode="c"))
        for part in ("train", "test")
        for what in ("images", "labels")
    }
    mean, std = tuple(stored["mean"]), tuple(stored["std"])
    return ImageSet(name=stored["name"], classes=stored["classes"], mean=mean, std=std, **arrays)


def about(folder: Path) -> dict[str, Any]:
    """What the images of a folder are: name, source, side in pixels, classes, mean and standard deviation."""
    path = folder / "about.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{path} is damaged: remove {folder}, and the images are prepared again.") from None


def _statistics(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, rounded: they end up in model configurations."""
    some = images[:: max(len(images) // 5000, 1)] / 255
    return some.mean((0, 2, 3)).round(3).tolist(), some.std((0, 2, 3)).round(3).tolist()


# -- the sources -------------------------------------------------------------------------------------------------------


def _digits() -> tuple[Split, Split]:
    """scikit-learn's 1797 digits: 1347 to train on, 450 to test."""
    digits = load_digits()
    images = digits_pixels(digits.images)[:, None]
    train, test = digits_split(digits.target)
    labels = digits.target.astype(np.int64)
    return (images[train], labels[train]), (images[test], labels[test])


def digits_pixels(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Values 0..16 scaled to 0..255."""
    return np.rint(values * 255 / 16).astype(np.uint8)


def digits_split(labels: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training and of the test digits, each in rising order."""
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    return np.sort(train), np.sort(test)


def _cifar10(root: Path) -> tuple[Split, Split]:
    parts = []
    for train in (True, False):
        try:
            data = CIFAR10(str(root), train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise ImagesError(
                f"CIFAR-10 is not in {root} and could not be fetched ({error}). Give the folder of an earlier download "
                "or an npz file with --data-root."
            ) from None
        parts.append((data.data.transpose(0, 3, 1, 2).copy(), np.asarray(data.targets, dtype=np.int64)))
    return parts[0], parts[1]


def _cifar10_npz(path: Path, watch: Watch) -> tuple[Split, Split]:
    """Compressed images end to end: image i is ``train_bytes[train_offsets[i]:train_offsets[i + 1]]``; test alike."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            held = {key: archive[key] for key in archive.files}
        first, second = (len(held[f"{part}_labels"]) for part in ("train", "test"))
        train = _decoded(held, "train", lambda done: watch(done, first + second))
        test = _decoded(held, "test", lambda done: watch(first + done, first + second))
    except (OSError, EOFError, ValueError, KeyError, IndexError, BadZipFile) as error:
        raise ImagesError(f"{path} is no npz of compressed CIFAR-10 images: {error}.") from None
    return train, test


def _decoded(held: dict[str, NDArray[Any]], part: str, watch: Callable[[int], None]) -> Split:
    labels, content, offsets = (held[f"{part}_{what}"] for what in ("labels", "bytes", "offsets"))
    images = np.empty((len(labels), 3, 32, 32), dtype=np.uint8)
    for index in range(len(labels)):
        with Image.open(io.BytesIO(content[offsets[index] : offsets[index + 1]].tobytes())) as image:
            images[index] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        watch(index + 1)
    return images, labels.astype(np.int64)


def _folder(root: Path, size: int, watch: Watch) -> tuple[Split, Split, int]:
    """`root/train/<class>/` and `root/val/<class>/`; without these two a fifth of `root/<class>/` is for testing."""
    train_root, test_root = _first(root, TRAIN_FOLDERS), _first(root, TEST_FOLDERS)
    if (train_root is None) != (test_root is None):
        raise ImagesError(f"{root} has one of the folders train/ and val/, not both.")
    train = _listed(train_root or root)
    if test_root is None:
        try:
            chosen = train_test_split(np.arange(len(train)), test_size=0.2, random_state=0, stratify=train.targets)
        except ValueError as error:
            raise ImagesError(
                f"{root} holds too few images to keep a fifth of every class for testing: {error}"
            ) from None
        listings = [[train.samples[index] for index in sorted(part)] for part in chosen]
    else:
        test = _listed(test_root)
        if test.classes != train.classes:
            raise ImagesError(f"{train_root} and {test_root} hold different classes (folders).")
        listings = [train.samples, test.samples]
    # Listings go class by class; what looks at the first images must not see the first classes only.
    rng = np.random.default_rng(0)
    listings = [[samples[index] for index in rng.permutation(len(samples))] for samples in listings]
    total = sum(map(len, listings))
    first = _resized(listings[0], size, lambda done: watch(done, total))
    second = _resized(listings[1], size, lambda done: watch(len(listings[0]) + done, total))
    return first, second, len(train.classes)


def _first(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _listed(root: Path) -> ImageFolder:
    try:
        return ImageFolder(os.fspath(root))
    except (OSError, FileNotFoundError) as error:
        raise ImagesError(f"{root} holds no images in folders named by class: {error}") from None


def _resized(samples: list[tuple[str, int]], size: int, watch: Callable[[int], None]) -> Split:
    """The images' largest centred square, at ``size`` x ``size`` pixels, in RGB."""
    fit = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    images = np.empty((len(samples), 3, size, size), dtype=np.uint8)
    for index, (path, _) in enumerate(samples):
        try:
            images[index] = np.asarray(fit(decode(Path(path)).convert("RGB"))).transpose(2, 0, 1)
        except Exception as error:  # Pillow's plugins raise anything
            raise ImagesError(f"{path} cannot be read as an image: {error}. Repair it or remove it.") from None
        watch(index + 1)
    return images, np.array([label for _, label in samples], dtype=np.int64)
