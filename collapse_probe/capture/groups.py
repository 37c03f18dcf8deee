"""Layers whose maps may be compared with each other: same kind, heads, queries, keys and token layout."""

from __future__ import annotations

from collections.abc import Mapping

from collapse_probe.capture.attention_map import AttentionMap


def layer_groups(maps: Mapping[str, AttentionMap]) -> list[list[str]]:
    """Names of comparable layers, group by group, each in execution order, groups in order of their first layer.

    Windowed maps are in no group: several maps of one image lie in their batch axis.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, attention in maps.items():
        if attention.kind == "window":
            continue
        _, heads, queries, keys = attention.shape
        groups.setdefault((attention.kind, heads, queries, keys, attention.layout), []).append(name)
    return list(groups.values())
