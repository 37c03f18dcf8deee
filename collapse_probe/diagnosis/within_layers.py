"""Findings within a layer: heads that repeat each other or do nothing, entropy that has collapsed, sinks."""

from __future__ import annotations

from collapse_probe.diagnosis import codes
from collapse_probe.diagnosis.case import Case
from collapse_probe.diagnosis.wording import blocks, counts, finding_readings, span, with_error
from collapse_probe.result import Finding


def redundant_heads(case: Case) -> list[Finding]:
    """Heads alike in what their columns share and in how they vary; a flat column resembles every other."""
    similarity, centred = case.reading("cross_head_similarity"), case.reading("centred_cross_head_similarity")
    limit = case.limits.redundant_heads
    found = (similarity > limit) & (centred > limit) & ~case.uniform
    if not found.any():
        return []
    table = case.table[found]
    errors = case.reading("cross_head_similarity_se")[found]
    effective = case.reading("effective_heads")[found]
    effectively = f"effectively {span(effective)} " if effective.notna().any() else ""
    return [
        Finding(
            code=codes.REDUNDANT_HEADS,
            severity="warning" if found.mean() >= case.limits.concerned_share else "note",
            title=f"Heads repeat each other in {blocks(table.index)}.",
            evidence=f"cross-head similarity {with_error(similarity[found], errors)}, centred {span(centred[found])}, "
            f"{effectively}of {counts(table['heads'])} heads",
            threshold=f"mean cosine between heads above {limit:g}, centred or not",
            source=limit.origin,
            advice="Try fewer heads in these blocks, prune heads and measure (Michel et al., arXiv 1905.10650), or mix "
            "them (talking heads, arXiv 2003.02436).",
            layers=tuple(table.index),
            readings=finding_readings(
                {"cross_head_similarity": similarity[found], "centred_cross_head_similarity": centred[found]},
                {
                    "cross_head_similarity": errors,
                    "centred_cross_head_similarity": case.reading("centred_cross_head_similarity_se")[found],
                },
            ),
        )
    ]


def dead_heads(case: Case) -> list[Finding]:
    """Heads whose attention does not depend on the query, in layers whose other heads' does, or that add nothing."""
    constant, silent = case.constant_heads, case.silent_heads
    heads: dict[str, list[int]] = {}
    for name in case.table.index:
        numbers = {int(head) for found in (constant, silent) if name in found for head in found[name].nonzero()[0]}
        if numbers:
            heads[name] = sorted(numbers)
    if not heads:
        return []
    total, everything = sum(map(len, heads.values())), int(case.table["heads"].sum())
    listed = "; ".join(f"{name}: {', '.join(map(str, numbers))}" for name, numbers in list(heads.items())[:4])
    others = len(heads) - 4
    more = f" and {others} more layer{'s' if others > 1 else ''}" if others > 0 else ""
    counted = [
        f"{sum(int(mask.sum()) for mask in found.values())} {what}"
        for found, what in ((constant, "attend alike for every query"), (silent, "add nothing to any token"))
        if found
    ]
    return [
        Finding(
            code=codes.DEAD_HEADS,
            severity="problem" if total / max(1, everything) >= case.limits.concerned_share else "warning",
            title=f"Some heads do nothing in {blocks(list(heads))}.",
            evidence=f"of {everything} heads {', '.join(counted)} ({listed}{more})",
            threshold=f"at least {case.limits.constant_head:g} of the energy of a head's map in its mean over queries, "
            "or an output of exactly zero in every image",
            source=case.limits.constant_head.origin,
            advice="Heads that attend alike for every query add the same vector to every token: prune them and measure "
            "(Voita et al., arXiv 1905.09418; Michel et al., arXiv 1905.10650), or look for weights that were zeroed "
            "or never trained.",
            layers=tuple(heads),
            heads=heads,
        )
    ]


def saturated(case: Case) -> list[Finding]:
    """Entropy that has fallen to nearly nothing: every query attends to one key."""
    found = case.saturated & ~case.uniform
    if not found.any():
        return []
    entropy, errors = (case.reading(f"normalized_entropy{end}")[found] for end in ("", "_se"))
    heads = {
        name: [int(head) for head in mask.nonzero()[0]]
        for name, mask in case.saturated_heads.items()
        if found[name] and not mask.all()
    }
    partly = f"; in {len(heads)} of them only some heads" if heads else ""
    return [
        Finding(
            code=codes.ENTROPY,
            severity="problem" if found.mean() >= case.limits.concerned_share else "warning",
            title=f"Entropy has collapsed: queries attend to single keys in {blocks(entropy.index)}.",
            evidence=f"{len(entropy)} of {len(case.table)} layers; entropy over log K {with_error(entropy, errors)}"
            + partly,
            threshold=f"entropy over log K at most {case.limits.saturated_entropy:g}, in the mean or in half of the "
            "heads",
            source=case.limits.saturated_entropy.origin,
            advice="Logits have grown too large: spectral reparametrisation (Zhai et al., arXiv 2303.06296), "
            "normalised queries and keys (arXiv 2010.04245, 2302.05442), a smaller learning rate or longer warm-up.",
            layers=tuple(entropy.index),
            heads=heads,
            readings=finding_readings({"normalized_entropy": entropy}, {"normalized_entropy": errors}),
        )
    ]


def sinks(case: Case) -> list[Finding]:
    """Keys that draw attention whatever is asked, where entropy has not collapsed altogether."""
    share = case.reading("sink_share")
    found = (share >= case.limits.sink_share) & ~case.saturated
    if not found.any():
        return []
    errors = case.reading("sink_share_se")[found]
    to_prefix = case.reading("prefix_attention")[found]
    where = f"; attention to prefix tokens {span(to_prefix)}" if to_prefix.notna().any() else ""
    return [
        Finding(
            code=codes.SINKS,
            severity="note",
            title=f"Most heads have an attention sink in {blocks(list(share.index[found]))}.",
            evidence=f"share of heads with a sink {with_error(share[found], errors)}{where}",
            threshold=f"a key that draws more than {case.limits.sink:g} of all attention ({case.limits.sink.origin}) "
            f"in at least {case.limits.sink_share:g} of the heads",
            source=case.limits.sink_share.origin,
            advice="Sinks raise M and cross-head similarity; read these without them. Register tokens (arXiv "
            "2309.16588) take over their part.",
            layers=tuple(share.index[found]),
            readings=finding_readings({"sink_share": share[found]}, {"sink_share": errors}),
        )
    ]
