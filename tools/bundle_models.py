"""Make the models that ship with the package from two runs of the depth study on digits.

    python examples/depth_study.py --out study/ --depths 24 --seeds 1     # or the whole study
    python tools/bundle_models.py study/

writes `digits_vit_24b.safetensors`, `digits_deepvit_24b.safetensors` (seed 0) and the 64 test images with the lowest
indices to `collapse_probe/data/`. Architecture, recipe and test accuracy stand in the metadata of the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
import timm
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import image_sets
from study_runs import ARCHITECTURES

from collapse_probe.files import write_atomically
from collapse_probe.models import BUNDLED, bundled_images, bundled_weights

DEPTH, SEED, TEST_IMAGES = 24, 0, 64
DATASET = "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, test part), 1797 images, 8x8"
SPLIT = "train_test_split(range(1797), test_size=0.25, random_state=0, stratify=labels): 1347 train, 450 test"


def recipe_of(run: Path) -> dict[str, Any]:
    """How a run was trained and what it reached, for the metadata."""
    settings = json.loads((run / "run.json").read_text(encoding="utf-8"))
    if settings["data"]["name"] != "digits" or settings["training_images_at_most"] is not None:
        raise SystemExit(f"{run} was not trained on all of the digits.")
    end = pd.read_csv(run / "readings.csv").iloc[-1]
    return {
        "dataset": DATASET,
        "split": SPLIT,
        "script": "examples/depth_study.py",
        **settings["recipe"],
        "seed": SEED,
        "test_accuracy": round(float(end["test_accuracy"]), 4),
    }


def bundle(run: Path, name: str) -> None:
    """The weights of a run as a file that knows how to rebuild and to judge itself."""
    weights = safetensors.torch.load_file(run / "model" / "model.safetensors")
    model = timm.create_model(name)
    model.load_state_dict(weights)  # strictly: the registered architecture is the one that was trained
    metadata = {
        "architecture": name,
        "model_kwargs": "{}",
        "recipe": json.dumps(recipe_of(run)),
        "mean": json.dumps(model.pretrained_cfg["mean"]),
        "std": json.dumps(model.pretrained_cfg["std"]),
        "license": "Apache-2.0 (weights); the images they were trained on: CC BY 4.0",
    }
    path = write_atomically(bundled_weights(name), safetensors.torch.save(model.state_dict(), metadata=metadata))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {recipe_of(run)}")


def export_images() -> None:
    """The first test images as grey PNG files named by index and label."""
    digits = load_digits()
    bundled_images().mkdir(parents=True, exist_ok=True)
    for index in image_sets.digits_split(digits.target)[1][:TEST_IMAGES]:
        pixels = image_sets.digits_pixels(digits.images[index])
        Image.fromarray(pixels).save(bundled_images() / f"{index:04d}_label{digits.target[index]}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the --out folder of examples/depth_study.py")
    study = parser.parse_args().study
    for kind, name in zip(ARCHITECTURES, BUNDLED, strict=True):
        bundle(study / "runs" / f"{kind}-{DEPTH}-seed{SEED}", name)
    export_images()


if __name__ == "__main__":
    main()
