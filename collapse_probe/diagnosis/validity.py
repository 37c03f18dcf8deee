"""Findings that say what the other readings are worth: values that are not finite, networks that were not trained."""

from __future__ import annotations

from collapse_probe.diagnosis import codes
from collapse_probe.diagnosis.case import Case, layers_of
from collapse_probe.diagnosis.wording import blocks, finding_readings, span
from collapse_probe.result import Finding


def non_finite(case: Case) -> list[Finding]:
    """NaN or infinities in attention or in token features, of whatever kind of layer."""
    layers = case.analysis.layers
    columns, tokens = (case.reading(name, layers).fillna(0) for name in ("nonfinite_columns", "nonfinite_tokens"))
    concerned = layers_of((columns > 0) | (tokens > 0))
    names = case.analysis.provenance.get("non_finite_weights", [])
    if not concerned and not names:
        return []
    found = [f"{int(values.sum())} {what}" for values, what in ((columns, "attention columns"), (tokens, "tokens"))
             if values.sum()]  # fmt: skip
    weights = f"; weights that are not finite: {blocks(names)}" if names else ""
    if not concerned:
        return [_weights_not_finite(names)]
    where = "1 layer" if len(concerned) == 1 else f"{len(concerned)} layers"
    return [
        Finding(
            code=codes.NON_FINITE,
            severity="problem",
            title=f"Attention or features hold NaN or infinite values, first in {concerned[0]}.",
            evidence=f"{' and '.join(found)} in {where} are not finite and were left out of every mean" + weights,
            threshold="any",
            source="a finite network has none",
            advice="Look for NaN in the weights, overflow in half precision (--amp-dtype bfloat16), or a bad image.",
            layers=tuple(concerned),
        )
    ]


def _weights_not_finite(names: list[str]) -> Finding:
    return Finding(
        code=codes.NON_FINITE,
        severity="problem",
        title=f"Weights hold NaN or infinite values: {blocks(names)}.",
        evidence="attention and features are finite: what is not comes after them, or is not used",
        threshold="any",
        source="a finite network has none",
        advice="Look where these weights come from: an interrupted save, an overflow in training, a damaged file.",
    )


def constant_weights(case: Case) -> list[Finding]:
    """Weight matrices of one number, which map all tokens to one direction."""
    names = case.analysis.provenance.get("constant_weights", [])
    if not names or untouched_norms(case):  # some start at zero
        return []
    count = "1 weight matrix is" if len(names) == 1 else f"{len(names)} weight matrices are"
    return [
        Finding(
            code=codes.CONSTANT_WEIGHTS,
            severity="warning",
            title=f"{count} zero or one number throughout: {blocks(names)}.",
            evidence="every token is mapped to a multiple of the same vector there",
            threshold="any",
            source="a trained matrix has rank above one",
            advice="Look whether these layers were meant to be trained, were pruned away, or were saved by mistake.",
        )
    ]


_LOADED = "Check that trained weights were loaded and that they belong to this architecture; if so, "
_AVERAGED = _LOADED + "these layers average their tokens and could be replaced by a mean."
_MIXED = _LOADED + (
    "what is mixed after the softmax may enlarge what little these maps differ in. Set the queries to zero and see "
    "whether accuracy falls: if it does not, these layers need no attention."
)


def uniform(case: Case) -> list[Finding]:
    """Attention that hardly tells tokens apart: everywhere in a network that was not trained, else a note."""
    own = case.uniform & ~case.explained
    if not own.any():
        return []
    limits, table = case.limits, case.table[own]
    everywhere, norms = case.everywhere_uniform, untouched_norms(case)
    mixed = set(table.index) <= set(case.analysis.provenance.get("mixed_after_softmax", ()))
    what = "Attention is nearly uniform before it is mixed over the heads" if mixed else "Attention is nearly uniform"
    if not everywhere:
        title = f"{what}, in {blocks(table.index)}." if mixed else f"{what} in {blocks(table.index)}."
    elif norms is False:
        title = f"{what}, although this network has been trained."
    else:
        title = (
            "Attention is nearly uniform: this network looks untrained. Whatever its similarities, this is not "
            "collapse."
        )
    evidence = (
        f"{len(table)} of {len(case.table)} layers: entropy over log K {span(table['normalized_entropy'])}, relative "
        f"variation r {span(table['relative_variation'])}"
    )
    if everywhere and norms:
        evidence += "; every normalisation layer is as initialised"
    beside_masks = (
        ", not counting what masks add to it" if (table["relative_variation"] > limits.uniform_variation).any() else ""
    )
    names = ("normalized_entropy", "relative_variation")
    return [
        Finding(
            code=codes.UNIFORM,
            # A trained model may work with what is mixed from maps that hardly differ.
            severity="note" if not everywhere else "warning" if mixed and norms is False else "problem",
            title=title,
            evidence=evidence,
            threshold=f"entropy over log K at least {limits.uniform_entropy:g} (or within {limits.uniform_deficit:g} "
            f"nats of log K), and r at most {limits.uniform_variation:g}{beside_masks}",
            source=limits.uniform_entropy.origin,
            advice=(_MIXED if mixed else _AVERAGED),
            layers=tuple(table.index),
            readings=finding_readings(
                {name: table[name] for name in names}, {name: case.reading(f"{name}_se")[own] for name in names}
            ),
        )
    ]


def untrained(case: Case) -> list[Finding]:
    """Normalisation layers that are exactly as initialised, in a network that attention does not give away."""
    if not untouched_norms(case) or case.everywhere_uniform:
        return []
    total = case.analysis.provenance["normalisation"]["layers"]
    return [
        Finding(
            code=codes.UNTRAINED,
            severity="problem",
            title="This network has not been trained: the readings describe its initialisation.",
            evidence=f"all {total} normalisation layers have the scales and shifts that they were created with, and no "
            "linear layer has a bias",
            threshold="every scale of a normalisation layer is exactly 0 or 1, every shift exactly 0, and no bias of a "
            "linear layer above 1e-4",
            source="ours: steps of an optimiser change them; folding normalisations into linear layers leaves biases",
            advice="Check that trained weights were loaded and that they belong to this architecture.",
        )
    ]


def untouched_norms(case: Case) -> bool | None:
    """Whether all normalisation layers are as initialised; None where that is not known."""
    known = case.analysis.provenance.get("normalisation", {})
    if not known.get("layers"):
        return None
    return bool(known["as_initialised"] == known["layers"] and not known.get("biases"))
