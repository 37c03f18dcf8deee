"""Which architecture a state dict belongs to: proposed by its names and shapes, proven by a strict fit.

Proposals come from the index of registered architectures (the same weights but for the classifier; then the same but
for image size, window or channels), from the anatomy of a ViT or DeepViT that nobody registered, and, for the key names
of original releases, from trying timm's converters of architectures of that size. Each is built without memory and
must take every tensor.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.layers import get_act_layer
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from collapse_probe.errors import WeightsMismatchError
from collapse_probe.loading.anatomy import Anatomy, describe, heads_of, heads_shown
from collapse_probe.loading.fit import fit_weights
from collapse_probe.loading.signatures import on_meta, registered, shapes_of, signature

#: Without a trace of it in the weights, heads are taken to be as wide as in almost all published ViTs.
_HEAD_WIDTHS = (64, 32, 16)
# Original releases differ from timm's models of the same size by classifiers, mask tokens and position tables.
_NEAR = 0.06
_MOST_TRIALS = 60
# Attributes of modules that matter in training, or before it.
_NOT_COMPUTED = {"training", "init_values", "drop_prob", "p", "drop", "inplace", "grad_checkpointing", "drop_rate"}


@dataclass(frozen=True)
class Known:
    """What is known of a model beside the keys and shapes of its weights.

    Attributes:
        heads: their number in each block; ``heads_from``: who says so.
        activation: of the MLPs, by timm's name.
        arguments: for the constructor.
    """

    heads: int | None = None
    heads_from: str = ""
    activation: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """An architecture that takes the weights.

    Attributes:
        name: timm's; ``arguments`` for its constructor where its defaults do not fit.
        same: other names of the same network (they may differ in preprocessing).
        heads: per block, of all attention layers if they agree; ``heads_from``: what shows them, or that they are
            assumed.
    """

    name: str
    arguments: dict[str, Any]
    digest: str
    heads: int | None
    heads_from: str
    same: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        arguments = " ".join(f"--model-kwargs {key}={value}" for key, value in self.arguments.items())
        return f"{self.name} {arguments}".rstrip()


@dataclass(frozen=True)
class Recognition:
    """What a state dict was recognised as.

    Attributes:
        candidates: networks that take the weights and differ in what they compute; exactly one where it is clear.
        also: networks of another image size that take the weights, too, when built for theirs, and compute something
            else than the candidate, which was made for it.
        anatomy: what keys and shapes tell, or None.
        nearest: names of architectures that are like it, where there is no candidate.
        mismatch: what does not fit the likeliest of them.
    """

    candidates: list[Candidate]
    anatomy: Anatomy | None
    nearest: list[str] = field(default_factory=list)
    mismatch: str = ""
    also: list[Candidate] = field(default_factory=list)


def recognise_architecture(state: Mapping[str, Tensor], known: Known | None = None) -> Recognition:
    """Find the architecture of a state dict; values of the tensors are not looked at.

    Args:
        state: tensors by key; names of timm's or of an original release that timm converts.
        known: what the caller, the file or what lies beside it says.
    """
    known = known or Known()
    empty = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in state.items()}
    shapes = shapes_of(empty)
    anatomy = _described(shapes, known.arguments.get("img_size"))
    proposals = _proposals(shapes, anatomy)

    def tried() -> list[Candidate]:
        found = (_tried(name, {**arguments, **known.arguments}, empty, known) for name, arguments in next(proposals))
        return [item for item in found if item is not None]

    exact, loose = tried(), tried()
    if exact:
        digests = {item.digest for item in exact}
        others = _distinct([item for item in loose if item.digest not in digests], anatomy)
        return Recognition(_distinct(exact, anatomy), anatomy, also=others)
    found = loose or tried() or tried()
    if found:
        return Recognition(_distinct(found, anatomy), anatomy)
    nearest = _nearest(shapes)
    likely = [*(_as_vit(shapes, anatomy) if anatomy is not None else ()), *((name, {}) for name in nearest[:1])]
    return Recognition([], anatomy, nearest, _mismatch(likely[0], empty) if likely else "")


def _proposals(
    shapes: Mapping[str, tuple[int, ...]], anatomy: Anatomy | None
) -> Iterator[Iterable[tuple[str, dict[str, Any]]]]:
    """Names and arguments to try, the likelier ones first; later ones only matter where all before them fail."""
    own = signature(shapes)
    entries = list(registered())
    exact = {name for name, entry in entries if entry.exact == own.exact}
    yield [(name, {}) for name in sorted(exact)]
    yield [(name, _sizes(name, anatomy)) for name, entry in entries if entry.loose == own.loose and name not in exact]
    yield _as_vit(shapes, anatomy) if anatomy is not None else []
    numbers = signature(_visual(shapes)).numbers
    near = [(abs(entry.numbers / max(numbers, 1) - 1), name) for name, entry in entries]
    yield [(name, {}) for distance, name in sorted(near)[:_MOST_TRIALS] if distance < _NEAR]


def _described(shapes: Mapping[str, tuple[int, ...]], img_size: Any) -> Anatomy | None:
    """The anatomy, for images of this size where the caller knows it; None where shapes are those of no model."""
    try:
        anatomy = describe(shapes)
    except (IndexError, ZeroDivisionError, ValueError, TypeError):
        return None
    if anatomy is None or anatomy.image is None or img_size is None:
        return anatomy
    return replace(anatomy, image=tuple(img_size) if isinstance(img_size, (list, tuple)) else (img_size, img_size))


def _visual(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
    """Of a model of images and text in CLIP's names, the part that sees the images."""
    return {key: shape for key, shape in shapes.items() if re.match(r"(module\.)?visual\.", key)} or shapes


