"""One image through one model: the maps, M and the picture are what a naive reading of the model gives."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose
from PIL import Image
from torch import nn

import collapse_probe as cp
from collapse_probe import looking
from collapse_probe.errors import CaptureError, ImagesError, ResourceError, UsageError
from collapse_probe.rollout import attention_rollout, rollout
from tests.shared_data import shared_data

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}


def built(name="vit_tiny_patch16_224", spread=0.2, **kwargs):
    """A small model whose attention is far from uniform."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * spread)
    return model


@pytest.fixture(scope="module")
def model():
    return built(**SMALL)


@pytest.fixture(scope="module")
def image():
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def look(model, image):
    return cp.look_at(model, image)


def _reference_maps(model, image):
    """Block by block in float64, without fused attention: `[L, H, T, T]`."""
    model = copy.deepcopy(model).double()
    maps = []
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image.double()[None]))))
        for block in model.blocks:
            layer = block.attn
            tokens = block.norm1(x)
            _, count, width = tokens.shape
            qkv = layer.qkv(tokens).reshape(count, 3, layer.num_heads, width // layer.num_heads)
            q, k, _ = (qkv[:, part].transpose(0, 1) for part in range(3))
            maps.append(torch.stack([(q[h] @ k[h].T / q.shape[-1] ** 0.5).softmax(-1) for h in range(layer.num_heads)]))
            x = block(x)
    return torch.stack(maps).numpy()


def _reference_similarity(one, other, key):
    """M of one column, by DeepViT's equation 2."""
    dot = sum(float(a) * float(b) for a, b in zip(one[:, key], other[:, key], strict=True))
    sizes = [sum(float(a) ** 2 for a in item[:, key]) ** 0.5 for item in (one, other)]
    return dot / (sizes[0] * sizes[1])


def _reference_rollout(maps):
    """Abnar and Zuidema: average heads, add half an identity, normalise, multiply."""
    result, steps = np.eye(maps.shape[-1]), []
    for attention in maps:
        mixed = 0.5 * attention.mean(0) + 0.5 * np.eye(len(attention[0]))
        for row in range(len(mixed)):
            mixed[row] = mixed[row] / mixed[row].sum()
        result = mixed @ result
        steps.append(result)
    return steps


def test_maps_are_those_of_a_naive_forward_pass(model, image, look):
    expected = _reference_maps(model, image)
    assert list(look.layers) == look.order == [f"blocks.{number}.attn" for number in range(4)]
    for number, layer in enumerate(look.layers.values()):
        assert layer.number == number
        assert sorted(layer.maps) == [0, 1, 2]
        for head, attention in layer.maps.items():
            assert attention.dtype == np.float32
            assert_allclose(attention, expected[number, head], atol=2e-6)
        assert_allclose(layer.mean, expected[number].mean(0), atol=2e-6)
        assert (layer.prefix_tokens, layer.grid, layer.query_prefix, layer.query_grid) == (1, (4, 4), 1, (4, 4))
        assert layer.class_token
        assert layer.is_probability
        assert layer.block == f"blocks.{number}"


def test_m_is_the_cosine_of_columns_and_the_analysis_m(model, image, look):
    expected = _reference_maps(model, image)
    layers = list(look.layers.values())
    assert layers[0].similarity is None
    assert layers[0].previous is None
    for number, layer in enumerate(layers[1:], start=1):
        assert layer.previous == layers[number - 1].name
        for head in range(3):
            for key in range(17):
                m = _reference_similarity(expected[number - 1, head], expected[number, head], key)
                assert layer.similarity[head, key] == pytest.approx(m, abs=1e-5)
    analysis = cp.analyze(model, image[None])
    assert_allclose(
        [layer.similarity.mean() for layer in layers[1:]], analysis.layers["similarity_to_previous"][1:], atol=1e-6
    )


def test_tiles_do_not_show(model, image, look, monkeypatch):
    monkeypatch.setattr(looking, "_TILE", 120)
    again = cp.look_at(model, image)
    for name, layer in look.layers.items():
        assert_allclose(again.layers[name].mean, layer.mean, atol=1e-6)
        assert_allclose(again.layers[name].maps[2], layer.maps[2], atol=1e-6)
        if layer.similarity is not None:
            assert_allclose(again.layers[name].similarity, layer.similarity, atol=1e-6)


def test_rollout_is_the_naive_product(model, image, look):
    expected = _reference_rollout(_reference_maps(model, image))
    for query, row in (("class", 0), ((2, 3), 1 + 2 * 4 + 3), (5, 5)):
        layers, found = attention_rollout(look, query)
        assert [layer.name for layer in layers] == list(look.layers)
        assert_allclose(found, [step[row] for step in expected], atol=2e-6)
        assert_allclose(found.sum(1), 1, atol=1e-6)
    _, found = attention_rollout(look, "mean")
    assert_allclose(found, [step.mean(0) for step in expected], atol=2e-6)


def test_rollout_normalises_rows_that_are_masked():
    draw = np.random.default_rng(0)
    maps = draw.random((3, 2, 5, 5))
    maps /= maps.sum(-1, keepdims=True)
    maps[1, :, 2] = 0
    found = rollout([attention.mean(0) for attention in maps], np.eye(5)[2])
    assert_allclose(found, [step[2] for step in _reference_rollout(maps)], atol=1e-12)


def test_a_file_is_shown_as_the_model_saw_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    seen = cp.look_at(built(**SMALL), path, crop_pct=1.0, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.1])
    assert_allclose(seen.picture, pixels / 255, atol=1e-5)
    assert seen.provenance["image"] == str(path)
    assert seen.provenance["preprocessing"]["mean"] == (0.4, 0.5, 0.6)


