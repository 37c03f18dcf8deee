"""What a comparison says, whatever it is written on: differences in words, and how they were measured."""

from __future__ import annotations

import math

import numpy as np

from collapse_probe.comparison import Comparison, Cross
from collapse_probe.differences import ALL_BLOCKS, THIRDS
from collapse_probe.readings import READINGS
from collapse_probe.report import content

#: Below this an adjusted p counts as beyond chance.
SIGNIFICANT = 0.05

PLACES = (ALL_BLOCKS, *THIRDS)


def rows(comparison: Comparison, label: str, where: str = ALL_BLOCKS) -> list[tuple[str, list[str]]]:
    """A row for each reading at one place: what it is, then both values, the difference with its error, and p."""
    table = comparison.differences[label]
    found = []
    for record in table[table["where"] == where].to_dict("records"):
        cells = [
            content.decimal(record["first"]),
            content.decimal(record["second"]),
            signed(record["difference"], record["se"]),
            p_in_words(record["p_adjusted"]),
        ]
        found.append((READINGS[record["reading"]].label, cells))
    return found


def signed(difference: float, error: float) -> str:
    """A difference with its sign and standard error; "0" where there is none at all."""
    if difference == 0:
        return "0"
    sign = "+" if difference > 0 else "−"
    return sign + content.with_error(abs(difference), error)


def p_in_words(p: float) -> str:
    """With a star where it is beyond chance."""
    if math.isnan(p):
        return "–"
    words = "<0.001" if p < 0.001 else f"{p:.3f}"
    return f"{words} *" if p < SIGNIFICANT else words


def method(comparison: Comparison) -> str:
    """Where the errors come from, in a sentence or two."""
    if not comparison.paired:
        return comparison.notes[0] if comparison.notes else ""
    if comparison.groups < 2:
        return "Too few images for errors of the differences."
    return (
        f"All models saw the same images, in {comparison.groups} groups; errors are of the differences within groups "
        "(jackknife), p values of paired t tests, adjusted for the number of readings and places (Holm). * below 0.05."
    )


def cross_in_words(cross: Cross) -> list[str]:
    """What the heatmaps between two models show, for those who do not see them, and what is missing."""
    lines = []
    for name, words in (("cka", "CKA of token features"), ("centred", "Centred similarity of attention maps")):
        values = cross.matrices.get(name)
        if values is not None and np.isfinite(values).any():
            lines.append(
                f"{words} at equal relative depth: {_at_equal_depth(values)}; the most alike pair has "
                f"{np.nanmax(values):.2f} ({cross.images[name]} images)."
            )
    reasons = dict.fromkeys(cross.absent.values())
    named = {"cka": "CKA", "similarity": "M", "centred": "centred M"}
    for reason in reasons:
        what = " and ".join(named[name] for name, why in cross.absent.items() if why == reason)
        lines.append(f"{what} between {cross.first} and {cross.second} is absent: {reason}.")
    return lines


def _at_equal_depth(values: np.ndarray) -> str:
    """Along the diagonal of relative depth, from the first block to the last."""
    count = min(values.shape)
    depth = np.linspace(0, 1, count)
    rows, columns = (np.round(depth * (size - 1)).astype(int) for size in values.shape)
    along = values[rows, columns]
    along = along[np.isfinite(along)]
    words = f"{along.mean():.2f} ({along.min():.2f} to {along.max():.2f})" if along.size else "not defined"
    return words.replace("-0.00", "0.00")
