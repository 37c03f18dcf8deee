"""The result of an analysis as plain, versioned data: tables, arrays, findings, provenance.

Nothing here imports torch: a saved analysis can be loaded, plotted and compared on a machine without it.

On disk an analysis is a folder with `analysis.json` (tables, every layer-by-layer matrix, findings, provenance) and
`arrays.npz` (the larger arrays: by head, by token, histograms). All files appear together or not at all.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from collapse_probe.errors import DamagedFileError, UsageError
from collapse_probe.files import staged, write_atomically
from collapse_probe.words import neutral

#: Version 2 added windows and partitions; what an analysis of version 1 holds has one window per image. Version 3 added
#: residual streams, derived readings with intervals, and metrics that are absent.
SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)

#: What reading JSON or NumPy's archives raises where a file is damaged.
_UNREADABLE = (
    OSError, ValueError, EOFError, KeyError, NotImplementedError, RecursionError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip

#: Columns of the map are key tokens; these are the sets of keys that are reported apart.
PARTS = ("all", "prefix", "patch")


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict.

    Attributes:
        code: stable identifier, for example ``"attention-collapse"``.
        severity: ``"ok"``, ``"note"``, ``"warning"`` or ``"problem"``.
        title: the sentence itself.
        evidence: the numbers it rests on, with their standard errors, as text.
        threshold: the cut-off that decided, as text.
        source: where that cut-off comes from (a publication, or ours and how it was calibrated).
        advice: what a user can do about it.
        layers: names of the layers concerned, in execution order.
        published: whether the threshold itself is published; otherwise it is ours.
        heads: numbers of the heads concerned, by layer, where it is about some heads of a layer.
        readings: the numbers behind the evidence, each with ``layer``, ``reading``, ``value`` and ``se`` (None where
            absent).
    """

    code: str
    severity: str
    title: str
    evidence: str
    threshold: str
    source: str
    advice: str
    layers: tuple[str, ...] = ()
    published: bool = False
    heads: dict[str, list[int]] = field(default_factory=dict)
    readings: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        return neutral(f"[{self.severity}] {self.title} ({self.evidence})")

    def _repr_html_(self) -> str:
        from collapse_probe.report.notebook import finding_to_html

        return finding_to_html(self)


