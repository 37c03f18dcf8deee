"""Whose weights are these? Saved without a word about the architecture, they find it again, or every one they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import collapse_probe.models  # noqa: F401 - registers the bundled architectures
from collapse_probe.errors import UnknownModelError, UsageError, WeightsMismatchError
from collapse_probe.loading import inspect_weights, load_model
from collapse_probe.loading.recognition import recognise_architecture
from collapse_probe.loading.signatures import on_meta, registered, shapes_of, signature, timm_of_index

#: One or more of each family, with how many networks of other function take the same weights.
FAMILIES = {
    "vit_tiny_patch16_224": 1, "vit_base_patch32_384": 1, "vit_large_patch14_clip_224": 2, "deit3_small_patch16_224": 1,
    "deit_small_distilled_patch16_224": 1, "vit_small_patch14_dinov2": 1, "vit_small_patch14_reg4_dinov2": 1,
    "vit_base_patch16_siglip_224": 1, "vit_small_patch16_dinov3": 1, "vit_relpos_small_patch16_224": 1,
    "samvit_base_patch16": 1, "beit_base_patch16_224": 1, "eva02_tiny_patch14_224": 1,
    "swin_tiny_patch4_window7_224": 1,
    "swin_base_patch4_window12_384": 1, "swinv2_tiny_window8_256": 2, "cait_xxs24_224": 1, "xcit_tiny_12_p8_224": 2,
    "pit_ti_224": 1, "pvt_v2_b0": 1, "mvitv2_tiny": 1, "maxvit_tiny_tf_224": 1, "coatnet_0_rw_224": 1,
    "twins_svt_small": 1, "levit_128s": 1, "coat_tiny": 1, "tnt_s_patch16_224": 1, "hiera_tiny_224": 1, "nest_tiny": 2,
    "crossvit_9_240": 1, "convit_tiny": 1, "volo_d1_224": 1, "mobilevit_s": 1, "edgenext_small": 1, "davit_tiny": 1,
    "gcvit_tiny": 1, "flexivit_small": 1, "deepvit_s": 1, "deepvit_32b": 1, "digits_vit_24b": 1,
    "digits_deepvit_24b": 1, "tiny_vit_5m_224": 1, "efficientformer_l1": 1, "vit_tiny_r_s16_p8_224": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_architecture_is_recovered(name: str) -> None:
    found = recognise_architecture(on_meta(name, num_classes=17).state_dict())
    assert len(found.candidates) == FAMILIES[name]
    assert name in [known for item in found.candidates for known in (item.name, *item.same)]


def _save(folder: Path, state: dict[str, Any]) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def _random(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


SMALL = {"embed_dim": 96, "depth": 3, "num_heads": 6, "img_size": 48}


@pytest.mark.parametrize(
    ("base", "kwargs"),
    [
        ("vit_base_patch16_224", {}),
        ("vit_base_patch16_224", {"patch_size": 8, "in_chans": 1, "num_classes": 0}),
        ("vit_base_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_base_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
        ("vit_base_patch16_224", {"global_pool": "avg", "fc_norm": True}),
        ("vit_base_patch16_224", {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1}),
        ("vit_base_patch16_224", {"reg_tokens": 1}),
        ("vit_base_patch16_224", {"mlp_ratio": 2.5, "qkv_bias": False, "pre_norm": True}),
        ("vit_base_patch16_224", {"qk_norm": True, "num_heads": 4}),
        ("vit_base_patch16_224", {"class_token": False, "global_pool": "map"}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deepvit_16b", {"num_heads": 4}),
        ("deepvit_16b", {"re_attention": [1], "mlp_ratio": 4.0}),
        ("deepvit_16b", {"re_attention": False, "conv_stem": True}),
    ],
)
def test_a_vit_that_nobody_registered(tmp_path: Path, base: str, kwargs: dict[str, Any]) -> None:
    model = _random(base, **{**SMALL, "num_classes": 5, **kwargs})
    heads = {**SMALL, **kwargs}["num_heads"]
    shown = "qk_norm" in kwargs or kwargs.get("re_attention", base == "deepvit_16b")
    path = _save(tmp_path, model.state_dict())
    loaded = load_model(path, num_heads=None if shown else heads)
    images = torch.randn(2, kwargs.get("in_chans", 3), 48, 48)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    assert loaded.provenance["architecture_from"] == "recognised by keys and shapes"
    assert loaded.provenance["heads"]["count"] == heads
    assert loaded.provenance["heads"]["known"].startswith("shown by" if shown else "given")


def test_heads_that_do_not_show_are_said_to_be_assumed(tmp_path: Path) -> None:
    path = _save(tmp_path, _random("vit_base_patch16_224", **SMALL).state_dict())
    with pytest.warns(UserWarning, match="taken to be 3. Readings are wrong if that is wrong: --num-heads sets it"):
        loaded = load_model(path)
    assert loaded.provenance["heads"] == {"count": 3, "known": "assumed: the weights do not show it"}


def test_heads_that_show_are_not_contradicted(tmp_path: Path) -> None:
    model = _random("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), img_size=112)
    path = _save(tmp_path, model.state_dict())
    with pytest.raises(WeightsMismatchError, match="relative_position_bias_table"):
        load_model(path, "swin_tiny_patch4_window7_224", img_size=112,
                   model_kwargs={"depths": [1, 1, 1, 1], "num_heads": [4, 6, 12, 24]})  # fmt: skip
    path = _save(tmp_path, _random("vit_base_patch16_224", **{**SMALL, "qk_norm": True}).state_dict())
    with pytest.raises(UsageError, match="num_heads"):
        load_model(path, "vit_base_patch16_224", model_kwargs={**SMALL, "qk_norm": True}, num_heads=5)


def test_several_networks_are_listed(tmp_path: Path) -> None:
    path = _save(tmp_path, timm.create_model("nest_tiny").state_dict())
    with pytest.raises(UsageError, match=r"fit 2 that differ in what they compute:\n.*--model nest_tiny\n") as caught:
        load_model(path)
    assert "--model nest_tiny_jx" in str(caught.value)
    assert load_model(path, "nest_tiny_jx").provenance["architecture"] == "nest_tiny_jx"


def test_one_network_of_two_names_warns_of_preprocessing(tmp_path: Path) -> None:
    path = _save(tmp_path, _random("deit_tiny_patch16_224").state_dict())
    with pytest.warns(UserWarning, match="the same network with different preprocessing"):
        loaded = load_model(path)
    assert loaded.provenance["architecture"] == "vit_tiny_patch16_224"
    assert loaded.provenance["same_network"] == ["deit_tiny_patch16_224"]


@pytest.mark.parametrize(("size", "channels"), [(64, 3), (224, 1), (96, 4)])
def test_other_image_sizes_and_channels_of_a_registered_one(tmp_path: Path, size: int, channels: int) -> None:
    model = _random("deit3_small_patch16_224", img_size=size, in_chans=channels)
    loaded = load_model(_save(tmp_path, model.state_dict()))
    images = torch.randn(1, channels, size, size)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    assert loaded.provenance["architecture"] == "deit3_small_patch16_224"


def test_a_wrong_name_gets_the_right_one(tmp_path: Path) -> None:
    path = _save(tmp_path, timm.create_model("deit3_small_patch16_224").state_dict())
    with pytest.raises(WeightsMismatchError, match=r"They fit --model deit3_small_patch16_224\.$"):
        load_model(path, "vit_tiny_patch16_224")


def test_weights_of_nothing_known(tmp_path: Path) -> None:
    state = _random("vit_base_patch16_224", **SMALL).state_dict()
    del state["blocks.1.norm2.bias"]
    words = r"fit none that is known \(blocks: 3, width: 96, .*Pass --model.*1 missing in the file: blocks.1.norm2.bias"
    with pytest.raises(UnknownModelError, match=words):
        load_model(_save(tmp_path, state))


def test_the_index_is_of_this_timm() -> None:
    """Spot checks: what is indexed is what would be built."""
    if timm_of_index() != timm.__version__:
        pytest.skip(f"the index is of timm {timm_of_index()}")
    index = dict(registered())
    for name in list(FAMILIES)[::6]:
        assert index[name] == signature(shapes_of(on_meta(name).state_dict())), "run tools/index_architectures.py"


@pytest.mark.sweep
def test_the_whole_index() -> None:
    if timm_of_index() != timm.__version__:
        pytest.skip(f"the index is of timm {timm_of_index()}")
    stale = [name for name, entry in registered() if entry != signature(shapes_of(on_meta(name).state_dict()))]
    assert not stale, "run tools/index_architectures.py"


def test_inspection_is_plain_data(tmp_path: Path) -> None:
    import json

    found = inspect_weights(_save(tmp_path, {"model": timm.create_model("deit3_small_patch16_224").state_dict()}))
    assert json.loads(json.dumps(found)) == found
    assert found["file"]["key"] == "model"
    assert [item["name"] for item in found["candidates"]] == ["deit3_small_patch16_224"]
    assert found["anatomy"]["blocks"] == "12"
    assert found["anatomy"]["image"] == "224 x 224 pixels"
    assert "layer scale" in found["anatomy"]["parts"]
    assert found["stored"]["architecture"] is None


@pytest.mark.sweep
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_of_files(tmp_path: Path, name: str) -> None:
    """Real weights on disk, and the same outputs from what is loaded."""
    if sum(parameter.numel() for parameter in on_meta(name).parameters()) > 30_000_000:
        pytest.skip("too large for a file in a test; its names and shapes are tested above")
    model = _random(name, num_classes=17)
    path = _save(tmp_path, model.state_dict())
    if FAMILIES[name] > 1:
        with pytest.raises(UsageError, match=f"--model {name}\n"):
            load_model(path)
        return
    loaded = load_model(path)
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))


# -- original releases, whose key names timm's converters know --------------------------------------------------------


def _openai_clip(width: int, depth: int, patch: int, side: int, text: int = 512) -> dict[str, torch.Tensor]:
    """Names and shapes as OpenAI's CLIP saves them, text tower included."""

    def tower(start: str, width: int, depth: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{start}.resblocks.{block}.{key}": shape
            for block in range(depth)
            for key, shape in {
                "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
                "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
                "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
                "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
                "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
            }.items()
        }  # fmt: skip

    shapes = {
        "visual.class_embedding": (width,), "visual.positional_embedding": (side**2 + 1, width),
        "visual.proj": (width, text), "visual.conv1.weight": (width, 3, patch, patch),
        "visual.ln_pre.weight": (width,), "visual.ln_pre.bias": (width,), "visual.ln_post.weight": (width,),
        "visual.ln_post.bias": (width,), **tower("visual.transformer", width, depth),
        "positional_embedding": (77, text), "text_projection": (text, text), "logit_scale": (),
        "token_embedding.weight": (49408, text), "ln_final.weight": (text,), "ln_final.bias": (text,),
        **tower("transformer", text, 12),
    }  # fmt: skip
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


