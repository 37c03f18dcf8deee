"""Whether the words of a figure can be read: inside it, apart from each other, and not too small."""

from __future__ import annotations

from itertools import combinations

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

#: Smallest font size in points.
SMALLEST = 6

#: Pixels by which boxes may overlap: they hold the height of letters that are not there.
_SLACK = 1


def words_of(figure: Figure) -> list[tuple[Text, Bbox]]:
    """Every text that shows, with its box in pixels."""
    figure.draw_without_rendering()
    ticks = {text for axis in _axes_of(figure) for text in axis.findobj(Text)} - {
        axis.label for axis in _axes_of(figure)
    }
    found = [text for text in figure.findobj(Text) if text not in ticks]
    found += [text for axis in _axes_of(figure) for text in _within_view(axis)]
    found = [text for text in found if text.axes is None or text.axes.axison]
    return [(text, text.get_window_extent()) for text in found if text.get_visible() and text.get_text().strip()]


def _axes_of(figure: Figure) -> list[Axis]:
    return [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) if ax.axison]


def _within_view(axis: Axis) -> list[Text]:
    """Labels of the ticks that are drawn: those beyond the ends of an axis are not."""
    low, high = sorted(axis.get_view_interval())
    place = 0 if axis.axis_name == "x" else 1
    return [
        text for text in axis.get_ticklabels(which="both") if low - 1e-9 <= text.get_position()[place] <= high + 1e-9
    ]


def faults(figure: Figure) -> list[str]:
    """What is cut, overlaps or is too small, in words."""
    words = words_of(figure)
    canvas = figure.bbox
    cut = [
        f"{text.get_text()!r} is cut"
        for text, box in words
        if box.x0 < canvas.x0 - 1 or box.x1 > canvas.x1 + 1 or box.y0 < canvas.y0 - 1 or box.y1 > canvas.y1 + 1
    ]
    small = [f"{text.get_text()!r} has {text.get_fontsize()} pt" for text, _ in words if text.get_fontsize() < SMALLEST]
    touching = [
        f"{one.get_text()!r} touches {other.get_text()!r}"
        for (one, box), (other, beside) in combinations(words, 2)
        if min(box.x1, beside.x1) - max(box.x0, beside.x0) > _SLACK
        and min(box.y1, beside.y1) - max(box.y0, beside.y0) > _SLACK
    ]
    return cut + small + touching
