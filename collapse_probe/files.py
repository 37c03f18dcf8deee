"""Files appear whole or not at all, and so do sets of files: write beside the target, then rename."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from collapse_probe.errors import OutputError
from collapse_probe.signals import undisturbed

#: Bytes that must be free before a run begins: its results and its state take a few of these.
LEAST_FREE = 50 << 20


#: What to do where results cannot be written.
_ELSEWHERE = "Choose another --out folder."


def write_atomically(path: str | Path, content: str | bytes, advice: str = _ELSEWHERE) -> Path:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Args:
        path: the file; its folder is made if it does not exist.
        content: text is written as UTF-8.
        advice: what to do where it cannot be written, as a sentence.

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
        raise _cannot_write(path, error, advice) from error
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
        raise _cannot_write(target, error) from error


@contextmanager
def staged(folder: str | Path, optional: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder inside this one; at the end of the block everything in it takes its place here, or nothing.

    Args:
        folder: made if it does not exist.
        optional: relative paths of files that not every set has; those that an older set has left go with it.

    Raises:
        OutputError: the folder cannot be made, or a file cannot be put in its place; then all older files are there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder, prefix=".writing."))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield stage
        with undisturbed():
            _move_in(stage, folder, optional)
    except OutputError as error:
        raise OutputError(str(error).replace(str(stage), str(folder))) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _move_in(stage: Path, folder: Path, optional: Collection[str]) -> None:
    """Move all files from one folder into another; on failure what was there comes back."""
    names = sorted(path.relative_to(stage) for path in stage.rglob("*") if path.is_file())
    obsolete = sorted(path for path in {Path(name) for name in optional} - set(names) if (folder / path).is_file())
    replaced = stage / ".replaced"
    replaced.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for number, name in enumerate(names):
            target, old = folder / name, replaced / str(number)
            target.parent.mkdir(parents=True, exist_ok=True)
            moved.append((target, old))
            if os.path.lexists(target):
                _set_aside(target, old)
            (stage / name).replace(target)
        for number, name in enumerate(obsolete, start=len(names)):
            target, old = folder / name, replaced / str(number)
            moved.append((target, old))
            target.replace(old)
    except OSError as error:
        for path, old in reversed(moved):
            if os.path.lexists(old):
                old.replace(path)
            elif not path.is_dir():
                path.unlink(missing_ok=True)
        raise _cannot_write(target, error) from error


def _set_aside(target: Path, old: Path) -> None:
    """A second name for a file that is about to be replaced; the file moves where there are no second names."""
    if target.is_dir():
        raise IsADirectoryError(None, "Is a directory")
    try:
        os.link(target, old, follow_symlinks=False)
    except OSError:
        target.replace(old)


def check_writable(folder: str | Path) -> Path:
    """Make the folder and prove that files can be created in it, before any long work.

    Raises:
        OutputError: it cannot, or next to nothing is free there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(
            f"Cannot write to {folder}: {_reason(folder, error)}. Choose another --out folder."
        ) from error
    if free < LEAST_FREE:
        raise OutputError(
            f"Only {free / 2**20:.1f} MiB are free where {folder} is; results and the state of a run need up to "
            f"{LEAST_FREE >> 20} MiB. Make room, or choose another --out folder."
        )
    return folder


def check_file_writable(path: str | Path, advice: str) -> Path:
    """Make the folder of a file and prove that the file can be written, before any long work.

    Raises:
        OutputError: it cannot; ends with the advice.
    """
    path = Path(path)
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(path.stat().st_mode):
                raise IsADirectoryError(None, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {_reason(path.parent, error)}. {advice}") from error
    return path


def _cannot_write(path: Path, error: OSError, advice: str = _ELSEWHERE) -> OutputError:
    return OutputError(f"Cannot write {path}: {error.strerror or error}. {advice}")


def _reason(folder: Path, error: OSError) -> str:
    """Why a folder cannot be made or written to, where the system's own words leave one wondering."""
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        for path in (folder, *folder.parents):
            if path.is_symlink() and not path.exists():
                return f"{path} is a link to something that does not exist"
            if path.is_file():
                return f"{path} is a file"
    return error.strerror or str(error)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
