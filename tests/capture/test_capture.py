"""Capture: exact maps with fused attention on, untouched outputs, nothing left behind, no silence."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import timm
import torch
from _models import _reference_dropped_maps, build, perturbed, unfused_twin
from torch import nn
from torch.nn.modules import module as module_hooks

from collapse_probe.capture import QueryKey, Stored, capture, layer_groups
from collapse_probe.capture.attention_map import Combination, HeadMix
from collapse_probe.capture.axes import Site
from collapse_probe.capture.kernels import fused_sighting
from collapse_probe.errors import UsageError

GRAD_MODES = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))

VITS = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "deit3_small_patch16_224": {},
    "vit_medium_patch16_gap_240": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_rpn_224": {},
    "beit_base_patch16_224": {},
    "eva02_tiny_patch14_224": {},
}


def captured_maps(model, images=IMAGES):
    with torch.no_grad(), capture(model) as captured:
        model(images)
    return captured


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_fused_maps_equal_those_of_the_unfused_model(name, dtype, tolerance):
    model = build(name, **VITS[name]).to(dtype)
    captured = captured_maps(model, IMAGES.to(dtype))
    expected = _reference_dropped_maps(unfused_twin(name, model, **VITS[name]), IMAGES.to(dtype))
    assert not captured.not_captured
    assert len(captured.maps) == len(expected) == 3
    for attention, reference in zip(captured.maps.values(), expected, strict=True):
        assert reference.max() > 3 / reference.shape[-1]  # peaked, or the comparison says nothing
        keys = attention.shape[3]
        torch.testing.assert_close(attention.materialize(), reference, atol=tolerance, rtol=0)
        torch.testing.assert_close(attention.columns(0, keys), reference, atol=tolerance, rtol=0)
        torch.testing.assert_close(attention.columns(2, 5), reference[..., 2:5], atol=tolerance, rtol=0)
        torch.testing.assert_close(attention.rows(1, 4), reference[:, :, 1:4], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "deepvit_16b"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", GRAD_MODES)
def test_outputs_do_not_change_by_a_bit(name, fused, mode):
    model = build(name, fused=fused)
    with mode():
        plain = model(IMAGES)
        with capture(model) as captured:
            observed = model(IMAGES)
    assert torch.equal(plain, observed)
    assert list(captured.maps) == [f"blocks.{i}.attn" for i in range(3)]
    assert all(not item.materialize().requires_grad for item in captured.maps.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_captures_what_the_kernel_saw(dtype):
    model = build("vit_tiny_patch16_224")
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        plain = model(IMAGES)
        with capture(model) as captured:
            observed = model(IMAGES)
    assert torch.equal(plain, observed)
    source = captured.maps["blocks.1.attn"].source
    assert source.q.dtype == dtype
    wide = torch.softmax(source.q.double() @ source.k.double().mT * source.scale, -1)
    maps = captured.maps["blocks.1.attn"].materialize()
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.double(), wide, atol=1e-5, rtol=0)


def test_gradients_do_not_change():
    model = build("vit_tiny_patch16_224")

    def gradients():
        model.zero_grad()
        model(IMAGES).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    with capture(model):
        observed = gradients()
    assert all(torch.equal(one, other) for one, other in zip(plain, observed, strict=True))


def test_unfused_softmax_is_followed_to_queries_and_keys():
    model = build("vit_tiny_patch16_224", fused=False)
    captured = captured_maps(model)
    for attention, reference in zip(captured.maps.values(), _reference_dropped_maps(model, IMAGES), strict=True):
        assert isinstance(attention.source, QueryKey)
        torch.testing.assert_close(attention.columns(0, 17), reference, atol=1e-5, rtol=0)


# -- re-attention ----------------------------------------------------------------------------------------------------


def _reference_reattention(model, images):
    """(softmax, applied) of every block by the module's own parameters in float64."""
    inputs = []
    handles = [block.attn.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for block in model.blocks]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    for block, tokens in zip(model.blocks, inputs, strict=True):
        attn = copy.deepcopy(block.attn).double()
        batch, count, _ = tokens.shape
        qkv = attn.qkv(tokens.double()).reshape(batch, count, 3, attn.num_heads, -1)
        q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
        softmax = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1)
        mixed = torch.einsum("oh,bhij->boij", attn.reatten_matrix.weight[:, :, 0, 0], softmax)
        mixed = mixed + attn.reatten_matrix.bias[None, :, None, None]
        norm = attn.var_norm
        mixed = (mixed - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        yield softmax.detach(), (mixed * norm.weight[:, None, None] + norm.bias[:, None, None]).detach()


def test_reattention_maps_are_the_applied_ones_and_the_softmax_is_reachable():
    model = build("deepvit_16b")
    captured = captured_maps(model)
    assert len(captured.maps) == 3
    for attention, (softmax, applied) in zip(
        captured.maps.values(), _reference_reattention(model, IMAGES), strict=True
    ):
        assert not attention.is_probability
        assert attention.softmax.is_probability
        assert applied.min() < 0
        torch.testing.assert_close(attention.materialize().double(), applied, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(attention.columns(3, 9).double(), applied[..., 3:9], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(attention.softmax.materialize().double(), softmax, atol=1e-5, rtol=0)
        out = torch.empty(3, 3, 6, 17)
        underneath = attention.write_columns(3, 9, out)
        torch.testing.assert_close(out.mT, attention.columns(3, 9))
        torch.testing.assert_close(underneath.mT, attention.softmax.columns(3, 9))
        assert isinstance(attention.source, QueryKey)  # lazy: no map is kept


def test_reattention_in_training_uses_the_statistics_of_the_batch():
    model = build("deepvit_16b").train()
    seen = []
    handles = [
        block.attn.var_norm.register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
        for block in model.blocks
    ]
    with capture(model) as captured:
        model(IMAGES)
    for handle in handles:
        handle.remove()
    for attention, applied in zip(captured.maps.values(), seen, strict=True):
        torch.testing.assert_close(attention.materialize(), applied, atol=1e-3, rtol=1e-3)


def test_the_applied_map_times_values_is_what_the_module_computed():
    model = build("deepvit_16b")
    outputs = []
    handle = model.blocks[1].attn.proj.register_forward_pre_hook(lambda _m, args: outputs.append(args[0]))
    values = []
    other = model.blocks[1].attn.qkv.register_forward_hook(lambda _m, _i, out: values.append(out))
    captured = captured_maps(model)
    handle.remove()
    other.remove()
    batch, count, _ = outputs[0].shape
    v = values[0].reshape(batch, count, 3, 3, 16)[:, :, 2].transpose(1, 2)
    product = (captured.maps["blocks.1.attn"].materialize() @ v).transpose(1, 2).reshape(batch, count, -1)
    torch.testing.assert_close(product, outputs[0], atol=1e-4, rtol=1e-4)


# -- models outside timm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_keeps_its_fast_path(mode, norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    encoder = perturbed(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 0.3)
    tokens = torch.randn(2, 6, 32)
    with mode():
        plain = encoder(tokens)
        with capture(encoder) as captured:
            observed = encoder(tokens)
    assert torch.equal(plain, observed)
    assert list(captured.maps) == ["layers.0.self_attn", "layers.1.self_attn"]
    first = encoder.layers[0]
    normed = first.norm1(tokens) if norm_first else tokens
    _, expected = first.self_attn(normed, normed, normed, need_weights=True, average_attn_weights=False)
    torch.testing.assert_close(captured.maps["layers.0.self_attn"].materialize(), expected, atol=1e-5, rtol=0)


class HandWritten(nn.Module):
    """Attention the way a tutorial writes it, with a mask and a learnt bias."""

    def __init__(self, fused):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(2, 5, 5))
        self.fused = fused

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, 12)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.fused:
            return nn.functional.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=self.bias, scale=0.7)
        weights = (q @ k.transpose(-1, -2) * 0.7 + self.bias).softmax(dim=-1)
        return weights @ v


