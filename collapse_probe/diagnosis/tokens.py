"""Findings on token features: tokens that have become one, and tokens that outgrow all others."""

from __future__ import annotations

from collapse_probe.diagnosis import codes
from collapse_probe.diagnosis.case import Case
from collapse_probe.diagnosis.validity import untouched_norms
from collapse_probe.diagnosis.wording import blocks, finding_readings, span, with_error
from collapse_probe.result import Finding


def collapsed(case: Case) -> list[Finding]:
    """Tokens that are alike after a block, outliers not counted, in a network whose attention is not uniform anyway."""
    if case.everywhere_uniform or not case.collapsed_tokens.any():
        return []
    found = case.collapsed_tokens
    names = ("token_similarity_typical", "rank_residual_frobenius_typical")
    values = {name: case.reading(name)[found] for name in names}
    errors = {name: case.reading(f"{name}_se")[found] for name in names}
    last = bool(found[case.reading(names[0]).last_valid_index()])
    with_outliers = case.reading("rank_residual_frobenius")[found]
    layers = list(found.index[found])
    evidence = (
        f"{len(layers)} of {len(case.table)} layers; token similarity "
        f"{with_error(values[names[0]], errors[names[0]])}, residual {with_error(values[names[1]], errors[names[1]])} "
        f"without outlier tokens, {span(with_outliers)} with"
    )
    uniform = case.explained.sum()
    if uniform:
        evidence += f"; attention is uniform in {uniform} layers as there is nothing to tell apart"
    return [
        Finding(
            code=codes.TOKENS,
            severity="problem" if last else "warning",
            title=f"Tokens have become one after {blocks(layers)}.",
            evidence=evidence,
            threshold=f"mean cosine of different tokens at least {case.limits.similar_tokens:g}, and |X - mean| / |X| "
            f"at most {case.limits.residual:.2f}, both without outlier tokens",
            source=case.limits.similar_tokens.origin,
            advice="Check skip connections and layer scale (Dong et al., arXiv 2103.03404); keep tokens apart by a "
            "loss (Gong et al., arXiv 2104.12753) or by scaling high frequencies (Wang et al., arXiv 2203.05962).",
            layers=tuple(layers),
            readings=finding_readings(values, errors),
        )
    ]


def large_prefix(case: Case) -> list[Finding]:
    """Class tokens or registers whose norm is far above that of the patches: by design in some models, so a note."""
    ratio = case.reading("prefix_norm_ratio")
    found = ratio >= case.limits.outlier_norm
    if not found.any():
        return []
    errors = case.reading("prefix_norm_ratio_se")[found]
    return [
        Finding(
            code=codes.LARGE_PREFIX,
            severity="note",
            title=f"A class token or register has a huge norm after {blocks(list(found.index[found]))}.",
            evidence=f"largest prefix token over the median patch {with_error(ratio[found], errors)}",
            threshold=f"at least {case.limits.outlier_norm:g} times the median patch norm",
            source=case.limits.outlier_norm.origin,
            advice="Registers are meant to hold what outlier patches would (Darcet et al., arXiv 2309.16588). Readings "
            "over all tokens are distorted: use those of patches, or without outliers.",
            layers=tuple(found.index[found]),
            readings=finding_readings({"prefix_norm_ratio": ratio[found]}, {"prefix_norm_ratio": errors}),
        )
    ]


def idle_branches(case: Case) -> list[Finding]:
    """Attention that adds next to nothing to the stream, in a network whose attention is not uniform anyway."""
    share = case.reading("attention_branch_share")
    found = share <= case.limits.idle_branch
    # Some networks begin with branches that add nothing.
    if case.everywhere_uniform or untouched_norms(case) or not found.any():
        return []
    errors = case.reading("attention_branch_share_se")[found]
    return [
        Finding(
            code=codes.IDLE,
            severity="problem" if found.mean() >= case.limits.concerned_share else "warning",
            title=f"Attention adds nothing to the stream in {blocks(list(found.index[found]))}.",
            evidence=f"{int(found.sum())} of {len(case.table)} layers; norm of what attention adds over that of the "
            f"stream {span(share[found])} (standard error up to {errors.max():.1e})",
            threshold=f"at most {case.limits.idle_branch:g}",
            source=case.limits.idle_branch.origin,
            advice="Look for output projections, values or layer scales that are zero or never grew; such a layer can "
            "be left out.",
            layers=tuple(found.index[found]),
            readings=finding_readings({"attention_branch_share": share[found]}, {"attention_branch_share": errors}),
        )
    ]


def outliers(case: Case) -> list[Finding]:
    """Patches whose norm is far above that of the others."""
    largest = case.reading("largest_norm_ratio")
    found = (largest >= case.limits.outlier_norm) & (case.reading("outlier_share") > 0)
    if not found.any():
        return []
    errors = case.reading("largest_norm_ratio_se")[found]
    share = case.reading("outlier_share")[found]
    residuals = [span(case.reading(f"rank_residual_frobenius{end}")[found]) for end in ("", "_typical")]
    return [
        Finding(
            code=codes.OUTLIERS,
            severity="warning",
            title=f"A few tokens have huge norms after {blocks(list(found.index[found]))}.",
            evidence=f"largest norm over the median {with_error(largest[found], errors)}; share of patches "
            f"{span(share)}; residual {residuals[0]} with them, {residuals[1]} without",
            threshold=f"largest patch norm at least {case.limits.outlier_norm:g} times the median",
            source=case.limits.outlier_norm.origin,
            advice="Readings that norms dominate are distorted: use those without outliers. Train with register tokens "
            "(Darcet et al., arXiv 2309.16588).",
            layers=tuple(found.index[found]),
            readings=finding_readings({"largest_norm_ratio": largest[found]}, {"largest_norm_ratio": errors}),
        )
    ]
