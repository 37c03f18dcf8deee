"""What a reading comes to in models that are known: ranges over blocks, as they were measured.

`tools/measure_references.py` writes the table. Nothing here imports torch.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Reference:
    """One model's range of one reading.

    Attributes:
        model: the family, and which model it was measured on.
        healthy: whether it is a trained model that works; else it shows what the reading comes to without training.
        low, high: smallest and largest mean over images of any block.
    """

    model: str
    healthy: bool
    low: float
    high: float


@cache
def known() -> dict[str, tuple[Reference, ...]]:
    """Every reading that was measured -> its ranges, trained models first."""
    found: dict[str, list[Reference]] = {}
    table = resources.files("collapse_probe").joinpath("data").joinpath("references.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(table.splitlines()):
        entry = Reference(row["model"], row["healthy"] == "yes", float(row["low"]), float(row["high"]))
        found.setdefault(row["reading"], []).append(entry)
    return {name: tuple(sorted(entries, key=lambda item: not item.healthy)) for name, entries in found.items()}


def in_words(reading: str) -> str:
    """The ranges of a reading as one line; empty where none is known."""
    return "; ".join(f"{item.model}: {_digits(item.low)} to {_digits(item.high)}" for item in known().get(reading, ()))


def _digits(value: float) -> str:
    return (f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}").replace("-0.00", "0.00")
