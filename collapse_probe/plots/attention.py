"""Attention itself: maps of one image's layers, laid over the picture that the model saw.

Prefix tokens (class token, registers) have no place on the picture; what falls on them stands under each panel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from collapse_probe.errors import UsageError
from collapse_probe.look import CLASS, MEAN, LayerLook, Look, Token
from collapse_probe.plots.details import evenly_spaced
from collapse_probe.plots.overlays import HEADING, Box, Overlay, paint, panels, show, strip
from collapse_probe.plots.sizes import figure_width, set_heading
from collapse_probe.plots.style import paper
from collapse_probe.rollout import attention_rollout

#: How callers name layers: numbers in execution order, names, or patterns of names.
Layers = Sequence[int | str] | int | str | None

#: Layers of a strip and rows of a grid where none are named; least width of a panel in inches.
_MOST_IN_STRIP, _MOST_ROWS, _LEAST_PANEL = 13, 4, 0.78


@paper()
def attention_over_image(
    look: Look,
    *,
    layers: Layers = None,
    heads: Sequence[int] | None = None,
    query: Token | None = None,
    scale: str = "panel",
) -> tuple[Figure, NDArray[Any]]:
    """Where a query looks: a row for each layer, and in it the mean over heads and single heads.

    Args:
        look: from :func:`~collapse_probe.look_at`.
        layers: numbers in execution order (negative ones count from the last), names or shell-style patterns; by
            default four, evenly spaced.
        heads: which; by default those that the look has kept of all these layers, as many as there is room for; with
            ``()`` the mean over heads alone.
        query: ``"class"``, ``"mean"`` (of all queries), a patch as (row, column), or a token's number. By default the
            class token, and where there is none the mean.
        scale: ``"panel"`` colours each map up to its own largest value, which stands below it; ``"shared"`` all maps on
            one scale.

    Returns:
        The figure and its axes, ``[layers, 1 + heads]``; the picture has axes of its own before them.

    Raises:
        UsageError: there is no such layer, head, query or scale, a layer has no place on the picture, or there is no
            room for so many heads.
    """
    chosen = _suitable(look, layers, _MOST_ROWS, lambda layer: _no_row(layer, query))
    width = figure_width(7.0)
    columns = [None, *_heads(chosen, heads, int(width / _LEAST_PANEL) - 2)]
    overlays = [[_row(layer, head, query) for head in columns] for layer in chosen]
    words = _words_of_rows(chosen, query)
    figure, axes = panels(look.picture, len(chosen), len(columns) + 1, width, words, scale, headed=False)
    for ax in axes[1:, 0]:
        ax.remove()
    show(axes[0, 0], look.picture, overlays[0][0].mark)
    maps = axes[:, 1:]
    paint(figure, maps.ravel(), look.picture, [item for row in overlays for item in row], scale)
    for ax, layer in zip(maps[:, 0], chosen, strict=True):
        ax.set_ylabel(f"Layer {layer.number}", fontsize=HEADING["fontsize"])
    for ax, head in zip(maps[0], columns, strict=True):
        ax.set_title("mean" if head is None else f"head {head}", **HEADING)
    set_heading(figure, f"Attention of {_asker(chosen[-1], query)}")
    return figure, maps


@paper()
def attention_by_depth(
    look: Look, *, layers: Layers = None, query: Token | None = None, scale: str = "panel"
) -> tuple[Figure, NDArray[Any]]:
    """Where a query looks, mean over heads, layer after layer: by default the class token, or the mean of all queries
    where there is none.

    Args:
        look, query, scale: as for :func:`attention_over_image`.
        layers: by default all, or 13 of them, evenly spaced.

    Returns:
        The figure and its axes as a flat array, the picture first.

    Raises:
        UsageError: as :func:`attention_over_image`.
    """
    chosen = _suitable(look, layers, _MOST_IN_STRIP, lambda layer: _no_row(layer, query))
    overlays = [_row(layer, None, query, f"Layer {layer.number}") for layer in chosen]
    words = ["Mean over heads.", *_words_of_rows(chosen, query)]
    return strip(look.picture, overlays, f"Attention of {_asker(chosen[-1], query)}, by depth", words, scale)


@paper()
def rollout_by_depth(
    look: Look, *, layers: Layers = None, query: Token | None = None, scale: str = "panel"
) -> tuple[Figure, NDArray[Any]]:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928) from a query down to the patches, after each layer.

    Args:
        look, layers, query, scale: as for :func:`attention_by_depth`.

    Returns:
        The figure and its axes as a flat array, the picture first.

    Raises:
        UsageError: as :func:`attention_by_depth`; or the maps of this model cannot be multiplied.
    """
    first = next(iter(look.layers.values()))
    asked = _default(first) if query is None else query
    chain, values = attention_rollout(look, asked)
    rolled = {layer.name: row for layer, row in zip(chain, values, strict=True)}

    def unsuitable(layer: LayerLook) -> str:
        return _no_grid(layer) if layer.name in rolled else f"{layer.name} pools the tokens: rollout ends before it."

    overlays = [
        _on_grid(layer, rolled[layer.name], f"Layer {layer.number}", _marked(layer, asked))
        for layer in _suitable(look, layers, _MOST_IN_STRIP, unsuitable)
    ]
    words = [
        f"Rollout from {_asker(first, asked)}: mean over heads and half an identity, multiplied from layer "
        f"{first.number} to the one shown.",
        *_words_of_prefix(chain),
    ]
    return strip(look.picture, overlays, "Attention rollout, by depth", words, scale)


