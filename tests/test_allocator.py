"""Memory that is kept between batches."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import resource
from collapse_probe.allocator import kept_memory

def fetched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = bytearray(100 << 20)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

with kept_memory():
    print(fetched(), held())
print(fetched(), held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_blocks_are_used_again_and_given_back_at_the_end():
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    (kept, while_kept), (fetched, afterwards) = (map(int, line.split()) for line in done.stdout.splitlines())
    pages = (100 << 20) // resource.getpagesize()
    assert kept < 2 * pages, "blocks were fetched anew each time"
    assert fetched > 10 * pages, "the settings outlived the run"
    assert while_kept > afterwards + 90, "memory was not given back"


def test_other_c_libraries_are_left_alone(monkeypatch):
    from collapse_probe import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda *_: pytest.fail("loaded a C library"))
    with allocator.kept_memory():
        pass


_TENSOR = """
import sys
from collapse_probe.allocator import large_pages

if "large" in sys.argv:
    large_pages()
import torch

block = torch.ones(64 << 20, dtype=torch.uint8)
words = open("/proc/self/smaps_rollup").read().split()
print(int(words[words.index("AnonHugePages:") + 1]) >> 10)
"""


def _on_large_pages(*words, **environment):
    """MiB of a process with a tensor of 64 MiB that lie on large pages."""
    own = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", _TENSOR, *words]
    return int(subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True).stdout)


def test_large_tensors_lie_on_large_pages_unless_the_user_says_otherwise():
    choice = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not choice.exists() or "[madvise]" not in choice.read_text():
        pytest.skip("the kernel does not let programs choose large pages")
    if _on_large_pages(THP_MEM_ALLOC_ENABLE="1") < 60:
        pytest.skip("this PyTorch or this kernel has no large pages to give")
    assert _on_large_pages("large") >= 60
    assert _on_large_pages("large", THP_MEM_ALLOC_ENABLE="0") < 16
