"""A folder of image files as an image source: list, order by hash, decode, batch; unreadable files are skipped."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
from bisect import bisect_left
from collections.abc import Generator, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from collapse_probe.errors import ImageFileError, ImagesError, UsageError
from collapse_probe.loading.data_config import make_transform
from collapse_probe.loading.decode import DECODING, decode, image_extensions
from collapse_probe.loading.image_source import Batch, ImageSource, parts
from collapse_probe.shards import WHOLE, Shard
from collapse_probe.words import neutral


class FolderImages(ImageSource):
    """Image files under a folder, in the order of a hash of seed and relative path.

    The index of an image is the place of its file in `paths`, readable or not. A shard opens its own files only; a
    batch holds as many images as of `batch_size` files could be read.

    Attributes:
        root: the folder.
        paths: relative paths with forward slashes, of all shards, in order.
        folders: names of the folders right below the root that hold images, those of `paths` and all others, sorted; an
            empty one where images lie in the root itself.
        other_files: how many files were left out because their extension is no image's.
    """

    kind = "folder"

    def __init__(
        self,
        root: str | Path,
        config: Mapping[str, Any],
        batch_size: int = 32,
        workers: int = 0,
        num_samples: int | None = None,
        seed: int = 0,
        shard: Shard = WHOLE,
        pin_memory: bool = False,
    ) -> None:
        self.root, self._named = Path(root), str(root)
        if "input_size" not in config:
            raise UsageError(
                f"{root} holds files, and the model does not say how it wants its images: give img_size (and mean, "
                "std), or pass preprocessed images as a tensor or a DataLoader."
            )
        channels = config["input_size"][0]
        if channels not in (1, 3):
            raise ImagesError(
                f"Image files give 1 or 3 channels and the model takes {channels}: pass a tensor instead."
            )
        found, self.other_files = list_images(self.root)
        self.folders = sorted({path.rpartition("/")[0].partition("/")[0] for path in found})
        self.paths = seeded_order(found, seed)[:num_samples]
        super().__init__(config, len(self.paths), shard)
        self._batch_size, self._workers, self._seed = batch_size, workers, seed
        self._pin_memory = pin_memory

    def dataset(self) -> DecodedImages:
        """The shard's images one by one, in order."""
        files = [(place, self.paths[place]) for place in self.shard.indices(len(self.paths))]
        return DecodedImages(self.root, files, make_transform(self.config), self.config["input_size"][0])

    def describe(self) -> dict[str, Any]:
        """As :meth:`ImageSource.describe`, with the folder as it was named and the files that were left out."""
        return {**super().describe(), "root": self._named, "other_files": self.other_files, "seed": self._seed,
                "decoding": DECODING}  # fmt: skip

    def skipped_before(self, place: int) -> list[dict[str, str]]:
        """As :meth:`ImageSource.skipped_before`."""
        return [entry for entry in self.skipped if self._places[entry["path"]] < place]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {path: place for place, path in enumerate(self.paths)}

    def _batches(self, start: int) -> Generator[Batch, None, None]:
        own = self.shard.indices(len(self.paths))
        numbers = parts(bisect_left(own, start), len(own), self._batch_size)
        loader = DataLoader(
            self.dataset(), batch_sampler=numbers, num_workers=min(self._workers, len(numbers)),
            collate_fn=_readable_only, worker_init_fn=_quit_quietly, pin_memory=self._pin_memory,
        )  # fmt: skip
        # When this generator is closed the loader's iterator goes with it, and that ends its workers.
        for images, index, skipped in loader:
            self.skipped.extend(skipped)
            if images is not None:
                yield Batch(images, torch.tensor(index))

    def _order(self) -> str:
        return f"blake2b of seed ({self._seed}) and relative path"


