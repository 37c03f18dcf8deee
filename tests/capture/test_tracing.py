"""Hand-written attention in all its spellings: the map is what multiplied the values, or the layer is a listed gap."""

from __future__ import annotations

import contextlib

import pytest
import timm
import torch
from _models import build, perturbed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from collapse_probe.capture import QueryKey, capture, concatenate
from collapse_probe.capture.dataflow import AttentionTracer

GRAD_MODES = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]
SPELLINGS = {}


def spelling(function):
    SPELLINGS[function.__name__] = function
    return function


@spelling
def plain(q, k, v, _):
    a = (q @ k.mT).softmax(-1)
    return a, a @ v


@spelling
def einsum(q, k, v, _):
    a = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return a, torch.einsum("bhij,bhjd->bhid", a, v)


@spelling
def bias_on_the_left(q, k, v, bias):
    a = (bias.expand(q.shape[0], -1, -1, -1) + q @ k.mT).softmax(-1)
    return a, a @ v


@spelling
def bias_with_alpha(q, k, v, bias):
    a = torch.add(q @ k.mT, bias, alpha=3).softmax(-1)
    return a, a @ v


@spelling
def in_place_bias(q, k, v, bias):
    scores = q @ k.mT
    scores += bias
    scores *= 0.5
    a = scores.softmax(-1)
    return a, a @ v


@spelling
def masked_through_a_slice(q, k, v, _):
    scores = q @ k.mT
    scores[..., 5:] = -torch.inf
    a = scores.softmax(-1)
    return a, a @ v


@spelling
def masked_diagonal(q, k, v, _):
    scores = q @ k.mT
    scores.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    a = scores.softmax(-1)
    return a, a @ v


@spelling
def ablated_head(q, k, v, _):
    a = (q @ k.mT).softmax(-1)
    a[:, 0] = 0
    return a, a @ v


@spelling
def scaled_through_a_view(q, k, v, _):
    a = (q @ k.mT).softmax(-1)
    a.view(-1, *a.shape[-2:]).mul_(0.5)
    return a, a @ v


@spelling
def unknown_logits_then_written(q, k, v, _):
    a = (q @ k.mT).tanh().softmax(-1)
    a.mul_(2.0)
    return a, a @ v


@spelling
def queries_reused(q, k, v, _):
    q = q.clone()
    scores = q @ k.mT
    q.zero_()
    a = scores.softmax(-1)
    return a, a @ v


@spelling
def right_operand(q, k, v, _):
    a = (q @ k.mT).softmax(-1)
    return a, (v.mT @ a.mT).mT


@spelling
def right_operand_not_transposed(q, k, v, _):
    a = (q @ k.mT).softmax(-1)
    return a.mT, (v.mT @ a).mT


@spelling
def expanded_scores(q, k, v, _):
    a = (q[:1] @ k[:1].mT).expand(q.shape[0], -1, -1, -1).softmax(-1)
    return a, a @ v


@spelling
def linear_over_heads(q, k, v, _):
    mix = torch.linspace(-1, 1, q.shape[1] ** 2, device=q.device).view(q.shape[1], -1)
    a = (q @ k.mT).softmax(-1)
    a = (a.permute(0, 2, 3, 1) @ mix.T).permute(0, 3, 1, 2)
    return a, a @ v


@spelling
def folded_heads(q, k, v, _):
    a = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1)
    return a.view(*q.shape[:2], *a.shape[-2:]), torch.bmm(a, v.flatten(0, 1)).view_as(v)


@spelling
def fused_with_three_axes(q, k, v, _):
    out = nn.functional.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale=1.0)
    weights = (q @ k.mT).exp()  # no softmax, which would be a second one
    return weights / weights.sum(-1, keepdim=True), out.view_as(v)


