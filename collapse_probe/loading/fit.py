"""Put a state dict into a model, strictly: every key and every shape, or an error that lists what differs.

The head is sized from the file, and where keys differ timm's own converter for the architecture is tried first
(`checkpoint_filter_fn` beside the model's class; original DINOv2, CLIP and Swin weights need it). timm's converters
also resize position embeddings silently; here that happens only where another image size was asked for.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from collapse_probe.errors import WeightsMismatchError
from collapse_probe.loading.signatures import SIZED
from collapse_probe.words import neutral

_PATCH = "patch_embed.proj.weight"
# What any release calls its tables of positions.
_OF_POSITIONS = re.compile(r"pos|bias_table|attention_biases")
_MAX_PREFIX = 5  # a class token and four registers
_LONGEST_KEY = 200


def fit_weights(
    model: nn.Module, state: Mapping[str, Tensor], what: str, *, keep_head: bool = False, resample: bool = False
) -> tuple[list[str], list[str]]:
    """Load ``state`` into ``model`` strictly, in the model's own dtype.

    Args:
        model: a timm model; its classifier is replaced where the file's has another number of classes.
        state: tensors by key.
        what: how messages name the two, for example ``"weights.pt (vit_small_patch16_224)"``.
        keep_head: the number of classes was asked for: do not change it.
        resample: another image size was asked for: let timm resize position embeddings.

    Returns:
        Keys whose tensors timm's converter made or changed (empty for a direct match); and those of a classifier of
        another make than the architecture's, such as an MLP, which is left out.

    Raises:
        WeightsMismatchError: keys or shapes differ.
    """
    if not keep_head:
        _size_head(model, state, drop_missing=False)
    if not resample:
        _check_positions(model, state, what)
    own = model.state_dict()
    fitted, left_out = dict(state), list[str]()
    if fitted.keys() != own.keys() or (resample and _shapes(fitted) != _shapes(own)):
        fitted = _converted(model, fitted)
        if not resample:
            _check_resized(state, fitted, own, what)
        if not keep_head:
            _size_head(model, fitted, drop_missing=True)
            own = model.state_dict()
            left_out = _foreign_classifier(model, fitted, own)
            fitted = {key: tensor for key, tensor in fitted.items() if key not in left_out}
    if _shapes(fitted) != _shapes(own):
        raise WeightsMismatchError(_difference(_shapes(fitted), _shapes(own), what))
    whole = [key for key, tensor in fitted.items() if own[key].is_floating_point() and not tensor.is_floating_point()]
    if whole:
        raise WeightsMismatchError(
            f"{what}: {len(whole)} weights are whole numbers, {whole[0]} ({fitted[whole[0]].dtype}) first. Quantised "
            "weights mean nothing without their scales: export them in floating point."
        )
    try:
        model.load_state_dict(fitted, strict=True)
    except RuntimeError as error:
        raise WeightsMismatchError(f"The weights of {what} cannot be copied: {error}") from None
    adapted = sorted(key for key, tensor in fitted.items() if key not in state or state[key].shape != tensor.shape)
    return adapted, left_out


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _size_head(model: nn.Module, state: Mapping[str, Tensor], drop_missing: bool) -> None:
    """Give the model as many classes as the file's classifier has; none where it has no classifier at all."""
    name = _classifier(model)
    classes = getattr(model, "num_classes", None)
    weight = state.get(f"{name}.weight")
    if weight is None and not drop_missing:
        return
    wanted = 0 if weight is None or not weight.ndim else int(weight.shape[0])
    if classes is not None and wanted != classes and hasattr(model, "reset_classifier"):
        cast(Any, model).reset_classifier(wanted)


def _classifier(model: nn.Module) -> str:
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return name if isinstance(name, str) else str(name[0])


