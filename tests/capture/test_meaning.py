"""What maps mean: facts of the architectures, counted by hand from their papers' geometry."""

from __future__ import annotations

import pytest
import timm
import torch
from _zoo import build, quick
from torch import nn

from collapse_probe.capture import capture, layer_groups


def seen(name):
    if not timm.is_model(name):
        pytest.skip(f"this version of timm has no {name}")
    model, images = quick(name)
    with torch.no_grad(), capture(model) as captured:
        model(images)
    return captured


def summary(captured):
    """(kind, windows, heads, queries, keys, partition) of each map, in execution order."""
    return [(m.kind, m.windows, *m.shape[1:], m.partition) for m in captured.maps.values()]


def test_swin_alternates_two_partitions_until_one_window_is_left():
    # 56 x 56 patches in windows of 7: 64, then 16, 4 and 1 windows; every second block is shifted.
    expected = []
    for windows, heads, depth in ((64, 3, 2), (16, 6, 2), (4, 12, 6)):
        expected += [("window", windows, heads, 49, 49, cut) for cut in ("", "shifted") * (depth // 2)]
    expected += [("token", 1, 24, 49, 49, "")] * 2
    captured = seen("swin_tiny_patch4_window7_224")
    assert summary(captured) == expected
    assert [len(group) for group in layer_groups(captured.maps)] == [1, 1, 1, 1, 3, 3, 2]


def test_maxvit_alternates_neighbourhoods_and_a_grid():
    captured = seen("test_maxvit")
    cuts = [m.partition for name, m in captured.maps.items()]
    assert cuts == ["", "grid"] * 3 + ["", ""]  # of a single window there is one cut only
    assert [m.windows for m in captured.maps.values()] == [64, 64, 16, 16, 4, 4, 1, 1]  # 40, 20, 10, 5 in windows of 5


def test_gcvit_asks_with_global_queries_in_every_second_block():
    captured = seen("gcvit_xxtiny")
    assert {m.partition for m in captured.maps.values()} == {"", "global queries"}
    assert [(m.windows, m.shape[2]) for m in captured.maps.values()][::2][:2] == [(64, 49), (16, 49)]


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        pytest.param("nest_tiny", [16, 16, 4, 4] + [1] * 8, marks=pytest.mark.sweep),  # windows behind the heads
        pytest.param("hiera_tiny_224", [49, 49, 49, 49] + [1] * 8, marks=pytest.mark.sweep),
        ("twins_svt_small", [64, 1, 16, 1] + [4, 1] * 5 + [1] * 4),  # windows and the whole image in turn
        ("mobilevit_xxs", [4] * 9),  # pixels at the same place of their 2 x 2 patches
        ("tnt_s_legacy_patch16_224", [196, 1] * 3),  # pixels within patches, then patches
        ("halonet26t", [4, 4, 1]),  # 16 x 16 and 8 x 8 tokens in blocks of 8; heads within the batch
    ],
)
def test_windows_of_an_image(name, windows):
    captured = seen(name)
    assert [m.windows for m in captured.maps.values()] == windows
    assert {m.images for m in captured.maps.values()} == {2}
    assert all((m.kind == "window") == (m.windows > 1) for m in captured.maps.values())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("xcit_nano_12_p8_224", ["channel"] * 12 + ["class"] * 2),
        ("edgenext_xx_small", ["channel"] * 3),
        pytest.param("davit_tiny", ["window", "channel"] * 5 + ["token", "channel"], marks=pytest.mark.sweep),
        ("cait_xxs24_224", ["token"] * 4 + ["class"] * 2),
        ("vit_base_patch16_siglip_224", ["token"] * 2 + ["pooling"]),
        ("resnet50_clip", ["pooling"]),
        ("pvt_v2_b0", ["token"] * 8),  # keys are pooled tokens of the same image
        ("coat_lite_tiny", ["gate"] * 8),
        ("gcresnext26ts", ["gate"] * 8),
        ("lambda_resnet26t", ["gate"] * 3),
    ],
)
def test_kinds(name, kinds):
    captured = seen(name)
    assert [m.kind for m in captured.maps.values()] == kinds
    compared = {layer for group in layer_groups(captured.maps) for layer in group}
    assert compared == {layer for layer, m in captured.maps.items() if m.kind not in ("channel", "gate")}


