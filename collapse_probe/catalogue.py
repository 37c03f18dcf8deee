"""Which architectures attend, and how: the table that ships with the package.

Reading it needs neither torch nor timm. `tools/list_models.py` makes it by running every architecture once.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from collapse_probe.files import write_atomically

if TYPE_CHECKING:
    from collapse_probe.architecture import Architecture

TABLE = Path(__file__).parent / "data" / "models.csv"

_COLUMNS = (
    "name", "family", "source", "input_size", "maps", "analysed_maps", "kinds", "compared_groups", "mixed_maps",
    "not_captured", "failure",
)  # fmt: skip
_SIZES = re.compile(r"\[\d[\d, ]*\]")


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        name: as `timm.create_model` takes it.
        family: the source file that defines it.
        source: ``"timm <version>"`` or ``"collapse_probe"``.
        input_size: channels, height and width of the images it was run on, as ``"3x224x224"``; empty after a failure.
        kinds: kind of attention -> number of maps, most frequent first.
        analysed: how many of the maps an analysis measures; the others are of kinds that are captured only.
        groups: for each group of layers whose maps are compared, and that has more than one, their number; in execution
            order.
        mixed: how many maps are not probabilities, because the model mixes them after their softmax.
        not_captured: why layers have no map -> number of layers; sizes within a reason are left out.
        failure: why it could not be run; empty where it ran.
    """

    name: str
    family: str
    source: str
    input_size: str = ""
    kinds: Mapping[str, int] = field(default_factory=dict)
    analysed: int = 0
    groups: tuple[int, ...] = ()
    mixed: int = 0
    not_captured: Mapping[str, int] = field(default_factory=dict)
    failure: str = ""

    @property
    def maps(self) -> int:
        """How many maps an image gives, windows of a layer counted once."""
        return sum(self.kinds.values())

    @property
    def gaps(self) -> int:
        """How many layers attend, or look as if they did, and have no map."""
        return sum(self.not_captured.values())

    @property
    def attends(self) -> bool:
        """Whether anything was seen that attends, captured or not."""
        return bool(self.maps or self.gaps)


@dataclass(frozen=True)
class Selection:
    """Names, by what the table says of them.

    Attributes:
        attending: rows of architectures in which something attends, analysed or not.
        without_attention: names of those in which nothing does.
        failed: name -> why it could not be run.
        unknown: names that the table does not hold.
    """

    attending: list[Row]
    without_attention: list[str]
    failed: dict[str, str]
    unknown: list[str]


def look_up(names: Iterable[str], table: Mapping[str, Row]) -> Selection:
    """What the table says of these names."""
    found = Selection([], [], {}, [])
    for name in names:
        row = table.get(name)
        if row is None:
            found.unknown.append(name)
        elif row.failure:
            found.failed[name] = row.failure
        elif row.attends:
            found.attending.append(row)
        else:
            found.without_attention.append(name)
    return found


def row_of(architecture: Architecture) -> Row:
    """What the table keeps of a description."""
    layers = architecture.layers
    sizes = Counter(layer.group for layer in layers if layer.group)
    reasons = Counter(_SIZES.sub("[...]", reason) for reason in architecture.not_captured.values())
    return Row(
        name=architecture.name,
        family=architecture.family,
        source=architecture.source,
        input_size="x".join(map(str, architecture.input_size)),
        kinds=dict(Counter(layer.kind for layer in layers).most_common()),
        analysed=sum(sizes.values()),
        groups=tuple(size for size in sizes.values() if size > 1),
        mixed=sum(not layer.is_probability for layer in layers),
        not_captured=dict(reasons.most_common()),
    )


def in_words(kinds: Mapping[str, int]) -> str:
    """``"4 window + 2 token"``."""
    return " + ".join(f"{count} {kind}" for kind, count in kinds.items())


def timm_version(rows: Iterable[Row]) -> str:
    """The version of timm that the rows were made with; several, should it have been made in several goes."""
    versions = {row.source.removeprefix("timm ") for row in rows if row.source.startswith("timm ")}
    return " and ".join(sorted(versions))


def select(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that one of the shell-style patterns matches, in their order; all of them without patterns."""
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def near_misses(pattern: str, names: Sequence[str]) -> str:
    """A sentence that helps to find what a pattern without a match was meant for."""
    stem = pattern.strip("*?").partition(".")[0]
    wider = f"*{stem}*"
    if stem and (found := select(names, [wider])):
        return f"{wider!r} matches {len(found)}: {', '.join(found[:3])}{', ...' if len(found) > 3 else '.'}"
    near = [] if set(pattern) & set("*?[") else difflib.get_close_matches(stem.lower(), names, n=4)
    if not near:  # beginnings of names, as the pattern is likely one
        beginnings = sorted({name[: len(stem)] for name in names})
        near = [f"{beginning}*" for beginning in difflib.get_close_matches(stem.lower(), beginnings, n=4)]
    return f"Nearest: {', '.join(near)}." if near else "Without a pattern, all names are listed."


def read_table(path: Path = TABLE) -> dict[str, Row]:
    """Name -> row, in the order of the file."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [_row(record) for record in csv.DictReader(stream)]
    return {row.name: row for row in rows}


def write_table(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Write the table, sorted by name."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: row.name):
        cells = {
            "name": row.name,
            "family": row.family,
            "source": row.source,
            "input_size": row.input_size,
            "maps": row.maps,
            "analysed_maps": row.analysed,
            "kinds": in_words(row.kinds),
            "compared_groups": " ".join(map(str, row.groups)),
            "mixed_maps": row.mixed,
            "not_captured": json.dumps(dict(row.not_captured)) if row.not_captured else "",
            "failure": row.failure,
        }
        writer.writerow(cells)
    write_atomically(path, text.getvalue())


def _row(record: Mapping[str, str]) -> Row:
    kinds = {}
    for part in filter(None, record["kinds"].split(" + ")):
        count, _, kind = part.partition(" ")
        kinds[kind] = int(count)
    return Row(
        name=record["name"],
        family=record["family"],
        source=record["source"],
        input_size=record["input_size"],
        kinds=kinds,
        analysed=int(record["analysed_maps"]),
        groups=tuple(map(int, record["compared_groups"].split())),
        mixed=int(record["mixed_maps"]),
        not_captured=json.loads(record["not_captured"] or "{}"),
        failure=record["failure"],
    )
