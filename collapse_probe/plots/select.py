"""Which part of an analysis a figure shows: groups of layers in the order drawn, and columns of the layers table.

Layers of several groups are drawn group by group, so that each group is a block of neighbours; within a group, and from
one group's first layer to the next group's, in execution order. Where groups alternate (regular and shifted windows,
block and grid attention) this is not the execution order of the model: the numbers on the axes are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from collapse_probe.errors import UsageError
from collapse_probe.result import Analysis, Group


@dataclass(frozen=True)
class Arrangement:
    """Layers side by side, as a figure shows them.

    Attributes:
        groups: the groups, in order.
        layers: their layers, group by group.
        numbers: what each layer is called on an axis: its number in execution order, or within a single group.
        label: what the axis is called.
    """

    groups: list[Group]
    layers: list[str]
    numbers: list[int]
    label: str

    @property
    def several(self) -> bool:
        return len(self.groups) > 1

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First position of each group, and the one behind its last."""
        ends = np.cumsum([len(group.layers) for group in self.groups])
        return [(int(end) - len(group.layers), int(end)) for group, end in zip(self.groups, ends, strict=True)]


def arrange(analysis: Analysis, name: str | None) -> Arrangement:
    """One group's layers, or without a name those of all groups. Raises UsageError for a name that is not there."""
    chosen = choose_group(analysis, name)
    if name is not None or len(analysis.groups) == 1:
        return Arrangement([chosen], chosen.layers, list(range(len(chosen.layers))), "Block")
    layers = [layer for group in analysis.groups for layer in group.layers]
    place = {layer: number for number, layer in enumerate(analysis.layers.index)}
    numbers = [place[layer] for layer in layers]
    in_order = numbers == sorted(numbers)
    label = "Layer, in execution order" if in_order else "Layer (numbers: execution order)"
    return Arrangement(list(analysis.groups), layers, numbers, label)


def choose_group(analysis: Analysis, name: str | None) -> Group:
    """The group of that name, or the main one. Raises UsageError for a name that is not there."""
    if not analysis.groups:
        raise UsageError("The analysis holds no layers, so there is nothing to plot.")
    if name is None:
        return analysis.main_group
    for group in analysis.groups:
        if group.name == name:
            return group
    raise UsageError(f"group={name!r} is unknown; this analysis has {[group.name for group in analysis.groups]}.")


def column(table: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """A column of the layers table as floats; NaN throughout where the analysis does not have it."""
    if name not in table:
        return np.full(len(table), np.nan)
    # na_value: pandas 2 refuses to turn a boolean column with missing values into floats without it.
    return pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def titled(text: str, analysis: Analysis, group: Group) -> str:
    """The title, with the group's name where there is more than one to confuse."""
    return f"{text} (group {group.name})" if len(analysis.groups) > 1 else text
