"""Leading axes: images, windows and heads, in whatever order and folding a model keeps them."""

from __future__ import annotations

import itertools

import pytest
import torch

from collapse_probe.capture.axes import Site, arrangement

# 3 images, 4 windows, 2 heads: how the tensor [B, W, H, Q, K] is laid out, and what is known of the place.
LAYOUTS = {
    "windows within the batch": (lambda t: t.flatten(0, 1), Site(3, 2)),
    "windows on an axis of their own": (lambda t: t, Site(3, 2)),
    "windows behind the heads": (lambda t: t.transpose(1, 2), Site(3, 2)),
    "heads within the batch": (lambda t: t.flatten(0, 2), Site(3, 2)),
    "heads within the batch, windows behind": (lambda t: t.transpose(1, 2).flatten(0, 1), Site(3, 2)),
    "two axes of windows": (lambda t: t.unflatten(1, (2, 2)), Site(3, 5)),
    "heads unknown": (lambda t: t.flatten(0, 1), Site(3, None)),
    "a batch of one holds all": (lambda t: t.flatten(0, 1).flatten(0, 1)[None], Site(3, 2)),
}


def tensor(windows=4, heads=2):
    return torch.arange(3 * windows * heads * 5 * 6, dtype=torch.float32).view(3, windows, heads, 5, 6)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "a batch of one holds all"])
def test_every_layout_becomes_images_times_windows_by_heads(name):
    lay, site = LAYOUTS[name]
    expected = tensor()
    laid = lay(expected)
    axes = arrangement(laid.shape[:-2], site)
    assert (axes.images, axes.windows, axes.heads) == (3, 4, 2)
    assert torch.equal(axes(laid), expected.flatten(0, 1))
    # Products come with all leading axes as one.
    assert torch.equal(axes(laid.reshape(-1, 5, 6)), expected.flatten(0, 1))


def test_images_folded_into_the_heads_of_a_batch_of_one():
    expected = tensor(windows=1)
    axes = arrangement((1, 6), Site(3, 2))
    assert (axes.images, axes.windows, axes.heads) == (3, 1, 2)
    assert torch.equal(axes(expected.reshape(1, 6, 5, 6)), expected.flatten(0, 1))


def test_equally_many_windows_and_heads():
    expected = tensor(windows=2)
    behind = arrangement((3, 2, 2), Site(3, 2, windows_last=True))
    assert torch.equal(behind(expected.transpose(1, 2)), expected.flatten(0, 1))
    before = arrangement((3, 2, 2), Site(3, 2))
    assert torch.equal(before(expected), expected.flatten(0, 1))


@pytest.mark.parametrize(
    ("lead", "site", "sizes"),
    [
        ((6, 4), Site(None, 4), (6, 1, 4)),  # images unknown: whatever the first axis holds
        ((8,), Site(None, 4), (2, 1, 4)),
        ((8,), Site(2, None), (2, 4, 1)),
        ((2, 8), Site(2, 4), (2, 1, 8)),  # two softmaxes for each head
        ((1, 3), Site(1, 3), (1, 1, 3)),
        ((), Site(4, 2), (1, 1, 1)),
        ((5, 3), Site(2, 3), (5, 1, 3)),  # not a multiple of the images
    ],
)
def test_what_cannot_be_told_apart_is_not_guessed(lead, site, sizes):
    axes = arrangement(lead, site)
    assert (axes.images, axes.windows, axes.heads) == sizes


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "a batch of one holds all"])
@pytest.mark.parametrize("varies", list(itertools.product([False, True], repeat=5)))
def test_what_broadcasts_keeps_its_value_and_only_its_own_memory(name, varies):
    lay, site = LAYOUTS[name]
    sizes = tuple(size if own else 1 for size, own in zip((3, 4, 2, 5, 6), varies, strict=True))
    bias = torch.randn(sizes)
    full = bias.expand(3, 4, 2, 5, 6)
    laid = lay(full)
    axes = arrangement(laid.shape[:-2], site)
    compact = axes.broadcast(laid, (5, 6))
    period = compact.shape[0]
    repeated = compact.repeat(12 // period, 1, 1, 1).expand(12, 2, 5, 6)
    assert torch.equal(repeated, full.flatten(0, 1))
    if not varies[0] and laid.ndim == 5 and site.heads == 2:
        assert compact.numel() == bias.numel()  # nothing is spelled out that only repeats
    assert compact.untyped_storage().data_ptr() != bias.untyped_storage().data_ptr()
