"""The figures that are compared with committed pictures, small and of fixed numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.ft2font
from matplotlib.figure import Figure

from collapse_probe import plots
from tests.analysis_factory import hierarchy, make_analysis, make_full
from tests.look_factory import make_look

FOLDER = Path(__file__).with_name("baseline_images")

#: Says which versions drew them.
MADE_BY = FOLDER / "made_by.json"

#: Pixels per inch: enough to see what is where.
DPI = 45

#: Name of a picture -> what draws it.
DRAWN: dict[str, Callable[[], Figure]] = {
    "layer_similarity": lambda: plots.layer_similarity(make_analysis())[0],
    "layer_similarity_groups": lambda: plots.layer_similarity(hierarchy())[0],
    "similarity_parts_one_column": lambda: _narrow(lambda: plots.similarity_parts(make_analysis())[0]),
    "adjacent_similarity": lambda: plots.adjacent_similarity(make_analysis())[0],
    "adjacent_similarity_one_column": lambda: _narrow(lambda: plots.adjacent_similarity(make_analysis())[0]),
    "entropy": lambda: plots.entropy(make_analysis())[0],
    "similarity_by_head": lambda: plots.similarity_by_head(make_analysis())[0],
    "similarity_by_token": lambda: plots.similarity_by_token(make_analysis())[0],
    "tokens": lambda: plots.tokens(make_full(make_analysis()))[0],
    "overview_one_column": lambda: _narrow(lambda: plots.overview(make_full(make_analysis()))[0]),
    "curves_compared": lambda: plots.curves_compared({"first": make_analysis(6), "second": make_analysis(9)})[0],
    "attention_over_image_one_column": lambda: _narrow(
        lambda: plots.attention_over_image(make_look(4), layers=[0, 3], query=(2, 4))[0]
    ),
    "column_by_depth": lambda: plots.column_by_depth(make_look(6))[0],
}


def rendered(name: str) -> bytes:
    """The picture as it is drawn now."""
    return plots.render(DRAWN[name](), "png", dpi=DPI)


def versions() -> dict[str, str]:
    """What a picture hangs on to the last pixel: words of another width push panels elsewhere."""
    return {"matplotlib": matplotlib.__version__, "FreeType": matplotlib.ft2font.__freetype_version__}


def _narrow(draw: Callable[[], Figure]) -> Figure:
    with plots.figure_style("one-column", titles=False):
        return draw()
