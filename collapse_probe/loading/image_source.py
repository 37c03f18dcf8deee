"""What every image source is: batches in a fixed order, and an account of what was delivered and skipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from torch import Tensor

from collapse_probe.errors import ImagesError
from collapse_probe.shards import WHOLE, Shard
from collapse_probe.skipping import SKIPPED_ALLOWED, check_count
from collapse_probe.words import neutral


class Batch(NamedTuple):
    """Some images and where they stand.

    Attributes:
        images: floats ``[B, C, H, W]``, preprocessed.
        index: int64 ``[B]`` on the CPU, ascending: the place of each image in the order of the whole source, counted
            from 0. Neither shard nor batch size, workers or unreadable neighbours change it.
    """

    images: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class ImageSource(ABC):
    """Batches of preprocessed images, and what is known about where they come from.

    Attributes:
        config: the preprocessing, from :func:`collapse_probe.loading.data_config`; without ``input_size`` the size of
            tensors is not checked.
        shard: which part of the images is delivered.
        total: how many images there are in all shards together; None where that cannot be known.
        delivered: how many the last pass did deliver.
        skipped: images that could not be read in the last pass, each with ``path`` and ``reason``.
    """

    kind: str

    def __init__(self, config: Mapping[str, Any], total: int | None, shard: Shard = WHOLE) -> None:
        self.config = dict(config)
        self.total = total
        self.shard = shard
        self.delivered = 0
        self.skipped: list[dict[str, str]] = []
        self._started = False

    @property
    def count(self) -> int | None:
        """How many images of this shard a pass will try to deliver; None where that cannot be known."""
        return None if self.total is None else len(self.shard.indices(self.total))

    @property
    def repeatable(self) -> bool:
        """Whether a second pass delivers the images again."""
        return True

    def batches(
        self, start: int = 0, delivered: int = 0, skipped: Sequence[Mapping[str, str]] = ()
    ) -> Generator[Batch, None, None]:
        """The shard's images in the fixed order; closing the iterator early leaves nothing running.

        Folders give float32, tensors and loaders keep their precision. One shard of several may have no image, or none
        that can be read: it yields nothing then, and only the whole can tell whether that is wrong.

        Args:
            start: leave out the images before this place of the whole order. Batches end where they would without it.
            delivered: how many images an earlier pass has delivered before that place.
            skipped: which ones it could not read, as in `skipped`.

        Raises:
            ImagesError: nothing of a whole source could be delivered, or images do not have the size that the model
                takes.
        """
        self._started = True
        self.delivered = delivered
        self.skipped = [dict(entry) for entry in skipped]
        with closing(self._batches(start)) as batches:
            for batch in batches:
                self._check(batch.images)
                self.delivered += len(batch.images)
                yield batch
        if not self.delivered and self.shard.count == 1:
            reasons = "".join(neutral(f" {entry['path']}: {entry['reason']}.") for entry in self.skipped[:3])
            raise ImagesError(f"The {self.kind} delivered no readable image.{reasons}")

    def skipped_before(self, place: int) -> list[dict[str, str]]:  # noqa: ARG002
        """Those of `skipped` that stand before this place of the whole order."""
        return list(self.skipped)

    def describe(self) -> dict[str, Any]:
        """Plain data for the provenance: kind, counts, skipped images, order, preprocessing; the shard of several.

        The count is what the last pass delivered, and before any pass what one will try to deliver.
        """
        description = {
            "kind": self.kind,
            "count": self.delivered if self._started else self.count,
            "skipped": list(self.skipped),
            "order": self._order(),
            "preprocessing": dict(self.config) if self.kind == "folder" else "done by the caller",
        }
        return description | ({"shard": str(self.shard)} if self.shard.count > 1 else {})

    @abstractmethod
    def _batches(self, start: int) -> Generator[Batch, None, None]: ...

    @abstractmethod
    def _order(self) -> str: ...

    def _check(self, images: Tensor) -> None:
        wanted = self.config.get("input_size")
        if wanted is not None and images.ndim != 4:
            raise ImagesError(
                f"The {self.kind} delivered a tensor of shape {list(images.shape)}; expected [images, channels, "
                "height, width]. Batch single images with torch.utils.data.DataLoader(dataset, batch_size=32)."
            )
        if wanted is not None and tuple(images.shape[1:]) != tuple(wanted):
            raise ImagesError(
                f"The {self.kind} delivered images of size {tuple(images.shape[1:])} (channels, height, width); the "
                f"model takes {tuple(wanted)}. Resize them, or give img_size where the model takes other sizes."
            )
        if not images.is_floating_point():
            raise ImagesError(
                f"The {self.kind} delivered images of type {images.dtype}; expected floats, normalised as the model "
                "wants them."
            )


def parts(start: int, stop: int, size: int) -> list[list[int]]:
    """The numbers from start to stop in parts that end at multiples of a size, whatever the start."""
    firsts = range(start - start % size, stop, size)
    return [list(range(max(first, start), min(first + size, stop))) for first in firsts]


def check_skipped(source: ImageSource, allowed: float = SKIPPED_ALLOWED) -> None:
    """After or during a pass: stop once more than that share of all images could not be read.

    "All" are the images of all shards. So a shard stops only where its own unreadable images are too many for the whole
    already; where those of several shards are too many together, only whoever has them all can tell.

    Raises:
        ImagesError: names the first few and their reasons.
    """
    total = max(source.delivered + len(source.skipped), source.total or 0)
    where = f" in shard {source.shard} alone" if source.shard.count > 1 else ""
    check_count(source.skipped, total, allowed, where)
