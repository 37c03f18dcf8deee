"""How wide a figure is and whether it bears a title, both at the caller's choice, and words that fit into a width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from collapse_probe.errors import UsageError

#: Inches. ICML's style sets columns of 3.25 in with a gap of 0.25 in; CVPR's columns are as wide, its text 6.875 in.
WIDTHS = {"one-column": 3.25, "two-column": 6.75}

#: Figures below this width (inches) have fewer panels side by side, and words on more lines.
_NARROW = 4.0

#: Inches that the numbers and the label of a y axis take; in figures of one column labels may have two lines.
_BEFORE_AXES = {False: 0.4, True: 0.55}

#: What share of a width is filled: pixels make letters a little wider than their outlines.
_CAUTION = 0.95

#: Points of the small print under a figure.
SMALL_PRINT = 6.5


class _Style(NamedTuple):
    width: float | None = None
    titles: bool = True


_CURRENT: ContextVar[_Style] = ContextVar("figure style", default=_Style())  # noqa: B039  # a tuple does not change


@contextmanager
def figure_style(width: str | None = None, titles: bool = True) -> Iterator[None]:
    """Figures for a paper: every function of :mod:`collapse_probe.plots` honours this inside the ``with`` block.

    Text keeps its size, 6 points or more; what a width has no room for (panels side by side, numbers on the cells of a
    heatmap) is arranged otherwise or left out. Many panels on one column can be higher than a page. In a block within a
    block, a width holds until another is named, and titles that are off stay off.

    Args:
        width: ``"one-column"`` (3.25 in), ``"two-column"`` (6.75 in), or None for each figure's own. On axes of the
            caller it has no effect.
        titles: whether a figure bears a title; what it shows is then left to the caption, as ICML's instructions ask.
            The headings of small panels, which tell them apart, stay.

    Raises:
        UsageError: no such width.

    Example:
        >>> with figure_style("one-column", titles=False):
        ...     figure_width(4.6)
        3.25
    """
    check_width(width)
    outer = _CURRENT.get()
    token = _CURRENT.set(_Style(outer.width if width is None else WIDTHS[width], titles and outer.titles))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def check_width(width: str | None) -> None:
    """Raises UsageError for a width that is not one of :data:`WIDTHS`, nor None."""
    if width is not None and width not in WIDTHS:
        raise UsageError(f"width={width!r} is unknown; choose one of {list(WIDTHS)}, or None for a figure's own.")


def figure_width(own: float) -> float:
    """The width in inches that the caller has chosen, or the figure's own."""
    return _CURRENT.get().width or own


def narrow(width: float) -> bool:
    """Whether so many inches are one column of a page."""
    return width < _NARROW


def set_title(ax: Axes, text: str, **settings: Any) -> None:
    """The title of a figure of one axes, on as many lines as it takes; none where titles are not wanted."""
    if _CURRENT.get().titles:
        ax.set_title(fold(text, room(ax), 9, "bold"), **settings)


def set_heading(figure: Figure, text: str) -> None:
    """The title of a figure of several axes; none where titles are not wanted."""
    if _CURRENT.get().titles:
        folded = fold(text, 0.97 * figure.get_figwidth(), 9, "bold")
        figure.suptitle(folded, fontsize=9, fontweight="bold", x=0.01, ha="left")


def heading_height() -> float:
    """Inches that the title of a figure of several axes takes."""
    return 0.24 if _CURRENT.get().titles else 0.0


def share(ax: Axes) -> float:
    """Inches of the figure's width for axes with their labels, before a layout engine gives them their place."""
    width = _width_of(ax)
    spec = ax.get_subplotspec()
    if spec is None:
        return width * float(ax.get_position().width)
    return width / int(spec.get_topmost_subplotspec().get_geometry()[1])


def room(ax: Axes) -> float:
    """About how many inches of words have room above axes, which begin behind the numbers and the label of y."""
    return share(ax) - _BEFORE_AXES[narrow(_width_of(ax))]


def upright(ax: Axes, text: str) -> str:
    """A label along the y axis; on more lines in a figure of one column, whose panels are low."""
    if not narrow(_width_of(ax)):
        return text
    spec = ax.get_subplotspec()
    rows = 1 if spec is None else int(spec.get_topmost_subplotspec().get_geometry()[0])
    return fold(text, 0.55 * float(ax.figure.bbox.height) / ax.figure.dpi / rows, 8)


def _width_of(ax: Axes) -> float:
    """Inches of the figure that axes are on."""
    return float(ax.figure.bbox.width) / ax.figure.dpi


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Inches that a line of text takes at a font size in points."""
    font = FontProperties(size=size, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72


def fold(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """The text with line ends so that no line is wider than that at a font size in points; words stay whole."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split(" "):
            longer = f"{lines[-1]} {word}" if lines[-1] else word
            if lines[-1] and text_width(longer, size, weight) > _CAUTION * inches:
                lines.append(word)
            else:
                lines[-1] = longer
    return "\n".join(lines)


def small_print(lines: Iterable[str], width: float) -> list[str]:
    """Lines of small print, each on as many lines as a figure of that width (inches) needs."""
    return [part for line in lines for part in fold(line, width - 0.15, SMALL_PRINT).split("\n")]
