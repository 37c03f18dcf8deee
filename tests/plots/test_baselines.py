"""Figures look as they did: small pictures of fixed numbers are compared with committed ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.testing.compare import compare_images
from PIL import Image

from collapse_probe import plots
from tests.analysis_factory import make_analysis
from tests.plots.baselines import DPI, DRAWN, FOLDER, MADE_BY, rendered, versions

#: Root mean square of the difference between pixels, of 255. One version draws alike on all machines; two curves out of
#: place by a few pixels give 10.
TOLERANCE = 2

AGAIN = "If the change is meant, run `python tools/draw_baselines.py`, look at the pictures, and commit them."


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_looks_as_it_did(name: str, tmp_path: Path) -> None:
    expected = FOLDER / f"{name}.png"
    assert expected.exists(), f"There is no {expected.name} to compare with. {AGAIN}"
    made_by = json.loads(MADE_BY.read_text())
    if made_by != versions():
        pytest.skip(f"the pictures were drawn by {made_by}; here are {versions()}")
    actual = tmp_path / expected.name
    actual.write_bytes(rendered(name))
    assert Image.open(actual).size == Image.open(expected).size, f"{name} has another size. {AGAIN}"
    difference = compare_images(str(expected), str(actual), tol=TOLERANCE)
    assert difference is None, f"{difference}\n{AGAIN}"


def test_a_figure_of_other_numbers_does_not(tmp_path: Path) -> None:
    analysis = make_analysis()
    values = analysis.groups[0].matrices["all"]["similarity"]
    values[[2, 7]] = values[[7, 2]]
    changed = tmp_path / "changed.png"
    changed.write_bytes(plots.render(plots.layer_similarity(analysis)[0], dpi=DPI))
    assert compare_images(str(FOLDER / "layer_similarity.png"), str(changed), tol=TOLERANCE) is not None


def test_the_pictures_are_those_of_the_figures_and_small() -> None:
    files = sorted(FOLDER.glob("*.png"))
    assert [path.stem for path in files] == sorted(DRAWN)
    assert sum(path.stat().st_size for path in files) < 300_000
