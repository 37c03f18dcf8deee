"""One analysis by several processes on one machine or more, as `torchrun` starts them.

Every process measures its shard of the images; what came out is exchanged once, at the end, over gloo: nothing else
needs to be synchronised, so a process without images, or an accelerator of its own for each, makes no difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from collapse_probe.errors import CollapseProbeError, UsageError
from collapse_probe.partial import Partial
from collapse_probe.processors import shared_threads
from collapse_probe.shards import Shard

T = TypeVar("T")

#: How long a process waits for the slowest. One that has died is noticed at once, as its connection breaks.
_PATIENCE = timedelta(days=30)

#: PyTorch 2.6 has it under another name.
_set_timeout = getattr(dist, "set_timeout", distributed_c10d._set_pg_timeout)

#: Groups that this process has been in, one after the other.
_GROUPS = count()


def rank_and_world() -> tuple[int, int]:
    """This process's rank among those that `torchrun` started, and how many there are; 0 and 1 without it.

    Raises:
        UsageError: the environment variables ``RANK`` and ``WORLD_SIZE`` are not what `torchrun` sets.
    """
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, world = map(int, texts)
    except ValueError:
        rank, world = 0, 0
    if world == 1:
        return 0, 1
    if not 0 <= rank < world or "MASTER_ADDR" not in os.environ:
        raise UsageError(
            f"RANK={texts[0]!r} and WORLD_SIZE={texts[1]!r} are set in the environment, but not as torchrun sets them. "
            "Start with torchrun, or unset them."
        )
    return rank, world


@dataclass(frozen=True)
class Team:
    """Processes that make one analysis together; of one process, that process alone.

    Attributes:
        rank: which of them this is.
        size: how many there are.
        group: what they communicate over; None for one process.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def shard(self) -> Shard:
        """This process's part of the images."""
        return Shard(self.rank + 1, self.size)

    def together(self, job: Callable[[], T]) -> T:
        """Do this in every process, and go on only where it went well in all.

        Raises:
            CollapseProbeError: what was raised in the first process in which the job failed, in all processes.
            Exception: what else was raised in this process; in the others a CollapseProbeError says so.
        """
        own, result = None, None
        try:
            result = job()
        except Exception as error:
            if self.size == 1:
                raise
            own = error
        for rank, failure in enumerate(self.exchanged(self._told(own))):
            if failure is not None:
                raise own if own is not None and rank == self.rank else failure
        return cast("T", result)

    def exchanged(self, item: T) -> list[T]:
        """What every process gave, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with _no_process_lost():
            dist.all_gather_object(items, item, self.group)
        return items

    def wait(self) -> None:
        """Until all are here, or one is gone."""
        if self.size > 1:
            try:
                dist.barrier(self.group)
            except RuntimeError:  # whoever is gone has no more to say
                return

    def with_sums(self, own: Partial, headers: Sequence[Partial]) -> Iterator[Partial]:
        """Every shard that holds images with its sums, one at a time: together they may not fit into memory.

        Args:
            own: that of this process.
            headers: those of all processes, by rank, without sums.
        """
        layouts = self.exchanged({name: (values.shape, values.dtype.str) for name, values in own.sums.items()})
        for rank, header in enumerate(headers):
            if header.images:
                yield replace(header, sums=self._sums(own, rank, layouts[rank]))

    def _sums(self, own: Partial, rank: int, layout: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, Any]:
        if self.size == 1:
            return own.sums
        sums = {}
        for name, (shape, dtype) in layout.items():
            sums[name] = own.sums[name] if rank == self.rank else np.empty(shape, dtype)
            with _no_process_lost():
                dist.broadcast(torch.from_numpy(sums[name].reshape(-1)), dist.get_global_rank(self.group, rank),
                               self.group)  # fmt: skip
        return sums

    def _told(self, failure: Exception | None) -> CollapseProbeError | None:
        """An error as the other processes are to raise it: those of libraries need not survive the journey."""
        if failure is None or isinstance(failure, CollapseProbeError):
            return failure
        return CollapseProbeError(f"Process {self.rank} of {self.size} failed: {type(failure).__name__}: {failure}")


@contextmanager
def ranks() -> Iterator[Team]:
    """The processes that know each other while the block lasts, each with threads and an accelerator of its own.

    A process group that was set up before is used and left as it is; its processes keep threads and accelerators.

    Raises:
        UsageError: see :func:`rank_and_world`.
    """
    ours = not dist.is_initialized()
    if ours:
        if rank_and_world()[1] == 1:
            yield Team()
            return
        rank, world = rank_and_world()
        # Under a name of its own: where a second group follows the first one, it would find the first one's addresses.
        store = PrefixStore(f"collapse_probe {next(_GROUPS)}", _store())
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        _take_accelerator()
    try:
        group: Any = dist.group.WORLD if ours else dist.new_group(backend="gloo")
        _set_timeout(_PATIENCE, group)  # once all have met, which does not take long
        with shared_threads() if ours else nullcontext():
            yield Team(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if ours:
            dist.destroy_process_group()


@cache
def _store() -> Store:
    """Where processes find each other; the one that holds it can open its port only once."""
    return cast("Store", next(rendezvous("env://"))[0])


def _take_accelerator() -> None:
    """What is called "cuda" is this process's GPU from now on, not the first one for all."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def _no_process_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's, about a socket
        raise CollapseProbeError(
            "Another process of this run ended before its sums could be exchanged. What it said stands above, or in "
            "the log of its machine; it may have been out of memory."
        ) from error