@paper()
def column_by_depth(
    look: Look, token: Token | None = None, *, layers: Layers = None, head: int | None = None, scale: str = "panel"
) -> tuple[Figure, NDArray[Any]]:
    """How much one token contributes to every output, layer after layer: the columns that M compares.

    Where attention collapses, the pictures repeat each other from some layer on, and the M below them is near 1.

    Args:
        look: from :func:`~collapse_probe.look_at`.
        token: ``"class"``, a patch as (row, column), or a token's number; by default the patch in the middle.
        layers: by default all, or 13 of them, evenly spaced. M is with the layer before in the model, shown or not.
        head: one head's column and its M; by default the means of both over heads.
        scale: as for :func:`attention_over_image`.

    Returns:
        The figure and its axes as a flat array, the picture first.

    Raises:
        UsageError: there is no such token, layer, head or scale, or queries of a layer have no place on the picture.
    """
    chosen = _suitable(look, layers, _MOST_IN_STRIP, lambda layer: _no_column(layer, token))
    places = [layer.key_place(_middle(layer) if token is None else token) for layer in chosen]
    overlays = [_column(layer, place, head) for layer, place in zip(chosen, places, strict=True)]
    words = [
        f"How much each output draws from this token; {'means over heads' if head is None else f'head {head}'}. M: "
        "cosine of its column with that of the layer before (DeepViT, equation 2); – where there is none.",
    ]
    title = f"What {_token_words(chosen[0], places[0])} contributes, by depth"
    return strip(look.picture, overlays, title, words, scale)


# -- which layers ------------------------------------------------------------------------------------------------------


def _suitable(look: Look, layers: Layers, most: int, unsuitable: Callable[[LayerLook], str]) -> list[LayerLook]:
    """The layers that are named, which must suit; or of those that do, as many as there is room for."""
    chosen = look.choose(layers)
    reasons = [unsuitable(layer) for layer in chosen]
    if layers is None and not all(reasons):
        suitable = [layer for layer, reason in zip(chosen, reasons, strict=True) if not reason]
        return [suitable[at] for at in evenly_spaced(len(suitable), most)]
    for reason in filter(None, reasons):
        raise UsageError(reason)
    return chosen


def _no_grid(layer: LayerLook) -> str:
    """Why keys of this layer cannot be shown; empty where they can."""
    if layer.grid is not None:
        return ""
    return f"The {layer.keys} keys of {layer.name} lie on no known grid, so its map has no place on the picture."


def _no_row(layer: LayerLook, query: Token | None) -> str:
    """Why a row of this layer cannot be shown; empty where it can."""
    try:
        layer.query_weights(_default(layer) if query is None else query)
    except UsageError as error:
        return str(error)
    return _no_grid(layer)


def _no_column(layer: LayerLook, token: Token | None) -> str:
    """Why a column of this layer cannot be shown; empty where it can."""
    if layer.query_grid is None:
        return (
            f"The {layer.queries} queries of {layer.name} lie on no known grid, so a column of its map has no place on "
            "the picture."
        )
    try:
        layer.key_place(_middle(layer) if token is None else token)
    except UsageError as error:
        return str(error)
    return ""


def _heads(layers: Sequence[LayerLook], heads: Sequence[int] | None, most: int) -> list[int]:
    if heads is None:
        common = sorted(set.intersection(*(set(layer.maps) for layer in layers)))
        return [common[at] for at in evenly_spaced(len(common), most)] if common else []
    if len(heads) > most:
        raise UsageError(f"There is room for {most} heads beside each other, not {len(heads)}: choose among them.")
    return list(heads)


