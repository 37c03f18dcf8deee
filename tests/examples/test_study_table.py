"""The table of a depth study: means over blocks and seeds, and whether another study lands within its spread."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t
from study_table import OF_A_RUN, READINGS, agreement, as_markdown, final, of_runs, summary


def make_table(seeds=3, depths=(2, 4), shift=0.0):
    rng = np.random.default_rng(0)
    rows = []
    for kind, maps in (("vit", "applied"), ("deepvit", "applied"), ("deepvit", "softmax")):
        for depth in depths:
            for seed in range(seeds):
                for epoch in (0, 7):
                    readings = rng.normal(0.5, 0.1, (depth, len(READINGS))) + shift
                    for block in range(depth):
                        row = dict(zip(READINGS, readings[block], strict=True))
                        row |= {"kind": kind, "maps": maps, "depth": depth, "seed": seed, "epoch": epoch}
                        row |= {
                            "block": block,
                            "test_accuracy": 0.9 + 0.01 * seed,
                            "similar_to_previous": block % 2 == 1,
                        }
                        if block == 0:
                            row |= {"similarity_to_previous": np.nan, "similar_to_previous": np.nan}
                        rows.append(row)
    return pd.DataFrame(rows)


def test_only_the_last_epoch_of_each_run_counts():
    table = make_table()
    assert set(final(table)["epoch"]) == {7}
    longer = table[(table["seed"] == 0) & (table["epoch"] == 7)].assign(epoch=9)
    mixed = final(pd.concat([table, longer]))
    assert set(mixed["epoch"]) == {7, 9}
    assert len(mixed) == len(table) / 2


def test_numbers_of_a_run_are_means_over_its_blocks():
    table = make_table()
    runs = of_runs(table)
    assert len(runs) == 3 * 2 * 3
    one = runs[(runs["kind"] == "deepvit") & (runs["maps"] == "softmax") & (runs["depth"] == 4) & (runs["seed"] == 1)]
    rows = [
        row
        for row in table.to_dict("records")
        if (row["kind"], row["maps"], row["depth"], row["seed"], row["epoch"]) == ("deepvit", "softmax", 4, 1, 7)
    ]
    for name, reading in OF_A_RUN.items():
        values = [row[reading] for row in rows if row[reading] == row[reading]]
        assert one[name].item() == pytest.approx(sum(values) / len(values))
    assert one["similar"].item() == 2
    assert one["accuracy"].item() == pytest.approx(0.91)


def test_summary_has_mean_and_deviation_over_seeds():
    table = make_table()
    values = of_runs(table).query("kind == 'vit' and depth == 2")["M"].to_numpy()
    row = summary(table).loc[("vit", "applied", 2)]
    assert row["M", "mean"] == pytest.approx(values.mean())
    assert row["M", "std"] == pytest.approx(values.std(ddof=1))
    mean, deviation = row["M", "mean"], row["M", "std"]
    assert f"| 2 | vit | applied | 0.910±0.010 | {mean:.2f}±{deviation:.2f} |" in as_markdown(summary(table))
    alone = as_markdown(summary(table[table["seed"] == 0]))
    assert "| 4 | vit | applied | 0.900 |" in alone
    assert "±" not in alone


def test_the_late_rise_is_the_last_quarter_above_the_middle():
    table = make_table(depths=(10,))
    table.loc[table["block"] >= 1, "similarity_to_previous"] = table["block"] ** 2
    # last quarter: blocks 8 and 9; middle: blocks 3 to 7
    assert (of_runs(table)["late rise"] == (64 + 81) / 2 - (9 + 16 + 25 + 36 + 49) / 5).all()


def test_a_study_agrees_with_itself_and_not_with_a_shifted_one():
    table = make_table()
    same = agreement(table[table["seed"] == 1], table)
    assert same["within"].all()
    assert len(same) == 6 * (2 + len(OF_A_RUN)) + 3  # the late rise at depth 4 only
    other = agreement(make_table(shift=4.0), table)
    assert not other.query("number == 'M'")["within"].any()
    assert other.query("number == 'accuracy'")["within"].all()


def test_the_intervals_are_those_of_one_more_seed_with_pooled_variance_and_hold_together():
    table = make_table()
    row = agreement(table, table).query("kind == 'vit' and depth == 4 and seed == 0 and number == 'M'").iloc[0]
    runs = of_runs(table).query("kind == 'vit'")
    variance = np.mean([runs[runs["depth"] == depth]["M"].var(ddof=1) for depth in (2, 4)])
    together = len(agreement(table, table))
    reach = t.ppf(1 - 0.005 / together, 4) * np.sqrt(variance * (1 + 1 / 3))
    mean = runs[runs["depth"] == 4]["M"].mean()
    assert (row["low"], row["high"]) == pytest.approx((mean - reach, mean + reach))


def test_a_single_seed_has_no_spread_to_land_in():
    table = make_table(seeds=1)
    assert not agreement(table, table)["within"].any()


def test_what_only_one_study_holds_is_left_out():
    table = make_table()
    assert set(agreement(table, table[table["depth"] == 2])["depth"]) == {2}
