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
    "swin_tiny_patch4_window7_224": {},
    "test_maxvit": {},
    "twins_svt_small": {},
    "hiera_tiny_224": {},
    "pvt_v2_b0": {},
    "pit_ti_224": {},
    "cait_xxs24_224": {},
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_freshly_initialised_network_is_called_untrained_and_nothing_else(name, seed):
    torch.manual_seed(seed)
    kwargs = RANDOM[name]
    model = timm.create_model(name, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    size = kwargs.get("img_size") or model.pretrained_cfg["input_size"][-1]
    smooth = torch.nn.functional.interpolate(torch.randn(8, 3, 28, 28, generator=generator), size, mode="bicubic")
    result = cp.analyze(model, smooth, batch_size=4)
    assert [finding.code for finding in result.findings] == ["uniform-attention"], result
    assert not result.not_captured
    if type(model).__name__ in ("VisionTransformer", "DeepVisionTransformer", "Beit", "Eva"):
        assert len(result.layers) == len(model.blocks)
