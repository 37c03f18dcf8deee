"""Outcomes for machines: JSON, and the JUnit XML that continuous integration systems show as tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from collapse_probe.conditions.evidence import BEYOND, UNCLEAR
from collapse_probe.conditions.outcome import FAILED, NOT_MEASURED, PASSED, Outcome
from collapse_probe.result import Analysis, plain
from collapse_probe.words import neutral

SCHEMA_VERSION = 1


def to_json(outcomes: Sequence[Outcome], analysis: Analysis, baseline: str | None = None) -> str:
    """Outcomes as a JSON document; NaN and infinities become null.

    Args:
        outcomes: what :func:`~collapse_probe.conditions.check` gave.
        analysis: what was checked: its model and its number of images are named.
        baseline: what to call the baseline, where there is one.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "failed": any(outcome.failed for outcome in outcomes),
        "counts": {status: _count(outcomes, status) for status in (FAILED, UNCLEAR, PASSED, NOT_MEASURED)},
        "model": _model(analysis),
        "images": _section(analysis, "images").get("count"),
        "baseline": baseline,
        "conditions": [asdict(outcome) for outcome in outcomes],
    }
    return json.dumps(plain(content), indent=1, allow_nan=False) + "\n"


def to_junit(outcomes: Sequence[Outcome], analysis: Analysis) -> bytes:
    """Outcomes as JUnit XML: a test case for each, with a failure, an error where nothing could be judged, or what was
    found as its output.

    Args:
        outcomes: what :func:`~collapse_probe.conditions.check` gave.
        analysis: what was checked: its model names the class of the test cases.
    """
    counts = {
        "tests": str(len(outcomes)),
        "failures": str(_count(outcomes, FAILED)),
        "errors": str(_count(outcomes, NOT_MEASURED)),
        "time": "0.000",
    }
    root = ElementTree.Element("testsuites", {"name": "collapse-probe", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": "collapse-probe", "skipped": "0", **counts})
    for outcome in outcomes:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {
                "classname": f"collapse-probe.{neutral(_model(analysis))}",
                "name": neutral(outcome.condition),
                "time": "0.000",
            },
        )
        message = neutral(outcome.message)
        if outcome.status in (FAILED, NOT_MEASURED):
            kind = "failure" if outcome.status == FAILED else "error"
            told = ElementTree.SubElement(case, kind, {"message": message, "type": outcome.status})
            told.text = neutral(_lines(outcome), lines=True)
        else:
            told = ElementTree.SubElement(case, "system-out")
            told.text = f"{outcome.status}: {message}"
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _lines(outcome: Outcome) -> str:
    """Every comparison that failed a condition; the message where there is none."""
    decisive = [neutral(str(item)) for item in outcome.comparisons if item.status == BEYOND]
    return "\n".join(decisive or [outcome.message])


def _count(outcomes: Sequence[Outcome], status: str) -> int:
    return sum(outcome.status == status for outcome in outcomes)


def _model(analysis: Analysis) -> str:
    return str(_section(analysis, "model").get("architecture") or "model")


def _section(analysis: Analysis, name: str) -> dict[str, Any]:
    section = analysis.provenance.get(name)
    return section if isinstance(section, dict) else {}
