"""Models compared on the same images: identical ones differ by nothing, others by what naive references say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import collapse_probe as cp
from collapse_probe import plots
from collapse_probe.cli.app import app
from collapse_probe.comparison import Comparison, distinct, folder_names
from collapse_probe.errors import DamagedFileError, UsageError
from collapse_probe.loading import open_images
from collapse_probe.metrics.functional import linear_cka
from collapse_probe.report import render_comparison
from tests.analysis_factory import make_analysis, make_full, two_groups
from tests.plots.legibility import faults
from tests.shared_data import shared_data

DATA = shared_data()


def vit(depth: int = 3, seed: int = 0, heads: int = 2, width: int = 32, patch: int = 8) -> nn.Module:
    """A small ViT whose attention is far from uniform."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads,
        num_classes=0,
    )  # fmt: skip
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 12
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def in_order(images: Tensor) -> Tensor:
    """The images in the order in which an analysis takes them."""
    return images[list(open_images(images, config={}).indices)]


@pytest.fixture(scope="module")
def compared(images: Tensor) -> Comparison:
    models = {"a": vit(3, 0), "again": vit(3, 0), "other": vit(5, 1, 4)}
    return cp.compare(models, images, batch_size=16, metrics="fast,cka")


def test_identical_models_differ_by_nothing(compared: Comparison) -> None:
    table = compared.differences["again"]
    assert len(table) > 50
    assert (table["difference"] == 0).all()
    assert (table["se"].dropna() == 0).all()
    assert (table["p_adjusted"].dropna() == 1).all()
    cross = compared.cross[0]
    assert np.diagonal(cross.matrices["cka"]) == pytest.approx(1, abs=1e-9)
    for reading in ("similarity", "centred"):
        assert np.diagonal(cross.matrices[reading]) == pytest.approx(1, abs=1e-5)
        assert cross.matrices[reading] == pytest.approx(cross.matrices[reading].T, abs=1e-5)
    assert cross.matrix("cka").shape == (3, 3)


def test_each_model_reads_as_it_does_alone(compared: Comparison, images: Tensor) -> None:
    alone = cp.analyze(vit(5, 1, 4), images, batch_size=40, metrics="fast,cka")
    there = compared.analyses["other"]
    for name in ("similarity_to_previous", "head_diversity", "normalized_entropy", "cka_to_previous"):
        assert there.layers[name].to_numpy() == pytest.approx(alone.layers[name].to_numpy(), abs=1e-6, nan_ok=True)


