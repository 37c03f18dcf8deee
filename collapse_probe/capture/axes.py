"""Which leading axes of an attention tensor are images, windows and heads.

Models keep them in every order and fold them into each other: `[B, H, Q, K]`, `[B W, H, Q, K]` (Swin),
`[B, H, W, Q, K]` (Hiera, NesT), `[B W H, Q, K]`, `[B H, W, Q, K]` (HaloNet), `[1, B H, Q, K]`. What is known of the
place, the size of the batch and the number of heads, tells them apart; beyond it only two things are taken as given:
images come first within what is folded, heads last. An :class:`Arrangement` brings any of them to `[B W, H, Q, K]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Site:
    """What is known of the place where attention runs.

    Attributes:
        images: images in the batch; None where unknown.
        heads: heads of the running module; None where it does not say.
        windows_last: whether windows follow the heads where two axes are equally long.
    """

    images: int | None = None
    heads: int | None = None
    windows_last: bool = False


@dataclass(frozen=True)
class Arrangement:
    """How leading axes become `[B W, H]`.

    Attributes:
        lead: the leading axes as they are.
        split: the same with folded axes taken apart.
        order: positions in `split` of images, then windows, then heads.
    """

    lead: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def images(self) -> int:
        return self.split[self.order[0]]

    @property
    def windows(self) -> int:
        """Windows per image."""
        return math.prod(self.split[axis] for axis in self.order[1:-1])

    @property
    def heads(self) -> int:
        return self.split[self.order[-1]]

    @property
    def heads_axis(self) -> int | None:
        """Which of the leading axes holds the heads and nothing else; None where they are folded into another."""
        before = math.prod(self.split[: self.order[-1]])
        position = next((i for i in range(len(self.lead)) if math.prod(self.lead[:i]) == before), None)
        return position if position is not None and self.lead[position] == self.heads else None

    def __call__(self, tensor: Tensor) -> Tensor:
        """`[*lead, x, y]`, or all leading axes as one, -> `[B W, H, x, y]`; a view where that can be."""
        tail = tuple(tensor.shape[-2:])
        apart = tensor.reshape(self.split + tail).permute(*self.order, len(self.order), len(self.order) + 1)
        return apart.reshape(self.images * self.windows, self.heads, *tail)

    def broadcast(self, tensor: Tensor, tail: tuple[int, int]) -> Tensor:
        """An own copy of what broadcasts to `[*lead, *tail]`, as `[P, H, x, y]` with axes of length 1 where it does
        not vary. P is 1, or W where only windows differ (every image repeats them), or B W."""
        apart = tensor.expand(self.lead + tail).reshape(self.split + tail)
        apart = apart.permute(*self.order, len(self.order), len(self.order) + 1)
        once = [size == 1 or stride == 0 for size, stride in zip(apart.shape, apart.stride(), strict=True)]
        windows_alike, images_alike = all(once[1:-3]), once[0]
        for axis, alike in enumerate(once):
            is_window = 1 <= axis < len(once) - 3
            # Windows stay spelled out where images differ, or where one of several window axes does.
            if alike and (not is_window or (windows_alike and images_alike)):
                apart = apart.narrow(axis, 0, 1)
        return apart.reshape(-1, *apart.shape[-3:]).clone()


def arrangement(lead: tuple[int, ...], site: Site) -> Arrangement:
    """The arrangement of these leading axes at this place."""
    lead = tuple(lead) or (1,)
    images, rest = site.images, list(lead[1:])
    first = lead[0]
    if len(lead) == 2 and images == lead[1] != lead[0] == site.heads:
        return Arrangement(lead, (first, images, 1), (1, 2, 0))  # heads before images
    if first == 1 and rest and images and images > 1 and rest[0] % images == 0:
        first, rest = rest[0], rest[1:]  # images folded into the heads of a batch of one
    if not images or first % images:
        images = first
        if not rest and site.heads and first % site.heads == 0:
            images = first // site.heads
    inner = first // images
    heads_at = _heads_axis(rest, inner, site)
    if heads_at is not None:
        split = [images, inner, *rest]
        heads_position = 2 + heads_at
    else:  # no axis of their own: folded into the first one, or a single head
        heads = site.heads if site.heads and inner % site.heads == 0 else 1
        split = [images, inner // heads, heads, *rest]
        heads_position = 2
    order = [position for position in range(len(split)) if position != heads_position] + [heads_position]
    return Arrangement(lead, tuple(split), tuple(order))


def _heads_axis(rest: list[int], inner: int, site: Site) -> int | None:
    """Which axis behind the first holds the heads; None where they are folded into the first."""
    if not rest or (site.heads == 1 and 1 not in rest):
        return None
    fitting = [position for position, size in enumerate(rest) if size == site.heads]
    if fitting:
        return fitting[0] if site.windows_last else fitting[-1]
    folded = site.heads is not None and site.heads > 1 and inner % site.heads == 0
    return None if folded else len(rest) - 1
