"""From numbers to sentences: the verdict on an analysis.

Every threshold lives in :class:`Thresholds`, with where it comes from. Looked at are the layers in which tokens ask
tokens of the same image, all of them or those of their window. Whether blocks are alike is asked within each layer
group; whether attention is uniform and whether heads repeat each other are questions to single layers, answered for all
together. Uniform attention is told from collapse by entropy and relative variation, never by M: untrained networks show
M near 1 because every attention column is nearly flat, and layers that start as copies of each other even show a high
centred M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from collapse_probe.metrics.functional import onset
from collapse_probe.metrics.functional.ratio import SIMILAR
from collapse_probe.result import Analysis, Finding, Group

#: Kinds of attention that the verdict is about.
KINDS = ("token", "window")


@dataclass(frozen=True)
class Thresholds:
    """Cut-offs of the verdict.

    Attributes:
        similar: mean M above which two neighbouring blocks are called similar. Ours: DeepViT (arXiv 2103.11886) counts
            similar blocks without a stated cut-off; a trained DeiT-Ti stays at or below 0.89.
        collapsed_share: share of similar blocks, of all layers looked at, from which attention collapse is called a
            problem. Ours: the paper's 24 and 32 block ViTs have 11 and 15.
        uniform_entropy: entropy over log K above which attention is called uniform. Ours: random initialisations of
            ViTs of widths 192 to 1408, of `nn.TransformerEncoder` and of Swin, PVT, PiT, Twins, Hiera and MaxViT read
            0.97 to 1.00, trained models 0.44 to 0.83. SwinV2 (0.70 to 0.84) and MViTv2 (0.89 to 0.94) start with
            peaked attention, so that they are not recognised as untrained.
        uniform_deficit: log K minus entropy, in nats, below which attention is called uniform however short the
            sequence. Ours: random initialisations read at most 0.14, a trained DeiT-Ti 1.0 and more.
        uniform_variation: relative variation r above which attention is not called uniform whatever its entropy. Ours:
            random initialisations read at most 0.47. Raised where masks hide keys, by what the mask alone adds to r.
        redundant_heads: mean cross-head similarity above which the heads of a layer are called redundant. Ours.
    """

    similar: float = SIMILAR
    collapsed_share: float = 1 / 3
    uniform_entropy: float = 0.95
    uniform_deficit: float = 0.2
    uniform_variation: float = 0.55
    redundant_heads: float = 0.9


def diagnose(analysis: Analysis, similar: float = SIMILAR) -> list[Finding]:
    """The verdict: problems and warnings first, then what is well, then notes.

    Args:
        analysis: numbers without a verdict; not changed.
        similar: mean M above which neighbouring blocks are called similar.
    """
    limits = replace(Thresholds(), similar=similar)
    groups = [group for group in analysis.groups if group.kind in KINDS]
    table = analysis.layers.loc[[name for group in groups for name in group.layers]]
    uniform = is_uniform(table, limits)
    findings = [*_non_finite(analysis), *_uniform(table, uniform, limits), *_redundant_heads(table, uniform, limits)]
    findings += _similar_blocks(table, groups, uniform, limits)
    if not any(finding.severity in ("warning", "problem") for finding in findings):
        findings += _healthy(table, groups, uniform, limits)
    comparable = any(len(group.layers) > 1 for group in groups)
    if not findings or not (comparable or any(finding.severity == "problem" for finding in findings)):
        findings += _nothing_to_compare(analysis)
    order = ("problem", "warning", "ok", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def is_uniform(table: pd.DataFrame, limits: Thresholds) -> pd.Series:
    """Which layers attend nearly uniformly: high entropy and little variation."""
    # The largest possible entropy follows from the two readings also where masks admit fewer keys than there are.
    largest = table["entropy"] / table["normalized_entropy"]
    high = (table["normalized_entropy"] >= limits.uniform_entropy) | (
        largest - table["entropy"] <= limits.uniform_deficit
    )
    return high & (table["relative_variation"] <= _variation_limit(table, largest, limits))


def _variation_limit(table: pd.DataFrame, largest: pd.Series, limits: Thresholds) -> pd.Series:
    """The limit on r with what masks add to it.

    A column that is zero but for a share s of its queries, and varies by r' among those, has 1 - r^2 = s (1 - r'^2).
    """
    share = (np.exp(largest) / table["keys"]).clip(upper=1).fillna(1)
    return np.sqrt(1 - share * (1 - limits.uniform_variation**2))


def _non_finite(analysis: Analysis) -> list[Finding]:
    counts = analysis.layers["nonfinite_columns"]
    concerned = counts[counts > 0]
    if concerned.empty:
        return []
    return [
        Finding(
            code="non-finite",
            severity="problem",
            title=f"Attention holds NaN or infinite values in {_blocks(concerned.index)}.",
            evidence=f"{int(concerned.sum())} attention columns are not finite and were left out of every mean"
            + _where(analysis),
            threshold="any",
            source="a finite network has none",
            advice="Look for NaN in the weights, overflow in half precision (--amp-dtype bfloat16), or a bad image.",
            layers=tuple(concerned.index),
        )
    ]


def _uniform(table: pd.DataFrame, uniform: pd.Series, limits: Thresholds) -> list[Finding]:
    if not uniform.any():
        return []
    concerned = table[uniform]
    everywhere = uniform.mean() > 0.5
    beside_masks = (
        ", not counting what masks add to it"
        if (concerned["relative_variation"] > limits.uniform_variation).any()
        else ""
    )
    title = (
        "Attention is nearly uniform: this network looks untrained. Whatever its similarities, this is not collapse."
        if everywhere
        else f"Attention is nearly uniform in {_blocks(concerned.index)}."
    )
    return [
        Finding(
            code="uniform-attention",
            severity="problem" if everywhere else "note",
            title=title,
            evidence=f"{len(concerned)} of {len(table)} layers: entropy over log K "
            f"{_span(concerned['normalized_entropy'])}, relative variation r {_span(concerned['relative_variation'])}",
            threshold=f"entropy over log K at least {limits.uniform_entropy:g} (or within {limits.uniform_deficit:g} "
            f"nats of log K), and r at most {limits.uniform_variation:g}{beside_masks}",
            source="ours: random initialisations read 0.97 to 1.00 with r up to 0.47, trained models 0.44 to 0.83",
            advice="Check that trained weights were loaded and that they belong to this architecture; if so, these "
            "layers average their tokens and could be replaced by a mean.",
            layers=tuple(concerned.index),
        )
    ]


def _similar_blocks(
    table: pd.DataFrame, groups: Sequence[Group], uniform: pd.Series, limits: Thresholds
) -> list[Finding]:
    """A finding for each group with blocks that are alike; how grave it is depends on how many of all layers are."""
    similar = {group.name: _similar_in(table.loc[group.layers], uniform[group.layers]) for group in groups}
    share = sum(int(blocks.sum()) for blocks in similar.values()) / max(1, len(table))
    severity = "problem" if share >= limits.collapsed_share else "warning"
    findings = [
        _similar_in_group(table.loc[group.layers], similar[group.name], severity, limits)
        for group in groups
        if similar[group.name].any()
    ]
    if len(groups) == 1:
        return findings
    names = [_in_words(group) for group in groups if similar[group.name].any()]
    return [replace(item, title=f"{name}: {item.title}") for name, item in zip(names, findings, strict=True)]


def _similar_in(table: pd.DataFrame, uniform: pd.Series) -> np.ndarray:
    similar = table["similar_to_previous"].fillna(False).astype(bool).to_numpy()
    return similar & ~_beside_uniform(uniform)


def _similar_in_group(table: pd.DataFrame, similar: np.ndarray, severity: str, limits: Thresholds) -> Finding:
    concerned = table[similar]
    first = onset(similar)
    where = f"from {table.index[first]} on" if first is not None else f"at {_blocks(concerned.index)}"
    borderline = int(
        (concerned["similarity_to_previous"] - 2 * concerned["similarity_to_previous_se"] <= limits.similar).sum()
    )
    readings = {
        name: _span(concerned[f"{name}_to_previous"]) for name in ("similarity", "centred", "image_independent")
    }
    evidence = (
        f"{len(concerned)} of {len(table)} blocks; M to the block before {readings['similarity']} "
        f"({_up_to(concerned['similarity_to_previous_se'])}), centred {readings['centred']}, image-independent "
        f"{readings['image_independent']}"
    )
    if borderline:
        evidence += f"; {borderline} of them within two standard errors of the threshold"
    return Finding(
        code="similar-blocks",
        severity=severity,
        title=f"Attention collapses across layers: neighbouring blocks attend alike {where}.",
        evidence=evidence,
        threshold=f"mean M between neighbouring blocks above {limits.similar:g}",
        source="ours; DeepViT (arXiv 2103.11886) counts 5, 11 and 15 similar blocks in ViTs of 16, 24 and 32 "
        "blocks and states no cut-off",
        advice="Compare with Re-attention (DeepViT), fewer blocks, or stochastic depth; blocks that repeat their "
        "neighbour can often share or drop their attention (Reuse Transformer, arXiv 2110.06821).",
        layers=tuple(concerned.index),
    )


def _redundant_heads(table: pd.DataFrame, uniform: pd.Series, limits: Thresholds) -> list[Finding]:
    redundant = (table["cross_head_similarity"] > limits.redundant_heads) & ~uniform
    if not redundant.any():
        return []
    concerned = table[redundant]
    share = redundant.mean()
    return [
        Finding(
            code="head-redundancy",
            severity="warning" if share >= limits.collapsed_share else "note",
            title=f"Heads repeat each other in {_blocks(concerned.index)}.",
            evidence=f"cross-head similarity {_span(concerned['cross_head_similarity'])} "
            f"({_up_to(concerned['cross_head_similarity_se'])}) over {_counts(concerned['heads'])} heads",
            threshold=f"mean cosine between heads above {limits.redundant_heads:g}",
            source="ours; DeepViT (arXiv 2103.11886, figure 3c) reports below 0.3 for a 32-block ViT",
            advice="Try fewer heads in these blocks, or prune heads and measure (Michel et al., NeurIPS 2019).",
            layers=tuple(concerned.index),
        )
    ]


def _nothing_to_compare(analysis: Analysis) -> list[Finding]:
    return [
        Finding(
            code="not-comparable",
            severity="note",
            title="No two of these layers attend over the same tokens, so nothing can be said of collapse.",
            evidence=f"layers: {_blocks(analysis.layers.index)}",
            threshold="at least two comparable layers of self-attention",
            source="similarity across layers is defined between maps of the same queries and keys only",
            advice="Read the readings within each layer.",
            layers=tuple(analysis.layers.index),
        )
    ]


def _beside_uniform(uniform: pd.Series) -> np.ndarray:
    """Layers that are uniform themselves or come after one: such a pair is alike for a reason of its own."""
    flat = uniform.to_numpy()
    return flat | np.concatenate([[False], flat[:-1]])


def _healthy(table: pd.DataFrame, groups: Sequence[Group], uniform: pd.Series, limits: Thresholds) -> list[Finding]:
    """Nothing is wrong: the most alike neighbours of all groups, none of them beside a uniform layer."""
    rows = []
    for group in groups:
        own = table.loc[group.layers]
        neighbours = own["similarity_to_previous"][~_beside_uniform(uniform[group.layers])].dropna()
        if not neighbours.empty:
            place = group.layers.index(neighbours.idxmax())
            rows.append((own.index[place - 1], own.index[place], own.iloc[place]))
    if not rows:
        return []
    before, name, row = max(rows, key=lambda entry: entry[2]["similarity_to_previous"])
    alone = sum(len(group.layers) == 1 for group in groups)
    unseen = f"; {alone} of {len(table)} layers have no other to be compared with" if alone else ""
    return [
        Finding(
            code="healthy",
            severity="ok",
            title="No attention collapse across layers.",
            evidence=f"the most alike neighbours are {before} and {name}, with {_parts(row)}{unseen}",
            threshold=f"mean M between neighbouring blocks above {limits.similar:g}",
            source="ours; a trained DeiT-Ti reaches 0.89 in its last blocks",
            advice="Nothing to do.",
        )
    ]


def _in_words(group: Group) -> str:
    """A group by its letter, its kind of attention and where its layers are."""
    words = [f"{group.kind} attention", group.partition, f"in {group.module}" if group.module else ""]
    return f"Group {group.name} ({', '.join(word for word in words if word)})"


def _counts(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low}" if low == high else f"{low} to {high}"


def _parts(row: pd.Series) -> str:
    """M and those of its parts that are defined."""
    error = row["similarity_to_previous_se"]
    words = [f"M {row['similarity_to_previous']:.3f}"]
    words[0] += " (one image, so without an error)" if math.isnan(error) else f" ± {max(error, 0.001):.3f}"
    for name in ("image_independent", "centred"):
        value = row[f"{name}_to_previous"]
        if not math.isnan(value):
            words.append(f"{name.replace('_', '-')} {value:.3f}")
    return ", ".join(words)


def _where(analysis: Analysis) -> str:
    """Names of weights that are not finite, where the file was looked through."""
    names = analysis.provenance.get("model", {}).get("weights", {}).get("non_finite", [])
    return f"; weights that are not finite: {_blocks(names)}" if names else ""


def _up_to(errors: pd.Series) -> str:
    return "without a standard error" if errors.isna().all() else f"standard error up to {errors.max():.3f}"


def _span(values: pd.Series) -> str:
    """The range of a column, as text."""
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        return "undefined"
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"


def _blocks(names: Sequence[str] | pd.Index) -> str:
    """Layer names as a short list."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more layers"