@dataclass
class Group:
    """Layers whose maps may be compared with each other, and everything measured across them.

    With L layers, H heads and K key tokens; where attention stays within windows, the keys of all W windows of an image
    count as its key tokens, window by window:

    Attributes:
        name: ``"A"``, ``"B"``… in execution order.
        layers: qualified layer names, in execution order (L of them).
        kind: ``"token"``, ``"class"``, ``"pooling"``…
        heads, queries, keys: sizes of each layer's map, in each window where there are several.
        prefix_tokens: how many leading tokens are not patches (class token, registers).
        grid: height and width of the patch grid, or ``None`` where unknown.
        windows: maps per image (W); 1 where every token sees every other.
        partition: how the windows were cut, where a model cuts them in more than one way (``"shifted"``, ``"grid"``…).
        matrices: ``matrices[part][reading]`` is ``[L, L]``; part is one of :data:`PARTS` (``"prefix"`` and ``"patch"``
            only where both exist); readings are those of the metrics over pairs of layers (``similarity``, ``centred``,
            ``image_independent``, ``excess``…), each with its standard error over images as ``<reading>_se``; the
            image-independent part and the excess also with the ends of a 95 % interval, ``<reading>_low`` and
            ``<reading>_high``. NaN marks what is absent.
        arrays: larger arrays by name: ``similarity_by_head`` [L, L, H], ``similarity_by_token`` [L, L, W K],
            ``histogram`` [L, L, bins] (counts of M, bins of equal width from -1 to 1), ``cross_head_matrix`` [L, H, H],
            ``entropy_by_head`` [L, H], ``silent_by_head`` [L, H] (share of images in which a head's output is zero) and
            what else the metrics' documentation names. Nothing here grows with the
            number of images.
        derived: ``similar_blocks`` and ``onset``, each with ``value`` and the ends of a 95 % interval, ``low`` and
            ``high``; None where absent.
    """

    name: str
    layers: list[str]
    kind: str
    heads: int
    queries: int
    keys: int
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    windows: int = 1
    partition: str = ""
    matrices: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    derived: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def matrix(self, reading: str = "similarity", part: str = "all") -> pd.DataFrame:
        """One layer-by-layer matrix as a labelled table. Raises UsageError for an unknown reading or part."""
        return _labelled(self, f"group {self.name}", reading, part)

    @property
    def module(self) -> str:
        """Name of the innermost module that holds all layers of the group; empty where that is the model itself."""
        return _shared_module(self.layers)

    @property
    def description(self) -> str:
        """The group in words, for example ``"2 layers, window (shifted), 64 windows of 49 tokens"``."""
        count = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        kind = f"{self.kind} ({self.partition})" if self.partition else self.kind
        queries = "1 query" if self.queries == 1 else f"{self.queries} queries"
        tokens = f"{self.keys} tokens" if self.queries == self.keys else f"{queries} and {self.keys} keys"
        return f"{count}, {kind}, " + (f"{self.windows} windows of {tokens}" if self.windows > 1 else tokens)

    def meta(self) -> dict[str, Any]:
        """Everything but the arrays."""
        names = (
            "name", "layers", "kind", "heads", "queries", "keys", "prefix_tokens", "grid", "windows", "partition",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass
class Stream:
    """Layers whose blocks leave a residual stream of the same tokens and channels, and what was measured of it.

    Attributes:
        name: ``"S1"``, ``"S2"``… in execution order.
        layers: attention layers, in execution order (L of them): the last one of each block.
        blocks: the blocks that they are in, whose outputs are the stream.
        tokens, channels: sizes of the stream.
        prefix_tokens: how many leading tokens are not patches.
        grid: height and width of the patch grid, or ``None`` where unknown.
        matrices: ``matrices["all"][reading]`` is ``[L, L]``, as those of a :class:`Group`.
        arrays: larger arrays by name.
    """

    name: str
    layers: list[str]
    blocks: list[str]
    tokens: int
    channels: int
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    matrices: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def matrix(self, reading: str = "cka", part: str = "all") -> pd.DataFrame:
        """One layer-by-layer matrix as a labelled table. Raises UsageError for an unknown reading or part."""
        return _labelled(self, f"stream {self.name}", reading, part)

    @property
    def module(self) -> str:
        """Name of the innermost module that holds all layers of the stream; empty where that is the model itself."""
        return _shared_module(self.layers)

    def meta(self) -> dict[str, Any]:
        """Everything but the arrays."""
        names = ("name", "layers", "blocks", "tokens", "channels", "prefix_tokens", "grid")
        return {name: getattr(self, name) for name in names}


def _labelled(owner: Group | Stream, words: str, reading: str, part: str) -> pd.DataFrame:
    try:
        values = owner.matrices[part][reading]
    except KeyError:
        known = {p: sorted(m) for p, m in owner.matrices.items()}
        raise UsageError(f"{words} has no {reading!r} for part {part!r}; it has {known}") from None
    return pd.DataFrame(values, index=owner.layers, columns=owner.layers)


def _shared_module(layers: list[str]) -> str:
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in layers), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


