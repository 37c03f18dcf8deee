"""How features were cut into windows, told from the operators that cut them.

Layers compare window by window only where they cut in the same way. Models cut in two ways in turn: Swin rolls its
features before every second cut, MaxViT and CrossFormer take neighbouring positions and positions spread over a grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

aten = torch.ops.aten


#: Tokens of a window that are no positions (registers), at most.
_MOST_REGISTERS = 32


class WindowCut:
    """Follows rolls, and the permutations that bring windows together."""

    def __init__(self) -> None:
        self._rolled: dict[int, int] = {}
        self._spread: dict[tuple[int, int], bool] = {}

    def words(self, windows: int, tokens: int) -> str:
        """What differs from windows of neighbours at their place: ``"shifted"``, ``"grid"``; empty if nothing.

        Args:
            windows: windows of an image in which attention runs.
            tokens: tokens of a window.
        """
        words = ["shifted"] if any(self._rolled.values()) else []
        return ", ".join([*words, "grid"] if self._on_grid(windows, tokens) else words)

    def see(self, func: Any, args: Any) -> None:
        """Take note of an operator."""
        if func is aten.roll.default:
            self._roll(*args)
        elif func is aten.permute.default and args[0].ndim == 6:
            for sizes, spread in _cuts(tuple(args[0].shape), [axis % 6 for axis in args[1]]):
                self._spread.pop(sizes, None)  # the newest stand last
                self._spread[sizes] = spread

    def _on_grid(self, windows: int, tokens: int) -> bool:
        """What the newest permutation that made so many windows of so many tokens did."""
        fitting = [
            spread
            for (count, size), spread in self._spread.items()
            if count == windows and 0 <= tokens - size <= _MOST_REGISTERS
        ]
        return bool(fitting) and fitting[-1]

    def _roll(self, tensor: torch.Tensor, shifts: Any, dims: Any = ()) -> None:
        for shift, dim in zip(shifts, dims, strict=False):
            axis = dim % tensor.ndim
            self._rolled[axis] = (self._rolled.get(axis, 0) + shift) % tensor.shape[axis]


def _cuts(shape: tuple[int, ...], order: list[int]) -> Iterator[tuple[tuple[int, int], bool]]:
    """Every reading of a permutation of `[B, H1, H2, W1, W2, C]` or `[B, C, H1, H2, W1, W2]` as a cut into windows:
    (windows, tokens of each), and whether these are spread over a grid (H1, W1) or neighbours (H2, W2)."""
    if order[0] != 0:
        return  # queries, keys and values are taken apart
    for channel, (rows, columns) in {5: ((1, 2), (3, 4)), 1: ((2, 3), (4, 5))}.items():
        *outer, first, second = (axis for axis in order[1:] if axis != channel)
        windows = math.prod(shape[axis] for axis in outer)
        for level, spread in ((0, True), (1, False)):
            if (first, second) == (rows[level], columns[level]):
                yield (windows, shape[first] * shape[second]), spread
