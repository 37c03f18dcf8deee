"""How often intervals hold the true value: experiments repeated with images drawn from a population of made-up maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import stdtrit

from collapse_probe.derived import block_readings, derived_readings
from collapse_probe.metrics import CrossLayerSimilarity

LAYERS, HEADS, TOKENS = 4, 1, 5
THRESHOLD = 0.72
EXPERIMENTS, IMAGES = 150, 48
MANY = 240  # so many that of their blocks only some are paired


def population(images, generator):
    """Maps whose layers share a pattern, more or less of it from image to image, and more of it the deeper they are."""
    shape = (images, HEADS, TOKENS, TOKENS)
    fixed = torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(7)).double()
    own = torch.randn(1, *shape, generator=generator).double()
    strength = 0.8 + 0.8 * torch.rand(images, 1, 1, 1, generator=generator).double()
    noise = torch.randn(LAYERS, *shape, generator=generator).double()
    depth = torch.tensor([1.6, 1.2, 0.9, 0.65]).double()[:, None, None, None, None]
    return (1.2 * fixed + 0.8 * strength * own + depth * noise).softmax(-1)


def experiment(images, generator):
    metric = CrossLayerSimilarity(threshold=THRESHOLD)
    for start in range(0, images, 256):
        metric.update(population(min(256, images - start), generator))
    readings = {name: value.numpy() for name, value in metric.compute().items()}
    replicates = {name: value.numpy() for name, value in metric.replicates().items()}
    columns = block_readings(readings, replicates, images, THRESHOLD, 1)
    derived = derived_readings(readings["similarity"], replicates, images, THRESHOLD)
    previous = {
        name: np.diagonal(readings[name], 1)
        for part in ("similarity", "centred", "image_independent", "excess")
        for name in (part, f"{part}_se", f"{part}_low", f"{part}_high")
        if name in readings
    }
    return previous, columns, derived


@pytest.fixture(scope="module")
def truth():
    previous, columns, derived = experiment(6_000, torch.Generator().manual_seed(1))
    return previous, columns, derived


@pytest.fixture(scope="module")
def experiments():
    generator = torch.Generator().manual_seed(2)
    return [experiment(IMAGES, generator) for _ in range(EXPERIMENTS)]


@pytest.fixture(scope="module")
def many_images():
    generator = torch.Generator().manual_seed(3)
    return [experiment(MANY, generator) for _ in range(EXPERIMENTS)]


def share_held(inside):
    return np.mean(inside, axis=0)


@pytest.mark.parametrize("name", ["similarity", "centred"])
def test_two_standard_errors_hold_a_mean(truth, experiments, name):
    half = stdtrit(IMAGES - 1, 0.975)
    held = share_held([abs(own[name] - truth[0][name]) <= half * own[f"{name}_se"] for own, _, _ in experiments])
    assert (held >= 0.90).all(), held
    assert (held <= 0.99).all(), held


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["image_independent", "excess"])
def test_intervals_hold_where_not_all_blocks_are_paired(truth, many_images, name):
    held = share_held(
        [(own[f"{name}_low"] <= truth[0][name]) & (truth[0][name] <= own[f"{name}_high"]) for own, _, _ in many_images]
    )
    assert (held >= 0.88).all(), held


@pytest.mark.sweep
def test_intervals_of_more_images_are_narrower(experiments, many_images):
    width, wider = (
        np.median([own["image_independent_high"] - own["image_independent_low"] for own, _, _ in runs], axis=0)
        for runs in (many_images, experiments)
    )
    expected = (IMAGES / MANY) ** 0.5
    assert (width < 1.3 * expected * wider).all(), width / wider


@pytest.mark.parametrize("name", ["image_independent", "excess"])
def test_intervals_hold_the_image_independent_part_and_the_excess(truth, experiments, name):
    held = share_held(
        [(own[f"{name}_low"] <= truth[0][name]) & (truth[0][name] <= own[f"{name}_high"]) for own, _, _ in experiments]
    )
    assert (held >= 0.90).all(), held
    assert (held <= 0.995).all(), held


def test_bootstrap_intervals_hold_the_similarity_ratio(truth, experiments):
    true = truth[1]["similarity_ratio"]
    held = share_held(
        [(own["similarity_ratio_low"] <= true) & (true <= own["similarity_ratio_high"]) for _, own, _ in experiments]
    )
    assert (held >= 0.90).all(), held
    assert (held <= 0.99).all(), held


@pytest.mark.parametrize("name", ["similar_blocks", "onset"])
def test_bootstrap_intervals_hold_the_number_of_similar_blocks_and_the_onset(truth, experiments, name):
    """They are whole numbers: an interval that holds 95 % of the replicates holds the truth at least about as often."""
    true = truth[2][name]["value"]
    assert true is not None
    values = [own[name]["value"] for _, _, own in experiments]
    assert len(set(values)) > 1, "the threshold is far from every mean: nothing is tested"
    known = [own[name] for _, _, own in experiments if own[name]["low"] is not None]
    held = np.mean([own["low"] <= true <= own["high"] for own in known])
    assert len(known) > 0.9 * len(experiments)
    assert held >= 0.90, held


def test_too_few_images_have_no_bootstrap_interval():
    _, columns, derived = experiment(7, torch.Generator().manual_seed(3))
    assert np.isnan(columns["similarity_ratio_low"]).all()
    assert derived["similar_blocks"]["low"] is None
