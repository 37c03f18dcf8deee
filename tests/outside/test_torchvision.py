"""Vision transformers of torchvision, against the softmax that they call and the weights that their layers return."""

from __future__ import annotations

import pytest
import torch
from _outside import assert_equal_to_the_graph, assert_images_are_images, assert_maps, images_of, observed, perturbed
from torch import nn
from torchvision.models import MaxVit, SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

SWIN = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}


def vit():
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=5
    )
    return perturbed(model)


def swin():
    torch.manual_seed(0)
    return perturbed(SwinTransformer(**SWIN, num_classes=5))


def swin_v2():
    torch.manual_seed(0)
    model = SwinTransformer(**SWIN, num_classes=5, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
    return perturbed(model)


def maxvit():
    torch.manual_seed(0)
    model = MaxVit(
        input_size=(64, 64),
        stem_channels=8,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=5,
    )
    return perturbed(model)


#: name -> builder, image size, windows of its layers
WINDOWED = {"swin": (swin, 32, [16, 16, 4, 4]), "swin_v2": (swin_v2, 32, [16, 16, 4, 4])}
WINDOWED |= {"maxvit": (maxvit, 64, [16, 16, 4, 4])}


def _reference_softmaxes(monkeypatch, model, images):
    """What `F.softmax` returned inside a model that multiplies the values with just that: `[B*W, H, Q, K]`."""
    seen, softmax = [], nn.functional.softmax

    def recording(*inputs, **named):
        seen.append(softmax(*inputs, **named))
        return seen[-1].detach().clone()

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "softmax", recording)
        model(images)
    return [item.flatten(0, 1) if item.ndim == 5 else item for item in seen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_vision_transformer(mode, dtype):
    model, images = vit().to(dtype), images_of(2, dtype=dtype)
    inputs = []
    layers = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    handles = [layer.register_forward_pre_hook(lambda _module, given: inputs.append(given)) for layer in layers]
    with torch.no_grad():
        model(images)
        expected = [
            layer(*given, need_weights=True, average_attn_weights=False)[1]
            for layer, given in zip(layers, inputs[:], strict=True)
        ]
    for handle in handles:
        handle.remove()
    captured = observed(model, images, mode=mode)
    assert list(captured.maps) == [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(3)]
    assert_maps(captured, expected, 1e-5 if dtype == torch.float32 else 1e-12)
    assert {(item.kind, item.images, item.prefix_tokens) for item in captured.maps.values()} == {("token", 2, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WINDOWED)
def test_windowed_maps_are_the_softmaxes_that_ran(monkeypatch, name, dtype):
    build, size, windows = WINDOWED[name]
    model, images = build().to(dtype), images_of(2, size, dtype=dtype)
    expected = _reference_softmaxes(monkeypatch, model, images)
    captured = observed(model, images)
    assert_maps(captured, expected, 1e-5 if dtype == torch.float32 else 1e-12)
    assert {item.kind for item in captured.maps.values()} == {"window"}
    assert [item.windows for item in captured.maps.values()] == windows
    assert {item.images for item in captured.maps.values()} == {2}


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_that_were_cut_differently_say_so(name):
    build, size, _ = WINDOWED[name]
    partitions = [item.partition for item in observed(build(), images_of(2, size)).maps.values()]
    assert partitions[0] != partitions[1]
    assert partitions[:2] == partitions[2:]


@pytest.mark.parametrize("name", ["vit", *WINDOWED])
def test_every_product_in_the_graph_is_a_map(name):
    model, images = (vit(), images_of(2)) if name == "vit" else (WINDOWED[name][0](), images_of(2, WINDOWED[name][1]))
    assert_equal_to_the_graph(observed(model, images), model(images))


@pytest.mark.parametrize("name", ["vit", *WINDOWED])
def test_the_batch_axis_is_images(name):
    model, images = (vit(), images_of(3)) if name == "vit" else (WINDOWED[name][0](), images_of(3, WINDOWED[name][1]))
    assert_images_are_images(model, images, observed(model, images), atol=1e-4)


def test_images_given_by_name():
    model = vit()
    captured = observed(model, x=images_of(3))
    assert {(item.kind, item.images) for item in captured.maps.values()} == {("token", 3)}
    model = swin()
    captured = observed(model, x=images_of(3))
    assert [item.windows for item in captured.maps.values()] == [16, 16, 4, 4]


def test_dropout_in_training_is_in_the_applied_map(monkeypatch):
    """torchvision's Swin drops weights in an operator of its own, which the softmax does not know of."""
    torch.manual_seed(0)
    model = perturbed(SwinTransformer(**SWIN, num_classes=5, attention_dropout=0.5, stochastic_depth_prob=0.0)).train()
    images = images_of(2)
    torch.manual_seed(0)
    expected = _reference_softmaxes(monkeypatch, model, images)
    captured = observed(model, images)
    assert len(captured.maps) == len(expected)
    for attention, softmax in zip(list(captured.maps.values())[:1], expected, strict=False):
        applied = attention.materialize()
        torch.testing.assert_close(attention.softmax.materialize(), softmax, atol=1e-5, rtol=0)
        kept = applied != 0
        assert 0.4 < kept.float().mean() < 0.6
        torch.testing.assert_close(applied[kept], 2 * softmax[kept], atol=1e-5, rtol=0)
