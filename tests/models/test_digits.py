"""The bundled weights and images: they load, they are what their metadata say, and they show what they ship for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import collapse_probe as cp
from collapse_probe.models import BUNDLED, bundled_images, bundled_weights

both = pytest.mark.parametrize("name", BUNDLED)


def _metadata(name: str) -> dict[str, str]:
    with safe_open(bundled_weights(name), "pt") as file:
        return file.metadata()


def _images() -> tuple[list[Image.Image], list[int]]:
    paths = sorted(bundled_images().glob("*.png"))
    return [Image.open(path) for path in paths], [int(path.stem.split("_label")[1]) for path in paths]


@both
def test_weights_load_strictly_into_the_architecture_their_metadata_name(name: str) -> None:
    metadata = _metadata(name)
    assert {"architecture", "model_kwargs", "recipe", "mean", "std", "license"} <= set(metadata)
    assert metadata["architecture"] == name
    model = timm.create_model(name, **json.loads(metadata["model_kwargs"]))
    model.load_state_dict(load_file(bundled_weights(name)), strict=True)
    assert tuple(json.loads(metadata["mean"])) == model.pretrained_cfg["mean"]
    assert tuple(json.loads(metadata["std"])) == model.pretrained_cfg["std"]
    assert len(model.blocks) == 24


def test_the_pair_differs_in_re_attention_only() -> None:
    plain, mixed = (timm.create_model(name) for name in BUNDLED)
    additional = set(mixed.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) < set(mixed.state_dict())
    assert {key.split(".")[3] for key in additional} == {"reatten_matrix", "var_norm"}
    recipes = [json.loads(_metadata(name)["recipe"]) for name in BUNDLED]
    for recipe in recipes:
        del recipe["test_accuracy"]
    assert recipes[0] == recipes[1]


def test_files_are_small() -> None:
    for name in BUNDLED:
        assert bundled_weights(name).stat().st_size <= 4_000_000
    assert sum(path.stat().st_size for path in bundled_images().iterdir()) <= 64 * 200


@both
def test_pretrained_models_recognise_the_bundled_images_through_timm_s_transform(name: str) -> None:
    model = timm.create_model(name, pretrained=True).eval()
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
    model = timm.create_model("digits_vit_24b")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = _images()[0][0]
    expected = (np.asarray(image, dtype=np.float64) / 255 - 0.305) / 0.376
    np.testing.assert_allclose(transform(image)[0].numpy(), expected, atol=1e-6)


# -- where they come from ----------------------------------------------------------------------------------------------


def test_bundled_images_are_test_images_of_the_data_set() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings the training images")
    import image_sets

    digits = sklearn_datasets.load_digits()
    _, test = image_sets.digits_split(digits.target)
    for path in bundled_images().glob("*.png"):
        index, label = (int(part) for part in path.stem.split("_label"))
        assert index in test
        assert label == digits.target[index]
        with Image.open(path) as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), np.rint(digits.images[index] * 255 / 16))


@both
def test_stated_accuracy_holds(name: str, tmp_path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn brings the test images")
    import image_sets
    from training import accuracy

    image_sets.prepare("digits", tmp_path, 8, tmp_path / "data", lambda *_: None)
    data = image_sets.load(tmp_path / "data")
    model = timm.create_model(name, pretrained=True)
    assert (data.mean, data.std) == (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    stated = json.loads(_metadata(name)["recipe"])["test_accuracy"]
    # Two images of leeway: another build of torch may round a close call differently.
    assert accuracy(model, data) == pytest.approx(stated, abs=2 / 450)
    assert stated >= 0.95


# -- what they show ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown() -> dict[str, cp.Analysis]:
    plain, mixed = BUNDLED
    return {
        "vit": cp.analyze(plain),
        "deepvit": cp.analyze(mixed),
        "underneath": cp.analyze(mixed, attention="softmax"),
    }


def test_re_attention_takes_the_likeness_out_of_the_maps(shown: dict[str, cp.Analysis]) -> None:
    assert 0.65 < shown["vit"].layers["similarity_to_previous"].mean() < 0.75
    assert shown["vit"].groups[0].derived["similar_blocks"]["value"] == 0
    assert shown["deepvit"].layers["similarity_to_previous"].abs().mean() < 0.2


def test_the_likeness_is_there_between_different_images(shown: dict[str, cp.Analysis]) -> None:
    layers = shown["vit"].layers
    assert layers["excess_to_previous"].abs().mean() < 0.05
    assert layers["centred_to_previous"].abs().mean() < 0.2


def test_softmax_maps_under_re_attention_are_uniform_and_the_verdict_says_so(shown: dict[str, cp.Analysis]) -> None:
    finding = shown["underneath"].finding("uniform-attention")
    assert finding is not None
    assert finding.severity == "warning"
    assert "although this network has been trained" in finding.title
    assert shown["underneath"].layers["similarity_to_previous"].mean() > 0.95
    assert shown["underneath"].layers["normalized_entropy"].min() > 0.9
    assert shown["vit"].finding("uniform-attention") is None or (
        shown["vit"].finding("uniform-attention").severity == "note"
    )


def test_the_introduction_of_the_demonstration_states_the_accuracies() -> None:
    from collapse_probe.cli.bundled import introduction

    words = " ".join(introduction())
    for name in BUNDLED:
        assert f"{json.loads(_metadata(name)['recipe'])['test_accuracy']:.1%}".replace("%", " %") in words


def test_the_verdict_knows_that_these_maps_are_mixed_before_they_are_applied(shown: dict[str, cp.Analysis]) -> None:
    for side in ("deepvit", "underneath"):
        finding = shown[side].finding("uniform-attention")
        assert "before it is mixed over the heads" in finding.title
        assert "replaced by a mean" not in finding.advice