def _quit_quietly(_worker: int) -> None:
    """A SIGTERM to a group of processes is for the main one to answer, and one from it is to be obeyed. Were a worker's
    exit status not 0, PyTorch would raise an error of its own in the main process, whatever that is doing."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


class DecodedImage(NamedTuple):
    """A preprocessed file, its place in the whole order, and the reason where there is no image ``[C, H, W]``."""

    image: Tensor | None
    place: int
    path: str
    reason: str


class DecodedImages(Dataset[DecodedImage]):
    """Preprocessed files, each given by its place in the whole order and its path."""

    def __init__(self, root: Path, files: list[tuple[int, str]], transform: Any, channels: int) -> None:
        self._root, self._files, self._transform, self._channels = root, files, transform, channels

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> DecodedImage:
        place, path = self._files[number]
        try:
            image = decode(self._root / path, self._channels)
        except ImageFileError as error:
            return DecodedImage(None, place, path, str(error))
        try:
            return DecodedImage(self._transform(image), place, path, "")
        except ValueError as error:  # a sliver can be left without width where the whole of it is to be shown
            return DecodedImage(None, place, path, f"{image.width} x {image.height} pixels cannot be resized: {error}")


def _readable_only(items: list[DecodedImage]) -> tuple[Tensor | None, list[int], list[dict[str, str]]]:
    """The images as one tensor, their index, and what could not be read."""
    images = [item.image for item in items if item.image is not None]
    index = [item.place for item in items if item.image is not None]
    skipped = [{"path": item.path, "reason": item.reason} for item in items if item.image is None]
    return torch.stack(images) if images else None, index, skipped


def list_images(root: Path) -> tuple[list[str], int]:
    """Relative paths (forward slashes) of the image files under a folder, and the number of other files.

    Hidden files and folders are ignored. Linked folders are followed, each folder once, so loops end. A folder that
    cannot be listed stands for what it may hold, with a slash at its end, and is found unreadable with the images.

    Raises:
        ImagesError: it is no folder, cannot be read, or holds no image.
    """
    try:
        is_folder, exists = root.is_dir(), root.exists()
    except OSError as error:
        raise ImagesError(f"Cannot read {root}: {error.strerror}.") from None
    if not is_folder:
        what = "is a file" if exists else "does not exist"
        raise ImagesError(f"{root} {what}; expected a folder of images.")
    extensions = set(image_extensions())
    found, others = [], 0
    closed: list[Path] = []
    for path in _files(root, closed):
        if path.suffix.lower() in extensions:
            found.append(path.relative_to(root).as_posix())
        else:
            others += 1
    found += [f"{path.relative_to(root).as_posix()}/" for path in closed]
    if not found:
        known = ", ".join(ext for ext in (".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp") if ext in extensions)
        raise ImagesError(
            f"{root} holds no image: of its {others} files none has one of the {len(extensions)} extensions that are "
            f"read ({known}, …)."
        )
    return sorted(found), others


def _files(root: Path, closed: list[Path]) -> Iterator[Path]:
    """All files below a folder; folders below it that cannot be listed are added to `closed`."""

    def cannot_list(error: OSError) -> None:
        if Path(error.filename) == root:
            raise ImagesError(f"Cannot list {neutral(str(root))}: {error.strerror}.") from None
        closed.append(Path(error.filename))

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=cannot_list):
        try:
            status = Path(folder).stat()
        except OSError as error:  # it was there to be listed
            cannot_list(error)
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Sorted, so that of two ways to one folder the same one is taken on every file system.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (path for name in names if not name.startswith(".") and not _blocks(path := Path(folder, name)))


def _blocks(path: Path) -> bool:
    """Whether it is a pipe or device, which could block a reader.

    What cannot even be looked at stays in, to be reported as unreadable: dangling links, loops, paths too long.
    """
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def seeded_order(paths: list[str], seed: int) -> list[str]:
    """The paths in an order that hangs on the seed and each path alone."""

    def key(path: str) -> tuple[bytes, str]:
        # File names need not be valid UTF-8.
        content = f"{seed}:{path}".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(content, digest_size=16).digest(), path

    return sorted(paths, key=key)
