"""The verdict on models that were broken on purpose: each failure is recognised as what it is and as nothing else."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pandas as pd
import planted
import pytest
import timm
import torch
from analysis_factory import hierarchy

import collapse_probe as cp
import collapse_probe.models  # registers the bundled architectures
from collapse_probe.diagnosis import Threshold, Thresholds, diagnose

START, LAST = 12, 23  # of 24 blocks
UNIFORM = 11  # the block of the trained model whose attention is nearly uniform: it is alike to nothing


@pytest.fixture(scope="module")
def images():
    return planted.digit_images()[2][:24]


def trained():
    return timm.create_model("digits_vit_24b", pretrained=True).eval()


def blocks(first, last=LAST):
    return tuple(f"blocks.{number}.attn" for number in range(first, last + 1))


def wrapped(first, last=LAST):
    """Names of layers whose blocks were put into another module."""
    return tuple(f"blocks.{number}.block.attn" for number in range(first, last + 1))


#: What is planted -> (how, the finding, the layers that it names).
PANEL = {
    "attention copied": (partial(planted.copy_attention, start=START), "attention-collapse", blocks(START + 1)),
    "heads copied": (planted.copy_heads, "head-redundancy", blocks(0)),
    "logits too large": (planted.saturate, "entropy-collapse", blocks(0)),
    "tokens averaged": (partial(planted.average_tokens, start=START), "token-collapse", wrapped(START + 1)),
    "huge norms": (partial(planted.plant_outliers, start=START - 1), "outlier-tokens", blocks(START)),
    "dead heads": (partial(planted.kill_heads, start=START, heads=(0, 3)), "dead-heads", blocks(START)),
    "heads without values": (partial(planted.silence_heads, start=START), "dead-heads", blocks(START)),
    "heads cut off": (partial(planted.silence_heads, start=START, part="proj"), "dead-heads", blocks(START)),
    "NaN": (partial(planted.plant_nan, start=START), "non-finite", blocks(START)),
    "nothing": (lambda model: model, "healthy", ()),
}


@pytest.fixture(scope="module", params=list(PANEL))
def broken(request, images):
    plant, code, layers = PANEL[request.param]
    result = cp.analyze(plant(trained()), images, batch_size=8)
    if code == "head-redundancy":  # copies of a uniform head leave a uniform block, which is noted as such
        layers = tuple(name for name in layers if name not in result.finding("uniform-attention").layers)
        assert len(layers) > LAST / 2
    return result, code, layers


def alarms(result):
    return {finding.code for finding in result.findings if finding.severity != "note"}


def test_each_failure_is_recognised_and_no_other(broken):
    result, code, layers = broken
    assert alarms(result) == {code}, [str(finding) for finding in result.findings]
    assert result.finding(code).layers == layers


def test_findings_say_where_their_thresholds_come_from_and_what_to_do(broken, tmp_path):
    result, code, _ = broken
    finding = result.finding(code)
    assert finding.evidence
    assert finding.threshold
    assert finding.source
    assert finding.advice
    again = cp.Analysis.load(result.save(tmp_path / "run"))
    assert again.findings == result.findings
    assert diagnose(again) == result.findings


def test_readings_behind_a_finding_carry_standard_errors(broken):
    result, code, layers = broken
    finding = result.finding(code)
    for entry in finding.readings:
        assert entry["layer"] in layers
        assert np.isfinite(entry["value"])
        assert entry["se"] is None or entry["se"] >= 0
    if code not in ("healthy", "non-finite", "dead-heads"):
        assert {entry["layer"] for entry in finding.readings} == set(layers)
        assert any(entry["se"] is not None for entry in finding.readings)


def test_dead_heads_are_named(images):
    result = cp.analyze(planted.kill_heads(trained(), START, heads=(1, 2)), images)
    assert result.finding("dead-heads").heads == {name: [1, 2] for name in blocks(START)}


def test_dead_heads_do_not_pass_for_similar_layers(images):
    """Heads that attend uniformly have M = 1 in every pair of layers; the others decide."""
    result = cp.analyze(planted.kill_heads(trained(), 0, heads=(0, 1, 2)), images)
    assert result.layers["similarity_to_previous"].iloc[1:].min() > 0.8
    assert "attention-collapse" not in {finding.code for finding in result.findings}
    assert "dead-heads" in alarms(result)


def test_two_failures_are_two_findings(images):
    model = planted.copy_attention(planted.plant_outliers(trained(), 2), START)
    assert alarms(cp.analyze(model, images)) == {"attention-collapse", "outlier-tokens"}


def test_a_random_network_with_sharp_attention_is_untrained(images):
    torch.manual_seed(0)
    model = planted.small_vit(4, 48, 3).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:96] *= 5
    result = cp.analyze(model, images)
    assert "uniform-attention" not in alarms(result)
    assert alarms(result) == {"untrained"}
    with torch.no_grad():
        model.norm.weight[3] += 1e-3
    assert "untrained" not in alarms(cp.analyze(model, images))


def test_blocks_that_repeat_one_further_back_are_found(images):
    model, shared = trained(), {}
    for number in range(14, 24, 3):
        model.blocks[number].attn = planted.CopiedAttention(model.blocks[number].attn, shared, number == 14)
    result = cp.analyze(model, images)
    assert alarms(result) == {"attention-collapse"}
    finding = result.finding("attention-collapse")
    assert finding.layers == ("blocks.17.attn", "blocks.20.attn", "blocks.23.attn")
    assert "blocks.23.attn that of blocks.20.attn" in finding.title


def test_entropy_collapse_in_half_of_the_heads_is_found(images):
    model = trained()
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.attn.qkv.parameters():
                parameter.view(3, 4, 16, -1)[0, :2] *= 300
    result = cp.analyze(model, images)
    assert alarms(result) == {"entropy-collapse"}
    assert result.finding("entropy-collapse").heads == {name: [0, 1] for name in blocks(0)}


def test_attention_that_adds_nothing_is_found(images):
    model = trained()
    with torch.no_grad():
        for block in model.blocks[7:9]:
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
    result = cp.analyze(model, images)
    assert result.finding("idle-attention").layers == blocks(7, 8)
    assert alarms(result) <= {"idle-attention", "dead-heads", "constant-weights"}


def test_a_huge_class_token_is_noted_and_no_outlier(images):
    def change(x):
        return torch.cat([x[:, :1] * 40, x[:, 1:]], dim=1)

    model = trained()
    model.blocks[8] = planted.Changed(model.blocks[8], change)
    result = cp.analyze(model, images)
    assert result.finding("large-prefix-tokens").severity == "note"
    assert "outlier-tokens" not in {finding.code for finding in result.findings}


def test_a_trained_network_whose_norms_were_folded_away_is_not_called_untrained(images):
    model = trained()
    pairs = [(block.norm1, block.attn.qkv) for block in model.blocks]
    pairs += [(block.norm2, block.mlp.fc1) for block in model.blocks] + [(model.norm, model.head)]
    expected = model(images)
    with torch.no_grad():
        for norm, linear in pairs:
            linear.bias += linear.weight @ norm.bias
            linear.weight *= norm.weight
            norm.weight.fill_(1)
            norm.bias.zero_()
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=0)
    assert alarms(cp.analyze(model, images)) == {"healthy"}


def test_pruned_inputs_are_no_dead_heads(images):
    model = trained()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:, 16:32] = 0
    assert "dead-heads" not in alarms(cp.analyze(model, images))


def test_a_lower_threshold_of_similarity_leaves_flatness_alone(images):
    result = cp.analyze(trained(), images, threshold=0.5)
    assert alarms(result) == {"attention-collapse"}
    similar = result.layers["similarity_to_previous"] > 0.5
    similar &= ~result.layers["block"].isin([UNIFORM, UNIFORM + 1])
    assert result.finding("attention-collapse").layers == tuple(result.layers.index[similar])


def test_weights_that_are_not_finite_behind_all_attention_are_told(images):
    model = trained()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    finding = cp.analyze(model, images).finding("non-finite")
    assert finding.severity == "problem"
    assert "head.weight" in finding.title


def test_uniform_attention_of_a_trained_network_is_not_called_untrained(images):
    model = trained()
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.attn.qkv.parameters():
                parameter.chunk(3)[0].zero_()  # queries
    (finding,) = [item for item in cp.analyze(model, images).findings if item.severity != "note"]
    assert finding.code == "uniform-attention"
    assert "although this network has been trained" in finding.title


def test_copied_flat_attention_is_collapse_and_flat_attention_alone_is_not():
    """Columns that hardly vary are alike whatever layers do: only their centred similarity tells."""
    result = hierarchy()
    result.layers["relative_variation"] = 0.25
    result.layers["similarity_to_previous"] = result.layers["similarity_to_previous"] * 0 + 0.95
    result.layers["centred_to_previous"] = 0.2
    assert {finding.code for finding in diagnose(result)} == {"flat-attention"}
    result.layers["centred_to_previous"] = 0.97
    assert {finding.code for finding in diagnose(result)} == {"attention-collapse", "flat-attention"}


def test_a_threshold_passed_within_the_error_is_no_problem():
    result = hierarchy()
    result.layers["similarity_to_previous"] = result.layers["similarity_to_previous"] * 0 + 0.91
    result.layers["similarity_to_previous_se"] = 0.05
    finding = next(item for item in diagnose(result) if item.code == "attention-collapse")
    assert finding.severity == "warning"
    assert "within two standard errors" in finding.evidence
    result.layers["similarity_to_previous_se"] = 0.001
    assert next(item for item in diagnose(result) if item.code == "attention-collapse").severity == "problem"


@pytest.mark.parametrize("metrics", ["attention_entropy", "rank_residual", "cka"])
def test_what_was_not_measured_is_not_judged(images, metrics):
    result = cp.analyze(trained(), images[:8], metrics=metrics)
    (finding,) = result.findings
    assert finding.code == "not-comparable"
    assert "was not measured" in finding.title


def test_diagnosing_changes_nothing(broken):
    result, _, _ = broken
    before = copy.deepcopy(result)
    diagnose(result, 0.5)
    pd.testing.assert_frame_equal(result.layers, before.layers)
    assert result.findings == before.findings


def test_every_threshold_states_its_origin():
    limits = dict(Thresholds())
    assert len(limits) >= 10
    for limit in limits.values():
        assert limit.source
        assert limit.origin.startswith("published: " if limit.published else "ours: ")
        assert pickle.loads(pickle.dumps(limit)).source == limit.source
    assert [name for name, limit in limits.items() if limit.published] == ["sink"]
    assert Threshold(0.5, "here") == 0.5
