"""State dicts of other libraries' ViTs load into timm's, and compute the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from collapse_probe.loading import load_model
from collapse_probe.loading.key_schemes import to_timm

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8, "layer_norm_eps": 1e-6, "attn_implementation": "sdpa",
}  # fmt: skip
OURS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
DINO: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"mlp_ratio": 2}


def _moved(model: nn.Module) -> nn.Module:
    """Every parameter away from its initial value, in float64."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.double().eval()


def _model(name: str) -> nn.Module:
    """The other library's model."""
    t = transformers
    builders: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SIZES, num_labels=5)),
        "deit": lambda: t.DeiTModel(t.DeiTConfig(**SIZES)),
        "mae": lambda: t.ViTMAEForPreTraining(
            t.ViTMAEConfig(
                **SIZES,
                decoder_num_hidden_layers=1,
                decoder_hidden_size=32,
                decoder_num_attention_heads=2,
                mask_ratio=0.0,
            )
        ),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**DINO)),
        "dinov2 swiglu": lambda: t.Dinov2Model(t.Dinov2Config(**{**DINO, "mlp_ratio": 4}, use_swiglu_ffn=True)),
        "dinov2 registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**DINO)),
        "beit": lambda: t.BeitForImageClassification(
            t.BeitConfig(**SIZES, use_relative_position_bias=True, num_labels=5)
        ),
        "beit shared": lambda: t.BeitModel(
            t.BeitConfig(**SIZES, use_shared_relative_position_bias=True, use_mask_token=True)
        ),
        "clip": lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**SIZES, hidden_act="gelu")),
        "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES, hidden_act="gelu")),
    }
    return _moved(builders[name]())


