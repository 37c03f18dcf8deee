"""What every reading of the suite is called, what it means, where it comes from: one registry for tables, plots, docs.

Nothing here imports torch. A column of the layers table is a reading, a companion of one (its standard error, an end of
its interval, the same for some of the keys), or bookkeeping.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

#: Family of readings, each one figure -> its title and what it asks.
FAMILIES = {
    "across_layers": ("Across layers", "Do blocks repeat each other?"),
    "heads": ("Heads", "Do the heads of a block repeat each other?"),
    "entropy_and_rank": ("Entropy and rank", "How evenly and how variedly does a block attend?"),
    "where_attention_goes": ("Where attention goes", "How far does attention reach, and do all queries ask the same "
    "keys?"),
    "tokens": ("Tokens", "Do the tokens of an image become alike?"),
    "norms_and_branches": ("Norms and branches", "Which tokens stand out, and how much does a block change its "
    "stream?"),
}  # fmt: skip

#: What a metric reads, in words.
APPLIED = "applied map"
SOFTMAX = "softmax map"
FEATURES = "token features"


@dataclass(frozen=True)
class Metric:
    """One metric of the suite.

    Attributes:
        name: what `--metrics` calls it.
        cost: ``"fast"`` (in every analysis) or ``"all"`` (in the whole suite, or by name).
        reads: the map that multiplied the values, the softmax underneath it, or token features.
        source: where it comes from.
        defined: what it is defined on.
        sample: how many images it looks at; None for all.
    """

    name: str
    cost: str
    reads: str
    source: str
    defined: str
    sample: int | None = None


@dataclass(frozen=True)
class Reading:
    """One column of the layers table.

    Attributes:
        name: the column.
        metric: name of its metric in the suite.
        family: one of :data:`FAMILIES`.
        label: what the field calls it, in plain words.
        short: the same for headings and keys.
        unit: symbol or unit.
        range: the values that it can take, as text; it may depend on log K, H or K.
        meaning: what high and low values mean.
        source: paper and equation, or that it is this project's own.
        low, high: ends of the axis on which it is drawn; None where they follow the values.
        interval: whether an asymmetric 95 % interval exists in ``<name>_low`` and ``<name>_high``.
        optional: when the column is there and holds a value, as half a sentence; empty where its metric alone decides.
    """

    name: str
    metric: str
    family: str
    label: str
    short: str
    unit: str
    range: str
    meaning: str
    source: str
    low: float | None = None
    high: float | None = None
    interval: bool = False
    optional: str = ""

    @property
    def reads(self) -> str:
        """Which map, or token features."""
        return METRICS[self.metric].reads


_DEEPVIT = "DeepViT (arXiv 2103.11886)"
_OURS = "this project"
_GROUPS = "only for layers with another of the same kind, queries and keys before them"
_PAIRS = f"{_GROUPS}, and two images or more"
_PREFIX = "only where keys are both prefix tokens and patches"

METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "attention_distance", "fast", SOFTMAX, "Dosovitskiy et al. (arXiv 2010.11929), fig. 7",
            "token attention on a known patch grid, as many queries as keys",
        ),
        Metric(
            "branch_share", "fast", FEATURES, "after Raghu et al. (arXiv 2108.08810), fig. 8",
            "blocks whose attention or MLP branch is added to a stream",
        ),
        Metric("cka", "all", FEATURES, "Nguyen et al. (arXiv 2010.15327), eq. 3", "streams, four images or more"),
        Metric(
            "cross_head_similarity", "fast", APPLIED, f"{_DEEPVIT}, fig. 3c",
            "two heads or more; apart from effective heads, two queries or more",
        ),
        Metric(
            "cross_layer_similarity", "fast", APPLIED, f"{_DEEPVIT}, eq. 2; parts: {_OURS}",
            "two queries or more; pairs of layers within a group",
        ),
        Metric("attention_entropy", "fast", SOFTMAX, "Zhai et al. (arXiv 2303.06296)",
        "every map; rows with two keys or more"),
        Metric("feature_similarity", "fast", FEATURES, f"{_DEEPVIT}, fig. 4", "every stream"),
        Metric(
            "feature_spectrum", "all", FEATURES, "Park and Kim (arXiv 2202.06709), fig. 2",
            "streams whose patches lie on a known grid of 2 by 2 or more",
        ),
        Metric("head_divergence", "all", SOFTMAX, "Clark et al. (arXiv 1906.04341), sec. 6", "two heads or more"),
        Metric("low_pass", "fast", FEATURES, "Wang et al. (arXiv 2203.05962), thm. 1", "every stream"),
        Metric(
            "map_rank", "all", SOFTMAX, "Roy and Vetterli 2007",
            "two queries and keys or more; more than 512 keys only if asked for by name; the first 8 images", 8,
        ),
        Metric("rank_residual", "fast", FEATURES, "Dong et al. (arXiv 2103.03404)", "every stream"),
        Metric(
            "attention_sinks", "fast", SOFTMAX, "Gu et al. (arXiv 2410.10781), sec. 3",
            "two queries or more, and four keys or more",
        ),
        Metric("token_norms", "fast", FEATURES, "after Darcet et al. (arXiv 2309.16588)", "streams with patches"),
        Metric(
            "token_similarity", "fast", FEATURES, "Gong et al. (arXiv 2104.12753), Shi et al. (arXiv 2202.08625)",
            "streams with two patches or more",
        ),
        Metric(
            "total_variation_similarity", "all", SOFTMAX, "Reuse Transformer (arXiv 2110.06821), sec. 3",
            "every map; pairs of layers within a group",
        ),
    )
}  # fmt: skip

READINGS = {
    reading.name: reading
    for reading in (
        # -- across layers -------------------------------------------------------------------------------------------
        Reading(
            "similarity_to_previous", "cross_layer_similarity", "across_layers",
            "Similarity M to the previous block", "M", "cosine of columns", "0 to 1 (−1 to 1 after re-attention)",
            "High: each key token is attended to by the same queries as one block before; low: by others. Untrained "
            "networks read near 1 too, so M alone is no sign of collapse.",
            f"{_DEEPVIT}, eq. 2", 0, 1, optional=_GROUPS,
        ),
        Reading(
            "centred_to_previous", "cross_layer_similarity", "across_layers",
            "Centred similarity to the previous block", "centred", "correlation of columns", "−1 to 1",
            "M after uniform attention is taken away. High: the blocks prefer the same tokens; near 0: they shared "
            "no more than uniformity.",
            f"{_OURS}; Pearson correlation of columns", optional=f"{_GROUPS}; columns that vary over the queries",
        ),
        Reading(
            "image_independent_to_previous", "cross_layer_similarity", "across_layers",
            "Image-independent part of M", "image-independent", "cosine of columns",
            "0 to 1 (−1 to 1 after re-attention)",
            "M between one image and another. High and close to M: the blocks follow one fixed pattern whatever they "
            "see; low: what they share depends on the image.",
            _OURS, 0, 1, interval=True, optional=_PAIRS,
        ),
        Reading(
            "excess_to_previous", "cross_layer_similarity", "across_layers",
            "Image-specific excess of M", "excess", "cosine of columns", "−1 to 1",
            "M minus its image-independent part. High: the blocks repeat each other because of the image at hand; "
            "near 0: another image would have given the same M.",
            _OURS, interval=True, optional=_PAIRS,
        ),
        Reading(
            "similarity_ratio", "cross_layer_similarity", "across_layers",
            "Similarity ratio", "ratio", "share of M above the threshold", "0 to 1",
            "Share of images, heads and tokens whose M with the nearest blocks is above the threshold. High: nearly "
            "all columns repeat a neighbour's; low: few do.",
            f"{_DEEPVIT}, fig. 3a; threshold and number of neighbours are options", 0, 1, interval=True,
            optional=_GROUPS,
        ),
        Reading(
            "tv_similarity_to_previous", "total_variation_similarity", "across_layers",
            "Overlap of rows with the previous block", "row overlap", "1 − total variation", "0 to 1",
            "How much of a query's attention falls on the same keys as one block before. High: the same "
            "distribution; low: other keys. Uniform attention reads near 1 too.",
            "Reuse Transformer (arXiv 2110.06821), sec. 3", 0, 1, optional=_GROUPS,
        ),
        Reading(
            "cka_to_previous", "cka", "across_layers",
            "CKA of features with the previous block", "CKA", "linear CKA, unbiased", "about 0 to 1",
            "High: the block leaves the relations between images as they were; low: it makes new features.",
            "Nguyen et al. (arXiv 2010.15327), eq. 3", 0, 1,
            optional="only with four images or more; not for a stream's first block",
        ),
        Reading(
            "feature_similarity_to_previous", "feature_similarity", "across_layers",
            "Feature similarity to the previous block", "feature cosine", "cosine", "−1 to 1",
            "High: each token leaves the block pointing where it pointed before; low: the block turns it.",
            f"after {_DEEPVIT}, fig. 4", 0, 1, optional="not defined for a stream's first block",
        ),
        Reading(
            "feature_similarity_to_last", "feature_similarity", "across_layers",
            "Feature similarity to the last block", "to last block", "cosine", "−1 to 1; 1 at the last block",
            "High early on: later blocks change little, and depth is wasted; rising steadily: every block contributes.",
            f"{_DEEPVIT}, fig. 4", 0, 1,
        ),
        # -- heads ---------------------------------------------------------------------------------------------------
        Reading(
            "cross_head_similarity", "cross_head_similarity", "heads",
            "Cross-head similarity", "cross-head M", "cosine of columns", "0 to 1 (−1 to 1 after re-attention)",
            "High: the heads of a block attend alike and are redundant; low: they look at different tokens.",
            f"{_DEEPVIT}, fig. 3c", 0, 1, optional="not defined for a single head",
        ),
        Reading(
            "head_diversity", "cross_head_similarity", "heads",
            "Head diversity", "head diversity", "1 − cosine", "0 to 1 (0 to 2 after re-attention)",
            "1 minus the cross-head similarity. High: heads differ; near 0: they are copies of each other.",
            f"{_DEEPVIT}, fig. 3c", 0, 1, optional="not defined for a single head",
        ),
        Reading(
            "centred_cross_head_similarity", "cross_head_similarity", "heads",
            "Centred cross-head similarity", "centred cross-head", "correlation of columns", "−1 to 1",
            "The cross-head similarity after uniform attention is taken away. High: the heads prefer the same "
            "tokens; near 0: they shared no more than uniformity.",
            f"{_OURS}; Pearson correlation of columns",
            optional="not defined for a single head; columns that vary over the queries",
        ),
        Reading(
            "effective_heads", "cross_head_similarity", "heads",
            "Effective number of heads", "effective heads", "heads", "1 to H",
            "How many different maps the heads amount to. H: all differ; 1: all are the same map.",
            f"{_OURS}; exponential of the spectral entropy of the heads' Gram matrix", 1,
        ),
        Reading(
            "head_divergence", "head_divergence", "heads",
            "Divergence between heads", "head divergence", "Jensen-Shannon, nats", "0 to log 2",
            "High: for the same query, two heads attend to different keys; 0: to the same ones.",
            "Clark et al. (arXiv 1906.04341), sec. 6", 0, optional="not defined for a single head",
        ),
        # -- entropy and rank ----------------------------------------------------------------------------------------
        Reading(
            "entropy", "attention_entropy", "entropy_and_rank",
            "Attention entropy", "entropy", "nats", "0 to log K",
            "High: a query spreads its attention over many keys; 0: it attends to one key only.",
            "Zhai et al. (arXiv 2303.06296)", 0,
        ),
        Reading(
            "normalized_entropy", "attention_entropy", "entropy_and_rank",
            "Attention entropy over log K", "entropy / log K", "share of log K", "0 to 1",
            "1: uniform attention, the mark of an untrained network (0.97 to 1.00); 0: a single key. Trained models "
            "read 0.44 to 0.83.",
            "Zhai et al. (arXiv 2303.06296), divided by log K", 0, 1,
        ),
        Reading(
            "relative_variation", "cross_layer_similarity", "entropy_and_rank",
            "Relative variation of columns", "r", "|a − mean a| / |a|", "0 to 1",
            "0: every query attends to a key alike, as in uniform attention; high: a key is picked by few queries.",
            _OURS, 0, 1,
        ),
        Reading(
            "effective_rank", "map_rank", "entropy_and_rank",
            "Effective rank of maps", "effective rank", "rank", "1 to min(Q, K)",
            "High: queries attend in many independent ways; 1: all rows are one row, whatever the query.",
            "Roy and Vetterli 2007", 1,
        ),
        Reading(
            "stable_rank", "map_rank", "entropy_and_rank",
            "Stable rank of maps", "stable rank", "rank", "1 to min(Q, K)",
            "The same with little weight on small singular values: near 1, one direction holds most of the map.",
            "squared Frobenius norm over squared spectral norm", 1,
        ),
        # -- where attention goes ------------------------------------------------------------------------------------
        Reading(
            "attention_distance", "attention_distance", "where_attention_goes",
            "Mean attention distance", "distance", "patches", "0 to the diagonal of the grid",
            "High: attention reaches far over the image; low: it stays near the query's own patch.",
            "Dosovitskiy et al. (arXiv 2010.11929), fig. 7; Raghu et al. (arXiv 2108.08810), fig. 1", 0,
        ),
        Reading(
            "attention_distance_pixels", "attention_distance", "where_attention_goes",
            "Mean attention distance in pixels", "distance, pixels", "pixels of the input",
            "0 to the diagonal of the input",
            "The same in pixels of the model's input.",
            "Dosovitskiy et al. (arXiv 2010.11929), fig. 7", 0, optional="only where the size of a patch is known",
        ),
        Reading(
            "sink_share", "attention_sinks", "where_attention_goes",
            "Heads with a sink", "any token", "share of heads", "0 to 1",
            "A sink is a key that receives more than 0.3 of all attention in the mean. High: most heads have one and "
            "leave little attention for content; 0: none has.",
            "Gu et al. (arXiv 2410.10781), sec. 3", 0, 1,
        ),
        Reading(
            "sink_strength", "attention_sinks", "where_attention_goes",
            "Attention on the strongest key", "strongest key", "share of attention", "1/K to 1",
            "Largest mean attention that one key receives, as a mean over heads. High: one key draws nearly all "
            "queries.",
            "after Gu et al. (arXiv 2410.10781), sec. 3", 0, 1,
        ),
        Reading(
            "prefix_attention", "attention_sinks", "where_attention_goes",
            "Attention on prefix tokens", "prefix tokens", "share of attention", "0 to 1",
            "Share of attention on class token and registers together. High: patches are hardly looked at.",
            _OURS, 0, 1, optional=_PREFIX,
        ),
        Reading(
            "constant_rows", "attention_sinks", "where_attention_goes",
            "Constancy of rows", "constant rows", "share of energy", "1/Q to 1",
            "1: every query attends alike, be it uniformly or to a sink, so that the head ignores the query; low: "
            "attention depends on the query.",
            _OURS, 0, 1,
        ),
        # -- tokens --------------------------------------------------------------------------------------------------
        Reading(
            "rank_residual", "rank_residual", "tokens",
            "Rank residual", "all tokens", "relative 1,∞-norm", "0 and up; above 1 where a token stands out",
            "What is left of the tokens without their mean. Near 0: rank collapse, all tokens are one; about 1: they "
            "differ.",
            "Dong et al. (arXiv 2103.03404)", 0,
        ),
        Reading(
            "rank_residual_typical", "rank_residual", "tokens",
            "Rank residual without high-norm tokens", "without high-norm tokens", "relative 1,∞-norm", "0 and up",
            "The same without tokens above 5 times the median patch norm, which can hide the collapse of all others.",
            f"Dong et al. (arXiv 2103.03404); leaving tokens out: {_OURS}", 0,
        ),
        Reading(
            "rank_residual_frobenius", "rank_residual", "tokens",
            "Rank residual, Frobenius norm", "all tokens", "relative Frobenius norm", "0 to 1",
            "The same with the Frobenius norm, which no single token carries beyond 1.",
            "after Dong et al. (arXiv 2103.03404)", 0, 1,
        ),
        Reading(
            "rank_residual_frobenius_typical", "rank_residual", "tokens",
            "Rank residual, Frobenius norm, without high-norm tokens", "without high-norm tokens",
            "relative Frobenius norm", "0 to 1",
            "The same without tokens above 5 times the median patch norm.",
            f"after Dong et al. (arXiv 2103.03404); leaving tokens out: {_OURS}", 0, 1,
        ),
        Reading(
            "token_similarity", "token_similarity", "tokens",
            "Similarity of tokens", "all patches", "cosine", "−1 to 1",
            "Mean cosine between the patches of an image. Near 1: oversmoothing, patches are alike; low: they differ.",
            "Gong et al. (arXiv 2104.12753), signed as in Shi et al. (arXiv 2202.08625)", 0, 1,
        ),
        Reading(
            "token_similarity_typical", "token_similarity", "tokens",
            "Similarity of tokens without high-norm tokens", "without high-norm tokens", "cosine", "−1 to 1",
            "The same without patches above 5 times the median patch norm.",
            f"Gong et al. (arXiv 2104.12753); leaving tokens out: {_OURS}", 0, 1,
        ),
        Reading(
            "high_to_low_ratio", "low_pass", "tokens",
            "High over low frequencies", "high / low", "ratio of norms", "0 and up",
            "Size of the tokens beside their mean over the size of that mean. Near 0: attention has filtered out "
            "what told tokens apart.",
            "Wang et al. (arXiv 2203.05962), thm. 1", 0,
        ),
        Reading(
            "high_frequency_log_amplitude", "feature_spectrum", "tokens",
            "Log amplitude at the highest frequency", "Δ log amplitude", "natural log, relative to frequency 0",
            "any, mostly below 0",
            "Low: feature maps are smooth over the image; near 0: fine structure is as strong as the mean.",
            "Park and Kim (arXiv 2202.06709), fig. 2",
        ),
        # -- norms and branches --------------------------------------------------------------------------------------
        Reading(
            "outlier_share", "token_norms", "norms_and_branches",
            "High-norm patches", "high-norm patches", "share of patches", "0 to 1",
            "Share of patches with a norm above 5 times the median. Above 0: outlier tokens, which distort other "
            "readings.",
            "after Darcet et al. (arXiv 2309.16588); the ratio: this project", 0,
        ),
        Reading(
            "largest_norm_ratio", "token_norms", "norms_and_branches",
            "Largest patch norm over the median", "largest patch", "ratio", "1 and up",
            "High: one patch stands out from the others (outliers of DINOv2 are about 10 times the rest); near 1: "
            "none does.",
            "after Darcet et al. (arXiv 2309.16588)", 0,
        ),
        Reading(
            "prefix_norm_ratio", "token_norms", "norms_and_branches",
            "Largest prefix norm over the median", "prefix token", "ratio", "0 and up",
            "High: class token or a register is much larger than patches are.",
            "after Darcet et al. (arXiv 2309.16588)", 0, optional="only where there are prefix tokens",
        ),
        Reading(
            "median_norm", "token_norms", "norms_and_branches",
            "Median patch norm", "median norm", "units of the features", "0 and up",
            "Size of a typical token. Growing with depth: branches add up, and each later block changes the stream "
            "less.",
            "Darcet et al. (arXiv 2309.16588)", 0,
        ),
        Reading(
            "attention_branch_share", "branch_share", "norms_and_branches",
            "Share of the attention branch", "attention", "norm over norm of the stream", "0 and up",
            "High: attention changes its tokens much; near 0: the block could do without its attention.",
            "after Raghu et al. (arXiv 2108.08810), fig. 8 (there inverted)", 0,
            optional="only where the attention branch was recognised",
        ),
        Reading(
            "mlp_branch_share", "branch_share", "norms_and_branches",
            "Share of the MLP branch", "MLP", "norm over norm of the stream", "0 and up",
            "The same for the MLP of the block.",
            "after Raghu et al. (arXiv 2108.08810), fig. 8 (there inverted)", 0,
            optional="only where the MLP branch was recognised",
        ),
    )
}  # fmt: skip

#: Columns that are no readings -> what they hold.
BOOKKEEPING = {
    "kind": "what asks what: token, window, class, pooling, cross",
    "group": "letter of the layer group: layers whose maps are compared with each other",
    "block": "place of the layer in its group, from 0",
    "heads": "heads of the applied map (H)",
    "queries": "queries of the map, in each window (Q)",
    "keys": "keys of the map, in each window (K)",
    "windows": "windows of an image; 1 where every token sees every other",
    "partition": "how windows are cut, where a model cuts them in more than one way",
    "is_probability": "whether rows of the applied map sum to 1; not after re-attention",
    "stream": "name of the residual stream that the layer's block belongs to",
    "module": "the block whose output is the stream",
    "similar_to_previous": "whether mean M to the previous block is above the threshold",
    "zero_columns": "attention columns left out because no query attends to the key",
    "nonfinite_columns": "attention columns left out because they hold NaN or infinity",
    "zero_tokens": "tokens left out because they are zero and have no cosine",
    "nonfinite_tokens": "tokens that hold NaN or infinity",
}

#: Readings of a whole group, `group.derived`, each with the ends of a 95 % interval -> what they hold. All follow from
#: the cross-layer similarity.
DERIVED = {
    "similar_blocks": "how many blocks have a mean M to the previous block above the threshold",
    "onset": "first block of the run of similar blocks that reaches the last one, from 0; absent where there is no "
    "such run, and `share` says in what share of the bootstrap draws there is one",
}

#: Endings of columns that belong to a reading -> what they hold.
ENDINGS = {
    "_se": "standard error over images",
    "_low": "lower end of the 95 % interval",
    "_high": "upper end of the 95 % interval",
    "_prefix": "the same over prefix tokens only",
    "_patch": "the same over patches only",
}
_PARTS = ("_prefix", "_patch")


def reading_of(column: str) -> Reading | None:
    """The reading that a column of the layers table holds or belongs to; None for bookkeeping and unknown columns.

    >>> reading_of("sink_share_prefix_se").name, reading_of("relative_variation_se_patch").name, reading_of("heads")
    ('sink_share', 'relative_variation', None)
    """
    while column not in READINGS:
        ending = next((ending for ending in ENDINGS if column.endswith(ending)), "")
        if not ending:
            return None
        column = column.removesuffix(ending)
    return READINGS[column]


def is_bookkeeping(column: str) -> bool:
    """Whether a column counts or describes: one of :data:`BOOKKEEPING`, or a share left out, ``<name>_absent``."""
    name = column.removesuffix("_absent")
    return column in BOOKKEEPING or (name != column and (name in METRICS or name in READINGS))


def companion(columns: Collection[str], column: str, ending: str) -> str | None:
    """The column with the standard error or an end of the interval of another; None where there is none.

    Args:
        columns: those of the table.
        column: a reading, or a reading of some of the keys (``<name>_prefix``, ``<name>_patch``).
        ending: ``"_se"``, ``"_low"`` or ``"_high"``.

    >>> companion({"r_se_patch"}, "r_patch", "_se"), companion({"r_patch_se"}, "r_patch", "_se")
    ('r_se_patch', 'r_patch_se')
    """
    names = [f"{column}{ending}"]
    names += [f"{column.removesuffix(part)}{ending}{part}" for part in _PARTS if column.endswith(part)]
    return next((name for name in names if name in columns), None)


def as_markdown() -> str:
    """The page `docs/readings.md`."""
    lines = [
        "# Readings", "",
        "Every column of `analysis.layers`, by family. Each row of the table is a layer; a value is a mean over "
        "images,",
        "heads and tokens, `<name>_se` its standard error over images. `<name>_low` and `<name>_high` are the ends "
        "of a",
        "95 % interval (" + ", ".join(f"`{name}`" for name, item in READINGS.items() if item.interval) + ").",
        "`<name>_prefix` and `<name>_patch` are the same over class token and registers, or over patches, where an",
        "analysis tells them apart. NaN marks what is not defined; `analysis.absent` says why a whole metric is not.",
        "`<name>_absent` is the share of what a metric (or a reading) looked at that had to be left out.", "",
        "Maps: the *applied* one multiplied the values; the *softmax* one lies underneath, and differs from it where a",
        "model mixes heads after the softmax (re-attention, talking heads). H heads, Q queries, K keys.", "",
        "`collapse-probe metrics --markdown` prints this page.", "",
    ]  # fmt: skip
    for family, (title, question) in FAMILIES.items():
        lines += [f"## {title}", "", question, ""]
        lines += [
            "| column | reading | unit | range | what it means | reads | source |",
            "|---|---|---|---|---|---|---|",
        ]
        for item in (item for item in READINGS.values() if item.family == family):
            meaning = item.meaning + (f" {item.optional[0].upper()}{item.optional[1:]}." if item.optional else "")
            cells = (f"`{item.name}`", item.label, item.unit, item.range, meaning, item.reads, item.source)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    lines += ["## Metrics", "", "What `--metrics` and `analyze(metrics=...)` choose from: `fast`, `all`, or names.", ""]
    lines += ["| metric | in | reads | defined on | source |", "|---|---|---|---|---|"]
    for metric in METRICS.values():
        sets = "fast, all" if metric.cost == "fast" else "all"
        lines.append(f"| `{metric.name}` | {sets} | {metric.reads} | {metric.defined} | {metric.source} |")
    lines += ["", "## Other columns", "", "| column | what it holds |", "|---|---|"]
    lines += [f"| `{name}` | {words} |" for name, words in BOOKKEEPING.items()]
    lines += ["", "## Readings of a group", "", "`group.derived`, each with `value`, `low` and `high`.", ""]
    lines += ["| reading | what it holds |", "|---|---|"]
    lines += [f"| `{name}` | {words} |" for name, words in DERIVED.items()]
    return "\n".join(lines) + "\n"
