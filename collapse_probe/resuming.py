"""Where a run keeps what it has measured, so that it can go on after it was interrupted."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from collapse_probe.errors import CollapseProbeError, DamagedFileError, OutputError, UsageError
from collapse_probe.partial import Partial, check_resumable
from collapse_probe.result import Analysis
from collapse_probe.signals import undisturbed

#: Seconds between two saved states, and the largest share of the time that saving may take.
SAVE_EVERY, SHARE = 60.0, 0.02

#: What stands in the folder; nothing else is ever removed from it.
_OURS = ("shard.json", "sums*.npz", "analysis.json", "arrays.npz", "layers.csv", "similarity.csv", ".shard.json.*",
         ".sums*.npz.*")  # fmt: skip

_TABLES = ("arrays.npz", "layers.csv", "similarity.csv")

_RANK = re.compile("rank-([0-9]+)-of-([0-9]+)")


class Keeper:
    """The folder in which a run leaves its state, every minute or so and when it is interrupted.

    Attributes:
        folder: receives `shard.json` and `sums.npz`, and the analysis of part of the images after an interruption.
        resume: whether to go on from what is there.
    """

    def __init__(
        self,
        folder: str | Path,
        resume: bool = False,
        say: Callable[[str], None] | None = None,
        how: str = "resume=True",
    ) -> None:
        """
        Args:
            folder, resume: see the class.
            say: receives what was saved when the run is interrupted; by default its progress does.
            how: what to do to go on, for that sentence.
        """
        self.folder, self.resume, self._root = Path(folder), resume, Path(folder)
        self._say, self._how = say, how
        self._processes = 1
        self._saved, self._cost = time.monotonic(), 0.0
        self._fails = False

    def of_rank(self, rank: int, processes: int) -> Keeper:
        """That of one of several processes, each with a folder of its own."""
        keeper = Keeper(self._root, self.resume, self._say if rank == 0 else lambda _: None, self._how)
        if processes > 1:
            keeper.folder, keeper._processes = self._root / f"rank-{rank + 1}-of-{processes}", processes
        return keeper

    def begin(self, planned: Partial, note: Callable[[str], None]) -> Partial | None:
        """What to go on from, if anything; without `resume`, what is there is removed.

        Args:
            planned: what is about to be measured.
            note: receives what the user should know.

        Raises:
            UsageError: what is there belongs to another run, to another number of processes, or is no state at all.
            DamagedFileError: what is there cannot be read.
        """
        self._saved = time.monotonic()
        if not self.resume:
            old = [self.folder, *self._foreign()]
            if any((folder / "shard.json").exists() for folder in old):
                note(f"{self._root} held what an interrupted run has measured: starting over.")
            for folder in old:
                _check_own(folder)
            for folder in old:
                _clear(folder)
            return None
        self._check_processes()
        if not (self.folder / "shard.json").exists():
            note(f"{self.folder} holds nothing to go on from: starting with the first image.")
            return None
        try:
            saved = Partial.load(self.folder)
        except DamagedFileError as error:
            raise DamagedFileError(f"{error} Or start over without --resume.") from None
        if not saved.state:
            raise UsageError(f"{self.folder} holds a finished shard, not an interrupted run. Leave out --resume.")
        check_resumable(saved, planned)
        unknown = not planned.provenance["fingerprint"]["images"]
        order = " The loader is taken to deliver the same images in the same order." if unknown else ""
        note(f"Going on after {saved.images} images.{order}")
        return saved

    @property
    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._saved >= max(SAVE_EVERY, self._cost / SHARE)

    def save(self, state: Callable[[], Partial], note: Callable[[str], None]) -> bool:
        """Save the state; where that is not possible, say so once and let the run go on. Returns whether it worked."""
        started, failure = time.monotonic(), ""
        with undisturbed():
            try:
                state().save(self.folder)
            except OutputError as error:
                failure = f"The state of this run cannot be saved: {error}"
        if failure and not self._fails:
            note(failure)
        self._fails = bool(failure)
        self._saved = time.monotonic()
        self._cost = self._saved - started
        return not failure

    def latest(self) -> Partial | None:
        """The last state that this run saved, or went on from; None where it is the beginning."""
        with suppress(DamagedFileError):
            return Partial.load(self.folder)
        return None

    def interrupted(self, state: Callable[[], Partial], planned: int | None, note: Callable[[str], None]) -> None:
        """Save the state, and an analysis of the images so far beside it. Nothing that goes wrong here is raised: the
        interruption is what the caller must hear of."""
        say, self._fails = self._say or note, False
        with undisturbed():
            kept = state()
            if not self.save(lambda: kept, say):
                return
            of = f" of {planned}" if planned else ""
            say(f"Saved the sums over {kept.images}{of} images to {self.folder}. To go on: {self._how}")
            with suppress(CollapseProbeError):  # a disk that is full by now
                _analysis_so_far(kept, planned).save(self.folder)

    def discard(self) -> None:
        """Remove what this run and earlier ones have left, of all processes, and nothing else."""
        for folder in (self.folder, *self._ranks(), self._root):
            _clear(folder)

    def _foreign(self) -> list[Path]:
        """Folders of runs of another number of processes; one process looks after them for all."""
        if self._processes > 1 and not self.folder.name.startswith("rank-1-"):
            return []
        others = [path for path in self._ranks() if not path.name.endswith(f"-of-{self._processes}")]
        return others if self.folder == self._root else [*others, self._root]

    def _ranks(self) -> list[Path]:
        return [path for path in self._root.glob("rank-*-of-*") if _RANK.fullmatch(path.name)]

    def _check_processes(self) -> None:
        """Raises UsageError where another number of processes has been at work: their shards are other ones."""
        counts = {int(path.name.rpartition("-")[2]) for path in self._ranks()}
        if (self._root / "shard.json").exists():
            counts.add(1)
        if counts - {self._processes} and self._processes not in counts:
            raise UsageError(
                f"{self._root} was left by {_processes(counts)}, and this is a run of {_processes({self._processes})}: "
                "go on with as many as before, or start over without --resume."
            )


def _check_own(folder: Path) -> None:
    """Raises UsageError where a folder holds results, which would be removed with what a run has left."""
    ours = any((folder / name).exists() for name in ("shard.json", "analysis.json"))
    strange = not ours and any((folder / name).exists() for name in _TABLES)
    if strange or _complete(folder) or _finished(folder):
        raise UsageError(
            f"{folder} holds results. Keep the state of a run in a folder of its own: {folder / 'partial'}"
        )


def _complete(folder: Path) -> bool:
    """Whether an analysis lies there that is not one of part of the images, or that cannot be read."""
    if not (folder / "analysis.json").exists():
        return False
    with suppress(DamagedFileError):
        return Analysis.load(folder).complete
    return True


def _finished(folder: Path) -> bool:
    with suppress(DamagedFileError):
        return not Partial.load_header(folder).state
    return False


def _clear(folder: Path) -> None:
    """Remove our files from a folder, and the folder where nothing else is in it."""
    for pattern in _OURS:
        for path in folder.glob(pattern):
            with suppress(OSError):
                path.unlink()
    with suppress(OSError):
        folder.rmdir()


def _processes(counts: Collection[int]) -> str:
    words = " or ".join(str(count) for count in sorted(counts))
    return f"{words} process" if words == "1" else f"{words} processes"


def _analysis_so_far(state: Partial, planned: int | None) -> Analysis:
    from collapse_probe.merging import joined

    analysis = joined([state.header()], [state], state.options["max_skipped"])
    analysis.provenance["complete"] = False
    analysis.provenance["images"] = analysis.provenance["images"] | {"planned": planned}
    return analysis
