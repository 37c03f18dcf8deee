"""What every report says, whatever it is written on: verdict, table, gaps and provenance as plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from collapse_probe.result import Analysis, Finding, Group

#: Severity -> symbol and word, gravest first. Both are always shown: colour is never the only sign.
SEVERITIES = {"problem": ("✗", "Problem"), "warning": ("!", "Warning"), "ok": ("✓", "OK"), "note": ("i", "Note")}

#: Column of the layers table -> its heading. Each has a standard error in ``<column>_se``.
COLUMNS = {
    "similarity_to_previous": "M to previous",
    "centred_to_previous": "centred",
    "image_independent_to_previous": "image-indep.",
    "excess_to_previous": "excess",
    "head_diversity": "head diversity",
    "normalized_entropy": "entropy / log K",
    "relative_variation": "r",
}

#: Why a reading can be absent throughout, where nothing in the analysis says more.
_WHY_ABSENT = {
    "similarity_to_previous": "no two layers have maps that may be compared with each other",
    "centred_to_previous": "needs two comparable layers whose attention columns vary over the queries",
    "image_independent_to_previous": "needs two comparable layers and at least two images",
    "excess_to_previous": "needs two comparable layers and at least two images",
    "head_diversity": "needs layers with at least two heads",
    "normalized_entropy": "needs maps whose rows are probabilities",
    "relative_variation": "was not part of this run",
}

_ABSENT = "–"
_MOST_NAMES, _MOST_ALONE = 3, 12
_MOST_ITEMS = 20
_LONG_NAME = 16

#: Share of keys admitted, in the mean, below which a layer counts as masked.
_HARDLY_MASKED = 0.995


@dataclass(frozen=True)
class Row:
    """One layer of the table: where it stands, its name, mean and standard error per column of :data:`COLUMNS`."""

    block: str
    layer: str
    short_name: str
    cells: tuple[tuple[float, float], ...]
    similar: bool


def ordered(findings: list[Finding]) -> list[Finding]:
    """Gravest first, then what is well, then notes; the order of the diagnosis within one severity."""
    ranks = list(SEVERITIES)
    return sorted(findings, key=lambda finding: ranks.index(finding.severity) if finding.severity in ranks else 2)


def severity(finding: Finding) -> tuple[str, str]:
    """Symbol and word."""
    return SEVERITIES.get(finding.severity, ("?", finding.severity))


def model_name(analysis: Analysis) -> str:
    return str(_section(analysis, "model").get("architecture") or "model")


def headline(analysis: Analysis) -> str:
    """Model and data in one line."""
    return f"{model_name(analysis)} · {extent(analysis)}"


def extent(analysis: Analysis) -> str:
    """How much was looked at: layers and images."""
    images = _section(analysis, "images")
    kind = f" ({images['kind']})" if images.get("kind") else ""
    return f"{_plural(len(analysis.layers), 'attention layer')} · {_plural(images.get('count', '?'), 'image')}{kind}"


def rows(analysis: Analysis) -> list[Row]:
    """The per-layer table; blocks carry their group's name where there are several groups."""
    several = len(analysis.groups) > 1
    shared = _shared_prefix([str(name) for name in analysis.layers.index])
    found = []
    for name, record in analysis.layers.iterrows():
        block = _count(record.get("block"))
        cells = tuple((_number(record.get(key)), _number(record.get(f"{key}_se"))) for key in COLUMNS)
        place = f"{record.get('group', '')}{block}" if several else block
        short_name = "…" + str(name).removeprefix(shared) if shared else str(name)
        similar = _number(record.get("similar_to_previous")) == 1
        found.append(Row(place, str(name), short_name, cells, similar))
    return found


def groups(analysis: Analysis) -> list[tuple[str, str]]:
    """Letter of each group of comparable layers, and the group in words; nothing where all layers form one group."""
    if len(analysis.groups) < 2:
        return []
    return [(group.name, f"{group.description}{_place(group)}") for group in analysis.groups]


