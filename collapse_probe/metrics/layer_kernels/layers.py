"""The layers of a group as kernels reach them: a table of addresses, so that nothing is stacked."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from collapse_probe.errors import UsageError
from collapse_probe.metrics.tiles import MapLike

#: Dtypes of queries and keys that kernels read.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: More layers than these do not fit in a program's tile.
MAX_LAYERS = 64

#: Longest head that kernels were compiled and tested for.
MAX_DIM = 256

#: What the table of addresses holds of every layer: where its queries begin and how far apart they are by image, head
#: and token, the same of its keys, where its normalisers begin, and the bits of its scale. Addresses are counted in
#: elements from the first layer's queries and normalisers: a kernel adds them to pointers whose alignment it knows.
ROWS = (
    *("queries", "queries_by_image", "queries_by_head", "queries_by_token"),
    *("keys", "keys_by_image", "keys_by_head", "keys_by_token"),
    *("normalizers", "scale"),
)


class Layer(NamedTuple):
    """One layer's softmax over `scale * q k^T`: B images, H heads, Q queries, K keys, D channels of a head.

    Attributes:
        q: queries `[B, H, Q, D]`.
        k: keys `[B, H, K, D]`.
        log_normalizer: `[B, H, Q]`, log of the sum of exponentials of each row; minus infinity for a row without keys.
        scale: factor of the products.
    """

    q: Tensor
    k: Tensor
    log_normalizer: Tensor
    scale: float


@dataclass(frozen=True)
class Layers:
    """Layers of equal sizes, on one device, and the table through which kernels find them.

    Attributes:
        items: the layers, whose tensors the table points into.
        table: `[10, L]` int64, the rows of :data:`ROWS`.
        align: number of elements by which every address and stride can be divided: loads are 16 bytes wide, or one
            element.
    """

    items: tuple[Layer, ...]
    table: Tensor
    align: int

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Layers:
        """Check the layers and write the table, without waiting for the device.

        Queries, keys and normalisers are read where they are. Only those whose channels are not side by side, or whose
        normalisers are not contiguous float32, are copied.

        Raises:
            UsageError: there is no layer or there are too many, or they differ in shape, dtype or device, or kernels
                do not read their dtype or channels.
        """
        items = tuple(_readable(layer) for layer in layers)
        _check(items)
        first = items[0]
        element = first.q.element_size()
        columns = []
        for layer in items:
            parts = []
            for tensor in (layer.q, layer.k):
                parts += [(tensor.data_ptr() - first.q.data_ptr()) // element, *tensor.stride()[:3]]
            apart = layer.log_normalizer.data_ptr() - first.log_normalizer.data_ptr()
            columns.append([*parts, apart // 4, struct.unpack("<i", struct.pack("<f", layer.scale))[0]])
        wide = 16 // element
        aligned = first.q.data_ptr() % 16 == 0 and all(part % wide == 0 for column in columns for part in column[:8])
        table = torch.tensor(columns, dtype=torch.int64).T.contiguous()
        return cls(items, _sent(table, first.q.device), wide if aligned else 1)

    def select(self, start: int, stop: int) -> Layers:
        """The same layers for images start..stop-1."""
        images = slice(start, stop)
        return Layers.of([Layer(q[images], k[images], rows[images], scale) for q, k, rows, scale in self.items])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q, K)."""
        batch, heads, queries, _ = self.items[0].q.shape
        return batch, heads, queries, self.items[0].k.shape[2]

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self.items[0].q.shape[3]

    @property
    def device(self) -> torch.device:
        return self.items[0].q.device

    def __len__(self) -> int:
        return len(self.items)


def available(maps: Sequence[MapLike]) -> bool:
    """Whether kernels can take these maps: triton is installed, they lie on one CUDA device (or Triton's interpreter
    runs), and each is a softmax over queries and keys alone, of equal shapes and half or single precision."""
    if importlib.util.find_spec("triton") is None or not 1 <= len(maps) <= MAX_LAYERS:
        return False
    parts = [item.queries_and_keys() for item in maps]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return False
    q, k, *_ = known[0]
    runs = q.device.type == "cuda" or (q.device.type == "cpu" and interpreted())
    alike = {(one.shape, other.shape, one.dtype, other.dtype, one.device, other.device) for one, other, *_ in known}
    return (
        runs
        and len(alike) == 1
        and q.dtype in DTYPES
        and (k.dtype, k.device) == (q.dtype, q.device)
        and q.shape[3] <= MAX_DIM
        and min(*q.shape, k.shape[2]) > 0
    )


def interpreted() -> bool:
    """Whether Triton's interpreter takes the place of a device: the variable must be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _readable(layer: Layer) -> Layer:
    q, k = (item if item.stride(-1) == 1 else item.contiguous() for item in (layer.q, layer.k))
    return Layer(q, k, layer.log_normalizer.to(torch.float32).contiguous(), float(layer.scale))


def _check(items: Sequence[Layer]) -> None:
    if not 1 <= len(items) <= MAX_LAYERS:
        raise UsageError(f"kernels take 1 to {MAX_LAYERS} layers; got {len(items)}. Use the maps' columns.")
    q, k = items[0].q, items[0].k
    if q.dtype not in DTYPES:
        raise UsageError(f"kernels read float16, bfloat16 and float32; these queries are {q.dtype}.")
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise UsageError(
            f"queries must be [B, H, Q, D] and keys [B, H, K, D]; got {list(q.shape)} and {list(k.shape)}."
        )
    if not min(*q.shape, k.shape[2]) or q.shape[3] > MAX_DIM:
        raise UsageError(f"kernels take heads of 1 to {MAX_DIM} channels and at least one token; got {list(q.shape)}.")
    for layer in items:
        expected = ((q.shape, q.dtype), (k.shape, q.dtype), (q.shape[:3], torch.float32))
        tensors = (layer.q, layer.k, layer.log_normalizer)
        if any(
            item.shape != shape or item.dtype != dtype for item, (shape, dtype) in zip(tensors, expected, strict=True)
        ):
            raise UsageError(
                f"kernels take layers of one shape and dtype, normalisers [B, H, Q]; got "
                f"{[(list(item.shape), str(item.dtype)) for item in tensors]} beside {list(q.shape)} and {q.dtype}."
            )
        if any(item.device != q.device for item in tensors):
            raise UsageError(
                f"kernels take layers on one device; got {sorted({str(item.device) for item in tensors})}."
            )
    if q.device.type != "cuda" and not interpreted():
        raise UsageError(f"kernels run on CUDA devices; these queries are on {q.device}. Use the maps' columns there.")


def _sent(table: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return table
    # From pinned memory the copy is queued; from any other it would wait for the device.
    return table.pin_memory().to(device, non_blocking=True)