@dataclass
class Analysis:
    """What one pass over the images found: see :class:`Group` for what is measured across layers.

    Attributes:
        layers: a row per layer (index: qualified name), a column per diagnostic; ``<column>_se`` is its standard
            error over images. NaN marks what is undefined for that layer.
        groups: layers that may be compared with each other.
        findings: the verdict.
        provenance: model, weights, images, preprocessing, versions, options; ``complete`` is False where the run was
            interrupted, and ``images`` then says how many were planned.
        not_captured: layers that ran and have no map here, each with ``layer`` and ``reason``.
        streams: layers whose token features may be compared with each other.
        absent: metrics that were chosen and are not defined somewhere, each with ``metric``, ``where`` (a group, a
            stream or a layer) and ``reason``.
    """

    layers: pd.DataFrame
    groups: list[Group]
    findings: list[Finding] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    not_captured: list[dict[str, str]] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    absent: list[dict[str, str]] = field(default_factory=list)

    @property
    def similarity(self) -> pd.DataFrame:
        """``[layers x layers]``: mean M over heads, tokens and images; NaN between layers of different groups."""
        return self.matrix("similarity")

    def matrix(self, reading: str = "similarity", part: str = "all") -> pd.DataFrame:
        """A reading for all layers in execution order; NaN between layers of different groups or streams."""
        names = list(self.layers.index)
        table = pd.DataFrame(np.nan, index=names, columns=names)
        for owner in self.measured:
            if part in owner.matrices and reading in owner.matrices[part]:
                table.loc[owner.layers, owner.layers] = owner.matrix(reading, part).to_numpy()
        return table

    @property
    def measured(self) -> list[Group | Stream]:
        """Everything that was measured together: the groups, then the streams."""
        return [*self.groups, *self.streams]

    @property
    def complete(self) -> bool:
        """Whether all images were measured that were to be."""
        return self.provenance.get("complete") is not False

    @property
    def main_group(self) -> Group:
        """The group with most layers (the first of them on a tie)."""
        return max(self.groups, key=lambda group: len(group.layers))

    def finding(self, code: str) -> Finding | None:
        """The finding with that code, if the verdict holds one."""
        return next((finding for finding in self.findings if finding.code == code), None)

    # -- saving and loading ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write `analysis.json`, `arrays.npz`, `layers.csv` and `similarity.csv` into a folder; returns the folder.

        Raises:
            OutputError: the folder or a file in it cannot be written; then what was there before still is.
        """
        with staged(folder) as stage:
            write_atomically(stage / "arrays.npz", self._arrays_as_bytes())
            write_atomically(stage / "layers.csv", self.layers.to_csv(index_label="layer"))
            write_atomically(stage / "similarity.csv", self.similarity.to_csv(index_label="layer"))
            write_atomically(stage / "analysis.json", json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Analysis:
        """Read what :meth:`save` wrote.

        Raises:
            DamagedFileError: a file is missing, unreadable, or of a schema that this version does not know.
        """
        folder = Path(folder)
        try:
            data = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
            with np.load(folder / "arrays.npz", allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
        except FileNotFoundError as error:
            raise DamagedFileError(
                f"{folder} is not a saved analysis: {Path(error.filename).name} is missing."
            ) from None
        except _UNREADABLE as error:
            raise DamagedFileError(f"{folder} holds a damaged analysis: {error}") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version not in READABLE_VERSIONS:
            known = ", ".join(map(str, READABLE_VERSIONS))
            raise DamagedFileError(
                f"{folder}/analysis.json has schema version {version!r}; this version of collapse_probe reads "
                f"{known}. Run the analysis again, or use the version that wrote it."
            )
        try:
            analysis = cls._from_dict(data, arrays)
            analysis._check()
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DamagedFileError(
                f"{folder} holds a damaged analysis: analysis.json is not as this tool writes it "
                f"({type(error).__name__}: {error!s:.100})."
            ) from None
        return analysis

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: NaN and infinities become null."""
        table = self.layers.reset_index(names="layer")
        return plain(
            {
                "schema_version": SCHEMA_VERSION,
                "provenance": self.provenance,
                "findings": [asdict(finding) for finding in self.findings],
                "layers": {
                    "columns": list(table.columns),
                    "dtypes": [str(dtype) for dtype in table.dtypes],
                    "rows": table.to_numpy(dtype=object).tolist(),
                },
                "groups": [
                    {**group.meta(), "matrices": group.matrices, "derived": group.derived} for group in self.groups
                ],
                "streams": [{**stream.meta(), "matrices": stream.matrices} for stream in self.streams],
                "not_captured": self.not_captured,
                "absent": self.absent,
            }
        )

    @classmethod
    def _from_dict(cls, data: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Analysis:
        stored = data["layers"]
        if any(len(row) != len(stored["columns"]) for row in stored["rows"]):
            raise ValueError("a row of the layers table is too long or too short")
        table = pd.DataFrame(stored["rows"], columns=stored["columns"])
        table = table.astype(dict(zip(stored["columns"], stored["dtypes"], strict=True))).set_index("layer")
        table.index.name = None
        if "windows" not in table and "keys" in table:  # schema version 1
            after = list(table.columns).index("keys") + 1
            table.insert(after, "windows", 1)
            table.insert(after + 1, "partition", "")
        groups = [Group(**_restored(entry, arrays)) for entry in data["groups"]]
        streams = [Stream(**_restored(entry, arrays)) for entry in data.get("streams", [])]
        findings = [Finding(**{**entry, "layers": tuple(entry["layers"])}) for entry in data["findings"]]
        absent = data.get("absent", [])
        return cls(table, groups, findings, data["provenance"], data["not_captured"], streams, absent)

    def _check(self) -> None:
        """Raises TypeError or ValueError where what renderers rely on is of another type or shape than ever written."""
        _check_all([self.provenance, *self.not_captured, *self.absent], dict)
        for finding in self.findings:
            words = (finding.code, finding.severity, finding.title, finding.evidence, finding.threshold, finding.source)
            _check_all([*words, finding.advice, *finding.layers], str)
        for owner in self.measured:
            _check_all([owner.name, *owner.layers], str)
            if unknown := set(owner.layers) - set(self.layers.index):
                raise ValueError(f"{owner.name} has layers that are none: {sorted(unknown)}")
            for readings in owner.matrices.values():
                for name, matrix in readings.items():
                    if matrix.shape != (len(owner.layers),) * 2:
                        raise ValueError(f"{name} of {owner.name} is of shape {matrix.shape}")

    def _arrays_as_bytes(self) -> bytes:
        buffer = io.BytesIO()
        named = {f"{owner.name}/{key}": value for owner in self.measured for key, value in owner.arrays.items()}
        np.savez_compressed(buffer, **named)  # type: ignore[arg-type]  # its signature names allow_pickle only
        return buffer.getvalue()

    # -- rendering ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        model = self.provenance.get("model", {}).get("architecture", "model")
        images = self.provenance.get("images", {}).get("count", "?")
        verdict = "; ".join(finding.title for finding in self.findings) or "no findings"
        if not self.complete:
            images = f"partial: {images} of {self.provenance['images'].get('planned') or 'more'}"
        return neutral(f"Analysis({model}, {len(self.layers)} layers, {images} images: {verdict})")

    def _repr_html_(self) -> str:
        from collapse_probe.report.notebook import to_html

        return to_html(self)

    def interactive(self, height: int = 800) -> Any:
        """The interactive report for a notebook, `height` pixels high; 5 MB of the notebook's file."""
        from collapse_probe.report.notebook import Interactive

        return Interactive(self, height)


def _check_all(values: list[Any], kind: type) -> None:
    """Raises TypeError where a value is of another type."""
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r:.60} where {kind.__name__} was expected")


def _restored(entry: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What makes a group or stream again, from its part of the JSON data and the arrays of all."""
    start = f"{entry['name']}/"
    matrices = {
        part: {name: np.array(values, dtype=np.float64) for name, values in readings.items()}
        for part, readings in entry["matrices"].items()
    }
    own = {key.removeprefix(start): value for key, value in arrays.items() if key.startswith(start)}
    grid = tuple(entry["grid"]) if entry["grid"] else None
    return {**entry, "grid": grid, "matrices": matrices, "arrays": own}


def plain(value: Any) -> Any:
    """The same value made of JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is pd.NA:
        return None
    if isinstance(value, Path):
        return str(value)
    return value
