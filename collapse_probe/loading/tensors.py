"""Images that are tensors already: one tensor of all, or a DataLoader's batches. Preprocessing is the caller's."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from collapse_probe.errors import ImagesError
from collapse_probe.loading.image_source import ImageSource

_KEYS = ("pixel_values", "image", "images")


class TensorImages(ImageSource):
    """Preprocessed images ``[N, C, H, W]`` in the order of a hash of seed and content."""

    kind = "tensor"

    def __init__(
        self, images: Tensor, config: Mapping[str, Any], batch_size: int, num_samples: int | None, seed: int
    ) -> None:
        super().__init__(config, None)
        self._check(images)
        if not len(images):
            raise ImagesError("The tensor holds no image: its first dimension is 0.")
        self._images, self._batch_size, self._seed = images.detach(), batch_size, seed
        self.indices = sorted(range(len(images)), key=self._key)[:num_samples]
        self.count = len(self.indices)

    def _key(self, index: int) -> bytes:
        content = self._images[index].float().cpu().contiguous().numpy().tobytes()
        return hashlib.blake2b(f"{self._seed}:".encode() + content, digest_size=16).digest()

    def _batches(self) -> Generator[Tensor, None, None]:
        for start in range(0, len(self.indices), self._batch_size):
            yield self._images[self.indices[start : start + self._batch_size]]

    def _order(self) -> str:
        return f"blake2b of seed ({self._seed}) and content"


class LoaderImages(ImageSource):
    """Batches of a DataLoader or any other iterable, in its own order."""

    kind = "loader"

    def __init__(self, loader: Iterable[Any], config: Mapping[str, Any], num_samples: int | None) -> None:
        known = _length(loader)
        limits = [number for number in (known, num_samples) if number is not None]
        super().__init__(config, min(limits) if known is not None else None)
        self._loader, self._num_samples = loader, num_samples

    def _batches(self) -> Generator[Tensor, None, None]:
        left = self._num_samples
        for item in self._loader:
            images = _images_of(item)
            # Where images are expected, another shape is left whole: the check names it as it was delivered.
            if left is not None and (images.ndim == 4 or "input_size" not in self.config):
                images = images[:left]
                left -= len(images)
            yield images.detach()
            if left == 0:
                return

    def _order(self) -> str:
        return "as delivered"


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