def _sizes(name: str, anatomy: Anatomy | None) -> dict[str, Any]:
    """Arguments for weights of another image size or number of channels than the architecture's defaults."""
    cfg = get_pretrained_cfg(name)
    if anatomy is None or cfg is None:
        return {}
    arguments: dict[str, Any] = {}
    if anatomy.channels not in (None, cfg.input_size[0]):
        arguments["in_chans"] = anatomy.channels
    if anatomy.image is not None and anatomy.image != tuple(cfg.input_size[1:]):
        arguments["img_size"] = _img_size(anatomy.image)
    return arguments


def _img_size(image: tuple[int, int]) -> int | list[int]:
    return image[0] if image[0] == image[1] else list(image)


def _as_vit(shapes: Mapping[str, tuple[int, ...]], anatomy: Anatomy) -> list[tuple[str, dict[str, Any]]]:
    """A ViT or DeepViT of any size, by what is seen of it.

    Not without positions in the weights: rotary and fixed ones do not show, and are likelier than none.
    """
    if anatomy.stages or anatomy.patch is None or anatomy.mlp_ratio is None or not anatomy.width:
        return []
    if anatomy.positions != "learnt":
        return []
    heads = anatomy.heads or next((anatomy.width // w for w in _HEAD_WIDTHS if not anatomy.width % w), None)
    arguments: dict[str, Any] = {
        "patch_size": anatomy.patch[0], "embed_dim": anatomy.width, "depth": anatomy.depth,
        "num_heads": heads, "mlp_ratio": anatomy.mlp_ratio, "in_chans": anatomy.channels,
    }  # fmt: skip
    if heads is None or anatomy.patch[0] != anatomy.patch[1]:
        return []
    if anatomy.image is not None:
        arguments["img_size"] = _img_size(anatomy.image)
    if anatomy.re_attention or anatomy.conv_stem:
        whole = len(anatomy.re_attention) == anatomy.depth
        mixing = True if whole else anatomy.re_attention or False
        return [("deepvit_16b", {**arguments, "re_attention": mixing, "conv_stem": anatomy.conv_stem})]
    arguments |= {
        "class_token": anatomy.class_token, "reg_tokens": anatomy.registers, "qkv_bias": anatomy.qkv_bias,
        "qk_norm": anatomy.qk_norm, "pre_norm": anatomy.pre_norm,
        "init_values": 1e-5 if anatomy.layer_scale else None,
    }  # fmt: skip
    if anatomy.distillation_token:
        del arguments["class_token"], arguments["reg_tokens"]
        return [("deit_tiny_distilled_patch16_224", arguments)]
    grid = math.prod(anatomy.image) // math.prod(anatomy.patch) if anatomy.image else None
    if grid is not None and shapes["pos_embed"][1] == grid:
        arguments["no_embed_class"] = True
    if "attn_pool.kv.weight" in shapes:
        arguments["global_pool"] = "map"
    elif "fc_norm.weight" in shapes or not anatomy.class_token:
        arguments |= {"global_pool": "avg", "fc_norm": "fc_norm.weight" in shapes}
    return [("vit_base_patch16_224", arguments)]


def completed(name: str, arguments: Mapping[str, Any], known: Known) -> tuple[dict[str, Any], nn.Module]:
    """The arguments, and what an architecture needs beside them to have the heads and activation that are known.

    Returns:
        The arguments, and the model that they give, without memory for its weights.

    Raises:
        Exception: of any kind, where timm cannot build it with these arguments.
    """
    found, before = dict(arguments), dict(arguments)
    try:
        model = on_meta(name, **found)
    except AssertionError:  # its own number of heads may not divide the width
        if known.heads is None:
            raise
        found["num_heads"] = before["num_heads"] = known.heads
        model = on_meta(name, **found)
    if known.heads is not None and heads_of(model) != {known.heads}:
        found["num_heads"] = known.heads
    if known.activation is not None and _activation(model) not in (None, _class_name(known.activation)):
        found["act_layer"] = known.activation
    return found, model if found == before else on_meta(name, **found)


def _activation(model: nn.Module) -> str | None:
    """The class of the activation of the first MLP."""
    return next((type(item).__name__ for path, item in model.named_modules() if path.endswith("mlp.act")), None)


def _class_name(activation: str) -> str:
    return str(getattr(get_act_layer(activation), "__name__", activation))


def _tried(name: str, arguments: dict[str, Any], state: Mapping[str, Tensor], known: Known) -> Candidate | None:
    """The architecture if it takes the weights strictly, else None."""
    try:
        arguments, model = completed(name, arguments, known)
        with torch.device("meta"):  # where converters and new classifiers make their tensors
            fit_weights(model, state, name)
        heads, origin = _heads(model, state, known)
    except Exception:  # weights that do not fit, or arguments that it does not take, of which timm says anything
        return None
    return None if origin == "contradicted" else Candidate(name, arguments, _function(model), heads, origin)


def _mismatch(proposal: tuple[str, dict[str, Any]], state: Mapping[str, Tensor]) -> str:
    """What of the weights does not fit an architecture, in words."""
    name, arguments = proposal
    try:
        with torch.device("meta"):
            fit_weights(on_meta(name, **arguments), state, name)
    except WeightsMismatchError as error:
        return str(error)
    except Exception:  # arguments that it does not take
        return ""
    return ""


def _heads(model: nn.Module, state: Mapping[str, Tensor], known: Known) -> tuple[int | None, str]:
    own = heads_of(model)
    shown, origin = heads_shown(shapes_of(state))
    if shown is not None and own and shown not in own:
        return shown, "contradicted"
    if shown is not None:
        return shown, origin
    heads = next(iter(own)) if len(own) == 1 else None
    if known.heads is not None and heads == known.heads:
        return heads, known.heads_from
    return heads, "assumed: the weights do not show it"


def _function(model: nn.Module) -> str:
    """A digest of everything but weights that decides what a model computes."""
    parts = []
    for path, module in model.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, tuple)) and key not in _NOT_COMPUTED
        }
        parts.append(f"{path} {type(module).__name__} {sorted(plain.items(), key=str)}")
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _distinct(found: list[Candidate], anatomy: Anatomy | None) -> list[Candidate]:
    """One candidate for each network, under its plainest name, the other names beside it."""
    classes = None if anatomy is None else anatomy.classes

    def rank(item: Candidate) -> tuple[bool, bool, int, str]:
        cfg = get_pretrained_cfg(item.name)
        return len(item.arguments) > 0, cfg is None or cfg.num_classes != classes, len(item.name), item.name

    networks: dict[str, list[Candidate]] = {}
    for item in sorted(found, key=rank):
        networks.setdefault(item.digest, []).append(item)
    plainest = min((len(items[0].arguments) for items in networks.values()), default=0)
    return [
        Candidate(
            items[0].name, items[0].arguments, digest, items[0].heads, items[0].heads_from, [i.name for i in items[1:]]
        )
        for digest, items in networks.items()
        if len(items[0].arguments) == plainest
    ]


def _nearest(shapes: Mapping[str, tuple[int, ...]], count: int = 3) -> list[str]:
    """Names of architectures with about as many numbers."""
    own = signature(shapes).numbers
    ranked = sorted(registered(), key=lambda entry: abs(entry[1].numbers - own))
    return [name for name, entry in ranked[:count] if abs(entry.numbers - own) < own // 2]
