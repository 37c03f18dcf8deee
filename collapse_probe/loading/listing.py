"""Which checkpoints are meant by files, folders and patterns, and what tells the content of one from that of others."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from collapse_probe.errors import ModelError, UsageError
from collapse_probe.loading.content import SUFFIXES
from collapse_probe.loading.folders import KNOWN, OTHERS, open_folder
from collapse_probe.loading.model_source import existing
from collapse_probe.loading.readers import shards

#: Folders inside a folder that hold its checkpoints, one each or several.
_SEVERAL = re.compile(
    r"((checkpoint|ckpt|global_?step|step|epoch|iter)[-_=]?[0-9]+|checkpoints|version_[0-9]+|lightning_logs)$"
)
_DEEPEST = 3
#: Files beside weights that say how a model is made from them, or how far its training was.
_BESIDE = ("config.json", "preprocessor_config.json", "trainer_state.json")
_CHUNK = 1 << 20


def list_checkpoints(sources: Sequence[str | Path], outside: Sequence[Path] = ()) -> list[Path]:
    """The checkpoints that are meant, each once, in no particular order.

    Args:
        sources: files; folders that hold one checkpoint, or several (as files, or as folders such as ``checkpoint-500``
            or ``checkpoints``); patterns such as ``"run/*.pt"`` or ``"run/**/*.ckpt"``.
        outside: what lies in these folders is not meant by a folder or a pattern.

    Raises:
        UsageError: a source does not exist, or a pattern matches nothing.
    """
    apart = [Path(os.path.normpath(folder.absolute())) for folder in outside]
    found: dict[str, Path] = {}
    for source in sources:
        for path in _meant(source, apart):
            found.setdefault(os.path.normpath(path.absolute()), path)
    return list(found.values())


def checkpoint_digest(path: Path) -> str:
    """A digest of what a checkpoint's model is made from: its weights, and what lies beside them in a folder.

    Raises:
        ModelError, UsageError: it cannot be read, or is a folder that holds no weights.
    """
    weights = open_folder(path).weights if existing(path).is_dir() else path
    files = [weights, *(shards(weights) if weights.suffix == ".json" else ())]
    if path.is_dir() or weights.name in KNOWN:
        files += [file for name in _BESIDE if (file := weights.parent / name).is_file()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name if file != weights else ''}\0".encode("utf-8", "surrogateescape"))
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise ModelError(f"Cannot read {file}: {error.strerror or error}.") from None
    return digest.hexdigest()


def _meant(source: str | Path, outside: Sequence[Path]) -> list[Path]:
    path, text = Path(source), os.fspath(source)
    if _exists(path):
        return (_found_in(path, outside) or [path]) if path.is_dir() else [path]
    matched = [Path(name) for name in glob.glob(text, recursive=True)]  # noqa: PTH207 - the pattern may be absolute
    matched = [item for item in matched if not _lies_in(item, outside)]
    if not matched:
        words = "matches no file" if glob.has_magic(text) else "does not exist"
        raise UsageError(f"{text} {words}; check the path.")
    # What trainers leave beside weights, and folders that hold none, are no checkpoints that somebody meant.
    files = [item for item in matched if item.is_file() and not OTHERS.search(item.name)]
    found = files + [inner for item in matched if item.is_dir() for inner in _found_in(item, outside)]
    if not found:
        raise UsageError(f"{text} matches no checkpoint; check the path.")
    return found


def _found_in(folder: Path, outside: Sequence[Path], depth: int = 0) -> list[Path]:
    """The checkpoints of a folder; the folder itself where it is an export, which its configuration belongs to."""
    try:
        inner = [path for path in sorted(folder.iterdir()) if not _lies_in(path, outside)]
    except OSError:
        return [folder]  # whoever opens it says why it cannot be read
    files = [path for path in inner if path.suffix in SUFFIXES and path.is_file() and not OTHERS.search(path.name)]
    names = {path.name for path in files}
    weights = [path for path in files if path.suffix != ".json"]
    export = any(name in names for name in KNOWN if name != "last.ckpt") or (
        "config.json" in names and len(weights) == 1
    )
    below = [path for path in inner if _SEVERAL.match(path.name) and path.is_dir()] if depth < _DEEPEST else []
    found = [path for item in below for path in _found_in(item, outside, depth + 1)]
    return [*found, folder] if export else [*found, *weights]


def _lies_in(path: Path, folders: Sequence[Path]) -> bool:
    absolute = Path(os.path.normpath(path.absolute()))
    return any(folder == absolute or folder in absolute.parents for folder in folders)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a pattern that is too long for a path, or a folder that may not be entered
        return False
