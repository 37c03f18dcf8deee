"""Several analyses compared: what :func:`collapse_probe.compare` returns, as plain data that saves and loads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from collapse_probe import differences
from collapse_probe.errors import DamagedFileError, UsageError
from collapse_probe.files import staged, write_atomically
from collapse_probe.result import Analysis, plain
from collapse_probe.words import neutral

SCHEMA_VERSION = 1

#: More than this are not told apart in one picture.
MOST = 4

#: What is said of analyses whose models are not there any more.
UNPAIRED = (
    "From saved analyses: images cannot be paired any more, so errors are those of separate images, and layers of "
    "different models are not compared with each other."
)


@dataclass
class Cross:
    """Layers of one model beside those of another, on the same images.

    Attributes:
        first, second: labels of the models.
        rows, columns: layers of the first and of the second model, in execution order.
        matrices: ``cka`` (linear CKA of token features, unbiased), ``similarity`` and ``centred`` (cosine and
            correlation of attention columns; maps are means over heads, as heads of two models have no common order),
            each ``[rows, columns]`` with its standard error as ``<name>_se``; only what could be compared.
        images: how many images each was measured on.
        absent: what could not be compared, and why.
    """

    first: str
    second: str
    rows: dict[str, list[str]]
    columns: dict[str, list[str]]
    matrices: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def matrix(self, reading: str = "cka") -> pd.DataFrame:
        """One matrix as a labelled table. Raises UsageError for one that is not there."""
        if reading not in self.matrices:
            why = self.absent.get(reading, f"there are {sorted(self.matrices)}")
            raise UsageError(f"{reading!r} between {self.first} and {self.second}: {why}.")
        kind = reading.removesuffix("_se")
        return pd.DataFrame(self.matrices[reading], index=self.rows[kind], columns=self.columns[kind])


@dataclass
class Comparison:
    """What sets models apart.

    Attributes:
        analyses: of each model, by label; all others are compared with the first.
        differences: label of each other model -> table of differences from the first (see
            :func:`collapse_probe.differences.paired`).
        cross: layers of the first model beside those of each other one; none of saved analyses.
        paired: whether all models saw the same images, group by group.
        groups: how many groups of images the errors come from; 0 where not paired.
        notes: what a reader must know.
    """

    analyses: dict[str, Analysis]
    differences: dict[str, pd.DataFrame]
    cross: list[Cross] = field(default_factory=list)
    paired: bool = False
    groups: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def reference(self) -> str:
        """Label of the model that the others are compared with."""
        return next(iter(self.analyses))

    @classmethod
    def of_saved(cls, analyses: Mapping[str, Analysis]) -> Comparison:
        """Compare what is left of several runs.

        Raises:
            UsageError: fewer than two analyses, too many, or one without layers.
        """
        check(analyses)
        first, *others = analyses
        tables = {label: differences.unpaired(analyses[first], analyses[label]) for label in others}
        return cls(dict(analyses), tables, notes=[UNPAIRED, *_other_images(analyses)])

    # -- saving and loading ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write `comparison.json`, `differences.csv`, and each analysis into a folder of its own; returns the folder.

        Raises:
            OutputError: something cannot be written; then what was there before still is.
        """
        with staged(folder) as stage:
            self.fill(stage)
        return Path(folder)

    def fill(self, folder: Path) -> None:
        """The same, file after file."""
        folders = folder_names(list(self.analyses))
        for label, analysis in self.analyses.items():
            analysis.save(folder / folders[label])
        tables = [table.assign(model=label, reference=self.reference) for label, table in self.differences.items()]
        write_atomically(folder / "differences.csv", pd.concat(tables).to_csv(index=False))
        write_atomically(
            folder / "comparison.json", json.dumps(self._to_dict(folders), indent=1, allow_nan=False) + "\n"
        )

    def _to_dict(self, folders: Mapping[str, str]) -> dict[str, Any]:
        return plain(
            {
                "schema_version": SCHEMA_VERSION,
                "analyses": dict(folders),
                "paired": self.paired,
                "groups": self.groups,
                "notes": self.notes,
                "differences": {label: table.to_dict("list") for label, table in self.differences.items()},
                "cross": [vars(item) for item in self.cross],
            }
        )

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read what :meth:`save` wrote.

        Raises:
            DamagedFileError: a file is missing, unreadable, or of a schema that this version does not know.
        """
        folder = Path(folder)
        try:
            data = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
            if data["schema_version"] != SCHEMA_VERSION:
                raise DamagedFileError(
                    f"{folder / 'comparison.json'} has schema version {data['schema_version']!r}; this version of "
                    f"collapse_probe reads {SCHEMA_VERSION}."
                )
            analyses = {label: Analysis.load(folder / name) for label, name in data["analyses"].items()}
            tables = {label: _restored(columns) for label, columns in data["differences"].items()}
            cross = [
                Cross(**{**item, "matrices": {name: _matrix(values) for name, values in item["matrices"].items()}})
                for item in data["cross"]
            ]
            return cls(analyses, tables, cross, data["paired"], data["groups"], data["notes"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(
                f"{folder} does not hold a comparison that can be read ({type(error).__name__}: {error!s:.100})."
            ) from error

    def __repr__(self) -> str:
        how = f"paired over {self.groups} groups of images" if self.paired else "from saved analyses"
        return neutral(f"Comparison({' against '.join(self.analyses)}, {how})")

    def _repr_html_(self) -> str:
        from collapse_probe.report.notebook import comparison_to_html

        return comparison_to_html(self)


def check(analyses: Mapping[str, Analysis]) -> None:
    """Raises UsageError unless these are two to four analyses with layers."""
    if not 2 <= len(analyses) <= MOST:
        raise UsageError(f"Between 2 and {MOST} models can be compared, not {len(analyses)}.")
    for label, analysis in analyses.items():
        if not analysis.groups:
            raise UsageError(f"{label!r} holds no layers, so there is nothing to compare.")


def distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes again.

    >>> distinct(["vit", "vit", "deit"])
    ['vit', 'vit (2)', 'deit']
    """
    found: list[str] = []
    for name in names:
        again = (f"{name} ({number})" for number in itertools.count(2))
        found.append(name if name not in found else next(item for item in again if item not in found))
    return found


def folder_names(labels: list[str]) -> dict[str, str]:
    """A folder for each label: its letters and digits, numbered where that is not enough to tell them apart."""
    found: dict[str, str] = {}
    for number, label in enumerate(labels, start=1):
        name = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "_" for sign in label)
        name = name.strip("._")[:60] or "model"
        found[label] = name if name not in found.values() else f"{name}_{number}"
    return found


def _other_images(analyses: Mapping[str, Analysis]) -> list[str]:
    """Whether what the models saw can have been the same."""
    seen = {
        (item.provenance.get("images", {}).get("count"), item.provenance.get("images", {}).get("root"))
        for item in analyses.values()
    }
    return ["The analyses are of different images, or of different numbers of them."] if len(seen) > 1 else []


def _restored(columns: Mapping[str, list[Any]]) -> pd.DataFrame:
    table = pd.DataFrame(columns)[differences.COLUMNS]
    numeric = differences.COLUMNS[2:]
    table[numeric] = table[numeric].astype(np.float64)
    return table


def _matrix(values: Any) -> np.ndarray:
    return np.array(values, dtype=np.float64)
