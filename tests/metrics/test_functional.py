"""Pure functions against naive float64 loops, and the exact cases that every implementation must meet."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _reference import (
    _reference_centred,
    _reference_cross_head,
    _reference_entropy,
    _reference_image_independent,
    _reference_similarity,
    _reference_variation,
    peaked_maps,
)

from collapse_probe.errors import UsageError
from collapse_probe.metrics.functional import (
    attention_entropy,
    block_similarity_ratio,
    centred_cross_layer_similarity,
    cross_head_similarity,
    cross_layer_similarity,
    head_diversity,
    image_independent_similarity,
    onset,
    relative_variation,
    similar_blocks,
    similarity_ratio,
)
from collapse_probe.metrics.functional.columns import decompose_columns

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
UNIFORM = torch.full((2, 3, 2, 5, 5), 0.2, dtype=torch.float64)


def close(value, reference, atol):
    np.testing.assert_allclose(value.double().numpy(), reference, atol=atol, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("negative", [False, True])
def test_against_loops(dtype, negative):
    maps = peaked_maps(images=3, negative=negative)
    maps = torch.tensor(maps).to(dtype).double().numpy()  # the reference sees the rounded input
    tensor = torch.tensor(maps, dtype=dtype)
    atol = TOLERANCE[dtype]
    close(cross_layer_similarity(tensor), _reference_similarity(maps), atol)
    close(centred_cross_layer_similarity(tensor), _reference_centred(maps), 10 * atol)
    close(image_independent_similarity(tensor), _reference_image_independent(maps), atol)
    close(cross_head_similarity(tensor[0]), _reference_cross_head(maps[0]), atol)
    variation = np.array(
        [
            [[[_reference_variation(head[:, t]) for t in range(7)] for head in image] for image in layer]
            for layer in maps
        ]
    )
    close(relative_variation(tensor), variation, atol)
    if not negative:
        close(attention_entropy(tensor[0]), _reference_entropy(maps[0]), atol)
        close(attention_entropy(tensor[0], normalize=True), _reference_entropy(maps[0]) / math.log(7), atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    tensor = torch.tensor(peaked_maps(images=2)).to(dtype)
    for function in (cross_layer_similarity, centred_cross_layer_similarity, relative_variation):
        value = function(tensor)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, function(tensor.float()), rtol=0, atol=0)
    entropy = attention_entropy(torch.eye(4, dtype=dtype))
    assert (entropy == 0).all()


def test_the_input_is_not_changed():
    maps = torch.tensor(peaked_maps())
    before = maps.clone()
    for function in (cross_layer_similarity, centred_cross_layer_similarity, image_independent_similarity):
        function(maps)
    cross_head_similarity(maps[0])
    assert torch.equal(maps, before)


def test_columns_not_rows():
    """Rows that agree while columns do not: the row cosine would answer 1."""
    one = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    other = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    value = cross_layer_similarity(torch.stack([one, other])[:, None, None])[0, 0, 1, 0]
    expected = (0.9 + 0.1) * 0.5 / (math.sqrt(0.5) * math.sqrt(0.82))
    torch.testing.assert_close(value, torch.full((2,), expected, dtype=torch.float64))


def test_uniform_attention():
    assert torch.allclose(cross_layer_similarity(UNIFORM), torch.ones((), dtype=torch.float64), atol=1e-12)
    assert centred_cross_layer_similarity(UNIFORM).isnan().all()
    assert centred_cross_layer_similarity(UNIFORM.float()).isnan().all()
    assert (relative_variation(UNIFORM) < 1e-12).all()
    torch.testing.assert_close(attention_entropy(UNIFORM), torch.full((2, 3, 2, 5), math.log(5), dtype=torch.float64))
    assert torch.allclose(head_diversity(UNIFORM[0]), torch.zeros((), dtype=torch.float64), atol=1e-12)


def test_equal_rows_are_undefined_when_centred():
    row = torch.tensor([0.1, 0.2, 0.3, 0.4])
    maps = row.expand(2, 1, 1, 6, 4)
    assert torch.allclose(cross_layer_similarity(maps), torch.ones(()))
    assert centred_cross_layer_similarity(maps).isnan().all()


def test_permutations_are_orthogonal_or_equal():
    eye = torch.eye(4, dtype=torch.float64)
    maps = torch.stack([eye, eye[[1, 0, 3, 2]], eye])[:, None, None]
    value = cross_layer_similarity(maps)[0, :, :, 0]
    assert (value[0, 1] == 0).all()
    torch.testing.assert_close(value[0, 2], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(centred_cross_layer_similarity(maps)[0, 0, 2, 0], torch.ones(4, dtype=torch.float64))
    assert (attention_entropy(eye) == 0).all()


def test_zero_columns_are_absent():
    maps = torch.tensor(peaked_maps(images=2))
    maps[1, 0, 1, :, 3] = 0
    value = cross_layer_similarity(maps)
    assert value[0, 1, :, 1, 3].isnan().all()
    assert value[0, :, 1, 1, 3].isnan().all()
    assert value.isnan().sum() == 5
    assert image_independent_similarity(maps)[0, 1].isfinite().all()
    assert relative_variation(maps).isnan().sum() == 1


def test_not_finite_columns_are_absent_and_do_not_spread():
    maps = torch.tensor(peaked_maps(images=2))
    clean = cross_layer_similarity(maps)
    maps[0, 0, 0, 2, 3] = torch.nan
    maps[0, 1, 0, 2, 3] = torch.inf
    value = cross_layer_similarity(maps)
    lost = value.isnan()
    assert lost.sum() == 2 * 5
    assert torch.equal(value[~lost], clean[~lost])


@pytest.mark.parametrize("scale", [1e-13, 1e-30])
def test_tiny_columns_keep_their_digits(scale):
    maps = torch.tensor(peaked_maps(images=2), dtype=torch.float32)
    tiny = maps.clone()
    tiny[..., 2] *= scale
    torch.testing.assert_close(cross_layer_similarity(tiny), cross_layer_similarity(maps), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        centred_cross_layer_similarity(tiny), centred_cross_layer_similarity(maps), atol=1e-5, rtol=0
    )


def test_centred_keeps_its_digits_at_small_variation():
    """At r about 1e-3, taking the mean out after the product would lose every digit in float32."""
    rng = np.random.default_rng(0)
    maps = 1 / 50 + 1e-5 * rng.normal(size=(2, 1, 1, 50, 50))
    reference = _reference_centred(maps)
    value = centred_cross_layer_similarity(torch.tensor(maps, dtype=torch.float32))
    close(value, reference, 2e-3)


def test_m_follows_from_its_parts():
    maps = torch.tensor(peaked_maps(images=2))
    m, c = cross_layer_similarity(maps), centred_cross_layer_similarity(maps)
    r = relative_variation(maps).transpose(0, 1)
    p, q = r[:, :, None], r[:, None, :]
    torch.testing.assert_close(m, ((1 - p**2) * (1 - q**2)).sqrt() + p * q * c, atol=1e-13, rtol=0)


def test_ratio_and_similar_blocks():
    histogram = np.zeros((3, 3, 400), dtype=np.int64)
    histogram[0, 1, 390:] = 1  # ten values in [0.95, 1]
    histogram[0, 1, 100] = 10
    assert similarity_ratio(histogram, 0.9)[0, 1] == 0.5
    assert similarity_ratio(histogram, 0.975)[0, 1] == 0.25
    assert np.isnan(similarity_ratio(histogram)[1, 2])
    histogram[1, 0] = histogram[0, 1]
    histogram[1, 2, 399] = histogram[2, 1, 399] = 20
    np.testing.assert_allclose(block_similarity_ratio(histogram, nearest=1), [0.5, 0.75, 1.0])
    np.testing.assert_allclose(block_similarity_ratio(histogram, nearest=2), [0.5, 0.75, 1.0])
    similarity = np.array([[1, 0.95, 0.2], [0.95, 1, 0.91], [0.2, 0.91, 1]])
    assert similar_blocks(similarity).tolist() == [False, True, True]
    assert similar_blocks(similarity, 0.93).tolist() == [False, True, False]
    assert similar_blocks(np.full((2, 2), np.nan)).tolist() == [False, False]


@pytest.mark.parametrize(
    ("similar", "expected"),
    [([0, 0, 0], None), ([0, 1, 0], None), ([0, 0, 1, 1], 1), ([0, 1, 1], 0), ([0, 1, 0, 1], 2)],
)
def test_onset_is_where_the_last_run_begins(similar, expected):
    assert onset(np.array(similar, dtype=bool)) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cross_layer_similarity(torch.rand(2, 3, 4, 4)),
            r"\[L, B, H, Q, K\]; got a tensor of shape \[2, 3, 4, 4\]",
        ),
        (lambda: cross_layer_similarity([torch.rand(1, 1, 4, 4), torch.rand(1, 1, 5, 5)]), "agree in shape"),
        (lambda: image_independent_similarity(torch.rand(2, 1, 1, 4, 4)), "at least 2 images"),
        (lambda: cross_head_similarity(torch.rand(3, 4, 4)), r"\[B, H, Q, K\]"),
        (lambda: head_diversity(torch.rand(2, 1, 4, 4)), "single head"),
        (lambda: similarity_ratio(np.zeros((1, 400)), 1.5), r"-1\.\.1; got 1\.5"),
        (lambda: block_similarity_ratio(np.zeros((2, 2, 400)), 0), "at least 1; got 0"),
        (lambda: similar_blocks(np.eye(2), 2), r"-1\.\.1; got 2"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_columns_do_not_change_how_the_others_are_decomposed(dtype):
    """Where no column is odd there is a shorter way."""
    torch.manual_seed(0)
    columns = torch.randn(3, 5, 7, dtype=dtype) * 0.1 + 0.2
    columns[1, 2] = torch.tensor([1.0, -1, 2, -2, 3, -3, 0])  # its mean is zero, and it is not
    plain = decompose_columns(columns.clone())
    for odd in (0.0, 1e-20, torch.inf, torch.nan):
        spoiled = torch.cat([columns, torch.full((1, 5, 7), odd, dtype=dtype)])
        found = decompose_columns(spoiled)
        for name, expected in plain._asdict().items():
            torch.testing.assert_close(getattr(found, name)[:3], expected, atol=1e-6, rtol=1e-6)
        assert found.exists[3].all() == (odd == 1e-20)
    assert plain.exists.all()
