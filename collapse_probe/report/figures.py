"""The picture beside the verdict: which figure carries it, and what it shows in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from collapse_probe import plots
from collapse_probe.plots.curves import ADJACENT
from collapse_probe.plots.families import PANELS
from collapse_probe.plots.panels import bands_in_words
from collapse_probe.plots.select import column, spread
from collapse_probe.readings import FAMILIES, reading_of
from collapse_probe.report import content
from collapse_probe.report.charts import HINTS, span
from collapse_probe.report.rendering import data_uri
from collapse_probe.result import Analysis, Group

Draw = Callable[[Analysis], tuple[Figure, Any]]

#: Word in a finding's code -> the figure that shows it, the first that fits; everything else is about blocks repeating
#: each other.
_CARRIES = {
    "head": "head_diversity", "entropy": "entropy", "uniform": "entropy", "untrained": "entropy",
    "outlier": "norms_and_branches", "norm": "norms_and_branches", "sink": "where_attention_goes",
    "dead": "where_attention_goes", "constant": "where_attention_goes", "token": "tokens", "smooth": "tokens",
    "rank": "tokens",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One figure on the page."""

    name: str
    title: str
    caption: str
    alt: str
    source: str

    @property
    def wide(self) -> bool:
        """Whether it takes the whole width."""
        return self.name in FAMILIES


def hero_name(analysis: Analysis) -> str:
    """The figure that carries the gravest finding; where nothing is wrong, the one that answers the question: the
    similarity of neighbours, or of all layers where they form several groups."""
    grave = [finding for finding in content.ordered(analysis.findings) if finding.severity in ("problem", "warning")]
    code = grave[0].code if grave else ""
    question = "layer_similarity" if len(analysis.groups) > 1 else "adjacent_similarity"
    chosen = next((figure for word, figure in _CARRIES.items() if word in code), question)
    if chosen in FAMILIES and not content.family_table(analysis, chosen).headings:
        chosen = question
    return chosen if _comparable(analysis) or chosen != question else "entropy"


def hero(gallery: plots.Gallery) -> Picture | None:
    """The picture beside the verdict; None where the analysis holds no layers."""
    analysis = gallery.analysis
    if not analysis.groups:
        return None
    name = hero_name(analysis)
    own = {
        "adjacent_similarity": _adjacent, "layer_similarity": _layer_similarity, "head_diversity": _head_diversity,
        "entropy": _entropy,
    }  # fmt: skip
    return own[name](gallery) if name in own else _family(gallery, name)


def _comparable(analysis: Analysis) -> bool:
    return bool(analysis.groups) and len(analysis.main_group.layers) > 1


def _adjacent(gallery: plots.Gallery) -> Picture:
    analysis = gallery.analysis
    intervals = [name for name in ADJACENT if spread(analysis.layers, name)[2]]
    bars = "Error bars: ±1 standard error" + ("; where the key says so, 95 % intervals." if intervals else ".")
    return _picture(
        gallery,
        "adjacent_similarity",
        "Similarity to the previous block",
        "Attention repeats itself where M is high and the image-specific excess or the centred similarity is high too. "
        f"Where M runs along its image-independent part, blocks share a fixed pattern. {bars}",
        "Line chart by block. " + _neighbours(analysis.groups),
    )


def _layer_similarity(gallery: plots.Gallery) -> Picture:
    groups = gallery.analysis.groups
    over = "blocks" if len(groups) == 1 else f"layers in {len(groups)} groups, hatched between them"
    title, caption = "Similarity M", "How alike the attention of two blocks is. The closer to 1, the more alike."
    if len(groups) > 1:
        caption += " Each framed block is a group of layers that may be compared."
    alt = f"Heatmap over {over}. {_neighbours(groups)}"
    return _picture(gallery, "layer_similarity", title, caption, alt)


def _head_diversity(gallery: plots.Gallery) -> Picture:
    return _picture(
        gallery,
        "head_diversity",
        "Head diversity",
        "How differently the heads of one layer attend: 0 means that they are copies. Band: ±1 standard error.",
        f"Line chart by layer: head diversity {_range(gallery.analysis, 'head_diversity')}.",
        plots.head_diversity,
    )


def _entropy(gallery: plots.Gallery) -> Picture:
    analysis = gallery.analysis
    return _picture(
        gallery,
        "entropy",
        "Entropy and relative variation",
        "Entropy near 1 with a small r marks untrained, uniform attention, of which M says nothing. Bands: ±1 "
        "standard error.",
        f"Two line charts by layer: entropy over log K {_range(analysis, 'normalized_entropy')}; "
        f"r {_range(analysis, 'relative_variation')}.",
        plots.entropy,
    )


def _family(gallery: plots.Gallery, family: str) -> Picture:
    analysis = gallery.analysis
    shown = [name for panel in PANELS[family] for name in panel.defined(analysis.layers)]
    alt = "; ".join(f"{_label(name)} {_range(analysis, name)}" for name in shown)
    return _picture(
        gallery,
        family,
        FAMILIES[family][0],
        f"{HINTS[family]} {bands_in_words(analysis, shown)}",
        f"Line charts by layer: {alt}.",
    )


def _label(name: str) -> str:
    reading = reading_of(name)
    return name if reading is None else reading.label


def _picture(
    gallery: plots.Gallery, name: str, title: str, caption: str, alt: str, draw: Draw | None = None
) -> Picture:
    return Picture(name, title, caption, f"{title}. {alt}", data_uri(gallery.render(name, "png", draw)))


def _neighbours(groups: Sequence[Group]) -> str:
    """M of neighbouring blocks in numbers, for readers who cannot see the picture."""
    matrices = [group.matrices.get("all", {}).get("similarity") for group in groups]
    values = [np.diagonal(matrix, 1).astype(np.float64) for matrix in matrices if matrix is not None]
    return f"Neighbouring blocks: {span(np.concatenate([np.array([]), *values]))}."


def _range(analysis: Analysis, name: str) -> str:
    return span(column(analysis.layers, name))
