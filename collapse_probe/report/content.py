"""What every report says, whatever it is written on: verdict, table, gaps and provenance as plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from collapse_probe.readings import FAMILIES, READINGS, companion, reading_of
from collapse_probe.result import Analysis, Finding, Group, Stream

#: Severity -> symbol and word, gravest first. Both are always shown: colour is never the only sign.
SEVERITIES = {"problem": ("✗", "Problem"), "warning": ("!", "Warning"), "ok": ("✓", "OK"), "note": ("i", "Note")}

#: Column of the layers table -> its heading: what a verdict rests on. Each has a standard error.
COLUMNS = {
    "similarity_to_previous": "M to previous",
    "centred_to_previous": "centred",
    "image_independent_to_previous": "image-indep.",
    "head_diversity": "head diversity",
    "normalized_entropy": "entropy / log K",
    "relative_variation": "r",
    "token_similarity": "token similarity",
}

#: Why a reading can be absent throughout, where nothing in the analysis says more.
_WHY_ABSENT = {
    "similarity_to_previous": "no two layers have maps that may be compared with each other",
    "centred_to_previous": "needs two comparable layers whose attention columns vary over the queries",
    "image_independent_to_previous": "needs two comparable layers and at least two images",
    "head_diversity": "needs layers with at least two heads",
    "normalized_entropy": "needs maps whose rows are probabilities",
    "relative_variation": "needs maps of two queries or more",
    "token_similarity": "needs residual streams with two patches or more",
}

_ABSENT = "–"
_PARTS = {"": "", "_prefix": ", prefix tokens", "_patch": ", patches"}
_MOST_NAMES, _MOST_ALONE = 3, 12
_MOST_ITEMS = 20
_LONG_NAME = 16

#: A trained model that is right this many times as often as chance, or less, of so many images, does not fit them.
_TIMES_CHANCE, _LEAST_LABELLED = 3, 30

#: Share of keys admitted, in the mean, below which a layer counts as masked.
_HARDLY_MASKED = 0.995


@dataclass(frozen=True)
class Row:
    """One layer of the table: where it stands, its name, mean and standard error per column of :func:`columns`."""

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
    kind = _section(analysis, "images").get("kind")
    images = _images(analysis) + (f" ({kind})" if kind else "")
    return f"{_plural(len(analysis.layers), 'attention layer')} · {images}"


def _images(analysis: Analysis) -> str:
    """How many images, and of how many where the run was interrupted."""
    images = _section(analysis, "images")
    count = images.get("count", "?")
    if analysis.complete:
        return _plural(count, "image")
    planned = images.get("planned")
    return f"partial: {count} of {_plural(planned, 'image')}" if planned else f"partial: {_plural(count, 'image')}"


def columns(analysis: Analysis) -> dict[str, str]:
    """Those of :data:`COLUMNS` that the analysis has, each with its heading; those not measured are left out."""
    return {key: heading for key, heading in COLUMNS.items() if key in analysis.layers}


def rows(analysis: Analysis) -> list[Row]:
    """The per-layer table; blocks carry their group's name where there are several groups."""
    several = len(analysis.groups) > 1
    shared = _shared_prefix([str(name) for name in analysis.layers.index])
    found = []
    for name, record in analysis.layers.iterrows():
        block = _count(record.get("block"))
        cells = tuple((_number(record.get(key)), _number(record.get(f"{key}_se"))) for key in columns(analysis))
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


def streams(analysis: Analysis) -> list[tuple[str, str]]:
    """Name of each residual stream, and the stream in words; nothing where all layers are in one."""
    if len(analysis.streams) < 2:
        return []
    return [
        (
            item.name,
            f"{_plural(len(item.layers), 'block')} of {item.tokens} tokens and {item.channels} channels{_place(item)}",
        )
        for item in analysis.streams
    ]


def glossary(analysis: Analysis) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """What the readings of this analysis mean, family by family: label, meaning, and range, map and source."""
    found = []
    for family, (title, _) in FAMILIES.items():
        own = [item for item in READINGS.values() if item.family == family and item.name in analysis.layers]
        if own:
            found.append(
                (title, [(item.label, item.meaning, f"{item.range}; {item.reads}; {item.source}") for item in own])
            )
    return found


def _place(group: Group | Stream) -> str:
    if len(group.layers) == 1:
        return f": {group.layers[0]}"
    return f", in {group.module}" if group.module else ""


def elided(rows: list[Row]) -> str:
    """What the "…" of the short names stands for; empty where none is shortened."""
    return rows[0].layer.removesuffix(rows[0].short_name.removeprefix("…")) if rows else ""


