"""From a weights file to a model: choose the architecture, check the weights, load them strictly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg
from torch import nn

from collapse_probe.errors import UnknownModelError, UsageError, WeightsMismatchError
from collapse_probe.loading.anatomy import heads_of, heads_shown
from collapse_probe.loading.build import build
from collapse_probe.loading.checkpoint import check_model_kwargs
from collapse_probe.loading.examine import Examined, better_fit, examine, preprocessing_of
from collapse_probe.loading.fit import fit_weights
from collapse_probe.loading.names import HUB, LOCAL, is_name, nearest
from collapse_probe.loading.signatures import shapes_of
from collapse_probe.loading.soundness import check_sound, non_finite

GIVEN, NAME, STORED, RECOGNISED = "given", "name", "stored in the file", "recognised by keys and shapes"


@dataclass(frozen=True)
class Wanted:
    """What the caller says of a weights file.

    Attributes:
        arch: the architecture, or None where it is to be found out; ``arch_from``: who named it.
        model_kwargs: arguments for it; they override what the file stores.
        stored_kwargs: arguments that a configuration beside the file stores.
        use_ema, key: which weights of the file.
        num_heads: the number of heads; ``config_heads``: the same from a configuration beside the file.
        resample: another image size was asked for, so positions may be resized.
        allow_bad: take weights that no working model has.
    """

    arch: str | None = None
    arch_from: str = GIVEN
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    stored_kwargs: Mapping[str, Any] = field(default_factory=dict)
    use_ema: bool = False
    key: str | None = None
    num_heads: int | None = None
    config_heads: int | None = None
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
    examined = examine(file, wanted.use_ema, wanted.key, wanted.num_heads or wanted.config_heads)
    if not wanted.allow_bad:
        check_sound(file, examined.state)
    chosen = _choose(file, examined, wanted)
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
    heads = _heads(model, examined, wanted, chosen)
    _warn(file, facts, chosen, heads)
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
    stored = check_model_kwargs({**wanted.stored_kwargs, **examined.checkpoint.model_kwargs}, str(file))
    if not _has_fixed_size(name):
        stored.pop("img_size", None)
    return Architecture(name, wanted.arch_from if wanted.arch else STORED, {**stored, **examined.implied, **own})


def _has_fixed_size(arch: str) -> bool:
    """Whether the architecture is built for one image size (others do not take `img_size`)."""
    cfg = get_pretrained_cfg(arch) if is_name(arch) else None
    return cfg is None or cfg.fixed_input_size


def _heads(model: nn.Module, examined: Examined, wanted: Wanted, chosen: Architecture) -> dict[str, Any]:
    """How many heads the model has, and how that is known; None where layers differ or do not say."""
    counts = heads_of(model)
    count = next(iter(counts)) if len(counts) == 1 else None
    shown, sign = heads_shown(shapes_of(examined.state))
    if shown is not None and counts and shown not in counts:
        raise UsageError(
            f"{examined.checkpoint.facts['path']} holds weights of {shown} heads, as {sign} shows, and {chosen.name} "
            f"is built with {', '.join(map(str, sorted(counts)))}. Leave --num-heads out, or set it to {shown}."
        )
    if shown is not None:
        known = f"shown by {sign}"
    elif wanted.num_heads is not None:
        known = GIVEN
    elif wanted.config_heads is not None and count == wanted.config_heads:
        known = "stored in config.json"
    elif examined.num_heads is not None and count == examined.num_heads:
        known = f"shown by the shapes of {examined.scheme}"
    elif "num_heads" in {**examined.checkpoint.model_kwargs, **wanted.stored_kwargs}:
        known = STORED
    elif chosen.origin == RECOGNISED and "num_heads" in chosen.arguments:
        known = "assumed: the weights do not show it"
    else:
        known = f"those of {chosen.name}: the weights do not show them"
    return {"count": count, "known": known}


def _warn(file: Path, facts: Mapping[str, Any], chosen: Architecture, heads: Mapping[str, Any]) -> None:
    """Say what a reader of the result should know of how it came about."""
    if facts["note"]:
        warnings.warn(f"{file} is {facts['note']}.", stacklevel=3)
    if chosen.origin != RECOGNISED:
        return
    if heads["known"].startswith("assumed"):
        warnings.warn(
            f"{file} holds a model that is not registered; its number of heads does not show in its weights and was "
            f"taken to be {heads['count']}. Readings are wrong if that is wrong: --num-heads sets it.",
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