#: timm's model of the same function, and which of the other's outputs is the features after the last norm.
COUNTERPARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_base_patch16_224", {**OURS, "num_classes": 5}),
    "deit": ("deit_tiny_distilled_patch16_224", OURS),
    "mae": ("vit_base_patch16_224", OURS),
    "dinov2": ("vit_base_patch16_224", {**OURS, "init_values": 1.0}),
    "dinov2 swiglu": ("vit_giant_patch14_dinov2", {**OURS, "mlp_ratio": 128 / 48 * 2}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {**OURS, "init_values": 1.0}),
    "beit": ("beit_base_patch16_224", {**OURS, "num_classes": 5}),
    "beit shared": ("beit_base_patch16_224", {**OURS, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "clip": ("vit_base_patch16_clip_224", OURS),
    "siglip": ("vit_base_patch16_siglip_224", OURS),
}
LEFT_OUT = {
    "vit": r"$^", "deit": r"pooler\.", "mae": r"decoder\.", "dinov2": r"embeddings\.mask_token",
    "dinov2 swiglu": r"embeddings\.mask_token", "dinov2 registers": r"embeddings\.mask_token", "beit": r"$^",
    "beit shared": r"embeddings\.mask_token", "clip": r"visual_projection\.", "siglip": r"$^",
}  # fmt: skip


def _loaded(state: dict[str, Tensor], name: str) -> nn.Module:
    """timm's model with the converted weights, strictly; the norms' epsilon that of the other library's model."""
    architecture, arguments = COUNTERPARTS[name]
    classes = arguments.get("num_classes", 0)
    model = timm.create_model(architecture, **{**arguments, "num_classes": classes})
    state = {key: tensor for key, tensor in state.items() if classes or not key.startswith("head")}
    if name == "beit shared":  # features come before the pooler's norm
        state = {key: tensor for key, tensor in state.items() if not key.startswith("fc_norm")}
        model.fc_norm = nn.Identity()
    model.load_state_dict(state, strict=True)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return model.double().eval()


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_the_same_function(name: str) -> None:
    theirs = _model(name)
    converted = to_timm(theirs.state_dict())
    assert converted.scheme is not None
    assert converted.scheme.startswith("Hugging Face")
    ours = _loaded(converted.state, name)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        if "num_classes" in COUNTERPARTS[name][1]:
            torch.testing.assert_close(ours(images), theirs(images).logits, rtol=0, atol=1e-10)
            return
        found, expected = ours.forward_features(images), _features(theirs, name, images)
        # With registers, positions pass through float32 there.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if name == "dinov2 registers" else 1e-10)
        if name == "siglip":
            torch.testing.assert_close(ours(images), theirs(images).pooler_output, rtol=0, atol=1e-10)


def _features(theirs: nn.Module, name: str, images: Tensor) -> Tensor:
    if name == "mae":  # it shuffles the patches: back to their places
        outputs = theirs.vit(images)
        order = torch.cat([torch.zeros(len(images), 1, dtype=torch.long), outputs.ids_restore + 1], 1)
        return outputs.last_hidden_state.gather(1, order[..., None].expand(-1, -1, 48))
    if name == "clip":
        return theirs.vision_model.post_layernorm(theirs.vision_model(images).last_hidden_state)
    return theirs(images).last_hidden_state


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_nothing_is_dropped_in_silence(name: str) -> None:
    state = _model(name).state_dict()
    converted = to_timm(state)
    assert all(re.search(LEFT_OUT[name], key) for key in converted.left_out)
    assert bool(converted.left_out) == (LEFT_OUT[name] != r"$^")
    kept = sum(tensor.numel() for key, tensor in state.items() if key not in converted.left_out)
    moved = 48 if name == "dinov2 registers" else 0  # the position of the class token is added to it
    assert sum(tensor.numel() for tensor in converted.state.values()) == kept - moved


#: How releases before transformers 5 spell what it spells otherwise now.
OLDER = [
    (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
    (r"attention\.q_proj", "attention.attention.query"), (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"), (r"attention\.o_proj", "attention.output.dense"),
    (r"(layer\.\d+\.)(relative_position_bias)", r"\1attention.attention.\2"),
]  # fmt: skip
OLDER_MLP = [(r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense")]


@pytest.mark.parametrize("name", ["vit", "deit", "mae", "dinov2", "dinov2 registers", "beit"])
@pytest.mark.parametrize("base", ["", "model."])
def test_older_spellings(name: str, base: str) -> None:
    state = _model(name).state_dict()
    rules = OLDER if "dinov2" in name else OLDER + OLDER_MLP
    older = {}
    for key, tensor in state.items():
        for pattern, spelling in rules:
            key = re.sub(pattern, spelling, key) if "decoder" not in key else key
        older[base + key if re.match(r"vit|dinov2|beit|deit", key) else key] = tensor
    assert list(older) != list(state) or "o_proj" not in "".join(state)  # the releases before write these
    now, then = to_timm(state).state, to_timm(older).state
    assert now.keys() == then.keys()
    assert all(torch.equal(now[key], then[key]) for key in now)


def test_vision_tower_of_a_model_of_images_and_text() -> None:
    t = transformers
    vision = {**SIZES, "hidden_act": "gelu"}
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 50,
    }
    whole = _moved(t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)))
    converted = to_timm(whole.state_dict())
    assert converted.scheme == "Hugging Face CLIP vision tower"
    assert {key.split(".")[0] for key in converted.left_out} == {
        "text_model", "logit_scale", "visual_projection", "text_projection",
    }  # fmt: skip
    ours = _loaded(converted.state, "clip")
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(ours.forward_features(images), _features(whole, "clip", images), rtol=0, atol=1e-10)


def test_torchvision() -> None:
    from torchvision.models import VisionTransformer

    theirs = _moved(VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5))
    converted = to_timm(theirs.state_dict())
    assert (converted.scheme, converted.left_out) == ("torchvision ViT", [])
    ours = _loaded(converted.state, "vit")
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-10)


# -- JAX ---------------------------------------------------------------------------------------------------------------


