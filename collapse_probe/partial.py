"""Sums over some of the images: what a shard leaves behind, and what shards are merged from.

Plain data like an :class:`~collapse_probe.result.Analysis`, and without torch. On disk it is a folder with `shard.json`
(what was measured, on what, and how) and `sums.npz` (the states of all metrics). Both appear together or not at all:
new sums stand beside the old ones until a `shard.json` that names them by their digest has taken the old one's place.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from collapse_probe.errors import DamagedFileError, OutputError, ResourceError, UsageError
from collapse_probe.files import move, write_atomically
from collapse_probe.result import plain
from collapse_probe.shards import Shard

SCHEMA_VERSION = 1

#: What must be the same in all shards that hold images, and what it is called.
_SHARED = {
    "order": "layers with attention",
    "not_captured": "layers that were not captured",
    "groups": "layer groups",
    "streams": "residual streams",
}

#: Options that say how the work is done and leave readings as they are: shards may differ in them.
FREE = {"batch_size", "workers", "device", "max_skipped"}

#: Types of what `shard.json` holds beside the schema's version and the digest.
_TYPES = {
    "shard": dict, "images": int, "options": dict, "order": list, "groups": list, "streams": list,
    "not_captured": list, "absent": list, "provenance": dict, "state": dict,
}  # fmt: skip


@dataclass
class Partial:
    """Sums over the images of one shard.

    Attributes:
        shard: which.
        images: how many images were summed.
        options: how it was measured.
        order: layers in execution order.
        groups, streams: what was measured together, each with its sizes and its metrics' settings.
        sums: states of the metrics, ``"<group or stream>/<metric>/<state>"``.
        not_captured, absent: see :class:`~collapse_probe.result.Analysis`.
        provenance: model, images, device, seconds, versions; ``fingerprint`` tells weights and images from others.
        state: of a run that may go on, where it stands (see :meth:`collapse_probe.streaming.Run.state`); else empty.
    """

    shard: Shard
    images: int
    options: dict[str, Any]
    order: list[str] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    streams: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    not_captured: list[dict[str, str]] = field(default_factory=list)
    absent: list[dict[str, str]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def sums_of(self, name: str, metric: str) -> dict[str, np.ndarray]:
        """The states of one metric of a group or stream."""
        start = f"{name}/{metric}/"
        return {key.removeprefix(start): value for key, value in self.sums.items() if key.startswith(start)}

    def header(self) -> Partial:
        """The same without its sums."""
        return replace(self, sums={})

    def save(self, folder: str | Path) -> Path:
        """Write `shard.json` and `sums.npz` into a folder; returns the folder.

        Raises:
            OutputError: the folder or a file in it cannot be written.
        """
        folder = Path(folder)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.sums)  # type: ignore[arg-type]  # its signature names allow_pickle only
        stored = {key: value for key, value in vars(self).items() if key != "sums"}
        content = plain({"schema_version": SCHEMA_VERSION, **stored, "shard": asdict(self.shard)})
        content["sums_digest"] = hashlib.blake2b(buffer.getbuffer(), digest_size=16).hexdigest()
        content["digest"] = _digest(content)
        sums = write_atomically(folder / _name(content["sums_digest"]), buffer.getvalue())
        try:
            write_atomically(folder / "shard.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
        except OutputError:
            sums.unlink(missing_ok=True)
            raise
        move(sums, folder / "sums.npz")
        for stale in folder.glob(_name("*")):  # of a process that was killed here
            stale.unlink(missing_ok=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Partial:
        """Read what :meth:`save` wrote.

        Raises:
            DamagedFileError: a file is missing, unreadable, changed since, or of a schema that this version does not
                know.
            ResourceError: the sums do not fit into memory.
        """
        folder = Path(folder)
        content = _content(folder)
        header = _header(folder, content)
        try:
            stored = _stored_sums(folder, content.get("sums_digest"))
            with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
                sums = {key: arrays[key] for key in arrays.files}
        except FileNotFoundError as error:
            raise _missing(folder, error) from None
        except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise DamagedFileError(f"{folder} holds a damaged shard: {error} {_AGAIN}") from None
        except MemoryError:
            raise ResourceError(f"The sums in {folder} do not fit into memory.") from None
        return replace(header, sums=sums)

    @classmethod
    def load_header(cls, folder: str | Path) -> Partial:
        """As :meth:`load`, without reading the sums."""
        return _header(Path(folder), _content(Path(folder)))


_AGAIN = "Measure the shard again."


def _name(digest: str) -> str:
    """The file of sums until its `shard.json` is there."""
    return f"sums.{digest}.npz"


def _stored_sums(folder: Path, digest: Any) -> bytes:
    """The file of sums with this digest, under its own name or the one that it had before.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there is another.
    """
    wanted = digest if isinstance(digest, str) and digest.isalnum() else ""
    for path in (folder / "sums.npz", folder / _name(wanted)):
        if path.exists() and hashlib.blake2b(stored := path.read_bytes(), digest_size=16).hexdigest() == wanted:
            return stored
    (folder / "sums.npz").stat()
    raise ValueError("sums.npz is not what was written with its shard.json.")


def _content(folder: Path) -> dict[str, Any]:
    """What `shard.json` holds, of the schema that is known."""
    try:
        content = json.loads((folder / "shard.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _missing(folder, error) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DamagedFileError(f"{folder}/shard.json cannot be read: {reason}.") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise DamagedFileError(
            f"{folder}/shard.json has schema version {version!r}; this version of collapse_probe reads "
            f"{SCHEMA_VERSION}. Measure the shard again, or merge with the version that wrote it."
        )
    if content.get("digest") != _digest(content):
        raise DamagedFileError(f"{folder}/shard.json is not as it was written. {_AGAIN}")
    return dict(content)


def _missing(folder: Path, error: FileNotFoundError) -> DamagedFileError:
    return DamagedFileError(
        f"{folder} holds no saved shard: {Path(error.filename).name} is missing. Shards are written by "
        "collapse-probe analyze --shard 1/4 --out FOLDER."
    )


def _header(folder: Path, content: Mapping[str, Any]) -> Partial:
    fields: dict[str, Any] = {"state": {}, **content}
    fields = {name: fields.get(name) for name in _TYPES}
    try:
        _check_types(fields)
        return Partial(**{**fields, "shard": Shard(**fields["shard"])})
    except (TypeError, ValueError) as error:
        raise DamagedFileError(f"{folder}/shard.json is damaged: {error}. {_AGAIN}") from None


def _check_types(fields: Mapping[str, Any]) -> None:
    """Raises TypeError where what merging relies on is of another type than what was ever written."""
    _check_each(fields, _TYPES)
    provenance = {"fingerprint": {}, **fields["provenance"]}
    _check_each(provenance, {"model": dict, "images": dict, "versions": dict, "seconds": float, "fingerprint": dict})
    _check_each(provenance["images"], {"skipped": list})
    for item in fields["order"]:
        _check_each({"order": item}, {"order": str})
    for item in (*fields["groups"], *fields["streams"]):
        _check_each(item, {"name": str, "layers": list, "settings": dict, "meta": dict})
    for item in provenance["images"]["skipped"]:
        _check_each(item, {"path": str, "reason": str})
    for item in fields["not_captured"]:
        _check_each(item, {"layer": str, "reason": str})
    for item in fields["absent"]:
        _check_each(item, {"metric": str, "where": str, "reason": str})


def _check_each(fields: Any, types: Mapping[str, type]) -> None:
    for name, kind in types.items():
        value = fields.get(name) if isinstance(fields, dict) else None
        if type(value) is not kind:
            raise TypeError(f"{name} is {value!r:.60}")


def _digest(content: Mapping[str, Any]) -> str:
    """What changes with anything in `shard.json`."""
    described = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_shards(partials: Sequence[Partial]) -> list[Partial]:
    """All shards of one analysis, in their order.

    Raises:
        UsageError: a shard is missing or given twice, or they do not belong together.
    """
    if not partials:
        raise UsageError("There is nothing to merge: give the folders of all shards.")
    for partial in partials:
        if partial.state:
            raise UsageError(
                f"Shard {partial.shard} is not finished: it holds {partial.images} images of a run that was "
                "interrupted. Go on with --resume first."
            )
    counts = {partial.shard.count for partial in partials}
    if len(counts) > 1:
        raise UsageError(f"These are shards of different splits: of {' and of '.join(map(str, sorted(counts)))} parts.")
    ordered = sorted(partials, key=lambda partial: partial.shard.number)
    numbers = [partial.shard.number for partial in ordered]
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise UsageError(f"Shard {_listed(twice, ordered[0].shard.count)} is given more than once.")
    missing = sorted(set(range(1, counts.pop() + 1)) - set(numbers))
    if missing:
        raise UsageError(
            f"Shard {_listed(missing, ordered[0].shard.count)} is missing: an analysis of part of the images would "
            "pass for one of all."
        )
    for other in ordered[1:]:
        _check_same_run(ordered[0], other)
    measured = [partial for partial in ordered if partial.images]
    for other in measured[1:]:
        _check_same_layers(measured[0], other)
    return ordered


def _listed(numbers: Sequence[int], count: int) -> str:
    """The first few, and how many more: of a thousand shards, nearly all may be missing."""
    shown = ", ".join(f"{number}/{count}" for number in numbers[:8])
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def is_same_shard(one: Partial, other: Partial) -> bool:
    """Whether two are the same shard of the same run, so that one can stand for the other.

    Only where weights and images are known for what they are: images of a loader are not.
    """
    known = all(_fingerprint(one).get(name) for name in ("weights", "images"))
    return one.shard == other.shard and known and not one.state and _run(one) == _run(other)


def check_resumable(saved: Partial, planned: Partial) -> None:
    """Raises UsageError where a run that was interrupted is another one than what is about to be measured."""
    own = {"shards": str(saved.shard), **_run(saved), "versions": saved.provenance.get("versions")}
    others = {"shards": str(planned.shard), **_run(planned), "versions": planned.provenance.get("versions")}
    for name, value in own.items():
        if plain(value) != plain(others[name]):
            raise UsageError(
                f"The interrupted run was measured with different {name}{_difference(value, others[name])}: it cannot "
                "go on. Repeat the same command with --resume, or start over without it."
            )


def _check_same_run(first: Partial, other: Partial) -> None:
    own, others = _run(first), _run(other)
    for name in own | others:
        if own.get(name) != others.get(name):
            raise UsageError(
                f"Shards {first.shard} and {other.shard} were measured with different {name}"
                f"{_difference(own.get(name), others.get(name))}: they cannot be merged."
            )


def _difference(one: Any, other: Any) -> str:
    """Two values in words, or of two mappings what they differ in; nothing where they would not fit into a sentence."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        return "".join(f" ({name}: {one.get(name)} and {other.get(name)})" for name in names[:1])
    return f" ({one} and {other})" if max(len(str(one)), len(str(other))) <= 60 else ""


def _check_same_layers(first: Partial, other: Partial) -> None:
    for name, words in _SHARED.items():
        if plain(getattr(first, name)) != plain(getattr(other, name)):
            raise UsageError(f"Shards {first.shard} and {other.shard} differ in their {words}: they cannot be merged.")


def _run(partial: Partial) -> dict[str, Any]:
    """What makes a run the one that it is, by the words for it."""
    provenance = plain(partial.provenance)
    images = provenance.get("images", {})
    return {
        "versions of collapse_probe": provenance.get("versions", {}).get("collapse-probe"),
        "options": {name: value for name, value in plain(partial.options).items() if name not in FREE},
        "models": provenance.get("model", {}).get("architecture"),
        "weights": _fingerprint(partial).get("weights"),
        "preprocessing": images.get("preprocessing"),
        "kinds of images": images.get("kind"),
        "orders of images": images.get("order"),
        "numbers of images": images.get("total"),
        "images": _fingerprint(partial).get("images"),
    }


def _fingerprint(partial: Partial) -> dict[str, Any]:
    return dict(partial.provenance.get("fingerprint") or {})