CLIPS = {"vit_base_patch32_clip_224": (768, 12, 32, 7), "vit_large_patch14_clip_336": (1024, 24, 14, 24, 768)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.sweep if "large" in name else []) for name in CLIPS]
)
def test_openai_clip(name: str) -> None:
    """Both networks of that size: whether its GELU is the quick one does not show in weights."""
    found = recognise_architecture(_openai_clip(*CLIPS[name]))
    assert {item.name for item in found.candidates} == {name, name.replace("clip_", "clip_quickgelu_")}


def test_original_dinov2_with_registers() -> None:
    from collapse_probe.loading.key_schemes import to_timm

    state = dict(on_meta("vit_small_patch14_reg4_dinov2").state_dict())
    original = {
        **{key: tensor for key, tensor in state.items() if key != "reg_token"},
        "register_tokens": state["reg_token"],
        "pos_embed": torch.empty(1, 1370, 384, device="meta"),
        "mask_token": torch.empty(1, 384, device="meta"),
    }
    converted = to_timm(original)
    assert converted.left_out == ["mask_token"]
    assert [item.name for item in recognise_architecture(converted.state).candidates] == [
        "vit_small_patch14_reg4_dinov2"
    ]


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_in_chunks_against_timms_converter(swiglu: bool) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    from collapse_probe.loading.key_schemes import to_timm

    base = "vit_giant_patch14_reg4_dinov2" if swiglu else "vit_small_patch14_reg4_dinov2"
    model = _random(base, img_size=28, embed_dim=48, depth=4, num_heads=3)
    own = model.state_dict()
    original = {
        key.replace("fc1", "w12").replace("fc2", "w3") if swiglu else key: tensor
        for key, tensor in own.items()
        if key not in ("reg_token", "pos_embed")
    }
    original |= {
        "register_tokens": own["reg_token"],
        "mask_token": torch.randn(1, 48),
        "pos_embed": torch.randn(1, 5, 48),
    }
    expected = checkpoint_filter_fn(dict(original), model)
    chunked = {_chunked(key): tensor for key, tensor in original.items()}
    for names in (original, chunked):
        converted = to_timm(names)
        assert converted.state.keys() == expected.keys() == own.keys()
        assert all(torch.equal(converted.state[key], expected[key].reshape(own[key].shape)) for key in own)


def _chunked(key: str) -> str:
    start, _, rest = key.partition(".")
    return key if start != "blocks" else f"blocks.{int(rest.partition('.')[0]) // 2}.{rest}"


def test_original_mae() -> None:
    from collapse_probe.loading.key_schemes import to_timm

    encoder = on_meta("vit_base_patch16_224", num_classes=0).state_dict()
    names = ("decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_pred.bias")
    decoder = {key: torch.empty(3, 3, device="meta") for key in names}
    converted = to_timm({**encoder, **decoder, "mask_token": torch.empty(1, 1, 512, device="meta")})
    assert set(converted.left_out) == {*decoder, "mask_token"}
    (found,) = recognise_architecture(converted.state).candidates
    assert (found.name, found.same) == ("vit_base_patch16_224", ["deit_base_patch16_224"])