@pytest.mark.parametrize("fused", [True, False])
def test_a_hand_written_module_with_bias(fused):
    torch.manual_seed(0)
    module = perturbed(HandWritten(fused), 0.3)
    tokens = torch.randn(2, 5, 24)
    captured = captured_maps(module, tokens)
    (name, attention), *others = captured.maps.items()
    assert not others
    assert name == "HandWritten"
    q, k = (part(tokens).unflatten(-1, (2, 12)).transpose(1, 2) for part in (module.q, module.k))
    expected = torch.stack([torch.softmax(q[b] @ k[b].mT * 0.7 + module.bias, -1) for b in range(2)])
    torch.testing.assert_close(attention.materialize(), expected.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(attention.columns(1, 3), expected[..., 1:3].detach(), atol=1e-5, rtol=0)
    with torch.no_grad():
        module.bias.add_(1.0)  # a later step of training must not reach into a map that was captured before
        module.bias[0, 0, 0] = 50
    torch.testing.assert_close(attention.materialize(), expected.detach(), atol=1e-5, rtol=0)


class Causal(nn.Module):
    def __init__(self, mask=None, heads=4):
        super().__init__()
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 16)
        self.mask, self.heads = mask, heads

    def forward(self, x):
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = v = self.kv(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(
            q, k, v, self.mask, is_causal=self.mask is None, enable_gqa=True
        )


def test_causal_and_grouped_queries():
    module = perturbed(Causal(), 0.3)
    tokens = torch.randn(2, 6, 32)
    attention = captured_maps(module, tokens).maps["Causal"]
    q = module.q(tokens).unflatten(-1, (4, -1)).transpose(1, 2)
    k = module.kv(tokens).unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1)
    logits = (q @ k.mT / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(attention.materialize(), logits.softmax(-1).detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(attention.columns(2, 5), logits.softmax(-1)[..., 2:5].detach(), atol=1e-5, rtol=0)


def test_fully_masked_rows_are_zero_as_in_the_kernel():
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    mask[:, 4] = False
    attention = captured_maps(perturbed(Causal(mask), 0.3), torch.randn(2, 6, 32)).maps["Causal"]
    maps = attention.materialize()
    assert maps.isfinite().all()
    assert (maps[:, :, 2] == 0).all()
    assert (maps[..., 4] == 0).all()
    torch.testing.assert_close(attention.columns(0, 6), maps)


@pytest.mark.parametrize("known", [None, -torch.inf])
def test_fully_masked_rows_are_zero_without_a_kernels_normalizer(known):
    torch.manual_seed(0)
    bias = torch.zeros(1, 1, 4, 4)
    bias[..., 1, :] = -torch.inf
    source = QueryKey(torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), 1.0, bias)
    if known is not None:
        source.log_normalizer = (source.q @ source.k.mT + bias).logsumexp(-1)
        assert source.log_normalizer[0, 0, 1] == known
    for maps in (source.columns(0, 4), source.rows(0, 4)):
        assert (maps[0, 0, 1] == 0).all()
        torch.testing.assert_close(maps[0, 0, [0, 2, 3]].sum(-1), torch.ones(3))


class TwiceAttending(nn.Module):
    def forward(self, x):
        sdpa = nn.functional.scaled_dot_product_attention
        return sdpa(x, x, sdpa(x, 2 * x, x))


def test_a_layer_that_attends_twice_gives_two_names():
    captured = captured_maps(TwiceAttending(), torch.randn(2, 2, 5, 8))
    assert list(captured.maps) == ["TwiceAttending", "TwiceAttending#1"]
    assert not torch.allclose(*(item.materialize() for item in captured.maps.values()))


class Gated(nn.Module):
    """Something after the softmax that is not affine over heads: the operand itself must be kept."""

    def forward(self, x):
        weights = (x @ x.transpose(-1, -2)).softmax(-1)
        return (weights * weights) @ x


def test_what_is_not_understood_is_kept_as_it_was():
    tokens = torch.randn(2, 2, 5, 8)
    attention = captured_maps(Gated(), tokens).maps["Gated"]
    softmax = (tokens @ tokens.mT).softmax(-1)
    assert isinstance(attention.source, Stored)
    assert not attention.is_probability
    torch.testing.assert_close(attention.materialize(), softmax**2)
    torch.testing.assert_close(attention.softmax.materialize(), softmax)


# -- no silence ------------------------------------------------------------------------------------------------------


def test_dropout_inside_a_fused_kernel_is_a_gap_with_a_reason():
    """On the CPU dropout never runs inside the fused kernel, so the operator's arguments are handed over directly."""
    tensor = torch.randn(1, 2, 4, 8)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    sighting = fused_sighting(0, kernel, (tensor, tensor, tensor), {"dropout_p": 0.5}, tensor, Site())
    assert sighting.source is None
    assert "dropout inside a fused attention kernel" in sighting.reason


def test_dropout_that_the_cpu_spells_out_is_in_the_applied_map():
    model = build("vit_tiny_patch16_224", attn_drop_rate=0.5).train()
    with capture(model) as captured:
        model(IMAGES)
    for attention in captured.maps.values():
        applied, softmax = attention.materialize(), attention.softmax.materialize()
        kept = applied != 0
        assert 0.3 < kept.float().mean() < 0.7
        torch.testing.assert_close(applied[kept], 2 * softmax[kept], atol=1e-5, rtol=1e-5)


class LinearAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8)

    def forward(self, x):
        return self.to_q(x) @ (x.mT @ x)


