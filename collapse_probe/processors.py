"""How many threads compute and how many processes decode: what the machine has, shared with those beside this one."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

#: At most so many processes decode unless more are asked for: beyond that, disks and memory are what is short.
MOST_WORKERS = 8

#: On a CPU, where the model needs all cores itself, one of so many may decode. With two cores it gains nothing.
_CORES_PER_WORKER = 4

#: Batches that a worker of PyTorch's keeps ready, and one that is in use.
_BATCHES_PER_WORKER = 3


def own_cores() -> int:
    """Cores that this process may use, shared evenly with those that `torchrun` started beside it; at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // _processes_here())


def automatic_workers(device: torch.device, batch_bytes: int) -> int:
    """How many processes decode where nobody has said: none, or as many as help.

    Args:
        device: where the model is. Beside an accelerator all cores but one may decode; beside a CPU every fourth.
        batch_bytes: of one batch of decoded images, which workers hand over in shared memory. Containers often have
            64 MiB of it, and a worker that finds none is killed, so half of what is free is left alone.

    Returns:
        0 to :data:`MOST_WORKERS`; 0 where processes do not start as forks: a script would then be run again in each.
    """
    if multiprocessing.get_context().get_start_method() != "fork":
        return 0
    cores = own_cores()
    wanted = cores // _CORES_PER_WORKER if device.type == "cpu" else cores - 1
    room = _shared_memory() // (2 * _processes_here() * _BATCHES_PER_WORKER * batch_bytes)
    return min(wanted, MOST_WORKERS, room)


@contextmanager
def shared_threads() -> Iterator[None]:
    """Among processes of `torchrun` on one machine, each computes with its share of the cores for the block.

    `torchrun` itself gives one thread to each, by OMP_NUM_THREADS=1, and leaves all others idle; without that variable
    each takes all cores. Any other number has been chosen by the caller, and stays.
    """
    if _processes_here() == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(own_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processes_here() -> int:
    """How many processes of this run share the machine, as `torchrun` says."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(told)) if told.isdecimal() else 1


def _shared_memory() -> int:
    """Free bytes in which processes hand tensors to each other; without a limit where there is no such file system."""
    folder = Path("/dev/shm")
    return shutil.disk_usage(folder).free if folder.is_dir() else 1 << 62
