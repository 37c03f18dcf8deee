"""Bundled models; importing this package registers them with timm (`timm.create_model("deepvit_32b")`).

DeepViT and the plain ViTs it is compared with, and a small trained pair of both for 8x8 digits whose weights and test
images ship with the package.
"""

from __future__ import annotations

from collapse_probe.models.bundled import BUNDLED, bundled_image, bundled_images, bundled_weights
from collapse_probe.models.deepvit import DeepVisionTransformer, ReAttention
from collapse_probe.models.digits import digits_deepvit_24b, digits_vit_24b

__all__ = [
    "BUNDLED",
    "DeepVisionTransformer",
    "ReAttention",
    "bundled_image",
    "bundled_images",
    "bundled_weights",
    "digits_deepvit_24b",
    "digits_vit_24b",
]
