"""The key names of other libraries' ViTs, rewritten to timm's, by names and shapes alone.

Covered: torchvision's ViT; Hugging Face's ViT, DeiT, ViTMAE, DINOv2 (with registers, SwiGLU), DINOv3, BEiT, CLIP's and
SigLIP's vision towers, in the names of transformers 5 and of the releases before; the original ViT in JAX (arXiv
2010.11929, google-research/vision_transformer, and big_vision's names); what pre-training leaves beside an encoder in
timm's names (the mask tokens and decoders of MAE and DINOv2, whose registers and gated MLPs have names of their own).
The original releases of BEiT and CLIP are rewritten by timm's own converters (:mod:`collapse_probe.loading.fit`).

timm keeps queries, keys and values in one matrix, `qkv`, and PyTorch keeps matrices as [out, in], JAX as [in, out].
Activations and the epsilon of norms do not show in weights: those of the timm model that is built count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from collapse_probe.errors import WeightsMismatchError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Converted:
    """A state dict in timm's keys.

    Attributes:
        scheme: whose names it came in, or None where they are timm's or unknown (then it is unchanged).
        state: tensors by timm's keys.
        left_out: keys of parts that timm's model does not have: poolers, decoders, mask tokens, text towers.
        arguments: constructor arguments that shapes in timm's names do not show, and these showed.
    """

    scheme: str | None
    state: State
    left_out: list[str] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)


def to_timm(state: Mapping[str, Tensor]) -> Converted:
    """Rewrite a state dict to timm's keys, if its names are of a library that is known.

    Raises:
        WeightsMismatchError: they are, and what belongs to them is missing or of shapes that it never has.
    """
    for scheme, convert in (
        ("torchvision", _torchvision), ("Hugging Face", _hugging_face), ("the original ViT in JAX", _jax),
        ("a pre-training release", _pretrained),
    ):  # fmt: skip
        try:
            found = convert(state)
        except KeyError as error:
            raise WeightsMismatchError(
                f"The keys are named as those of {scheme}, but not all are there: {error.args[0]} is missing (in "
                "timm's spelling)."
            ) from None
        except (IndexError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise WeightsMismatchError(
                f"The keys are named as those of {scheme}, but the tensors have other shapes than those: {reason}."
            ) from None
        if found is not None:
            return found
    return Converted(None, dict(state))


def _renamed(state: Mapping[str, Tensor], rules: Mapping[str, str]) -> tuple[State, list[str]]:
    """Keys by the first rule whose pattern is theirs; the others are left out."""
    compiled = [(re.compile(pattern), name) for pattern, name in rules.items()]
    renamed, left_out = {}, []
    for key, tensor in state.items():
        for pattern, name in compiled:
            if found := pattern.fullmatch(key):
                renamed[found.expand(name)] = tensor
                break
        else:
            left_out.append(key)
    return renamed, left_out


# -- torchvision -------------------------------------------------------------------------------------------------------

_TORCHVISION = {
    r"class_token": "cls_token",
    r"conv_proj\.(weight|bias)": r"patch_embed.proj.\1",
    r"encoder\.pos_embedding": "pos_embed",
    r"encoder\.ln\.(weight|bias)": r"norm.\1",
    r"heads\.head\.(weight|bias)": r"head.\1",
    r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(weight|bias)": r"blocks.\1.attn.qkv.\2",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(weight|bias)": r"blocks.\1.mlp.fc1.\2",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(weight|bias)": r"blocks.\1.mlp.fc2.\2",
}


def _torchvision(state: Mapping[str, Tensor]) -> Converted | None:
    if "conv_proj.weight" not in state or "encoder.pos_embedding" not in state:
        return None
    return Converted("torchvision ViT", *_renamed(state, _TORCHVISION))


# -- pre-training in timm's names --------------------------------------------------------------------------------------

_BESIDE = re.compile(r"mask_token|decoder_\w+(\.|$)")
_CHUNK = r"blocks\.\d+\.(\d+\..*)"  # DINOv2's blocks lie in chunks
_PRETRAINED = {
    r"register_tokens": "reg_token",
    r"blocks\.(\d+)\.mlp\.w12\.(weight|bias)": r"blocks.\1.mlp.fc1.\2",
    r"blocks\.(\d+)\.mlp\.w3\.(weight|bias)": r"blocks.\1.mlp.fc2.\2",
    r"(.*)": r"\1",
}


def _pretrained(state: Mapping[str, Tensor]) -> Converted | None:
    """Encoders of MAE and DINOv2 in their own releases, with what they were trained beside."""
    left_out = [key for key in state if _BESIDE.match(key)]
    if not left_out or not any(re.match(r"blocks\.[\d.]+\.attn\.qkv\.weight", key) for key in state):
        return None
    inside = {key: tensor for key, tensor in state.items() if key not in left_out}
    renamed, _ = _renamed(_renamed(inside, {_CHUNK: r"blocks.\1", r"(.*)": r"\1"})[0], _PRETRAINED)
    if "reg_token" in renamed:
        renamed = _tokens_shaped(renamed)
    return Converted("pre-training in timm's names", renamed, left_out)


# -- Hugging Face ------------------------------------------------------------------------------------------------------

_BASE = re.compile(
    r"(?:model\.)?(?:vit|deit|dinov2|dinov2_with_registers|dinov3_vit|beit|data2vec_vision|vision_model)\."
)
_BLOCK = r"(?:encoder\.|model\.)?layers?\.(\d+)\."
_END = r"\.(weight|bias)"
_HUGGING_FACE = {
    r"embeddings\.(?:cls_token|class_embedding)": "cls_token",
    r"embeddings\.distillation_token": "dist_token",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.(?:position_embeddings|position_embedding\.weight)": "pos_embed",
    rf"embeddings\.(?:patch_embeddings\.projection|patch_embeddings|patch_embedding){_END}": r"patch_embed.proj.\1",
    rf"pre_layrnorm{_END}": r"norm_pre.\1",
    rf"(?:layernorm|post_layernorm|norm){_END}": r"norm.\1",
    rf"pooler\.layernorm{_END}": r"fc_norm.\1",
    rf"(?:classifier|cls_classifier){_END}": r"head.\1",
    rf"distillation_classifier{_END}": r"head_dist.\1",
    rf"{_BLOCK}attention\.attention\.query{_END}": r"blocks.\1.attn.q.\2",
    rf"{_BLOCK}attention\.attention\.key{_END}": r"blocks.\1.attn.k.\2",
    rf"{_BLOCK}attention\.attention\.value{_END}": r"blocks.\1.attn.v.\2",
    rf"{_BLOCK}(?:attention|self_attn)\.([qkv])_proj{_END}": r"blocks.\1.attn.\2.\3",
    rf"{_BLOCK}(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj){_END}": r"blocks.\1.attn.proj.\2",
    rf"{_BLOCK}(?:layernorm_before|layer_norm1|norm1){_END}": r"blocks.\1.norm1.\2",
    rf"{_BLOCK}(?:layernorm_after|layer_norm2|norm2){_END}": r"blocks.\1.norm2.\2",
    rf"{_BLOCK}(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in){_END}": r"blocks.\1.mlp.fc1.\2",
    rf"{_BLOCK}(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj){_END}": r"blocks.\1.mlp.fc2.\2",
    rf"{_BLOCK}mlp\.gate_proj{_END}": r"blocks.\1.mlp.gate.\2",
    rf"{_BLOCK}mlp\.up_proj{_END}": r"blocks.\1.mlp.up.\2",
    rf"{_BLOCK}layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
    rf"{_BLOCK}lambda_([12])": r"blocks.\1.gamma_\2",
    rf"{_BLOCK}(?:attention\.attention\.)?relative_position_bias\.relative_position_bias_table": (
        r"blocks.\1.attn.relative_position_bias_table"
    ),
    r"(?:encoder\.relative_position_bias|shared_position_bias)\.relative_position_bias_table": (
        "rel_pos_bias.relative_position_bias_table"
    ),
    r"head\.probe": "attn_pool.latent",
    r"head\.attention\.in_proj_(weight|bias)": r"attn_pool.in_proj.\1",
    rf"head\.attention\.out_proj{_END}": r"attn_pool.proj.\1",
    rf"head\.layernorm{_END}": r"attn_pool.norm.\1",
    rf"head\.mlp\.(fc[12]){_END}": r"attn_pool.mlp.\1.\2",
}


def _hugging_face(state: Mapping[str, Tensor]) -> Converted | None:
    base = next((found[0] for key in state if (found := _BASE.match(key)) and "embeddings." in key), "")
    own = {key.removeprefix(base): tensor for key, tensor in state.items()}
    if not any(key.startswith(("embeddings.patch_embedding", "embeddings.patch_embeddings.")) for key in own):
        return None
    # Of a model of images and text, the part that sees the images and what classifies them.
    outside = {key for key in state if base and not key.startswith(base) and "classifier" not in key}
    names = {key.removeprefix(base): key for key in state}
    inside = {key: tensor for key, tensor in own.items() if names[key] not in outside}
    renamed, left_out = _renamed(inside, _HUGGING_FACE)
    left_out = [*(names[key] for key in left_out), *outside]
    kind = _kind(inside, base)
    if kind == "DINOv3":
        renamed = _as_dinov3(renamed)
    renamed = _fused(_tokens_shaped(renamed))
    width = renamed["patch_embed.proj.weight"].shape[0]
    if "head.weight" in renamed and renamed["head.weight"].shape[-1] != width:  # DINOv2 classifies two tokens together
        left_out += [names[key] for key in ("classifier.weight", "classifier.bias") if key in names]
        renamed = {key: tensor for key, tensor in renamed.items() if not key.startswith("head.")}
    order = {key: place for place, key in enumerate(state)}
    return Converted(f"Hugging Face {kind}", renamed, sorted(left_out, key=lambda key: order[key]))


def _kind(state: Mapping[str, Tensor], base: str) -> str:
    if any("lambda_1" in key for key in state):
        return "BEiT"
    if "embeddings.register_tokens" in state and "embeddings.position_embeddings" not in state:
        return "DINOv3"
    if any("lambda1" in key for key in state):
        return "DINOv2"
    if "embeddings.class_embedding" in state:
        return "CLIP vision tower"
    if any(key.startswith("embeddings.position_embedding.") for key in state):
        return "SigLIP vision tower"
    return "DeiT" if "embeddings.distillation_token" in state or "deit" in base else "ViT"


def _tokens_shaped(state: State) -> State:
    """Tokens and positions as [1, tokens, channels]; positions of patches only where registers stand between."""
    shaped = dict(state)
    for key in ("cls_token", "pos_embed"):
        if key in shaped:
            shaped[key] = shaped[key].reshape(1, -1, shaped[key].shape[-1])
    if (
        "reg_token" in shaped and "pos_embed" in shaped
    ):  # timm adds positions to patches alone, so the class token takes its own along
        shaped["cls_token"] = shaped["cls_token"] + shaped["pos_embed"][:, :1]
        shaped["pos_embed"] = shaped["pos_embed"][:, 1:]
    return shaped


_DINOV3 = {
    r"(blocks\.\d+)\.ls([12])\.gamma": r"\1.gamma_\2",
    r"(blocks\.\d+\.mlp)\.gate\.(.*)": r"\1.fc1_g.\2",
    r"(blocks\.\d+\.mlp)\.up\.(.*)": r"\1.fc1_x.\2",
    r"(.*)": r"\1",
}


def _as_dinov3(state: State) -> State:
    """The names of timm's models with rotary positions; an MLP without gates is a plain one."""
    gated = any(key.endswith(".mlp.gate.weight") for key in state)
    plain = {r"(blocks\.\d+\.mlp)\.up\.(.*)": r"\1.fc1.\2"}
    return _renamed(state, _DINOV3 if gated else {**_DINOV3, **plain})[0]


