"""The models of vit-pytorch, against the graph that autograd keeps and the operands of their last einsum."""

from __future__ import annotations

import importlib

import pytest
import torch
from _outside import assert_equal_to_the_graph, assert_images_are_images, assert_maps, images_of, observed
from _vit_pytorch_zoo import VIT, ZOO, build

from collapse_probe.capture import capture

pytest.importorskip("vit_pytorch")

#: Layers as (kind, heads, windows), in execution order.
TOKEN = ("token", 2, 1)
EXPECTED = {
    "ViT": [TOKEN] * 2,
    "SimpleViT": [TOKEN] * 2,
    "CaiT": [TOKEN] * 2 + [("class", 2, 1)] * 2,
    "DeepViT": [TOKEN] * 2,
    "CvT": [("token", 1, 1), ("token", 2, 1), ("token", 3, 1)],
    "PiT": [TOKEN] * 2,
    "LeViT": [TOKEN, ("token", 4, 1), TOKEN],
    "CrossViT": [TOKEN] * 2 + [("class", 2, 1)] * 4,
    "XCiT": [("channel", 2, 1)] * 2 + [("class", 2, 1)],
    "NesT": [("window", 2, 4), ("token", 4, 1)],
    "MobileViT": [("window", 4, 4)] * 3,
    "T2TViT": [("token", 1, 1), TOKEN, TOKEN],
    "TwinsSVT": [("window", 8, 16), ("token", 8, 1)] * 2
    + [("window", 8, 4), ("token", 8, 1)] * 4
    + [("token", 8, 1)] * 2,
    "CCT": [TOKEN] * 2 + [("gate", 1, 1)],
    "CrossFormer": [("window", 1, 64)] + [("window", 1, 16)] * 3 + [("window", 2, 4)] * 2 + [TOKEN],
    "MaxViT": [("window", 2, 4)] * 2 + [("token", 4, 1)] * 2,
    "MaxViTWithRegisters": [("window", 2, 4)] * 2 + [("token", 4, 1)] * 2,
    "RegionViT": [("token", 4, 1) if windows == 1 else ("window", 4, windows) for windows in (1, 64, 1, 16, 1, 4, 1)],
    "ScalableViT": [TOKEN, ("window", 2, 4), TOKEN, TOKEN],
    "SepViT": [("window", 2, 4), TOKEN, TOKEN],
    "RvT": [TOKEN] * 2,
    "LookViT": [("cross", 2, 1), TOKEN, ("cross", 2, 1)],
    "ViTWithPatchMerger": [TOKEN, ("pooling", 1, 1), TOKEN],
    "LoopedViT": [TOKEN] * 4,
    "NormalizedViT": [TOKEN] * 2,
    "ParallelViT": [TOKEN] * 4,
    "ViViT": [("window", 2, 2), TOKEN],
    "ViViTFactorizedSelfAttention": [("window", 2, 2), ("window", 2, 17)] * 2,
}

#: Softmaxes that are listed and not captured: over a single key, of gathered rows, over slots or over depth.
GAPS = {"CrossFormer": 1, "RegionViT": 1, "ATSViT": 1, "SimpleViTAttnResidualDCA": 2, "WWT": 4}
#: Their talking heads are products of matrices, too, or their last products reach no output: judged apart.
APART = {"CaiT", "DeepViT", "WWT", "ViTND", "ViTNDRotary", "ViTNDPoPE"}
WHOLE = [name for name in ZOO if name not in APART]
DEFAULT = [name for name in EXPECTED if name not in APART]


def check_against_the_graph(name):
    model, images = build(name)
    captured = observed(model, images)
    torch.manual_seed(0)
    assert_equal_to_the_graph(captured, model(images), gaps=GAPS.get(name, 0))


@pytest.mark.parametrize("name", DEFAULT)
def test_every_product_in_the_graph_is_a_map(name):
    check_against_the_graph(name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in WHOLE if name not in DEFAULT])
def test_every_product_in_the_graph_is_a_map_in_the_whole_zoo(name):
    check_against_the_graph(name)


@pytest.mark.parametrize("name", EXPECTED)
def test_kinds_heads_and_windows(name):
    model, images = build(name)
    maps = observed(model, images).maps.values()
    assert [(item.kind, item.shape[1], item.windows) for item in maps] == EXPECTED[name]
    assert {item.images for item in maps} == {2}


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in ("MobileViT", "ViViT")])
def test_the_batch_axis_is_images(name):
    model, images = build(name)
    assert_images_are_images(model, images, observed(model, images), atol=1e-3)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in WHOLE if name not in EXPECTED and name != "ATSViT"])
