"""Findings across layers: blocks that repeat each other, and columns too flat for M to say anything."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from collapse_probe.diagnosis import codes
from collapse_probe.diagnosis.case import Case
from collapse_probe.diagnosis.wording import blocks, finding_readings, group_in_words, span, with_error
from collapse_probe.ratio import onset
from collapse_probe.result import Finding, Group

_ADVICE = (
    "Compare with Re-attention (DeepViT, arXiv 2103.11886), stochastic depth (arXiv 1603.09382) or fewer blocks; "
    "blocks that repeat their neighbour can often share its attention (Reuse Transformer, arXiv 2110.06821) or be "
    "pruned."
)


def collapse(case: Case) -> list[Finding]:
    """A finding for each group with blocks that repeat each other; how grave it is depends on how many of all do."""
    share = case.similar.sum() / max(1, len(case.table))
    clear = case.similarity - 2 * case.reading("similarity_to_previous_se") > case.limits.similar
    certain = (case.similar & clear).sum() / max(1, len(case.table))
    severity = "problem" if min(share, certain) >= case.limits.concerned_share else "warning"
    if case.similar.sum() == 1 and not (case.centred[case.similar] > case.limits.repeated).any():
        severity = "note"  # healthy networks come close to the threshold in their last pair
    found = []
    for group in case.groups:
        if case.similar[group.layers].any():
            finding = _in_group(case, group, severity)
            found.append((group, finding))
    if len(case.groups) == 1:
        return [finding for _, finding in found]
    return [_named(group, finding) for group, finding in found]


def repetition(case: Case) -> list[Finding]:
    """Blocks that repeat one that is not their neighbour."""
    if not case.repeats:
        return []
    pairs = [f"{name} that of {other}" for name, other in case.repeats.items()]
    matrix = {part: case.analysis.matrix(part) for part in ("similarity", "similarity_se", "centred")}
    values = {
        part: pd.Series({name: table.loc[name, other] for name, other in case.repeats.items()})
        for part, table in matrix.items()
    }
    share = len(case.repeats) / max(1, len(case.table))
    return [
        Finding(
            code=codes.COLLAPSE,
            severity="problem" if share >= case.limits.concerned_share else "warning",
            title=f"Blocks repeat the attention of an earlier one: {blocks(pairs)}.",
            evidence=f"{len(pairs)} of {len(case.table)} layers; M "
            f"{with_error(values['similarity'], values['similarity_se'])}, centred {span(values['centred'])}",
            threshold=f"M above {case.limits.similar:g} and centred M above {case.limits.repeated:g}",
            source=case.limits.repeated.origin,
            advice=_ADVICE,
            layers=tuple(case.repeats),
            readings=finding_readings(
                {"similarity": values["similarity"], "centred": values["centred"]},
                {"similarity": values["similarity_se"]},
            ),
        )
    ]


def _in_group(case: Case, group: Group, severity: str) -> Finding:
    similar = case.similar[group.layers]
    chosen = list(similar.index[similar])
    first = onset(similar.to_numpy())
    to_the_end = first is not None and similar.to_numpy()[first + 1 :].sum() == len(chosen)
    where = f"from {group.layers[first]} on" if first is not None and to_the_end else f"at {blocks(chosen)}"
    m, errors = case.similarity[chosen], case.reading("similarity_to_previous_se")[chosen]
    parts = {
        "centred": case.centred[chosen],
        "image-independent": case.reading("image_independent_to_previous")[chosen],
    }
    evidence = f"{len(chosen)} of {len(group.layers)} blocks; M to the block before {with_error(m, errors)}, "
    evidence += ", ".join(f"{name} {span(values)}" for name, values in parts.items() if values.notna().any())
    borderline = int((m - 2 * errors <= case.limits.similar).sum())
    if borderline:
        evidence += f"; {borderline} of them within two standard errors of the threshold"
    evidence += _interval(group)
    return Finding(
        code=codes.COLLAPSE,
        severity=severity,
        title=f"One pair of blocks attends alike: {chosen[0]} and the block before."
        if severity == "note"
        else f"Attention collapses across layers: neighbouring blocks attend alike {where}.",
        evidence=evidence,
        threshold=f"mean M between neighbouring blocks above {case.limits.similar:g}, and columns that vary enough for "
        f"M to mean something (or centred M above {case.limits.repeated:g})",
        source=case.limits.similar.origin,
        advice=_ADVICE,
        layers=tuple(chosen),
        readings=finding_readings(
            {"similarity_to_previous": m, "centred_to_previous": case.centred[chosen]},
            {
                "similarity_to_previous": errors,
                "centred_to_previous": case.reading("centred_to_previous_se")[chosen],
            },
        ),
    )


def _interval(group: Group) -> str:
    """The bootstrap interval of where the similar blocks begin."""
    known = group.derived.get("onset", {})
    low, high = known.get("low"), known.get("high")
    if known.get("value") is None or low is None or high is None:
        return ""
    return f"; 95 % interval of the onset: {group.layers[round(low)]} to {group.layers[round(high)]}"


def _named(group: Group, finding: Finding) -> Finding:
    return replace(finding, title=f"{group_in_words(group)}: {finding.title}")


def flat(case: Case) -> list[Finding]:
    """Layers in which every query attends nearly alike, without being uniform: their M is high for that reason."""
    found = case.flat & ~case.uniform & ~case.similar
    if len(case.table) == 0 or found.mean() < case.limits.concerned_share:
        return []
    table = case.table[found]
    r, errors = case.variation[found], case.reading("relative_variation_se")[found]
    least = math.sqrt(1 - case.limits.flat)
    return [
        Finding(
            code=codes.FLAT,
            severity="warning",
            title=f"Queries attend nearly alike in {blocks(table.index)}: attention hardly depends on who asks.",
            evidence=f"{len(table)} of {len(case.table)} layers; relative variation r {with_error(r, errors)}, entropy "
            f"over log K {span(case.reading('normalized_entropy')[found])}",
            threshold=f"r below {least:.2f}, at which any two columns have M above {case.limits.flat:g}",
            source=case.limits.flat.origin,
            advice="M says nothing of these layers; read the centred similarity. Look for sinks and outlier tokens "
            "(registers, arXiv 2309.16588), or try fewer blocks.",
            layers=tuple(table.index),
            readings=finding_readings({"relative_variation": r}, {"relative_variation": errors}),
        )
    ]


def healthy(case: Case) -> list[Finding]:
    """Nothing is wrong: the most alike neighbours of all groups, none of them beside a uniform layer."""
    rows = []
    for group in case.groups:
        flat_layers = case.uniform[group.layers].to_numpy()
        beside = flat_layers | np.concatenate([[False], flat_layers[:-1]])
        neighbours = case.similarity[group.layers][~beside].dropna()
        if not neighbours.empty:
            place = group.layers.index(neighbours.idxmax())
            rows.append((group.layers[place - 1], group.layers[place]))
    if not rows:
        return []
    before, name = max(rows, key=lambda pair: case.similarity[pair[1]])
    alone = sum(len(group.layers) == 1 for group in case.groups)
    unseen = f"; {alone} of {len(case.table)} layers have no other to be compared with" if alone else ""
    return [
        Finding(
            code=codes.HEALTHY,
            severity="ok",
            title="No attention collapse across layers, but for one pair of blocks."
            if case.similar.any()
            else "No attention collapse across layers.",
            evidence=f"the most alike neighbours are {before} and {name}, with {_parts(case, name)}{unseen}",
            threshold=f"mean M between neighbouring blocks above {case.limits.similar:g}",
            source=case.limits.similar.origin,
            advice="Nothing to do.",
        )
    ]


def not_comparable(case: Case) -> list[Finding]:
    """There is no pair of layers to compare, or M was not measured."""
    measured = "similarity_to_previous" in case.analysis.layers
    return [
        Finding(
            code=codes.NOT_COMPARABLE,
            severity="note",
            title="No two of these layers attend over the same tokens, so nothing can be said of collapse."
            if measured
            else "The similarity of layers was not measured, so nothing can be said of collapse.",
            evidence=f"layers: {blocks(case.analysis.layers.index)}",
            threshold="at least two comparable layers of self-attention",
            source="similarity across layers is defined between maps of the same queries and keys only",
            advice="Read the readings within each layer."
            if measured
            else "Add cross_layer_similarity to the chosen metrics.",
            layers=tuple(case.analysis.layers.index),
        )
    ]


def _parts(case: Case, name: str) -> str:
    """M and those of its parts that are defined."""
    error = case.reading("similarity_to_previous_se")[name]
    words = [f"M {case.similarity[name]:.3f}"]
    words[0] += " (one image, so without an error)" if math.isnan(error) else f" ± {max(error, 0.001):.3f}"
    parts: dict[str, pd.Series] = {
        "image-independent": case.reading("image_independent_to_previous"),
        "centred": case.centred,
    }
    words += [f"{part} {values[name]:.3f}" for part, values in parts.items() if not math.isnan(values[name])]
    return ", ".join(words)
