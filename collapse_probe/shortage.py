"""What to say where memory does not hold a single image, or a process that decodes images was killed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from collapse_probe.errors import ResourceError

#: How allocators say what they were asked for: CUDA and MPS, then CPUs.
_ASKED = (
    re.compile(r"[Tt]ried to allocate ([0-9.]+ [KMGTPE]i?B)"),
    re.compile(r"tried to allocate ([0-9]+) bytes"),
    re.compile(r"Unable to allocate ([0-9.]+ [KMGTPE]i?B)"),
)


def out_of_memory(error: Exception, device: torch.device, images: int, model: nn.Module | None = None) -> ResourceError:
    """The error for the caller, with what is known of sizes.

    Args:
        error: what the allocator raised.
        device: where the model is.
        images: how many images were measured before.
        model: where its weights take part in the shortage.
    """
    known = [f"{words} {size}" for words, size in _sizes(error, device, model) if size]
    after = f" after {images} images" if images else ""
    return ResourceError(
        f"Out of memory{after}, even with one image at a time{': ' if known else ''}{', '.join(known)}. Use smaller "
        "images (--img-size), fewer metrics or layers (--metrics, --layers), or a device with more memory."
    )


def lost_worker(error: Exception) -> ResourceError | None:
    """The error for the caller where PyTorch says that a process decoding images is gone; None where it does not."""
    if not re.match(r"DataLoader worker \(pid(\(s\))? ", str(error)):
        return None
    return ResourceError(
        "A process that decodes images was killed, most likely because memory, or shared memory (/dev/shm, in "
        "containers often 64 MiB), ran out. Use fewer of them (--workers; 0 needs none) or a smaller --batch-size."
    )


def _sizes(error: Exception, device: torch.device, model: nn.Module | None) -> list[tuple[str, str]]:
    weights = 0 if model is None else sum(item.nbytes for item in (*model.parameters(), *model.buffers()))
    return [
        ("the model's weights take", _words(weights)),
        ("what did not fit asked for", _asked(str(error))),
        ("free are", _words(_free(device))),
    ]


def _asked(text: str) -> str:
    """What the allocation that failed asked for, where the error tells."""
    for pattern in _ASKED:
        if found := pattern.search(text):
            return _words(int(found[1])) if found[1].isdigit() else found[1]
    return ""


def _free(device: torch.device) -> int:
    """Bytes; 0 where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return 0
    return int(available[1]) * 1024 if available else 0


def _words(size: int) -> str:
    """Bytes in words; nothing for none."""
    if not size:
        return ""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
