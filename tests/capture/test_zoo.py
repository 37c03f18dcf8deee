"""Every family of timm: each map that the graph of an ordinary pass shows is captured, or named with a reason."""

from __future__ import annotations

import contextlib

import pytest
import timm
import torch
from _reference_graph import reference_maps
from _zoo import ZOO, build, examine, quick, sharpness

import collapse_probe.models  # noqa: F401  # registers the bundled architectures

QUICK = (
    "test_vit", "test_vit_relpos", "vit_small_patch14_reg4_dinov2", "naflexvit_base_patch16_siglip", "cait_xxs24_224",
    "convit_tiny", "efficientformerv2_s0", "vit_dwee_patch16_reg1_gap_256", "deepvit_s", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256", "test_maxvit", "test_coatnet", "gcvit_xxtiny", "nest_tiny", "hiera_tiny_224",
    "tnt_s_legacy_patch16_224", "davit_tiny", "mobilevit_xxs", "halonet26t", "pvt_v2_b0", "pit_ti_224", "levit_128s",
    "crossvit_tiny_240", "xcit_nano_12_p8_224", "resnet50_clip", "edgenext_xx_small", "coat_lite_tiny",
    "mobilevitv2_050", "gcresnext26ts", "efficientvim_m1", "csatv2",
)  # fmt: skip

#: Those that take seconds wait for the long tests.
_SLOW = {
    "nest_tiny", "davit_tiny", "hiera_tiny_224", "xcit_nano_12_p8_224", "swinv2_tiny_window8_256", "gcvit_xxtiny",
    "resnet50_clip", "crossvit_tiny_240", "convit_tiny",
}  # fmt: skip
FAMILIES = [pytest.param(name, marks=pytest.mark.sweep if name in _SLOW else []) for name in QUICK]

#: Products that are named instead of captured, and the word that names them.
NAMED = {"csatv2": (14, "across images"), "efficientvim_m1": (6, "a gate"), "efficientvim_m1_dist": (6, "a gate")}

MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad}


@pytest.fixture(autouse=True)
def known(request):
    name = request.node.callspec.params["name"]
    if not timm.is_model(name):
        pytest.skip(f"this version of timm has no {name}")


def check(name, model, images, mode, graph=None):
    """Maps of a pass against the graph of another, and against the model's own products in the same pass.

    With gradients both passes run the same kernels. Without, fused kernels may be others than those of the graph, and
    their rounding grows from layer to layer; there the products of the same pass are the sharp test.
    """
    found = examine(model, images, MODES[mode], graph)
    for one, other in zip(found.plain, found.outputs, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
    limit = 1e-5 if images.dtype is torch.float32 else 1e-9
    assert max(found.errors.values(), default=0.0) <= (limit if mode == "grad" else 30 * limit), found.errors
    count, word = NAMED.get(name, (0, ""))
    assert len(found.unmatched) == count
    assert sum(word in reason for reason in found.captured.not_captured.values() if word) >= count
    proof = found.captured.verification
    assert proof.passed, proof.failures
    assert proof.largest_error <= limit, proof.errors
    assert set(proof.errors) == set(found.captured.maps)
    assert proof.kernels == proof.captured + proof.named
    assert proof.named == count + found.gates


@pytest.mark.parametrize("name", FAMILIES)
def test_every_map_of_a_family_is_captured_or_named(name):
    model, images = quick(name)
    check(name, model, images, "no_grad")
    if name != "mobilevitv2_050":  # holds gates only
        assert 0.02 < sharpness(model, images)[0] < 0.98, "attention is degenerate: this test would prove nothing"


@pytest.mark.sweep
@pytest.mark.parametrize("name", ZOO)
def test_every_map_of_the_zoo(name):
    model, images = build(name)
    graph = reference_maps(model(images))
    for mode in MODES:
        check(name, model, images, mode, graph)
    check(name, model.double(), images.double(), "grad")
