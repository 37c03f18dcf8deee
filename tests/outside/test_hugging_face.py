"""Vision encoders of Hugging Face transformers, against the attention weights that their eager twins return."""

from __future__ import annotations

import copy

import pytest
import torch
from _outside import assert_images_are_images, assert_maps, images_of, observed, perturbed

from collapse_probe.capture import capture

transformers = pytest.importorskip("transformers")

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VIT |= {"image_size": 32, "patch_size": 8}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
PYRAMID = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 2, 2, 4]}
HIERA = {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 2, 2], "num_heads": [1, 2, 4], "num_query_pool": 2}
HIERA |= {"masked_unit_attention": [True, True, False]}

#: name -> class prefix of model and configuration, arguments, implementations, kinds and windows of its layers
SELF = ["token", "token"]
BOTH = ["sdpa", "eager"]
MODELS = {
    "vit": ("ViTModel", "ViTConfig", VIT, BOTH, SELF),
    "deit": ("DeiTModel", "DeiTConfig", VIT, BOTH, SELF),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO, BOTH, SELF),
    "dinov2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, BOTH, SELF),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", VIT | {"num_register_tokens": 4}, BOTH, SELF),
    "beit": ("BeitModel", "BeitConfig", VIT | {"use_relative_position_bias": True}, BOTH, SELF),
    "beit, shared bias": ("BeitModel", "BeitConfig", VIT | {"use_shared_relative_position_bias": True}, BOTH, SELF),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", VIT, BOTH, SELF),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VIT, BOTH, [*SELF, "pooling"]),
    "swin": ("SwinModel", "SwinConfig", SWIN, BOTH, ["window"] * 4),
    "swinv2": ("Swinv2Model", "Swinv2Config", SWIN, ["eager"], ["window"] * 4),
    "vit_mae": ("ViTMAEModel", "ViTMAEConfig", VIT, BOTH, SELF),
    "data2vec": (
        "Data2VecVisionModel",
        "Data2VecVisionConfig",
        VIT | {"use_relative_position_bias": True},
        BOTH,
        SELF,
    ),
    "hiera": ("HieraModel", "HieraConfig", HIERA, ["eager"], ["window"] * 4 + ["token"]),
    "pvt_v2": ("PvtV2Model", "PvtV2Config", PYRAMID | {"image_size": 64}, ["eager"], ["token"] * 4),
    "segformer": ("SegformerModel", "SegformerConfig", PYRAMID, BOTH, ["token"] * 4),
}
CASES = [(name, implementation) for name, entry in MODELS.items() for implementation in entry[3]]


def build(name, implementation, state=None):
    """A model of random but peaked weights, or of the given ones."""
    model_class, config_class, arguments, *_ = MODELS[name]
    config = getattr(transformers, config_class)(**arguments)
    torch.manual_seed(0)
    try:
        model = getattr(transformers, model_class)._from_config(config, attn_implementation=implementation)
    except ValueError as error:  # what can be fused has grown from version to version
        if implementation == "eager" or "does not support an attention implementation" not in str(error):
            raise
        pytest.skip(f"this version of transformers has no {implementation} for {model_class}")
    assert model.config._attn_implementation == implementation
    model = perturbed(model)
    if state is not None:
        model.load_state_dict(state)
    return model


def images_for(name, count=2):
    size = MODELS[name][2].get("image_size", 64)
    return images_of(count, size if isinstance(size, int) else size[0])


def _reference_weights(model, images):
    """Every attention weight `[N, H, Q, K]` that a module of an eager model returns beside its output, by its name.

    Stages and blocks that hand the weights on are left out. The pooling head, which throws its weights away, is asked
    for them.
    """
    seen, heads = {}, {}

    def keep(name):
        def hook(_module, _inputs, output):
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.ndim >= 4:
                seen[name] = weights.detach()

        return hook

    def ask(name):
        def hook(module, inputs, named, _output):
            if name in heads:
                return
            heads[name] = None
            heads[name] = module(*inputs, **named | {"need_weights": True, "average_attn_weights": False})[1].detach()

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            handles.append(module.register_forward_hook(ask(name), with_kwargs=True))
        elif "attn" in name.rpartition(".")[2] or "attention" in name.rpartition(".")[2] or name.endswith(".self"):
            handles.append(module.register_forward_hook(keep(name)))
    torch.manual_seed(0)
    with torch.no_grad():
        model(pixel_values=images, output_attentions=True)
    for handle in handles:
        handle.remove()
    innermost = {name: item for name, item in seen.items() if not any(other.startswith(f"{name}.") for other in seen)}
    # Hiera keeps its windows behind the heads: [B, H, W, Q, K].
    innermost = {
        name: item.transpose(1, 2).flatten(0, 1) if item.ndim == 5 else item for name, item in innermost.items()
    }
    for item in innermost.values():
        torch.testing.assert_close(item.sum(-1), torch.ones_like(item.sum(-1)))
    return innermost | heads


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_maps_equal_the_weights_of_the_eager_twin(name, implementation, keyword):
    model, images = build(name, implementation), images_for(name)
    expected = _reference_weights(build(name, "eager", model.state_dict()), images)
    captured = observed(model, pixel_values=images) if keyword else observed(model, images)
    assert list(captured.maps) == list(expected)
    assert_maps(captured, list(expected.values()))
    assert [item.kind for item in captured.maps.values()] == MODELS[name][4]
    assert {item.images for item in captured.maps.values()} == {2}
    assert all(item.is_probability for item in captured.maps.values())


