"""Everything between two layers for the interactive page: heatmaps to switch between, and each pair by head and token.

Means over images are plain numbers. By head and by token they are many, L² (H + K); a byte for each is enough for a
picture, and tokens of large grids are pooled until all of them fit into a budget.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from collapse_probe.plots.details import over_windows, patch_grid
from collapse_probe.plots.matrices import BESIDE, COLUMNS, READINGS, SIGNED, owners_of, values_between
from collapse_probe.plots.select import Arrangement
from collapse_probe.plots.style import DIVERGING, SEQUENTIAL, colour_scale
from collapse_probe.report.charts import numbers
from collapse_probe.result import PARTS, Analysis, Group

#: Bytes that the pictures by token may take together, before base64.
BUDGET = 2**20

#: What each heatmap means, in a sentence.
MEANINGS = {
    "similarity": "How alike the attention of two blocks is: 1 where every key token is attended to by the same "
    "queries. Untrained networks read near 1 too.",
    "centred": "The same after uniform attention is taken away. Near 0: the blocks shared no more than uniformity.",
    "image_independent": "M between one image and another: what blocks share whatever they see.",
    "excess": "M minus its image-independent part: what blocks share because of the image at hand.",
    "tv_similarity": "How much of each query's attention falls on the same keys (rows; Reuse Transformer).",
    "cka": "Linear CKA: whether two blocks tell images apart in the same way.",
    "feature_similarity": "Cosine of each token's features after two blocks.",
}
PART_WORDS = {"all": "all key tokens", "prefix": "prefix tokens (class token, registers)", "patch": "patches"}

#: A byte that stands for "not defined"; the others are values from the low end to the high one.
_ABSENT, _LEVELS = 255, 254


@dataclass(frozen=True)
class Explorer:
    """What the page's script draws, and what the page itself says about it.

    Attributes:
        drawn: plain data: axes, views (a heatmap each), details of each group, colour scales.
        readings: name, title and meaning of each reading to choose from.
        parts: name and words of each set of key tokens to choose from.
        layers: position, number and name of each layer to choose from, in the order drawn.
        start: the pair of positions that is shown first.
    """

    drawn: dict[str, Any]
    readings: list[tuple[str, str, str]]
    parts: list[tuple[str, str]]
    layers: list[tuple[int, int, str]]
    start: tuple[int, int]


def explorer(analysis: Analysis) -> Explorer | None:
    """The heatmaps of an analysis; None where no two layers of it can be compared."""
    if not analysis.groups:
        return None
    shown = {reading: owners_of(analysis, reading, None) for reading in (*COLUMNS, *BESIDE)}
    views = [view for part in PARTS for reading, where in shown.items() if (view := _view(where, part, reading))]
    if not views:
        return None
    # Layers are chosen by name, as readings of attention and of features may stand in different orders.
    order = next(shown[view["reading"]] for view in views)
    readings = list(dict.fromkeys(view["reading"] for view in views))
    parts = list(dict.fromkeys(view["part"] for view in views))
    drawn = {
        "views": views,
        "layers": order.layers,
        "groups": [_details(group, analysis.groups) for group in analysis.groups if len(group.layers) > 1],
        "scales": {name: _colours(cmap) for name, cmap in (("sequential", SEQUENTIAL), ("diverging", DIVERGING))},
    }
    return Explorer(
        drawn,
        [(name, READINGS[name][0], MEANINGS[name]) for name in readings],
        [(name, PART_WORDS[name]) for name in parts],
        list(zip(range(len(order.layers)), order.numbers, order.layers, strict=True)),
        _most_alike(views[0]),
    )


def _view(shown: Arrangement, part: str, reading: str) -> dict[str, Any] | None:
    """One heatmap; None where no two layers have a value."""
    values = values_between(shown, part, reading)
    between = ~np.eye(len(values), dtype=bool)
    if not np.isfinite(values[between]).any():
        return None
    scale = colour_scale(values, signed=reading in SIGNED)
    view = {
        "reading": reading,
        "part": part,
        "title": READINGS[reading][0],
        "unit": READINGS[reading][1],
        "layers": shown.layers,
        "numbers": shown.numbers,
        "label": shown.label,
        "groups": [[*span, item.name] for span, item in zip(shown.spans, shown.groups, strict=True)],
        "scale": "diverging" if scale["cmap"] == DIVERGING else "sequential",
        "ends": [scale["vmin"], scale["vmax"]],
        "values": [numbers(row) for row in values],
    }
    for ending in ("se", "low", "high"):
        companion = values_between(shown, part, f"{reading}_{ending}")
        if np.isfinite(companion).any():
            view[ending] = [numbers(row) for row in companion]
    return view


def _most_alike(view: dict[str, Any]) -> tuple[int, int]:
    """The neighbours that are most alike: what a reader looks for first."""
    values = np.array(view["values"], dtype=np.float64)
    neighbours = np.diagonal(values, 1)
    if np.isfinite(neighbours).any():
        first = int(np.nanargmax(neighbours))
        return first, first + 1
    values[~np.triu(np.ones(values.shape, dtype=bool), 1)] = np.nan
    return divmod(int(np.nanargmax(values)), len(values))


def _details(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    """Every pair of a group's layers by head and by key token, first layer before second."""
    pairs = np.triu_indices(len(group.layers), 1)
    details: dict[str, Any] = {"name": group.name, "layers": group.layers, "windows": group.windows}
    by_head, by_token = (group.arrays.get(f"similarity_by_{what}") for what in ("head", "token"))
    if by_head is not None:
        details["by_head"] = _quantised(np.asarray(by_head, dtype=np.float64)[pairs])
    if by_token is not None:
        values = over_windows(group, np.asarray(by_token, dtype=np.float64)[pairs])
        details["by_token"] = _tokens(group, values, BUDGET // len(groups))
    return details


def _tokens(group: Group, values: NDArray[np.float64], budget: int) -> dict[str, Any]:
    """Pictures by key token, the prefix apart; patches are pooled square by square until all pairs fit a budget."""
    grid, prefix = patch_grid(group), group.prefix_tokens
    patches, pooled = values[:, prefix:], 1
    if grid is not None:
        squares = patches.reshape(-1, *grid)
        while pooled_size(grid, pooled) * len(values) > budget and pooled < max(grid):
            pooled += 1
        patches = _pooled(squares, pooled).reshape(len(values), -1)
        grid = (-(-grid[0] // pooled), -(-grid[1] // pooled))
    elif patches.size > budget:
        step = -(-patches.size // budget)
        patches, pooled = _pooled(patches[:, None, :], step, rows=1)[:, 0], step
    return {"grid": grid, "pooled": pooled, "prefix": _quantised(values[:, :prefix]), "patches": _quantised(patches)}


def pooled_size(grid: tuple[int, int], by: int) -> int:
    """Squares of `by` by `by` patches, those at the edges smaller, that cover a grid."""
    return -(-grid[0] // by) * -(-grid[1] // by)


def _pooled(squares: NDArray[np.float64], by: int, rows: int | None = None) -> NDArray[np.float64]:
    """``[N, h, w]`` -> means over blocks of `rows` (by default `by`) times `by`; blocks at the edges may be smaller."""
    if by == 1:
        return squares
    defined = np.isfinite(squares)
    total, count = np.where(defined, squares, 0.0), defined.astype(np.float64)
    for axis, step in ((1, rows or by), (2, by)):
        starts = np.arange(0, squares.shape[axis], step)
        total, count = (np.add.reduceat(item, starts, axis=axis) for item in (total, count))
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, total / count, np.nan)


def _quantised(values: NDArray[np.float64]) -> dict[str, Any]:
    """``[N, n]`` as one byte a value between the smallest and the largest; the ends are exact."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    step = (high - low) / _LEVELS or 1.0
    levels = np.full(values.shape, _ABSENT, dtype=np.uint8)
    levels[np.isfinite(values)] = np.round((finite - low) / step).astype(np.uint8)
    return {
        "low": low,
        "high": high,
        "count": values.shape[1],
        "bytes": base64.b64encode(levels.tobytes()).decode("ascii"),
    }


def _colours(cmap: str) -> list[list[Any]]:
    """A colour map of matplotlib's as Plotly has them."""
    return [[at, to_hex(matplotlib.colormaps[cmap](at))] for at in np.linspace(0, 1, 17).tolist()]