def _place(group: Group) -> str:
    if len(group.layers) == 1:
        return f": {group.layers[0]}"
    return f", in {group.module}" if group.module else ""


def elided(rows: list[Row]) -> str:
    """What the "…" of the short names stands for; empty where none is shortened."""
    return rows[0].layer.removesuffix(rows[0].short_name.removeprefix("…")) if rows else ""


def decimal(value: float) -> str:
    """Three decimals, or a dash where nothing is defined."""
    return _ABSENT if math.isnan(value) else f"{value:.3f}".replace("-0.000", "0.000")


def with_error(value: float, error: float) -> str:
    """Value ± standard error; never a "± 0.000" that would claim certainty."""
    if math.isnan(value) or math.isnan(error):
        return decimal(value)
    return f"{decimal(value)}±{'<.001' if 0 < error < 0.0005 else f'{error:.3f}'}"


def gaps(analysis: Analysis) -> list[tuple[str, str]]:
    """What was not measured, each with the reason: layers without a map first, then readings."""
    reasons: dict[str, list[str]] = {}
    for entry in analysis.not_captured:
        reasons.setdefault(str(entry.get("reason", "no reason given")), []).append(str(entry.get("layer", "a layer")))
    found = [(_some(names), reason) for reason, names in reasons.items()]
    return found + list(_absent_readings(analysis)) + list(_odd_columns(analysis))


def origin(analysis: Analysis) -> list[tuple[str, str]]:
    """Where model and images came from, how the run was made and what it proved: labels and lines."""
    model, images = _section(analysis, "model"), _section(analysis, "images")
    parameters = model.get("parameters")
    size = f"{parameters / 1e6:.1f} M parameters" if isinstance(parameters, (int, float)) else None
    about_model = [model_name(analysis), model.get("source"), size, _weights(model.get("weights"))]
    skipped = f"{len(images['skipped'])} skipped" if images.get("skipped") else None
    seconds = analysis.provenance.get("seconds")
    took = f"{seconds:.1f} s" if isinstance(seconds, (int, float)) else None
    device = f"on {analysis.provenance['device']}" if analysis.provenance.get("device") else None
    counted = _plural(images.get("count", "?"), "image")
    versions = [
        f"{name} {_section(analysis, 'versions').get(name, '?')}" for name in ("collapse-probe", "torch", "timm")
    ]
    about_run = [counted, images.get("kind"), skipped, took, device, ", ".join(versions)]
    lines = [("model", _joined(about_model)), ("run", _joined(about_run)), ("verified", _proof(analysis))]
    return [(label, line) for label, line in lines if line]


def provenance_rows(analysis: Analysis) -> list[tuple[str, str]]:
    """All of the provenance as (dotted key, value) pairs; of a verification its sums only."""
    rows = [(key, _in_words(value)) for key, value in _leaves(analysis.provenance)]
    return [(key, words) for key, words in rows if not key.startswith("verification.errors.")]


def _proof(analysis: Analysis) -> str:
    """What a verified run proved of its first batch; empty where that was not asked for."""
    proof = _section(analysis, "verification")
    if not proof:
        return ""
    counted = f"{proof['captured']} of {proof['kernels']} softmaxes and attention kernels are in maps"
    named = f", {proof['named']} named with a reason" if proof["named"] else ""
    if proof["failures"]:
        return f"FAILED: {'; '.join(proof['failures'])} ({counted}{named})"
    return f"{counted}{named}; maps times values agree with the model {_within(proof['largest_error'])}"


def _within(error: float) -> str:
    return f"to {error:.0e}" if error else "exactly"


