"""What a model's attention looks like on one image, as plain data: the picture, and maps of its layers.

Nothing here imports torch. :func:`~collapse_probe.looking.look_at` makes a look, `collapse_probe.plots` draws it.

H heads, Q queries, K keys; a map's row is one query's attention, its column is one key's contribution to every output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.errors import UsageError

#: A token, as callers name it: "class", "mean" (all of them, equally), a place on the patch grid, or its number.
Token = str | tuple[int, int] | int

CLASS, MEAN = "class", "mean"


@dataclass(frozen=True)
class LayerLook:
    """One layer's attention on the image.

    Attributes:
        name: qualified name of the layer.
        number: its place among all layers that attend, in execution order, from 0.
        kind: ``"token"``, ``"class"`` (the class token asks) or ``"pooling"`` (a learnt query asks).
        heads: how many it has (H).
        prefix_tokens: how many leading keys are not patches.
        grid: height and width of the grid on which the other keys lie; None where it is not known.
        query_prefix, query_grid: the same of the queries.
        class_token: whether token 0 is a class token.
        is_probability: whether rows are probabilities; else maps were mixed after the softmax and may be negative.
        mean: mean of the map over heads, ``[Q, K]``, float32.
        maps: head -> its map ``[Q, K]``, float32, of the heads that were kept.
        previous: name of the layer before it that it may be compared with; None for the first of them.
        similarity: M (DeepViT, equation 2) of each key's column with that layer's, ``[H, K]``; NaN where a column is
            zero, None without a previous layer.
        block: name of the block it stands in; None where that was not recognised.
    """

    name: str
    number: int
    kind: str
    heads: int
    prefix_tokens: int
    grid: tuple[int, int] | None
    query_prefix: int
    query_grid: tuple[int, int] | None
    class_token: bool
    is_probability: bool
    mean: NDArray[np.float32] = field(repr=False)
    maps: Mapping[int, NDArray[np.float32]] = field(default_factory=dict, repr=False)
    previous: str | None = None
    similarity: NDArray[np.float64] | None = field(default=None, repr=False)
    block: str | None = None

    @property
    def queries(self) -> int:
        """Q."""
        return int(self.mean.shape[0])

    @property
    def keys(self) -> int:
        """K."""
        return int(self.mean.shape[1])

    def map_of(self, head: int | None) -> NDArray[np.float32]:
        """One head's map ``[Q, K]``, or with None the mean over heads.

        Raises:
            UsageError: there is no such head, or its map was not kept.
        """
        if head is None:
            return self.mean
        if not 0 <= head < self.heads:
            raise UsageError(f"{self.name} has no head {head}; it has {self.heads}, counted from 0.")
        if head not in self.maps:
            kept = f"heads {sorted(self.maps)}" if self.maps else "the mean over heads only"
            raise UsageError(f"The map of head {head} of {self.name} was not kept, but {kept}: name it in look_at().")
        return self.maps[head]

    def query_weights(self, query: Token) -> NDArray[np.float64]:
        """What share each query has in the attention that is shown, ``[Q]``; sums to 1.

        Raises:
            UsageError: this layer has no such query.
        """
        if self.queries == 1:  # a class token or a learnt query asks alone
            return np.ones(1)
        if query == MEAN:
            return np.full(self.queries, 1 / self.queries)
        weights = np.zeros(self.queries)
        weights[self._place(query, self.queries, self.query_prefix, self.query_grid, "queries")] = 1
        return weights

    def key_place(self, token: Token) -> int:
        """Which key a token is.

        Raises:
            UsageError: this layer has no such key.
        """
        return self._place(token, self.keys, self.prefix_tokens, self.grid, "keys")

    def _place(self, token: Token, count: int, prefix: int, grid: tuple[int, int] | None, what: str) -> int:
        if token == CLASS:
            if not (self.class_token and prefix):
                raise UsageError(f"{self.name} has no class token among its {what}: choose a patch as (row, column).")
            return 0
        if isinstance(token, (int, np.integer)) and not isinstance(token, bool):
            if not 0 <= token < count:
                raise UsageError(f"{self.name} has {count} {what}, counted from 0; there is no {token}.")
            return int(token)
        if isinstance(token, tuple) and len(token) == 2 and all(isinstance(part, (int, np.integer)) for part in token):
            if grid is None:
                raise UsageError(
                    f"The {count} {what} of {self.name} lie on no known grid: give a token's number instead of {token}."
                )
            (row, column), (height, width) = token, grid
            if not (0 <= row < height and 0 <= column < width):
                raise UsageError(f"{token} lies outside the {height} x {width} patches of {self.name}, counted from 0.")
            return prefix + int(row) * width + int(column)
        raise UsageError(f"{token!r} is no token: give 'class', (row, column) on the patch grid, or its number.")


@dataclass(frozen=True)
class Look:
    """What :func:`~collapse_probe.looking.look_at` saw: one image through one model.

    Attributes:
        picture: the image as the model saw it, resized and cropped, in 0..1: ``[h, w, 3]``, or ``[h, w]`` of one
            channel.
        layers: those whose maps can be laid over the image, by name, in execution order.
        left_out: layer -> why it is none of them.
        order: names of all layers in execution order, those left out as far as their maps are known.
        attention: ``"applied"`` or ``"softmax"``, as for `analyze`.
        provenance: model, image, preprocessing and versions, as far as they are known.
    """

    picture: NDArray[np.float32] = field(repr=False)
    layers: dict[str, LayerLook]
    left_out: dict[str, str] = field(default_factory=dict)
    order: Sequence[str] = ()
    attention: str = "applied"
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)

    def choose(self, layers: Sequence[int | str] | int | str | None = None) -> list[LayerLook]:
        """The layers that are meant, in execution order.

        Args:
            layers: numbers as in :attr:`LayerLook.number` (negative ones count from the last layer), names, or
                shell-style patterns of names; by default all.

        Raises:
            UsageError: there is no such layer, or it was left out; says why.
        """
        known = list(self.layers.values())
        if layers is None:
            return known
        wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
        if not wanted:
            raise UsageError("layers is empty: name one or more, or leave it out.")
        names = {name for item in wanted for name in self._named(item)}
        return [layer for layer in known if layer.name in names]

    def _named(self, item: int | str) -> list[str]:
        if isinstance(item, (int, np.integer)):
            try:
                name = self.order[item]
            except IndexError:
                raise UsageError(f"There is no layer {item}: {len(self.order)} attend, counted from 0.") from None
            found = [name]
        else:
            found = [name for name in [*self.order, *self.left_out] if name == item or fnmatchcase(name, item)]
        drawn = [name for name in found if name in self.layers]
        if drawn:
            return drawn
        if found:
            raise UsageError(f"{found[0]} cannot be laid over the image: {self.left_out[found[0]]}.")
        raise UsageError(f"No layer is called {item!r}; there are {', '.join(self.order)}.")
