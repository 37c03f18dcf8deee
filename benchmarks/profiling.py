"""Where the time of M goes: a plain forward pass and the analysis of the same images under PyTorch's profiler.

    python benchmarks/profiling.py --out benchmarks/results/profile.txt

One batch after a warm-up, operators by the time that they take themselves.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from contenders import plain, suite
from measuring import Setting
from run import machine
from torch.profiler import ProfilerActivity, profile

MODELS = [("vit_base_patch16_224", 32), ("deepvit_vit_32b", 32)]
CONTENDERS = {"plain forward": plain, "M and its parts": partial(suite, "cross_layer_similarity")}


def table(model: str, batch: int, device: str, threads: int, most: int = 9) -> str:
    """The operators that take most, by contender."""
    from contenders import timm_model

    setting = Setting(model, batch, batch, 224, device, "float32", threads)
    network, batches = timm_model(model).to(device), setting.batches()
    lines = [f"{model}, {batch} images of 224 px"]
    for label, run in CONTENDERS.items():
        run(network, batches)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        with profile(activities=activities) as found:
            run(network, batches)
        own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        events = sorted(found.key_averages(), key=lambda event: -getattr(event, own))
        total = sum(getattr(event, own) for event in events)
        lines.append(f"  {label}: {total / 1000:.0f} ms")
        for event in events[:most]:
            share = getattr(event, own)
            lines.append(f"    {event.key:44}{share / 1000:9.1f} ms {share / total:6.1%} {event.count:7} calls")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
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
