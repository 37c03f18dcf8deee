"""Synthetic analyses with plausible numbers, for everything that renders one."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd

from collapse_probe.readings import READINGS
from collapse_probe.result import Analysis, Finding, Group, Stream

PROVENANCE = {
    "model": {
        "architecture": "deit_tiny_patch16_224",
        "source": "weights/deit_tiny_patch16_224.safetensors",
        "parameters": 5_717_416,
        "weights": {"format": "safetensors", "sha256": "0f2c6b1e" * 8, "dtype": "float32", "tensors": 152},
    },
    "images": {"count": 50, "kind": "folder", "skipped": [{"path": "broken.jpg", "reason": "truncated file"}]},
    "options": {"batch_size": 8, "seed": 0},
    "versions": {"collapse-probe": "0.1.0", "torch": "2.6.0", "timm": "1.0.15"},
    "command": "collapse-probe analyze deit_tiny_patch16_224.safetensors --images val/",
    "seconds": 12.3,
    "device": "cpu",
}

FINDINGS = [
    Finding(
        "attention-collapse",
        "warning",
        "Attention of 2 of 11 blocks repeats the block before, from block 10 on.",
        "M 0.80 ± 0.01 and 0.89 ± 0.01 at blocks 10 and 11; excess 0.03 ± 0.01 and 0.08 ± 0.01",
        "M above 0.75",
        "ours, calibrated on 12 trained models",
        "Try re-attention, or share attention between blocks 9 to 11 to save compute.",
        ("blocks.10.attn", "blocks.11.attn"),
    ),
    Finding(
        "heads-diverse",
        "ok",
        "Heads look at different tokens.",
        "head diversity 0.42 to 0.71",
        "mean above 0.3",
        "ours",
        "",
    ),
]


def make_analysis(
    layers: int = 12, heads: int = 3, grid: tuple[int, int] | None = (14, 14), prefix: int = 1
) -> Analysis:
    """One group of token attention in a ViT whose later blocks grow alike."""
    group = make_group("A", [f"blocks.{i}.attn" for i in range(layers)], heads, grid, prefix)
    return Analysis(make_table(group), [group], list(FINDINGS), copy.deepcopy(PROVENANCE))


def two_groups() -> Analysis:
    """Ten layers of token attention, then two of class attention that must not be compared with them."""
    first = make_group("A", [f"blocks.{i}.attn" for i in range(10)], 3, (14, 14), 0)
    second = make_group("B", [f"blocks_token_only.{i}.attn" for i in range(2)], 3, (14, 14), 1, kind="class", queries=1)
    table = pd.concat([make_table(first), make_table(second)])
    return Analysis(table, [first, second], list(FINDINGS), copy.deepcopy(PROVENANCE))


def hierarchy() -> Analysis:
    """Windowed attention in stages: two layers that stand alone, three regular and three shifted ones that alternate,
    and two without windows."""
    names = [[f"layers.{stage}.blocks.{block}.attn" for block in range(depth)] for stage, depth in enumerate((2, 6, 2))]
    settings = {"heads": 3, "grid": None, "prefix": 0, "kind": "window"}
    groups = [
        make_group("A", names[0][:1], windows=16, **settings),
        make_group("B", names[0][1:], windows=16, partition="shifted", **settings),
        make_group("C", names[1][::2], windows=4, **settings),
        make_group("D", names[1][1::2], windows=4, partition="shifted", **settings),
        make_group("E", names[2], **(settings | {"kind": "token", "grid": (10, 10), "heads": 6})),
    ]
    table = pd.concat([make_table(group) for group in groups]).loc[[name for stage in names for name in stage]]
    return Analysis(table, groups, list(FINDINGS), copy.deepcopy(PROVENANCE))


def make_full(analysis: Analysis, seed: int = 0) -> Analysis:
    """The same analysis with every reading of the registry, 95 % intervals, derived readings, and a residual stream for
    every module that holds blocks."""
    draw = np.random.default_rng(seed)
    table = analysis.layers
    for name, reading in READINGS.items():
        if name not in table:
            low = reading.low or 0.0
            table[name] = draw.uniform(low, low + 1 if reading.high is None else reading.high, len(table))
            if name.endswith("_to_previous"):
                firsts = [group.layers[0] for group in analysis.groups]
                table.loc[firsts, name] = np.nan
        if name != "similarity_ratio" and f"{name}_se" not in table:
            table[f"{name}_se"] = 0.02 * np.abs(table[name])
        if reading.interval:
            table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.03, table[name] + 0.05
    for name in ("sink_share_prefix", "sink_share_patch"):
        table[name], table[f"{name}_se"] = table["sink_share"] / 2, 0.01
    for group in analysis.groups:
        if len(group.layers) > 1:
            last = len(group.layers) - 1
            group.derived = {
                "similar_blocks": {"value": 2, "low": 1.0, "high": 3.0},
                "onset": {"value": last - 1, "low": float(max(last - 2, 0)), "high": float(last), "share": 0.9},
            }
        group.matrices["all"]["tv_similarity"] = 0.9 * group.matrices["all"]["similarity"]
    modules = dict.fromkeys(layer.rsplit(".", 2)[0] for layer in table.index)
    analysis.streams = [
        _stream(f"S{number}", [layer for layer in table.index if layer.rsplit(".", 2)[0] == module])
        for number, module in enumerate(modules, start=1)
    ]
    for stream in analysis.streams:
        table.loc[stream.layers, "stream"] = stream.name
    analysis.provenance = {**analysis.provenance, "options": {"metrics": "all", "threshold": 0.75}, "shards": 4}
    return analysis


def _stream(name: str, layers: list[str]) -> Stream:
    matrices = {"all": {"cka": _readings(len(layers))["similarity"], "feature_similarity": np.eye(len(layers))}}
    spectrum = -np.outer(np.linspace(1, 2, len(layers)), np.arange(7))
    arrays = {"relative_log_amplitude_by_frequency": spectrum}
    return Stream(name, layers, [layer[:-5] for layer in layers], 196, 192, 0, (14, 14), matrices, arrays)


def all_nan(analysis: Analysis, *readings: str) -> Analysis:
    """The same analysis with these readings undefined everywhere."""
    for group in analysis.groups:
        for matrices in group.matrices.values():
            for reading in readings:
                matrices[reading] = np.full_like(matrices[reading], np.nan)
    for reading in readings:
        name = "similarity_to_previous" if reading == "similarity" else f"{reading}_to_previous"
        analysis.layers[[name, f"{name}_se"]] = np.nan
    return analysis


def make_group(
    name: str,
    layers: list[str],
    heads: int,
    grid: tuple[int, int] | None,
    prefix: int,
    kind: str = "token",
    queries: int | None = None,
    windows: int = 1,
    partition: str = "",
) -> Group:
    count = len(layers)
    patches = grid[0] * grid[1] if grid else 100
    keys = prefix + patches
    matrices = {"all": _readings(count)}
    if prefix and grid:
        matrices.update(prefix=_readings(count, 0.1), patch=_readings(count, -0.02))
    mean = matrices["all"]["similarity"]
    by_head = mean[..., None] + np.linspace(-0.1, 0.1, heads) * (1 - mean[..., None])
    height, width = grid or (10, 10)
    bump = np.exp(-((np.arange(height)[:, None] - height / 4) ** 2 + (np.arange(width) - width / 2) ** 2) / 30).ravel()
    token = np.concatenate([np.full(prefix, 0.6), bump - bump.mean()])
    token = (token + np.linspace(0, 0.2, windows)[:, None]).ravel()  # window by window
    by_token = mean[..., None] + 0.3 * token * (1 - mean[..., None])
    arrays = {"similarity_by_head": by_head, "similarity_by_token": by_token}
    return Group(
        name, layers, kind, heads, queries or keys, keys, prefix, grid, windows, partition, matrices, arrays
    )  # fmt: skip


def make_table(group: Group) -> pd.DataFrame:
    """The rows of one group, consistent with its matrices."""
    count = len(group.layers)
    at = np.arange(count)
    table = pd.DataFrame(
        {
            "kind": group.kind,
            "group": group.name,
            "block": at,
            "heads": group.heads,
            "queries": group.queries,
            "keys": group.keys,
            "windows": group.windows,
            "partition": group.partition,
            "is_probability": True,
        },
        index=group.layers,
    )
    table["entropy"] = np.log(group.keys) * (0.85 - 0.02 * at)
    table["normalized_entropy"] = 0.85 - 0.35 * np.sin(at / max(count, 2) * 2.5)
    table["relative_variation"] = 0.45 + 0.4 * at / count
    table["head_diversity"] = 0.45 + 0.25 * np.sin(at / max(count, 2) * 3) if group.heads > 1 else np.nan
    table["cross_head_similarity"] = 1 - table["head_diversity"]
    table["token_similarity"] = 0.2 + 0.5 * at / count
    for column in (
        "entropy", "normalized_entropy", "relative_variation", "head_diversity", "cross_head_similarity",
        "token_similarity",
    ):  # fmt: skip
        table[f"{column}_se"] = 0.012
    for reading, column in _PREVIOUS.items():
        for suffix in ("", "_se"):
            values = group.matrices["all"][reading + suffix]
            table[column + suffix] = [np.nan, *np.diagonal(values, 1)]
    similar = table["similarity_to_previous"].to_numpy()[1:] > 0.75
    table["similar_to_previous"] = pd.array([pd.NA, *similar], dtype="boolean")
    table["zero_columns"] = 0
    table["nonfinite_columns"] = 0
    return table


_PREVIOUS = {
    "similarity": "similarity_to_previous",
    "centred": "centred_to_previous",
    "image_independent": "image_independent_to_previous",
    "excess": "excess_to_previous",
}


def _readings(count: int, shift: float = 0.0) -> dict[str, np.ndarray]:
    """The four readings with M = image-independent + excess; M rises with depth as in a trained DeiT."""
    at = np.arange(count)
    distance, depth = np.abs(at[:, None] - at), (at[:, None] + at) / (2 * max(count - 1, 1))
    similarity = (0.45 + 0.45 * depth**2 + shift) ** (distance**0.7)
    excess = similarity * (0.3 * (1 - depth) / (1 + distance) + 0.01)
    centred = (0.5 - 0.9 * depth * (1 - depth)) ** (distance**0.8) - 0.05 * (distance > 4)
    matrices = {
        "similarity": similarity,
        "centred": centred,
        "image_independent": similarity - excess,
        "excess": excess,
        "centred_absent": np.zeros((count, count)),
    }
    matrices |= {f"{name}_se": np.full((count, count), 0.008) for name in ("similarity", "centred")}
    return matrices | {f"{name}_se": np.full((count, count), 0.011) for name in ("image_independent", "excess")}