def _fused(state: State) -> State:
    """Queries, keys and values in one matrix; gates and values of SwiGLU, too; the attention pool's apart.

    Where keys have no bias, as in BEiT and DINOv3, those of queries and values stand alone.
    """
    fused = {}
    for key, tensor in state.items():
        stem, _, end = key.rpartition(".")
        if stem.endswith(".attn.q"):
            block = stem.removesuffix("q")
            if end == "bias" and f"{block}k.bias" not in state:
                fused[f"{block}q_bias"], fused[f"{block}v_bias"] = tensor, state[f"{block}v.bias"]
            else:
                fused[f"{block}qkv.{end}"] = torch.cat([tensor, state[f"{block}k.{end}"], state[f"{block}v.{end}"]])
        elif stem.endswith((".attn.k", ".attn.v", ".mlp.up")):
            continue
        elif stem.endswith(".mlp.gate"):
            block = stem.removesuffix("gate")
            fused[f"{block}fc1.{end}"] = torch.cat([tensor, state[f"{block}up.{end}"]])
        elif stem == "attn_pool.in_proj":
            width = tensor.shape[0] // 3
            fused[f"attn_pool.q.{end}"], fused[f"attn_pool.kv.{end}"] = tensor[:width], tensor[width:]
        else:
            fused[key] = tensor
    return fused


