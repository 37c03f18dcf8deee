"""Small models with trained-like weights: freshly initialised maps are nearly uniform and agree with anything."""

from __future__ import annotations

import timm
import torch
from timm.layers import set_fused_attn


def perturbed(model, scale=0.15, seed=0):
    """Weights moved far enough that attention is peaked."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator).mul_(0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def build(name, fused=True, **kwargs):
    """A small timm model, built with fused attention on or off."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    if not fused:
        set_fused_attn(False)
    torch.manual_seed(0)
    try:
        return perturbed(timm.create_model(name, **(small | kwargs)))
    finally:
        set_fused_attn(True)


def unfused_twin(name, model, **kwargs):
    """The same weights in a model that materialises its maps."""
    twin = build(name, fused=False, **kwargs)
    twin.load_state_dict(model.state_dict())
    return twin.to(next(model.parameters()).dtype)


def _reference_dropped_maps(model, images):
    """Maps of an unfused timm model, read where its dropout would act, in execution order."""
    seen = []
    handles = [
        module.attn_drop.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach().clone()))
        for module in model.modules()
        if hasattr(module, "attn_drop") and isinstance(module.attn_drop, torch.nn.Module)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen
