"""From an analysis and conditions to outcomes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from collapse_probe.conditions.baseline import check_comparable
from collapse_probe.conditions.estimates import Estimate, difference, estimates, mean
from collapse_probe.conditions.evidence import BEYOND, CLEAR, UNCLEAR, chance, judged
from collapse_probe.conditions.syntax import AT_LEAST, Condition, OnFinding, OnReading, metric_of, parse
from collapse_probe.diagnosis.case import KINDS
from collapse_probe.errors import UsageError
from collapse_probe.readings import DERIVED
from collapse_probe.result import Analysis

FAILED, PASSED, NOT_MEASURED = "failed", "passed", "not-measured"
_STATUS = {BEYOND: FAILED, UNCLEAR: UNCLEAR, CLEAR: PASSED}

#: Layers that a sentence names, and digits after the point.
_MOST, _MOST_PLACES = 4, 9

_EITHER_SIDE = "cannot be told apart from the bound"


@dataclass(frozen=True)
class Comparison:
    """One layer's reading beside the bound.

    Attributes:
        place: the layer, the group, or ``"mean over 12 layers"``.
        value: the reading; infinite for an onset where there is none.
        error: its standard error, towards the bound; where the condition is relative, that of the difference. 0 for
            what is counted, NaN where unknown.
        bound: what it is compared with.
        baseline: the baseline's reading, which is part of the bound; None without one.
        status: ``"beyond"`` the bound, ``"clear"`` of it, or ``"unclear"``.
    """

    place: str
    value: float
    error: float
    bound: float
    baseline: float | None
    status: str

    def __str__(self) -> str:
        if self.baseline is None:
            return f"{self.place} {_in_words(self.value, self.error)}"
        both = f"{self.place} {_in_words(self.value)} (baseline {_in_words(self.baseline)}"
        if math.isinf(self.value) or math.isinf(self.baseline):
            return f"{both})"
        gap = self.value - self.baseline
        return f"{both}, difference {'+' if gap > 0 else ''}{_in_words(gap, self.error)})"


@dataclass(frozen=True)
class Outcome:
    """What became of a condition.

    Attributes:
        condition: as the caller wrote it.
        status: ``"failed"``; ``"passed"``; ``"unclear"`` where values cannot be told apart from the bound, which is no
            failure; ``"not-measured"`` where there is nothing to judge by, which is an error of whoever set it.
        message: why, in half a sentence.
        comparisons: all readings beside the bound, in execution order; empty for a condition on findings.
    """

    condition: str
    status: str
    message: str
    comparisons: tuple[Comparison, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the condition failed."""
        return self.status == FAILED

    def __str__(self) -> str:
        return f"[{self.status}] {self.condition}: {self.message}"


def check(
    analysis: Analysis, conditions: Iterable[str | Condition] | str, baseline: Analysis | None = None
) -> list[Outcome]:
    """Check an analysis against conditions, each of which says what must not be.

    A reading fails only where it is beyond its bound by more than its standard error explains (95 %, Student's t, or
    the interval that the analysis holds); among many layers, by Holm's procedure. See `docs/continuous_integration.md`.

    Args:
        analysis: as measured, or loaded.
        conditions: as text, see :mod:`collapse_probe.conditions.syntax`, or parsed. What is given twice counts once.
        baseline: an earlier analysis of the same architecture, for conditions such as ``"entropy<baseline-0.1"``.

    Returns:
        An outcome for each, in the order given.

    Raises:
        UsageError: a condition cannot be read, none is given, one is relative and there is no baseline, or the
            baseline cannot be compared with; or the analysis is one of part of the images.

    Warns:
        UserWarning: the baseline was measured on other images.
    """
    wanted = [conditions] if isinstance(conditions, str) else conditions
    parsed = list(dict.fromkeys(item if isinstance(item, Condition) else parse(item) for item in wanted))
    if not parsed:
        raise UsageError("There are no conditions to check.")
    if not analysis.complete:
        raise UsageError(
            "Conditions are about all images, and this analysis is of a run that was interrupted. Finish it with "
            "--resume."
        )
    relative = [item.text for item in parsed if item.relative]
    if relative and baseline is None:
        raise UsageError(f"{relative[0]!r} is relative to a baseline, and there is none: give one with --baseline.")
    if relative and baseline is not None:
        for doubt in check_comparable(analysis, baseline):
            warnings.warn(doubt, stacklevel=2)
    return [
        _of_finding(analysis, item) if isinstance(item, OnFinding) else _of_reading(analysis, item, baseline)
        for item in parsed
    ]


def _of_finding(analysis: Analysis, condition: OnFinding) -> Outcome:
    if not analysis.findings:
        return Outcome(condition.text, NOT_MEASURED, "this analysis holds no verdict")
    judged_layers = [name for group in analysis.groups if group.kind in KINDS for name in group.layers]
    for name in condition.readings:
        if not {item.place for item in estimates(analysis, name)} & set(judged_layers):
            return Outcome(condition.text, NOT_MEASURED, _why(analysis, name))
    of_code = [finding for finding in analysis.findings if condition.code in ("", finding.code)]
    severities = AT_LEAST.get(condition.severity)
    found = [finding for finding in of_code if severities is None or finding.severity in severities]
    if found:
        return Outcome(condition.text, FAILED, "; ".join(map(str, found)))
    if condition.code and of_code:
        return Outcome(condition.text, PASSED, f"nothing that grave: {'; '.join(map(str, of_code))}")
    return Outcome(condition.text, PASSED, "no such finding")


