"""Where the time of M goes: a plain forward pass and the analysis of the same images under PyTorch's profiler.

    python benchmarks/profiling.py --out benchmarks/results/profile.txt

A batch that comes late in an analysis, operators by the time that they take themselves. On one thread: the profiler has
one of its own, and where there are no more cores than threads it makes them wait for each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from contenders import plain, suite, timm_model
from measuring import Setting
from run import machine
from torch.profiler import ProfilerActivity, profile

from collapse_probe.allocator import kept_memory

MODELS = [("vit_base_patch16_224", 16), ("deepvit_vit_32b", 16)]

#: Of so many batches the last is looked at: memory is fetched from the system on earlier ones.
BATCHES = 4


def table(model: str, batch: int, device: str, threads: int, most: int = 12) -> str:
    """The operators that take most, of a plain pass and of a pass with M."""
    network = timm_model(model).to(device)
    images = Setting(model, BATCHES * batch, batch, 224, device, "float32", threads).batches()
    lines = [f"{model}, {batch} images of 224 px, ms per image"]
    watched = Watched(device)
    with kept_memory():  # as in an analysis
        plain(network, images[:-1])
        with watched.looking():
            plain(network, images[-1:])
    lines += watched.lines("plain forward", batch, most)
    suite("cross_layer_similarity", network, images, watched.looking)
    lines += watched.lines("M and its parts", batch, most)
    return "\n".join(lines) + "\n"


class Watched:
    """What PyTorch's profiler saw."""

    def __init__(self, device: str) -> None:
        self._own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self._found = profile(activities=self._activities)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """While it lasts, what runs is seen."""
        self._found = profile(activities=self._activities)
        with self._found:
            yield

    def lines(self, label: str, images: int, most: int) -> list[str]:
        """The operators by their own time, in milliseconds per image."""
        events = sorted(self._found.key_averages(), key=self._time, reverse=True)
        total = sum(map(self._time, events))
        lines = [f"  {label}: {total / 1000 / images:.1f} ms"]
        for event in events[:most]:
            share = self._time(event)
            lines.append(
                f"    {event.key:48}{share / 1000 / images:8.2f} ms {share / total:6.1%} {event.count:7} calls"
            )
        return lines

    def _time(self, event: object) -> float:
        return float(getattr(event, self._own))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file for the text")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = [f"{machine(device, options.threads)}, torch {torch.__version__}\n"]
    parts += [table(model, batch, device, options.threads) for model, batch in MODELS]
    text = "\n".join(parts)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
