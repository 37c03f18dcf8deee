"""Names that timm knows: architectures, pretrained tags, and the nearest ones to a typo."""

from __future__ import annotations

import difflib

import timm
from timm.models import get_pretrained_cfg

#: Prefixes of sources that timm resolves itself.
HUB = ("hf-hub:", "hf_hub:")
LOCAL = "local-dir:"


def is_name(text: str) -> bool:
    """A registered architecture, alone or with one of its tags; `vit_small_patch16_224.pth` is not one."""
    if not timm.is_model(text):
        return False
    try:
        return get_pretrained_cfg(text) is not None or "." not in text
    except RuntimeError:  # the tag is not one of the architecture's
        return False


def nearest(name: str) -> str:
    """A sentence with what may have been meant."""
    arch = name.partition(".")[0]
    if timm.is_model(arch):
        tags = timm.list_models(f"{arch}.*", pretrained=True)
        return f"Its pretrained tags: {', '.join(tags) or 'none'}."
    near = difflib.get_close_matches(arch.lower(), timm.list_models(), n=4)
    return f"Nearest: {', '.join(near)}." if near else "List the names with timm.list_models()."
