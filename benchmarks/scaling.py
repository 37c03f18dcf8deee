"""How the cost of an analysis over a plain forward pass grows with images, tokens, layers, heads and batch size."""

from __future__ import annotations

import itertools
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import timm
import torch
from contenders import plain, suite, whole_suite

#: The model in the middle of all curves, and what is varied around it.
CENTRE = {"images": 32, "pixels": 224, "layers": 12, "heads": 6, "batch": 16}
CURVES = {
    "images": (16, 32, 64, 128, 256),
    "pixels": (112, 160, 224, 320, 448),
    "layers": (4, 8, 12, 24, 48),
    "heads": (3, 6, 12, 24),
    "batch": (4, 8, 16, 32),
}
CONTENDERS = {
    "plain": plain,
    "M and its parts": partial(suite, "cross_layer_similarity"),
    "suite fast": partial(suite, "fast"),
}
#: Over the number of images, what happens once counts, too.
WHOLE = {
    "plain": plain,
    "M and its parts": partial(whole_suite, "cross_layer_similarity"),
    "suite fast": partial(whole_suite, "fast"),
}
WIDTH, PATCH = 384, 16


def measure(device: str, dtype: str, threads: int, repeats: int) -> pd.DataFrame:
    """A row for each point of each curve: seconds per image of the plain pass, and ratios to it."""
    torch.set_num_threads(threads)
    rows = []
    for axis, values in CURVES.items():
        for value in values:
            rows.append(
                {
                    "axis": axis,
                    "value": value,
                    **_point({**CENTRE, axis: value}, device, dtype, repeats, axis == "images"),
                }
            )
    return pd.DataFrame(rows)


def _point(sizes: dict[str, int], device: str, dtype: str, repeats: int, whole: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_224", img_size=sizes["pixels"], embed_dim=WIDTH, depth=sizes["layers"],
        num_heads=sizes["heads"],
    ).eval().to(device, getattr(torch, dtype))  # fmt: skip
    images = torch.randn(sizes["images"], 3, sizes["pixels"], sizes["pixels"]).to(device, getattr(torch, dtype))
    batches = list(images.split(sizes["batch"]))
    times: dict[str, list[float]] = {label: [] for label in CONTENDERS}
    contenders = WHOLE if whole else CONTENDERS
    for repeat, (label, run) in itertools.product(range(repeats + 1), contenders.items()):
        start = time.perf_counter()
        counted = run(model, batches)
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat:
            times[label].append(counted or time.perf_counter() - start)
    medians = {label: statistics.median(values) for label, values in times.items()}
    ratios = {label: value / medians["plain"] for label, value in medians.items() if label != "plain"}
    return {"tokens": (sizes["pixels"] // PATCH) ** 2 + 1, "ms/image": 1000 * medians["plain"] / len(images), **ratios}


def draw(curves: pd.DataFrame, path: Path, machine: str) -> None:
    """One panel for each curve."""
    with mpl.rc_context({"font.size": 8, "svg.fonttype": "none"}), sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, len(CURVES), figsize=(11, 2.6), sharey=True, layout="constrained")
        for ax, (axis, part) in zip(axes, curves.groupby("axis", sort=False), strict=True):
            across = "tokens" if axis == "pixels" else "value"
            for label, marker in (("M and its parts", "o"), ("suite fast", "s")):
                ax.plot(part[across], part[label], marker=marker, label=label)
            ax.set_xlabel("tokens" if axis == "pixels" else {"batch": "batch size"}.get(axis, axis))
            ax.set_xscale("log", base=2)
            ticks = part[across].tolist()
            ax.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
            ax.axhline(1, color="0.4", linewidth=0.8)
        axes[0].set_ylabel("time over a plain forward pass")
        axes[0].legend(loc="upper left", fontsize=7)
        figure.suptitle(f"ViT of width {WIDTH}, otherwise 12 layers, 6 heads, 197 tokens; {machine}", fontsize=8)
        figure.savefig(path, dpi=150)
        plt.close(figure)
