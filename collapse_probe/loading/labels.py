"""Which class each file of a folder shows, where the names of files and folders say so; never a guess.

Sources, the first that applies: an ImageNet synset (``n01440764``) in the name of the file or of a folder that it lies
in, for models with as many classes as one of timm's lists; a folder for each class right below the root, in sorted
order, as torchvision and timm number them; folders whose names are class indices.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from timm.data import ImageNetInfo
from timm.data.imagenet_info import infer_imagenet_subset
from timm.utils.misc import natural_key
from torch import nn

from collapse_probe.loading.folder import FolderImages
from collapse_probe.loading.image_source import ImageSource

#: Stands for a file whose class is not known.
UNKNOWN = -1

_SYNSET = re.compile("(?<![0-9A-Za-z])n[0-9]{8}(?![0-9A-Za-z])")
_NUMBER = re.compile("[0-9]{1,9}")
#: Folders of these names are parts of a data set, even if there are as many of them as classes.
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "extra"}


class Labels(NamedTuple):
    """The classes of a folder's files.

    Attributes:
        index: int64, for each file in the order of the source its class, 0 to ``classes - 1``, or :data:`UNKNOWN`.
        classes: how many classes the model tells apart.
        source: how the labels are known, in words.
    """

    index: NDArray[np.int64]  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    classes: int
    source: str


def labels_of(source: ImageSource, model: nn.Module, outputs: int) -> Labels | None:
    """The labels of a source's images, by their place in its order.

    Args:
        source: only folders have names.
        model: what gives the outputs; one that says how many classes it has must give as many.
        outputs: how many numbers the model gives for an image.

    Returns:
        None where nothing is recognised, where names can be read in more than one way, or without a classifier.
    """
    classes = getattr(model, "num_classes", outputs)
    if not isinstance(source, FolderImages) or classes != outputs or outputs < 2:
        return None
    # A single class's folder may have been given; its own name is the only one that is looked at outside.
    return _by_synset(source.paths, source.root.resolve().name, outputs) or _by_folder(source, outputs)


def _by_synset(paths: Sequence[str], root: str, classes: int) -> Labels | None:
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return None
    known = {synset: index for index, synset in enumerate(ImageNetInfo(subset).label_names())}
    index, places = np.full(len(paths), UNKNOWN, dtype=np.int64), set()
    for number, path in enumerate(paths):
        folders, _, name = f"{root}/{path}".rpartition("/")
        found = {where: known.keys() & _SYNSET.findall(words) for where, words in (("file", name), ("folder", folders))}
        synsets = found["file"] | found["folder"]
        if len(synsets) == 1:  # two would contradict each other
            index[number] = known[synsets.pop()]
            places.add("file" if found["file"] else "folder")
    if not places:
        return None
    return Labels(index, classes, f"ImageNet synsets in {' and '.join(sorted(places))} names")


def _by_folder(source: FolderImages, classes: int) -> Labels | None:
    order = _numbered(source.folders, classes)
    if order is None:
        return None
    numbers, words = order
    index = [numbers[path.partition("/")[0]] for path in source.paths]
    return Labels(np.array(index, dtype=np.int64), classes, words)


def _naturally(folders: Sequence[str]) -> list[str] | None:
    """timm's order; None where it has none."""
    try:
        return sorted(folders, key=natural_key)
    except (ValueError, TypeError):  # digits that are no numbers, such as ²
        return None


def _sides(folders: Sequence[str]) -> bool:
    """Whether these numbers look like sides in pixels, such as 224 and 384: one set of images in several sizes."""
    return all(int(name) >= 64 and (int(name) % 14 == 0 or int(name) % 16 == 0) for name in folders)


def _numbered(folders: Sequence[str], classes: int) -> tuple[dict[str, int], str] | None:
    """The class of each folder, and how it is known."""
    if not folders or "" in folders or len(folders) > classes or {name.lower() for name in folders} & _SPLITS:
        return None
    numeric = all(map(_NUMBER.fullmatch, folders))
    if numeric and len(set(map(int, folders))) < len(folders):
        return None  # such as 1 and 01
    if len(folders) == classes:
        ordered = sorted(folders)
        if ordered != _naturally(folders):
            return None  # torchvision and timm number these differently
        return {name: number for number, name in enumerate(ordered)}, f"{classes} class folders in sorted order"
    if numeric and max(map(int, folders)) < classes and not _sides(folders):
        return {name: int(name) for name in folders}, "names of folders are class indices"
    return None
