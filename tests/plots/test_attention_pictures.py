"""Pictures of attention: the right numbers lie over the picture, and the words below it say what they are."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.testing import assert_allclose

from collapse_probe import plots
from collapse_probe.errors import UsageError
from collapse_probe.look import Look
from collapse_probe.rollout import attention_rollout
from tests.look_factory import make_look, picture


def overlay(ax: Any) -> np.ndarray:
    """The map on the picture that lies under it."""
    under, over = ax.images
    assert under.cmap.name == "gray"
    assert over.get_interpolation() == "bilinear"
    assert under.get_extent() == over.get_extent()
    return np.asarray(over.get_array())


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.legends[0].get_texts())


def changed(look: Look, **settings: Any) -> Look:
    return replace(look, layers={name: replace(layer, **settings) for name, layer in look.layers.items()})


def test_rows_are_layers_and_columns_the_mean_and_heads() -> None:
    look = make_look()
    figure, axes = plots.attention_over_image(look, layers=[1, -1], query=(2, 4))
    assert axes.shape == (2, 4)
    assert [ax.get_title() for ax in axes[0]] == ["mean", "head 0", "head 1", "head 2"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["Layer 1", "Layer 11"]
    place = 1 + 2 * 7 + 4
    for row, name in zip(axes, ("blocks.1.attn", "blocks.11.attn"), strict=True):
        layer = look.layers[name]
        for ax, attention in zip(row, [layer.mean, *layer.maps.values()], strict=True):
            expected = attention[place]
            assert_allclose(overlay(ax), expected[1:].reshape(7, 7), rtol=1e-6)
            assert ax.get_xlabel() == f"max {expected[1:].max():.2g}\nprefix {expected[0]:.2f}"
            assert (ax.images[1].norm.vmin, ax.images[1].norm.vmax) == (0, pytest.approx(expected[1:].max()))
            marks = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
            assert {patch.get_xy() for patch in marks} == {(4 * 8, 2 * 8)}  # patches of 8 pixels
            assert {(patch.get_width(), patch.get_height()) for patch in marks} == {(8, 8)}
    first = figure.axes[0]
    assert first.get_title() == "image"
    assert_allclose(np.asarray(first.images[0].get_array()), look.picture)
    assert "prefix: share of the attention that falls on the class token." in words(figure)


def test_a_shared_scale_is_one_for_all() -> None:
    figure, axes = plots.attention_over_image(make_look(), scale="shared", heads=())
    limits = {ax.images[1].norm.vmax for ax in axes.flat}
    assert limits == {max(overlay(ax).max() for ax in axes.flat)}
    assert "All panels are coloured on one scale." in words(figure)
    figure, axes = plots.attention_over_image(make_look(), heads=())
    assert len({ax.images[1].norm.vmax for ax in axes.flat}) == 4
    assert "each panel is coloured up to its own" in words(figure)


def test_the_class_token_by_depth_and_the_mean_where_there_is_none() -> None:
    look = make_look(5)
    figure, axes = plots.attention_by_depth(look)
    assert [ax.get_title() for ax in axes] == ["image", *(f"Layer {number}" for number in range(5))]
    for ax, layer in zip(axes[1:], look.layers.values(), strict=True):
        assert_allclose(overlay(ax).ravel(), layer.mean[0, 1:], rtol=1e-6)
        assert not ax.patches
    assert figure.get_suptitle() == "Attention of the class token, by depth"
    look = make_look(5, prefix=4, class_token=False)
    figure, axes = plots.attention_by_depth(look)
    for ax, layer in zip(axes[1:], look.layers.values(), strict=True):
        assert_allclose(overlay(ax).ravel(), layer.mean.astype(float).mean(0)[4:], rtol=1e-6)
    assert "There is no class token: mean over all queries." in words(figure)
    assert "falls on 4 tokens that are no patches" in words(figure)
    assert figure.get_suptitle() == "Attention of all queries, on average, by depth"


def test_rollout_by_depth() -> None:
    look = make_look(6)
    figure, axes = plots.rollout_by_depth(look, query=(1, 1))
    _, expected = attention_rollout(look, (1, 1))
    for ax, row in zip(axes[1:], expected, strict=True):
        assert_allclose(overlay(ax).ravel(), row[1:])
        assert ax.get_xlabel().endswith(f"prefix {row[0]:.2f}")
    assert "Rollout from patch (1, 1): mean over heads and half an identity, multiplied from layer 0" in words(figure)
    _, axes = plots.rollout_by_depth(look, layers=[2])
    assert_allclose(overlay(axes[1]).ravel(), attention_rollout(look, "class")[1][2, 1:])


def test_the_column_with_m_below_it() -> None:
    look = make_look(6)
    layers = list(look.layers.values())
    place = 1 + 3 * 7 + 3  # the middle
    figure, axes = plots.column_by_depth(look)
    for number, (ax, layer) in enumerate(zip(axes[1:], layers, strict=True)):
        assert_allclose(overlay(ax).ravel(), layer.mean[1:, place])
        similarity = "–"
        if number:
            pairs = [(layers[number - 1].maps[h][:, place].astype(float), layer.maps[h][:, place]) for h in range(3)]
            cosines = [one @ other / (np.linalg.norm(one) * np.linalg.norm(other)) for one, other in pairs]
            similarity = f"{np.mean(cosines):.2f}"
        assert ax.get_xlabel() == f"M {similarity}\nmax {layer.mean[1:, place].max():.2g}"
        assert {patch.get_xy() for patch in ax.patches} == {(24, 24)}
    assert figure.get_suptitle() == "What patch (3, 3) contributes, by depth"
    figure, axes = plots.column_by_depth(look, "class", head=2, layers=[4])
    assert_allclose(overlay(axes[1]).ravel(), layers[4].maps[2][1:, 0])
    assert axes[1].get_xlabel().startswith(f"M {layers[4].similarity[2, 0]:.2f}\n")
    assert figure.get_suptitle() == "What the class token contributes, by depth"
    nothing = changed(look, similarity=np.full((3, 50), np.nan))
    assert plots.column_by_depth(nothing)[1][3].get_xlabel().startswith("M undefined")


def test_many_layers_are_thinned_evenly() -> None:
    _, axes = plots.column_by_depth(make_look(40, 1, (3, 3)))
    shown = [ax.get_title() for ax in axes[1:]]
    assert len(shown) == 13
    assert shown[0] == "Layer 0"
    assert shown[-1] == "Layer 39"


def test_maps_with_negative_values_are_coloured_about_0() -> None:
    look = make_look(3, signed=True)
    figure, axes = plots.attention_by_depth(look)
    over = axes[1].images[1]
    assert over.cmap.name == "PuOr_r"
    assert over.norm.vmin == -over.norm.vmax == -np.abs(overlay(axes[1])).max()
    assert figure.axes[-1].get_xlim() == (-1, 1)
    with pytest.raises(UsageError, match="were mixed after the softmax and are no probabilities"):
        plots.rollout_by_depth(look)


def test_uniform_attention_is_one_colour_and_a_masked_map_is_drawn() -> None:
    look = make_look(2)
    uniform = changed(look, mean=np.full((50, 50), 1 / 50, dtype=np.float32), maps={})
    _, axes = plots.attention_by_depth(uniform)
    assert (axes[1].images[1].norm.vmin, axes[1].images[1].norm.vmax) == (0, pytest.approx(0.02))
    empty = changed(look, mean=np.zeros((50, 50), dtype=np.float32))
    assert plots.render(plots.column_by_depth(empty)[0], dpi=30).startswith(b"\x89PNG")


def test_grey_pictures_of_any_proportions() -> None:
    look = replace(make_look(3, grid=(4, 8)), picture=picture(32, 64).mean(-1))
    _, axes = plots.attention_by_depth(look)
    assert axes[0].images[0].cmap.name == "gray"
    assert axes[1].images[1].get_extent() == [0, 64, 32, 0]
    _, axes = plots.column_by_depth(look, (3, 7))
    assert {patch.get_xy() for patch in axes[1].patches} == {(56, 24)}


def test_layers_that_do_not_suit_are_passed_over_unless_they_are_named() -> None:
    look = make_look(4)
    layers = dict(look.layers)
    layers["blocks.1.attn"] = replace(layers["blocks.1.attn"], grid=None, query_grid=None)
    mixed = replace(look, layers=layers)
    _, axes = plots.attention_by_depth(mixed)
    assert [ax.get_title() for ax in axes] == ["image", "Layer 0", "Layer 2", "Layer 3"]
    with pytest.raises(
        UsageError, match=r"The 50 keys of blocks\.1\.attn lie on no known grid, so its map has no place"
    ):
        plots.attention_by_depth(mixed, layers=[1])
    with pytest.raises(UsageError, match=r"queries of blocks\.1\.attn lie on no known grid, so a column"):
        plots.column_by_depth(mixed, layers=[1])
    nowhere = changed(look, grid=None, query_grid=None)
    with pytest.raises(UsageError, match=r"keys of blocks\.0\.attn lie on no known grid"):
        plots.attention_over_image(nowhere)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": (7, 0)}, r"\(7, 0\) lies outside the 7 x 7 patches of blocks\.0\.attn"),
        ({"query": 50}, r"blocks\.0\.attn has 50 queries, counted from 0; there is no 50"),
        ({"query": "cls"}, "'cls' is no token: give 'class'"),
        ({"query": True}, "True is no token"),
        ({"scale": "global"}, "scale='global' is unknown"),
        ({"heads": [3]}, r"blocks\.0\.attn has no head 3; it has 3"),
        ({"heads": range(9)}, "There is room for 6 heads beside each other, not 9"),
        ({"layers": "stages.*"}, "No layer is called 'stages"),
    ],
)
def test_what_is_not_there_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plots.attention_over_image(make_look(), **arguments)


def test_heads_that_were_not_kept_are_named() -> None:
    look = changed(make_look(), maps={})
    _, axes = plots.attention_over_image(look)
    assert axes.shape == (4, 1)
    with pytest.raises(UsageError, match=r"head 1 of blocks\.0\.attn was not kept, but the mean over heads only"):
        plots.attention_over_image(look, heads=[1])


def test_looks_load_no_torch() -> None:
    code = "import sys, collapse_probe.look, collapse_probe.rollout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
