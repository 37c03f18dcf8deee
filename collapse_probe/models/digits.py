"""Two small models for 8x8 digits, alike in everything but Re-attention, whose weights ship with the package:
``timm.create_model("digits_vit_24b", pretrained=True)`` and ``"digits_deepvit_24b"``.

Both are :class:`~collapse_probe.models.deepvit.DeepVisionTransformer` with 16 patch tokens (2x2 pixels) and a class
token. `examples/depth_study.py` trained them; `collapse_probe/data/README.md` states the recipe.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

from collapse_probe.models.bundled import BUNDLED, bundled_weights
from collapse_probe.models.deepvit import DeepVisionTransformer

#: Mean and standard deviation of the pixels of scikit-learn's digits, scaled to 0..1.
DIGITS_MEAN, DIGITS_STD = (0.305,), (0.376,)

_ARCHITECTURE = {
    "img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 24, "num_heads": 4, "mlp_ratio": 2.0,
}  # fmt: skip


def _config(name: str) -> dict[str, Any]:
    return {
        "file": str(bundled_weights(name)),
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


default_cfgs = generate_default_cfgs({name: _config(name) for name in BUNDLED})


@register_model
def digits_vit_24b(pretrained: bool = False, **kwargs: Any) -> DeepVisionTransformer:
    """ViT with 24 blocks, width 64, 4 heads, for ``[B, 1, 8, 8]`` images of hand-written digits, 10 classes."""
    return _build("digits_vit_24b", pretrained, {"re_attention": False, **kwargs})


@register_model
def digits_deepvit_24b(pretrained: bool = False, **kwargs: Any) -> DeepVisionTransformer:
    """The same with Re-attention in every block."""
    return _build("digits_deepvit_24b", pretrained, {"re_attention": True, **kwargs})


def _build(name: str, pretrained: bool, arguments: dict[str, Any]) -> DeepVisionTransformer:
    return build_model_with_cfg(
        DeepVisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**_ARCHITECTURE, "num_classes": 10, **arguments},
    )