def _of_reading(analysis: Analysis, condition: OnReading, baseline: Analysis | None) -> Outcome:
    values = estimates(analysis, condition.reading)
    if not values:
        return Outcome(condition.text, NOT_MEASURED, _why(analysis, condition.reading))
    others: list[Estimate | None] = [None] * len(values)
    if condition.relative and baseline is not None:
        known = {item.place: item for item in estimates(baseline, condition.reading)}
        values = [item for item in values if item.place in known]
        others = [known[item.place] for item in values]
        if not values:
            return Outcome(condition.text, NOT_MEASURED, f"the baseline: {_why(baseline, condition.reading)}")
    if condition.aggregate == "mean":
        others = [mean([item for item in others if item is not None])] if condition.relative else [None]
        values = [mean(values)]
    compared = [item if other is None else difference(item, other) for item, other in zip(values, others, strict=True)]
    if not any(item.judgeable for item in compared):
        return Outcome(
            condition.text,
            NOT_MEASURED,
            f"{condition.reading} has no standard error here, so nothing tells chance from change: it takes 2 images "
            "(intervals take 8)",
        )
    beyond, clear = zip(*(_chances(item, condition) for item in compared), strict=True)
    verdict, standings = judged(beyond, clear, condition.of_all)
    comparisons = tuple(
        Comparison(
            item.place,
            item.value,
            gap.below if gap.value > condition.bound else gap.above,
            condition.bound + (0.0 if other is None else other.value),
            None if other is None else other.value,
            standing,
        )
        for item, other, gap, standing in zip(values, others, compared, standings, strict=True)
    )
    message = _message(condition, verdict, comparisons)
    return Outcome(condition.text, _STATUS[verdict], message, comparisons)


def _chances(item: Estimate, condition: OnReading) -> tuple[float, float]:
    """The chance of a value were it not beyond the bound, and were it not clear of it."""
    distance = condition.sign * (item.value - condition.bound)
    towards, away = (item.below, item.above) if condition.sign > 0 else (item.above, item.below)
    return (
        chance(distance, towards, item.freedom, condition.touching_counts),
        chance(-distance, away, item.freedom, not condition.touching_counts),
    )


def _message(condition: OnReading, verdict: str, comparisons: tuple[Comparison, ...]) -> str:
    """Which layers decided, and the numbers."""
    if len(comparisons) == 1:
        words = {BEYOND: "beyond the bound", CLEAR: "clear of the bound", UNCLEAR: _EITHER_SIDE}
        return f"{words[verdict]}: {comparisons[0]}"
    count = f"{len(comparisons)} {'group' if condition.reading in DERIVED else 'layer'}s"
    in_order = sorted(comparisons, key=lambda item: condition.sign * _beside(item))
    if condition.of_all:
        words = {
            BEYOND: f"in all of {count}; nearest to the bound is",
            CLEAR: f"not in all of {count}; clear of the bound is",
            UNCLEAR: f"{_EITHER_SIDE} in all of {count}; on its good side, or nearest to it, is",
        }
        return f"{words[verdict]} {in_order[0]}"
    if verdict == CLEAR:
        return f"in none of {count}; nearest to the bound is {in_order[-1]}"
    concerned = [item for item in comparisons if item.status == verdict]
    more = len(concerned) - _MOST
    listed = ", ".join(map(str, concerned[:_MOST])) + (f" and {more} more" if more > 0 else "")
    return f"{'' if verdict == BEYOND else f'{_EITHER_SIDE} '}in {len(concerned)} of {count}: {listed}"


def _beside(item: Comparison) -> float:
    """How far a value is above its bound."""
    return 0.0 if item.value == item.bound else item.value - item.bound


def _why(analysis: Analysis, reading: str) -> str:
    """Why a reading is absent everywhere, as far as the analysis says."""
    where = "group" if reading in DERIVED else "layer"
    metric = metric_of(reading)
    reasons = dict.fromkeys(str(entry.get("reason")) for entry in analysis.absent if entry.get("metric") == metric)
    words = f"no {where} has {reading}"
    if metric is None:
        return words
    return f"{words}, a reading of {metric}" + (f": {'; '.join(list(reasons)[:2])}" if reasons else "")


def _in_words(value: float, error: float = 0.0) -> str:
    """A reading with two digits of its error; only the onset of a run that does not exist is infinite."""
    if math.isinf(value):
        return "none"
    if not 0 < error < math.inf:
        return f"{value:.4g}{' or none' if math.isinf(error) else ''}"
    places = max(0, min(1 - math.floor(math.log10(error)), _MOST_PLACES))
    return f"{value:.{places}f}±{error:.{places}f}"
