"""The numbers of an analysis that conditions are about, each with how far the true value may lie from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean

import numpy as np
import pandas as pd

from collapse_probe.conditions.syntax import metric_of
from collapse_probe.readings import DERIVED, METRICS, companion, is_bookkeeping, reading_of
from collapse_probe.result import Analysis, Group

#: How often an interval holds the true value; that of the analysis's own.
LEVEL = 0.95

#: Half of a 95 % interval in standard errors.
_HALF = NormalDist().inv_cdf((1 + LEVEL) / 2)


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        place: the layer, the group, or the layers together.
        value: the number; infinite for the onset of a run that does not exist.
        below, above: standard error towards lower and higher values, which differ where an interval is lopsided. 0 for
            what is counted, NaN where unknown, infinite where nothing is excluded.
        freedom: degrees of freedom of the standard error; infinite where it comes from an interval.
    """

    place: str
    value: float
    below: float = 0.0
    above: float = 0.0
    freedom: float = math.inf

    @property
    def judgeable(self) -> bool:
        """Whether anything is known of its uncertainty."""
        return not (math.isnan(self.below) and math.isnan(self.above))


def estimates(analysis: Analysis, reading: str) -> list[Estimate]:
    """A reading of every layer, or of every group, that has it."""
    return _of_groups(analysis, reading) if reading in DERIVED else _of_layers(analysis, reading)


def mean(values: Sequence[Estimate]) -> Estimate:
    """The mean of all. All layers see the same images, so their errors may be as one: the error of the mean is then the
    mean of the errors, and never larger (independent ones would give one smaller by the root of their number)."""
    return Estimate(
        f"mean over {len(values)} layer{'s' if len(values) > 1 else ''}",
        fmean(item.value for item in values),
        fmean(item.below for item in values),
        fmean(item.above for item in values),
        min(item.freedom for item in values),
    )


def difference(value: Estimate, baseline: Estimate) -> Estimate:
    """One minus the other, as if they were measured on different images: where they share images, the true error is
    smaller as a rule."""
    return replace(
        value,
        value=0.0 if value.value == baseline.value else value.value - baseline.value,  # also where both are infinite
        below=math.hypot(value.below, baseline.above),
        above=math.hypot(value.above, baseline.below),
        freedom=min(value.freedom, baseline.freedom),
    )


def _of_layers(analysis: Analysis, column: str) -> list[Estimate]:
    table = analysis.layers
    if column not in table:
        return []
    values = _numbers(table, column)
    low, high, error = (
        _numbers(table, companion(table.columns, column, ending)) for ending in ("_low", "_high", "_se")
    )
    exact, freedom = _is_exact(column), _freedom(analysis, column)
    found = []
    for place, *numbers in zip(table.index, values, low, high, error, strict=True):
        value, first, last, deviation = numbers
        if not math.isfinite(value):
            continue
        if exact:
            found.append(Estimate(str(place), value))
        elif math.isfinite(first) and math.isfinite(last):
            found.append(_with_interval(str(place), value, first, last))
        else:
            found.append(Estimate(str(place), value, deviation, deviation, freedom))
    return found


def _of_groups(analysis: Analysis, name: str) -> list[Estimate]:
    found = []
    for group in analysis.groups:
        entry = group.derived.get(name)
        if entry is None:
            continue
        value, low, high = (_number(entry.get(key)) for key in ("value", "low", "high"))
        if name == "onset":
            found.append(_onset(group, value, low, high, _number(entry.get("share"))))
        elif math.isfinite(value):
            found.append(_with_interval(_named(group), value, low, high))
    return found


def _onset(group: Group, value: float, low: float, high: float, share: float) -> Estimate:
    """Draws of the bootstrap in which no run of similar blocks reaches the last one have an infinite onset, and count
    as the others do; the ends of the stored interval are those of the other draws."""
    tail = (1 - LEVEL) / 2
    if math.isnan(share):
        low = high = math.nan  # too few images
    elif share < 1 - tail:
        high = math.inf
    if math.isfinite(value):
        return _with_interval(_named(group), value, low, high)
    below = math.nan if math.isnan(share) else 0.0 if share <= tail else math.inf
    return Estimate(_named(group), math.inf, below, below)


def _with_interval(place: str, value: float, low: float, high: float) -> Estimate:
    return Estimate(place, value, _towards(value - low), _towards(high - value))


def _towards(distance: float) -> float:
    """A standard error from the distance to the end of an interval; the end may lie on the other side of the value."""
    return distance if math.isnan(distance) else max(distance, 0.0) / _HALF


def _is_exact(column: str) -> bool:
    """Whether a column holds what is counted or follows from the images at hand, not an estimate for all images."""
    reading = reading_of(column)
    if reading is None:
        return is_bookkeeping(column)
    rest = column.removeprefix(reading.name)
    return any(ending in rest for ending in ("_se", "_low", "_high"))


def _freedom(analysis: Analysis, column: str) -> float:
    """Degrees of freedom of standard errors over images; infinite where their number is not known."""
    described = analysis.provenance.get("images")
    images = _number(described.get("count")) if isinstance(described, dict) else math.nan
    metric = metric_of(column)
    sample = METRICS[metric].sample if metric else None
    if sample is not None:
        images = sample if math.isnan(images) else min(images, sample)
    return math.inf if math.isnan(images) else max(images - 1, 1.0)


def _named(group: Group) -> str:
    return f"group {group.name}"


def _numbers(table: pd.DataFrame, column: str | None) -> list[float]:
    """A column as floats, NaN where it is absent."""
    return [math.nan] * len(table) if column is None else [_number(value) for value in table[column]]


def _number(value: object) -> float:
    """A number of a table or of JSON data as a float; NaN for everything else."""
    return float(value) if isinstance(value, (int, float, np.number, np.bool_)) else math.nan
