"""How far two analyses are apart: readings at comparable depths, their differences with errors, and tests of them.

Nothing here imports torch. Models of different depth are compared by parts of their depth; those of equal depth
block by block, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from collapse_probe.readings import READINGS, companion
from collapse_probe.result import Analysis

#: Parts of the depth: name -> from and to, as shares of it.
THIRDS = {"first third": (0.0, 1 / 3), "middle third": (1 / 3, 2 / 3), "last third": (2 / 3, 1.0)}
ALL_BLOCKS = "all blocks"

#: Two-sided confidence of all intervals.
CONFIDENCE = 0.95

COLUMNS = [
    "reading", "where", "first", "second", "difference", "se", "low", "high", "p", "p_adjusted",
]  # fmt: skip


def places(layers: Sequence[str]) -> dict[str, list[str]]:
    """Where readings are compared: a name for each part of the depth and for each block -> its layers.

    >>> places(["a", "b", "c"])["last third"], places(["a", "b", "c"])["block 1"]
    (['c'], ['b'])
    """
    found = {ALL_BLOCKS: list(layers)}
    middles = (np.arange(len(layers)) + 0.5) / len(layers)
    for name, (start, stop) in THIRDS.items():
        found[name] = [layer for layer, middle in zip(layers, middles, strict=True) if start <= middle < stop]
    return found | {f"block {number}": [layer] for number, layer in enumerate(layers)}


def values_at(analysis: Analysis) -> dict[tuple[str, str], float]:
    """Mean over the layers of every place of the main group: (reading, place) -> value, where it is defined."""
    found = {}
    for where, layers in places(analysis.main_group.layers).items():
        table = analysis.layers.loc[layers]
        for reading in READINGS:
            if reading not in table:
                continue
            values = pd.to_numeric(table[reading], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
            if np.isfinite(values).any():
                found[reading, where] = float(np.nanmean(values))
    return found


def shared_places(first: Analysis, second: Analysis) -> set[str]:
    """Parts of the depth that both have; single blocks only where both have as many."""
    own, other = (places(item.main_group.layers) for item in (first, second))
    same_depth = len(first.main_group.layers) == len(second.main_group.layers)
    return {name for name in own if own[name] and other.get(name) and (same_depth or not name.startswith("block "))}


def paired(first: Analysis, second: Analysis, without: Sequence[tuple[Analysis, Analysis]]) -> pd.DataFrame:
    """Differences of two analyses of the same images, by the jackknife over groups of images.

    Args:
        first, second: of all images.
        without: the same two without one group of images each, group by group.

    Returns:
        A row for each reading and place that both have: the two values, ``difference`` (second minus first), its
        standard error, the ends of its 95 % interval, the p value of a paired t test (as many degrees of freedom as
        groups less one) and the same adjusted by Holm's method for the number of rows. No errors for fewer than 4
        groups.
    """
    own, other = values_at(first), values_at(second)
    left_out = [(values_at(one), values_at(two)) for one, two in without]
    rows = []
    for reading, where in _shared(first, second, own, other):
        key = (reading, where)
        drawn = np.array([two.get(key, np.nan) - one.get(key, np.nan) for one, two in left_out])
        error = jackknife_error(drawn) if len(drawn) >= FEWEST_GROUPS else np.nan
        rows.append(_row(reading, where, own[key], other[key], error, len(drawn) - 1))
    return _table(rows)


#: Of fewer groups no error is told: it would not be known itself.
FEWEST_GROUPS = 4


def jackknife_error(drawn: NDArray[np.float64]) -> float:
    """Standard error from estimates that leave out one group each (Efron and Tibshirani 1993, equation 11.5).

    >>> round(jackknife_error(np.array([1.0, 2.0, 3.0])), 4)  # as the standard error of a mean
    1.1547
    """
    count = len(drawn)
    return float(np.sqrt((count - 1) / count * ((drawn - drawn.mean()) ** 2).sum()))


def unpaired(first: Analysis, second: Analysis) -> pd.DataFrame:
    """The same of two analyses of which only the results are left, as if they were of different images.

    The error of a mean over blocks is taken as the mean of their errors, as errors of blocks go together; where images
    were the same, differences are known better than is said here.
    """
    own, other = values_at(first), values_at(second)
    freedom = min(_images(first), _images(second)) - 1
    rows = []
    for reading, where in _shared(first, second, own, other):
        error = math.hypot(*(_error_at(item, reading, where) for item in (first, second)))
        key = (reading, where)
        rows.append(_row(reading, where, own[key], other[key], error, freedom))
    return _table(rows)


def _shared(first: Analysis, second: Analysis, own: Mapping[Any, float], other: Mapping[Any, float]) -> list[Any]:
    known = shared_places(first, second)
    return [(reading, where) for reading, where in own if where in known and (reading, where) in other]


def _error_at(analysis: Analysis, reading: str, where: str) -> float:
    table = analysis.layers.loc[places(analysis.main_group.layers)[where]]
    error, low, high = (companion(table.columns, reading, ending) for ending in ("_se", "_low", "_high"))
    if low is not None and high is not None:
        half = (_numbers(table, high) - _numbers(table, low)) / 2
        values = half / stats.norm.ppf(0.5 + CONFIDENCE / 2)
    elif error is not None:
        values = _numbers(table, error)
    else:
        return float("nan")
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _numbers(table: pd.DataFrame, name: str) -> NDArray[np.float64]:
    return pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def _images(analysis: Analysis) -> int:
    count = analysis.provenance.get("images", {}).get("count", 2)
    return count if isinstance(count, int) else 2


def _row(reading: str, where: str, first: float, second: float, error: float, freedom: int) -> list[Any]:
    difference = second - first
    reach = stats.t.ppf(0.5 + CONFIDENCE / 2, freedom) * error if freedom > 0 else np.nan
    return [reading, where, first, second, difference, error, difference - reach, difference + reach,
            p_value(difference, error, freedom), np.nan]  # fmt: skip


def p_value(difference: float, error: float, freedom: int) -> float:
    """Two-sided, of a t test; 1 for two values that are equal in every group, NaN where no error is known."""
    if np.isnan(error) or freedom < 1:
        return float("nan")
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * stats.t.sf(abs(difference) / error, freedom))


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """p values adjusted so that the chance of any false alarm among them stays what it is for one (Holm 1979).

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def _table(rows: list[list[Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["p_adjusted"] = holm(table["p"].to_numpy(dtype=np.float64))
    return table
