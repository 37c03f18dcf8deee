"""A small plain ViT for 8x8 digits, with weights that ship with the package, so that every command runs without a
download: ``timm.create_model("digits_vit_12b", pretrained=True)``.

The architecture is timm's own `VisionTransformer` (Dosovitskiy et al., arXiv 2010.11929) with one token per pixel:
64 patch tokens and a class token, 12 blocks. `examples/train_digits.py` trained it.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from collapse_probe.models.bundled import bundled_weights

#: Mean and standard deviation of the pixels of scikit-learn's digits, scaled to 0..1.
DIGITS_MEAN, DIGITS_STD = (0.305,), (0.376,)

default_cfgs = generate_default_cfgs(
    {
        "digits_vit_12b": {
            "file": str(bundled_weights()),
            "num_classes": 10,
            "input_size": (1, 8, 8),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": DIGITS_MEAN,
            "std": DIGITS_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def digits_vit_12b(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT with 12 blocks, width 96, 6 heads, for ``[B, 1, 8, 8]`` images of hand-written digits, 10 classes."""
    architecture = {"patch_size": 1, "embed_dim": 96, "depth": 12, "num_heads": 6, "mlp_ratio": 2.0}
    return build_model_with_cfg(
        VisionTransformer,
        "digits_vit_12b",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**architecture, **kwargs},
    )