def test_a_tensor_is_shown_stretched(look, image):
    assert look.picture.shape == (32, 32, 3)
    low, high = float(image.min()), float(image.max())
    assert_allclose(look.picture, (image.movedim(0, -1).numpy() - low) / (high - low), atol=1e-6)
    assert look.provenance["image"] == "a tensor"


def test_layers_and_heads_that_are_kept(model, image):
    seen = cp.look_at(model, image[None], layers=[0, -1], heads=[2, 0])
    assert [sorted(layer.maps) for layer in seen.layers.values()] == [[0, 2], [], [], [0, 2]]
    assert all(not layer.maps for layer in cp.look_at(model, image, heads=()).layers.values())
    assert [layer.name for layer in seen.choose("blocks.[12].*")] == ["blocks.1.attn", "blocks.2.attn"]
    with pytest.raises(UsageError, match=r"blocks\.0\.attn has no head 3; it has 3"):
        cp.look_at(model, image, heads=[3])
    with pytest.raises(UsageError, match="There is no layer 4: 4 attend, counted from 0"):
        cp.look_at(model, image, layers=4)
    with pytest.raises(UsageError, match=r"No layer is called 'stages\.\*'; there are blocks\.0\.attn"):
        cp.look_at(model, image, layers="stages.*")
    with pytest.raises(UsageError, match="layers is empty"):
        seen.choose([])


def test_maps_that_take_too_much_are_refused_before_they_are_made(model, image, monkeypatch):
    monkeypatch.setattr(looking, "MOST_BYTES", 4 * 17 * 17 * 4 * 3)
    with pytest.raises(ResourceError, match=r"The maps would take .* GiB, more than"):
        cp.look_at(model, image)
    cp.look_at(model, image, layers=[3], heads=[0])
    monkeypatch.setattr(looking, "MOST_BYTES", 4 * 17 * 17)
    with pytest.raises(ResourceError, match="heads=\\(\\)"):
        cp.look_at(model, image, heads=())


def test_the_model_is_left_as_it_was(image):
    model = built(**SMALL).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cp.look_at(model, image)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "kwargs", "prefix", "class_token"),
    [
        ("vit_small_patch14_reg4_dinov2", {**SMALL, "patch_size": 8}, 5, True),
        ("vit_base_patch16_siglip_224", SMALL, 0, False),
        ("vit_medium_patch16_reg4_gap_256", SMALL, 4, False),
    ],
)
def test_registers_and_models_without_class_token(name, kwargs, prefix, class_token, image):
    seen = cp.look_at(built(name, **kwargs), image, heads=())
    layer = seen.layers["blocks.3.attn"]
    assert (layer.prefix_tokens, layer.grid, layer.class_token) == (prefix, (4, 4), class_token)
    layers, values = attention_rollout(seen, "mean")
    assert len(layers) == len(values) == 4  # a pooling head may follow
    if not class_token:
        with pytest.raises(UsageError, match="has no class token among its queries"):
            layer.query_weights("class")


