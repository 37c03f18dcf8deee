"""What every image source is: batches in a fixed order, and an account of what was delivered and skipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import closing
from typing import Any

from torch import Tensor

from collapse_probe.errors import ImagesError


class ImageSource(ABC):
    """Batches of preprocessed images, and what is known about where they come from.

    Attributes:
        config: the preprocessing, from :func:`collapse_probe.loading.data_config`; without ``input_size`` the size of
            tensors is not checked.
        count: how many images a pass will try to deliver; None where that cannot be known.
        delivered: how many the last pass did deliver.
        skipped: images that could not be read in the last pass, each with ``path`` and ``reason``.
    """

    kind: str

    def __init__(self, config: Mapping[str, Any], count: int | None) -> None:
        self.config = dict(config)
        self.count = count
        self.delivered = 0
        self.skipped: list[dict[str, str]] = []

    def batches(self) -> Generator[Tensor, None, None]:
        """Floats ``[B, C, H, W]`` in the fixed order; closing the iterator early leaves nothing running.

        Folders give float32, tensors and loaders keep their precision.

        Raises:
            ImagesError: nothing could be delivered, or images do not have the size that the model takes.
        """
        self.delivered = 0
        self.skipped = []
        with closing(self._batches()) as batches:
            for images in batches:
                self._check(images)
                self.delivered += len(images)
                yield images
        if not self.delivered:
            reasons = "".join(f" {entry['path']}: {entry['reason']}." for entry in self.skipped[:3])
            raise ImagesError(f"The {self.kind} delivered no readable image.{reasons}")

    def describe(self) -> dict[str, Any]:
        """Plain data for the provenance: kind, counts, skipped images, order, preprocessing."""
        return {
            "kind": self.kind,
            "count": self.delivered or self.count,
            "skipped": list(self.skipped),
            "order": self._order(),
            "preprocessing": dict(self.config) if self.kind == "folder" else "done by the caller",
        }

    @abstractmethod
    def _batches(self) -> Generator[Tensor, None, None]: ...

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


def check_skipped(source: ImageSource, allowed: float = 0.01) -> None:
    """After or during a pass: stop once more than that share of all images could not be read.

    Raises:
        ImagesError: names the first few and their reasons.
    """
    total = max(source.delivered + len(source.skipped), source.count or 0)
    if len(source.skipped) > allowed * total:
        first = "; ".join(f"{entry['path']}: {entry['reason']}" for entry in source.skipped[:3])
        raise ImagesError(
            f"{len(source.skipped)} of {total} images could not be read, more than {allowed:.0%}: {first}. "
            "Remove or repair them."
        )
