"""From a weights file to a model: choose the architecture, check the weights, load them strictly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg
from torch import nn

from collapse_probe.errors import DamagedFileError, UnknownModelError, UsageError, WeightsMismatchError
from collapse_probe.loading.anatomy import heads_of, heads_shown
from collapse_probe.loading.build import build
from collapse_probe.loading.checkpoint import check_model_kwargs
from collapse_probe.loading.examine import GIVEN, Examined, better_fit, examine, preprocessing_of
from collapse_probe.loading.fit import fit_weights
from collapse_probe.loading.folders import Configuration
from collapse_probe.loading.names import HUB, LOCAL, is_name, nearest
from collapse_probe.loading.recognition import completed
from collapse_probe.loading.signatures import on_meta, shapes_of, signature
from collapse_probe.loading.soundness import check_sound, non_finite

NAME, STORED, RECOGNISED = "name", "stored in the file", "recognised by keys and shapes"

# What stored arguments may ask for: blocks, any other number, and numbers in all for each one that the file holds.
_DEEPEST, _LARGEST, _MOST = 1000, 1e6, 10


@dataclass(frozen=True)
class Wanted:
    """What the caller says of a weights file.

    Attributes:
        arch: the architecture, or None where it is to be found out; ``arch_from``: who named it.
        model_kwargs: arguments for it; they override what the file stores.
        config: what a configuration beside the file says.
        use_ema, key: which weights of the file.
        num_heads: the number of heads.
        resample: another image size was asked for, so positions may be resized.
        allow_bad: take weights that no working model has.
    """

    arch: str | None = None
    arch_from: str = GIVEN
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    config: Configuration = field(default_factory=Configuration)
    use_ema: bool = False
    key: str | None = None
    num_heads: int | None = None
    resample: bool = False
    allow_bad: bool = False


@dataclass(frozen=True)
class Architecture:
    """The one that was chosen: its name, who named it, its arguments, and other names of the same network."""

    name: str
    origin: str
    arguments: dict[str, Any]
    same: list[str] = field(default_factory=list)


def model_from_file(file: Path, wanted: Wanted) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its provenance: architecture, architecture_from, same_network, model_kwargs, heads, weights.

    Raises:
        ModelError, UsageError: see :func:`collapse_probe.loading.load_model`.
    """
    # Where positions may be resized the size that was asked for says nothing of the weights.
    asked = {name: value for name, value in wanted.model_kwargs.items() if name != "img_size" or not wanted.resample}
    examined = examine(file, wanted.use_ema, wanted.key, wanted.num_heads, asked, wanted.config)
    if not wanted.allow_bad:
        check_sound(file, examined.state)
    stored = {**wanted.config.model_kwargs, **examined.checkpoint.model_kwargs}
    _check_stored(file, stored)
    chosen = _choose(file, examined, wanted)
    if stored:
        _check_size(file, chosen, examined)
    model = build(chosen.name, False, chosen.arguments)
    what = f"{file} ({chosen.name})"
    keep_head = "num_classes" in {**wanted.model_kwargs}
    try:
        adapted, head = fit_weights(model, examined.state, what, keep_head=keep_head, resample=wanted.resample)
    except WeightsMismatchError as error:
        raise better_fit(error, examined) from None
    facts = {
        **examined.checkpoint.facts,
        "scheme": examined.scheme,
        "left_out": [*examined.checkpoint.facts["left_out"], *examined.left_out, *head],
        "adapted_by_timm": adapted,
        "non_finite": non_finite(model.state_dict()),
    }
    facts |= _configured(model, examined, wanted.config)
    heads = _heads(model, examined, chosen)
    _warn(file, facts, chosen, heads, examined)
    return model, {
        "architecture": chosen.name,
        "architecture_from": chosen.origin,
        "same_network": chosen.same,
        "model_kwargs": chosen.arguments,
        "heads": heads,
        "weights": facts,
    }


def _choose(file: Path, examined: Examined, wanted: Wanted) -> Architecture:
    """The architecture by what the caller says, what the file says, or what the weights show, in this order."""
    heads = {} if wanted.num_heads is None else {"num_heads": wanted.num_heads}
    own = {**wanted.model_kwargs, **heads}
    name = wanted.arch or examined.stored
    if name is None:
        candidate = examined.only_candidate()
        if examined.checkpoint.architecture is not None:
            warnings.warn(
                f"{file} names the architecture {examined.checkpoint.architecture!r}, which timm does not know; its "
                f"weights are those of {candidate.name}.",
                stacklevel=2,
            )
        return Architecture(candidate.name, RECOGNISED, {**candidate.arguments, **own}, candidate.same)
    if not name.startswith((*HUB, LOCAL)) and not is_name(name):
        raise UnknownModelError(f"timm knows no architecture {name!r}. {nearest(name)}")
    stored = check_model_kwargs({**wanted.config.model_kwargs, **examined.checkpoint.model_kwargs}, str(file))
    if not _has_fixed_size(name):
        stored.pop("img_size", None)
    arguments = {**stored, **examined.known.arguments, **own}
    with suppress(Exception):  # what cannot be built is said when it is built
        arguments, _ = completed(name, arguments, examined.known)
    return Architecture(name, wanted.arch_from if wanted.arch else STORED, arguments)


