"""A model over its training: every checkpoint analysed on the same images, :func:`track`.

Each checkpoint takes the way of :func:`collapse_probe.analyze` and has the same readings as alone. What is measured is
kept at once with what it was measured on and how; a later run with more checkpoints goes on from there.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from collapse_probe.analysis import analyze, check_options, samples_of
from collapse_probe.errors import DamagedFileError, ModelError, UsageError
from collapse_probe.files import check_writable, staged, write_atomically
from collapse_probe.fingerprint import images_fingerprint
from collapse_probe.loading import checkpoint_digest, list_checkpoints, open_images
from collapse_probe.models import bundled_images
from collapse_probe.partial import FREE
from collapse_probe.progress import own_bar
from collapse_probe.result import Analysis, plain
from collapse_probe.series import CHECKPOINTS, Point, Series, place_for
from collapse_probe.steps import Clues, natural, numbers_in_names, place
from collapse_probe.streaming import Progress

__all__ = ["Series", "track"]

#: Arguments of `analyze` that are not options of a series.
_OTHERS = ("model", "images", "checkpoint", "pretrained", "distributed", "partial", "resume", "progress")
_OPTIONS = {name: item.default for name, item in inspect.signature(analyze).parameters.items() if name not in _OTHERS}

#: What an analysis is of stands beside it.
_RECORD, _RECORD_VERSION = "measured.json", 1
_FIRST = 3


def track(
    checkpoints: str | Path | Sequence[str | Path],
    images: str | Path | Tensor | Iterable[Any] | None = None,
    *,
    out: str | Path | None = None,
    progress: Progress | bool = False,
    **options: Any,
) -> Series:
    """How do the readings of a model change over its training?

    Args:
        checkpoints: files that `load_model` takes; folders that hold one checkpoint or several; patterns such as
            ``"run/*.pt"``; or a list of these.
        images: as for :func:`collapse_probe.analyze`; an iterator, which has its images only once, will not do.
        out: a folder that keeps the analysis of each checkpoint as soon as it is done, under ``checkpoints/``, and
            receives ``track.json`` and ``track.csv``. What an earlier run has left there is taken where weights,
            images, options and the version of collapse_probe are the same.
        progress: True for a progress bar on stderr, or an object to report to: one bar for all checkpoints.
        options: those of :func:`collapse_probe.analyze` that are not about one checkpoint: ``arch``, ``use_ema``,
            ``key``, ``num_heads``, ``allow_bad_weights``, ``model_kwargs``, ``img_size``, ``batch_size``,
            ``num_samples``, ``seed``, ``device``, ``layers``, ``metrics``, ``threshold`` and so on.

    Returns:
        The :class:`~collapse_probe.series.Series`. Checkpoints that could not be read or analysed, and those that have
        no place of their own, are in its ``skipped``, each with the reason, and a warning names them.

    Raises:
        UsageError: an option is unknown or out of range, or no checkpoint is there.
        ModelError: no checkpoint could be analysed.
        ImagesError, OutputError, ResourceError: as :func:`collapse_probe.analyze`; what was measured before is kept.
        KeyboardInterrupt: as it came; what was measured before is kept.
    """
    if isinstance(layers := options.get("layers", ()), Iterable):  # perhaps an iterator, for one checkpoint only
        options["layers"] = [layers] if isinstance(layers, str) else list(layers)
    _check(options, images)
    folder = None if out is None else check_writable(out)
    sources = [checkpoints] if isinstance(checkpoints, (str, os.PathLike)) else list(checkpoints)
    ours = [] if folder is None else [folder / CHECKPOINTS, folder / "figures"]
    files = sorted(list_checkpoints(sources, ours), key=lambda path: natural(str(path)))
    if not files:
        raise UsageError("There is no checkpoint to track: give files, folders or patterns.")
    own = own_bar() if progress is True else None
    bar = own or (None if isinstance(progress, bool) else progress)
    with own or nullcontext():
        shelf = _Shelf(folder, _run(options, images))
        found = _identified(files)
        _measure(found, images, options, shelf, bar)
    series = _series(found, {"options": plain({**_OPTIONS, **options})})
    for entry in series.skipped:
        warnings.warn(f"{entry['path']} is left out: {entry['reason']}", stacklevel=2)
    if folder is not None:
        series.save_tables(folder)
    return series


@dataclass
class _Candidate:
    """A checkpoint on its way into the series.

    Attributes:
        path, label: the file or folder, and what it is called.
        digest: of its content; empty where that cannot be read.
        modified: when it was last written.
        analysis, folder: what was measured, and where it lies.
        reason: why nothing was.
    """

    path: Path
    label: str
    digest: str = ""
    modified: float = 0.0
    analysis: Analysis | None = None
    folder: str = ""
    reason: str = ""


class _Shelf:
    """Analyses by the content of their checkpoint, kept in a folder if there is one.

    Attributes:
        where: the folder of the series.
        run: what else they hang on: options, images, version.
        others: of analyses there that are of other runs, by content of the checkpoint, those other runs.
    """

    def __init__(self, where: Path | None, run: Mapping[str, Any]) -> None:
        self.where, self.run = where, plain(run)
        self.others: dict[str, dict[str, Any]] = {}
        self._known: dict[str, Analysis | Path] = {}
        self._folders: dict[str, str] = {}
        for record in () if where is None else sorted((where / CHECKPOINTS).glob(f"*/{_RECORD}")):
            content = _record(record)
            if content is not None and content["run"] == self.run and self.run["images"] is not None:
                self._known.setdefault(content["digest"], record.parent)
            elif content is not None:
                self.others[content["digest"]] = content["run"]

    def find(self, digest: str) -> tuple[Analysis, str] | None:
        """The analysis of a checkpoint with this content, and its folder in that of the series."""
        found = self._known.get(digest)
        if isinstance(found, Path):
            try:
                analysis = Analysis.load(found)
            except DamagedFileError:
                del self._known[digest]
                return None
            self._known[digest] = analysis
            self._folders[digest] = f"{CHECKPOINTS}/{found.name}"
            return analysis, self._folders[digest]
        return None if found is None else (found, self._folders.get(digest, ""))

    def put(self, label: str, digest: str, analysis: Analysis) -> str:
        """Keep an analysis; returns its folder in that of the series.

        Raises:
            OutputError: it cannot be written.
        """
        self._known[digest] = analysis
        if self.where is None:
            return ""
        name = place_for(label, [Path(place).name for place in self._folders.values()])
        # What an earlier analysis in this place has left beside itself is not about this one.
        with staged(self.where / CHECKPOINTS / name, optional=["report.html"]) as stage:
            analysis.save(stage)
            record = {"schema_version": _RECORD_VERSION, "checkpoint": label, "digest": digest, "run": self.run}
            write_atomically(stage / _RECORD, json.dumps(record, indent=1) + "\n")
        self._folders[digest] = f"{CHECKPOINTS}/{name}"
        return self._folders[digest]


class _Part:
    """The progress of one analysis as a part of that of all."""

    def __init__(self, whole: Progress, before: int, count: int) -> None:
        self._whole, self._before, self._count = whole, before, count

    def __call__(self, done: int, total: int | None) -> None:
        if total is None:
            self._whole(done, None)
        else:
            self._whole(self._before * total + done, self._count * total)

    def note(self, text: str) -> None:
        self._whole.note(text)


def _check(options: Mapping[str, Any], images: Any) -> None:
    """Raises UsageError for what no checkpoint could be analysed with."""
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise UsageError(f"{', '.join(unknown)}: not an option of track. Choose among {', '.join(_OPTIONS)}.")
    if isinstance(images, Iterator):
        raise UsageError(
            "An iterator has its images only once, and every checkpoint needs the same ones: give a folder, a tensor, "
            "a list or a DataLoader."
        )
    check_options(**options)


def _identified(files: Sequence[Path]) -> list[_Candidate]:
    """The checkpoints with what tells them from others."""
    found = []
    for path, label in zip(files, _labels(files), strict=True):
        item = _Candidate(path, label)
        try:
            item.digest = checkpoint_digest(path)
            item.modified = _modified(path)
        except (ModelError, UsageError) as error:
            item.reason = _about(path, error)
        except OSError as error:  # it was there a moment ago
            item.reason = f"Cannot read {path}: {error.strerror or error}."
        found.append(item)
    return found


def _labels(files: Sequence[Path]) -> list[str]:
    """The names of files with as many of their folders as it takes to tell them apart."""
    parts = [Path(os.path.normpath(path.absolute())).parts for path in files]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(item[-length:]) for item in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _modified(path: Path) -> float:
    """Of a folder when the last file in it was written: its own time changes with every file that comes or goes."""
    if path.is_dir():
        return max(item.stat().st_mtime for item in path.iterdir())
    return path.stat().st_mtime


def _run(options: Mapping[str, Any], images: Any) -> dict[str, Any]:
    """What an analysis hangs on beside the checkpoint."""
    given = {**_OPTIONS, **options}
    images = bundled_images() if images is None else images
    source = open_images(
        images, config={"input_size": (3, 1, 1)} if isinstance(images, (str, Path)) else {},
        num_samples=samples_of(images, given["num_samples"]), seed=given["seed"],
    )  # fmt: skip
    free = FREE if given["until_se"] is None else FREE - {"batch_size"}  # by which a run may end earlier
    return {
        "version": importlib.metadata.version("collapse-probe"),
        "images": images_fingerprint(source, images),
        "options": {name: value for name, value in given.items() if name not in (*free, "tile_bytes")},
    }


def _measure(
    found: Sequence[_Candidate], images: Any, options: Mapping[str, Any], shelf: _Shelf, bar: Progress | None
) -> None:
    """Give every checkpoint its analysis, or the reason why it has none."""
    for item in found:
        _take(item, shelf)
    waiting = [item for item in found if item.analysis is None and not item.reason]
    for text in _plans(found, waiting, shelf) if bar is not None else ():
        bar.note(text)  # type: ignore[union-attr]
    try:
        with _each_once() as warned:
            for number, item in enumerate(waiting):
                if _take(item, shelf):  # the same content under another name
                    continue
                part = _Part(bar, number, len(waiting)) if bar is not None else False
                try:
                    with warned(str(item.path)):
                        item.analysis = analyze(item.path, images, progress=part, **options)
                except (ModelError, UsageError) as error:
                    item.reason = _about(item.path, error)
                else:
                    item.folder = shelf.put(item.label, item.digest, item.analysis)
    except (KeyboardInterrupt, SystemExit):
        if bar is not None and shelf.where is not None:
            done = sum(item.analysis is not None for item in found)
            bar.note(
                f"{done} of {len(found)} checkpoints are measured and kept in {shelf.where / CHECKPOINTS}: the same "
                "command goes on from there."
            )
        raise


def _take(item: _Candidate, shelf: _Shelf) -> bool:
    """Give a checkpoint the analysis that is there already; returns whether there is one."""
    kept = shelf.find(item.digest) if item.digest else None
    if kept is not None:
        item.analysis, item.folder = kept
    return kept is not None


def _plans(found: Sequence[_Candidate], waiting: Sequence[_Candidate], shelf: _Shelf) -> Iterator[str]:
    """What is about to be done, in sentences."""
    kept = sum(item.analysis is not None for item in found)
    if kept:
        yield f"{kept} of {len(found)} checkpoints were measured before and are taken from {shelf.where}."
    if shelf.run["images"] is None and shelf.others:
        yield "Whether a loader delivers the same images as before cannot be known: every checkpoint is measured again."
        return
    again: dict[str, list[str]] = {}
    for item in waiting:
        if item.digest in shelf.others:
            again.setdefault(_differences(shelf.others[item.digest], shelf.run), []).append(item.label)
    for difference, labels in again.items():
        yield f"Measured before with other {difference}, and again now: {_listed(labels)}."


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    own, others = before["options"], now["options"]
    words = [f"{name} ({own.get(name)}, now {value})" for name, value in others.items() if own.get(name) != value]
    words += ["images"] if before["images"] != now["images"] else []
    words += [f"version ({before['version']}, now {now['version']})"] if before["version"] != now["version"] else []
    return " and ".join(words)


@contextmanager
def _each_once() -> Iterator[Any]:
    """Within the block, warnings that differ in nothing but the checkpoint are shown for the first one only."""
    seen: set[str] = set()

    @contextmanager
    def about(name: str) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            try:
                yield
            finally:
                own = list(caught)
        for item in own:
            text = str(item.message).replace(name, "")
            if text not in seen:
                seen.add(text)
                warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)

    yield about


def _series(found: Sequence[_Candidate], provenance: dict[str, Any]) -> Series:
    """The checkpoints that were measured, each at its step.

    Raises:
        ModelError: none was.
    """
    measured = [item for item in found if item.analysis is not None]
    failed = [item for item in found if item.analysis is None]
    if not measured:
        listed = "; ".join(f"{item.label}: {item.reason}" for item in failed[:_FIRST])
        more = f"; and {len(failed) - _FIRST} more" if len(failed) > _FIRST else ""
        raise ModelError(f"None of {len(failed)} checkpoints could be analysed. {listed}{more}")
    named = numbers_in_names([Path(os.path.normpath(item.path.absolute())) for item in measured])
    clues = [
        Clues(item.label, item.digest, _stated(item.analysis), numbers, item.modified)
        for item, numbers in zip(measured, named, strict=True)
    ]
    unit, placed = place(clues)
    points = [
        Point(where.number, item.analysis, item.label, where.words, str(item.path), item.folder)
        for item, where in zip(measured, placed, strict=True)
        if where.number is not None and item.analysis is not None
    ]
    skipped = [{"path": str(item.path), "reason": item.reason} for item in failed]
    skipped += [
        {"path": str(item.path), "reason": where.words}
        for item, where in zip(measured, placed, strict=True)
        if where.number is None
    ]
    if unit == "order" and len(points) > 1:
        warnings.warn(
            "Most checkpoints say in neither content nor name at which step they were written: they are in the order "
            "of their files' times, which copying changes.",
            stacklevel=3,
        )
    return Series(points, unit, skipped, provenance)


def _stated(analysis: Analysis | None) -> dict[str, tuple[float, str]]:
    """Step and epoch that a checkpoint states, from the provenance of its analysis."""
    weights = {} if analysis is None else analysis.provenance["model"].get("weights", {})
    return {unit: (entry["number"], entry["stated"]) for unit, entry in weights.get("training", {}).items()}


def _record(path: Path) -> dict[str, Any] | None:
    """What an analysis in this folder is of; None where that is not known."""
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] == _RECORD_VERSION and isinstance(content["digest"], str):
            run = content["run"]
            if isinstance(run["options"], dict) and {"images", "version"} <= run.keys():
                return dict(content)
    return None


def _about(path: Path, error: Exception) -> str:
    """What is wrong with a checkpoint, on one line that does not name it again."""
    words = " ".join(str(error).split())
    return f"It {words.removeprefix(f'{path} ')}" if words.startswith(f"{path} ") else words.removeprefix(f"{path}: ")


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _FIRST} more" if len(labels) > _FIRST else ""
    return ", ".join(labels[:_FIRST]) + more
