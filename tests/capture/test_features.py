"""Token features after every block and what its branches add, against plain hooks on modules chosen by hand."""

from __future__ import annotations

import contextlib
import copy
import gc
import re
import weakref

import pytest
import timm
import torch
from _zoo import quick
from test_zoo import FAMILIES, QUICK
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import collapse_probe as cp
import collapse_probe.models  # registers the bundled architectures
from collapse_probe.capture import TokenFeatures, TokenLayout, capture, concatenate_features
from collapse_probe.capture.residual import ResidualFollower

#: model -> (blocks by name, how their output becomes tokens, grid of the first block, prefix tokens)
BLOCKS = {
    "test_vit": (r"blocks\.\d+", "tokens", (10, 10), 1),
    "test_vit_relpos": (r"blocks\.\d+", "tokens", (10, 10), 0),
    "vit_small_patch14_reg4_dinov2": (r"blocks\.\d+", "tokens", (16, 16), 5),
    "naflexvit_base_patch16_siglip": (r"blocks\.\d+", "tokens", (12, 12), 0),
    "cait_xxs24_224": (r"blocks\.\d+", "tokens", (14, 14), 0),
    "convit_tiny": (r"blocks\.\d+", "tokens", (14, 14), 0),
    "efficientformerv2_s0": (
        r"stages\.2\.blocks\.[45]|stages\.3\.downsample|stages\.3\.blocks\.[23]",
        "channels first",
        (14, 14),
        0,
    ),
    "vit_dwee_patch16_reg1_gap_256": (r"blocks\.\d+", "tokens", (16, 16), 1),
    "deepvit_s": (r"blocks\.\d+", "tokens", (14, 14), 1),
    "swin_tiny_patch4_window7_224": (r"layers\.\d\.blocks\.\d+", "channels last", (56, 56), 0),
    "swinv2_tiny_window8_256": (r"layers\.\d\.blocks\.\d+", "channels last", (64, 64), 0),
    "test_maxvit": (r"stages\.\d\.blocks\.0\.attn_(block|grid)", "channels last", (40, 40), 0),
    "test_coatnet": (r"stages\.2\.blocks\.\d|stages\.3\.blocks\.0", "channels first", (10, 10), 0),
    "gcvit_xxtiny": (r"stages\.\d\.blocks\.\d+", "channels last", (56, 56), 0),
    "nest_tiny": (r"levels\.\d\.transformer_encoder\.\d+", "channels last", None, 0),
    "hiera_tiny_224": (r"blocks\.\d+", "tokens", None, 0),
    "tnt_s_legacy_patch16_224": (r"blocks\.\d+", "tokens", (14, 14), 1),
    "davit_tiny": (r"stages\.\d\.blocks\.\d\.[01]", "channels first", (56, 56), 0),
    "mobilevit_xxs": (r"none", "tokens", None, 0),
    "halonet26t": (r"stages\.2\.1|stages\.3\.[01]", "channels first", (16, 16), 0),
    "pvt_v2_b0": (r"stages\.\d\.blocks\.\d", "tokens", (56, 56), 0),
    "pit_ti_224": (r"transformers\.\d\.blocks\.\d", "tokens", (27, 27), 1),
    "levit_128s": (r"stages\.\d\.blocks\.\d", "tokens", (14, 14), 0),
    "crossvit_tiny_240": (r"blocks\.\d\.blocks\.[01]\.\d", "tokens", (20, 20), 1),
    "xcit_nano_12_p8_224": (r"blocks\.\d+", "tokens", (28, 28), 0),
    "edgenext_xx_small": (r"stages\.(1\.blocks\.1|2\.blocks\.5|3\.blocks\.1)", "channels first", (32, 32), 0),
    "coat_lite_tiny": (r"serial_blocks\d\.\d", "tokens", (56, 56), 1),
    "gcresnext26ts": (r"stages\.\d\.\d", "channels first", (64, 64), 0),
    "csatv2": (r"stages\.2\.[78]|stages\.3\.[56]", "channels first", (8, 8), 0),
}

