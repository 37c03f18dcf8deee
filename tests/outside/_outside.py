"""What every model is asked: unchanged outputs, complete and exact maps, and a batch axis that really is images."""

from __future__ import annotations

import contextlib

import torch
from _models import perturbed
from _reference_graph import reference_maps
from torch.utils._python_dispatch import TorchDispatchMode

from collapse_probe.capture import capture
from collapse_probe.capture.attention_map import KINDS

__all__ = [
    "assert_equal_to_the_graph",
    "assert_images_are_images",
    "assert_maps",
    "close",
    "images_of",
    "observed",
    "perturbed",
    "tensors_of",
    "tokens_of",
]


def images_of(count=2, size=32, seed=1, dtype=torch.float32):
    """Images that differ from each other."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens_of(*shape, seed=1, dtype=torch.float32):
    """Tokens `shape`, unlike each other."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors_of(value):
    """The tensors in an output, whatever it is made of, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_of(item)] if isinstance(value, (list, tuple)) else []


class OnlyWatching(TorchDispatchMode):
    """A dispatch mode that does nothing at all."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def observed(model, *inputs, mode=torch.no_grad, **named):
    """What capture saw of one forward pass, whose outputs are bit for bit those of the same pass without it.

    Under inference mode, PyTorch rounds `linear` of a transposed input otherwise as soon as any dispatch mode is
    active, so there the other pass runs under one that does nothing.
    """
    with mode():
        torch.manual_seed(0)
        with OnlyWatching() if mode is torch.inference_mode else contextlib.nullcontext():
            plain = model(*inputs, **named)
        with capture(model) as captured:
            torch.manual_seed(0)
            output = model(*inputs, **named)
    plain, output = tensors_of(plain), tensors_of(output)
    assert plain
    assert len(plain) == len(output)
    assert all(torch.equal(one, other) for one, other in zip(plain, output, strict=True))
    return captured


def close(actual, expected, atol=1e-5):
    """Equal values in float64."""
    torch.testing.assert_close(actual.double(), expected.detach().double(), atol=atol, rtol=0)


def assert_peaked(reference):
    """Nearly uniform maps agree with anything: a comparison with them says nothing."""
    queries, keys = reference.shape[-2:]
    if keys > 1:
        deviation = (reference - reference.mean((-2, -1), keepdim=True)).norm() / reference.norm()
        assert deviation > 0.05, f"map of {queries} x {keys} is nearly uniform ({deviation:.4f})"


def assert_maps(captured, expected, atol=1e-5):
    """Maps `[B, H, Q, K]` in execution order equal the expected ones, as a whole and part by part, with no gap."""
    assert not captured.not_captured
    assert len(captured.maps) == len(expected)
    for attention, reference in zip(captured.maps.values(), expected, strict=True):
        assert attention.shape == tuple(reference.shape), attention.name
        assert_peaked(reference)
        _, _, queries, keys = attention.shape
        close(attention.materialize(), reference, atol)
        close(attention.columns(keys // 2, keys), reference[..., keys // 2 :], atol)
        close(attention.rows(queries // 2, queries), reference[:, :, queries // 2 :], atol)


def assert_equal_to_the_graph(captured, outputs, atol=1e-5, gaps=0):
    """Every product of a softmax with values in the graph of `outputs` is a map, in order, but for `gaps` listed ones.

    Windows of one image may be kept in an order of their own, so leading axes are compared as a set.
    """
    expected, idle = reference_maps(outputs)
    assert expected
    assert len(captured.not_captured) == gaps, captured.not_captured
    assert len(captured.maps) + gaps == len(expected) + len(idle)
    waiting = iter(expected)
    for attention in captured.maps.values():
        assert attention.kind in KINDS
        actual = attention.materialize().double().flatten(0, 1)
        reference = next((item.applied for item in waiting if gaps == 0 or _same(item.applied, actual, atol)), None)
        assert reference is not None, attention.name
        assert_peaked(reference)
        assert _same(reference, actual, atol), (
            attention.name,
            actual.shape,
            reference.shape,
            _worst(reference, actual),
        )


def _same(reference, actual, atol):
    return reference.shape == actual.shape and _worst(reference, actual) <= atol


def _worst(reference, actual):
    """Largest difference of any single map from its nearest counterpart, both ways; infinite where shapes differ."""
    if reference.shape != actual.shape:
        return float("inf")
    straight = (reference - actual).abs().max().item()
    if straight <= 1e-5:
        return straight
    distance = torch.cdist(reference.flatten(1), actual.flatten(1), p=float("inf"))
    return max(distance.amin(0).max().item(), distance.amin(1).max().item())


def assert_images_are_images(model, images, captured, atol=1e-5, call=None):
    """What belongs to image i in the batch is what image i gives alone.

    Args:
        call: `(model, images) -> captured` where images are not the one positional argument.
    """
    for index in range(len(images)):
        alone = (call or observed)(model, images[index : index + 1])
        assert list(alone.maps) == list(captured.maps)
        for name, attention in captured.maps.items():
            single = alone.maps[name]
            assert attention.images == len(images), (name, attention.shape, attention.windows, attention.kind)
            assert single.images == 1, (name, single.shape, single.windows)
            assert (single.kind, single.windows, single.shape[1:]) == (
                attention.kind,
                attention.windows,
                attention.shape[1:],
            ), name
            close(attention.select(index, index + 1).materialize(), single.materialize(), atol)