def test_the_batch_axis_is_images_in_the_whole_zoo(name):  # ATSViT samples tokens at random
    model, images = build(name)
    assert_images_are_images(model, images, observed(model, images), atol=1e-3)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["ViT", "CaiT", "DeepViT", "CvT", "NesT", "MaxViT", "RvT", "NormalizedViT"])
def test_every_grad_mode_sees_the_same(name, mode):
    model, images = build(name)
    expected, captured = observed(model, images), observed(model, images, mode=mode)
    assert list(captured.maps) == list(expected.maps)
    for attention, other in zip(captured.maps.values(), expected.maps.values(), strict=True):
        assert (attention.kind, attention.shape, attention.windows) == (other.kind, other.shape, other.windows)
        torch.testing.assert_close(attention.materialize(), other.materialize(), atol=1e-5, rtol=0)


# -- mixing of heads -------------------------------------------------------------------------------------------------


def _reference_operands(monkeypatch, module, model, images):
    """(softmax, map) of each layer: what its softmax gave and what its einsum with the values was given."""
    softmaxes, applied, einsum = [], [], module.einsum
    softmax = torch.Tensor.softmax

    def keeping(*inputs, **named):
        output = softmax(*inputs, **named)
        softmaxes.append(output.detach().clone())
        return output

    def recording(equation, *operands):
        if equation == "b h i j, b h j d -> b h i d":
            applied.append(operands[0].detach().clone())
        return einsum(equation, *operands)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "einsum", recording)
        patch.setattr(torch.Tensor, "softmax", keeping)
        model(images)
    return list(zip(softmaxes, applied, strict=True))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", ["CaiT", "DeepViT"])
def test_mixed_heads(monkeypatch, name, images):
    model, _ = build(name, 0.3)
    pictures = images_of(images)
    module = importlib.import_module(f"vit_pytorch.{ZOO[name][0]}")
    expected = _reference_operands(monkeypatch, module, model, pictures)
    captured = observed(model, pictures)
    assert_maps(captured, [applied for _, applied in expected])
    for attention, (softmax, applied) in zip(captured.maps.values(), expected, strict=True):
        assert not attention.is_probability
        assert (softmax - applied).abs().max() > 0.1
        torch.testing.assert_close(attention.softmax.materialize(), softmax, atol=1e-5, rtol=0)
        assert attention.softmax.is_probability


# -- what only knowledge of the model can tell -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "block", "grid"), [("MaxViT", 0, 1), ("MaxViTWithRegisters", 0, 1)])
def test_windows_of_neighbours_and_of_a_grid_say_so(name, block, grid):
    """Maps of one shape whose windows hold different tokens are not to be compared token by token."""
    model, images = build(name)
    partitions = [item.partition for item in observed(model, images).maps.values()]
    assert partitions[block] != partitions[grid]


def test_short_and_long_distance_windows_say_so():
    model, images = build("CrossFormer")
    maps = list(observed(model, images).maps.values())
    for near, far in ((2, 3), (4, 5)):
        assert maps[near].shape == maps[far].shape
        assert maps[near].partition != maps[far].partition


@pytest.mark.parametrize("width", [8, 16])
def test_channels_are_channels_also_where_there_are_as_many_as_tokens(width):
    """A head of 16 channels on 16 patches: the shape tells nothing."""
    torch.manual_seed(0)
    xcit = importlib.import_module("vit_pytorch.xcit").XCiT(**VIT | {"cls_depth": 1, "dim_head": width}).eval()
    kinds = [item.kind for item in observed(xcit, images_of(2)).maps.values()]
    assert kinds == ["channel", "channel", "class"]


# -- listed, not silent ----------------------------------------------------------------------------------------------


def test_slots_that_attend_both_ways_are_maps_or_listed():
    model, images = build("WWT")
    captured = observed(model, images)
    assert len(captured.maps) + len(captured.not_captured) == 4
    assert {name.partition("#")[0] for name in [*captured.maps, *captured.not_captured]} == {
        "layers.0.attns.0",
        "layers.1.attns.0",
    }


@pytest.mark.parametrize("name", ["ViTND", "ViTNDRotary", "ViTNDPoPE"])
def test_flex_attention_is_listed_and_leaves_the_model_working(name):
    model, images = build(name)
    model.requires_grad_(False)  # on the CPU, flex_attention runs without gradients only
    expected = model(images)
    with capture(model) as captured:
        output = model(images)
    torch.testing.assert_close(output, expected)
    assert len(captured.maps) + len(captured.not_captured) == 2
    assert all("flex" in reason for reason in captured.not_captured.values())
