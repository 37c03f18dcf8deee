"""Long sweeps: whole families of models, freshly initialised at their real sizes."""

from __future__ import annotations

import pytest
import timm
import torch

import collapse_probe as cp

RANDOM = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_224": {},
    "vit_base_patch16_224": {},
    "vit_base_patch32_224": {},
    "vit_large_patch16_224": {"depth": 6},
    "vit_giant_patch14_224": {"depth": 3},
    "deit_small_distilled_patch16_224": {},
    "deit3_base_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 224},
    "vit_base_patch16_clip_224": {},
    "beit_base_patch16_224": {},
    "eva02_tiny_patch14_224": {},
    "deepvit_16b": {},
    "deepvit_s": {},
    "deepvit_vit_32b": {},
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_freshly_initialised_network_is_called_untrained_and_nothing_else(name, seed):
    torch.manual_seed(seed)
    model = timm.create_model(name, **RANDOM[name])
    generator = torch.Generator().manual_seed(seed)
    size = model.patch_embed.img_size
    smooth = torch.nn.functional.interpolate(torch.randn(8, 3, 28, 28, generator=generator), size, mode="bicubic")
    result = cp.analyze(model, smooth, batch_size=4)
    assert [finding.code for finding in result.findings] == ["uniform-attention"], result
    assert not result.not_captured
    assert len(result.layers) == len(model.blocks)