@pytest.mark.parametrize(("name", "implementation"), [case for case in CASES if case[1] == "sdpa"])
def test_double_precision(name, implementation):
    model, images = build(name, implementation).double(), images_for(name).double()
    expected = _reference_weights(build(name, "eager", model.state_dict()).double(), images)
    # Eager models take their softmax in float32 whatever the dtype of the model.
    assert_maps(observed(model, pixel_values=images), list(expected.values()), atol=1e-6)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["vit", "siglip", "swin", "hiera", "data2vec"])
def test_every_grad_mode_sees_the_same(name, mode):
    model, images = build(name, MODELS[name][3][0]), images_for(name)
    expected = observed(model, pixel_values=images)
    captured = observed(model, pixel_values=images, mode=mode)
    assert list(captured.maps) == list(expected.maps)
    for attention, other in zip(captured.maps.values(), expected.maps.values(), strict=True):
        assert (attention.kind, attention.shape, attention.windows) == (other.kind, other.shape, other.windows)
        torch.testing.assert_close(attention.materialize(), other.materialize(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit_mae"])  # which hides patches at random
def test_the_batch_axis_is_images(name, keyword):
    def call(model, images):
        return observed(model, pixel_values=images) if keyword else observed(model, images)

    model, images = build(name, MODELS[name][3][0]), images_for(name, 3)
    assert_images_are_images(model, images, call(model, images), atol=1e-4, call=call)


@pytest.mark.parametrize(("name", "implementation"), [("swin", "sdpa"), ("swin", "eager"), ("swinv2", "eager")])
def test_windows_of_swin_and_how_they_were_cut(name, implementation):
    captured = observed(build(name, implementation), pixel_values=images_for(name))
    maps = list(captured.maps.values())
    assert [item.windows for item in maps] == [16, 16, 4, 4]
    assert [item.shape for item in maps] == [(32, 2, 16, 16)] * 2 + [(8, 4, 16, 16)] * 2
    assert maps[0].partition != maps[1].partition
    assert maps[2].partition != maps[3].partition
    assert (maps[0].partition, maps[1].partition) == (maps[2].partition, maps[3].partition)


def test_windows_of_hiera():
    maps = observed(build("hiera", "eager"), pixel_values=images_for("hiera")).maps.values()
    assert [item.windows for item in maps] == [4, 4, 4, 4, 1]
    assert [item.shape[1:] for item in maps] == [(1, 64, 64), (2, 16, 64), (2, 16, 16), (4, 4, 16), (4, 16, 16)]


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("vit", 1), ("dinov2", 1), ("dinov2 with registers", 5), ("dinov3", 5), ("clip", 1), ("siglip", 0)],
)
def test_prefix_tokens(name, prefix):
    """Class token and registers are not patches."""
    captured = observed(build(name, "sdpa"), pixel_values=images_for(name))
    for attention in captured.maps.values():
        if attention.kind == "token":
            assert (attention.layout.prefix_tokens, attention.layout.grid) == (prefix, (4, 4))


def test_no_grid_is_claimed_for_patches_that_were_hidden_at_random():
    captured = observed(build("vit_mae", "sdpa"), pixel_values=images_for("vit_mae"))
    for attention in captured.maps.values():
        assert attention.shape[3] == 5  # a class token and 4 of 16 patches
        assert attention.layout.grid is None


@pytest.mark.parametrize("size", [(64, 64), (64, 32)])
def test_another_image_size_than_that_of_the_configuration(size):
    model = build("vit", "sdpa")
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    captured = observed(model, pixel_values=images, interpolate_pos_encoding=True)
    patches = (size[0] // 8) * (size[1] // 8)
    assert [item.shape for item in captured.maps.values()] == [(2, 4, patches + 1, patches + 1)] * 2
    assert {item.kind for item in captured.maps.values()} == {"token"}


def test_a_whole_two_tower_model_keeps_its_towers_apart():
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    text |= {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "bos_token_id": 48}
    config = transformers.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=16)
    torch.manual_seed(0)
    model = perturbed(transformers.CLIPModel._from_config(config, attn_implementation="sdpa"))
    words = torch.tensor([[48, 3, 9, 27, 49], [48, 5, 8, 7, 49], [48, 5, 1, 2, 49]])
    captured = observed(model, input_ids=words, pixel_values=images_of(2))
    assert not captured.not_captured
    shapes = {name: (item.kind, item.shape) for name, item in captured.maps.items()}
    assert shapes == {
        "vision_model.encoder.layers.0.self_attn": ("token", (2, 4, 17, 17)),
        "vision_model.encoder.layers.1.self_attn": ("token", (2, 4, 17, 17)),
        "text_model.encoder.layers.0.self_attn": ("token", (3, 4, 5, 5)),
    }
    text_map = captured.maps["text_model.encoder.layers.0.self_attn"].materialize()
    assert (text_map.triu(1) == 0).all()  # it is causal
    assert captured.maps["vision_model.encoder.layers.0.self_attn"].images == 2


@pytest.mark.sweep  # it compiles a kernel
def test_flex_attention_is_a_listed_gap_or_a_map():
    model, images = build("vit", "eager"), images_for("vit")
    expected = _reference_weights(model, images)
    model = copy.deepcopy(model)
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        try:
            plain = model(pixel_values=images)
        except Exception as error:
            pytest.skip(f"flex_attention does not run without capture either: {type(error).__name__}")
        with capture(model) as captured:
            output = model(pixel_values=images)
    # It compiles itself, and runs eagerly under capture.
    torch.testing.assert_close(output.last_hidden_state, plain.last_hidden_state, atol=1e-4, rtol=0)
    for name, reference in expected.items():
        if name in captured.maps:
            torch.testing.assert_close(captured.maps[name].materialize(), reference, atol=1e-4, rtol=0)
        else:
            assert "flex_attention" in captured.not_captured[name]
    assert len(captured.maps) + len(captured.not_captured) == len(expected)
