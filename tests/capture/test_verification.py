"""Proof at run time: what a verified pass claims, and that it fails where a map is wrong."""

from __future__ import annotations

import contextlib

import pytest
import torch
from _models import build, perturbed
from torch import nn

import collapse_probe as cp
from collapse_probe.capture import capture
from collapse_probe.capture.attention_map import QueryKey

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def verified(model, *inputs, mode=torch.no_grad):
    with mode(), capture(model, verify=True) as captured:
        model(*inputs)
    return captured


@pytest.mark.parametrize("fused", [True, False])
def test_every_layer_is_checked_and_every_kernel_counted(fused):
    captured = verified(build("vit_tiny_patch16_224", fused=fused), IMAGES)
    proof = captured.verification
    assert proof.passed
    assert list(proof.errors) == list(captured.maps)
    assert proof.largest_error < 1e-5
    assert (proof.kernels, proof.captured, proof.named) == (3, 3, 0)
    assert "3 kernels ran: 3 captured" in str(proof)
    assert proof.to_dict()["passed"] is True


def test_a_capture_that_was_not_asked_to_verify_claims_nothing():
    model = build("vit_tiny_patch16_224")
    with torch.no_grad(), capture(model) as captured:
        model(IMAGES)
    assert captured.verification is None


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masked", [None, "tokens", "padding"])
def test_the_native_fast_path_is_checked_to_its_end(norm_first, activation, masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, norm_first=norm_first, batch_first=True)
    encoder = perturbed(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 0.3)
    mask = {"mask": torch.ones(7, 7).triu(1).bool()} if masked == "tokens" else {}
    if masked == "padding":
        mask = {"src_key_padding_mask": torch.arange(7).expand(3, 7) >= torch.tensor([[7], [5], [4]])}
    kernels = []
    tokens = torch.randn(3, 7, 16)
    with torch.no_grad(), Kernels(kernels):
        encoder(tokens, **mask)
    assert "aten::_transformer_encoder_layer_fwd" in kernels, "this test is about the native kernel"
    with torch.no_grad(), capture(encoder, verify=True) as captured:
        encoder(tokens, **mask)
    assert captured.verification.passed, captured.verification
    assert len(captured.maps) == len(captured.verification.errors) == 2
    first = next(iter(captured.maps.values())).materialize()
    if masked == "tokens":
        assert torch.equal(first, first.tril())
    if masked == "padding":
        assert float(first[2, :, :, 4:].abs().max()) == 0
        assert float(first[0].min()) > 0


class Kernels(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("broken", ["scale", "bias", "heads"])
def test_a_wrong_map_does_not_pass(broken, monkeypatch):
    """Whatever is wrong with what was kept: the product tells."""
    logits = QueryKey._logits

    def wrong(self, start, stop):
        right = logits(self, start, stop)
        if broken == "scale":
            return right * 1.05
        return right + torch.linspace(0, 1, right.shape[-1]) if broken == "bias" else right.flip(1)

    monkeypatch.setattr(QueryKey, "_logits", wrong)
    captured = verified(build("vit_tiny_patch16_224"), IMAGES)
    proof = captured.verification
    assert not proof.passed
    assert not captured.maps
    assert len(captured.not_captured) == len(proof.failures) == 3
    assert all("differs from the model's own product" in reason for reason in captured.not_captured.values())


def test_an_overlooked_kernel_does_not_pass(monkeypatch):
    from collapse_probe.capture.dataflow import AttentionTracer

    model = build("vit_tiny_patch16_224", fused=False)
    monkeypatch.setattr(AttentionTracer, "_softmax", lambda *_: None)
    captured = verified(model, IMAGES)
    assert not captured.maps  # the layers themselves are the ones to tell
    assert len(captured.not_captured) == 3
    assert not captured.verification.passed


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_dtype_is_held_to_its_own_rounding(mode, dtype):
    model = build("vit_tiny_patch16_224").to(dtype)
    proof = verified(model, IMAGES.to(dtype), mode=mode).verification
    assert proof.passed, proof
    limits = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
    assert proof.largest_error < limits[dtype]


def test_the_analysis_records_the_proof():
    model = build("vit_tiny_patch16_224")
    proof = cp.analyze(model, IMAGES, verify=True).provenance["verification"]
    assert proof["passed"]
    assert proof["kernels"] == proof["captured"] == 3
    assert "verification" not in cp.analyze(model, IMAGES).provenance
