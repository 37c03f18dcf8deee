"""The verdict: from an :class:`Analysis` to findings, each with its evidence and where its threshold comes from.

Window attention is judged like token attention, one group at a time where it is about layers that compare. Uniform
attention is told from collapse by entropy and relative variation, never by M: untrained networks show M near 1 because
every attention column is nearly flat, and layers that start as copies of each other even show a high centred M.
"""

from __future__ import annotations

from dataclasses import replace

from collapse_probe.diagnosis import across_layers, tokens, validity, within_layers
from collapse_probe.diagnosis.case import Case, is_uniform
from collapse_probe.diagnosis.thresholds import Threshold, Thresholds
from collapse_probe.ratio import SIMILAR
from collapse_probe.result import Analysis, Finding

__all__ = ["Threshold", "Thresholds", "diagnose", "is_uniform"]

#: What to look for, in the order in which it is told among findings of one severity.
_RULES = (
    validity.non_finite,
    validity.constant_weights,
    validity.untrained,
    validity.uniform,
    across_layers.collapse,
    across_layers.repetition,
    tokens.collapsed,
    within_layers.saturated,
    within_layers.dead_heads,
    within_layers.redundant_heads,
    tokens.outliers,
    tokens.large_prefix,
    tokens.idle_branches,
    across_layers.flat,
    within_layers.sinks,
)

_SEVERITIES = ("problem", "warning", "ok", "note")


def diagnose(analysis: Analysis, similar: float = SIMILAR) -> list[Finding]:
    """The verdict: problems and warnings first, then what is well, then notes.

    Args:
        analysis: numbers without a verdict; not changed.
        similar: mean M above which neighbouring blocks are called similar.
    """
    limits = Thresholds()
    if similar != limits.similar:
        limits = replace(limits, similar=Threshold(similar, "set by the caller"))
    case = Case(analysis, limits)
    findings = [finding for rule in _RULES for finding in rule(case)]
    if not any(finding.severity in ("warning", "problem") for finding in findings):
        findings += across_layers.healthy(case)
    comparable = case.similarity.notna().any()
    if not findings or not (comparable or any(finding.severity == "problem" for finding in findings)):
        findings += across_layers.not_comparable(case)
    return sorted(findings, key=lambda finding: _SEVERITIES.index(finding.severity))