def test_windows_are_left_out_and_end_rollout():
    swin = built(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(2, 2, 1), num_heads=(2, 3, 3)
    )
    seen = cp.look_at(swin, torch.randn(3, 64, 64))
    reason = "its attention stays within 16 windows of 16 tokens"
    assert seen.left_out["layers.0.blocks.0.attn"] == reason
    assert all(name in seen.left_out for name in ("layers.0.blocks.1.attn", "layers.1.blocks.0.attn"))
    with pytest.raises(UsageError, match=f"layers.0.blocks.0.attn cannot be laid over the image: {reason}"):
        seen.choose(0)
    with pytest.raises(
        UsageError, match=r"Rollout multiplies the maps of all layers, and layers\.0\.blocks\.0\.attn is not"
    ):
        attention_rollout(seen, "mean")
    whole = built("swin_tiny_patch4_window7_224", img_size=32, window_size=8, embed_dim=24, depths=(1,), num_heads=(2,))
    assert cp.look_at(whole, torch.randn(3, 32, 32)).layers["layers.0.blocks.0.attn"].grid == (8, 8)


def test_pooled_keys_and_other_tokens_end_rollout():
    pvt = built("pvt_v2_b0", depths=(1, 1, 1, 1))
    seen = cp.look_at(pvt, torch.randn(3, 224, 224), heads=())
    first = seen.layers["stages.0.blocks.0.attn"]
    assert (first.queries, first.keys, first.grid, first.query_grid) == (3136, 49, (7, 7), None)
    with pytest.raises(UsageError, match="has 3136 queries and 49 keys"):
        attention_rollout(seen, "mean")


def test_class_attention_may_follow(image):
    cait = built("cait_xxs24_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=4)
    seen = cp.look_at(cait, image, attention="softmax")
    kinds = [layer.kind for layer in seen.layers.values()]
    assert kinds == ["token", "token", "class", "class"]
    layers, _ = attention_rollout(seen, "mean")
    assert [layer.kind for layer in layers] == ["token", "token"]
    last = list(seen.layers.values())[-1]
    assert last.queries == 1
    assert last.similarity is None  # of a single query all columns are alike
    assert list(last.query_weights("class")) == [1]
    with pytest.raises(UsageError, match=r"were mixed after the softmax and are no probabilities.*attention='softmax'"):
        attention_rollout(cp.look_at(cait, image), "mean")


def test_layers_side_by_side_end_rollout(image):
    parallel = built("vit_tiny_patch16_224", **SMALL, block_fn=timm.models.vision_transformer.ParallelThingsBlock)
    with pytest.raises(UsageError, match=r"blocks\.0 holds 2 layers side by side"):
        attention_rollout(cp.look_at(parallel, image), "class")


def test_a_model_without_attention_is_refused(image):
    with pytest.raises(CaptureError, match="No layer has a map that can be laid over the image"):
        cp.look_at(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)), image)


def test_the_bundled_model_looks_at_a_bundled_digit():
    seen = cp.look_at()
    assert seen.picture.shape == (8, 8)
    assert len(seen.layers) == 24
    assert seen.provenance["model"]["architecture"] == "digits_vit_24b"
    mixed = cp.look_at("digits_deepvit_24b")
    assert not any(layer.is_probability for layer in mixed.layers.values())


def test_what_cannot_be_looked_at_is_told(model, tmp_path):
    for arguments, error, words in (
        ({"attention": "raw"}, UsageError, "attention='raw' must be 'applied' or 'softmax'"),
        ({}, UsageError, "No image given"),
        ({"image": tmp_path / "none.png"}, ImagesError, "none.png: no such file"),
        ({"image": tmp_path}, ImagesError, "is no file; give one image file"),
        ({"image": torch.zeros(3, 16, 16)}, ImagesError, r"size \(3, 16, 16\).*the model takes \(3, 32, 32\)"),
        ({"image": torch.zeros(2, 3, 32, 32)}, ImagesError, "expected floats"),
        ({"image": torch.zeros(3, 32, 32, dtype=torch.int64)}, ImagesError, "expected floats"),
        ({"image": 3}, UsageError, "image must be a path or a tensor"),
        ({"arch": "vit_tiny_patch16_224"}, UsageError, "No image given"),
    ):
        with pytest.raises(error, match=words):
            cp.look_at(model, **arguments)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImagesError, match=r"text.png: no picture of a format that is read\."):
        cp.look_at(model, tmp_path / "text.png")


@pytest.mark.skipif(shared_data() is None, reason="the trained model and the photographs are not at hand")
def test_a_trained_model_collapses_as_its_analysis_says():
    data = shared_data()
    photograph = sorted((data / "imagenet_sample").iterdir())[0]
    seen = cp.look_at(
        data / "deit_tiny_patch16_224_in1k.safetensors", photograph, arch="deit_tiny_patch16_224", heads=()
    )
    m = [layer.similarity.mean() for layer in seen.layers.values() if layer.similarity is not None]
    assert min(m[-2:]) > 0.75 > max(m[:6])
    assert seen.picture.shape == (224, 224, 3)
    assert 0.05 < seen.picture.std() < 0.5
