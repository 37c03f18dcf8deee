"""Memory of the CPU: what one batch frees is kept for the next one, and large tensors lie on large pages."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's numbers of its settings (malloc.h), and where its own adaptation of them ends on 64-bit machines.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_ADAPTED = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}

#: Blocks up to the first size come from memory that is kept; of what is free, up to the second size is kept.
_KEPT = {_MMAP_THRESHOLD: 256 << 20, _TRIM_THRESHOLD: 2**31 - 1}


def large_pages() -> None:
    """Ask PyTorch to put tensors of 2 MiB or more on pages of that size (Linux, where the kernel lets programs choose).

    Passes get a few per cent faster, and memory has fewer holes, as blocks begin at multiples of a page. PyTorch looks
    at the environment when it makes its first tensor; a choice of the user's own holds.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let the C library keep what is freed, and give it back at the end.

    Every batch allocates the same blocks. glibc returns large ones to the system when they are freed, which then hands
    out fresh pages, zeroed one by one: that can take longer than the computing. Other C libraries are left alone.
    """
    library = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if library is None:
        yield
        return
    _set(library, _KEPT)
    try:
        yield
    finally:
        _set(library, _ADAPTED)
        library.malloc_trim(0)


def _set(library: ctypes.CDLL, settings: dict[int, int]) -> None:
    for name, value in settings.items():
        library.mallopt(name, value)