def decimal(value: float, places: int = 3) -> str:
    """Three decimals (or as many as wanted), or a dash where nothing is defined."""
    if math.isnan(value):
        return _ABSENT
    words = f"{value:.{places}f}"
    return words.removeprefix("-") if float(words) == 0 else words


def with_error(value: float, error: float, places: int = 3) -> str:
    """Value ± standard error; never a "± 0.000" that would claim certainty."""
    if math.isnan(value) or math.isnan(error):
        return decimal(value, places)
    smallest = 10.0**-places
    words = f"<{smallest:.{places}f}".replace("<0.", "<.") if 0 < error < smallest / 2 else f"{error:.{places}f}"
    return f"{decimal(value, places)}±{words}"


@dataclass(frozen=True)
class Table:
    """The readings of one family, layer by layer, as words.

    Attributes:
        headings: name and unit of each column.
        rows: short name of each layer and its cells.
    """

    headings: list[tuple[str, str]]
    rows: list[tuple[str, list[str]]]


def family_table(analysis: Analysis, family: str) -> Table:
    """Every reading of a family that is defined somewhere, with ± standard error or its 95 % interval."""
    table = analysis.layers
    defined = pd.DataFrame(
        {name: pd.to_numeric(table[name], errors="coerce") for name in table if _is_of(str(name), family)}
    )
    names = [str(name) for name in defined if np.isfinite(defined[name].to_numpy(dtype=np.float64)).any()]
    cells = [_column_in_words(table, name) for name in names]
    short = [row.short_name for row in rows(analysis)]
    return Table(
        [_heading(name) for name in names], list(zip(short, map(list, zip(*cells, strict=True)), strict=False))
    )


def _is_of(column: str, family: str) -> bool:
    reading = reading_of(column)
    if reading is None or reading.family != family:
        return False
    return column == reading.name or column.removeprefix(reading.name) in _PARTS


def _heading(column: str) -> tuple[str, str]:
    reading = reading_of(column)
    assert reading is not None
    return reading.label + _PARTS.get(column.removeprefix(reading.name), ""), reading.unit


def _column_in_words(table: pd.DataFrame, name: str) -> list[str]:
    """A column as text, all of it to one number of decimals."""
    values = [_number(value) for value in table[name]]
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    places = 3 if largest < 10 else 2 if largest < 100 else 1
    low, high, error = (_companions(table, name, ending) for ending in ("_low", "_high", "_se"))
    if any(map(math.isfinite, error)) or not any(map(math.isfinite, low)):
        return [with_error(*pair, places) for pair in zip(values, error, strict=True)]
    return [
        decimal(value, places) + (f" [{decimal(first, places)}, {decimal(last, places)}]" if first == first else "")
        for value, first, last in zip(values, low, high, strict=True)
    ]


def _companions(table: pd.DataFrame, name: str, ending: str) -> list[float]:
    found = companion(table.columns, name, ending)
    return [math.nan] * len(table) if found is None else [_number(value) for value in table[found]]


def derived(analysis: Analysis) -> list[tuple[str, str]]:
    """Similar blocks and their onset with 95 % intervals, for each group that has them: label and words."""
    found = []
    for group in analysis.groups:
        whose = f" in group {group.name}" if len(analysis.groups) > 1 else ""
        count, onset = group.derived.get("similar_blocks", {}), group.derived.get("onset", {})
        if count.get("value") is not None:
            found.append(
                (
                    f"Similar blocks{whose}",
                    f"{_estimate(count)} of {_plural(len(group.layers) - 1, 'pair')} of neighbours",
                )
            )
        if onset.get("value") is not None:
            found.append((f"Onset{whose}", f"block {_estimate(onset)}{_share_of_draws(onset)}"))
    return found


def _estimate(entry: Mapping[str, float | None]) -> str:
    low, high = entry.get("low"), entry.get("high")
    interval = f" [{low:g}, {high:g}]" if low is not None and high is not None else ""
    return f"{entry['value']:g}{interval}"


def _share_of_draws(entry: Mapping[str, float | None]) -> str:
    share = entry.get("share")
    return "" if share is None or share > 0.995 else f" (there in {share:.0%} of bootstrap draws)"