def _absent_readings(analysis: Analysis) -> Iterator[tuple[str, str]]:
    table = analysis.layers
    absent = [key for key in COLUMNS if key not in table or pd.to_numeric(table[key], errors="coerce").isna().all()]
    comparable = "similarity_to_previous" not in absent
    if not comparable:
        yield "Every comparison with a previous block", _WHY_ABSENT["similarity_to_previous"]
        absent = [key for key in absent if not key.endswith("_to_previous")]
    for key in absent:
        yield COLUMNS[key], _WHY_ABSENT[key]
    if "normalized_entropy" not in absent and "is_probability" in table:
        mixed = table.index[(table["is_probability"] == False) & table["normalized_entropy"].isna()]  # noqa: E712
        if len(mixed):
            yield (
                f"entropy of {_some(list(mixed))}",
                "rows of these maps are not probabilities (mixed after the softmax)",
            )
    if comparable and len(analysis.groups) > 1:
        yield "Similarity across groups", "their maps differ in kind, heads, queries, keys or partition"
        alone = [group.layers[0] for group in analysis.groups if len(group.layers) == 1]
        if alone:
            yield f"Any similarity to another layer of {_some(alone, most=_MOST_ALONE)}", "no other is in their group"
    if masked := _masked(table):
        yield (
            f"r and centred similarity without the mask in {_some(masked)}",
            "queries that a mask hides from a key count as zeros of its column, in both layers alike",
        )


def _masked(table: pd.DataFrame) -> list[str]:
    """Layers in which masks admit fewer keys than there are: the largest possible entropy tells."""
    if not {"entropy", "normalized_entropy", "keys"} <= set(table.columns):
        return []
    entropy, normalized, keys = (
        pd.to_numeric(table[name], errors="coerce") for name in ("entropy", "normalized_entropy", "keys")
    )
    share = np.exp(entropy / normalized) / keys
    return [str(name) for name in table.index[share < _HARDLY_MASKED]]


def _odd_columns(analysis: Analysis) -> Iterator[tuple[str, str]]:
    """Attention columns that had to be left out of the means."""
    for key, why in (("zero_columns", "no query attends to them"), ("nonfinite_columns", "they hold NaN or infinity")):
        if key in analysis.layers:
            counts = pd.to_numeric(analysis.layers[key], errors="coerce").fillna(0)
            if counts.sum() > 0:
                layers = _some([str(name) for name in counts.index[counts > 0]])
                yield f"{int(counts.sum())} attention columns in {layers}", f"{why}, so they have no cosine"


def _section(analysis: Analysis, name: str) -> Mapping[str, Any]:
    section = analysis.provenance.get(name)
    return section if isinstance(section, Mapping) else {}


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif value not in (None, "", [], ()):
        yield prefix, value


def _weights(weights: Any) -> str | None:
    """What tells these weights from others; a random network must not pass for a trained one."""
    if not isinstance(weights, Mapping):
        return None
    if weights.get("random"):
        return "random weights"
    digest = f"sha256 {str(weights['sha256'])[:12]}" if weights.get("sha256") else None
    return ", ".join(str(fact) for fact in (weights.get("format"), weights.get("dtype"), digest) if fact)


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ": ".join(str(item) for item in value.values())
    if not isinstance(value, (list, tuple)):
        return str(value)
    words = [_in_words(item) for item in value[:_MOST_ITEMS]]
    return ", ".join(words) + (f" and {len(value) - _MOST_ITEMS} more" if len(value) > _MOST_ITEMS else "")


def _joined(parts: list[Any]) -> str:
    return " · ".join(dict.fromkeys(str(part) for part in parts if part))


def _some(names: list[str], most: int = _MOST_NAMES) -> str:
    """The names, or the first few and how many more."""
    if len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def _plural(count: Any, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _number(value: Any) -> float:
    number = pd.to_numeric(value, errors="coerce")
    return math.nan if pd.isna(number) else float(number)


def _count(value: Any) -> str:
    number = _number(value)
    return "" if math.isnan(number) else str(int(number))


def _shared_prefix(names: list[str]) -> str:
    """The dotted beginning that all names share, where leaving it out saves a narrow table; else nothing."""
    if len(names) < 2 or max(map(len, names)) <= _LONG_NAME:
        return ""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)
