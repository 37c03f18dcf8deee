"""PyTorch's own attention layers in every way that they are called, against the weights that they can return."""

from __future__ import annotations

import re

import pytest
import torch
from _outside import assert_maps, close, observed, perturbed, tokens_of
from torch import nn

from collapse_probe.capture import capture

MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]
IMAGES, TOKENS, KEYS, WIDTH, HEADS = 3, 6, 4, 16, 2
PADDING = torch.zeros(IMAGES, TOKENS, dtype=torch.bool)
PADDING[0, 4:] = True
PADDING[1, 2:3] = True
CAUSAL = nn.Transformer.generate_square_subsequent_mask(TOKENS)
FUTURE = CAUSAL.isinf()


def attention(batch_first=True, **kwargs):
    torch.manual_seed(0)
    return perturbed(nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **kwargs), 0.4)


def arranged(tokens, batch_first):
    return tokens if batch_first else tokens.transpose(0, 1)


def _reference_weights(layer, query, key, mask=None, padding=None):
    """Softmax of scaled products of the layer's own projections in float64, image by image and head by head.

    query `[B, Q, C]`, key `[B, K, C]`; mask `[Q, K]` and padding `[B, K]` are True or minus infinity where forbidden.
    """
    weight, bias = layer.in_proj_weight.detach().double(), layer.in_proj_bias.detach().double()
    q = query.double() @ weight[:WIDTH].T + bias[:WIDTH]
    k = key.double() @ weight[WIDTH : 2 * WIDTH].T + bias[WIDTH : 2 * WIDTH]
    size = WIDTH // HEADS
    maps = torch.zeros(len(q), HEADS, q.shape[1], k.shape[1], dtype=torch.float64)
    for image in range(len(q)):
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = q[image, :, part] @ k[image, :, part].T / size**0.5
            if mask is not None:
                scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
            if padding is not None:
                scores = scores.masked_fill(padding[image], -torch.inf)
            maps[image, head] = scores.softmax(-1)
    return maps


SELF_CALLS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "causal mask": {"attn_mask": CAUSAL},
    "causal mask, no weights": {"attn_mask": CAUSAL, "need_weights": False},
    "causal hint": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "boolean mask": {"attn_mask": FUTURE, "need_weights": False},
    "additive mask": {"attn_mask": CAUSAL.clamp_min(-1.5), "need_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding, no weights": {"key_padding_mask": PADDING, "need_weights": False},
    "padding and causal mask": {"key_padding_mask": PADDING, "attn_mask": FUTURE},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", SELF_CALLS)
def test_self_attention(call, batch_first, mode):
    layer, named = attention(batch_first), SELF_CALLS[call]
    tokens = tokens_of(IMAGES, TOKENS, WIDTH)
    expected = _reference_weights(layer, tokens, tokens, named.get("attn_mask"), named.get("key_padding_mask"))
    given = arranged(tokens, batch_first)
    captured = observed(layer, given, given, given, mode=mode, **named)
    assert len(captured.maps) + len(captured.not_captured) == 1
    if captured.not_captured:  # a listed reason is allowed where a mask goes into PyTorch's native kernel
        assert "mask" in call or "padding" in call
        assert mode is not torch.enable_grad
        assert "mask" in next(iter(captured.not_captured.values()))
        return
    assert_maps(captured, [expected])
    (attended,) = captured.maps.values()
    assert (attended.kind, attended.images, attended.windows) == ("token", IMAGES, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("named", [{}, {"need_weights": False}, {"key_padding_mask": PADDING[:, :KEYS]}])
def test_cross_attention(named, batch_first, mode):
    layer = attention(batch_first)
    query, memory = tokens_of(IMAGES, TOKENS, WIDTH), tokens_of(IMAGES, KEYS, WIDTH, seed=2)
    expected = _reference_weights(layer, query, memory, padding=named.get("key_padding_mask"))
    given = [arranged(item, batch_first) for item in (query, memory, memory)]
    captured = observed(layer, *given, mode=mode, **named)
    assert_maps(captured, [expected])
    (attended,) = captured.maps.values()
    assert (attended.kind, attended.images) == ("cross", IMAGES)


@pytest.mark.parametrize("mode", MODES)
def test_cross_attention_between_sequences_of_one_length(mode):
    """Queries and keys of other tokens are no self-attention, even where there are as many of them."""
    layer = attention()
    query, memory = tokens_of(IMAGES, TOKENS, WIDTH), tokens_of(IMAGES, TOKENS, WIDTH, seed=2)
    with mode(), capture(layer) as captured:
        layer(query, memory, memory)
    assert_maps(captured, [_reference_weights(layer, query, memory)])
    assert [item.kind for item in captured.maps.values()] == ["cross"]


@pytest.mark.parametrize("need_weights", [True, False])
def test_unbatched_self_attention(need_weights):
    layer, tokens = attention(), tokens_of(TOKENS, WIDTH)
    captured = observed(layer, tokens, tokens, tokens, need_weights=need_weights)
    assert_maps(captured, [_reference_weights(layer, tokens[None], tokens[None])])
    assert [(item.kind, item.images) for item in captured.maps.values()] == [("token", 1)]


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8, "vdim": 12}])
def test_options_of_multihead_attention(options):
    """Their maps as the layer itself returns them."""
    layer = attention(**options)
    query = tokens_of(IMAGES, TOKENS, WIDTH)
    key = tokens_of(IMAGES, KEYS, options.get("kdim", WIDTH), seed=2)
    value = tokens_of(IMAGES, KEYS, options.get("vdim", WIDTH), seed=3)
    with torch.no_grad():
        expected = layer(query, key, value, average_attn_weights=False)[1]
    for need_weights in (True, False):
        captured = observed(layer, query, key, value, need_weights=need_weights)
        assert_maps(captured, [expected])
        assert [(item.kind, item.images) for item in captured.maps.values()] == [("cross", IMAGES)]


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_while_training_is_applied_or_listed(need_weights):
    layer = attention(dropout=0.5).train()
    tokens = tokens_of(IMAGES, TOKENS, WIDTH)
    captured = observed(layer, tokens, tokens, tokens, need_weights=need_weights)
    assert len(captured.maps) + len(captured.not_captured) == 1
    for attended in captured.maps.values():
        softmax, applied = attended.softmax.materialize(), attended.materialize()
        close(softmax, _reference_weights(layer, tokens, tokens))
        kept = applied != 0
        assert 0.2 < kept.float().mean() < 0.8
        torch.testing.assert_close(applied[kept], 2 * softmax[kept], atol=1e-5, rtol=0)
    for reason in captured.not_captured.values():
        assert "dropout" in reason