def test_an_attention_layer_without_a_softmax_is_listed():
    captured = captured_maps(nn.Sequential(LinearAttention()), torch.randn(1, 4, 8))
    assert not captured.maps
    assert list(captured.not_captured) == ["0"]


def test_a_classifier_softmax_is_not_attention():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.Softmax(-1), nn.Linear(4, 2))
    captured = captured_maps(model)
    assert not captured.maps
    assert not captured.not_captured


def test_class_attention_is_its_own_kind_and_group():
    captured = captured_maps(build("vit_base_patch16_siglip_224"))
    kinds = {name: item.kind for name, item in captured.maps.items()}
    assert kinds == {
        "blocks.0.attn": "token",
        "blocks.1.attn": "token",
        "blocks.2.attn": "token",
        "attn_pool": "pooling",
    }
    assert layer_groups(captured.maps) == [["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"], ["attn_pool"]]


@pytest.mark.parametrize(
    ("name", "kwargs", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("vit_small_patch14_reg4_dinov2", {}, 5),
        ("vit_medium_patch16_gap_240", {}, 0),
        ("vit_tiny_patch16_224", {"img_size": (32, 64)}, 1),
    ],
)
def test_token_layout(name, kwargs, prefix):
    model = build(name, **kwargs)
    size = kwargs.get("img_size", (32, 32))
    layout = captured_maps(model, torch.randn(1, 3, *size)).maps["blocks.0.attn"].layout
    assert layout.prefix_tokens == prefix
    assert layout.grid == (size[0] // 8, size[1] // 8)


# -- nothing is left behind ------------------------------------------------------------------------------------------


def hooks_of(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return (
        sum(len(getattr(module, table)) for module in model.modules() for table in tables)
        + len(module_hooks._global_forward_hooks)
        + len(module_hooks._global_forward_pre_hooks)
    )


class Exploding(nn.Module):
    def forward(self, _):
        raise RuntimeError("boom")


def test_hooks_and_modes_are_restored_also_after_an_exception():
    model = build("vit_tiny_patch16_224")
    model.blocks[0].train()
    modes = [module.training for module in model.modules()]
    fused = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    before = hooks_of(model)
    captured_maps(model)
    good = model.blocks[1].mlp
    model.blocks[1].mlp = Exploding()
    with pytest.raises(RuntimeError, match="boom"), capture(model):
        model(IMAGES)
    model.blocks[1].mlp = good
    assert hooks_of(model) == before
    assert [module.training for module in model.modules()] == modes
    assert [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")] == fused
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert len(captured_maps(model).maps) == 3  # and the next capture works


def test_an_exception_inside_the_block_leaves_capture_usable():
    model = build("vit_tiny_patch16_224")
    good = model.blocks[1].mlp
    with torch.no_grad(), capture(model) as captured:
        model.blocks[1].mlp = Exploding()
        with pytest.raises(RuntimeError, match="boom"):
            model(IMAGES)
        model.blocks[1].mlp = good
        model(IMAGES)
    assert list(captured.maps) == [f"blocks.{i}.attn" for i in range(3)]


def test_maps_belong_to_the_last_forward():
    model = build("vit_tiny_patch16_224")
    with torch.no_grad(), capture(model) as captured:
        model(torch.randn(5, 3, 32, 32))
        model(IMAGES)
    assert captured.maps["blocks.0.attn"].shape == (3, 3, 17, 17)
    torch.testing.assert_close(
        captured.maps["blocks.2.attn"].materialize(), captured_maps(model).maps["blocks.2.attn"].materialize()
    )


def test_forward_features_is_a_forward_too():
    model = build("vit_tiny_patch16_224")
    with torch.no_grad(), capture(model) as captured:
        model.forward_features(IMAGES)
        model.forward_features(IMAGES)
    assert list(captured.maps) == [f"blocks.{i}.attn" for i in range(3)]


def test_nested_captures_see_the_same():
    model = build("vit_tiny_patch16_224")
    for mode in GRAD_MODES:
        with mode(), capture(model) as outer, capture(model) as inner:
            model(IMAGES)
        assert list(outer.maps) == list(inner.maps)
        for name in outer.maps:
            torch.testing.assert_close(outer.maps[name].materialize(), inner.maps[name].materialize())


def test_another_model_in_the_block_is_not_captured():
    model, teacher = build("vit_tiny_patch16_224"), build("vit_tiny_patch16_224", depth=2)
    with torch.no_grad(), capture(model) as captured:
        model(IMAGES)
        teacher(torch.randn(7, 3, 32, 32))
    assert {item.shape[0] for item in captured.maps.values()} == {3}
    assert len(captured.maps) == 3


def test_queries_and_keys_are_own_copies():
    """Views of the fused qkv would keep three times as much memory alive, and see later changes."""
    source = captured_maps(build("vit_tiny_patch16_224")).maps["blocks.0.attn"].source
    for tensor in (source.q, source.k):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_maps_are_freed_with_their_last_reference():
    """Without the garbage collector: batches of queries and keys must not pile up until it runs."""
    model = build("vit_tiny_patch16_224")
    gc.collect()
    gc.disable()
    try:
        captured = captured_maps(model)
        alive = weakref.ref(captured.maps["blocks.0.attn"].source.q)
        assert alive() is not None
        del captured
        assert alive() is None
    finally:
        gc.enable()


def test_the_model_is_not_kept_alive_and_maps_survive_it():
    model = build("vit_tiny_patch16_224")
    maps = captured_maps(model).maps
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert maps["blocks.0.attn"].materialize().shape == (3, 3, 17, 17)


def test_a_map_can_be_pickled():
    attention = captured_maps(build("deepvit_16b")).maps["blocks.1.attn"]
    again = pickle.loads(pickle.dumps(attention))
    assert torch.equal(again.materialize(), attention.materialize())


def test_a_compiled_model_runs_eagerly_and_says_so():
    model = build("vit_tiny_patch16_224")
    compiled = torch.compile(model, backend="eager")
    compiled(IMAGES)
    with pytest.warns(UserWarning, match="eagerly"), torch.no_grad(), capture(compiled) as captured:
        compiled(IMAGES)
    assert [name.removeprefix("_orig_mod.") for name in captured.maps] == [f"blocks.{i}.attn" for i in range(3)]


def test_only_modules_can_be_captured():
    with pytest.raises(UsageError, match=r"takes an nn\.Module, not str"), capture("vit_tiny_patch16_224"):
        pass


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 18)])
def test_ranges_are_checked(start, stop):
    attention = captured_maps(build("vit_tiny_patch16_224")).maps["blocks.0.attn"]
    with pytest.raises(IndexError, match="17 columns"):
        attention.columns(start, stop)
    with pytest.raises(IndexError, match="17 rows"):
        attention.rows(start, stop)


