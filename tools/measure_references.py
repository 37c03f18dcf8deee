"""Measure what readings come to in models that are known, and write `collapse_probe/data/references.csv`.

python tools/measure_references.py --weights deit_tiny_patch16_224.safetensors --photographs folder/

Trained models that work give the healthy ranges; an untrained network of the same shape shows what a reading comes to
without any training. A range is from the smallest to the largest mean over images of any block.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import collapse_probe as cp
from collapse_probe.files import write_atomically
from collapse_probe.plots.select import column
from collapse_probe.readings import READINGS
from collapse_probe.result import Analysis

TABLE = Path(cp.__file__).parent / "data" / "references.csv"


def rows(model: str, healthy: bool, analysis: Analysis) -> list[list[str]]:
    """A row for each reading that the analysis has."""
    found = []
    for reading in READINGS:
        values = column(analysis.layers, reading)
        values = values[np.isfinite(values)]
        if len(values):
            ends = (f"{value:.4g}" for value in (values.min(), values.max()))
            found.append([model, "yes" if healthy else "no", reading, *ends])
    return found


def main(
    weights: Annotated[Path, typer.Option(help="DeiT-Ti, trained on ImageNet-1k.")],
    photographs: Annotated[Path, typer.Option(help="Folder of photographs of ImageNet's classes.")],
) -> None:
    """Analyse the models and write the table."""
    name, settings = "deit_tiny_patch16_224", {"metrics": "all", "progress": True}
    deit = cp.analyze(name, photographs, checkpoint=weights, **settings)
    untrained = cp.analyze(name, photographs, pretrained=False, **settings)
    found = [
        *rows("ViT (DeiT-Ti, ImageNet)", True, deit),
        *rows("ViT (24 small blocks, digits)", True, cp.analyze("digits_vit_24b", **settings)),
        *rows("DeepViT (24 small blocks, digits)", True, cp.analyze("digits_deepvit_24b", **settings)),
        *rows("untrained ViT-Ti", False, untrained),
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "healthy", "reading", "low", "high"])
    writer.writerows(found)
    write_atomically(TABLE, text.getvalue())
    print(f"{len(found)} ranges written to {TABLE}")


if __name__ == "__main__":
    typer.run(main)
