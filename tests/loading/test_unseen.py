"""What names and shapes do not show is taken from what says it, or said to be assumed; never guessed in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from collapse_probe.errors import DamagedFileError, ModelError, UnknownModelError, UsageError, WeightsMismatchError
from collapse_probe.loading import inspect_weights, load_model
from collapse_probe.loading.data_config import data_config
from collapse_probe.loading.recognition import recognise_architecture
from collapse_probe.loading.signatures import on_meta

TINY: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 32, "patch_size": 16}


def vit(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 5, **kwargs}).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Any], Path]:
    def save(content: Any) -> Path:
        torch.save(content, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    return save


def same(one: nn.Module, other: nn.Module, size: tuple[int, int] = (32, 32)) -> bool:
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        return torch.equal(one(images), other(images))


# -- positions ---------------------------------------------------------------------------------------------------------


def test_without_positions_no_vit_is_guessed(file: Callable[[Any], Path]) -> None:
    rotary = timm.models.eva.Eva(
        img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=5, use_abs_pos_emb=False,
        use_rot_pos_emb=True, attn_type="rope", use_fc_norm=False, global_pool="token",
    )  # fmt: skip
    with pytest.raises(UnknownModelError, match=r"tells positions apart \(rotary, fixed\) does not show in weights"):
        load_model(file(rotary.state_dict()))


def test_what_is_assumed_besides_heads_is_said(file: Callable[[Any], Path]) -> None:
    with pytest.warns(UserWarning, match="Nor do the activation, the epsilon of norms and rotary positions show"):
        load_model(file(vit().state_dict()))


@pytest.mark.parametrize("size", [(224, 256), (32, 64)])
def test_images_that_are_not_square(file: Callable[[Any], Path], size: tuple[int, int]) -> None:
    model = vit(img_size=size, depth=1)
    path = file(model.state_dict())
    loaded = load_model(path, model_kwargs={"img_size": list(size)}, num_heads=1)
    assert same(model, loaded, size)
    assert loaded.patch_embed.img_size == size


def test_a_class_token_without_position_is_said_to_be_assumed(file: Callable[[Any], Path]) -> None:
    path = file(vit(img_size=(224, 256), depth=1).state_dict())  # 14 * 16 + 1 positions are also 15 * 15
    with pytest.warns(UserWarning, match="taken to have no position. For images that are not square give --model-kw"):
        load_model(path)


@pytest.mark.parametrize("side", [32, 48])
def test_registers_have_no_positions(file: Callable[[Any], Path], side: int) -> None:
    model = vit(reg_tokens=2, no_embed_class=True, img_size=side)
    assert same(model, load_model(file(model.state_dict()), num_heads=1), (side, side))


def test_positions_are_not_resized_for_tensors_of_that_size_by_chance() -> None:
    """1024 * 1024 numbers of a projection are those of 1025 positions less one, too."""
    from collapse_probe.loading.fit import fit_weights
    from tests.loading.test_recognition import _openai_clip

    model = on_meta("vit_large_patch14_clip_224", depth=1, img_size=448, num_classes=0)
    state = {key: torch.empty(item.shape, device="meta") for key, item in _openai_clip(1024, 1, 14, 16, 768).items()}
    with pytest.raises(WeightsMismatchError, match="pos_embed would have to be resized"), torch.device("meta"):
        fit_weights(model, state, "weights")


# -- activations, heads, epsilon ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "other"),
    [
        ("vit_base_patch16_clip_quickgelu_224", 384, "vit_base_patch16_clip_384"),
        ("vit_base_patch16_gap_224", 384, "vit_base_patch16_siglip_gap_384"),
        ("vit_large_patch16_siglip_512", 256, "vit_large_patch16_siglip_256"),
    ],
)
def test_other_networks_at_another_image_size_are_listed(name: str, size: int, other: str) -> None:
    found = recognise_architecture(on_meta(name, img_size=size, num_classes=0).state_dict())
    assert other in [item.name for item in found.candidates]
    assert name in [known for item in found.also for known in (item.name, *item.same)]
    assert all(item.arguments == {"img_size": size} for item in found.also)


def test_a_network_that_fits_at_another_size_is_warned_of(file: Callable[[Any], Path]) -> None:
    state = on_meta("vit_base_patch32_clip_256", num_classes=0).state_dict()
    generator = torch.Generator().manual_seed(0)
    path = file({key: torch.randn(item.shape, generator=generator) * 0.01 for key, item in state.items()})
    words = r"fits vit_base_patch32_clip_256, and at this image size also vit_base_patch32_clip_quickgelu_224"
    with pytest.warns(UserWarning, match=words):
        load_model(path)


def test_moco_has_heads_of_its_own(file: Callable[[Any], Path]) -> None:
    model = timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0, depth=2).eval()
    state = {f"module.base_encoder.{key}": item for key, item in model.state_dict().items()}
    beside = {"module.base_encoder.head.0.weight": torch.randn(8, 384), "module.predictor.0.weight": torch.randn(4, 4)}
    path = file({"arch": "vit_small", "state_dict": {**state, **beside}})
    loaded = load_model(path, "vit_small_patch16_224", model_kwargs={"depth": 2})
    assert same(model, loaded, (224, 224))
    assert loaded.provenance["heads"] == {"count": 12, "known": "those of MoCo v3's ViT-S (arXiv 2104.02057)"}


def jax_arrays() -> dict[str, np.ndarray]:
    from tests.loading.test_key_schemes import _jax_arrays

    return _jax_arrays()


def test_heads_that_shapes_of_jax_show_count_for_named_architectures_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "vit.npz", **jax_arrays())
    own = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "mlp_ratio": 2}
    loaded = load_model(tmp_path / "vit.npz", "vit_tiny_patch16_224", model_kwargs={**own, "num_heads": 3})
    assert loaded.provenance["heads"] == {"count": 3, "known": "shown by the shapes of JAX ViT"}
    with pytest.raises(UsageError, match="of 3 heads, as the shapes of JAX ViT show, and 4 were asked for"):
        load_model(tmp_path / "vit.npz", "vit_tiny_patch16_224", model_kwargs={**own, "num_heads": 4})
    found = inspect_weights(tmp_path / "vit.npz")
    assert [item["heads_from"] for item in found["candidates"]] == ["shown by the shapes of JAX ViT"]


transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip


def folder_of(model: nn.Module, path: Path) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(path)
    return model


def last(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images).last_hidden_state


def features(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.forward_features(images)


@pytest.mark.parametrize("activation", ["quick_gelu", "relu", "gelu", "gelu_pytorch_tanh", "silu"])
@pytest.mark.parametrize("architecture", [None, "vit_base_patch16_224"])
def test_the_activation_of_a_configuration(tmp_path: Path, activation: str, architecture: str | None) -> None:
    config = transformers.ViTConfig(**SIZES, hidden_act=activation)
    theirs = folder_of(transformers.ViTModel(config, add_pooling_layer=False), tmp_path)
    own = {"embed_dim": 64, "depth": 2, "img_size": 32, "mlp_ratio": 2} if architecture else {}
    ours = load_model(tmp_path, architecture, model_kwargs=own)
    images = torch.randn(2, 3, 32, 32)
    assert (last(theirs, images) - features(ours, images)).abs().max() < 1e-4
    assert ours.provenance["heads"] == {"count": 2, "known": "stored in config.json"}
    assert [item["heads_from"] for item in inspect_weights(tmp_path)["candidates"]] == ["stored in config.json"]


@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_the_epsilon_of_a_configuration(tmp_path: Path, eps: float) -> None:
    config = transformers.ViTConfig(**SIZES, layer_norm_eps=eps)
    theirs = folder_of(transformers.ViTModel(config, add_pooling_layer=False), tmp_path)
    ours = load_model(tmp_path)
    images = torch.randn(2, 3, 32, 32) / 10
    assert (last(theirs, images) - features(ours, images)).abs().max() < 1e-4
    assert ours.provenance["weights"]["norm_eps"] == eps


def test_clip_as_hugging_face_ships_it(tmp_path: Path) -> None:
    """The quick GELU and the epsilon of its norms are in its configuration alone."""
    theirs = folder_of(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)), tmp_path)
    ours = load_model(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    # timm's last norm is over all tokens, theirs over the class token alone.
    difference = features(ours, images)[:, 0] - theirs(images).pooler_output
    assert difference.abs().max() < 1e-4
    assert ours.provenance["model_kwargs"]["act_layer"] == "quick_gelu"


def test_preprocessing_beside_the_weights(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SIZES)
    folder_of(transformers.ViTModel(config, add_pooling_layer=False), tmp_path)
    stored = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "do_center_crop": True,
              "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    found = data_config(load_model(tmp_path))
    assert found["mean"] == (0.1, 0.2, 0.3)
    assert found["std"] == (0.4, 0.5, 0.6)
    assert found["interpolation"] == "bilinear"
    assert found["crop_pct"] == pytest.approx(0.8)


def test_preprocessing_of_timms_export(tmp_path: Path) -> None:
    save_file(vit().state_dict(), tmp_path / "model.safetensors")
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.7, "interpolation": "bicubic"}
    content = {"architecture": "vit_tiny_patch16_224", "model_args": {**TINY}, "pretrained_cfg": own}
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    found = data_config(load_model(tmp_path))
    assert (found["mean"], found["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (found["crop_pct"], found["interpolation"]) == (0.7, "bicubic")
    (tmp_path / "config.json").write_text(json.dumps({**content, "pretrained_cfg": {"mean": "x"}}))
    assert len(data_config(load_model(tmp_path))["mean"]) == 3


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3(tmp_path: Path, gated: bool) -> None:
    config = transformers.DINOv3ViTConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536, image_size=64,
        num_register_tokens=4, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu",
    )  # fmt: skip
    theirs = folder_of(transformers.DINOv3ViTModel(config), tmp_path)
    name = f"vit_small_{'plus_' * gated}patch16_dinov3_qkvb"
    ours = load_model(tmp_path, name, model_kwargs={"depth": 2, "img_size": 64})
    images = torch.randn(2, 3, 64, 64)
    expected = last(theirs, images)
    assert (expected - features(ours, images)).abs().max() < 1e-3 * expected.abs().max()
    assert ours.provenance["weights"]["left_out"] == ["embeddings.mask_token"]
    assert inspect_weights(tmp_path)["file"]["scheme"] == "Hugging Face DINOv3"


# -- which of several --------------------------------------------------------------------------------------------------


def test_of_encoders_the_one_that_is_the_target(file: Callable[[Any], Path]) -> None:
    context, target = vit(num_classes=0), vit(num_classes=0, depth=3)
    states = {"encoder": context, "predictor": context, "target_encoder": target}
    content = {
        name: {f"module.{key}": item for key, item in model.state_dict().items()} for name, model in states.items()
    }
    loaded = load_model(file(content), num_heads=1)
    assert loaded.provenance["weights"]["key"] == "target_encoder"
    assert same(target, loaded)


def test_the_wrapper_that_attends(file: Callable[[Any], Path]) -> None:
    model = vit()
    content = {"model": {"fc.weight": torch.randn(5, 64)}, "backbone": model.state_dict()}
    loaded = load_model(file(content), num_heads=1)
    assert loaded.provenance["weights"]["key"] == "backbone"


@pytest.mark.parametrize("key", ["model_state_dict", "model_state"])
def test_wrappers_of_tutorials(file: Callable[[Any], Path], key: str) -> None:
    model = vit()
    content = {"epoch": 3, key: model.state_dict(), "loss": torch.tensor(0.5), "optimizer_state_dict": {"state": {}}}
    assert same(model, load_model(file(content), num_heads=1))


def test_a_key_where_tensors_lie_is_suggested(file: Callable[[Any], Path]) -> None:
    path = file({"epoch": 3, "my_weights": vit().state_dict()})
    with pytest.raises(DamagedFileError, match="Tensors by name lie under 'my_weights': --key names"):
        load_model(path)
    assert load_model(path, key="my_weights", num_heads=1) is not None


def test_pairs_side_by_side_are_chosen_by_key(file: Callable[[Any], Path]) -> None:
    one, other = vit(), vit(depth=3)
    state = {f"{name}.{key}": item for name, model in (("student_backbone", one), ("teacher_backbone", other))
             for key, item in model.state_dict().items()}  # fmt: skip
    with pytest.raises(
        UsageError, match=r"several models side by side: student_backbone, teacher_backbone\. Choose one"
    ):
        load_model(file(state))
    assert same(other, load_model(file(state), key="teacher_backbone", num_heads=1))
    with pytest.raises(UsageError, match="holds no 'third'"):
        load_model(file(state), key="third")


@pytest.mark.parametrize("extra", [{"a": 1}, [1, 2], b"bytes", (3, 4)])
def test_other_things_among_tensors_do_no_harm(file: Callable[[Any], Path], extra: Any) -> None:
    model = vit()
    assert same(model, load_model(file({**model.state_dict(), "blocks.0._extra_state": extra, 3: "x"}), num_heads=1))


def test_tokens_beside_a_prefix_are_not_dropped(file: Callable[[Any], Path]) -> None:
    state = vit().state_dict()
    moved = {key if key in ("cls_token", "pos_embed") else f"backbone.{key}": item for key, item in state.items()}
    with pytest.raises(ModelError):
        load_model(file(moved))


# -- what once ended in a traceback ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["levit_128s", "xcit_nano_12_p16_224", "deepvit_16b"])
def test_without_classifier(file: Callable[[Any], Path], name: str) -> None:
    torch.manual_seed(0)
    small = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2} if name == "deepvit_16b" else {}
    model = timm.create_model(name, num_classes=0, **small).eval()
    path = file(model.state_dict())
    size = (32, 32) if small else (224, 224)
    assert same(model, load_model(path, name, model_kwargs=small), size)
    if name.startswith("xcit"):
        with pytest.raises(UsageError, match=f"--model {name}\n"):
            load_model(path)
    else:
        assert same(model, load_model(path), size)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: torch.empty(0),
        lambda item: item.flatten(),
        lambda item: item.reshape(-1)[:1].squeeze(),
    ],
)
@pytest.mark.parametrize("kwargs", [{"reg_tokens": 4}, {"qk_norm": True}])
def test_shares_of_training_in_parts(file: Callable[[Any], Path], spoil: Any, kwargs: dict[str, Any]) -> None:
    path = file({key: spoil(item).clone() for key, item in vit(**kwargs).state_dict().items()})
    for read in (inspect_weights, load_model):
        with pytest.raises(DamagedFileError, match="one process's share of weights that were cut up in training"):
            read(path)


@pytest.mark.parametrize("key", ["patch_embed.proj.weight", "cls_token", "pos_embed", "blocks.0.mlp.fc1.weight",
                                 "blocks.0.norm1.weight", "head.weight"])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,), (64, 3, 0, 0), (0, 3, 16, 16), (2, 2, 2, 2, 2)])
def test_shapes_of_no_model(file: Callable[[Any], Path], key: str, shape: tuple[int, ...]) -> None:
    path = file({**vit().state_dict(), key: torch.ones(shape)})
    for read in (inspect_weights, load_model):
        try:
            read(path)
        except ModelError as error:
            assert str(error)  # noqa: PT017 - inspection may well find something to say


@pytest.mark.parametrize("gone", ["attention.attention.key.weight", "patch_embeddings.projection.weight", "cls_token"])
def test_parts_of_another_library_that_are_missing(file: Callable[[Any], Path], gone: str) -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**SIZES), add_pooling_layer=False)
    state = {key: item for key, item in model.state_dict().items() if not key.endswith(_spelled(gone, model))}
    assert len(state) < len(model.state_dict())
    with pytest.raises(ModelError):
        load_model(file(state))


def _spelled(gone: str, model: nn.Module) -> str:
    """The same in the names of newer releases."""
    names = list(model.state_dict())
    return gone if any(name.endswith(gone) for name in names) else gone.replace("attention.attention.key", "k_proj")


def test_beit_without_layer_scale(file: Callable[[Any], Path]) -> None:
    config = transformers.BeitConfig(**SIZES, layer_scale_init_value=0.0, use_relative_position_bias=True)
    state = transformers.BeitModel(config, add_pooling_layer=False).state_dict()
    assert inspect_weights(file(state))["file"]["scheme"].startswith("Hugging Face")


@pytest.mark.parametrize("shape", [(3,), (3, 4), ()])
@pytest.mark.parametrize("end", ["query/kernel", "embedding/kernel", "out/kernel"])
def test_arrays_of_other_shapes_under_jaxs_names(tmp_path: Path, end: str, shape: tuple[int, ...]) -> None:
    arrays = {key: np.ones(shape, np.float32) if key.endswith(end) else item for key, item in jax_arrays().items()}
    np.savez(tmp_path / "vit.npz", **arrays)
    with pytest.raises(ModelError):
        load_model(tmp_path / "vit.npz")


def test_a_hybrid_of_jax_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "vit.npz", **jax_arrays(), **{"conv_root/kernel": np.ones((7, 7, 3, 64), np.float32)})
    with pytest.raises(WeightsMismatchError, match=r"hybrid of ResNet and ViT in JAX \(conv_root/kernel\)"):
        inspect_weights(tmp_path / "vit.npz")


def test_arrays_of_the_other_byte_order(tmp_path: Path) -> None:
    arrays = jax_arrays()
    np.savez(tmp_path / "one.npz", **arrays)
    np.savez(tmp_path / "other.npz", **{key: item.astype(">f4") for key, item in arrays.items()})
    one, other = (load_model(tmp_path / f"{name}.npz") for name in ("one", "other"))
    assert same(one, other)


@pytest.mark.parametrize("stored", [{"depth": 10**8}, {"embed_dim": 18000}, {"img_size": 10**5}, {"mlp_ratio": 1e5},
                                    {"num_classes": 10**9}])  # fmt: skip
def test_stored_arguments_that_ask_for_any_memory(tmp_path: Path, stored: dict[str, Any]) -> None:
    metadata = {"architecture": "vit_tiny_patch16_224", "model_kwargs": json.dumps({**TINY, **stored})}
    save_file(vit().state_dict(), tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(ModelError):
        load_model(tmp_path / "model.safetensors")


def test_mlp_ratios_that_are_rounded_down(file: Callable[[Any], Path]) -> None:
    model = vit(embed_dim=192, num_heads=3, mlp_ratio=256 / 192 + 1e-9)
    assert same(model, load_model(file(model.state_dict()), num_heads=3))
