"""Layers whose maps may be compared with each other: same kind, heads, queries, keys, tokens and partition."""

from __future__ import annotations

from collections.abc import Mapping

from collapse_probe.capture.attention_map import AttentionMap

#: Kinds whose maps are captured and not compared across layers, and why.
NOT_COMPARED = {
    "channel": "channels attend to channels: captured, and left out of what is said of tokens",
    "gate": "a softmax weights values without comparing queries with keys: captured, and left out of what is said of "
    "tokens",
}


def layer_groups(maps: Mapping[str, AttentionMap]) -> list[list[str]]:
    """Names of comparable layers, group by group, each in execution order, groups in order of their first layer.

    Kinds of :data:`NOT_COMPARED` are in no group. The second map of a layer that attends twice is compared with the
    second maps of others.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, attention in maps.items():
        if attention.kind in NOT_COMPARED:
            continue
        _, heads, queries, keys = attention.shape
        call = name.partition("#")[2]
        key = (attention.kind, heads, queries, keys, attention.windows, attention.partition, attention.layout, call)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def group_name(number: int) -> str:
    """Names of layer groups in order: A, B, … Z, AA, AB…"""
    name = ""
    while number >= 0:
        name = chr(ord("A") + number % 26) + name
        number = number // 26 - 1
    return name
