"""The model's preprocessing: timm's values, the caller's overrides, and what the built model really takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from collapse_probe.errors import UsageError
from collapse_probe.loading import data_config
from collapse_probe.loading.data_config import make_transform

Build = Callable[..., nn.Module]


def test_timms_own_values() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=1)
    assert data_config(model) == {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.9,
        "crop_mode": "center",
    }


def test_size_and_channels_are_those_of_the_built_model(tiny: Build) -> None:
    config = data_config(tiny(in_chans=1))
    assert config["input_size"] == (1, 32, 32)
    assert config["mean"] == (0.5,)
    assert config["std"] == (0.5,)


def test_model_that_timm_does_not_know() -> None:
    config = data_config(nn.Linear(2, 2))
    assert config["input_size"] == (3, 224, 224)
    assert len(config["mean"]) == 3


def test_overrides(tiny: Build) -> None:
    config = data_config(tiny(), img_size=48, mean=[0.1], std=[1, 2, 3], crop_pct=1.0, interpolation="bilinear")
    assert config["input_size"] == (3, 48, 48)
    assert config["mean"] == (0.1, 0.1, 0.1)
    assert config["std"] == (1.0, 2.0, 3.0)
    assert config["crop_pct"] == 1.0
    assert config["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"img_size": 0}, "img_size=0 must be a whole number of pixels, 1 or more"),
        ({"crop_pct": 0.0}, r"crop_pct=0.0 must lie in \(0, 1\]"),
        ({"crop_pct": 1.5}, r"crop_pct=1.5 must lie in \(0, 1\]"),
        ({"interpolation": "cubic"}, "interpolation='cubic' is not one of nearest, bilinear"),
        ({"mean": [0.5, 0.5]}, "has 2 values; the model takes images of 3 channels"),
        ({"std": [0.5, 0.0, 0.5]}, "must be finite and above 0"),
        ({"mean": [float("nan")]}, "must be finite"),
    ],
)
def test_bad_overrides(tiny: Build, arguments: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UsageError, match=fragment):
        data_config(tiny(), **arguments)


def test_transform_resizes_the_shorter_side_and_crops_the_centre(tiny: Build) -> None:
    config = data_config(tiny(), crop_pct=0.5, mean=[0.25], std=[0.5], interpolation="bilinear")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8))
    resized = np.asarray(image.resize((80, 64), Image.Resampling.BILINEAR), dtype=np.float64)
    expected = (resized[16:48, 24:56] / 255 - 0.25) / 0.5
    got = make_transform(config)(image)
    assert got.shape == (3, 32, 32)
    assert np.abs(got.permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_transform_for_one_channel(tiny: Build) -> None:
    config = data_config(tiny(in_chans=1), mean=[0.25], std=[0.5])
    got = make_transform(config)(Image.new("L", (40, 40), 51))
    assert got.shape == (1, 32, 32)
    assert torch.allclose(got, torch.tensor((0.2 - 0.25) / 0.5))
