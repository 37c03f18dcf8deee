"""The report's pictures: which ones an analysis has, what each shows in words, and the one that carries the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from collapse_probe import plots
from collapse_probe.plots.select import column
from collapse_probe.report import content
from collapse_probe.report.rendering import data_uri
from collapse_probe.result import Analysis, Group

_HEATMAPS = {
    "similarity": ("Similarity M", "How alike the attention of two blocks is. The closer to 1, the more alike."),
    "centred": (
        "Centred similarity",
        "The same after uniform attention is taken away. Near 0: only uniformity was shared.",
    ),
    "image_independent": (
        "Image-independent part",
        "M between one image and another: what blocks share whatever they see.",
    ),
    "excess": ("Image-specific excess", "M minus that part: what blocks share because of the image at hand."),
}

_PARTS = {
    "prefix": "M over the columns of class token and registers only.",
    "patch": "M over the columns of patches only.",
}

#: Word in a finding's code -> the figure that shows it; everything else is about blocks repeating each other.
_CARRIES = {"head": "head_diversity", "entropy": "entropy", "uniform": "entropy", "untrained": "entropy"}

_LAST = ("head_diversity", "similarity_by_head", "entropy", "similarity_by_token")


@dataclass(frozen=True)
class Picture:
    """One figure on the page."""

    name: str
    title: str
    caption: str
    alt: str
    source: str


def hero_name(analysis: Analysis) -> str:
    """The figure that carries the gravest finding; where nothing is wrong, the one that answers the question: the
    similarity of neighbours, or of all layers where they form several groups."""
    grave = [finding for finding in content.ordered(analysis.findings) if finding.severity in ("problem", "warning")]
    code = grave[0].code if grave else ""
    question = "layer_similarity" if len(analysis.groups) > 1 else "adjacent_similarity"
    chosen = next((figure for word, figure in _CARRIES.items() if word in code), question)
    return chosen if _comparable(analysis) or chosen != question else "entropy"


def pictures(analysis: Analysis) -> list[Picture]:
    """Every figure of the report, in reading order; none where the analysis holds no layers."""
    if not analysis.groups:
        return []
    across = (*_heatmaps(analysis), *_details(analysis)) if _comparable(analysis) else ()
    by_name = {picture.name: picture for picture in (*across, *_within(analysis))}
    # Flat pictures side by side, then tall ones, so that two columns leave no holes.
    last = [by_name.pop(name) for name in _LAST if name in by_name]
    return [*by_name.values(), *last, *_single_groups(analysis)]


def _comparable(analysis: Analysis) -> bool:
    return bool(analysis.groups) and len(analysis.main_group.layers) > 1


def _heatmaps(analysis: Analysis) -> Iterator[Picture]:
    groups = analysis.groups
    over = "blocks" if len(groups) == 1 else f"layers in {len(groups)} groups, hatched between them"
    for reading, (title, caption) in _HEATMAPS.items():
        draw = partial(plots.layer_similarity, reading=reading)
        name = "layer_similarity" if reading == "similarity" else reading
        if name == "layer_similarity" and len(groups) > 1:
            caption += " Each framed block is a group of layers that may be compared."
        yield _picture(analysis, name, title, caption, draw, f"Heatmap over {over}. {_neighbours(groups, reading)}")
    for part, caption in _PARTS.items():
        if any(part in group.matrices for group in groups):
            draw = partial(plots.layer_similarity, part=part)
            alt = f"Heatmap over {over}. {_neighbours(groups, 'similarity', part)}"
            yield _picture(analysis, f"similarity_{part}", f"Similarity M, {part} tokens", caption, draw, alt)


def _details(analysis: Analysis) -> Iterator[Picture]:
    group = analysis.main_group
    yield _picture(
        analysis,
        "adjacent_similarity",
        "Similarity to the previous block",
        "Attention repeats itself where M is high and the image-specific excess or the centred similarity is high too. "
        "Where M runs along its image-independent part, blocks share a fixed pattern. Error bars: ±1 standard error.",
        plots.adjacent_similarity,
        "Line chart by block. " + _neighbours(analysis.groups, "similarity"),
    )
    if "similarity_by_head" in group.arrays:
        caption = f"M between each head and the head of the same number in the block before{_whose(analysis)}."
        alt = f"Heatmap of {group.heads} heads by {len(group.layers)} blocks. {_neighbours([group], 'similarity')}"
        yield _picture(analysis, "similarity_by_head", "By head", caption, plots.similarity_by_head, alt)
    if "similarity_by_token" in group.arrays:
        place = "on the patch grid" if group.grid else "in a line, as the patch grid is unknown"
        if group.windows > 1:
            place = "by its place in the window, as a mean over windows"
        caption = (
            f"M of each key token's column to the block before{_whose(analysis)}, {place}. Colours are fitted to the "
            "values shown."
        )
        alt = f"Small pictures of M by key token, {place}, for up to six pairs of neighbouring blocks."
        yield _picture(analysis, "similarity_by_token", "By key token", caption, plots.similarity_by_token, alt)


def _within(analysis: Analysis) -> Iterator[Picture]:
    yield _picture(
        analysis,
        "head_diversity",
        "Head diversity",
        "How differently the heads of one layer attend: 0 means that they are copies. Band: ±1 standard error.",
        plots.head_diversity,
        f"Line chart by layer: head diversity {_range(analysis, 'head_diversity')}.",
    )
    yield _picture(
        analysis,
        "entropy",
        "Entropy and relative variation",
        "Entropy near 1 with a small r marks untrained, uniform attention, of which M says nothing.",
        plots.entropy,
        f"Two line charts by layer: entropy over log K {_range(analysis, 'normalized_entropy')}; "
        f"r {_range(analysis, 'relative_variation')}.",
    )


def _single_groups(analysis: Analysis) -> Iterator[Picture]:
    """Each group's own heatmap, with its numbers, where there are several."""
    if len(analysis.groups) < 2:
        return
    for group in analysis.groups:
        if len(group.layers) > 1:
            alt = f"Heatmap over the blocks of group {group.name}. {_neighbours([group], 'similarity')}"
            title = f"Similarity M, group {group.name}"
            caption = f"{group.description}{f', in {group.module}' if group.module else ''}."
            draw = partial(plots.layer_similarity, group=group.name)
            yield _picture(analysis, f"layer_similarity_{group.name}", title, caption, draw, alt)


def _whose(analysis: Analysis) -> str:
    return f", in group {analysis.main_group.name}" if len(analysis.groups) > 1 else ""


def _picture(analysis: Analysis, name: str, title: str, caption: str, draw: Any, alt: str) -> Picture:
    figure, _ = draw(analysis)
    return Picture(name, title, caption, f"{title}. {alt}", data_uri(figure))


def _neighbours(groups: Sequence[Group], reading: str, part: str = "all") -> str:
    """Neighbouring blocks in numbers, for readers who cannot see the picture."""
    matrices = [group.matrices.get(part, {}).get(reading) for group in groups]
    values = [np.diagonal(matrix, 1).astype(np.float64) for matrix in matrices if matrix is not None]
    return f"Neighbouring blocks: {_span(np.concatenate([np.array([]), *values]))}."


def _range(analysis: Analysis, name: str) -> str:
    return _span(column(analysis.layers, name))


def _span(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    return f"{finite.min():.2f} to {finite.max():.2f}" if finite.size else "not defined"