#: model -> layers of the kinds "token" and "window" without features, and a word of the reason
WITHOUT = {
    "mobilevit_xxs": (9, "side by side"),
    "tnt_s_legacy_patch16_224": (3, "side by side"),
    "levit_128s": (2, "no residual sum"),
}


def arranged(output, how):
    if isinstance(output, tuple):  # TNT's blocks return pixels and patches
        output = output[-1]
    if how == "channels first":
        return output.flatten(2).transpose(1, 2)
    return output.flatten(1, 2) if how == "channels last" else output


def hooked(model, pattern, call):
    """Outputs of the modules whose whole name fits a pattern, in execution order."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if re.fullmatch(pattern, name):

            def keep(_module, _inputs, output, name=name):
                seen[name] = copy.deepcopy(output)

            handles.append(module.register_forward_hook(keep))
    call()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_a_family(name):
    if not timm.is_model(name):
        pytest.skip(f"this version of timm has no {name}")
    model, images = quick(name)
    with torch.no_grad():
        with capture(model) as plain:
            model(images)
        with capture(model, features=True) as captured:
            output = model(images)
        pattern, how, grid, prefix = BLOCKS.get(name, ("none", "", None, 0))
        again = []
        expected = hooked(model, pattern, lambda: again.append(model(images)))
    for one, other in zip(tensors(output), tensors(again), strict=True):
        assert torch.equal(one, other)
    assert list(captured.features) == list(expected)
    for key, features in captured.features.items():
        assert features.name == key
        assert torch.equal(features.tensor, arranged(expected[key], how)), key
        assert features.images == len(images)
        for share in (features.attention_share, features.mlp_share):
            assert share is None or (share.shape == features.shape[:2] and share.dtype == torch.float32)
        assert features.attention_share is not None
        assert all(layer.startswith(f"{key}.") for layer in features.layers)
    if expected:
        assert next(iter(captured.features.values())).layout == TokenLayout(prefix, grid)
    layers = [layer for features in captured.features.values() for layer in features.layers]
    assert sorted([*layers, *captured.no_features]) == sorted(captured.maps)
    count, word = WITHOUT.get(name, (0, ""))
    reasons = [why for key, why in captured.no_features.items() if captured.maps[key].kind in ("token", "window")]
    assert len(reasons) == count
    assert all(word in reason for reason in reasons)
    assert list(captured.maps) == list(plain.maps)
    for key, attention in captured.maps.items():
        assert torch.equal(attention.rows(0, 1), plain.maps[key].rows(0, 1))


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors(item)]


def test_the_table_knows_enough_families():
    assert len([name for name in BLOCKS if name in QUICK and BLOCKS[name][0] != "none"]) >= 20


#: model -> (arguments, blocks, output of the attention branch as it is added, of the MLP branch, channels first)
SHARES = {
    "vit_tiny_patch16_224": ({"img_size": 32, "patch_size": 8}, r"blocks\.\d+", "drop_path1", "drop_path2", False),
    "deit3_small_patch16_224": ({"img_size": 32, "patch_size": 8}, r"blocks\.\d+", "drop_path1", "drop_path2", False),
    "test_vit3": ({}, r"blocks\.\d+", "drop_path1", "drop_path2", False),
    "swinv2_tiny_window8_256": ({"img_size": 64}, r"layers\.\d\.blocks\.\d+", "drop_path1", "drop_path2", False),
    "swin_tiny_patch4_window7_224": ({"img_size": 56}, r"layers\.\d\.blocks\.\d+", "drop_path1", "drop_path2", False),
    "test_coatnet": ({}, r"stages\.2\.blocks\.\d|stages\.3\.blocks\.0", "drop_path1", "drop_path2", True),
    "pvt_v2_b0": ({}, r"stages\.\d\.blocks\.\d", "drop_path1", "drop_path2", False),
}


def _reference_share(branch, stream, channels_first):
    """Norm of what was added over norm of what it was added to, token by token."""
    if channels_first:
        branch, stream = (item.permute(0, 2, 3, 1) for item in (branch, stream))
    branch, stream = (item.reshape(len(item), -1, item.shape[-1]) for item in (branch, stream))
    shares = torch.zeros(branch.shape[:2], dtype=torch.float64)
    for image in range(branch.shape[0]):
        for token in range(branch.shape[1]):
            norms = [float(item[image, token].square().sum()) ** 0.5 for item in (branch, stream)]
            shares[image, token] = norms[0] / norms[1]
    return shares


@pytest.mark.parametrize("name", SHARES)
def test_shares_are_norms_of_what_was_added(name):
    arguments, pattern, attention, mlp, channels_first = SHARES[name]
    if not timm.is_model(name):
        pytest.skip(f"this version of timm has no {name}")
    torch.manual_seed(0)
    depth = {"depth": 2} if pattern == r"blocks\.\d+" else {}
    model = timm.create_model(name, **arguments | depth).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    side = arguments.get("img_size", 160)
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad(), capture(model, features=True) as captured:
        model(images)
    seen, given, handles = {}, {}, []
    for key, block in model.named_modules():
        if re.fullmatch(pattern, key):
            handles.append(
                block.register_forward_pre_hook(lambda _m, inputs, k=key: given.update({k: inputs[0].clone()}))
            )
            for part in (attention, mlp):
                # The last call counts: some blocks share one module between branches.
                module = block.get_submodule(part)
                handles.append(module.register_forward_hook(lambda _m, _i, out, k=(key, part): seen.update({k: out})))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    assert list(captured.features) == list(given)
    for key, features in list(captured.features.items())[:3]:
        branch = seen[key, attention]
        if given[key].shape != branch.shape:  # pooled on the way
            continue
        assert features.attention_share.dtype == torch.float64
        expected = _reference_share(branch, given[key], channels_first)
        torch.testing.assert_close(features.attention_share, expected, atol=1e-9, rtol=1e-9)
        expected = _reference_share(seen[key, mlp], given[key] + branch, channels_first)
        torch.testing.assert_close(features.mlp_share, expected, atol=1e-9, rtol=1e-9)
        assert 0.001 < float(expected.mean()) < 100
        assert float(expected.std()) > 1e-4


WIDTH, HEADS = 12, 3


class Attend(nn.Module):
    """Self-attention over `[B, T, C]`."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.num_heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), HEADS

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Local(Attend):
    """Attention whose output meets a projection of its values before it is returned."""

    def __init__(self):
        super().__init__()
        self.local = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return super().forward(x) + self.local(x)


