"""Processes that decode and threads that compute: how many, and what becomes of a run when one of them is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import collapse_probe as cp
from collapse_probe import processors
from collapse_probe.errors import ResourceError
from collapse_probe.loading import folder as folder_module
from collapse_probe.processors import automatic_workers, own_cores, shared_threads

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BATCH = 32 * 3 * 224 * 224 * 4


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many cores and so much shared memory, and so many processes of one run on it."""

    def make(cores, shared=1 << 40, processes=None):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)), raising=False)
        monkeypatch.setattr(processors, "_shared_memory", lambda: shared)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return make


@pytest.mark.parametrize(
    ("cores", "processes", "on_cpu", "on_gpu"),
    [(1, None, 0, 0), (2, None, 0, 1), (4, None, 1, 3), (16, None, 4, 8), (64, None, 8, 8), (16, 4, 1, 3),
     (2, 4, 0, 0), (16, "", 4, 8), (16, 0, 4, 8)],
)  # fmt: skip
def test_how_many_decode(machine, cores, processes, on_cpu, on_gpu):
    machine(cores, processes=processes)
    assert automatic_workers(CPU, BATCH) == on_cpu
    assert automatic_workers(CUDA, BATCH) == on_gpu


def test_a_containers_shared_memory_is_not_overrun(machine):
    machine(16, shared=64 << 20)
    assert automatic_workers(CUDA, BATCH) == 0
    assert automatic_workers(CUDA, 1 << 20) == 8
    machine(16, shared=8 * 6 * BATCH - 1)
    assert automatic_workers(CUDA, BATCH) == 7
    machine(32, shared=8 * 6 * BATCH - 1, processes=2)
    assert automatic_workers(CUDA, BATCH) == 3


def test_no_processes_where_they_run_the_callers_script_again(machine, monkeypatch):
    machine(16)
    spawning = processors.multiprocessing.get_context("spawn")
    monkeypatch.setattr(processors.multiprocessing, "get_context", lambda: spawning)
    assert automatic_workers(CUDA, BATCH) == 0


@pytest.mark.parametrize(
    ("processes", "variable", "threads"),
    [(1, None, "unchanged"), (2, "1", 4), (2, None, 4), (3, "1", 2), (16, "1", 1), (2, "3", "unchanged")],
)
def test_threads_among_processes_of_one_machine(machine, monkeypatch, processes, variable, threads):
    machine(8, processes=processes)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    with shared_threads():
        assert torch.get_num_threads() == (before if threads == "unchanged" else threads)
    assert torch.get_num_threads() == before


def test_cores_are_those_that_this_process_may_use():
    assert 1 <= own_cores() <= (os.cpu_count() or 1)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(24):
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def loaders(monkeypatch):
    """What every DataLoader of a folder was asked for."""
    asked = []

    class Noted(folder_module.DataLoader):
        def __init__(self, *args, **kwargs):
            asked.append(kwargs)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(folder_module, "DataLoader", Noted)
    return asked


@pytest.mark.parametrize(
    ("asked", "used"), [({}, 1), ({"workers": 0}, 0), ({"workers": 2}, 2), ({"workers": 9, "batch_size": 10}, 3)]
)
def test_asked_for_or_chosen(pictures, loaders, machine, asked, used):
    machine(4)
    cp.analyze("digits_vit_24b", pictures, metrics="attention_entropy", **{"batch_size": 8, **asked})
    assert [one["num_workers"] for one in loaders] == [used]
    assert [one["pin_memory"] for one in loaders] == [False]


def test_pages_are_locked_for_a_gpu(pictures, loaders, monkeypatch):
    """As far as this can be seen without one: the loader is asked for it, and hands over the same images."""
    config = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic", "crop_pct": 1.0}
    plain = next(iter(folder_module.FolderImages(pictures, config).batches()))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: False)
    with pytest.warns(UserWarning, match="pin_memory"):
        pinned = next(iter(folder_module.FolderImages(pictures, config, pin_memory=True).batches()))
    assert [one["pin_memory"] for one in loaders] == [False, True]
    assert torch.equal(plain.images, pinned.images)


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(pictures, monkeypatch):
    main, decode = os.getpid(), folder_module.decode

    def killed(path, channels):
        if os.getpid() != main and path.stem == "7":
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
        return decode(path, channels)

    monkeypatch.setattr(folder_module, "decode", killed)
    with pytest.raises(ResourceError, match="A process that decodes images was killed"):
        cp.analyze("digits_vit_24b", pictures, workers=2, batch_size=4, metrics="attention_entropy")


def test_an_error_in_a_worker_keeps_its_kind(pictures, monkeypatch):
    """What is wrong with the code, and not with the machine, is not called a lack of memory."""

    def broken(*_):
        raise RuntimeError("DataLoader worker (pid 1) is only quoted here")

    monkeypatch.setattr(folder_module, "decode", broken)
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker process"):
        cp.analyze("digits_vit_24b", pictures, workers=1, metrics="attention_entropy")


KEPT = """
import sys, torch, collapse_probe as cp
from collapse_probe.loading import folder
folder.decode = lambda *_: 1 / 0
try:
    cp.analyze("digits_vit_24b", sys.argv[1], workers=2, batch_size=4, metrics="attention_entropy")
except ZeroDivisionError as error:
    sys.kept = error  # as an interactive session keeps its last error, and with it the loader and its processes
print("end")
"""


@pytest.mark.sweep
def test_processes_that_decode_never_hold_up_the_end(pictures):
    done = subprocess.run([sys.executable, "-c", KEPT, pictures], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