# -- JAX ---------------------------------------------------------------------------------------------------------------

_JAX_BLOCK = r"Transformer/encoderblock_(\d+)/"
_JAX_ATTENTION = _JAX_BLOCK + r"MultiHeadDotProductAttention_\d/"
_JAX: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    r"cls": ("cls_token", lambda t: t),
    r"embedding/kernel": ("patch_embed.proj.weight", lambda t: t.permute(3, 2, 0, 1)),
    r"embedding/bias": ("patch_embed.proj.bias", lambda t: t),
    r"(?:Transformer/posembed_input/)?pos_embedding": ("pos_embed", lambda t: t),
    r"Transformer/encoder_norm/scale": ("norm.weight", lambda t: t),
    r"Transformer/encoder_norm/bias": ("norm.bias", lambda t: t),
    r"head/kernel": ("head.weight", lambda t: t.T),
    r"head/bias": ("head.bias", lambda t: t),
    _JAX_BLOCK + r"LayerNorm_0/scale": (r"blocks.\1.norm1.weight", lambda t: t),
    _JAX_BLOCK + r"LayerNorm_0/bias": (r"blocks.\1.norm1.bias", lambda t: t),
    _JAX_BLOCK + r"LayerNorm_[12]/scale": (r"blocks.\1.norm2.weight", lambda t: t),
    _JAX_BLOCK + r"LayerNorm_[12]/bias": (r"blocks.\1.norm2.bias", lambda t: t),
    # [width, heads, head width] and, of the output, [heads, head width, width].
    _JAX_ATTENTION + r"(q|k|v)(?:uery|ey|alue)/kernel": (r"blocks.\1.attn.\2.weight", lambda t: t.flatten(1).T),
    _JAX_ATTENTION + r"(q|k|v)(?:uery|ey|alue)/bias": (r"blocks.\1.attn.\2.bias", lambda t: t.flatten()),
    _JAX_ATTENTION + r"out/kernel": (r"blocks.\1.attn.proj.weight", lambda t: t.flatten(0, 1).T),
    _JAX_ATTENTION + r"out/bias": (r"blocks.\1.attn.proj.bias", lambda t: t),
    _JAX_BLOCK + r"MlpBlock_\d/Dense_0/kernel": (r"blocks.\1.mlp.fc1.weight", lambda t: t.T),
    _JAX_BLOCK + r"MlpBlock_\d/Dense_1/kernel": (r"blocks.\1.mlp.fc2.weight", lambda t: t.T),
    _JAX_BLOCK + r"MlpBlock_\d/Dense_0/bias": (r"blocks.\1.mlp.fc1.bias", lambda t: t),
    _JAX_BLOCK + r"MlpBlock_\d/Dense_1/bias": (r"blocks.\1.mlp.fc2.bias", lambda t: t),
}
_JAX_ROOT = re.compile(r"(?:opt/target/|params/|img/)+")