class Block(nn.Module):
    """One block, in the spelling that a subclass gives it; it keeps what its branches computed."""

    attention = Attend

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = (
            self.attention(),
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)),
        )
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def expected(self, x):
        """Output, and norms of attention and MLP branch over those of the stream."""
        attended = self.attn(self.norm1(x))
        middle = x + attended
        added = self.mlp(self.norm2(middle))
        return middle + added, share(attended, x), share(added, middle)


def share(branch, stream):
    return branch.norm(dim=-1) / stream.norm(dim=-1)


class Swapped(Block):
    def forward(self, x):
        x = self.attn(self.norm1(x)) + x
        return torch.add(self.mlp(self.norm2(x)), x)


class InPlace(Block):
    def forward(self, x):
        x = x.clone()
        x += self.attn(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


class ScaledSum(Block):
    def forward(self, x):
        x = torch.add(x, self.attn(self.norm1(x)), alpha=0.5)
        return torch.add(x, self.mlp(self.norm2(x)), alpha=-2.0)

    def expected(self, x):
        attended = 0.5 * self.attn(self.norm1(x))
        middle = x + attended
        added = -2 * self.mlp(self.norm2(middle))
        return middle + added, share(attended, x), share(added, middle)


class PostNorm(Block):
    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))

    def expected(self, x):
        attended = self.attn(x)
        middle = self.norm1(x + attended)
        added = self.mlp(middle)
        return self.norm2(middle + added), share(attended, x), share(added, middle)