class Spelled(nn.Module):
    """Attention among seven tokens of two heads, spelled in one of many ways."""

    def __init__(self, name):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.bias = nn.Parameter(torch.randn(1, 2, 7, 7))
        self.heads, self.spell, self.applied = 2, SPELLINGS[name], None

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        self.applied, out = self.spell(q, k, v, self.bias)
        return out


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_applied_map_of_every_spelling(name, images, mode):
    torch.manual_seed(0)
    module = perturbed(Spelled(name), 0.3)
    if (
        name in ("ablated_head", "scaled_through_a_view", "unknown_logits_then_written")
        and mode is contextlib.nullcontext
    ):
        module.requires_grad_(False)  # autograd forbids writing to what it needs
    tokens = torch.randn(images, 7, 16)
    with mode():
        plain_output = module(tokens)
        with capture(module) as captured:
            output = module(tokens)
        assert torch.equal(plain_output, output)
        assert not captured.not_captured
        (attention,) = captured.maps.values()
        assert attention.kind == "token"
        torch.testing.assert_close(attention.materialize(), module.applied, atol=1e-5, rtol=0)
        torch.testing.assert_close(attention.columns(2, 6), module.applied[..., 2:6], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["plain", "einsum", "bias_on_the_left", "in_place_bias", "right_operand", "folded_heads"]
)
def test_what_is_understood_stays_lazy(name):
    torch.manual_seed(0)
    module = perturbed(Spelled(name), 0.3)
    with torch.no_grad(), capture(module) as captured:
        module(torch.randn(3, 7, 16))
    (attention,) = captured.maps.values()
    assert isinstance(attention.source, QueryKey)
    assert attention.is_probability


class OnlyWatching(TorchDispatchMode):
    """A dispatch mode that does nothing at all."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Lost(nn.Module):
    """Nothing in its name says attention, and the product is no product of matrices."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        a = (x @ x.mT).softmax(self.axis)
        return (a[..., None] * x[:, :, None]).sum(-2)


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("axis", [-1, -2])
def test_a_softmax_that_never_reaches_a_product_is_listed(axis, mode):
    model = nn.Sequential(Lost(axis))
    with mode(), capture(model) as captured:
        model(torch.randn(2, 2, 5, 8))
    assert not captured.maps
    assert "was not seen to multiply values" in captured.not_captured["0"]


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_base_patch16_siglip_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}),
        ("vit_base_patch16_224", {"qkv_bias": False, "qk_norm": True}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
def test_outputs_with_attention_pooling_do_not_change_by_a_bit(name, kwargs, mode):
    model = build(name, **kwargs)
    images = torch.randn(2, 3, 32, 32)
    with mode():
        plain_output = model(images)
        with OnlyWatching():
            watched = model(images)
        # PyTorch 2.6 and 2.7 round `linear` of an expanded input otherwise as soon as any dispatch mode is active.
        assert torch.equal(watched, plain_output) or torch.__version__ < "2.8"
        with capture(model):
            assert torch.equal(model(images), watched)


def test_what_goes_wrong_in_following_is_a_gap_and_not_the_users_problem(monkeypatch):
    def broken(*_):
        raise ValueError("bad day")

    monkeypatch.setattr(AttentionTracer, "_softmax", broken)
    module = perturbed(Spelled("plain"), 0.3)
    tokens = torch.randn(2, 7, 16)
    expected = module(tokens)
    with capture(module) as captured:
        assert torch.equal(module(tokens), expected)
    assert captured.not_captured["Spelled"] == "its operators could not be followed (ValueError: bad day)"


def test_talking_heads_are_captured_in_every_mode():
    torch.manual_seed(0)
    model = perturbed(timm.create_model("cait_xxs24_224", img_size=64, depth=2, num_classes=3), 0.1)
    maps = []
    for mode in GRAD_MODES:
        with mode(), capture(model) as captured:
            model(torch.ones(2, 3, 64, 64) * torch.linspace(-1, 1, 64))
        assert not captured.not_captured
        kinds = [item.kind for item in captured.maps.values()]
        assert kinds == ["token", "token", "class", "class"]
        attention = captured.maps["blocks.0.attn"]
        assert not attention.is_probability
        maps.append(attention.materialize())
        assert not torch.allclose(maps[-1], attention.softmax.materialize(), atol=1e-3)
    torch.testing.assert_close(maps[0], maps[1])
    torch.testing.assert_close(maps[0], maps[2])


def test_channel_attention_is_named_as_such():
    torch.manual_seed(0)
    model = perturbed(timm.create_model("xcit_nano_12_p16_224", img_size=96, depth=2), 0.1)
    with torch.no_grad(), capture(model) as captured:
        model(torch.randn(2, 3, 96, 96))
    kinds = {name: item.kind for name, item in captured.maps.items()}
    assert kinds["blocks.0.attn"] == "channel"


def test_gradient_checkpointing_and_backward_within_the_block():
    model = build("vit_tiny_patch16_224")
    images = torch.randn(2, 3, 32, 32)
    with capture(model) as plain_captured:
        model(images)
    model.set_grad_checkpointing(True)
    model.train()
    with capture(model) as captured:
        model(images).sum().backward()
    assert list(captured.maps) == list(plain_captured.maps)
    model.eval()


def test_a_part_that_does_not_attend_keeps_the_maps():
    model = build("vit_tiny_patch16_224")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), capture(model) as captured:
        model(images)
        model.forward_head(torch.randn(2, 17, 48))
    assert len(captured.maps) == 3


