"""Which part of an analysis a figure shows: one group of layers, its rows of the table, one column of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from collapse_probe.errors import UsageError
from collapse_probe.result import Analysis, Group


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
