"""Images per second with several processes, and what that means for all of ImageNet's validation images.

    python benchmarks/scale_out.py                          # about 8 minutes on two cores
    python benchmarks/scale_out.py --processes 1 2 4 8      # on a machine with eight GPUs, one for each process

JPEG files of ImageNet's usual size are made first. Each row is an analysis of them under `torchrun`, decoding included:
images per second while it runs, from the first batch to the last, and the seconds around that, which do not grow with
images: importing libraries, building the model, the first batch, and adding up and reading out what all processes have.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from run import machine

from collapse_probe.allocator import large_pages

VALIDATION = 50_000  # images in ImageNet-1k's validation set
ROWS = [("vit_tiny_patch16_224", "cross_layer_similarity"), ("vit_tiny_patch16_224", "fast"),
        ("vit_base_patch16_224", "cross_layer_similarity"), ("vit_base_patch16_224", "fast")]  # fmt: skip


class Clock:
    """Notes when a batch was done."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, int]] = []

    def __call__(self, done: int, _total: int | None) -> None:
        self.ticks.append((time.perf_counter(), done))

    def note(self, text: str) -> None:
        """Nobody reads along."""


def work(model: str, metrics: str, folder: str, batch: int) -> None:
    """What one of the processes does; the line that it prints is for :func:`measured`."""
    import timm

    import collapse_probe as cp

    torch.manual_seed(0)
    clock = Clock()
    cp.analyze(
        timm.create_model(model), folder, metrics=metrics, batch_size=batch, distributed=True, progress=clock,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    (start, first), (stop, last) = clock.ticks[0], clock.ticks[-1]
    print(json.dumps({"images": last - first, "seconds": stop - start}), flush=True)


def measured(model: str, metrics: str, processes: int, folder: str, batch: int) -> tuple[float, float]:
    """Images per second of all processes together, and the seconds around that."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), __file__,
         "--work", model, metrics, folder, str(batch)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    whole = time.perf_counter() - start
    parts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    speed = sum(part["images"] / part["seconds"] for part in parts)
    return speed, whole - max(part["seconds"] for part in parts)


def photographs(folder: Path, count: int) -> None:
    """JPEG files that take as long to decode as photographs do: smooth colours and some noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        pixels = np.asarray(small, dtype=np.int16) + rng.integers(-12, 13, (375, 500, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=92)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="images of a forward pass in one process")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, help="folder for the text")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        model, metrics, images, batch = options.work
        return work(model, metrics, images, int(batch))
    large_pages()  # as the command line does; the processes inherit it
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines: list[str] = []

    def say(line: str = "") -> None:
        print(line, flush=True)
        lines.append(line)

    where = f"{machine(device, torch.get_num_threads())}, torch {torch.__version__}"
    say(f"{where}; {options.images} JPEG files of 500 x 375")
    say(f"\n{'model':24}{'metrics':26}{'processes':>10}{'images/s':>10}{'speed-up':>10}{'around, s':>11}"
        f"{f'{VALIDATION:,} images':>18}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), options.images)
        for model, metrics in ROWS:
            if options.models and model not in options.models:
                continue
            alone = None
            for processes in options.processes:
                speed, around = measured(model, metrics, processes, folder, options.batch)
                alone = alone or speed / processes
                minutes = (VALIDATION / speed + around) / 60
                figures = f"{speed:10.1f}{speed / alone:10.2f}{around:11.1f}{minutes:14.0f} min"
                say(f"{model:24}{metrics:26}{processes:10}{figures}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"scale_out_{device}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
