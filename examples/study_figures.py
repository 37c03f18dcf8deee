"""Figures of a depth study, after DeepViT's figures 1, 3, 4 and 6, each with the spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from study_table import ACCURACY, final

from collapse_probe.files import write_atomically
from collapse_probe.plots import render

matplotlib.use("Agg")

VIT, DEEPVIT, UNDERNEATH = "ViT", "DeepViT", "DeepViT, softmax underneath"
_NAMES = {("vit", "applied"): VIT, ("deepvit", "applied"): DEEPVIT, ("deepvit", "softmax"): UNDERNEATH}
#: Okabe and Ito's colours, each with a marker and a line style of its own: legible without colour.
_COLOURS = {VIT: "#D55E00", DEEPVIT: "#0072B2", UNDERNEATH: "#56B4E9"}
_MARKERS = {VIT: "o", DEEPVIT: "s", UNDERNEATH: "^"}
_DASHES = {VIT: "", DEEPVIT: (4, 1.5), UNDERNEATH: (1, 1)}

#: Reading by block -> file name, label of its axis, and whether a model has one whatever maps are looked at.
_BY_BLOCK = {
    "similarity_to_previous": ("similarity_by_block", "M\nto the previous block", False),
    "similarity_ratio": ("similarity_ratio", "Columns with M > 0.9\nto a neighbour (share)", False),
    "centred_to_previous": ("centred_by_block", "Centred M\nto the previous block", False),
    "cross_head_similarity": ("cross_head_similarity", "Similarity of heads\n(cosine)", False),
    "normalized_entropy": ("entropy_by_block", "Entropy of the softmax\n/ log K", True),
    "feature_similarity_to_last": ("feature_similarity", "Cosine of token features\nto the last block", True),
}
Heatmaps = Mapping[tuple[str, str, int, int], pd.DataFrame]


def draw_all(table: pd.DataFrame, heatmaps: Heatmaps, folder: Path) -> list[Path]:
    """Draw every figure as a PNG file.

    Args:
        table: `depth_study.csv`.
        heatmaps: layer-by-layer M at the end, by kind, maps, depth and seed.
        folder: where the files go.
    """
    sns.set_theme("paper", "ticks", rc={"axes.grid": True, "grid.color": "0.92", "legend.frameon": False})
    table = table.assign(model=[_NAMES[pair] for pair in zip(table["kind"], table["maps"], strict=True)])
    figures = {"accuracy_by_depth": accuracy_by_depth(table), "similar_blocks": similar_blocks(table)}
    figures["similarity_heatmaps"] = similarity_heatmaps(heatmaps)
    for reading, (name, label, one_per_model) in _BY_BLOCK.items():
        figures[name] = by_block(table, reading, label, one_per_model)
    figures["over_training"] = over_training(table)
    return [write_atomically(folder / f"{name}.png", render(figure, dpi=160)) for name, figure in figures.items()]


def accuracy_by_depth(table: pd.DataFrame) -> Figure:
    """Test accuracy at the end; a dot per seed, lines through the means."""
    runs = _applied(final(table)).drop_duplicates(["model", "depth", "seed"])
    figure, (ax,) = _figure(3.6, 2.8)
    _lines(ax, runs, "depth", ACCURACY, err_style="bars")
    sns.stripplot(
        runs, x="depth", y=ACCURACY, hue="model", palette=_COLOURS, size=3, alpha=0.5, jitter=0.3, ax=ax,
        native_scale=True, legend=False,
    )  # fmt: skip
    ax.set(xlabel="Blocks", ylabel="Test accuracy", xticks=sorted(runs["depth"].unique()))
    return _finished(figure)


def similar_blocks(table: pd.DataFrame, thresholds: tuple[float, ...] = (0.9, 0.75)) -> Figure:
    """How many blocks are like the one before them, at the toolkit's threshold and at a lower one."""
    figure, axes = _figure(6.4, 2.8, len(thresholds))
    for ax, threshold in zip(axes, thresholds, strict=True):
        alike = final(table).assign(alike=lambda rows, cut=threshold: rows["similarity_to_previous"] > cut)
        counts = alike.groupby(["model", "depth", "seed"])["alike"].sum().reset_index()
        _lines(ax, counts, "depth", "alike", err_style="bars")
        ax.set(
            xlabel="Blocks", ylabel="Similar blocks", title=f"M above {threshold:g}",
            xticks=sorted(counts["depth"].unique()), ylim=(-0.5, max(counts["alike"].max() * 1.1, 5)),
        )  # fmt: skip
    return _finished(figure)


