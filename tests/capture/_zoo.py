"""At least one timm model for every source file and attention class, with trained-like weights.

Freshly initialised attention is nearly uniform and agrees with anything. So weights are moved until maps are peaked,
and batch norms are given the statistics of what flows through them then.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import timm
import torch
from _reference_graph import reference_maps, tensors_in
from timm.layers import set_fused_attn

from collapse_probe.capture import Captured, capture
from collapse_probe.capture.attention_map import Combination

#: name -> (arguments, side of the images where it is not the model's own)
ZOO = {
    # one map per block, all tokens
    "test_vit": ({}, None),
    "test_vit3": ({}, None),
    "vit_tiny_patch16_224": ({}, None),
    "vit_small_patch32_224": ({"depth": 3}, None),
    "deit_tiny_patch16_224": ({"depth": 4}, None),
    "deit_tiny_distilled_patch16_224": ({"depth": 4}, None),
    "deit3_small_patch16_224": ({"depth": 3}, None),
    "beit_base_patch16_224": ({"depth": 2}, None),
    "beitv2_base_patch16_224": ({"depth": 2}, None),
    "test_vit_relpos": ({}, None),
    "vit_relpos_small_patch16_224": ({"depth": 3}, None),
    "vit_srelpos_small_patch16_224": ({"depth": 3}, None),
    "eva02_tiny_patch14_224": ({"depth": 4}, None),
    "eva_giant_patch14_224": ({"depth": 1}, None),
    "vit_small_patch16_dinov3": ({"depth": 3}, 128),
    "vit_small_patch14_dinov2": ({"depth": 3, "img_size": 224}, None),
    "vit_small_patch14_reg4_dinov2": ({"depth": 3, "img_size": 224}, None),
    "vit_base_patch16_siglip_224": ({"depth": 2}, None),
    "vit_base_patch16_clip_224": ({"depth": 2}, None),
    "aimv2_large_patch14_224": ({"depth": 2}, None),
    "vit_pe_core_tiny_patch16_384": ({"depth": 3, "img_size": 192}, None),
    "vit_base_patch16_rope_reg1_gap_256": ({"depth": 2}, None),
    "vit_small_patch16_rope_mixed_224": ({"depth": 3}, None),
    "vit_little_patch16_reg1_gap_256": ({"depth": 3}, None),
    "vit_pwee_patch16_reg1_gap_256": ({"depth": 3}, None),
    "vit_small_patch16_18x2_224": ({"depth": 2}, None),
    "vit_tiny_r_s16_p8_224": ({}, None),
    "vit_small_resnet26d_224": ({"depth": 3}, None),
    "vitamin_small_224": ({}, None),
    "naflexvit_base_patch16_siglip": ({"depth": 2}, 192),
    "naflexvit_base_patch16_parfac_gap": ({"depth": 2}, 192),
    "samvit_base_patch16_224": ({"depth": 3}, None),
    "deepseek_vit_412m": ({"depth": 1, "img_size": 224}, None),
    "gemma4_vit_167m": ({"depth": 2, "img_size": 384}, None),
    "qwen3_vit_88m": ({"depth": 2, "img_size": 384}, None),
    # maps that are not what the softmax gave
    "cait_xxs24_224": ({"depth": 4}, None),
    "cait_xxs36_224": ({"depth": 3}, None),
    "convit_tiny": ({}, None),
    "convit_small": ({"depth": 12}, None),
    "efficientformerv2_s0": ({}, None),
    "efficientformerv2_s1": ({}, None),
    "vit_dwee_patch16_reg1_gap_256": ({"depth": 3}, None),
    "vit_dpwee_patch16_reg1_gap_256": ({"depth": 3}, None),
    "deepvit_s": ({"depth": 3}, None),
    # windows
    "swin_tiny_patch4_window7_224": ({}, None),
    "swin_s3_tiny_224": ({}, None),
    "swinv2_tiny_window8_256": ({}, None),
    "swinv2_cr_tiny_224": ({}, None),
    "swinv2_cr_tiny_ns_224": ({}, None),
    "test_maxvit": ({}, None),
    "test_coatnet": ({}, None),
    "maxvit_nano_rw_256": ({}, None),
    "maxvit_tiny_tf_224": ({}, None),
    "maxvit_rmlp_nano_rw_256": ({}, None),
    "maxxvit_rmlp_nano_rw_256": ({}, None),
    "maxxvitv2_nano_rw_256": ({}, None),
    "coatnet_nano_rw_224": ({}, None),
    "coatnet_nano_cc_224": ({}, None),
    "coatnet_rmlp_nano_rw_224": ({}, None),
    "coatnext_nano_rw_224": ({}, None),
    "gcvit_xxtiny": ({}, None),
    "gcvit_tiny": ({}, None),
    "twins_svt_small": ({}, None),
    "nest_tiny": ({}, None),
    "nest_tiny_jx": ({}, None),
    "hiera_tiny_224": ({}, None),
    "hiera_small_abswin_256": ({}, None),
    "hieradet_small": ({}, None),
    "sam2_hiera_tiny": ({}, 256),
    "tiny_vit_5m_224": ({}, None),
    "tiny_vit_11m_224": ({}, None),
    "tnt_s_patch16_224": ({"depth": 3}, None),
    "tnt_s_legacy_patch16_224": ({"depth": 3}, None),
    "davit_tiny": ({}, None),
    "davit_base_fl": ({}, 192),
    "mobilevit_xxs": ({}, None),
    "mobilevit_xs": ({}, None),
    "halonet26t": ({}, None),
    "haloregnetz_b": ({}, None),
    # hierarchies
    "pvt_v2_b0": ({}, None),
    "pvt_v2_b2_li": ({}, None),
    "twins_pcpvt_small": ({}, None),
    "pit_ti_224": ({}, None),
    "pit_xs_distilled_224": ({}, None),
    "levit_128s": ({}, None),
    "levit_192": ({}, None),
    "mvitv2_tiny": ({}, None),
    "caformer_s18": ({}, None),
    "nextvit_small": ({}, None),
    "fastvit_mci0": ({}, None),
    "fastvit_sa12": ({}, None),
    "efficientformer_l1": ({}, None),
    "efficientvit_m0": ({}, None),
    "visformer_tiny": ({}, None),
    "visformer_small": ({}, None),
    "mobilenetv4_hybrid_medium_075": ({}, None),
    "mobilenetv5_base": ({}, None),
    "shvit_s1": ({}, None),
    "iformer_t": ({}, None),
    "lowformer_b0": ({}, None),
    "cpubone_nano": ({}, None),
    "eca_botnext26ts_256": ({}, None),
    "botnet26t_256": ({}, None),
    "sebotnet33ts_256": ({}, None),
    "lamhalobotnet50ts_256": ({}, None),
    # class tokens that ask, pooling heads, other branches
    "crossvit_tiny_240": ({}, None),
    "crossvit_9_dagger_240": ({}, None),
    "volo_d1_224": ({}, None),
    "xcit_nano_12_p8_224": ({}, None),
    "xcit_tiny_12_p16_224": ({}, None),
    "resnet50_clip": ({}, None),
    # no queries and keys, or not of tokens
    "edgenext_xx_small": ({}, None),
    "edgenext_base": ({}, None),
    "coat_tiny": ({}, None),
    "coat_lite_tiny": ({}, None),
    "lambda_resnet26t": ({}, None),
    "mobilevitv2_050": ({}, None),
    "gcresnext26ts": ({}, None),
    "gc_efficientnetv2_rw_t": ({}, None),
    "resnest14d": ({}, None),
    "skresnet18": ({}, None),
    "efficientvim_m1": ({}, None),
    "efficientvim_m1_dist": ({}, None),
    "csatv2": ({}, 256),
}


@functools.cache
def quick(name):
    """The same model for every test: not to be changed."""
    return build(name)


def build(name, seed=0, fused=True):
    """A model with trained-like weights and two images for it; fused attention can be switched off."""
    kwargs, side = ZOO[name]
    if not fused:
        set_fused_attn(False)
    torch.manual_seed(seed)
    try:
        model = timm.create_model(name, **kwargs)
    finally:
        set_fused_attn(True)
    side = side or kwargs.get("img_size") or model.pretrained_cfg["input_size"][-1]
    coarse = torch.randn(2, 3, side // 16, side // 16)
    images = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return trained_like(model, images, seed), images


def trained_like(model, images, seed=0):
    """Move the weights by ever more until attention is neither uniform nor one-hot, as it is in trained models.

    Logits stay within a range of 30, as they do there: beyond it rounding of single precision shows.
    """
    start = {name: value.clone() for name, value in model.state_dict().items()}
    best = (math.inf, 0.0)
    for strength in (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0):
        model.load_state_dict(start)
        moved(model, images, strength, seed)
        entropy, spread = sharpness(model, images)
        if 0.3 <= entropy <= 0.9 and spread <= 30:
            return model
        if spread <= 30:
            best = min(best, (abs(entropy - 0.6), strength))
    model.load_state_dict(start)
    moved(model, images, best[1], seed)
    return model


def moved(model, images, strength, seed):
    """Add noise in proportion to each weight's own spread, then let batch norms learn their statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            floor, strength_here = (0.02, strength) if parameter.ndim > 1 else (0.1, min(strength, 1.0))
            parameter.add_(noise * max(spread, floor) * strength_here)
        norms = [item for item in model.modules() if isinstance(item, torch.nn.modules.batchnorm._BatchNorm)]
        if norms:
            model.eval()
            for norm in norms:
                norm.train()
                norm.momentum = 1.0
            model(images)
    model.eval()