def _jax(state: Mapping[str, Tensor]) -> Converted | None:
    own = {_JAX_ROOT.sub("", key, count=1): tensor for key, tensor in state.items()}
    if "embedding/kernel" not in own or not any(key.startswith("Transformer/encoderblock") for key in own):
        return None
    if "conv_root/kernel" in own:
        raise WeightsMismatchError(
            "These are the weights of a hybrid of ResNet and ViT in JAX (conv_root/kernel), whose ResNet is not read. "
            "timm has them converted, for example as vit_base_r50_s16_384."
        )
    if any(
        key.startswith("pre_logits/") for key in own
    ):  # the classifier reads a layer that timm's model does not have
        own = {key: tensor for key, tensor in own.items() if not key.startswith("head/")}
    names = {_JAX_ROOT.sub("", key, count=1): key for key in state}
    shapes = {pattern: name for pattern, (name, _) in _JAX.items()}
    converted, left_out, heads = {}, [key for key in names if key not in own], None
    for key, tensor in own.items():
        renamed, unknown = _renamed({key: tensor}, shapes)
        left_out += unknown
        for name in renamed:
            pattern = next(item for item in _JAX if re.fullmatch(item, key))
            converted[name] = _JAX[pattern][1](tensor)
        if key.endswith("query/kernel") and "encoderblock" in key:
            heads = int(tensor.shape[1])
    arguments = {} if heads is None else {"num_heads": heads}
    return Converted("JAX ViT", _fused(converted), [names[key] for key in left_out], arguments)
