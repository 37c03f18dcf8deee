"""Whether values lie beyond a bound by more than their standard errors explain: one value, any of many, or all.

One value is beyond a bound where the bound is outside its 95 % interval on that side: a one-sided test at 2.5 %, by
Student's t. That *any* of n layers is beyond is asked n times, so layers are tested by Holm's procedure (Holm 1979):
where no layer is beyond, the chance that one is called so stays below 2.5 %, however layers depend on each other. That
*all* are is said only where each is by itself, and needs no correction (an intersection-union test, Berger 1982).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import ndtr, stdtr

from collapse_probe.conditions.estimates import LEVEL

#: Chance of calling a value beyond the bound, or clear of it, that is not.
RISK = (1 - LEVEL) / 2

#: Rounding below which a bound counts as the very end of an interval, where counts often have theirs.
_ROUNDING = 1e-9

#: What can be said of one value, and of a condition.
BEYOND, UNCLEAR, CLEAR = "beyond", "unclear", "clear"


def chance(distance: float, error: float, freedom: float, touching_counts: bool) -> float:
    """The chance to find a value that far beyond a bound, or farther, were the true value at the bound.

    Args:
        distance: how far the value is beyond; negative where it is not.
        error: standard error; 0 where there is none, NaN where it is unknown.
        freedom: degrees of freedom of the error; infinite for the normal distribution.
        touching_counts: whether a value, or an end of its interval, that is exactly the bound is beyond it.

    Returns:
        0..1; 1 where nothing can be said.
    """
    if error == 0:
        return 0.0 if distance > 0 or (distance == 0 and touching_counts) else 1.0
    ratio = distance / error * (1 + _ROUNDING if touching_counts else 1 - _ROUNDING)
    if math.isnan(ratio):
        return 1.0
    return float(ndtr(-ratio) if math.isinf(freedom) else stdtr(freedom, -ratio))


def holm(chances: Sequence[float]) -> list[bool]:
    """Which of several hypotheses can be rejected together, by Holm's procedure."""
    rejected = [False] * len(chances)
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        if chances[place] > RISK / (len(chances) - rank):
            break
        rejected[place] = True
    return rejected


def judged(beyond: Sequence[float], clear: Sequence[float], of_all: bool) -> tuple[str, list[str]]:
    """What can be said of a condition, and of each of its values.

    Args:
        beyond: chance of each value under the hypothesis that it is not beyond the bound.
        clear: the same under the hypothesis that it is.
        of_all: whether the condition is that all values are beyond the bound; otherwise that any is.

    Returns:
        One of :data:`BEYOND`, :data:`UNCLEAR` and :data:`CLEAR`, and one for each value.
    """
    one_by_one = [[value <= RISK for value in chances] for chances in (beyond, clear)]
    over = one_by_one[0] if of_all else holm(beyond)
    under = holm(clear) if of_all else one_by_one[1]
    each = [BEYOND if first else CLEAR if second else UNCLEAR for first, second in zip(over, under, strict=True)]
    failed, passed = (all(over), any(under)) if of_all else (any(over), all(under))
    return BEYOND if failed else CLEAR if passed else UNCLEAR, each