class Joint(Block):
    """Attention and MLP side by side, added in one sum."""

    def forward(self, x):
        y = self.norm1(x)
        return x + (self.attn(y) + self.mlp(y))

    def expected(self, x):
        branch = self.attn(self.norm1(x)) + self.mlp(self.norm1(x))
        return x + branch, share(branch, x), None


class SideBySide(Block):
    """Attention and MLP side by side, added one after the other."""

    def forward(self, x):
        added, attended = self.mlp(self.norm1(x)), self.attn(self.norm1(x))
        return x + attended + added

    def expected(self, x):
        added, attended = self.mlp(self.norm1(x)), self.attn(self.norm1(x))
        return x + attended + added, share(attended, x), share(added, x + attended)


class WithLocal(Block):
    attention = Local


class Tuples(Block):
    def forward(self, given):
        return (super().forward(given[0]), None)


class ThroughModules(Block):
    """Branches that go through a module of their own before they are added, as stochastic depth does."""

    def __init__(self):
        super().__init__()
        self.drop_path = nn.Identity()

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Projected(Block):
    """A stream that begins anew within the block, as where channels become more."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.norm1(x)
        x = self.project(y) + self.attn(y)
        return x + self.mlp(self.norm2(x))

    def expected(self, x):
        y = self.norm1(x)
        stream, attended = self.project(y), self.attn(y)
        middle = stream + attended
        added = self.mlp(self.norm2(middle))
        return middle + added, share(attended, stream), share(added, middle)


class OnlyAttention(Block):
    def forward(self, x):
        return x + self.attn(self.norm1(x))

    def expected(self, x):
        attended = self.attn(self.norm1(x))
        return x + attended, share(attended, x), None


class AttentionResidual(nn.Module):
    """The attention part as a residual module of its own, as BERT has it."""

    def __init__(self, attn, norm):
        super().__init__()
        self.attn, self.norm = attn, norm

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Nested(Block):
    def __init__(self):
        super().__init__()
        self.attention_part = AttentionResidual(self.attn, self.norm1)

    def forward(self, x):
        x = self.attention_part(x)
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Two blocks, a norm and a head."""

    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([block(), block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)
        self.double().eval()

    def forward(self, x):
        for block in self.blocks:
            x = block((x, None))[0] if isinstance(block, Tuples) else block(x)
        return self.head(self.norm(x).mean(1))


TOKENS = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SPELLINGS = [
    Block, Swapped, InPlace, ScaledSum, PostNorm, Joint, SideBySide, WithLocal, Tuples, OnlyAttention, Nested,
    ThroughModules, Projected,
]  # fmt: skip
MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", SPELLINGS)
def test_every_spelling_of_a_block(block, mode):
    model = Stack(block)
    with MODES[mode](), capture(model, features=True) as captured:
        model(TOKENS)
    assert list(captured.features) == ["blocks.0", "blocks.1"]
    assert not captured.no_features
    x = TOKENS
    for place, features in enumerate(captured.features.values()):
        x, attention, mlp = (item if item is None else item.detach() for item in model.blocks[place].expected(x))
        torch.testing.assert_close(features.tensor, x, atol=1e-12, rtol=0)
        torch.testing.assert_close(features.attention_share, attention, atol=1e-12, rtol=1e-10)
        if mlp is None:
            assert features.mlp_share is None
        else:
            torch.testing.assert_close(features.mlp_share, mlp, atol=1e-12, rtol=1e-10)
        assert not features.tensor.requires_grad
        assert len(features.layers) == 1


class Loop(nn.Module):
    """Blocks written out in a loop: no module is a block."""

    def __init__(self, post_norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleList([Block().attn, Block().mlp, Block().norm1]) for _ in range(3)])
        self.norm, self.post_norm = nn.LayerNorm(WIDTH), post_norm
        self.double().eval()

    def forward(self, x):
        for attn, mlp, norm in self.layers:
            if self.post_norm:
                x = norm(attn(x) + x)
                x = norm(mlp(x) + x)
            else:
                x = attn(norm(x)) + x
                x = mlp(norm(x)) + x
        return x if self.post_norm else self.norm(x)


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_loop_of_sums_is_cut_where_the_next_attention_begins(post_norm):
    model, x = Loop(post_norm), TOKENS
    with torch.no_grad(), capture(model, features=True) as captured:
        model(TOKENS)
    assert list(captured.features) == [f"layers.{place}" for place in range(3)]
    with torch.no_grad():
        for place, (attn, mlp, norm) in enumerate(model.layers):
            features = captured.features[f"layers.{place}"]
            attended = attn(x if post_norm else norm(x))
            middle = norm(x + attended) if post_norm else x + attended
            added = mlp(middle if post_norm else norm(middle))
            expected = norm(middle + added) if post_norm else middle + added
            assert features.layers == (f"layers.{place}.0",)
            torch.testing.assert_close(features.tensor, expected, atol=1e-12, rtol=0)
            torch.testing.assert_close(features.attention_share, share(attended, x), atol=1e-12, rtol=1e-10)
            torch.testing.assert_close(features.mlp_share, share(added, middle), atol=1e-12, rtol=1e-10)
            x = expected


