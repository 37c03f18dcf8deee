"""Attention as people write it by hand: what multiplied the values is the map, or the softmax is listed."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from _outside import assert_peaked, close, observed, perturbed, tokens_of
from torch import nn
from torch.nn import functional as F

MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]
HEADS, TOKENS, SIZE, WIDTH = 2, 7, 8, 16
SPELLINGS = {}
FUTURE = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
#: Spellings that write to what autograd needs.
IN_PLACE = set()


def spelling(function):
    """`(q, k, v, module) -> (applied map, output)`, q, k and v `[B, H, N, D]`."""
    SPELLINGS[function.__name__] = function
    return function


def in_place(function):
    IN_PLACE.add(function.__name__)
    return spelling(function)


# -- scores ----------------------------------------------------------------------------------------------------------


@spelling
def plain(q, k, v, _):
    a = (q @ k.mT / math.sqrt(SIZE)).softmax(-1)
    return a, a @ v


@spelling
def scores_by_baddbmm(q, k, v, module):
    bias = module.bias.expand(q.shape[0], -1, -1, -1).flatten(0, 1)
    a = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=0.3).softmax(-1).view(module.map_shape)
    return a, a @ v


@spelling
def scores_by_baddbmm_of_nothing(q, k, v, module):
    """How Megatron and BLOOM write it: an empty buffer that beta takes out."""
    buffer = torch.full((q.shape[0] * HEADS, TOKENS, TOKENS), torch.nan, dtype=q.dtype)
    a = torch.baddbmm(buffer, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.0, alpha=0.4).view(module.map_shape)
    a = a.softmax(-1)
    return a, a @ v


@spelling
def masked_with_infinity(q, k, v, _):
    a = (q @ k.mT).masked_fill(FUTURE, -torch.inf).softmax(-1)
    return a, a @ v


@spelling
def masked_with_a_billion(q, k, v, _):
    a = (q @ k.mT).masked_fill(FUTURE, -1e9).softmax(-1)
    return a, a @ v


@spelling
def masked_with_the_least_number(q, k, v, _):
    scores = q @ k.mT
    a = scores.masked_fill(FUTURE, torch.finfo(scores.dtype).min).softmax(-1)
    return a, a @ v


@in_place
def masked_in_place(q, k, v, _):
    a = (q @ k.mT).masked_fill_(FUTURE, -torch.inf).softmax(-1)
    return a, a @ v


@spelling
def masked_by_where(q, k, v, _):
    scores = q @ k.mT
    a = torch.where(FUTURE, torch.full_like(scores, -torch.inf), scores).softmax(-1)
    return a, a @ v


@spelling
def masked_by_multiplication(q, k, v, _):
    keep = (~FUTURE).float()
    a = ((q @ k.mT) * keep - 1e4 * (1 - keep)).softmax(-1)
    return a, a @ v


@spelling
def padding_of_each_image(q, k, v, _):
    padding = torch.arange(TOKENS) >= torch.arange(TOKENS - q.shape[0], TOKENS)[:, None]
    a = (q @ k.mT).masked_fill(padding[:, None, None], -torch.inf).softmax(-1)
    return a, a @ v


@spelling
def temperature_of_each_head(q, k, v, module):
    a = ((q @ k.mT) * module.temperature.exp()).softmax(-1)
    return a, a @ v


@spelling
def divided_by_a_temperature_of_each_head(q, k, v, module):
    a = ((q @ k.mT) / module.temperature.exp()).softmax(-1)
    return a, a @ v


@spelling
def temperature_of_each_query(q, k, v, _):
    a = ((q @ k.mT) * (1 + torch.arange(TOKENS)[:, None] / 3)).softmax(-1)
    return a, a @ v


@spelling
def temperature_as_a_scalar_parameter(q, k, v, module):
    a = ((q @ k.mT) * module.scalar.exp()).softmax(-1)
    return a, a @ v


@spelling
def scale_by_a_tensor_of_one_element(q, k, v, module):
    a = ((q @ k.mT) * module.scalar.exp()[None]).softmax(-1)
    return a, a @ v


@spelling
def cosine_with_a_clamped_scale(q, k, v, module):
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    a = (scores * module.temperature.clamp(max=math.log(100)).exp() * 9).softmax(-1)
    return a, a @ v


@spelling
def soft_capped(q, k, v, _):
    a = (3 * torch.tanh(q @ k.mT / 3)).softmax(-1)
    return a, a @ v


@spelling
def alibi(q, k, v, _):
    position = torch.arange(TOKENS, dtype=q.dtype)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1, dtype=q.dtype)
    a = (q @ k.mT - (position[:, None] - position).abs() * slopes[:, None, None]).softmax(-1)
    return a, a @ v


@spelling
def relative_positions_of_the_query(q, k, v, module):
    """As in Transformer-XL and BoTNet: the bias is itself a product with the queries."""
    a = (q @ k.mT + q @ module.positions.mT).softmax(-1)
    return a, a @ v


@spelling
def sum_of_two_products(q, k, v, _):
    """Disentangled attention: neither of the two products alone gives the map."""
    a = (q @ k.mT + k @ q.mT).softmax(-1)
    return a, a @ v


@spelling
def difference_of_two_products(q, k, v, _):
    a = (q @ k.mT - k @ q.mT).softmax(-1)
    return a, a @ v


@spelling
def scaled_twice_with_a_bias_between(q, k, v, module):
    a = ((q @ k.mT * 0.5 + module.bias) * 1.5).softmax(-1)
    return a, a @ v


@spelling
def bias_minus_scores(q, k, v, module):
    a = (module.bias - q @ k.mT).softmax(-1)
    return a, a @ v


@spelling
def scores_minus_their_maximum(q, k, v, _):
    scores = q @ k.mT
    a = (scores - scores.amax(-1, keepdim=True)).softmax(-1)
    return a, a @ v


@spelling
def negative_distances(q, k, v, _):
    a = (-torch.cdist(q, k)).softmax(-1)
    return a, a @ v


@spelling
def softmin_of_distances(q, k, v, _):
    a = F.softmin(torch.cdist(q, k), dim=-1)
    return a, a @ v


@spelling
def residual_scores(q, k, v, _):
    """RealFormer: scores of one layer are added to those of the next."""
    before = k @ q.mT * 0.3
    a = (q @ k.mT + before).softmax(-1)
    return a, a @ v


@spelling
def talking_heads_before_the_softmax(q, k, v, module):
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT, module.mix)
    a = scores.softmax(-1)
    return a, a @ v


@spelling
def keys_from_a_cache(q, k, v, _):
    k, v = torch.cat([k, k.flip(2)], 2), torch.cat([v, v.flip(2)], 2)
    a = (q @ k.mT).softmax(-1)
    return a, a @ v


# -- the softmax -----------------------------------------------------------------------------------------------------


@spelling
def logarithm_and_back(q, k, v, _):
    a = (q @ k.mT).log_softmax(-1).exp()
    return a, a @ v


@spelling
def softmax_in_float32(q, k, v, _):
    a = F.softmax(q @ k.mT, dim=-1, dtype=torch.float32).to(q.dtype)
    return a, a @ v


@spelling
def softmax_in_float64(q, k, v, _):
    a = (q @ k.mT).double().softmax(-1).type_as(v)
    return a, a @ v


@spelling
def softmax_of_a_positive_axis(q, k, v, _):
    a = torch.softmax(q @ k.mT, 3)
    return a, a @ v


@spelling
def softmax_module(q, k, v, module):
    a = module.softmax(q @ k.mT)
    return a, a @ v


@spelling
def special_softmax(q, k, v, _):
    a = torch.special.softmax(q @ k.mT, -1)
    return a, a @ v


@in_place
def softmax_into_its_own_scores(q, k, v, _):
    scores = q @ k.mT
    torch.softmax(scores, -1, out=scores)
    return scores.clone(), scores @ v


@spelling
def softmax_over_the_first_of_two(q, k, v, _):
    """Keys by queries, and a softmax over the keys."""
    a = (k @ q.mT).softmax(-2).mT
    return a, a @ v


@spelling
def transposed_before_the_softmax(q, k, v, _):
    a = (k @ q.mT).mT.softmax(-1)
    return a, a @ v


@spelling
def heads_last(q, k, v, _):
    q, k, v = (item.transpose(1, 2) for item in (q, k, v))
    a = torch.einsum("bihd,bjhd->bijh", q, k).softmax(2)
    return a.permute(0, 3, 1, 2), torch.einsum("bijh,bjhd->bihd", a, v)


@spelling
def operators_called_by_name(q, k, v, module):
    aten = torch.ops.aten
    scores = aten.bmm(q.flatten(0, 1), aten.transpose(k.flatten(0, 1), 1, 2))
    a = aten._softmax(aten.mul(scores, 0.4), -1, False)
    return a.view(module.map_shape), aten.bmm(a, v.flatten(0, 1))


# -- after the softmax -----------------------------------------------------------------------------------------------


@spelling
def dropout_in_evaluation(q, k, v, module):
    a = module.dropout(F.dropout((q @ k.mT).softmax(-1), 0.3, training=False))
    return a, a @ v


@spelling
def sink_that_is_dropped(q, k, v, module):
    """As in gpt-oss: a logit of its own for attending nowhere."""
    sink = module.temperature.expand(q.shape[0], -1, TOKENS, 1)
    a = torch.cat([q @ k.mT, sink], -1).softmax(-1)[..., :-1]
    return a, a @ v


@spelling
def renormalised_after_a_mask(q, k, v, _):
    a = (q @ k.mT).softmax(-1) * (~FUTURE)
    a = a / a.sum(-1, keepdim=True)
    return a, a @ v


@spelling
def gated_by_a_sigmoid(q, k, v, module):
    a = (q @ k.mT).softmax(-1) * module.bias.sigmoid()
    return a, a @ v


@spelling
def convex_sum_with_positions(q, k, v, module):
    """ConViT: a learnt mixture of two softmaxes."""
    gate = module.temperature.sigmoid()
    a = (1 - gate) * (q @ k.mT).softmax(-1) + gate * module.bias.softmax(-1)
    return a, a @ v


@spelling
def difference_of_two_softmaxes(q, k, v, _):
    """Differential attention."""
    a = (q @ k.mT).softmax(-1) - 0.4 * (k @ q.mT).softmax(-1)
    return a, a @ v


@spelling
def identity_added(q, k, v, _):
    a = (q @ k.mT).softmax(-1) + torch.eye(TOKENS)
    return a, a @ v


@spelling
def mean_removed(q, k, v, _):
    a = (q @ k.mT).softmax(-1)
    a = a - a.mean(-1, keepdim=True)
    return a, a @ v


@spelling
def cast_twice(q, k, v, _):
    a = (q @ k.mT).softmax(-1).to(torch.bfloat16).to(q.dtype)
    return a, a @ v


@spelling
def heads_averaged(q, k, v, _):
    a = (q @ k.mT).softmax(-1).mean(1, keepdim=True)
    return a, a @ v.mean(1, keepdim=True)


@spelling
def heads_reordered(q, k, v, _):
    a = (q @ k.mT).softmax(-1).flip(1)
    return a, a @ v


# -- the product with the values -------------------------------------------------------------------------------------


@spelling
def values_by_baddbmm(q, k, v, _):
    a = (q @ k.mT).softmax(-1)
    out = torch.baddbmm(v.flatten(0, 1), a.flatten(0, 1), v.flatten(0, 1))
    return a, out


@spelling
def values_with_heads_behind_tokens(q, k, v, _):
    a = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return a, torch.einsum("bhij,bjhd->bihd", a, v.transpose(1, 2))


@spelling
def values_and_projection_in_one(q, k, v, module):
    a = (q @ k.mT).softmax(-1)
    return a, torch.einsum("bhij,bhjd,hde->bie", a, v, module.projection)


@spelling
def one_row_of_queries_at_a_time(q, k, v, _):
    a = (q @ k.mT).softmax(-1)
    return a, torch.stack([a[:, :, i : i + 1] @ v for i in range(TOKENS)])


@spelling
def sum_of_products(q, k, v, _):
    a = (q @ k.mT).softmax(-1)
    return a, (a[..., None] * v[:, :, None]).sum(-2)


@spelling
def vector_products(q, k, v, _):
    a = (q @ k.mT).softmax(-1)
    return a, torch.stack([torch.mv(a[0, 0], v[0, 0, :, d]) for d in range(SIZE)])


@spelling
def vectorised_map(q, k, v, _):
    def attend(q, k, v):
        a = (q @ k.mT).softmax(-1)
        return a, a @ v

    return torch.vmap(attend)(q, k, v)


# -- fused -----------------------------------------------------------------------------------------------------------


def fused_reference(q, k, scale=SIZE**-0.5, mask=None):
    scores = torch.einsum("...id,...jd->...ij", q, k) * scale
    scores = scores if mask is None else scores + mask
    weights = (scores - scores.amax(-1, keepdim=True)).exp()  # no softmax, which would be a second one
    return weights / weights.sum(-1, keepdim=True)


@spelling
def fused(q, k, v, _):
    return fused_reference(q, k), F.scaled_dot_product_attention(q, k, v)


@spelling
def fused_by_name(q, k, v, _):
    return fused_reference(q, k), torch.ops.aten.scaled_dot_product_attention(query=q, key=k, value=v)


@spelling
def fused_and_causal(q, k, v, _):
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(FUTURE, -torch.inf)
    return fused_reference(q, k, mask=mask), F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling
def fused_with_a_boolean_mask(q, k, v, _):
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(FUTURE, -torch.inf)
    return fused_reference(q, k, mask=mask), F.scaled_dot_product_attention(q, k, v, ~FUTURE)


@spelling
def fused_with_a_bias_and_a_scale(q, k, v, module):
    out = F.scaled_dot_product_attention(q, k, v, module.bias, scale=0.9)
    return fused_reference(q, k, 0.9, module.bias), out


@spelling
def fused_with_a_mask_of_each_image(q, k, v, _):
    padding = torch.arange(TOKENS) < torch.arange(TOKENS - q.shape[0] + 1, TOKENS + 1)[:, None]
    mask = torch.zeros(padding.shape).masked_fill(~padding, -torch.inf)[:, None, None]
    return fused_reference(q, k, mask=mask), F.scaled_dot_product_attention(q, k, v, padding[:, None, None])


@spelling
def fused_without_heads(q, k, v, _):
    out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    return fused_reference(q, k), out


@spelling
def fused_with_five_axes(q, k, v, _):
    out = F.scaled_dot_product_attention(*(item[:, None] for item in (q, k, v)))
    return fused_reference(q, k), out


class Spelled(nn.Module):
    """Attention among seven tokens of two heads, spelled in one of many ways."""

    def __init__(self, name):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.bias = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))
        self.temperature = nn.Parameter(torch.randn(1, HEADS, 1, 1))
        self.scalar = nn.Parameter(torch.tensor(0.3))
        self.positions = nn.Parameter(torch.randn(TOKENS, SIZE))
        self.mix = nn.Parameter(torch.randn(HEADS, HEADS))
        self.projection = nn.Parameter(torch.randn(HEADS, SIZE, WIDTH))
        self.softmax, self.dropout = nn.Softmax(-1), nn.Dropout(0.3)
        self.num_heads, self.spell = HEADS, SPELLINGS[name]
        self.map_shape, self.applied = (), None

    def forward(self, x):
        self.map_shape = (len(x), HEADS, TOKENS, TOKENS)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        self.applied, out = self.spell(q, k, v, self)
        return out


#: No product with the values is seen as one, so a listed reason is allowed.
MAY_BE_LISTED = {
    "sink_that_is_dropped",
    "logarithm_and_back",
    "softmax_into_its_own_scores",
    "softmax_over_the_first_of_two",
    "heads_last",
    "heads_averaged",
    "one_row_of_queries_at_a_time",
    "sum_of_products",
    "vector_products",
    "vectorised_map",
}
#: Their queries and keys are compared by no product, so they may pass for gates.
DISTANCES = {"negative_distances", "softmin_of_distances"}
#: Two softmaxes are one map: the other may be listed, too.
TWO_SOFTMAXES = {"convex_sum_with_positions", "difference_of_two_softmaxes"}
#: Maps of which rows do not sum to 1, or of which entries may be negative.
NOT_PROBABILITIES = {"sink_that_is_dropped", "gated_by_a_sigmoid", "difference_of_two_softmaxes", "identity_added"}
NOT_PROBABILITIES |= {"mean_removed"}


def spelled(name, mode=torch.no_grad):
    torch.manual_seed(0)
    module = perturbed(Spelled(name), 0.3)
    if name in IN_PLACE and mode is torch.enable_grad:
        module.requires_grad_(False)
    return module


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_applied_map_of_every_spelling(name, images, mode):
    module = spelled(name, mode)
    captured = observed(module, tokens_of(images, TOKENS, WIDTH), mode=mode)
    if name in MAY_BE_LISTED and not captured.maps:
        assert len(captured.not_captured) == 1
        assert "compares no queries with keys" not in next(iter(captured.not_captured.values()))
        return
    assert not captured.not_captured or name in TWO_SOFTMAXES
    (attention,) = captured.maps.values()
    applied = module.applied.detach()
    assert_peaked(applied)
    assert attention.shape == tuple(applied.shape)
    assert (attention.images, attention.windows) == (images, 1)
    assert attention.kind == "token" or (name in DISTANCES and attention.kind == "gate")
    tolerance = 0.004 if name == "cast_twice" else 1e-5 if applied.abs().max() < 2 else 1e-4
    close(attention.materialize(), applied, tolerance)
    close(attention.columns(2, 6), applied[..., 2:6], tolerance)
    close(attention.rows(1, 5), applied[..., 1:5, :], tolerance)
    if name in NOT_PROBABILITIES:
        assert not attention.is_probability
    if attention.is_probability:
        close(applied.sum(-1), torch.ones(applied.shape[:-1]), 1e-2 if name == "cast_twice" else 1e-4)
        assert applied.min() >= 0


@pytest.mark.parametrize("name", SPELLINGS)
def test_double_precision(name):
    module = spelled(name).double()
    captured = observed(module, tokens_of(2, TOKENS, WIDTH, dtype=torch.float64))
    for attention in captured.maps.values():
        if module.applied.shape == attention.shape:
            tolerance = {"softmax_in_float32": 1e-6, "cast_twice": 0.004}.get(name, 1e-11)
            close(attention.materialize(), module.applied, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "softmax_in_float32", "temperature_of_each_head", "masked_with_infinity"])
def test_half_precision(name, dtype):
    """The map that multiplied the values, up to the rounding of the dtype that it had."""
    module = spelled(name).to(dtype)
    captured = observed(module, tokens_of(2, TOKENS, WIDTH, dtype=dtype))
    (attention,) = captured.maps.values()
    assert attention.materialize().dtype == torch.float32
    close(attention.materialize(), module.applied, 0.02 if dtype == torch.bfloat16 else 0.003)


# -- shapes of their own ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """A layer whose name says what it is, with weights to attend with."""

    def __init__(self, heads=HEADS):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.heads, self.applied = heads, None


class WithoutBatch(Attention):
    """Tokens `[N, C]`, one head: products of plain matrices."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        self.applied = (q @ k.T / 4).softmax(-1)
        return self.applied @ v


