"""The bundled DeepViT against naive references written from the paper and from the table of its published variants."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F

import collapse_probe.models.deepvit as deepvit
from collapse_probe.errors import UsageError
from collapse_probe.models import DeepVisionTransformer, ReAttention

# name in the authors' repository: alias, blocks, width, Re-attention in the last, convolutional stem, pixels
VARIANTS = {
    "deepvit_patch16_224_re_attn_16b": ("deepvit_16b", 16, 384, 16, False, 224),
    "deepvit_patch16_224_re_attn_24b": ("deepvit_24b", 24, 384, 24, False, 224),
    "deepvit_patch16_224_re_attn_32b": ("deepvit_32b", 32, 384, 32, False, 224),
    "deepvit_S": ("deepvit_s", 16, 396, 5, True, 224),
    "deepvit_L": ("deepvit_l", 32, 420, 12, True, 224),
    "deepvit_L_384": ("deepvit_l_384", 32, 420, 12, True, 384),
}
PLAIN = {f"deepvit_vit_{depth}b": (depth, 384, 0, False, 224) for depth in (16, 24, 32)}
ALL = {**{name: row[1:] for name, row in VARIANTS.items()}, **{row[0]: row[1:] for row in VARIANTS.values()}, **PLAIN}
TINY = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 10}


def _reference_shapes(depth: int, dim: int, mixing: int, stem: bool, pixels: int) -> dict[str, tuple[int, ...]]:
    """Every entry of the state dict with its shape."""
    heads, tokens = 12, (pixels // 16) ** 2 + 1

    def affine(name: str, out: int, *rest: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, *rest), f"{name}.bias": (out,)}

    def batch_norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
        running = {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)}
        return {**affine(name, channels), **running, f"{name}.num_batches_tracked": ()}

    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, dim), "pos_embed": (1, tokens, dim)}
    if stem:
        shapes |= {"patch_embed.conv1.weight": (64, 3, 7, 7), "patch_embed.conv2.weight": (64, 64, 3, 3)}
        shapes |= batch_norm("patch_embed.bn1", 64) | batch_norm("patch_embed.bn2", 64)
        shapes |= affine("patch_embed.proj", dim, 64, 8, 8)
    else:
        shapes |= affine("patch_embed.proj", dim, 3, 16, 16)
    for index in range(depth):
        block = f"blocks.{index}"
        shapes |= affine(f"{block}.norm1", dim) | affine(f"{block}.norm2", dim)
        shapes |= affine(f"{block}.attn.qkv", 3 * dim, dim) | affine(f"{block}.attn.proj", dim, dim)
        shapes |= affine(f"{block}.mlp.fc1", 3 * dim, dim) | affine(f"{block}.mlp.fc2", dim, 3 * dim)
        if index >= depth - mixing:
            shapes |= affine(f"{block}.attn.reatten_matrix", heads, heads, 1, 1)
            shapes |= batch_norm(f"{block}.attn.var_norm", heads)
    return shapes | affine("norm", dim) | affine("head", 1000, dim)


@pytest.mark.parametrize("name", ALL)
def test_every_variant_has_the_published_entries_and_size(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == _reference_shapes(*ALL[name])
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    expected = sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(statistics))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_parameters_match_the_paper_s_table() -> None:
    # The paper's 55 million for DeepViT-L do not follow from the sizes it states (32 blocks, width 420: 58.9 million).
    published = {"deepvit_16b": 24.5, "deepvit_24b": 36.3, "deepvit_32b": 48.1, "deepvit_s": 27}
    with torch.device("meta"):
        models = {name: timm.create_model(name) for name in published}
    millions = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}
    assert millions == pytest.approx(published, abs=0.35)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_alias_is_the_same_architecture(name: str) -> None:
    small = {"depth": 3, "img_size": 32, "num_classes": 5}
    model, alias = timm.create_model(name, **small).eval(), timm.create_model(VARIANTS[name][0], **small).eval()
    alias.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), alias(images))


def test_settings_that_no_state_dict_shows() -> None:
    with torch.device("meta"):
        models = {name: timm.create_model(name) for name in ALL}
    for name, model in models.items():
        stem = ALL[name][3]
        assert {block.scale_adjustment for block in model.blocks} == {0.5 if stem else 1.0}
        assert {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}
        scales = {module.reatten_scale for module in model.modules() if isinstance(module, ReAttention)}
        expected = {33**-0.5} if name.lower() == "deepvit_s" else {1.0}
        assert scales == (expected if ALL[name][2] else set())
        config = timm.data.resolve_model_data_config(model)
        assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
        assert config["input_size"] == (3, ALL[name][4], ALL[name][4])


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _perturbed(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module in float64 with every parameter and running statistic away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.copy_(1 + noise.abs() if name.endswith("running_var") else value + 0.3 * noise)
    return module


def _reference_softmax_maps(x: torch.Tensor, attn: ReAttention) -> list[list[torch.Tensor]]:
    """Softmax maps [image][head], one row at a time."""
    head_dim = x.shape[-1] // attn.num_heads
    maps = []
    for image in x:
        rows = image @ attn.qkv.weight.T + attn.qkv.bias
        heads = []
        for h in range(attn.num_heads):
            q = rows[:, h * head_dim : (h + 1) * head_dim]
            k = rows[:, x.shape[-1] + h * head_dim : x.shape[-1] + (h + 1) * head_dim]
            exponentials = torch.stack([torch.exp((k @ query) / math.sqrt(head_dim)) for query in q])
            heads.append(exponentials / exponentials.sum(1, keepdim=True))
        maps.append(heads)
    return maps


def _reference_re_attention(x: torch.Tensor, attn: ReAttention, batch_statistics: bool = False) -> torch.Tensor:
    heads, head_dim = attn.num_heads, x.shape[-1] // attn.num_heads
    theta, norm = attn.reatten_matrix, attn.var_norm
    maps = _reference_softmax_maps(x, attn)
    mixed = [
        [sum(theta.weight[g, h, 0, 0] * image[h] for h in range(heads)) + theta.bias[g] for g in range(heads)]
        for image in maps
    ]
    outputs = []
    for number, image in enumerate(x):
        v = (image @ attn.qkv.weight.T + attn.qkv.bias)[:, 2 * x.shape[-1] :]
        parts = []
        for g in range(heads):
            values = torch.stack([mixed[b][g] for b in range(len(x))])
            mean = values.mean() if batch_statistics else norm.running_mean[g]
            variance = values.var(unbiased=False) if batch_statistics else norm.running_var[g]
            standard = (mixed[number][g] - mean) / torch.sqrt(variance + norm.eps)
            final = (standard * norm.weight[g] + norm.bias[g]) * attn.reatten_scale
            parts.append(final @ v[:, g * head_dim : (g + 1) * head_dim])
        outputs.append(torch.cat(parts, dim=1) @ attn.proj.weight.T + attn.proj.bias)
    return torch.stack(outputs)


@pytest.mark.parametrize("transform_scale", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_re_attention_matches_a_loop_over_heads(transform_scale: bool, training: bool) -> None:
    attn = _perturbed(ReAttention(12, 3, transform_scale=transform_scale)).train(training)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = _reference_re_attention(x, attn, batch_statistics=training)
    torch.testing.assert_close(attn(x), expected, rtol=1e-10, atol=1e-10)


def test_dropout_acts_before_the_heads_are_mixed() -> None:
    attn = _perturbed(ReAttention(12, 3, attn_drop=0.5)).train()
    seen = []
    attn.reatten_matrix.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    attn(torch.randn(2, 5, 12, dtype=torch.float64))
    assert 0.2 < (seen[0] == 0).double().mean() < 0.8


@pytest.mark.parametrize("re_attention", [True, False])
def test_each_branch_ends_in_dropout(re_attention: bool) -> None:
    rates = {"attn_drop_rate": 0.25, "proj_drop_rate": 1.0}
    model = timm.create_model("deepvit_16b", **TINY, re_attention=re_attention, **rates).train()
    assert {block.attn.attn_drop.p for block in model.blocks} == {0.25}
    x = torch.randn(2, 17, 48)
    assert torch.equal(model.blocks[0](x), x)


@pytest.mark.parametrize("re_attention", [True, False])
def test_scale_adjustment_by_hand(re_attention: bool) -> None:
    model = timm.create_model("deepvit_16b", **TINY, scale_adjustment=0.5, re_attention=re_attention)
    block = _perturbed(model.blocks[1])
    x = torch.randn(2, 17, 48, dtype=torch.float64)

    def norm(values: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
        deviation = values - values.mean(-1, keepdim=True)
        variance = (deviation**2).mean(-1, keepdim=True)
        return deviation / torch.sqrt(variance + 1e-6) * layer.weight + layer.bias

    middle = x + 2 * block.attn(norm(0.5 * x, block.norm1))
    hidden = F.gelu(F.linear(norm(0.5 * middle, block.norm2), block.mlp.fc1.weight, block.mlp.fc1.bias))
    expected = middle + 2 * F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def test_convolutional_stem_by_hand() -> None:
    stem = _perturbed(timm.create_model("deepvit_s", **TINY).patch_embed)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def normalised(x: torch.Tensor, norm: torch.nn.BatchNorm2d) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        standard = (x - norm.running_mean.view(shape)) / torch.sqrt(norm.running_var.view(shape) + norm.eps)
        return (standard * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0)

    x = normalised(F.conv2d(images, stem.conv1.weight, stride=2, padding=3), stem.bn1)
    x = normalised(F.conv2d(x, stem.conv2.weight, padding=1), stem.bn2)
    x = F.conv2d(x, stem.proj.weight, stem.proj.bias, stride=4)
    expected = torch.stack([x[:, :, row, column] for row in range(4) for column in range(4)], dim=1)
    torch.testing.assert_close(stem(images), expected, rtol=1e-10, atol=1e-10)


def test_whole_model_is_its_parts() -> None:
    model = _perturbed(timm.create_model("deepvit_s", **TINY, re_attention=[1, 3]))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
    for index, block in enumerate(model.blocks):
        assert isinstance(block.attn, ReAttention) == (index in (1, 3))
        tokens = block(tokens)
    expected = model.head(model.norm(tokens)[:, 0])
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


# -- as a timm model ---------------------------------------------------------------------------------------------------


def test_timm_interface() -> None:
    model = timm.create_model("deepvit_16b", **TINY).eval()
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert features.shape == (2, 17, 48)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, 48)
    assert model.num_prefix_tokens == 1
    assert model.patch_embed.grid_size == (4, 4)
    assert {"cls_token", "pos_embed"} <= model.no_weight_decay()
    assert model.get_classifier().out_features == 10
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    final, intermediates = model.forward_intermediates(images, indices=2)
    assert torch.equal(final, features)
    assert [level.shape for level in intermediates] == [(2, 48, 4, 4)] * 2
    assert timm.create_model("deepvit_16b", **TINY, global_pool="avg", in_chans=1)(images[:, :1]).shape == (2, 10)
    assert timm.create_model("deepvit_s", **TINY, dynamic_img_size=True)(torch.randn(1, 3, 48, 40)).shape == (1, 10)


@pytest.mark.parametrize("name", ["deepvit_16b", "deepvit_s", "deepvit_vit_16b"])
def test_training_reaches_every_parameter(name: str) -> None:
    model = timm.create_model(name, **TINY, drop_path_rate=0.3, attn_drop_rate=0.1, proj_drop_rate=0.1, drop_rate=0.1)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    torch.manual_seed(0)
    loss = sum(F.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8)) for _ in range(3))
    loss.backward()
    # A batch norm takes the mean of every head's map away again, so the bias before it has no gradient but rounding.
    silent = [n for n, p in model.named_parameters() if p.grad is None or (not p.grad.any() and "reatten" not in n)]
    assert not silent
    for attn in (module for module in model.modules() if isinstance(module, ReAttention)):
        assert attn.var_norm.num_batches_tracked == 3


def test_positions_of_another_resolution_are_resampled(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file(timm.create_model("deepvit_s", **TINY).state_dict(), tmp_path / "small.safetensors")
    source = {"file": str(tmp_path / "small.safetensors"), "num_classes": 10}
    larger = {**TINY, "img_size": 48}
    model = timm.create_model("deepvit_s", **larger, pretrained=True, pretrained_cfg_overlay=source)
    assert model.pos_embed.shape == (1, 37, 48)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 10)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [(True, [0, 1, 2, 3]), (False, []), (0, []), (1, [3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3]), ((0, 2), [0, 2])],
)
def test_which_blocks_mix(choice, expected: list[int]) -> None:
    model = DeepVisionTransformer(**TINY, re_attention=choice)
    assert [index for index, block in enumerate(model.blocks) if isinstance(block.attn, ReAttention)] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 50}, "embed_dim=50 is not a multiple of num_heads=3"),
        ({"scale_adjustment": 0}, "scale_adjustment=0 must be above 0"),
        ({"re_attention": [1, 4, -1]}, r"re_attention names blocks \[4, -1\]"),
        ({"re_attention": -2}, "re_attention=-2"),
        ({"conv_stem": True, "patch_size": 5}, r"patch_size=\(5, 5\)"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        timm.create_model("deepvit_16b", **{**TINY, **arguments})


def test_images_that_do_not_fit_the_stem_are_named() -> None:
    with pytest.raises(UsageError, match=r"\(40, 32\) pixels do not fit"):
        timm.create_model("deepvit_s", **TINY)(torch.randn(1, 3, 40, 32))


def test_the_stem_takes_another_image_size_but_no_other_patch_size() -> None:
    model = timm.create_model("deepvit_s", **TINY)
    model.set_input_size((48, 40))
    assert model.patch_embed.grid_size == (6, 5)
    assert model(torch.randn(1, 3, 48, 40)).shape == (1, 10)
    with pytest.raises(UsageError, match="patch_size=4: build the model anew"):
        model.set_input_size(patch_size=4)


def test_importing_the_package_registers_everything_quietly() -> None:
    assert set(deepvit.__all__) == set(ALL)
    assert all(getattr(deepvit, name).__name__ == name for name in ALL)
    code = "import collapse_probe.models, timm; assert timm.is_model('deepvit_32b') and timm.is_model('digits_vit_24b')"
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