class WritesLater(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x.mul_(0).add_(1)
        return x


def test_writes_after_a_block_do_not_reach_its_features():
    model = WritesLater(Block)
    with torch.no_grad(), capture(model, features=True) as captured:
        model(TOKENS)
    expected, *_ = model.blocks[0].expected(TOKENS)
    torch.testing.assert_close(captured.features["blocks.0"].tensor, expected.detach(), atol=1e-12, rtol=0)


def test_no_features_without_asking():
    model = Stack(Block)
    with capture(model) as captured:
        model(TOKENS)
    assert captured.maps
    assert (captured.features, captured.no_features, captured.head_norms) == ({}, {}, {})


def test_nothing_is_followed_without_asking(monkeypatch):
    def refused(*_args, **_kwargs):
        raise AssertionError("the stream was followed")

    for method in ("__init__", "before", "after", "enter", "leave"):
        monkeypatch.setattr(ResidualFollower, method, refused)
    model = Stack(Block)
    with capture(model) as captured:
        model(TOKENS)
    assert len(captured.maps) == 2
    with pytest.raises(AssertionError, match="followed"), capture(model, features=True):
        pass


@pytest.mark.parametrize("method", ["before", "after", "enter", "leave", "attended"])
def test_a_failure_becomes_a_reason(monkeypatch, method):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError("on purpose")

    model = Stack(Block)
    expected = model(TOKENS)
    monkeypatch.setattr(ResidualFollower, method, broken)
    with capture(model, features=True) as captured:
        output = model(TOKENS)
    assert torch.equal(output, expected)
    assert len(captured.maps) == 2
    assert not captured.not_captured
    assert not captured.features
    assert list(captured.no_features) == list(captured.maps)
    assert all("ZeroDivisionError: on purpose" in reason for reason in captured.no_features.values())


def test_the_last_pass_counts_and_a_single_image_is_a_batch():
    model = Stack(Block)
    with torch.no_grad(), capture(model, features=True) as captured:
        model(TOKENS)
        first = captured.features["blocks.1"]
        model(TOKENS[:1] * 2)
    alone = captured.features["blocks.1"]
    assert (first.shape, alone.shape) == ((3, 5, WIDTH), (1, 5, WIDTH))
    expected, *_ = model.blocks[0].expected(TOKENS[:1] * 2)
    torch.testing.assert_close(captured.features["blocks.0"].tensor, expected.detach(), atol=1e-12, rtol=0)


def test_an_interrupted_pass_leaves_none_of_the_last():
    class Breaks(Stack):
        broken = False

        def forward(self, x):
            x = self.blocks[0](x)
            if self.broken:
                raise KeyError("on purpose")
            return self.blocks[1](x)

    model = Breaks(Block)
    with torch.no_grad(), capture(model, features=True) as captured:
        model(TOKENS)
        assert len(captured.features) == 2
        model.broken = True
        with pytest.raises(KeyError):
            model(TOKENS * 2)
    assert list(captured.features) == ["blocks.0"]
    expected, *_ = model.blocks[0].expected(TOKENS * 2)
    torch.testing.assert_close(captured.features["blocks.0"].tensor, expected.detach(), atol=1e-12, rtol=0)


def test_memory_is_released():
    model = Stack(Block)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), capture(model, features=True) as captured:
            model(TOKENS)
        kept = weakref.ref(captured.features["blocks.0"].tensor)
        del captured
        assert kept() is None
    finally:
        gc.enable()


