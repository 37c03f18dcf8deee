"""Tiny configurations of vit-pytorch's image and video models, built without any download."""

from __future__ import annotations

import pytest
import torch
from _outside import images_of, perturbed

#: What most of its models ask for: 16 patches of 8 x 8, two blocks of two heads.
VIT = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48}
VIT |= {"dim_head": 16}
WITHOUT_HEAD_SIZE = {key: value for key, value in VIT.items() if key != "dim_head"}
VIDEO = {key: value for key, value in VIT.items() if key not in ("patch_size", "depth")}
VIDEO |= {"image_patch_size": 8, "frames": 4, "frame_patch_size": 2}
ND = {key: value for key, value in VIT.items() if key != "image_size"} | {"ndim": 2, "input_shape": (32, 32)}
TWINS = {"num_classes": 5}
for _stage, _width in enumerate((16, 16, 32, 32), start=1):
    TWINS |= {f"s{_stage}_emb_dim": _width, f"s{_stage}_patch_size": 4 if _stage == 1 else 2}
    TWINS |= {f"s{_stage}_local_patch_size": 4 if _stage < 3 else 2, f"s{_stage}_global_k": (4, 4, 2, 1)[_stage - 1]}
    TWINS |= {f"s{_stage}_depth": 1}
CVT = {"num_classes": 5}
for _stage, _width in enumerate((16, 32, 32), start=1):
    CVT |= {f"s{_stage}_emb_dim": _width, f"s{_stage}_heads": _stage, f"s{_stage}_depth": 1}

