"""Prefixes that training code puts before every key: what wraps a model leaves its name in its state dict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

#: DistributedDataParallel, torch.compile, Lightning modules, self-supervised pairs and their backbones.
PREFIXES = (
    "module.", "_orig_mod.", "model.", "net.", "teacher.", "ema_model.", "ema.", "backbone.", "encoder.", "student.",
    "base_encoder.", "momentum_encoder.", "target_encoder.", "network.",
)  # fmt: skip

# What only the part of a model that sees the image has in its keys.
_TIMM_STEM = "patch_embed.proj.weight"
# Tokens and positions of a model, which lie at the top of its keys.
_TOKENS = {"cls_token", "pos_embed", "reg_token"}
_MOST_PREFIXES = 20
_STEM = ("patch_embed", "patch_embedding", "conv_proj", "conv1.", "stem.", "class_embedding", "embedding.")


def cut_prefixes(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]]:
    """Remove known prefixes, one after the other.

    A prefix is cut where all keys have it, or where the keys that have it hold a vision model, patch embedding and
    attention, and the others (projection heads, a student beside a teacher) do not hold the attention of the same. Any
    other prefix is cut where it leads to the only patch embedding of timm's name.

    Returns:
        what was cut, the state dict without it, and the keys that were left out.
    """
    current, cut, left_out = dict(state), "", list[str]()
    for _ in range(_MOST_PREFIXES):
        prefix = next((item for item in PREFIXES if _leads(item, current)), "") or _unknown(current)
        if not prefix:
            break
        left_out += [cut + key for key in current if not key.startswith(prefix)]
        current = {key.removeprefix(prefix): value for key, value in current.items() if key.startswith(prefix)}
        cut += prefix
    return cut, current, left_out


def _leads(prefix: str, state: Mapping[str, Tensor]) -> bool:
    inside = [key for key in state if key.startswith(prefix)]
    if not inside or len(inside) == len(state):
        return bool(inside)
    outside = [key for key in state if not key.startswith(prefix)]
    others = {key.partition(".")[0] + "." for key in outside if _attends(key)}
    return (
        any(word in key for key in inside for word in _STEM)
        and any(_attends(key) for key in inside)
        and not _TOKENS.intersection(outside)
        # A second model of the same kind may lie beside it, under a prefix that comes later in the list.
        and others <= set(PREFIXES[PREFIXES.index(prefix) + 1 :])
    )


def _unknown(state: Mapping[str, Tensor]) -> str:
    found = [key.removesuffix(_TIMM_STEM) for key in state if key.endswith(_TIMM_STEM)]
    return found[0] if len(found) == 1 else ""


def rivals(state: Mapping[str, Tensor]) -> list[str]:
    """What stands before each patch embedding of timm's name, without the last dot, where there are several."""
    found = [key.removesuffix(_TIMM_STEM).rstrip(".") for key in state if key.endswith(_TIMM_STEM)]
    return found if len(found) > 1 else []


def _attends(key: str) -> bool:
    return "attn" in key or "attention" in key