def _default(layer: LayerLook) -> Token:
    """Who asks where the caller does not say."""
    return CLASS if layer.class_token and layer.query_prefix else MEAN


def _middle(layer: LayerLook) -> Token:
    height, width = layer.grid or (1, layer.keys)
    return (height // 2, width // 2)


# -- what of them ------------------------------------------------------------------------------------------------------


def _row(layer: LayerLook, head: int | None, query: Token | None, heading: str = "") -> Overlay:
    asked = _default(layer) if query is None else query
    values = layer.query_weights(asked) @ layer.map_of(head).astype(np.float64)
    return _on_grid(layer, values, heading, _marked(layer, asked))


def _on_grid(layer: LayerLook, values: NDArray[np.floating], heading: str, mark: Box | None) -> Overlay:
    """Values of keys, ``[K]``, as a picture; what falls on prefix tokens is said below."""
    assert layer.grid is not None
    patches = values[layer.prefix_tokens :].reshape(layer.grid)
    note = _largest(patches)
    if layer.prefix_tokens:
        note += f"\nprefix {values[: layer.prefix_tokens].sum():.2f}"
    return Overlay(patches, heading, note, mark)


def _column(layer: LayerLook, place: int, head: int | None) -> Overlay:
    assert layer.query_grid is not None
    patches = layer.map_of(head)[layer.query_prefix :, place].reshape(layer.query_grid)
    similarity = "M –"
    if layer.similarity is not None:
        known = layer.similarity[:, place] if head is None else layer.similarity[[head], place]
        known = known[np.isfinite(known)]
        similarity = f"M {known.mean():.2f}" if known.size else "M undefined"
    return Overlay(patches, f"Layer {layer.number}", f"{similarity}\n{_largest(patches)}", _box(layer, place))


def _largest(values: NDArray[np.floating]) -> str:
    flat = values.ravel()
    return f"max {flat[np.abs(flat).argmax()]:.2g}"


def _marked(layer: LayerLook, query: Token) -> Box | None:
    """The patch of a query; None where it is no patch."""
    if query in (CLASS, MEAN) or layer.queries == 1:
        return None
    return _box(layer, int(layer.query_weights(query).argmax()))


def _box(layer: LayerLook, place: int) -> Box | None:
    """Where the patch of a query lies; None for a prefix token, or where that is not known."""
    if layer.query_grid is None or place < layer.query_prefix:
        return None
    height, width = layer.query_grid
    row, column = divmod(place - layer.query_prefix, width)
    return row / height, column / width, 1 / height, 1 / width


# -- in words ----------------------------------------------------------------------------------------------------------


def _asker(layer: LayerLook, query: Token | None) -> str:
    if layer.queries == 1:
        return "a learnt query" if layer.kind == "pooling" else "the class token"
    asked = _default(layer) if query is None else query
    if asked == CLASS:
        return "the class token"
    if asked == MEAN:
        return "all queries, on average"
    return f"patch {asked}" if isinstance(asked, tuple) else f"token {asked}"


def _token_words(layer: LayerLook, place: int) -> str:
    if place >= layer.prefix_tokens:
        _, width = layer.grid or (1, layer.keys)
        return f"patch {divmod(place - layer.prefix_tokens, width)}"
    return "the class token" if place == 0 and layer.class_token else f"prefix token {place}"


def _words_of_rows(layers: Sequence[LayerLook], query: Token | None) -> list[str]:
    askers: dict[str, list[str]] = {}
    for layer in layers:
        askers.setdefault(_asker(layer, query), []).append(str(layer.number))
    words = []
    if len(askers) > 1:
        known = "; ".join(f"{asker} (layers {', '.join(numbers)})" for asker, numbers in askers.items())
        words = [f"Attention of {known}."]
    elif query is None and layers[0].queries > 1 and _default(layers[0]) == MEAN:
        words = ["There is no class token: mean over all queries."]
    return [*words, *_words_of_prefix(layers)]


def _words_of_prefix(layers: Sequence[LayerLook]) -> list[str]:
    most = max(layer.prefix_tokens for layer in layers)
    if not most:
        return []
    if not layers[0].class_token:
        return [f"prefix: share of the attention that falls on {most} tokens that are no patches."]
    registers = f" and {most - 1} tokens that are no patches" if most > 1 else ""
    return [f"prefix: share of the attention that falls on the class token{registers}."]