def sharpness(model, images):
    """Mean entropy of all softmaxes over log K, and the largest range of logits in one of their rows, read from the
    graph; NaN where there is no softmax or where it is not finite."""
    maps, _ = reference_maps(model(images))
    softmaxes = [
        part.detach().double()
        for item in itertools.islice(maps, 40)
        for part in ([node._saved_result for node in item.softmaxes] or [item.applied])
        if part.shape[-1] > 1
    ]
    if not softmaxes:
        return math.nan, math.nan
    entropies = [float(torch.special.entr(part).sum(-1).mean()) / math.log(part.shape[-1]) for part in softmaxes]
    # Masked keys have no logit.
    ranges = [float((part.amax(-1) / part.masked_fill(part < 1e-40, 1.0).amin(-1)).log().max()) for part in softmaxes]
    return sum(entropies) / len(entropies), max(ranges)


def largest_difference(attention, reference):
    """Largest difference of a captured map from what a reference found, relative to its largest entry, taken by rows
    and by columns; windows may lie behind the heads there. None where the sizes differ."""
    whole = attention.materialize().detach().double()
    _, heads, queries, keys = whole.shape
    reference = reference.detach()
    if whole.numel() != reference.numel() or tuple(reference.shape[-2:]) != (queries, keys):
        return None
    middle = max(1, keys // 2)
    columns = torch.cat([attention.columns(0, middle), attention.columns(middle, keys)], -1).double()
    split = (attention.images, attention.windows, heads, queries, keys)
    errors = []
    for turned in (False, True):
        error = 0.0
        for part in (whole, columns):
            part = part.view(split).transpose(1, 2) if turned else part
            error = max(error, float((part.reshape(reference.shape) - reference).abs().max()))
        errors.append(error / float(reference.abs().max()))
    return min(errors)


def matched(captured, references):
    """Relative error of every map against the reference map that it is, and the reference maps that nobody matches."""
    waiting, errors = list(references), {}
    for name, attention in captured.maps.items():
        parts = [attention]
        if isinstance(attention.source, Combination):
            # Two fused calls: each softmax is compared; their difference is checked against the model's own product.
            parts = [replace(attention, source=source, origin=None) for source in attention.source.sources]
        for part in parts:
            differences = ((largest_difference(part, item.applied), place) for place, item in enumerate(waiting))
            fitting = [(error, place) for error, place in differences if error is not None]
            if not fitting:
                errors[name] = math.inf
                break
            error, place = min(fitting)
            errors[name] = max(error, errors.get(name, 0.0))
            del waiting[place]
    return errors, waiting


@dataclass
class Examined:
    """What two passes of a model showed: one under capture, one whose graph was read."""

    captured: Captured
    errors: dict
    unmatched: list
    gates: int
    outputs: list
    plain: list


def examine(model, images, mode, graph=None):
    """Capture a pass in a gradient mode and compare it with the graph of another pass, given if it is known."""
    references, idle = graph or reference_maps(model(images))
    with mode():
        plain = model(images)
        with capture(model, verify=True) as captured:
            outputs = model(images)
    errors, unmatched = matched(captured, references)
    gates = len([node for node in idle if node._saved_result.ndim > 2])
    return Examined(captured, errors, unmatched, gates, tensors_in(outputs), tensors_in(plain))
