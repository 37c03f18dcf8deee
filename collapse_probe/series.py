"""Analyses of one model over its training, as plain, versioned data: no torch.

On disk a series is a folder with `track.json` (which checkpoint stands at which step, and how that is known),
`track.csv` (every reading of every layer at every step) and one saved analysis for each checkpoint, in folders of their
own under `checkpoints/`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from collapse_probe.errors import DamagedFileError, UsageError
from collapse_probe.files import staged, write_atomically
from collapse_probe.readings import companion, reading_of
from collapse_probe.result import Analysis, plain
from collapse_probe.words import neutral

SCHEMA_VERSION = 1

#: Unit of a series -> what its axis is called.
UNITS = {
    "step": "Training step",
    "epoch": "Epoch",
    "number": "Number in the name",
    "order": "Checkpoint, by time of writing",
}

#: Where analyses lie in the folder of a series.
CHECKPOINTS = "checkpoints"

#: Endings of columns that hold how uncertain a reading is.
_UNCERTAIN = ("_se", "_low", "_high")
_LONGEST = 80


@dataclass(frozen=True)
class Point:
    """One checkpoint of a series.

    Attributes:
        step: where it stands, in the unit of the series.
        analysis: what was measured.
        label: what it is called.
        known: how its step is known, in words.
        path: the checkpoint as it was named; empty where it was no file.
        folder: where its analysis lies in the folder of the series; empty where it was not saved there.
    """

    step: float
    analysis: Analysis
    label: str
    known: str = "given"
    path: str = ""
    folder: str = ""


@dataclass
class Series:
    """Analyses by training step.

    Attributes:
        points: the checkpoints by ascending step, no two at the same one.
        unit: what steps count: one of :data:`UNITS`.
        skipped: checkpoints that are not in the series, each with ``path`` and ``reason``.
        provenance: how the series came about: ``options`` and, at the shell, ``command``.
    """

    points: list[Point]
    unit: str = "step"
    skipped: list[dict[str, str]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UsageError(f"unit={self.unit!r} is unknown; choose one of {list(UNITS)}.")
        if not self.points:
            raise UsageError("A series needs at least one analysis.")
        for point in self.points:
            if not _is_step(point.step):
                raise UsageError(f"Steps must be finite numbers; got {point.step!r:.60}.")
            if not isinstance(point.analysis, Analysis):
                raise UsageError(
                    f"A series holds analyses; got a {type(point.analysis).__name__} at {in_words(point.step)}."
                )
        self.points = sorted(self.points, key=lambda point: point.step)
        for one, other in zip(self.points, self.points[1:], strict=False):
            if one.step == other.step:
                raise UsageError(f"{one.label} and {other.label} are both at {self.unit} {in_words(one.step)}.")

    @classmethod
    def from_analyses(cls, analyses: Mapping[float, Analysis], unit: str = "step") -> Series:
        """A series of analyses at hand, for example those that a training loop makes.

        Args:
            analyses: by step.
            unit: what steps count: one of :data:`UNITS`.

        Raises:
            UsageError: there is none, a step is no finite number, or the unit is unknown.
        """
        named = ((step, f"{unit} {in_words(step) if _is_step(step) else step}") for step in analyses)
        return cls([Point(step, analyses[step], label) for step, label in named], unit)

    @property
    def steps(self) -> list[float]:
        """Where the checkpoints stand, ascending."""
        return [point.step for point in self.points]

    @property
    def analyses(self) -> dict[float, Analysis]:
        """What was measured, by step."""
        return {point.step: point.analysis for point in self.points}

    @property
    def table(self) -> pd.DataFrame:
        """Every reading: a row for each ``step``, ``layer`` and ``reading``, with ``value`` and ``se``.

        Readings of the layers table (:mod:`collapse_probe.readings`) that have a value; ``se`` is the standard error
        over images, NaN where there is none. The number of similar blocks and their onset, of the largest group of
        layers, stand there with an empty layer.
        """
        rows = [(point.step, *row) for point in self.points for row in _rows(point.analysis)]
        return pd.DataFrame(rows, columns=["step", "layer", "reading", "value", "se"])

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        first, last = in_words(self.points[0].step), in_words(self.points[-1].step)
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return neutral(f"Series({len(self)} checkpoints, {self.unit} {first} to {last}{skipped})")

    # -- saving and loading ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the tables and all analyses into a folder; returns the folder.

        Raises:
            OutputError: the folder or a file in it cannot be written; then what was there before still is.
        """
        places: list[str] = []
        for point in self.points:
            places.append(f"{CHECKPOINTS}/{place_for(point.label, {Path(place).name for place in places})}")
        with staged(folder) as stage:
            for point, place in zip(self.points, places, strict=True):
                point.analysis.save(stage / place)
            _write_tables(self, places, stage)
        return Path(folder)

    def save_tables(self, folder: str | Path) -> Path:
        """Write `track.json` and `track.csv` alone, where the analyses lie in the folder already; returns it.

        Raises:
            OutputError: the folder or a file in it cannot be written.
        """
        with staged(folder) as stage:
            _write_tables(self, [point.folder for point in self.points], stage)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Series:
        """Read what :meth:`save` wrote.

        Raises:
            DamagedFileError: a file is missing, unreadable, or of a schema that this version does not know.
        """
        folder = Path(folder)
        try:
            data = json.loads((folder / "track.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DamagedFileError(f"{folder} is not a saved series: track.json is missing.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise DamagedFileError(f"{folder}/track.json cannot be read: {error}") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise DamagedFileError(
                f"{folder}/track.json has schema version {version!r}; this version of collapse_probe reads "
                f"{SCHEMA_VERSION}. Run track again, or use the version that wrote it."
            )
        try:
            points = [_point(folder, entry) for entry in data["points"]]
            return cls(points, data["unit"], data["skipped"], data["provenance"])
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            raise DamagedFileError(f"{folder}/track.json is not as it was written: {error}") from None


def place_for(label: str, taken: Collection[str]) -> str:
    """A name for a checkpoint's folder, made of its label: characters that every system takes, and not taken yet."""
    name = re.sub(r"[^\w.=+-]+", "_", label)[-_LONGEST:].strip("._") or "checkpoint"
    used = {item.casefold() for item in taken}
    candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate.casefold() not in used)


def in_words(step: float) -> str:
    """A step as it is written everywhere: all digits of a whole number."""
    return f"{step:.15g}"


def _is_step(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _rows(analysis: Analysis) -> Iterator[tuple[str, str, float, float]]:
    """Layer, reading, value and standard error of everything that an analysis read."""
    table = analysis.layers
    names = [str(name) for name in table if _is_reading(str(name))]
    for layer, record in table.iterrows():
        for name in names:
            value = _number(record[name])
            if not math.isnan(value):
                yield str(layer), name, value, _number(record.get(companion(table.columns, name, "_se")))
    for name, entry in (analysis.main_group.derived if analysis.groups else {}).items():
        if entry["value"] is not None:
            yield "", name, float(entry["value"]), math.nan


def _is_reading(column: str) -> bool:
    whole = column.removesuffix("_prefix").removesuffix("_patch")
    return reading_of(column) is not None and not whole.endswith(_UNCERTAIN)


def _number(value: Any) -> float:
    return math.nan if value is None or value is pd.NA else float(value)


def _write_tables(series: Series, places: list[str], folder: Path) -> None:
    content = {
        "schema_version": SCHEMA_VERSION,
        "unit": series.unit,
        "points": [
            {
                "step": point.step,
                "checkpoint": point.label,
                "known": point.known,
                "path": point.path,
                "folder": place,
                "findings": [
                    {"code": item.code, "severity": item.severity, "title": item.title}
                    for item in point.analysis.findings
                ],
            }
            for point, place in zip(series.points, places, strict=True)
        ],
        "skipped": series.skipped,
        "provenance": series.provenance,
    }
    write_atomically(folder / "track.json", json.dumps(plain(content), indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "track.csv", series.table.to_csv(index=False))


def _point(folder: Path, entry: Mapping[str, Any]) -> Point:
    """One checkpoint from its entry in `track.json`, which may not lead out of the folder."""
    place = Path(entry["folder"])
    if place.is_absolute() or ".." in place.parts or not place.parts:
        raise TypeError(f"{entry['folder']!r:.60} is not a folder in it.")
    analysis = Analysis.load(folder / place)
    return Point(entry["step"], analysis, entry["checkpoint"], entry["known"], entry["path"], entry["folder"])