def test_an_interrupt_inside_the_block_leaves_capture_usable():
    model = build("vit_tiny_patch16_224")
    images = torch.randn(2, 3, 32, 32)

    class Interrupting(nn.Module):
        def forward(self, _):
            raise KeyboardInterrupt

    good = model.blocks[1].mlp
    with torch.no_grad(), capture(model) as captured:
        model.blocks[1].mlp = Interrupting()
        with pytest.raises(KeyboardInterrupt):
            model(images)
        model.blocks[1].mlp = good
        for _ in range(2):
            model(images)
    assert list(captured.maps) == [f"blocks.{i}.attn" for i in range(3)]


def test_a_wrapped_model_keeps_its_token_layout():
    inner = build("vit_small_patch14_reg4_dinov2")
    with torch.no_grad(), capture(nn.Sequential(inner)) as captured:
        inner_input = torch.randn(2, 3, 32, 32)
        nn.Sequential(inner)(inner_input)
    layout = captured.maps["0.blocks.0.attn"].layout
    assert (layout.prefix_tokens, layout.grid) == (5, (4, 4))


def test_maps_are_float32_inside_autocast():
    model = build("vit_tiny_patch16_224")
    with torch.no_grad(), capture(model) as captured:
        model(torch.randn(2, 3, 32, 32))
    attention = captured.maps["blocks.0.attn"]
    expected = attention.materialize()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.materialize(), expected)
        assert torch.equal(attention.columns(0, 17), attention.columns(0, 17))
        assert attention.columns(0, 17).dtype == torch.float32


class Masked(nn.Module):
    heads = 2

    def forward(self, x, mask=None):
        return nn.functional.scaled_dot_product_attention(x, x, x, mask)


def test_batches_with_and_without_a_mask_are_joined_rightly():
    module, tokens = Masked(), torch.randn(4, 2, 5, 8) * 2
    mask = torch.rand(4, 1, 1, 5) > 0.3
    mask[..., 0] = True
    pieces = []
    with torch.no_grad(), capture(module) as captured:
        for part, own in ((slice(0, 1), None), (slice(1, 2), mask[1:2]), (slice(2, 4), mask[2:])):
            module(tokens[part], own)
            pieces.append(captured.maps["Masked"])
    joined = concatenate(pieces)
    torch.testing.assert_close(joined.materialize(), torch.cat([piece.materialize() for piece in pieces]))
    torch.testing.assert_close(joined.columns(1, 4), torch.cat([piece.columns(1, 4) for piece in pieces]))
    counts = joined.admissible_keys().expand(4, 2, 5)
    assert torch.equal(counts[0], torch.full((2, 5), 5))
    assert torch.equal(counts[2], mask[2].sum().expand(2, 5))


def test_a_clone_shares_no_memory():
    model = build("deepvit_16b")
    with torch.no_grad(), capture(model) as captured:
        model(torch.randn(4, 3, 32, 32))
    part = captured.maps["blocks.0.attn"].select(3, 4).clone()
    assert part.source.q.untyped_storage().nbytes() == part.source.q.numel() * 4
    torch.testing.assert_close(part.materialize(), captured.maps["blocks.0.attn"].materialize()[3:])