def test_the_package_is_callable_under_the_functions_name():
    import collapse_probe

    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    with collapse_probe.capture(model) as captured:
        model(IMAGES)
    assert list(captured.maps) == ["blocks.0.attn"]


@pytest.mark.parametrize(
    ("name", "mixes"),
    [("vit_tiny_patch16_224", False), ("swin_tiny_patch4_window7_224", False), ("cait_xxs24_224", True)],
)
def test_some_heads_of_a_map(name, mixes):
    model = perturbed(timm.create_model(name, num_classes=3))
    with torch.inference_mode(), capture(model) as captured:
        model(torch.randn(2, 3, 224, 224))
    for item in captured.maps.values():
        if item.kind == "class":
            continue
        some = item.select_heads(1, 3)
        assert (some is None) == mixes
        if some is not None:
            assert torch.equal(some.columns(2, 7), item.columns(2, 7)[:, 1:3])
            assert torch.equal(some.rows(2, 7), item.rows(2, 7)[:, 1:3])


def test_heads_that_logits_mix_are_not_apart():
    q, k = torch.randn(2, 1, 3, 5, 4)
    mixed = QueryKey(q, k, 0.5, premix=HeadMix(torch.eye(3), torch.zeros(3)))
    assert mixed.select_heads(0, 1) is None
    assert Combination((QueryKey(q, k, 0.5), mixed), (1.0, -0.5)).select_heads(0, 1) is None
    difference = Combination((QueryKey(q, k, 0.5), QueryKey(k, q, 0.5)), (1.0, -0.5))
    torch.testing.assert_close(difference.select_heads(1, 2).columns(0, 5), difference.columns(0, 5)[:, 1:2])
