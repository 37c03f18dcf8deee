"""A ViT of two blocks, small enough to be built in every test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

TINY = {"depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3}
ARCH = "vit_tiny_patch16_224"


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """A builder: `tiny(num_classes=7)` gives the same random weights each time."""

    def build(**kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(ARCH, **{**TINY, "num_classes": 7, **kwargs}).eval()

    return build


@pytest.fixture
def same() -> Callable[[nn.Module, nn.Module], bool]:
    """Whether two models have the same state, key by key and bit by bit."""

    def compare(first: nn.Module, second: nn.Module) -> bool:
        a, b = first.state_dict(), second.state_dict()
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return compare
