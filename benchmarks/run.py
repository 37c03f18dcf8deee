"""What an analysis costs over a plain forward pass, beside what people use today.

    python benchmarks/run.py --suite cpu            # about an hour on two cores
    python benchmarks/run.py --suite gpu --out benchmarks/results
    python benchmarks/run.py --suite cpu --models vit_tiny_patch16_224 --repeats 3

Each contender has a process of its own, where it and plain fused forward passes take turns on the same images,
`repeats` times; printed are medians with their spread, the ratio to the plain passes beside it, memory above such a
pass, the largest difference of M from a float64 reference, and the distance to the least that M can cost. Of an
analysis only images count that come after the first 64; what happens once, and comparing the first 64 images with each
other, is in the curve over the number of images. What is printed is also written to `--out`, with the machine's name,
and the curves over images, tokens, layers, heads and batch size beside it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from pathlib import Path

import timm
import torch
from contenders import PLAIN, chosen
from measuring import Setting, apart, in_words, largest_error, least, peak_memory, speeds
from scaling import draw, measure

from collapse_probe.allocator import large_pages

#: Model, pixels, images and batch of each row of a suite.
SUITES = {
    "cpu": [
        ("vit_tiny_patch16_224", 224, 128, 32),
        ("vit_small_patch16_224", 224, 64, 32),
        ("vit_base_patch16_224", 224, 32, 32),
        ("deepvit_32b", 224, 32, 32),
        ("deepvit_vit_32b", 224, 32, 32),
        ("vit_large_patch14_reg4_dinov2", 518, 4, 4),
        ("vit_base_patch16_224@1024", 1024, 2, 2),
    ],
    "gpu": [
        ("vit_tiny_patch16_224", 224, 1024, 256),
        ("vit_small_patch16_224", 224, 1024, 128),
        ("vit_base_patch16_224", 224, 512, 64),
        ("deepvit_32b", 224, 256, 64),
        ("deepvit_vit_32b", 224, 256, 64),
        ("vit_large_patch14_reg4_dinov2", 518, 32, 8),
        ("vit_base_patch16_224@1024", 1024, 8, 2),
    ],
}


def machine(device: str, threads: int) -> str:
    """What it ran on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    pages = ", tensors on large pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else ""
    return f"{threads} threads of {names[0] if names else platform.processor()} ({platform.machine()}){pages}"


def table(setting: Setting, repeats: int) -> str:
    """All contenders on one model; of passes that take many seconds, fewer do."""
    contenders = chosen(setting.model)
    repeats = -(-repeats // 2) if setting.size >= 500 else repeats
    lines = [
        f"{setting.model}: {setting.images} images of {setting.size} px in batches of {setting.batch}, {setting.dtype}",
        f"{'':40}{'ms/image':>10}{'min..max':>20}{'plain beside it':>18}{'ratio':>8}{'extra memory':>15}",
    ]
    found = {label: apart(setting, label, repeats) for label in contenders}
    lowest = {limit: peak_memory(setting, PLAIN, limit) for limit in {item.images for item in contenders.values()}}
    for label, item in found.items():
        (middle, spread), (base, _) = in_words(item.seconds), in_words(item.plain)
        memory = 0 if label == PLAIN else (item.peak - lowest[contenders[label].images]) / 2**20
        ratio = statistics.median(item.seconds) / statistics.median(item.plain)
        lines.append(f"  {label:38}{middle:10.1f}{spread:>20}{base:18.1f}{ratio:8.2f}{memory:11.0f} MiB")
    lines.append(f"  largest difference of M from float64: {largest_error(setting):.1e}")
    whole, capture = (found[label].seconds for label in ("M and its parts", "capture only"))
    own = 1000 * (statistics.median(whole) - statistics.median(capture))
    lines += [f"  {line}" for line in distance(setting, own)]
    return "\n".join(lines) + "\n"


def distance(setting: Setting, own: float) -> list[str]:
    """How far M, which takes `own` milliseconds per image beyond the capture, is from what it cannot do without."""
    floor = least(setting)
    if floor is None:
        return []
    reading, multiplying = speeds(setting)
    bytes_ms, operations_ms = 1000 * floor.bytes / reading, 1000 * floor.operations / multiplying
    return [
        f"least that M takes per image: {floor.bytes / 1e6:.1f} MB, {bytes_ms:.2f} ms at {reading / 1e9:.0f} GB/s; "
        f"{floor.operations / 1e9:.2f} G operations, {operations_ms:.2f} ms at {multiplying / 1e9:.0f} G/s",
        f"beyond the capture it takes {own:.2f} ms, {own / max(bytes_ms, operations_ms):.1f} times the larger",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, help="at most so many of each model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder for the text and the figure")
    parser.add_argument("--no-scaling", action="store_true", help="leave the curves out")
    options = parser.parse_args()
    device, dtype = ("cuda", "bfloat16") if options.suite == "gpu" else ("cpu", "float32")
    large_pages()  # as the command line does; processes that are started inherit it
    torch.set_num_threads(options.threads)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    parts: list[str] = []

    def say(part: str) -> None:
        """Print, and keep what is known so far: the whole takes an hour."""
        print(part, flush=True)
        parts.append(part)
        if options.out is not None:
            (options.out / f"{options.suite}.txt").write_text("\n".join(parts) + "\n", encoding="utf-8")

    where = f"{machine(device, options.threads)}, torch {torch.__version__}, timm {timm.__version__}"
    say(f"{where}\nmedian of {options.repeats}; suite {options.suite}\n")
    for model, size, images, batch in SUITES[options.suite]:
        if options.models and model not in options.models:
            continue
        images = min(images, options.images or images)
        setting = Setting(model, images, min(batch, images), size, device, dtype, options.threads)
        say(table(setting, options.repeats))
    if not options.no_scaling:
        curves = measure(device, dtype, options.threads, options.repeats)
        say(curves.to_string(index=False, float_format="{:.2f}".format))
        if options.out is not None:
            draw(curves, options.out / f"{options.suite}_scaling.png", where)


if __name__ == "__main__":
    main()
