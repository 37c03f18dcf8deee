"""From numbers to sentences: the verdict on an analysis.

Every threshold lives in :class:`Thresholds`, with where it comes from. What is said of a layer group rests on it alone.
Uniform attention is told from collapse by entropy and relative variation, never by M: untrained networks show M
near 1 because every attention column is nearly flat, and layers that start as copies of each other even show a high
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
from collapse_probe.result import Analysis, Finding


@dataclass(frozen=True)
class Thresholds:
    """Cut-offs of the verdict.

    Attributes:
        similar: mean M above which two neighbouring blocks are called similar. Ours: DeepViT (arXiv 2103.11886) counts
            similar blocks without a stated cut-off; a trained DeiT-Ti stays at or below 0.89.
        collapsed_share: share of similar blocks from which attention collapse is called a problem. Ours: the paper's
            24 and 32 block ViTs have 11 and 15.
        uniform_entropy: entropy over log K above which attention is called uniform. Ours: random initialisations of
            ViTs of widths 192 to 1408 and of `nn.TransformerEncoder` read 0.97 to 1.00, trained models 0.44 to 0.83.
        uniform_deficit: log K minus entropy, in nats, below which attention is called uniform however short the
            sequence. Ours: random initialisations read at most 0.14, a trained DeiT-Ti 1.0 and more.
        uniform_variation: relative variation r above which attention is not called uniform whatever its entropy. Ours:
            random initialisations read at most 0.47.
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
    findings = _non_finite(analysis)
    tables = [analysis.layers.loc[group.layers] for group in analysis.groups if group.kind == "token"]
    for table in tables:
        uniform = is_uniform(table, limits)
        found = [*_uniform(table, uniform, limits), *_similar_blocks(table, uniform, limits)]
        found += _redundant_heads(table, uniform, limits)
        if len(tables) > 1:
            found = [replace(finding, title=f"Group {table['group'].iloc[0]}: {finding.title}") for finding in found]
        findings += found
    if not any(finding.severity in ("warning", "problem") for finding in findings):
        findings += _healthy(tables, limits)
    if not findings:
        findings = _nothing_to_compare(analysis)
    order = ("problem", "warning", "ok", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def is_uniform(table: pd.DataFrame, limits: Thresholds) -> pd.Series:
    """Which layers attend nearly uniformly: high entropy and little variation."""
    # The largest possible entropy follows from the two readings also where masks admit fewer keys than there are.
    deficit = table["entropy"] / table["normalized_entropy"] - table["entropy"]
    high = (table["normalized_entropy"] >= limits.uniform_entropy) | (deficit <= limits.uniform_deficit)
    return high & (table["relative_variation"] <= limits.uniform_variation)


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
            f"nats of log K), and r at most {limits.uniform_variation:g}",
            source="ours: random initialisations read 0.97 to 1.00 with r up to 0.47, trained models 0.44 to 0.83",
            advice="Check that trained weights were loaded and that they belong to this architecture; if so, these "
            "layers average their tokens and could be replaced by a mean.",
            layers=tuple(concerned.index),
        )
    ]


def _similar_blocks(table: pd.DataFrame, uniform: pd.Series, limits: Thresholds) -> list[Finding]:
    if len(table) < 2:
        return []
    similar = table["similar_to_previous"].fillna(False).astype(bool).to_numpy()
    similar = similar & ~_beside_uniform(uniform)
    if not similar.any():
        return []
    concerned = table[similar]
    first = onset(similar)
    where = f"from {table.index[first]} on" if first is not None else f"at {_blocks(concerned.index)}"
    share = similar.sum() / len(table)
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
    return [
        Finding(
            code="similar-blocks",
            severity="problem" if share >= limits.collapsed_share else "warning",
            title=f"Attention collapses across layers: neighbouring blocks attend alike {where}.",
            evidence=evidence,
            threshold=f"mean M between neighbouring blocks above {limits.similar:g}",
            source="ours; DeepViT (arXiv 2103.11886) counts 5, 11 and 15 similar blocks in ViTs of 16, 24 and 32 "
            "blocks and states no cut-off",
            advice="Compare with Re-attention (DeepViT), fewer blocks, or stochastic depth; blocks that repeat their "
            "neighbour can often share or drop their attention (Reuse Transformer, arXiv 2110.06821).",
            layers=tuple(concerned.index),
        )
    ]


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
            f"({_up_to(concerned['cross_head_similarity_se'])}) over {int(table['heads'].iloc[0])} heads",
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


def _healthy(tables: Sequence[pd.DataFrame], limits: Thresholds) -> list[Finding]:
    """Nothing is wrong: the most alike neighbours of all groups, none of them beside a uniform layer."""
    rows = []
    for table in tables:
        neighbours = table["similarity_to_previous"][~_beside_uniform(is_uniform(table, limits))].dropna()
        if not neighbours.empty:
            place = list(table.index).index(neighbours.idxmax())
            rows.append((table.index[place - 1], table.index[place], table.iloc[place]))
    if not rows:
        return []
    before, name, row = max(rows, key=lambda entry: entry[2]["similarity_to_previous"])
    return [
        Finding(
            code="healthy",
            severity="ok",
            title="No attention collapse across layers.",
            evidence=f"the most alike neighbours are {before} and {name}, with {_parts(row)}",
            threshold=f"mean M between neighbouring blocks above {limits.similar:g}",
            source="ours; a trained DeiT-Ti reaches 0.89 in its last blocks",
            advice="Nothing to do.",
        )
    ]


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