def _check_stored(file: Path, stored: Mapping[str, Any]) -> None:
    """Raises DamagedFileError where an argument that a file stores would take hours or any memory to build."""
    for name, value in stored.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        largest = max((item for item in numbers if isinstance(item, (int, float))), default=0)
        if largest > (_DEEPEST if "depth" in name else _LARGEST):
            raise DamagedFileError(f"{file} stores {name}={value}, which no model has.")


def _check_size(file: Path, chosen: Architecture, examined: Examined) -> None:
    """Raises DamagedFileError where arguments that a file stores ask for far more numbers than it holds."""
    with suppress(RuntimeError, TypeError, ValueError, AssertionError):  # what cannot be built is said when it is built
        own = signature(shapes_of(on_meta(chosen.name, **chosen.arguments).state_dict())).numbers
        held = sum(tensor.numel() for tensor in examined.state.values())
        if own > _MOST * held:
            raise DamagedFileError(
                f"{file} holds {held} numbers, and the architecture that it stores, {chosen.name} with "
                f"{chosen.arguments}, has {own}."
            )


def _configured(model: nn.Module, examined: Examined, config: Configuration) -> dict[str, Any]:
    """Give the model the epsilon of its norms and the preprocessing that a configuration beside the file states."""
    if config.preprocessing:
        own = getattr(model, "pretrained_cfg", None) or {}
        model.pretrained_cfg = {**own, **config.preprocessing}  # type: ignore[assignment]
    norms = [item for item in model.modules() if isinstance(item, nn.LayerNorm)]
    if config.norm_eps is None or not norms or not (examined.scheme or "").startswith("Hugging Face"):
        return {"norm_eps": None}
    for item in norms:
        item.eps = config.norm_eps
    return {"norm_eps": config.norm_eps}


def _has_fixed_size(arch: str) -> bool:
    """Whether the architecture is built for one image size (others do not take `img_size`)."""
    cfg = get_pretrained_cfg(arch) if is_name(arch) else None
    return cfg is None or cfg.fixed_input_size


def _heads(model: nn.Module, examined: Examined, chosen: Architecture) -> dict[str, Any]:
    """How many heads the model has, and how that is known; None where layers differ or do not say."""
    counts = heads_of(model)
    count = next(iter(counts)) if len(counts) == 1 else None
    known = examined.known
    shown, sign = heads_shown(shapes_of(examined.state))
    if known.heads is not None and counts and counts != {known.heads} and shown is None:
        raise UsageError(
            f"{examined.checkpoint.facts['path']} has {known.heads} heads ({known.heads_from}), and {chosen.name} is "
            f"built with {', '.join(map(str, sorted(counts)))}."
        )
    if shown is not None and counts and shown not in counts:
        raise UsageError(
            f"{examined.checkpoint.facts['path']} holds weights of {shown} heads, as {sign} shows, and {chosen.name} "
            f"is built with {', '.join(map(str, sorted(counts)))}. Leave --num-heads out, or set it to {shown}."
        )
    if shown is not None:
        words = f"shown by {sign}"
    elif known.heads is not None:
        words = known.heads_from
    elif chosen.origin == STORED and "num_heads" in chosen.arguments:
        words = STORED
    elif chosen.origin == RECOGNISED and "num_heads" in chosen.arguments:
        words = "assumed: the weights do not show it"
    else:
        words = f"those of {chosen.name}: the weights do not show them"
    return {"count": count, "known": words}


def _warn(
    file: Path, facts: Mapping[str, Any], chosen: Architecture, heads: Mapping[str, Any], examined: Examined
) -> None:
    """Say what a reader of the result should know of how it came about."""
    if facts["note"]:
        warnings.warn(f"{file} is {facts['note']}.", stacklevel=3)
    if chosen.origin != RECOGNISED:
        return
    if heads["known"].startswith("assumed"):
        warnings.warn(
            f"{file} holds a model that is not registered; its number of heads does not show in its weights and was "
            f"taken to be {heads['count']}. Readings are wrong if that is wrong: --num-heads sets it. Nor do the "
            f"activation, the epsilon of norms and rotary positions show; they are those of {chosen.name}.",
            stacklevel=3,
        )
    if chosen.arguments.get("no_embed_class") and chosen.arguments.get("class_token", True):
        warnings.warn(
            f"{file} has as many positions as an image of {chosen.arguments['img_size']} pixels squared has patches, "
            "and a class token, which was taken to have no position. For images that are not square give "
            "--model-kwargs img_size=[HEIGHT,WIDTH].",
            stacklevel=3,
        )
    if also := examined.recognition.also:
        warnings.warn(
            f"{file} fits {chosen.name}, and at this image size also {' or '.join(item.name for item in also[:3])}, "
            "which computes something else (its activation or its heads). "
            f"For that one: --model {also[0]}",
            stacklevel=3,
        )
    means = preprocessing_of([chosen.name, *chosen.same])
    if len(means) > 1:
        others = "; ".join(f"{names[0]} subtracts {mean}" for mean, names in means.items())
        warnings.warn(
            f"{file} fits {chosen.name} and {', '.join(chosen.same)}: the same network with different preprocessing "
            f"({others}). That of {chosen.name} is used; --model names another.",
            stacklevel=3,
        )
