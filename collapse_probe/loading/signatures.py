"""Which architectures have weights of these names and shapes: an index of all that are registered with timm.

Building every registered architecture takes minutes, so digests of their names and shapes are kept in
`architectures.json` (written by `tools/index_architectures.py`). It only proposes: whoever asks builds what it names
and compares in full. Architectures that the installed timm knows and the index does not are built when they are needed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Shapes = Mapping[str, tuple[int, ...]]

#: Classifiers have as many rows as a training set has classes: they tell nothing of the architecture.
HEAD = re.compile(r"(head|heads|head_dist|fc|classifier|last_linear)\.")
#: Tensors whose sizes follow the image's or the window's.
SIZED = re.compile(r"(^|[._])(pos_embed\w*|rel_pos_[hw]|relative_position_bias_table|attention_biases)$")
# Made anew with every model, and absent from many files.
_BUFFERS = re.compile(r"(relative_position_index|attn_mask|num_batches_tracked|attention_bias_idxs)$")


# What initialisations are made of.
_FILLS = {
    Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_, Tensor.fill_,
    Tensor.zero_, Tensor.copy_, torch.nn.init.trunc_normal_,
}  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """What tells architectures apart, the classifier excepted.

    Attributes:
        exact: digest of names and shapes.
        loose: the same whatever the image size, the window size and the number of image channels are.
        numbers: how many numbers the tensors hold.
    """

    exact: str
    loose: str
    numbers: int


def signature(shapes: Shapes) -> Signature:
    """The signature of a state dict in timm's names."""
    body = {
        key: tuple(shape) for key, shape in sorted(shapes.items()) if not HEAD.match(key) and not _BUFFERS.search(key)
    }
    loose = {key: _loosened(key, shape) for key, shape in body.items()}
    return Signature(_digest(body), _digest(loose), sum(_count(shape) for shape in body.values()))


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by key."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


class _Uninitialised(TorchFunctionMode):
    """Weights without memory are not filled: going through the motions takes ten times as long as all the rest."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FILLS and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def on_meta(name: str, **kwargs: object) -> nn.Module:
    """An architecture without memory for its weights."""
    with torch.device("meta"), _Uninitialised():
        return timm.create_model(name, pretrained=False, **kwargs)


@functools.cache
def _stored() -> dict[str, Any]:
    return dict(json.loads(files("collapse_probe").joinpath("data/architectures.json").read_text(encoding="utf-8")))


def timm_of_index() -> str:
    """The version of timm that the index was made with."""
    return str(_stored()["timm"])


@functools.cache
def _built(name: str) -> Signature | None:
    """The signature of an architecture that the index does not know; None where it cannot be built."""
    try:
        return signature(shapes_of(on_meta(name).state_dict()))
    except Exception:  # some need packages that are not installed
        return None


def registered() -> Iterator[tuple[str, Signature]]:
    """Every architecture that can be built here, those of the index first."""
    index = {name: Signature(*entry) for name, entry in _stored()["architectures"].items()}
    names = set(timm.list_models())
    yield from ((name, entry) for name, entry in index.items() if name in names)
    for name in sorted(names - index.keys()):
        if (built := _built(name)) is not None:
            yield name, built


def _loosened(key: str, shape: tuple[int, ...]) -> tuple[object, ...]:
    if SIZED.search(key):
        return ("any size", len(shape))
    # The first convolution sees as many channels as the images have.
    return (shape[0], "channels", *shape[2:]) if len(shape) == 4 and shape[1] <= 4 else shape


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def _count(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda product, size: product * size, shape, 1)
