"""What attention means: its kind, and how windows were cut.

Maps are found by dataflow alone. Most of their meaning follows from their shape, from the modules that were running and
from what those were given; :data:`MEANINGS` holds what only knowledge of a class can tell. A new family of models needs
no row where its maps are of kind ``"token"``, ``"class"`` or ``"window"`` with one way of cutting windows.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from collapse_probe.capture.hooks import Running
from collapse_probe.capture.sighting import Sighting

_HEADS = ("num_heads", "n_heads", "heads", "n_head", "nhead", "num_attention_heads", "num_attn_heads")

_POOLING = re.compile(r"(attn|attention)\w*pool|pool\w*(attn|attention|head)", re.IGNORECASE)
_CROSS = re.compile(r"cross_?(attn|attention)", re.IGNORECASE)


@dataclass(frozen=True)
class Meaning:
    """What a class says of the attention that runs within it.

    Attributes:
        kind: its kind, where neither shape nor inputs tell.
        partition: how windows are cut, where its instances cut them in more than one way.
        windows_last: whether windows are the axis behind the heads.
        shuffled: whether its tokens are a random choice of patches, in random order.
        own_grids: whether every image of a batch has a grid of its own where patches are given instead of images.
    """

    kind: str = ""
    partition: Callable[[nn.Module], str] | None = None
    windows_last: bool = False
    shuffled: bool = False
    own_grids: bool = False


#: Class name, or its end with as much of the module path as is needed -> meaning.
MEANINGS = {
    # channels attend to channels (XCiT, EdgeNeXt, DaViT)
    "XCA": Meaning("channel"),
    "XCAttention": Meaning("channel"),
    "CrossCovarianceAttn": Meaning("channel"),
    "ChannelAttention": Meaning("channel"),
    "ChannelAttentionV2": Meaning("channel"),
    # pooling heads whose class name does not say so
    "AttentionPool2d": Meaning("pooling"),
    "RotAttentionPool2d": Meaning("pooling"),
    "PatchMerger": Meaning("pooling"),
    # windows behind the heads
    "nest.Attention": Meaning(windows_last=True),
    "MaskUnitAttention": Meaning(windows_last=True),
    "HieraMaskUnitAttention": Meaning(windows_last=True),
    "OutlookAttention": Meaning(windows_last=True),
    # windows of neighbours, or a grid over the whole image, by a swap of axes (torchvision's MaxViT)
    "PartitionAttentionLayer": Meaning(
        partition=lambda module: "" if isinstance(module.partition_swap, nn.Identity) else "grid"
    ),
    # patches that were hidden at random
    "ViTMAEModel": Meaning(shuffled=True),
    # patches of images of any proportions
    "NaFlexVit": Meaning(own_grids=True),
    # queries that are the same for all windows (GCViT)
    "WindowAttentionGlobal": Meaning(
        partition=lambda module: "global queries" if getattr(module, "use_global", False) else ""
    ),
}


def meaning(running: Sequence[Running]) -> Meaning:
    """What the running modules say together, the innermost first."""
    rows = [row for item in reversed(running) for row in _rows(item.module)]
    return Meaning(
        kind=next((row.kind for row in rows if row.kind), ""),
        windows_last=any(row.windows_last for row in rows),
        shuffled=any(row.shuffled for row in rows),
        own_grids=any(row.own_grids for row in rows),
    )


def partition(running: Sequence[Running], cut: str) -> str:
    """How windows were cut: in words, empty where there is one way only.

    Args:
        running: the modules that are running.
        cut: what the operators tell.
    """
    words = [cut]
    for item in running:
        words += [row.partition(item.module) for row in _rows(item.module) if row.partition is not None]
    return ", ".join(dict.fromkeys(word for word in words if word))


def heads(running: Sequence[Running]) -> int | None:
    """How many heads the innermost module that says so has."""
    for item in reversed(running[-3:]):
        for name in _HEADS:
            count = getattr(item.module, name, None)
            if isinstance(count, int) and count > 0:
                return count
    return None


def kind(sighting: Sighting, running: Sequence[Running]) -> str:
    """What asks what: one of :data:`collapse_probe.capture.attention_map.KINDS`."""
    assert sighting.source is not None
    _, _, queries, keys = sighting.source.shape
    stated = meaning(running).kind
    if stated:
        return stated
    if sighting.contraction is None:
        return "gate"
    classes = [type(item.module).__name__ for item in running[-3:] if item is not running[0]]
    if any(_POOLING.search(name) for name in classes):
        return "pooling"
    if queries == 1 < keys:
        return "class"
    if _over_channels(sighting, running):
        return "channel"
    if sighting.windows > 1:
        return "window"
    if _two_sequences(queries, keys, running) or (queries != keys and any(_CROSS.search(name) for name in classes)):
        return "cross"
    return "token"


def _rows(module: nn.Module) -> list[Meaning]:
    return _rows_of(f"{type(module).__module__}.{type(module).__qualname__}")


@functools.cache
def _rows_of(name: str) -> list[Meaning]:
    return [row for key, row in MEANINGS.items() if name.endswith(f".{key}")]


def _over_channels(sighting: Sighting, running: Sequence[Running]) -> bool:
    """Whether products of queries and keys ran over all tokens of the module's input, and not over channels."""
    assert sighting.source is not None
    _, heads_, queries, keys = sighting.source.shape
    for item in reversed(running[-2:]):
        for shape in (given.shape for given in item.inputs[:1]):
            readings = {3: [(shape[1:2], shape[2:])], 4: [(shape[1:3], shape[3:]), (shape[2:], shape[1:2])]}
            for spatial, channels in readings.get(len(shape), []):
                tokens = math.prod(spatial)
                over_tokens = sighting.contraction == tokens and queries == keys != tokens
                if over_tokens and queries * heads_ == math.prod(channels):
                    return True
    return False


def _two_sequences(queries: int, keys: int, running: Sequence[Running]) -> bool:
    """Whether a running module was given one sequence as long as the queries and another as long as the keys; or
    PyTorch's own attention queries and keys of different memory."""
    for item in running[-2:]:
        sequences = [given for given in item.inputs if len(given.shape) == 3]
        if isinstance(item.module, nn.MultiheadAttention):
            return len(sequences) > 1 and sequences[0].memory != sequences[1].memory
        if queries == keys:
            continue
        if len({given.memory for given in sequences}) > 1:
            lengths = [set(given.shape[:2]) for given in sequences]
            if any(queries in one and keys in other for one in lengths for other in lengths if one is not other):
                return True
    return False