# -- encoders and decoders -------------------------------------------------------------------------------------------


def encoder_layer(batch_first=True, **kwargs):
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=batch_first, **kwargs)


def encoder(batch_first=True, nested=True, **kwargs):
    torch.manual_seed(0)
    layer = encoder_layer(batch_first, **kwargs)
    return perturbed(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested), 0.3)


def _reference_encoder(model, tokens, mask=None, padding=None):
    """Weights of each layer of an encoder, by its sublayers, on tokens `[B, T, C]`."""
    maps = []
    for layer in model.layers:
        normed = layer.norm1(tokens) if layer.norm_first else tokens
        maps.append(_reference_weights(layer.self_attn, normed.detach(), normed.detach(), mask, padding))
        weight, bias = layer.self_attn.in_proj_weight[2 * WIDTH :], layer.self_attn.in_proj_bias[2 * WIDTH :]
        values = (normed @ weight.T + bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        attended = (maps[-1].float() @ values).transpose(1, 2).flatten(2)
        attended = layer.self_attn.out_proj(attended)
        tokens = tokens + attended if layer.norm_first else layer.norm1(tokens + attended)
        inner = layer.norm2(tokens) if layer.norm_first else tokens
        inner = layer.linear2(layer.activation(layer.linear1(inner)))
        tokens = tokens + inner if layer.norm_first else layer.norm2(tokens + inner)
    return maps


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder(batch_first, norm_first, training, mode):
    model = encoder(batch_first, norm_first=norm_first, nested=False).train(training)
    tokens = tokens_of(IMAGES, TOKENS, WIDTH)
    captured = observed(model, arranged(tokens, batch_first), mode=mode)
    assert list(captured.maps) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert_maps(captured, _reference_encoder(model, tokens))
    assert [(item.kind, item.images) for item in captured.maps.values()] == [("token", IMAGES)] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
def test_one_encoder_layer_by_itself(batch_first, mode):
    torch.manual_seed(0)
    layer = perturbed(encoder_layer(batch_first), 0.3)
    tokens = tokens_of(IMAGES, TOKENS, WIDTH)
    captured = observed(layer, arranged(tokens, batch_first), mode=mode)
    assert list(captured.maps) in (["self_attn"], ["TransformerEncoderLayer.self_attn"])
    assert_maps(captured, [_reference_weights(layer.self_attn, tokens, tokens)])
    assert [(item.kind, item.images) for item in captured.maps.values()] == [("token", IMAGES)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("masks", [("padding",), ("causal",), ("padding", "causal")])
def test_masked_encoder_is_a_map_or_a_listed_gap(masks, nested, training, mode):
    model = encoder(nested=nested).train(training)
    tokens = tokens_of(IMAGES, TOKENS, WIDTH)
    mask = FUTURE if "causal" in masks else None
    # Nested tensors want the padding at the end.
    padding = torch.arange(TOKENS) >= torch.tensor([[4], [6], [2]]) if "padding" in masks else None
    captured = observed(model, tokens, mask=mask, src_key_padding_mask=padding, mode=mode)
    names = ["layers.0.self_attn", "layers.1.self_attn"]
    assert sorted([*captured.maps, *captured.not_captured]) == names
    if training or mode is torch.enable_grad:
        assert not captured.not_captured
    expected = _reference_encoder(model, tokens, mask, padding)
    real = torch.ones(IMAGES, TOKENS, dtype=torch.bool) if padding is None else ~padding
    for name, reference in zip(names, expected, strict=True):
        if name in captured.maps:
            attended = captured.maps[name]
            assert (attended.kind, attended.images) == ("token", IMAGES)
            for image in range(IMAGES):  # what padding asks is of no consequence, and nested tensors do not hold it
                close(attended.materialize()[image][:, real[image]], reference[image][:, real[image]])
        else:
            assert re.search("mask|nested", captured.not_captured[name])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("keys", [KEYS, TOKENS])
def test_decoder(keys, batch_first, mode):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=batch_first)
    model = perturbed(nn.TransformerDecoder(layer, 2), 0.3)
    target, memory = tokens_of(IMAGES, TOKENS, WIDTH), tokens_of(IMAGES, keys, WIDTH, seed=2)
    given = [arranged(item, batch_first) for item in (target, memory)]
    captured = observed(model, *given, mode=mode)
    names = [f"layers.{i}.{part}" for i in range(2) for part in ("self_attn", "multihead_attn")]
    assert list(captured.maps) == names
    assert not captured.not_captured
    assert [item.kind for item in captured.maps.values()] == ["token", "cross"] * 2
    assert {item.images for item in captured.maps.values()} == {IMAGES}
    first = model.layers[0]
    close(captured.maps[names[0]].materialize(), _reference_weights(first.self_attn, target, target))
    attended = first.self_attn(*[arranged(target, batch_first)] * 3)[0]
    asking = first.norm1(target + arranged(attended, batch_first)).detach()
    close(captured.maps[names[1]].materialize(), _reference_weights(first.multihead_attn, asking, memory))


@pytest.mark.parametrize("mode", MODES)
def test_whole_transformer(mode):
    torch.manual_seed(0)
    model = perturbed(nn.Transformer(WIDTH, HEADS, 1, 1, 24, dropout=0.0, batch_first=True), 0.3)
    source, target = tokens_of(IMAGES, KEYS, WIDTH), tokens_of(IMAGES, TOKENS, WIDTH, seed=2)
    with mode(), capture(model) as captured:
        model(source, target)
    assert not captured.not_captured
    assert {name: (item.kind, item.shape) for name, item in captured.maps.items()} == {
        "encoder.layers.0.self_attn": ("token", (IMAGES, HEADS, KEYS, KEYS)),
        "decoder.layers.0.self_attn": ("token", (IMAGES, HEADS, TOKENS, TOKENS)),
        "decoder.layers.0.multihead_attn": ("cross", (IMAGES, HEADS, TOKENS, KEYS)),
    }


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("images", [1, IMAGES])
def test_an_encoder_behind_a_patch_embedding(batch_first, images):
    """The image count is that of the images, wherever the encoder wants its batch."""

    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, WIDTH, 8, 8)
            self.encoder = nn.TransformerEncoder(encoder_layer(batch_first), 2, enable_nested_tensor=False)

        def forward(self, pixels):
            tokens = self.patches(pixels).flatten(2).mT
            return self.encoder(arranged(tokens, batch_first))

    torch.manual_seed(0)
    model = perturbed(Embedding(), 0.2)
    pixels = tokens_of(images, 3, 32, 32)
    for mode in MODES:
        captured = observed(model, pixels, mode=mode)
        assert list(captured.maps) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
        tokens = model.patches(pixels).flatten(2).mT.detach()
        assert_maps(captured, _reference_encoder(model.encoder, tokens))
        for attended in captured.maps.values():
            assert (attended.kind, attended.images, attended.windows) == ("token", images, 1)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_encoder_under_autocast(mode, norm_first, given):
    """On the CPU, autocast casts within the native kernel."""
    model, tokens = encoder(norm_first=norm_first, nested=False), tokens_of(IMAGES, TOKENS, WIDTH)
    expected = _reference_encoder(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        captured = observed(model, tokens.to(given), mode=mode)
    assert list(captured.maps) == ["layers.0.self_attn", "layers.1.self_attn"]
    for attended, reference in zip(captured.maps.values(), expected, strict=True):
        close(attended.materialize(), reference, 0.05)
