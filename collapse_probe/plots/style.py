"""What all figures share: the look, the empty figure, tick thinning, colour scales, and how to say "not defined".

Line colours are Okabe and Ito's (2008), safe for colour-blind readers and always doubled by a marker and a line style;
values in [0, 1] use viridis (perceptually uniform, monotone in grey); signed values use PuOr around 0.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from collapse_probe.errors import UsageError
from collapse_probe.plots.sizes import SMALL_PRINT, fold, room
from collapse_probe.words import neutral

_LOOK = "axes errorbar figure font grid hatch image legend lines mathtext patch path pdf savefig svg text xaxis xtick"
_LOOK += " yaxis ytick"

#: matplotlib's own defaults, so that a figure looks the same whatever the caller's style sheet, with the sizes of a
#: paper's figures and text that stays text in SVG and PDF.
PAPER: dict[str, Any] = {
    **{key: value for key, value in matplotlib.rcParamsDefault.items() if key.split(".")[0] in _LOOK.split()},
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "y",
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "hatch.color": "0.7",
    "hatch.linewidth": 0.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "savefig.dpi": 240,
    "svg.fonttype": "none",
    "svg.hashsalt": "collapse_probe",
    "pdf.fonttype": 42,
}

BLACK, BLUE, VERMILION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"

SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"

# Signed scales end at one of these, so that figures of several models can be compared by eye.
_SIGNED_LIMITS = (0.1, 0.25, 0.5, 1.0)
# Rounding of a cosine may leave a non-negative map a hair below 0.
_ROUNDING = 0.01


# Dates would make two renderings of one analysis differ.
_UNDATED: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


@contextmanager
def paper() -> Iterator[None]:
    """The settings of :data:`PAPER` inside a ``with`` block or a decorated function; the caller's afterwards."""
    with matplotlib.rc_context(cast(Any, PAPER)):
        yield


@paper()
def render(figure: Figure, suffix: str = "png", dpi: float = PAPER["savefig.dpi"]) -> bytes:
    """A figure as the bytes of a file of that ending; print resolution by default."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=dpi, metadata=_UNDATED.get(suffix))
    return buffer.getvalue()


@paper()
def settle(figure: Figure) -> None:
    """Keep the layout that the first rendering has found: looking for it again takes longer than drawing."""
    # Without an engine (not with "none", which leaves a placeholder) matplotlib also saves itself a rehearsal.
    figure.set_layout_engine(None)


class _PaperFigure(Figure):
    """A figure that pyplot does not know, and that a notebook can display all the same."""

    def _repr_png_(self) -> bytes:
        return render(self, "png", dpi=150)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure (sizes in inches) without pyplot, so that no global list keeps it alive."""
    return _PaperFigure(figsize=(width, height), layout="constrained")


def single_axes(ax: Axes | None, width: float = 4.6, height: float = 3.0) -> tuple[Figure, Axes]:
    """The caller's axes and their figure, or new ones."""
    if ax is None:
        figure = new_figure(width, height)
        return figure, figure.add_subplot()
    return cast(Figure, ax.figure), ax


def several_axes(ax: Axes | Sequence[Axes] | NDArray[Any], count: int | None = None) -> tuple[Figure, NDArray[Any]]:
    """The caller's axes as a flat array. Raises UsageError unless there are ``count`` of them (any number if None)."""
    axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
    if axes.size == 0 or (count is not None and axes.size != count):
        needed = count or "at least one"
        raise UsageError(f"ax has {axes.size} axes; this figure needs {needed}. Pass ax=None for a new figure.")
    return cast(Figure, axes[0].figure), axes


def thinned_ticks(count: int, most: int = 16) -> list[int]:
    """Positions 0, s, 2s … below ``count`` with the smallest round step s that leaves at most ``most`` of them."""
    step = next((s for s in (1, 2, 4, 5, 10, 20, 50) if count <= most * s), 100)
    return list(range(0, count, step))


