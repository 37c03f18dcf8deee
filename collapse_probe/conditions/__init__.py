"""Conditions on an analysis, as in continuous integration: which of them fail, by more than standard errors explain.

    from collapse_probe.conditions import check

    for outcome in check(analysis, ["attention-collapse:warning", "head_diversity<0.05"]):
        print(outcome)

Nothing here needs torch: conditions can be checked on a saved analysis, on a machine without it.
"""

from __future__ import annotations

from collapse_probe.conditions.outcome import Comparison, Outcome, check
from collapse_probe.conditions.records import to_json, to_junit
from collapse_probe.conditions.syntax import OnFinding, OnReading, parse

__all__ = ["Comparison", "OnFinding", "OnReading", "Outcome", "check", "parse", "to_json", "to_junit"]