def _jax_arrays(attention: int = 1, mlp: int = 3, norm: int = 2, pre_logits: bool = False) -> dict[str, np.ndarray]:
    """Random arrays under the names of the original releases; sizes as in the file of a ViT of two blocks."""
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, 48), "embedding/kernel": (8, 8, 3, 48), "embedding/bias": (48,),
        "Transformer/posembed_input/pos_embedding": (1, 17, 48), "Transformer/encoder_norm/scale": (48,),
        "Transformer/encoder_norm/bias": (48,), "head/kernel": (48, 5), "head/bias": (5,),
    }  # fmt: skip
    for block in range(2):
        start = f"Transformer/encoderblock_{block}/"
        for part in ("query", "key", "value"):
            shapes[f"{start}MultiHeadDotProductAttention_{attention}/{part}/kernel"] = (48, 3, 16)
            shapes[f"{start}MultiHeadDotProductAttention_{attention}/{part}/bias"] = (3, 16)
        shapes[f"{start}MultiHeadDotProductAttention_{attention}/out/kernel"] = (3, 16, 48)
        shapes[f"{start}MultiHeadDotProductAttention_{attention}/out/bias"] = (48,)
        for number, (rows, columns) in enumerate(((48, 96), (96, 48))):
            shapes[f"{start}MlpBlock_{mlp}/Dense_{number}/kernel"] = (rows, columns)
            shapes[f"{start}MlpBlock_{mlp}/Dense_{number}/bias"] = (columns,)
        for number in (0, norm):
            shapes[f"{start}LayerNorm_{number}/scale"] = shapes[f"{start}LayerNorm_{number}/bias"] = (48,)
    if pre_logits:
        shapes |= {"pre_logits/kernel": (48, 48), "pre_logits/bias": (48,)}
    return {name: generator.normal(size=shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}


def test_jax_against_timms_own_loader(tmp_path: Path) -> None:
    arrays = _jax_arrays()
    np.savez(tmp_path / "vit.npz", **arrays)
    theirs = timm.create_model("vit_base_patch16_224", **OURS, num_classes=5)
    theirs.load_pretrained(str(tmp_path / "vit.npz"))
    converted = to_timm({name: torch.from_numpy(values) for name, values in arrays.items()})
    assert (converted.scheme, converted.left_out, converted.arguments) == ("JAX ViT", [], {"num_heads": 3})
    own = theirs.state_dict()
    assert converted.state.keys() == own.keys()
    assert all(torch.equal(converted.state[key], own[key]) for key in own)


@pytest.mark.parametrize("root", ["opt/target/", "params/"])
def test_jax_in_other_spellings(root: str) -> None:
    plain = to_timm({name: torch.from_numpy(values) for name, values in _jax_arrays().items()})
    later = {root + name: torch.from_numpy(values) for name, values in _jax_arrays(0, 0, 1).items()}
    assert all(torch.equal(plain.state[key], tensor) for key, tensor in to_timm(later).state.items())
    assert to_timm(later).state.keys() == plain.state.keys()


def test_jax_with_a_layer_before_the_classifier() -> None:
    converted = to_timm({name: torch.from_numpy(values) for name, values in _jax_arrays(pre_logits=True).items()})
    assert sorted(converted.left_out) == ["head/bias", "head/kernel", "pre_logits/bias", "pre_logits/kernel"]
    assert not any(key.startswith("head") for key in converted.state)


# -- from files --------------------------------------------------------------------------------------------------------


def test_folder_of_hugging_face(tmp_path: Path) -> None:
    """Heads come from its configuration; without it they would be assumed."""
    theirs = _moved(transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES | {"num_attention_heads": 6},
                                                                                 num_labels=5)))  # fmt: skip
    theirs.float().save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=0, atol=1e-4)
    assert ours.provenance["heads"] == {"count": 6, "known": "stored in config.json"}
    assert ours.provenance["weights"]["scheme"] == "Hugging Face ViT"


def test_file_of_jax(tmp_path: Path) -> None:
    np.savez(tmp_path / "vit.npz", **_jax_arrays())
    ours = load_model(tmp_path / "vit.npz")
    assert ours.provenance["heads"] == {"count": 3, "known": "shown by the shapes of JAX ViT"}
    assert ours.provenance["weights"]["format"] == "NumPy archive"


def test_meta_tensors_and_names_that_are_known_already() -> None:
    state = {key: tensor.to("meta") for key, tensor in _model("beit").state_dict().items()}
    assert to_timm(state).state["blocks.1.attn.qkv.weight"].shape == (144, 48)
    own = timm.create_model("vit_tiny_patch16_224", **OURS).state_dict()
    converted = to_timm(own)
    assert converted.scheme is None
    assert list(converted.state) == list(own)
    assert converted.left_out == []