def _foreign_classifier(model: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Keys under the classifier's name that are not the architecture's, where its own are not in the file."""
    name = _classifier(model)
    if f"{name}.weight" in state:
        return []
    return [key for key in state if key.startswith(name.partition(".")[0] + ".") and key not in own]


def _converted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict as timm's converter for the architecture rewrites it; unchanged where it has none or fails."""
    patch, own = state.get(_PATCH), model.state_dict().get(_PATCH)
    if patch is not None and own is not None and patch.ndim == 4 and patch.shape[2:] != own.shape[2:]:
        return state  # another patch size is another architecture; the converter would resize it without a word
    convert: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        converted = convert(dict(state), model)
    except Exception:  # it was handed another architecture's keys: the comparison that follows says so better
        return state
    return dict(converted) if all(isinstance(tensor, Tensor) for tensor in converted.values()) else state


def _check_positions(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Refuse position embeddings of another image size, and say which size they are for."""
    theirs, ours = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor) or theirs.ndim != 3 or ours.ndim != 3:
        return
    patch, own = state.get(_PATCH), model.state_dict().get(_PATCH)
    if theirs.shape[2] != ours.shape[2] or (patch is not None and own is not None and patch.shape != own.shape):
        return  # another architecture, not only another image size: the comparison of all shapes says so
    prefix = int(getattr(model, "num_prefix_tokens", 1))
    # Converters move prefix tokens into or out of the position embedding; a larger difference is another grid.
    if abs(theirs.shape[1] - ours.shape[1]) <= prefix:
        return
    raise WeightsMismatchError(
        f"{what}: the file has {theirs.shape[1]} position embeddings, the model {ours.shape[1]}: the weights are for "
        f"another image size. {_size_advice(model, theirs.shape[1], ours.shape[1])}"
    )


def _check_resized(
    state: Mapping[str, Tensor], fitted: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str
) -> None:
    """Refuse tables of positions that a converter resized without a word: of a size that the file does not hold."""
    sizes = {tensor.numel() for key, tensor in state.items() if _OF_POSITIONS.search(key)}
    for key, tensor in fitted.items():
        if not SIZED.search(key) or not tensor.ndim or key not in own or tensor.shape != own[key].shape:
            continue  # what still does not fit is listed by the comparison that follows
        # A converter may cut prefix tokens off the positions, or put them there.
        near = {tensor.numel() + tokens * tensor.shape[-1] for tokens in range(-_MAX_PREFIX, _MAX_PREFIX + 1)}
        if not near & sizes:
            raise WeightsMismatchError(
                f"{what}: {key} would have to be resized to {list(tensor.shape)}: the weights are for another image "
                "size. Give the size that they were trained at with --img-size."
            )


def _size_advice(model: nn.Module, theirs: int, ours: int) -> str:
    embed = getattr(model, "patch_embed", None)
    patches, patch = getattr(embed, "num_patches", None), getattr(embed, "patch_size", None)
    if isinstance(patches, int) and isinstance(patch, tuple) and theirs > ours - patches:
        side = math.isqrt(theirs - (ours - patches))
        if side * side == theirs - (ours - patches) and patch[0] == patch[1]:
            return f"Use --img-size {side * patch[0]} (img_size={side * patch[0]})."
    return "Give the image size it was trained at with --img-size."


def _difference(theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]], what: str) -> str:
    """One paragraph: the first few keys on each side, with shapes."""
    missing = [f"{key} {list(shape)}" for key, shape in ours.items() if key not in theirs]
    unexpected = [f"{key} {list(shape)}" for key, shape in theirs.items() if key not in ours]
    shaped = [
        f"{key} is {list(theirs[key])} in the file and {list(shape)} in the model"
        for key, shape in ours.items()
        if key in theirs and theirs[key] != shape
    ]
    parts = [
        f"{len(keys)} {title}: {', '.join(_short(key) for key in keys[:4])}{', …' if len(keys) > 4 else ''}"
        for title, keys in (
            ("missing in the file", missing),
            ("unknown to the model", unexpected),
            ("of another shape", shaped),
        )
        if keys
    ]
    return (
        f"The weights do not fit: {what}. Keys {neutral('; '.join(parts))}. Check the architecture (--model, arch=) "
        "and its arguments (--model-kwargs, model_kwargs=)."
    )


def _short(words: str) -> str:
    return words if len(words) <= _LONGEST_KEY else f"{words[:_LONGEST_KEY]}…"