def absent(analysis: Analysis) -> list[tuple[str, str, str]]:
    """Metrics that were chosen and are not defined somewhere: metric, where, why; same reasons stand together."""
    places: dict[tuple[str, str], list[str]] = {}
    for entry in analysis.absent:
        key = (str(entry.get("metric", "?")), str(entry.get("reason", "no reason given")))
        places.setdefault(key, []).append(str(entry.get("where", "?")))
    return [(metric, _some(where, most=_MOST_ALONE), reason) for (metric, reason), where in places.items()]


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
    metrics = _section(analysis, "options").get("metrics")
    chosen = f"metrics: {metrics}" if metrics else None
    shards = f"{analysis.provenance['shards']} shards" if analysis.provenance.get("shards") else None
    about_run = [counted, images.get("kind"), skipped, shards, chosen, took, device, ", ".join(versions)]
    lines = [
        ("model", _joined(about_model)),
        ("recognised", _recognised(model)),
        ("run", _joined(about_run)),
        ("top-1", top1(analysis)),
        ("preprocessing", preprocessing(analysis)),
        ("verified", _proof(analysis)),
    ]
    return [(label, line) for label, line in lines if line]


def provenance_rows(analysis: Analysis) -> list[tuple[str, str]]:
    """All of the provenance as (dotted key, value) pairs; of a verification its sums only."""
    rows = [(key, _in_words(value)) for key, value in _leaves(analysis.provenance)]
    differs = preprocessing(analysis)
    rows = [(key, differs if key == "images.matches_model" and differs else words) for key, words in rows]
    return [(key, words) for key, words in rows if not key.startswith("verification.errors.")]


def top1(analysis: Analysis) -> str:
    """How often the model was right, and how that is known; empty without labels."""
    found = _section(analysis, "top1")
    if not found:
        return ""
    error = f" ± {100 * found['se']:.1f}" if found["se"] else ""
    count = _plural(found["labelled"], "labelled image")
    return f"{100 * found['accuracy']:.1f}{error} % on {count} ({found['labels']})"


def preprocessing(analysis: Analysis) -> str:
    """What of it is not the model's own; empty where all is, or where the caller did it."""
    differs = _section(analysis, "images").get("matches_model", True)
    if isinstance(differs, list):
        return "not the model's own: " + "; ".join(
            f"{entry['setting']} {_in_words(entry['used'])} instead of {_in_words(entry['model'])}" for entry in differs
        )
    return differs if isinstance(differs, str) and analysis.provenance["images"].get("kind") == "folder" else ""


def warnings(analysis: Analysis) -> list[str]:
    """What makes everything else doubtful, in sentences."""
    found, weights = _section(analysis, "top1"), _section(analysis, "model").get("weights")
    random = isinstance(weights, Mapping) and weights.get("random")
    if not found or random or found["labelled"] < _LEAST_LABELLED or found["accuracy"] > _chance_level(found):
        return []
    return [
        f"Top-1 of {top1(analysis)} is not above chance level ({100 / found['classes']:.3g} %): preprocessing, the "
        "order of the labels, the head or the weights do not fit. The other readings are of the model in that state."
    ]


def _chance_level(found: Mapping[str, Any]) -> float:
    """Three times chance; two standard errors above it where classes are so few that three times were a good result."""
    chance = 1 / found["classes"]
    if _TIMES_CHANCE * chance < chance + (1 - chance) / _TIMES_CHANCE:
        return _TIMES_CHANCE * chance
    return chance + 2 * math.sqrt(chance * (1 - chance) / found["labelled"])


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
    named = {entry.get("metric") for entry in analysis.absent}  # these have a list of their own
    absent = [
        key
        for key in columns(analysis)
        if pd.to_numeric(table[key], errors="coerce").isna().all() and READINGS[key].metric not in named
    ]
    comparable = "similarity_to_previous" in table and "similarity_to_previous" not in absent
    if "similarity_to_previous" in absent:
        yield "Every comparison with a previous block", _WHY_ABSENT["similarity_to_previous"]
        absent = [key for key in absent if not key.endswith("_to_previous")]
    for key in absent:
        yield COLUMNS[key], _WHY_ABSENT[key]
    if {"normalized_entropy", "is_probability"} <= set(table) and "normalized_entropy" not in absent:
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


def _recognised(model: Mapping[str, Any]) -> str:
    """How the architecture is known, where neither the caller nor the file named it, and what had to be assumed."""
    heads = model.get("heads") or {}
    assumed = str(heads.get("known", "")).startswith("assumed")
    parts = [f"{heads['count']} heads {heads['known']}; --num-heads sets them"] if assumed else []
    if str(model.get("architecture_from", "")).startswith("recognised"):
        also = f", also named {', '.join(model['same_network'])}" if model.get("same_network") else ""
        parts.insert(0, f"by keys and shapes{also}")
    return " · ".join(parts)


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