def _features(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What each block gives out, by plain hooks."""
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _i, output: found.append(output)) for block in model.blocks]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def _reference_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Attention from queries and keys, by hand, in float64: mean over heads `[B, Q, K]` of each block."""
    found = []
    model = model.double()
    with torch.no_grad():
        x = model.pos_drop(model._pos_embed(model.patch_embed(images.double())))
        for block in model.blocks:
            attention = block.attn
            b, n, c = x.shape
            qkv = attention.qkv(block.norm1(x)).reshape(b, n, 3, attention.num_heads, c // attention.num_heads)
            q, k, _ = qkv.permute(2, 0, 3, 1, 4)
            found.append((q @ k.transpose(-2, -1) * attention.scale).softmax(-1).mean(1))
            x = block(x)
    return found


def test_cka_between_models_against_hooks_and_the_formula(compared: Comparison, images: Tensor) -> None:
    """HSIC averaged over units of eight images before the ratio is taken (Nguyen et al., eq. 3)."""
    images = in_order(images)
    own, other = _features(vit(3, 0), images), _features(vit(5, 1, 4), images)
    for row, a in enumerate(own):
        for column, b in enumerate(other):
            both, self_a, self_b = (
                sum(float(_hsic(x[at : at + 8], y[at : at + 8])) for at in range(0, 40, 8))
                for x, y in ((a, b), (a, a), (b, b))
            )
            expected = both / math.sqrt(self_a * self_b)
            assert compared.cross[1].matrices["cka"][row, column] == pytest.approx(expected, abs=1e-5)
    whole = linear_cka(own[0].flatten(1), other[0].flatten(1))
    assert compared.cross[1].matrices["cka"][0, 0] == pytest.approx(float(whole), abs=0.25)


def _hsic(x: Tensor, y: Tensor) -> float:
    """Unbiased HSIC of one unit of images, in loops."""
    n = len(x)
    gram = [(item.flatten(1).double() @ item.flatten(1).double().T) for item in (x, y)]
    for item in gram:
        item.fill_diagonal_(0)
    a, b = gram
    trace = sum(float(a[i, j] * b[j, i]) for i in range(n) for j in range(n))
    rows = sum(float(a[:, j].sum() * b[j].sum()) for j in range(n))
    return (trace + float(a.sum() * b.sum()) / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


@pytest.mark.parametrize("reading", ["similarity", "centred"])
def test_maps_between_models_against_loops(compared: Comparison, images: Tensor, reading: str) -> None:
    own, other = _reference_maps(vit(3, 0), images), _reference_maps(vit(5, 1, 4), images)
    found = compared.cross[1].matrices[reading]
    assert compared.cross[1].images[reading] == 40
    for row, a in enumerate(own):
        for column, b in enumerate(other):
            values = []
            for image in range(40):
                for token in range(a.shape[2]):
                    x, y = a[image, :, token], b[image, :, token]
                    if reading == "centred":
                        x, y = x - x.mean(), y - y.mean()
                    values.append(float(x @ y / (x.norm() * y.norm())))
            assert found[row, column] == pytest.approx(np.mean(values), abs=2e-5)


def test_errors_between_models_are_those_of_groups(images: Tensor) -> None:
    """The jackknife over groups of equal size is the standard error of the mean of the groups."""
    found = cp.compare({"a": vit(2, 0), "b": vit(2, 3)}, images, groups=5, metrics="cross_layer_similarity")
    means = []
    for group in range(5):
        part = in_order(images)[8 * group : 8 * group + 8]
        alone = cp.compare({"a": vit(2, 0), "b": vit(2, 3)}, part, metrics="cross_layer_similarity")
        means.append(alone.cross[0].matrices["similarity"])
    expected = np.std(means, axis=0, ddof=1) / math.sqrt(5)
    assert found.cross[0].matrices["similarity_se"] == pytest.approx(expected, rel=1e-4)
    assert "token features" in found.cross[0].absent["cka"]


def test_maps_over_other_tokens_are_not_compared(images: Tensor) -> None:
    found = cp.compare({"a": vit(), "b": vit(patch=16)}, images[:16], metrics="fast")
    assert "17 queries and 17 keys and 5 queries and 5 keys" in found.cross[0].absent["similarity"]
    assert "cka" in found.cross[0].matrices
    with pytest.raises(UsageError, match="over other tokens"):
        found.cross[0].matrix("similarity")
    assert found.differences["b"]["se"].isna().all()
    assert any("4 groups or more" in note for note in found.notes)


def test_the_budget_bounds_what_is_remembered(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collapse_probe.across_models.Remembered.__init__.__defaults__", (3 * 3 * 17 * 17 * 4,))
    found = cp.compare({"a": vit(), "b": vit(3, 1)}, images, groups=5, metrics="cross_layer_similarity")
    assert found.cross[0].images["similarity"] == 15


def test_saved_comparisons_come_back(compared: Comparison, tmp_path: Path) -> None:
    compared.save(tmp_path / "run")
    back = Comparison.load(tmp_path / "run")
    assert list(back.analyses) == ["a", "again", "other"]
    for label, table in compared.differences.items():
        for name in table:
            if table[name].dtype == np.float64:
                assert back.differences[label][name].to_numpy() == pytest.approx(table[name].to_numpy(), nan_ok=True)
    for one, two in zip(compared.cross, back.cross, strict=True):
        assert one.matrices.keys() == two.matrices.keys()
        for name, values in one.matrices.items():
            assert two.matrices[name] == pytest.approx(values, nan_ok=True)
    assert render_comparison(back)
    (tmp_path / "run" / "comparison.json").write_text("{}")
    with pytest.raises(DamagedFileError, match="does not hold a comparison"):
        Comparison.load(tmp_path / "run")


def test_saved_analyses_are_compared_without_models() -> None:
    first, second = make_full(make_analysis()), make_full(make_analysis(24, 6))
    found = cp.compare([first, second])
    assert not found.paired
    assert found.cross == []
    assert "cannot be paired" in found.notes[0]
    assert len(found.differences) == 1
    assert found._repr_html_()
    assert "against" in repr(found)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([], "Between 2 and 4"),
        (["digits_vit_24b"], "Between 2 and 4"),
        (["a"] * 5, "Between 2 and 4"),
        ("digits_vit_24b", "several models"),
        ([make_analysis(), "digits_vit_24b"], "saved analysis and others are models"),
    ],
)
def test_what_cannot_be_compared_is_refused(models: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cp.compare(models)


@pytest.mark.parametrize("groups", [3, 1001, 8.0, True])
def test_groups_out_of_range(groups: Any) -> None:
    with pytest.raises(UsageError, match="groups must be"):
        cp.compare([vit(), vit()], torch.zeros(8, 3, 32, 32), groups=groups)


def test_loaders_cannot_be_dealt_out() -> None:
    with pytest.raises(UsageError, match="folder or a tensor"):
        cp.compare([vit(), vit()], [torch.zeros(8, 3, 32, 32)])


def test_labels_and_folders_are_distinct() -> None:
    assert distinct(["x", "x", "x (2)", "x"]) == ["x", "x (2)", "x (2) (2)", "x (3)"]
    assert folder_names(["a/b", "a?b", "../..", "é"]) == {
        "a/b": "a_b",
        "a?b": "a_b_2",
        "../..": "model",
        "é": "model_4",
    }


def test_figures_of_a_comparison(compared: Comparison) -> None:
    figure, axes = plots.cross_similarity(compared.cross[1])
    assert len(axes) == 3
    assert axes[0].get_xlabel() == "Block of other"
    assert plots.render(figure)
    figure, ax = plots.differences(compared, where="last third")
    assert {label.get_text() for label in ax.get_yticklabels()} >= {"Head diversity", "Attention entropy"}
    with pytest.raises(UsageError, match="where='nowhere'"):
        plots.differences(compared, where="nowhere")


@pytest.mark.parametrize("width", [None, "one-column", "two-column"])
def test_figures_of_a_comparison_can_be_read(compared: Comparison, width: str | None) -> None:
    with plots.figure_style(width):
        figures = [plots.cross_similarity(compared.cross[1])[0], plots.differences(compared)[0]]
    for figure in figures:
        figure.set_dpi(150)
        assert not faults(figure), faults(figure)


def test_the_page_says_what_sets_them_apart(compared: Comparison) -> None:
    page = render_comparison(compared)
    assert "What sets them apart?" in page
    assert "<script" not in page
    for label in ("again", "other"):
        assert f"{label} against a" in page
    assert "jackknife" in page
    assert "What sets them apart?" not in render_comparison(compared.analyses)


def test_groups_of_windows_have_no_maps_to_compare() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=112, depths=(2, 2), num_heads=(2, 4), embed_dim=16
    )
    other = timm.create_model("vit_tiny_patch16_224", img_size=112, patch_size=16, embed_dim=32, depth=2, num_heads=2)
    pixels = torch.randn(8, 3, 112, 112)
    found = cp.compare({"vit": other, "swin": swin}, pixels, metrics="fast")
    assert "windows" in found.cross[0].absent["similarity"]
    assert found.cross[0].matrices["cka"].shape[0] == 2


def test_the_command_writes_everything_or_compares_what_is_saved(tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    words = ["compare", "digits_vit_24b", "digits_deepvit_24b", "--num-samples", "32", "-q", "--out", str(run)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert "digits_deepvit_24b against digits_vit_24b" in done.stdout
    assert "CKA of token features at equal relative depth" in done.stdout
    names = {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
    assert {"report.html", "differences.csv", "comparison.json", "digits_vit_24b/analysis.json"} <= names
    assert "digits_vit_24b/report.html" in names
    saved = [str(run / name) for name in ("digits_vit_24b", "digits_deepvit_24b")]
    done = CliRunner().invoke(app, ["compare", *saved, "--out", str(again)])
    assert done.exit_code == 0, done.stderr
    assert "cannot be paired" in done.stdout.replace("\n", " ")
    assert (again / "report.html").is_file()


def test_bad_models_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"nothing")
    done = CliRunner().invoke(app, ["compare", "digits_vit_24b", str(bad), "-q"])
    assert done.exit_code == 3
    assert "bad" in done.stderr
    assert CliRunner().invoke(app, ["compare", "digits_vit_24b"]).exit_code == 2
    mixed = make_full(two_groups()).save(tmp_path / "saved")
    done = CliRunner().invoke(app, ["compare", "digits_vit_24b", str(mixed), "-q"])
    assert done.exit_code == 2
    assert "saved analysis" in done.stderr


@pytest.mark.sweep
@pytest.mark.skipif(DATA is None, reason="the trained DeiT-Ti and photographs are not at hand")
def test_trained_against_random_tells_the_true_story() -> None:
    """An untrained network has uniform attention, higher raw M, and next to nothing of it is of the image."""
    assert DATA is not None
    trained = cp.load_model(DATA / "deit_tiny_patch16_224_in1k.safetensors", "deit_tiny_patch16_224")
    random = cp.load_model("deit_tiny_patch16_224", pretrained=False)
    found = cp.compare({"trained": trained, "random": random}, DATA / "imagenet_sample", num_samples=64, batch_size=16)
    table = found.differences["random"].set_index(["reading", "where"])
    for reading, sign in (("normalized_entropy", 1), ("similarity_to_previous", 1), ("relative_variation", -1)):
        row = table.loc[(reading, "all blocks")]
        assert sign * row["difference"] > 0
        assert row["p_adjusted"] < 0.001
    assert found.analyses["random"].finding("untrained") or any(
        "train" in item.title for item in found.analyses["random"].findings
    )
    assert np.nanmax(found.cross[0].matrices["cka"][6:, 6:]) < 0.6
