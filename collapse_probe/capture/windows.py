"""How features were cut into windows, told from the operators that cut them.

Layers compare window by window only where they cut in the same way. Models cut in two ways in turn: Swin rolls its
features before every second cut, MaxViT and CrossFormer take neighbouring positions and positions spread over a grid.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten


class WindowCut:
    """Follows rolls, and the permutations that bring windows together."""

    def __init__(self) -> None:
        self._rolled: dict[int, int] = {}
        self._spread = False

    @property
    def words(self) -> str:
        """What differs from windows of neighbours at their place: ``"shifted"``, ``"grid"``; empty if nothing."""
        words = ["shifted"] if any(self._rolled.values()) else []
        return ", ".join([*words, "grid"] if self._spread else words)

    def see(self, func: Any, args: Any) -> None:
        """Take note of an operator."""
        if func is aten.roll.default:
            self._roll(*args)
        elif func is aten.permute.default and args[0].ndim == 6:
            spread = _spread_over_grid(tuple(args[0].shape), [axis % 6 for axis in args[1]])
            self._spread = self._spread if spread is None else spread

    def _roll(self, tensor: torch.Tensor, shifts: Any, dims: Any = ()) -> None:
        for shift, dim in zip(shifts, dims, strict=False):
            axis = dim % tensor.ndim
            self._rolled[axis] = (self._rolled.get(axis, 0) + shift) % tensor.shape[axis]


def _spread_over_grid(shape: tuple[int, ...], order: list[int]) -> bool | None:
    """Whether a permutation cuts `[B, H1, H2, W1, W2, C]` or `[B, C, H1, H2, W1, W2]` into windows whose tokens are
    spread over a grid (H1, W1 within a window) and are not neighbours (H2, W2); None where it cuts nothing."""
    if order[0] != 0:
        return None  # queries, keys and values are taken apart
    layouts = {5: ((1, 2), (3, 4)), 1: ((2, 3), (4, 5))}
    ranked = sorted(layouts, key=lambda channel: (not _square(shape, layouts[channel]), order[-1] != channel))
    for channel in ranked:
        rows, columns = layouts[channel]
        spatial = [axis for axis in order[1:] if axis != channel]
        tokens = tuple(spatial[2:])
        if tokens == (rows[0], columns[0]):
            return True
        if tokens == (rows[1], columns[1]):
            return False
    return None


def _square(shape: tuple[int, ...], pairs: tuple[tuple[int, int], ...]) -> bool:
    (a, b), (c, d) = pairs
    return shape[a] * shape[b] == shape[c] * shape[d]
