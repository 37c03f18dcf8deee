"""The committed results are those of the committed script, and what is written about them is what they say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import depth_study
import pandas as pd
import pytest
from study_runs import SIZES
from study_table import READINGS, agreement, as_markdown, final, of_runs, summary
from training import RECIPES

EXAMPLES = Path(depth_study.__file__).parent
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(EXAMPLES / "results" / "depth_study.csv")


def test_the_table_in_the_readme_is_the_summary_of_the_results(table):
    shown = README.split("<!-- table -->\n")[1].split("<!-- end of table -->")[0]
    assert shown == as_markdown(summary(table))


def test_results_were_made_with_the_recipe_that_is_there_now():
    about = json.loads((EXAMPLES / "results" / "depth_study.json").read_text())
    assert about["recipe"] == asdict(RECIPES["digits"])
    assert about["size"] == asdict(SIZES["digits"])
    assert about["training_images_at_most"] is None
    assert about["device"]


def test_every_run_is_there_and_learnt(table):
    runs = of_runs(table)
    assert len(runs) == 4 * 3 * 3  # depths, kinds of maps, seeds
    assert set(READINGS) < set(table.columns)
    assert runs.query("kind == 'vit' and depth == 12")["accuracy"].min() > 0.95
    assert runs["accuracy"].min() > 0.95


def test_what_the_readme_says_of_collapse_holds(table):
    runs = of_runs(table).set_index(["kind", "maps"])
    assert runs.loc[("vit", "applied"), "M"].min() > 0.6
    assert runs.loc[("deepvit", "applied"), "M"].abs().max() < 0.1
    assert runs.loc[("deepvit", "softmax"), "M"].min() > 0.95
    assert runs.loc[("deepvit", "softmax"), "entropy"].min() > 0.98
    vit = runs.loc[("vit", "applied")]
    assert (vit["M"] - vit["image-indep."]).abs().max() < 0.01
    assert (vit.query("depth >= 12")["late rise"] > 0).all()
    alike = final(table).assign(alike=lambda rows: rows["similarity_to_previous"] > 0.75)
    counts = alike.groupby(["kind", "maps", "depth", "seed"])["alike"].sum()
    assert counts["vit", "applied"].groupby("depth").agg(["min", "max"]).to_numpy().tolist() == [
        [0, 1], [1, 1], [3, 8], [6, 14],
    ]  # fmt: skip
    assert counts["deepvit", "applied"].max() == 0


def test_what_the_readme_says_of_training_holds(table):
    deepest = table.query("depth == 32 and kind == 'vit'").groupby(["epoch", "seed"])
    centred, entropy = (deepest[name].mean().unstack() for name in ("centred_to_previous", "normalized_entropy"))
    assert centred.loc[5].mean() == pytest.approx(0.22, abs=0.005)
    assert (centred.loc[5].min(), centred.loc[5].max()) == pytest.approx((0.16, 0.27), abs=0.005)
    assert centred.loc[80].mean() == pytest.approx(0.06, abs=0.005)
    assert entropy.mean(axis=1).loc[[0, 80]].tolist() == pytest.approx([1.0, 0.81], abs=0.005)


def test_the_results_agree_with_themselves(table):
    assert agreement(table, table)["within"].all()


def test_figures_in_the_readme_are_there():
    for part in README.split("](results/")[1:]:
        assert (EXAMPLES / "results" / part.split(")")[0]).is_file()
