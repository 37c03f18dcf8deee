"""Files appear whole or not at all: write beside the target, then rename."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from collapse_probe.errors import OutputError


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Raises:
        OutputError: the folder cannot be made or the file cannot be written.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}. Choose another --out folder.") from error
    finally:
        if temporary is not None:  # also after Ctrl-C
            Path(temporary).unlink(missing_ok=True)
    return path


def move(source: Path, target: Path) -> None:
    """Put a file into another one's place.

    Raises:
        OutputError: it cannot be.
    """
    try:
        source.replace(target)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror or error}. Choose another --out folder.") from error


def check_writable(folder: str | Path) -> Path:
    """Make the folder and prove that a file can be created in it, before any long work.

    Raises:
        OutputError: it cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"Cannot write to {folder}: {error.strerror or error}. Choose another --out folder."
        ) from error
    return folder


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
