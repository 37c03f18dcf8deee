"""Sweep the zoo of the tests and write `docs/capture_sweep.md`: how exact captured maps are, family by family.

python tools/sweep_capture.py            # about a quarter of an hour on one core
python tools/sweep_capture.py 'swin*'    # print some rows, write nothing
"""

from __future__ import annotations

import collections
import contextlib
import fnmatch
import sys
import warnings
from pathlib import Path

import timm
import torch
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "capture"))

from _zoo import ZOO, build, examine, sharpness  # noqa: E402

import collapse_probe.models  # noqa: E402, F401  # registers the bundled architectures

INTRO = """# How exact are captured maps?

One model or more for every source file and attention class of timm, with weights moved until attention is peaked
(freshly initialised maps are nearly uniform and agree with anything). Made by `python tools/sweep_capture.py` with
torch {torch}, timm {timm}.

- *kernels*: softmaxes and attention kernels that ran = those in maps + those named with a reason;
- *entropy*: mean entropy of the softmaxes over log K (1 would be uniform);
- *graph*: largest difference of a map, by rows or by columns, from the map that the graph of an ordinary pass shows
  (queries and keys of fused calls multiplied out in float64, operands of explicit products), relative to its largest
  entry;
- *product*: largest difference of map times values from what the model computed in the same pass, relative likewise;
  with fused kernels on.

In float32 unless said otherwise. Outputs under capture equal those without, bit for bit, for all of them.

| model | kernels | maps | entropy | graph | product | graph, float64 | named |
|---|---|---|---|---|---|---|---|
"""


def row(name: str) -> str:
    model, images = build(name)
    entropy = sharpness(model, images)[0]
    same, fused = (examine(model, images, mode) for mode in (contextlib.nullcontext, torch.no_grad))
    double = examine(model.double(), images.double(), contextlib.nullcontext)
    proof = fused.captured.verification
    assert proof is not None
    if not proof.passed or proof.kernels != proof.captured + proof.named:
        raise SystemExit(f"{name}: {proof}")
    kinds = collections.Counter(item.kind for item in fused.captured.maps.values())
    cells = [
        name,
        f"{proof.kernels} = {proof.captured} + {proof.named}",
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "–",
        f"{entropy:.2f}" if entropy == entropy else "–",
        *(f"{max(found.errors.values()):.0e}" if found.errors else "–" for found in (same,)),
        f"{proof.largest_error:.0e}" if proof.errors else "–",
        f"{max(double.errors.values()):.0e}" if double.errors else "–",
        "; ".join(sorted({_short(reason) for reason in fused.captured.not_captured.values()})) or "",
    ]
    return f"| {' | '.join(cells)} |"


def _short(reason: str) -> str:
    if "a gate" in reason:
        return "gate"
    return "softmax across images" if "images of the batch" in reason else "convolution instead of attention"


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_flush_denormal(True)
    patterns = sys.argv[1:]
    names = [name for name in ZOO if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    rows = [row(name) for name in track(names, description="Sweeping")]
    if patterns:
        print("\n".join(rows))
        return
    versions = {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__}
    (ROOT / "docs" / "capture_sweep.md").write_text(INTRO.format(**versions) + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
