"""Images that are tensors already: one tensor of all, or a DataLoader's batches. Preprocessing is the caller's."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from collapse_probe.errors import ImagesError
from collapse_probe.loading.image_source import Batch, ImageSource, parts
from collapse_probe.shards import WHOLE, Shard

_KEYS = ("pixel_values", "image", "images")


class TensorImages(ImageSource):
    """Preprocessed images ``[N, C, H, W]`` in the order of a hash of seed and content.

    Attributes:
        indices: where in the tensor the images of all shards stand, in order.
    """

    kind = "tensor"

    def __init__(
        self,
        images: Tensor,
        config: Mapping[str, Any],
        batch_size: int,
        num_samples: int | None,
        seed: int,
        shard: Shard = WHOLE,
    ) -> None:
        super().__init__(config, None, shard)
        self._check(images)
        if not len(images):
            raise ImagesError("The tensor holds no image: its first dimension is 0.")
        self._images, self._batch_size, self._seed = images.detach(), batch_size, seed
        self.indices = sorted(range(len(images)), key=self._key)[:num_samples]
        self.total = len(self.indices)

    def _key(self, index: int) -> bytes:
        content = self._images[index].float().cpu().contiguous().numpy().tobytes()
        return hashlib.blake2b(f"{self._seed}:".encode() + content, digest_size=16).digest()

    def _batches(self, start: int) -> Generator[Batch, None, None]:
        own = self.shard.indices(len(self.indices))
        for numbers in parts(bisect_left(own, start), len(own), self._batch_size):
            index = [own[number] for number in numbers]
            yield Batch(self._images[[self.indices[place] for place in index]], torch.tensor(index))

    def _order(self) -> str:
        return f"blake2b of seed ({self._seed}) and content"


class LoaderImages(ImageSource):
    """Batches of a DataLoader or any other iterable, in its own order.

    The index of an image is its running number in that order. So a shard iterates over everything that the loader
    delivers and keeps its own images, collected into batches of the loader's size; shards are disjoint only where the
    loader delivers the same images in the same order in each of them. `num_samples` counts over all shards.
    """

    kind = "loader"

    def __init__(
        self, loader: Iterable[Any], config: Mapping[str, Any], num_samples: int | None, shard: Shard = WHOLE
    ) -> None:
        known = _length(loader)
        limits = [number for number in (known, num_samples) if number is not None]
        super().__init__(config, min(limits) if known is not None else None, shard)
        self._loader, self._num_samples = loader, num_samples

    @property
    def repeatable(self) -> bool:
        """An iterator has its images once; what makes iterators, such as a DataLoader, can make another."""
        return not isinstance(self._loader, Iterator)

    def _batches(self, start: int) -> Generator[Batch, None, None]:
        batches = _later(self._as_delivered(), start)
        return batches if self.shard.count == 1 else self._collected(batches)

    def _as_delivered(self) -> Generator[Batch, None, None]:
        """The loader's batches as they are, of all shards."""
        start = 0
        for item in self._loader:
            images = _images_of(item).detach()
            # Before anything is cut off, so that the message names the shape as it was delivered.
            self._check(images)
            if self._num_samples is not None:
                images = images[: self._num_samples - start]
            end = start + len(images)
            yield Batch(images, torch.arange(start, end))
            if end == self._num_samples:
                return
            start = end

    def _collected(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """This shard's images in batches as large as the loader's largest so far."""
        size, held = 0, None
        for batch in batches:
            size = max(size, len(batch.index))
            own = [place for place, index in enumerate(batch.index.tolist()) if self.shard.owns(index)]
            if not own:
                continue
            batch = Batch(batch.images[own], batch.index[own])
            if held is not None and held.images.shape[1:] != batch.images.shape[1:]:
                yield held  # images of different sizes are no batch
                held = None
            if held is not None:
                batch = Batch(torch.cat([held.images, batch.images]), torch.cat([held.index, batch.index]))
            held = batch
            if len(held.index) >= size:
                yield Batch(held.images[:size], held.index[:size])
                held = Batch(held.images[size:], held.index[size:]) if len(held.index) > size else None
        if held is not None:
            yield held

    def _order(self) -> str:
        return "as delivered"


def _later(batches: Iterable[Batch], start: int) -> Generator[Batch, None, None]:
    """The images from this place on; a loader can only be asked for them by taking those before."""
    for batch in batches:
        later = batch.index >= start
        if later.all():
            yield batch
        elif later.any():
            yield Batch(batch.images[later.to(batch.images.device)], batch.index[later])


def _images_of(item: Any) -> Tensor:
    """The image tensor of one item of a loader."""
    if isinstance(item, Mapping):
        found = next((item[key] for key in _KEYS if key in item), None)
        if not isinstance(found, Tensor):
            raise ImagesError(
                f"The loader delivered a mapping with {', '.join(map(repr, item)) or 'no keys'}; expected a tensor "
                f"under one of {', '.join(map(repr, _KEYS))}."
            )
        return found
    found = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(found, Tensor):
        raise ImagesError(
            f"The loader delivered a {type(found).__name__}; expected a tensor, a tuple that starts with one, or a "
            f"mapping with one of {', '.join(map(repr, _KEYS))}."
        )
    return found


def _length(loader: Iterable[Any]) -> int | None:
    """How many images a DataLoader with a fixed batch size will deliver; None for everything else."""
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return None
    try:
        number = len(loader.sampler)  # type: ignore[arg-type]
    except TypeError:  # an iterable data set has no length
        return None
    return number - number % loader.batch_size if loader.drop_last else number
