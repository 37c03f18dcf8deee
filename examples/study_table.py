"""The table of a depth study: which readings it holds, what they come to, and whether two studies agree."""

from __future__ import annotations

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from scipy.stats import t

#: Readings of each block, by the names that `Analysis.layers` has for them (docs/readings.md says what they mean).
READINGS = (
    "similarity_to_previous", "similarity_to_previous_se", "centred_to_previous", "image_independent_to_previous",
    "excess_to_previous", "similarity_ratio", "similar_to_previous", "cross_head_similarity",
    "centred_cross_head_similarity", "normalized_entropy", "relative_variation", "feature_similarity_to_last",
    "token_similarity", "rank_residual_frobenius", "attention_branch_share", "mlp_branch_share",
)  # fmt: skip
ACCURACY = "test_accuracy"

#: Numbers of a run that a study is summed up by -> the reading whose mean over the blocks they are.
OF_A_RUN = {
    "M": "similarity_to_previous",
    "image-indep.": "image_independent_to_previous",
    "centred M": "centred_to_previous",
    "heads": "cross_head_similarity",
    "entropy": "normalized_entropy",
    "tokens": "token_similarity",
}
_MODEL, _SAMPLE = ["kind", "maps", "depth"], ["kind", "maps", "depth", "seed"]


def final(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last epoch of each run."""
    return table[table["epoch"] == table.groupby(_SAMPLE)["epoch"].transform("max")]


def of_runs(table: pd.DataFrame) -> pd.DataFrame:
    """A row per run and kind of map at its end.

    Columns: ``accuracy``; readings averaged over blocks, as :data:`OF_A_RUN` names them; ``late rise``, how far M in
    the last quarter of the blocks lies above M in the two quarters before it (absent below 4 blocks); ``similar``, the
    number of similar blocks.
    """
    runs = final(table).groupby(_SAMPLE)
    columns = {name: runs[reading].mean() for name, reading in OF_A_RUN.items()}
    columns["late rise"] = runs[["depth", "block", "similarity_to_previous"]].apply(_late_rise)
    columns["similar"] = runs["similar_to_previous"].agg(lambda flags: flags.fillna(0).astype(bool).sum())
    return pd.DataFrame({"accuracy": runs[ACCURACY].first(), **columns}).reset_index()


def _late_rise(run: pd.DataFrame) -> float:
    place = run["block"] / run["depth"]
    values = run["similarity_to_previous"]
    return float(values[place >= 0.75].mean() - values[(place >= 0.25) & (place < 0.75)].mean())


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds of what :func:`of_runs` holds; columns are (number, "mean" or "std")."""
    return (
        of_runs(table).drop(columns="seed").groupby(_MODEL, sort=False).agg(["mean", "std"]).sort_index(level="depth")
    )


def summary_table(numbers: pd.DataFrame) -> Table:
    """A summary for the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, caption="mean ± standard deviation over seeds; readings are means over blocks")
    headings, rows = _cells(numbers)
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in ("kind", "maps") else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown


def as_markdown(numbers: pd.DataFrame) -> str:
    """The same as a table in Markdown."""
    headings, rows = _cells(numbers)
    ruler = ["---" if heading in ("kind", "maps") else "---:" for heading in headings]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ruler, *rows)) + "\n"


def _cells(numbers: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    names = [str(name) for name in numbers.columns.get_level_values(0).unique()]
    rows = []
    for (kind, maps, depth), row in numbers.iterrows():
        cells = [_with_spread(name, row[name, "mean"], row[name, "std"]) for name in names]
        rows.append([str(depth), kind, maps, *cells])
    return ["depth", "kind", "maps", *names], rows


def _with_spread(name: str, mean: float, deviation: float) -> str:
    """``"0.71±0.02"``; without the deviation where there is a single seed."""
    places = {"accuracy": 3, "similar": 1}.get(name, 2)
    if np.isnan(mean):
        return "–"
    words = f"{round(mean, places) + 0.0:.{places}f}"  # + 0.0: no "-0.00"
    return words + (f"±{deviation:.{places}f}" if np.isfinite(deviation) else "")


def agreement(table: pd.DataFrame, earlier: pd.DataFrame, confidence: float = 0.99) -> pd.DataFrame:
    """Does each number of a study lie where another seed of the earlier study would?

    The intervals are prediction intervals for one more seed, mean ± t s sqrt(1 + 1/n), with the variance s² pooled over
    the depths of a kind (three seeds alone tell little about their spread), and they hold together: each one's
    confidence is that of Bonferroni, 1 - (1 - confidence) / (how many numbers are compared). A block more or less
    counts as similar within the spread. Depths and kinds that only one of the studies holds are left out.

    Returns:
        A row per model, seed and number: ``value``, the ends ``low`` and ``high``, and whether it is ``within``.
    """
    old = of_runs(earlier).melt(_SAMPLE, var_name="number").dropna()
    known = old.groupby([*_MODEL, "number"])["value"].agg(["mean", "var", "count"]).reset_index()
    pooled = known.groupby(["kind", "maps", "number"]).agg(
        variance=("var", "mean"), freedom=("count", lambda n: (n - 1).sum())
    )
    known = known.merge(pooled.reset_index())
    compared = of_runs(table).melt(_SAMPLE, var_name="number").dropna().merge(known, on=[*_MODEL, "number"])
    each = 1 - (1 - confidence) / max(len(compared), 1)
    spread = np.sqrt(compared["variance"] * (1 + 1 / compared["count"]))
    reach = t.ppf((1 + each) / 2, compared["freedom"]) * spread
    reach = reach.where(compared["number"] != "similar", reach.clip(lower=1))
    compared["low"], compared["high"] = compared["mean"] - reach, compared["mean"] + reach
    compared["within"] = compared["value"].between(compared["low"], compared["high"])
    return compared[[*_SAMPLE, "number", "value", "low", "high", "within"]]
