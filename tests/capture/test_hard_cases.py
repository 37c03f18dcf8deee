"""Cases in which a plausible tracer goes wrong: merged maps, masked rows, terms that do not commute with a softmax."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import collapse_probe as cp
from collapse_probe.capture import capture, layer_groups

HEADS, WIDTH, TOKENS = 4, 32, 10


class Layer(nn.Module):
    """One layer whose attention is a function of queries, keys, values `[B, H, N, D]`."""

    def __init__(self, attend, num_heads=HEADS):
        super().__init__()
        self.qkv, self.second = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.attend = attend
        if num_heads:
            self.num_heads = num_heads

    def split(self, x, linear=None):
        return (linear or self.qkv)(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        return self.attend(self, x)


def seen(attend, images=3, verify=True, **kwargs):
    torch.manual_seed(0)
    layer = Layer(attend, **kwargs).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(3)
        x = torch.randn(images, TOKENS, WIDTH)
        plain = layer(x)
        with capture(layer, verify=verify) as captured:
            assert torch.equal(layer(x), plain)
    if verify:
        assert captured.verification.passed, captured.verification
    return captured


# -- maps that are not one map ---------------------------------------------------------------------------------------


def two_branches(layer, x):
    def branch(linear):
        q, k, v = layer.split(x, linear)
        return F.scaled_dot_product_attention(q, k, v)

    return branch(layer.qkv) + branch(layer.second)


def views_of_one_copy(layer, x):
    q, k, v, q2, k2, v2 = torch.cat([layer.split(x), layer.split(x, layer.second)]).contiguous().unbind(0)
    return (q @ k.mT).softmax(-1) @ v + (q2 @ k2.mT).softmax(-1) @ v2


def values_written_between(layer, x):
    q, k, v = (item.clone() for item in layer.split(x))
    q2, k2, _ = layer.split(x, layer.second)
    first = (q @ k.mT).softmax(-1) @ v
    v.mul_(torch.rand(v.shape[-1]) + 1)
    return first + (q2 @ k2.mT).softmax(-1) @ v


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("attend", [two_branches, views_of_one_copy])
def test_maps_of_different_values_are_not_merged(attend, verify):
    captured = seen(attend, verify=verify)
    assert len(captured.maps) == 2
    assert all(item.is_probability for item in captured.maps.values())


def test_values_written_to_in_between_are_different_values():
    torch.manual_seed(0)
    layer = Layer(values_written_between).eval()
    with torch.no_grad(), capture(layer, verify=True) as captured:
        layer(torch.randn(3, TOKENS, WIDTH))
    assert captured.verification.passed
    assert len(captured.maps) == 2


def test_three_maps_of_the_same_values_are_one():
    kept = []

    def attend(layer, x):
        q, k, v = layer.split(x)
        q2, k2, _ = layer.split(x, layer.second)
        maps = [(a @ b.mT).softmax(-1) for a, b in ((q, k), (q2, k2), (q, k2))]
        kept[:] = [maps[0] - maps[1] + 0.5 * maps[2]]
        return maps[0] @ v - maps[1] @ v + 0.5 * (maps[2] @ v)

    captured = seen(attend)
    (attention,) = captured.maps.values()
    torch.testing.assert_close(attention.materialize(), kept[0], atol=1e-5, rtol=0)
    assert attention.softmax.shape == (3, 3 * HEADS, TOKENS, TOKENS)


def test_an_output_added_to_itself_is_no_further_map():
    def attend(layer, x):
        q, k, v = layer.split(x)
        out = (q @ k.mT).softmax(-1) @ v
        return out + out

    assert list(seen(attend).maps) == ["Layer"]


# -- what a softmax does not forgive ---------------------------------------------------------------------------------


def logits_case(change):
    """Attention whose scores are changed; also returns the map that multiplied the values."""
    kept = []

    def attend(layer, x):
        q, k, v = layer.split(x)
        kept[:] = [change(q @ k.mT)]
        return kept[0] @ v

    return attend, kept


def row_term_then_softmax_over_queries(scores):
    return (scores + torch.linspace(0, 3, TOKENS)[:, None]).softmax(-2)


def alpha_of_the_scores(scores):
    return torch.add(torch.linspace(0, 1, TOKENS), scores, alpha=0.3).softmax(-1)


def two_fills_that_cover_a_row(scores):
    left = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    left[2, :6] = True
    right = torch.zeros_like(left)
    right[2, 6:] = True
    return scores.masked_fill(left, -1e9).masked_fill(right, -1e9).softmax(-1)


def column_filled_before_a_softmax_over_queries(scores):
    return scores.masked_fill(torch.arange(TOKENS) == 3, -1e9).softmax(-2)


def cast_to_integers(scores):
    return scores.softmax(-1).mul(4).to(torch.int8).to(scores.dtype)


def masked_by_the_smallest_number(scores):
    mask = torch.zeros(TOKENS, TOKENS)
    mask[1] = mask[:, 7:] = torch.finfo(torch.float32).min
    return (scores + mask).softmax(-1)


@pytest.mark.parametrize(
    "change",
    [
        row_term_then_softmax_over_queries,
        alpha_of_the_scores,
        two_fills_that_cover_a_row,
        column_filled_before_a_softmax_over_queries,
        cast_to_integers,
        masked_by_the_smallest_number,
    ],
)
def test_terms_that_do_not_vanish(change):
    attend, kept = logits_case(change)
    (attention,) = seen(attend, verify=False).maps.values()
    for part in (attention.materialize(), torch.cat([attention.columns(0, 3), attention.columns(3, TOKENS)], -1)):
        torch.testing.assert_close(part, kept[0], atol=1e-5, rtol=0)


def test_rows_masked_as_a_whole_by_the_smallest_number_in_a_fused_kernel():
    mask = torch.zeros(3, 1, 1, TOKENS)
    mask[1] = torch.finfo(torch.float32).min

    def attend(layer, x):
        return F.scaled_dot_product_attention(*layer.split(x), attn_mask=mask)

    (attention,) = seen(attend).maps.values()
    uniform = torch.full((HEADS, TOKENS, TOKENS), 1 / TOKENS)
    torch.testing.assert_close(attention.materialize()[1], uniform)
    torch.testing.assert_close(attention.columns(0, TOKENS)[1], uniform)


# -- axes ------------------------------------------------------------------------------------------------------------


def folded_at_the_softmax(layer, x):
    q, k, v = layer.split(x)
    weights = torch.bmm(q.reshape(-1, TOKENS, 8), k.reshape(-1, TOKENS, 8).mT).softmax(-1)
    return weights.view(-1, HEADS, TOKENS, TOKENS) @ v


def test_heads_that_are_taken_apart_after_the_softmax():
    (attention,) = seen(folded_at_the_softmax, num_heads=None).maps.values()
    assert (attention.shape, attention.images) == ((3, HEADS, TOKENS, TOKENS), 3)
    assert attention.is_probability


def test_more_heads_after_mixing_than_before():
    weight = torch.randn(2 * HEADS, HEADS, 1, 1)

    def attend(layer, x):
        q, k, v = layer.split(x)
        return F.conv2d(q @ k.mT, weight).softmax(-1) @ torch.cat([v, v], 1)

    (attention,) = seen(attend).maps.values()
    assert attention.shape == (3, 2 * HEADS, TOKENS, TOKENS)
    assert attention.columns(0, 4).shape == (3, 2 * HEADS, TOKENS, 4)


@pytest.mark.parametrize(
    ("name", "side", "groups"),
    [("maxvit_tiny_tf_224", (224, 224), [2, 2, 2, 2, 5, 5, 4]), ("maxvit_tiny_tf_224", (224, 448), None)],
)
def test_position_lookups_do_not_pass_for_cuts_into_windows(name, side, groups):
    model = timm.create_model(name, img_size=side).to("meta").eval()
    with torch.no_grad(), capture(model) as captured:
        model(torch.zeros(2, 3, *side, device="meta"))
    cuts = [item.partition for item in captured.maps.values() if item.windows > 1]
    assert cuts == ["", "grid"] * (len(cuts) // 2)
    if groups:
        assert [len(group) for group in layer_groups(captured.maps)] == groups


@pytest.mark.parametrize("name", ["hiera_tiny_224", "halonet26t"])
def test_windows_of_neighbours_are_no_grid(name):
    model = timm.create_model(name).to("meta").eval()
    with torch.no_grad(), capture(model) as captured:
        model(torch.zeros(2, 3, *model.pretrained_cfg["input_size"][1:], device="meta"))
    assert {item.partition for item in captured.maps.values()} == {""}


@pytest.mark.parametrize(
    ("name", "size", "layouts"),
    [
        ("cait_xxs24_224", (224, 224), {(0, (14, 14)), (1, (14, 14))}),
        ("pvt_v2_b0", (64, 256), {(0, (2, 8))}),
        ("pit_ti_distilled_224", (224, 224), {(2, (27, 27)), (2, (14, 14)), (2, (7, 7))}),
    ],
)
def test_layouts(name, size, layouts):
    model = timm.create_model(name).to("meta").eval()
    with torch.no_grad(), capture(model) as captured:
        model(torch.zeros(2, 3, *size, device="meta"))
    assert {(item.prefix_tokens, item.layout.grid) for item in captured.maps.values()} == layouts


def test_patches_of_images_of_any_proportions_with_padding():
    """NaFlexViT takes patches, their places and which of them are padding."""
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_siglip", depth=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 2)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(16)).expand(3, -1, -1).clone()
    valid = torch.arange(64) < torch.tensor([[64], [48], [32]])
    patches = {"patches": torch.randn(3, 64, 768), "patch_coord": places, "patch_valid": valid}
    with torch.no_grad(), capture(model, verify=True) as captured:
        model(patches)
    assert captured.verification.passed
    assert [(item.kind, item.images) for item in captured.maps.values()] == [("token", 3), ("token", 3), ("pooling", 3)]
    assert {item.layout.grid for item in captured.maps.values()} == {None}  # 4 x 16, and not 8 x 8
    first = captured.maps["blocks.0.attn"].materialize()
    assert float(first[2, :, :32, 32:].abs().max()) == 0  # real patches ask no padding
    assert float(first[2, :, :32, :32].sum(-1).min()) == pytest.approx(1)


# -- captures within captures, batches of one ------------------------------------------------------------------------


def test_what_an_inner_capture_computes_is_no_layer_of_the_outer_one():
    layer = Layer(two_branches).eval()
    model = nn.Sequential(layer)
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad(), capture(model) as outer, capture(layer, verify=True) as inner:
        model(x)
    assert len(outer.maps) == len(inner.maps) == 2
    assert not outer.not_captured


class WindowMajor(nn.Module):
    """Four windows of four tokens, all images of the first window before any of the second."""

    def __init__(self):
        super().__init__()
        self.odd = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT.unflatten(1, (4, 4)).transpose(0, 1).flatten(0, 1)
        out = self.odd(tokens, tokens, tokens, need_weights=False)[0]
        return out.unflatten(0, (4, -1)).transpose(0, 1).flatten(1, 2).mean(1)


@pytest.mark.parametrize("sizes", [(1, 8), (9,), (4, 5)])
def test_images_that_trade_places_are_seen_whatever_the_first_batch(sizes):
    torch.manual_seed(0)
    model = WindowMajor().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    batches = [torch.randn(size, 3, 32, 32) for size in sizes]
    with pytest.raises(cp.CollapseProbeError):
        cp.analyze(model, batches)