def similarity_heatmaps(heatmaps: Heatmaps) -> Figure:
    """M between all blocks, the mean over seeds: a row per kind of map, a column per depth.

    Below each: M of neighbouring blocks, mean ± standard deviation over seeds.
    """
    depths = sorted({depth for _, _, depth, _ in heatmaps})
    rows = [pair for pair in _NAMES if any((kind, maps) == pair for kind, maps, _, _ in heatmaps)]
    figure, axes = _figure(1.75 * len(depths) + 0.9, 1.75 * len(rows) + 0.3, len(depths), len(rows))
    grid = np.reshape(axes, (len(rows), len(depths)))
    for row, pair in enumerate(rows):
        for column, depth in enumerate(depths):
            ax: Axes = grid[row, column]
            seeds = [matrix.to_numpy() for key, matrix in heatmaps.items() if key[:3] == (*pair, depth)]
            if row == 0:
                ax.set_title(f"{depth} blocks", fontsize=9)
            if column == 0:
                ax.set_ylabel(_NAMES[pair].replace(", ", ",\n"))
            if not seeds:
                ax.set(xticks=[], yticks=[])
                sns.despine(ax=ax, left=True, bottom=True)
                continue
            # Signed, as maps mixed after the softmax may oppose each other.
            image = ax.imshow(np.mean(seeds, axis=0), cmap="PuOr_r", vmin=-1, vmax=1)
            ticks = [0, depth // 2, depth - 1]
            neighbours = [np.diagonal(matrix, 1).mean() for matrix in seeds]
            spread = f" ± {np.std(neighbours, ddof=1):.2f}" if len(seeds) > 1 else ""
            ax.set(xticks=ticks, yticks=ticks)
            ax.set_xlabel(f"neighbours {np.mean(neighbours):.2f}{spread}", fontsize=7)
            ax.grid(visible=False)
            ax.tick_params(length=2, labelsize=7)
    figure.colorbar(image, ax=axes, label="M", shrink=0.6)
    return figure


def by_block(table: pd.DataFrame, reading: str, label: str, one_per_model: bool) -> Figure:
    """A reading at the end by block, a panel per depth; bands span the seeds."""
    rows = _applied(final(table)) if one_per_model else final(table)
    depths = sorted(rows["depth"].unique())
    figure, axes = _figure(1.75 * len(depths) + 0.6, 2.5, len(depths), sharey=True)
    for ax, depth in zip(axes, depths, strict=True):
        _lines(ax, rows[rows["depth"] == depth], "block", reading)
        ax.set(xlabel="Block", ylabel=label, title=f"{depth} blocks")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return _finished(figure)


def over_training(table: pd.DataFrame) -> Figure:
    """M and its parts, entropy and accuracy of the deepest models, at epochs on a logarithmic axis."""
    deepest = table[table["depth"] == table["depth"].max()]
    means = deepest.groupby(["model", "seed", "epoch"]).mean(numeric_only=True).reset_index()
    panels = {
        "similarity_to_previous": "M", "image_independent_to_previous": "Image-independent part",
        "centred_to_previous": "Centred M", "normalized_entropy": "Entropy / log K", ACCURACY: "Test accuracy",
    }  # fmt: skip
    figure, axes = _figure(6.8, 4.4, 3, 2)
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax, (reading, label) in zip(axes, panels.items(), strict=False):
        rows = means if "previous" in reading else means[means["model"] != UNDERNEATH]
        _lines(ax, rows, "epoch", reading)
        ax.set_xscale("symlog", linthresh=1)
        epochs = sorted(means["epoch"].unique())
        ax.set_xticks(epochs, [str(epoch) if epoch in (0, 1, 5, 20, epochs[-1]) else "" for epoch in epochs])
        ax.set_xlim(-0.2, epochs[-1] * 1.2)
        ax.minorticks_off()
        ax.set(xlabel="Epoch", ylabel="", title=label)
    figure.suptitle(f"{table['depth'].max()} blocks, mean over blocks; epoch 0: before training", fontsize=9)
    return _finished(figure)


def _figure(width: float, height: float, columns: int = 1, rows: int = 1, **options: bool) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    return figure, axes


def _lines(ax: Axes, rows: pd.DataFrame, x: str, y: str, err_style: str = "band") -> None:
    """Means over seeds, with the range that the seeds span."""
    sns.lineplot(
        rows, x=x, y=y, hue="model", style="model", palette=_COLOURS, markers=_MARKERS, dashes=_DASHES,
        errorbar=("pi", 100), err_style=err_style, markersize=4, ax=ax,
        hue_order=[name for name in _COLOURS if name in set(rows["model"])],
    )  # fmt: skip


def _applied(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["maps"] == "applied"]


def _finished(figure: Figure) -> Figure:
    """One key below for all panels."""
    keys = {}
    for ax in figure.axes:
        keys.update(dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)))
        if ax.get_legend():
            ax.get_legend().remove()
        sns.despine(ax=ax)
    figure.legend(keys.values(), keys.keys(), loc="outside lower center", ncols=len(keys), frameon=False)
    return figure