def bracket(
    ax: Axes, spans: Sequence[tuple[float, float]], names: Sequence[str], axis: str = "x", gap: float = 3
) -> None:
    """Brackets with letters outside the axes, above (``axis="x"``) or on the left (``"y"``), one for each range.

    Args:
        ax: where.
        spans: ranges in data coordinates.
        names: what stands at each bracket.
        axis: whether the ranges lie on x or y.
        gap: distance from the axes in points.
    """
    figure = cast(Figure, ax.figure)
    across = axis == "x"
    shift = ScaledTranslation(0 if across else -gap / 72, gap / 72 if across else 0, figure.dpi_scale_trans)
    transform = (ax.get_xaxis_transform() if across else ax.get_yaxis_transform()) + shift
    edge = 1 if across else 0
    margin = 0.12  # of a layer: brackets of neighbours do not touch
    for (start, stop), name in zip(spans, names, strict=True):
        along, level = [start + margin, stop - margin], [edge, edge]
        ax.add_artist(
            Line2D(
                *((along, level) if across else (level, along)),
                label="_bracket", transform=transform, clip_on=False,
                color="0.25", linewidth=1.2, solid_capstyle="butt",
            )
        )  # fmt: skip
        middle = (start + stop) / 2
        ax.annotate(
            name, (middle, edge) if across else (edge, middle),
            xycoords=transform, xytext=(0, 2) if across else (-2, 0), textcoords="offset points",
            ha="center" if across else "right", va="bottom" if across else "center",
            fontsize=7, fontweight="bold", color="0.25", annotation_clip=False,
        )  # fmt: skip


def title_pad(brackets: bool) -> float:
    """Room between title and axes, in points: brackets stand there."""
    return 17 if brackets else 6


def key_below(figure: Figure, lines: Sequence[str]) -> None:
    """Lines of small print under everything else in a figure of our own."""
    handles = [Line2D([], [], linestyle="none") for _ in lines]
    figure.legend(
        handles, list(lines), loc="outside lower left", handlelength=0, handletextpad=0, borderaxespad=0.4,
        fontsize=SMALL_PRINT, labelspacing=0.25, labelcolor="0.25",
    )  # fmt: skip


def say_undefined(ax: Axes, why: str = "") -> None:
    """Write "not defined" where a picture would stand empty."""
    ax.set(facecolor="0.96", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    text = fold("not defined" + (f"\n{why}" if why else ""), room(ax), 8)
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.25")


def colour_scale(values: NDArray[Any], signed: bool) -> dict[str, Any]:
    """``cmap``, ``vmin`` and ``vmax``: [0, 1] in viridis, or symmetric about 0 where values are signed.

    Maps after re-attention are not probabilities; their similarity may be negative and gets the signed scale too.
    """
    finite = values[np.isfinite(values)]
    if signed or (finite.size and finite.min() < -_ROUNDING):
        largest = np.abs(finite).max() if finite.size else 1.0
        limit = next((limit for limit in _SIGNED_LIMITS if largest <= limit), 1.0)
        return {"cmap": DIVERGING, "vmin": -limit, "vmax": limit}
    return {"cmap": SEQUENTIAL, "vmin": 0.0, "vmax": 1.0}


def legible_on(cmap_rgba: Any) -> str:
    """Black or white, whichever contrasts with a colour (relative luminance, WCAG 2)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in cmap_rgba[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"


def narrow_scale(values: NDArray[Any], least_span: float = 0.1) -> Normalize:
    """Limits around the finite values, in steps of 0.05 and never narrower than ``least_span``: no zoom into noise."""
    finite = values[np.isfinite(values)]
    low, high = np.floor(finite.min() * 20) / 20, np.ceil(finite.max() * 20) / 20
    if high - low < least_span:
        low = high - least_span
    return Normalize(low, high)


def as_written(name: str) -> str:
    """A name from outside as a label that is no formula to matplotlib, without control characters."""
    return neutral(name).replace("$", r"\$")