class WithoutHeads(Attention):
    """Tokens `[B, N, C]`, one head."""

    def __init__(self):
        super().__init__(heads=1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        self.applied = (q @ k.mT / 4).softmax(-1)
        return self.applied @ v


class BatchBehindHeads(Attention):
    """Tokens `[B, N, C]`, maps `[H, B, N, N]`."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 3, 0, 1, 4)
        self.applied = (q @ k.mT / 4).softmax(-1)
        return self.applied @ v


class GroupedQueries(Attention):
    """Four query heads on two key heads, with an axis for the group."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q = q.unflatten(-1, (2, 2, 4)).permute(0, 2, 3, 1, 4)
        k, v = (item.unflatten(-1, (2, 8))[..., :4].permute(0, 2, 1, 3) for item in (k, v))
        self.applied = torch.einsum("bghid,bgjd->bghij", q, k).softmax(-1)
        return torch.einsum("bghij,bgjd->bghid", self.applied, v)


class RepeatedKeys(Attention):
    """Four query heads on two key heads, repeated."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q = q.unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (item.unflatten(-1, (2, 8))[..., :4].transpose(1, 2).repeat_interleave(2, 1) for item in (k, v))
        self.applied = (q @ k.mT).softmax(-1)
        return self.applied @ v


@pytest.mark.parametrize("mode", MODES)
def test_tokens_without_a_batch(mode):
    module = perturbed(WithoutBatch(), 0.3)
    captured = observed(module, tokens_of(TOKENS, WIDTH), mode=mode)
    assert len(captured.maps) + len(captured.not_captured) == 1
    for attention in captured.maps.values():
        assert attention.shape == (1, 1, TOKENS, TOKENS)
        assert (attention.kind, attention.images) == ("token", 1)
        close(attention.materialize()[0, 0], module.applied)


def test_tokens_without_a_batch_in_a_module_of_any_name():
    class Mixer(WithoutBatch):
        pass

    captured = observed(perturbed(Mixer(), 0.3), tokens_of(TOKENS, WIDTH))
    assert len(captured.maps) + len(captured.not_captured) == 1


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("layer", [WithoutHeads, GroupedQueries, RepeatedKeys, BatchBehindHeads])
def test_shapes_of_their_own(layer, images):
    torch.manual_seed(0)
    module = perturbed(layer(), 0.3)
    captured = observed(module, tokens_of(images, TOKENS, WIDTH))
    assert not captured.not_captured
    (attention,) = captured.maps.values()
    assert (attention.kind, attention.images, attention.windows) == ("token", images, 1)
    applied = module.applied
    if layer is BatchBehindHeads:
        applied = applied.transpose(0, 1)
    close(attention.materialize(), applied.reshape(images, -1, TOKENS, TOKENS))


# -- several layers --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = WithoutHeads()

    def forward(self, x):
        return x + self.attn(x)


def test_a_layer_used_twice_has_two_names():
    torch.manual_seed(0)
    block = perturbed(Block(), 0.2)
    model = nn.Sequential(block, block)  # one block, two places
    captured = observed(model, tokens_of(2, TOKENS, WIDTH))
    assert list(captured.maps) == ["0.attn", "0.attn#1"]
    close(captured.maps["0.attn#1"].materialize()[:, 0], block.attn.applied)
    assert (captured.maps["0.attn"].materialize() - captured.maps["0.attn#1"].materialize()).abs().max() > 0.01


def test_weights_that_are_shared_between_layers():
    torch.manual_seed(0)
    model = perturbed(nn.Sequential(Block(), Block()), 0.2)
    model[1].attn.qkv = model[0].attn.qkv
    captured = observed(model, tokens_of(2, TOKENS, WIDTH))
    assert list(captured.maps) == ["0.attn", "1.attn"]
    for index in range(2):
        close(captured.maps[f"{index}.attn"].materialize()[:, 0], model[index].attn.applied)


def test_models_within_models():
    torch.manual_seed(0)
    inner = nn.Sequential(Block(), nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True))
    model = perturbed(nn.ModuleDict({"one": inner, "two": nn.Sequential(Block())}), 0.2)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["two"](self.parts["one"](x)) + self.parts["one"](x)

    captured = observed(Both().eval(), tokens_of(2, TOKENS, WIDTH))
    names = ["parts.one.0.attn", "parts.one.1.self_attn", "parts.two.0.attn"]
    assert list(captured.maps) == [*names, "parts.one.0.attn#1", "parts.one.1.self_attn#1"]


def test_a_softmax_in_one_module_and_its_product_in_another():
    class Scores(nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1)

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = Scores()

        def forward(self, x):
            return self.scores(x) @ x

    tokens = tokens_of(2, TOKENS, WIDTH) / 2
    captured = observed(Apart(), tokens)
    assert not captured.not_captured
    (attention,) = captured.maps.values()
    close(attention.materialize()[:, 0], (tokens @ tokens.mT).softmax(-1))


def test_one_softmax_on_two_sets_of_values():
    """Value residuals, or keys that are values, too: the map is reported, and nothing is listed."""

    class Twice(nn.Module):
        def forward(self, x):
            a = (x @ x.mT).softmax(-1)
            return a @ x + a @ x.flip(-1)

    tokens = tokens_of(2, TOKENS, WIDTH) / 2
    captured = observed(Twice(), tokens)
    assert not captured.not_captured
    assert 1 <= len(captured.maps) <= 2
    for attention in captured.maps.values():
        close(attention.materialize()[:, 0], (tokens @ tokens.mT).softmax(-1))


def test_a_map_that_is_returned_and_applied_elsewhere_is_listed_or_a_map():
    """Attention rollout inside a model: maps are multiplied with each other before they meet values."""

    class Rollout(nn.Module):
        def forward(self, x):
            one, two = (x @ x.mT).softmax(-1), (x @ x.flip(-1).mT).softmax(-1)
            return (one @ two) @ x

    captured = observed(Rollout(), tokens_of(2, TOKENS, WIDTH) / 2)
    assert len(captured.maps) + len(captured.not_captured) >= 2


def test_linear_attention_of_two_softmaxes_is_no_token_map():
    """Efficient attention: channels of queries and tokens of keys are normalised apart, and never compared."""

    class Efficient(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
            return q.softmax(-1) @ (k.softmax(-2).mT @ v)

    captured = observed(perturbed(Efficient(), 0.3), tokens_of(2, TOKENS, WIDTH))
    assert len(captured.maps) + len(captured.not_captured) == 2
    assert not [name for name, item in captured.maps.items() if item.kind in ("token", "class", "window", "pooling")]


@pytest.mark.parametrize("written", ["exp", "sigmoid", "relu"])
def test_attention_without_a_softmax_is_listed(written):
    class Unusual(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Inner()

        def forward(self, x):
            return self.attn(x)

    class InnerAttention(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            a = getattr(torch, written)(q @ k.mT / 9)
            return (a / (a.sum(-1, keepdim=True) + 1e-3)) @ v

    Inner = InnerAttention
    captured = observed(perturbed(Unusual(), 0.1), tokens_of(2, TOKENS, WIDTH))
    assert not captured.maps
    assert list(captured.not_captured) == ["attn"]


@pytest.mark.parametrize("images", [1, 3])
def test_one_head_at_a_time(images):
    """One softmax of all heads, and a product for each: the maps together, or one of them, are what was applied."""

    class HeadByHead(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
            self.applied = (q @ k.mT).softmax(-1)
            return torch.stack([self.applied[:, head] @ v[:, head] for head in range(HEADS)], 1)

    module = perturbed(HeadByHead(), 0.3)
    captured = observed(module, tokens_of(images, TOKENS, WIDTH))
    assert captured.maps or captured.not_captured
    maps = [item.materialize() for item in captured.maps.values()]
    if len(maps) == HEADS:
        close(torch.cat(maps, 1), module.applied)
    elif maps:
        close(maps[0], module.applied)
    assert {item.images for item in captured.maps.values()} <= {images}


def test_chunks_of_queries_are_all_there():
    class Chunked(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
            self.applied = [(part @ k.mT).softmax(-1) for part in q.split(3, 2)]
            return torch.cat([a @ v for a in self.applied], 2)

    module = perturbed(Chunked(), 0.3)
    captured = observed(module, tokens_of(2, TOKENS, WIDTH))
    assert not captured.not_captured
    assert len(captured.maps) == 3
    for attention, applied in zip(captured.maps.values(), module.applied, strict=True):
        close(attention.materialize(), applied)


# -- threads and kernels of their own --------------------------------------------------------------------------------


def test_attention_in_a_thread_is_listed():
    class OneHeadAttention(WithoutHeads):
        pass

    class Threaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = OneHeadAttention()

        def forward(self, x):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(self.attn, x).result()

    captured = observed(perturbed(Threaded(), 0.2), tokens_of(2, TOKENS, WIDTH), mode=torch.enable_grad)
    assert not captured.maps
    assert "thread" in captured.not_captured["attn"]


def test_a_module_of_any_name_that_attends_in_a_thread_is_listed():
    class Mixer(WithoutHeads):
        pass

    class Threaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = Mixer()

        def forward(self, x):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(self.mix, x).result()

    captured = observed(perturbed(Threaded(), 0.2), tokens_of(2, TOKENS, WIDTH), mode=torch.enable_grad)
    assert captured.not_captured


def test_flex_attention_is_listed_and_leaves_the_model_working():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    class Flexible(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 1, WIDTH)).permute(2, 0, 3, 1, 4)
            return flex.flex_attention(q, k, v)

    captured = observed(perturbed(Flexible(), 0.2), tokens_of(2, 16, WIDTH))
    assert len(captured.maps) + len(captured.not_captured) == 1
    assert all("flex_attention" in reason for reason in captured.not_captured.values())