#: name -> module, class, arguments, image size
ZOO = {
    "ViT": ("vit", "ViT", VIT, 32),
    "SimpleViT": ("simple_vit", "SimpleViT", VIT, 32),
    "CaiT": ("cait", "CaiT", VIT | {"cls_depth": 2}, 32),
    "DeepViT": ("deepvit", "DeepViT", VIT, 32),
    "CvT": ("cvt", "CvT", CVT, 64),
    "PiT": ("pit", "PiT", VIT | {"depth": (1, 1)}, 32),
    "LeViT": (
        "levit",
        "LeViT",
        {"image_size": 64, "num_classes": 5, "stages": 2, "dim": (16, 32), "depth": 1, "heads": (2, 2), "mlp_mult": 2}
        | {"dim_key": 8, "dim_value": 8},
        64,
    ),
    "CrossViT": (
        "cross_vit",
        "CrossViT",
        {"image_size": 32, "num_classes": 5, "sm_dim": 16, "lg_dim": 32, "sm_patch_size": 8, "lg_patch_size": 16}
        | {"sm_enc_heads": 2, "lg_enc_heads": 2, "cross_attn_heads": 2, "depth": 1, "lg_enc_depth": 1}
        | {"sm_enc_dim_head": 8, "lg_enc_dim_head": 8, "cross_attn_dim_head": 8}
        | {"sm_enc_mlp_dim": 32, "lg_enc_mlp_dim": 32},
        32,
    ),
    "XCiT": ("xcit", "XCiT", VIT | {"cls_depth": 1, "dim_head": 8}, 32),
    "NesT": (
        "nest",
        "NesT",
        {"image_size": 32, "patch_size": 4, "num_classes": 5, "dim": 16, "heads": 2, "num_hierarchies": 2}
        | {"block_repeats": (1, 1), "dim_head": 8},
        32,
    ),
    "MobileViT": (
        "mobile_vit",
        "MobileViT",
        {"image_size": (64, 64), "dims": [24, 32, 40], "num_classes": 5}
        | {"channels": [8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 48], "depths": (1, 1, 1)},
        64,
    ),
    "T2TViT": (
        "t2t",
        "T2TViT",
        {key: value for key, value in VIT.items() if key != "patch_size"} | {"t2t_layers": ((7, 4), (3, 2))},
        32,
    ),
    "TwinsSVT": ("twins_svt", "TwinsSVT", TWINS, 64),
    "CCT": (
        "cct",
        "CCT",
        {"img_size": 32, "embedding_dim": 32, "num_layers": 2, "num_heads": 2, "mlp_ratio": 1.0, "num_classes": 5},
        32,
    ),
    "CrossFormer": (
        "crossformer",
        "CrossFormer",
        {"dim": (32, 32, 64, 64), "depth": (1, 1, 1, 1), "global_window_size": (4, 2, 2, 1)}
        | {"local_window_size": 2, "num_classes": 5},
        64,
    ),
    "MaxViT": (
        "max_vit",
        "MaxViT",
        {"num_classes": 5, "dim": 32, "depth": (1, 1), "dim_head": 16, "dim_conv_stem": 16, "window_size": 4},
        32,
    ),
    "RegionViT": (
        "regionvit",
        "RegionViT",
        {"dim": (16, 32, 32, 32), "depth": (1, 1, 1, 1), "window_size": 4, "num_classes": 5},
        128,
    ),
    "ScalableViT": (
        "scalable_vit",
        "ScalableViT",
        {"num_classes": 5, "dim": 16, "heads": (2, 2), "depth": (1, 1), "reduction_factor": (2, 1)}
        | {"window_size": (4, None), "ssa_dim_key": (8, 8), "ssa_dim_value": (8, 8)}
        | {"iwsa_dim_key": (8, 8), "iwsa_dim_value": (8, 8)},
        32,
    ),
    "SepViT": (
        "sep_vit",
        "SepViT",
        {"num_classes": 5, "dim": 16, "dim_head": 8, "heads": (2, 2), "depth": (1, 1), "window_size": 7},
        56,
    ),
    "RvT": ("rvt", "RvT", WITHOUT_HEAD_SIZE, 32),
    "LookViT": (
        "look_vit",
        "LookViT",
        {"dim": 32, "image_size": 32, "num_classes": 5, "depth": 1, "patch_size": 16, "heads": 2, "dim_head": 16}
        | {"highres_patch_size": 8, "cross_attn_heads": 2, "cross_attn_dim_head": 16},
        32,
    ),
    "ParallelViT": ("parallel_vit", "ViT", VIT, 32),
    "LearnableMemoryViT": ("learnable_memory_vit", "ViT", VIT, 32),
    "ViTForSmallDataset": ("vit_for_small_dataset", "ViT", VIT, 32),
    "ViTWithPatchMerger": ("vit_with_patch_merger", "ViT", VIT | {"patch_merge_num_tokens": 4}, 32),
    "ViTWithPatchDropout": ("vit_with_patch_dropout", "ViT", VIT, 32),
    "ViTWithDecorrelation": ("vit_with_decorr", "ViT", VIT, 32),
    "ViTWithKeel": ("vit_with_keel_post_ln", "ViT", VIT, 32),
    "ViT5": ("vit_5", "ViT", VIT, 32),
    "ViTDetPool": ("vit_detpool", "ViTDetPool", VIT, 32),
    "ATSViT": ("ats_vit", "ViT", VIT | {"max_tokens_per_depth": (12, 8)}, 32),
    "NormalizedViT": ("normalized_vit", "nViT", VIT, 32),
    "JumboViT": ("jumbo_vit", "JumboViT", VIT | {"jumbo_cls_k": 2}, 32),
    "JetViT": ("jet_vit", "JetViT", VIT | {"window_size": 2}, 32),
    "LoopedViT": (
        "looped_vit",
        "LoopedViT",
        {"num_classes": 5, "dim": 32, "image_size": 32, "patch_size": 8, "pre_loop_depth": 1, "num_looped_blocks": 1}
        | {"post_loop_depth": 1, "loop_depth": 2, "heads": 2, "dim_head": 16, "mlp_dim": 48},
        32,
    ),
    "SimpleUViT": ("simple_uvit", "SimpleUViT", VIT, 32),
    "SimpleFlashViT": ("simple_flash_attn_vit", "SimpleViT", VIT | {"use_flash": True}, 32),
    "SimpleViTWithQKNorm": ("simple_vit_with_qk_norm", "SimpleViT", VIT, 32),
    "SimpleViTWithRegisters": ("simple_vit_with_register_tokens", "SimpleViT", VIT, 32),
    "SimpleViTWithRelativeBias": ("simple_vit_with_relative_proj_pos_bias", "SimpleViT", VIT, 32),
    "SimpleViTWithSparseGating": ("simple_vit_with_sparse_gating", "SimpleViTWithSparseGating", VIT, 32),
    "SimpleViTWithSpecializedCLS": ("simple_vit_with_specialized_cls", "SimpleViT", VIT, 32),
    "SimpleViTWithValueResidual": ("simple_vit_with_value_residual", "SimpleViT", VIT, 32),
    "SimpleViTWithPatchDropout": ("simple_vit_with_patch_dropout", "SimpleViT", VIT, 32),
    "SimpleViTWithFFT": ("simple_vit_with_fft", "SimpleViT", VIT | {"freq_patch_size": 8}, 32),
    "SimpleViTWithHyperConnections": (
        "simple_vit_with_hyper_connections",
        "SimpleViT",
        VIT | {"num_residual_streams": 2},
        32,
    ),
    "SimpleViTOrthogonal": ("simple_vit_orthog_residual_update", "SimpleViT", VIT, 32),
    "SimpleViTAttnResidual": ("simple_vit_attn_residual", "SimpleViTAttnResidual", VIT, 32),
    "SimpleViTAttnResidualDCA": ("attn_residual_with_dca_simple_vit", "SimpleViT", VIT, 32),
    "MaxViTWithRegisters": (
        "max_vit_with_registers",
        "MaxViT",
        {"num_classes": 5, "dim": 32, "depth": (1, 1), "dim_head": 16, "dim_conv_stem": 16, "window_size": 4},
        32,
    ),
    "MP3ViT": ("mp3", "ViT", VIT, 32),
    "WWT": ("wwt", "WWT", VIT | {"num_slots": 6}, 32),
    "ViTND": ("vit_nd", "ViTND", ND, 32),
    "ViTNDRotary": ("vit_nd_rotary", "ViTND", ND, 32),
    "ViTNDPoPE": ("vit_nd_pope", "ViTND", ND, 32),
    "VATViT": ("vat", "ViT", VIT, 32),
    "ViT3D": ("vit_3d", "ViT", VIDEO | {"depth": 2}, "video"),
    "ViViT": ("vivit", "ViViT", VIDEO | {"spatial_depth": 1, "temporal_depth": 1}, "video"),
    "ViViTFactorizedSelfAttention": (
        "vivit",
        "ViViT",
        VIDEO | {"spatial_depth": 2, "temporal_depth": 2, "variant": "factorized_self_attention"},
        "video",
    ),
}


def build(name, scale=0.15):
    """The model and what it takes: images `[2, 3, S, S]` or videos `[2, 3, 4, 32, 32]`.

    Tests are skipped for models that the installed version does not have.
    """
    module, cls, arguments, size = ZOO[name]
    model_class = getattr(pytest.importorskip(f"vit_pytorch.{module}"), cls)
    torch.manual_seed(0)
    model = perturbed(model_class(**arguments), scale)
    if size == "video":
        return model, torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    return model, images_of(2, size)
