"""The bundled weights and images, and the script that made them."""

from __future__ import annotations

import importlib.util
import json
import math
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from collapse_probe.models import bundled_images, bundled_weights

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_digits.py"


def _images() -> tuple[list[Image.Image], list[int]]:
    paths = sorted(bundled_images().glob("*.png"))
    return [Image.open(path) for path in paths], [int(path.stem.split("_label")[1]) for path in paths]


def test_weights_load_strictly_into_the_architecture_their_metadata_name() -> None:
    with safe_open(bundled_weights(), "pt") as file:
        metadata = file.metadata()
    assert {"architecture", "model_kwargs", "recipe", "mean", "std", "license"} <= set(metadata)
    model = timm.create_model(metadata["architecture"], **json.loads(metadata["model_kwargs"]))
    model.load_state_dict(load_file(bundled_weights()), strict=True)
    assert tuple(json.loads(metadata["mean"])) == model.pretrained_cfg["mean"]
    assert tuple(json.loads(metadata["std"])) == model.pretrained_cfg["std"]
    assert json.loads(metadata["recipe"])["test_accuracy"] >= 0.95


def test_files_are_small() -> None:
    assert bundled_weights().stat().st_size <= 4_000_000
    assert sum(path.stat().st_size for path in bundled_images().iterdir()) <= 64 * 200


def test_pretrained_model_recognises_the_bundled_images_through_timm_s_transform() -> None:
    model = timm.create_model("digits_vit_12b", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (1, 8, 8)
    transform = timm.data.create_transform(**config)
    images, labels = _images()
    with torch.inference_mode():
        predicted = model(torch.stack([transform(image) for image in images])).argmax(1)
    assert len(images) == 64
    assert set(labels) == set(range(10))
    assert (predicted == torch.tensor(labels)).double().mean() >= 0.95


def test_transform_neither_crops_nor_resamples() -> None:
    model = timm.create_model("digits_vit_12b")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = _images()[0][0]
    expected = (np.asarray(image, dtype=np.float64) / 255 - 0.305) / 0.376
    np.testing.assert_allclose(transform(image)[0].numpy(), expected, atol=1e-6)


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("sklearn", reason="scikit-learn brings the training images")
    specification = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_bundled_images_are_test_images_of_the_data_set(script: ModuleType) -> None:
    pixels, targets = script.load_pixels()
    train, test = script.split(targets)
    assert (len(train), len(test)) == (1347, 450)
    assert not set(train) & set(test)
    for path in bundled_images().glob("*.png"):
        index, label = (int(part) for part in path.stem.split("_label"))
        assert index in test
        assert label == targets[index]
        with Image.open(path) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), pixels[index])


def test_stated_accuracy_holds(script: ModuleType) -> None:
    pixels, targets = script.load_pixels()
    test = script.split(targets)[1]
    model = timm.create_model("digits_vit_12b", pretrained=True)
    reached = script.accuracy(model, torch.from_numpy(pixels[test]).unsqueeze(1) / 255, torch.from_numpy(targets[test]))
    with safe_open(bundled_weights(), "pt") as file:
        stated = json.loads(file.metadata()["recipe"])["test_accuracy"]
    # Two images of leeway: another build of torch may round a close call differently.
    assert reached == pytest.approx(stated, abs=2 / 450)
    assert reached >= 0.95


def test_learning_rate_rises_then_falls(script: ModuleType) -> None:
    rates = [script.learning_rate(step / 100, peak=2.0) for step in range(101)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == max(rates) == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))


def test_augmentation_moves_by_the_stated_amounts(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ROTATION", 0.0)
    monkeypatch.setattr(script, "ZOOM", 0.0)
    image = torch.zeros(200, 1, 8, 8)
    image[:, :, 3:5, 3:5] = 1.0
    torch.manual_seed(0)
    moved = script.augment(image)
    torch.testing.assert_close(moved.sum((1, 2, 3)), torch.full((200,), 4.0))
    centres = (moved * torch.arange(8.0)).sum((1, 2, 3)) / 4 - 3.5
    assert 0.9 < centres.abs().max() <= 1.0 + 1e-5
    monkeypatch.setattr(script, "SHIFT", 0.0)
    torch.testing.assert_close(script.augment(image), image)


def test_rotation_is_rigid(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ROTATION", 90.0), ("ZOOM", 0.0), ("SHIFT", 0.0)):
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.fill_(1.0))
    image = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(script.augment(image), image.rot90(1, (2, 3)), atol=1e-5, rtol=1e-5)


def test_an_interrupted_run_ends_with_the_same_weights(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"epochs": 2, "lr": 1e-3, "seed": 3, "limit": 32}
    script.main(out=tmp_path / "whole", **settings)
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert printed.err.count("epoch") == 2

    def interrupted(*arguments):
        if arguments[4] == 1:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    train_epoch = script.train_epoch
    monkeypatch.setattr(script, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(out=tmp_path / "parts", **settings)
    assert not (tmp_path / "parts" / "digits_vit_12b.safetensors").exists()
    monkeypatch.undo()
    script.main(out=tmp_path / "parts", **settings)

    whole, parts = (load_file(tmp_path / name / "digits_vit_12b.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert len(list((tmp_path / "parts" / "digits").glob("*.png"))) == 64
    with safe_open(tmp_path / "parts" / "digits_vit_12b.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert (recipe["epochs"], recipe["seed"], recipe["train_images"]) == (2, 3, 32)
    assert math.isfinite(recipe["test_accuracy"])


def test_a_folder_of_another_run_is_not_continued(script: ModuleType, tmp_path: Path) -> None:
    script.main(out=tmp_path, epochs=1, lr=1e-3, seed=0, limit=8)
    with pytest.raises(script.typer.BadParameter, match="belongs to a run with"):
        script.main(out=tmp_path, epochs=1, lr=1e-3, seed=1, limit=8)