@pytest.mark.parametrize("name", ["mobilevitv2_050", "skresnet18", "resnest14d", "efficientvim_m1"])
def test_gates_that_are_no_product_are_named(name):
    captured = seen(name)
    assert not captured.maps
    assert captured.not_captured
    assert all(reason.endswith("compares no queries with keys: a gate") for reason in captured.not_captured.values())


def test_a_softmax_across_the_images_of_a_batch_is_reported():
    captured = seen("csatv2")
    reasons = [reason for reason in captured.not_captured.values() if "2 images of the batch" in reason]
    assert len(reasons) == 14
    assert {m.kind for m in captured.maps.values()} == {"token"}


def test_convits_positional_softmax_is_part_of_its_map():
    captured = seen("convit_tiny")
    assert len(captured.maps) == 12
    assert not captured.not_captured
    gated = captured.maps["blocks.0.attn"]
    assert not gated.is_probability  # not as the softmax gave it
    assert gated.softmax.is_probability


def test_a_differential_layer_is_one_map():
    model, images = quick("vit_dwee_patch16_reg1_gap_256")
    with torch.no_grad(), capture(model) as captured:
        model(images)
    unfused, _ = build("vit_dwee_patch16_reg1_gap_256", fused=False)
    unfused.load_state_dict(model.state_dict())
    with torch.no_grad(), capture(unfused) as explicit:
        unfused(images)
    assert list(captured.maps) == list(explicit.maps) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    for name, attention in captured.maps.items():
        assert not attention.is_probability
        other = explicit.maps[name]
        torch.testing.assert_close(attention.materialize(), other.materialize(), atol=1e-4, rtol=0)
        assert attention.softmax.shape == other.softmax.shape  # two softmaxes for each head
        torch.testing.assert_close(attention.softmax.materialize(), other.softmax.materialize(), atol=1e-4, rtol=0)
        assert attention.materialize().min() < 0


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens, memory):
        return self.attention(tokens, memory, memory)[0]


def test_queries_from_another_sequence_than_keys():
    model = Cross().eval()
    with torch.no_grad(), capture(model) as captured:
        model(torch.randn(3, 7, 8), torch.randn(3, 4, 8))
    assert summary(captured) == [("cross", 1, 2, 7, 4, "")]


class Swish(nn.Module):
    """Two ways of cutting windows that nothing but the rolling of the features tells apart."""

    def __init__(self, heads=2):
        super().__init__()
        self.qkv, self.num_heads = nn.Linear(8, 24), heads

    def attend(self, windows):
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, x):
        x = x + self.attend(x.unflatten(1, (4, 4)).flatten(0, 1)).reshape(x.shape)
        rolled = torch.roll(x, -2, 1)
        rolled = self.attend(rolled.unflatten(1, (4, 4)).flatten(0, 1)).reshape(x.shape)
        return self.attend(torch.roll(rolled, 2, 1))


def test_rolled_features_are_another_partition():
    model = Swish().eval()
    with torch.no_grad(), capture(model) as captured:
        model(torch.randn(3, 16, 8))
    assert [(m.windows, m.partition) for m in captured.maps.values()] == [(4, ""), (4, "shifted"), (1, "")]


@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m(x=x)])
def test_images_given_by_keyword(call):
    model, images = quick("swin_tiny_patch4_window7_224")
    with torch.no_grad(), capture(model) as captured:
        call(model, images)
    assert next(iter(captured.maps.values())).windows == 64