def test_autocast_keeps_the_dtype_of_the_stream():
    model = Stack(Block).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen = hooked(model, r"blocks\.\d", lambda: model(TOKENS.float()))
        with capture(model, features=True) as captured:
            model(TOKENS.float())
    for key, features in captured.features.items():
        assert torch.equal(features.tensor, seen[key])
        assert features.tensor.dtype == seen[key].dtype
        assert features.attention_share.dtype == features.mlp_share.dtype == torch.float32


def test_dead_heads_have_no_norm():
    model = Stack(Block)
    size = WIDTH // HEADS
    with torch.no_grad():
        dead = slice(2 * WIDTH + size, 2 * WIDTH + 2 * size)
        model.blocks[0].attn.qkv.weight[dead] = 0
        model.blocks[0].attn.qkv.bias[dead] = 0
        with capture(model, features=True) as captured:
            model(TOKENS)
        norms = captured.head_norms["blocks.0.attn"]
        assert norms.shape == (3, HEADS)
        assert (norms[:, 1] == 0).all()
        attn, x = model.blocks[0].attn, model.blocks[0].norm1(TOKENS)
        values = attn.qkv(x)[..., 2 * WIDTH :].unflatten(-1, (HEADS, size))
        weights = captured.maps["blocks.0.attn"].materialize()
    for image in range(3):
        for head in (0, 2):
            out = weights[image, head] @ values[image, :, head]
            assert float(norms[image, head]) == pytest.approx(float((out**2).mean()) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "pvt_v2_b0", "test_vit"])
def test_head_norms_of_real_models(name):
    model, images = quick(name)
    with torch.no_grad(), capture(model, features=True) as captured:
        model(images)
    assert list(captured.head_norms) == list(captured.maps)
    for key, norms in captured.head_norms.items():
        assert norms.shape == (captured.maps[key].images, captured.maps[key].shape[1])
        assert (norms > 0).all()


def features_of(images, name="blocks.0", tokens=4, known=True):
    tensor = torch.randn(images, tokens, 3)
    return TokenFeatures(
        name, ("blocks.0.attn",), TokenLayout(0, (2, 2)), tensor, torch.rand(images, tokens) if known else None, None
    )


def test_parts_and_wholes():
    whole = features_of(5)
    parts = [whole.select(0, 2), whole.select(2, 5)]
    again = concatenate_features(parts)
    assert (parts[0].images, parts[1].shape) == (2, (3, 4, 3))
    assert torch.equal(again.tensor, whole.tensor)
    assert torch.equal(again.attention_share, whole.attention_share)
    assert again.mlp_share is None
    clone = parts[0].clone()
    whole.tensor.zero_()
    assert not parts[0].tensor.any()
    assert clone.tensor.any()
    assert concatenate_features([features_of(2), features_of(1, known=False)]).attention_share is None


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        concatenate_features([])
    with pytest.raises(ValueError, match=r"name blocks\.0 and blocks\.1 differ"):
        concatenate_features([features_of(1), features_of(1, name="blocks.1")])
    with pytest.raises(ValueError, match=r"4 tokens of 3 channels in one batch and 9 of 3"):
        concatenate_features([features_of(1), features_of(1, tokens=9)])


def test_the_package_takes_features():
    model = Stack(Block)
    with cp.capture(model, features=True) as captured:
        model(TOKENS)
    assert len(captured.features) == 2
