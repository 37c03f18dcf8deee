"""The pipeline: right numbers on a real model, the same numbers however it is run, and a right verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from _models import _reference_dropped_maps, build, perturbed, unfused_twin
from _reference import (
    _reference_centred,
    _reference_columns,
    _reference_cosine,
    _reference_entropy,
    _reference_image_independent,
    _reference_similarity,
    peaked_maps,
)
from PIL import Image
from shared_data import shared_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import collapse_probe as cp
from collapse_probe.capture import NOT_COMPARED, AttentionMap, TokenLayout, capture
from collapse_probe.capture.attention_map import Stored
from collapse_probe.diagnosis import Thresholds, diagnose, is_uniform
from collapse_probe.errors import CaptureError, DamagedFileError, ImagesError, UsageError
from collapse_probe.loading import data_config, open_images
from collapse_probe.merging import readings
from collapse_probe.options import Options
from collapse_probe.streaming import Run
from tests.analysis_factory import hierarchy

IMAGES = torch.randn(14, 3, 32, 32, generator=torch.Generator().manual_seed(2))

needs_data = pytest.mark.skipif(
    shared_data() is None, reason="needs the development data (COLLAPSE_PROBE_DATA): a trained DeiT-Ti and photographs"
)


@pytest.fixture(scope="module")
def model():
    return build("vit_tiny_patch16_224").double()


@pytest.fixture(scope="module")
def analysis(model):
    return cp.analyze(model, IMAGES.double())


def assert_same_numbers(one, other, atol):
    pd.testing.assert_frame_equal(
        one.layers.select_dtypes("number"), other.layers.select_dtypes("number"), check_exact=False, atol=atol, rtol=0
    )
    for group, twin in zip(one.groups, other.groups, strict=True):
        for part, matrices in group.matrices.items():
            for name, values in matrices.items():
                np.testing.assert_allclose(
                    values, twin.matrices[part][name], atol=atol, rtol=0, err_msg=f"{part} {name}"
                )
        for name, values in group.arrays.items():
            if name != "histogram":
                np.testing.assert_allclose(values, twin.arrays[name], atol=atol, rtol=0, err_msg=name)
        assert (
            np.abs(group.arrays["histogram"] - twin.arrays["histogram"]).sum() <= 1e-3 * group.arrays["histogram"].sum()
        )


def test_numbers_are_those_of_the_unfused_model(model, analysis):
    maps = _reference_dropped_maps(unfused_twin("vit_tiny_patch16_224", model), IMAGES.double())
    maps = torch.stack(maps).numpy()
    for p in range(3):
        for q in range(3):
            values = np.array(
                [
                    [[_reference_cosine(maps[p, b, h, :, t], maps[q, b, h, :, t]) for t in range(17)] for h in range(3)]
                    for b in range(14)
                ]
            )
            assert analysis.similarity.iloc[p, q] == pytest.approx(values.mean(), abs=1e-12)
            group = analysis.groups[0]
            assert group.matrices["prefix"]["similarity"][p, q] == pytest.approx(values[..., 0].mean(), abs=1e-12)
            assert group.matrices["patch"]["similarity"][p, q] == pytest.approx(values[..., 1:].mean(), abs=1e-12)
            if p != q:
                error = values.mean((1, 2)).std(ddof=1) / np.sqrt(14)
                assert group.matrices["all"]["similarity_se"][p, q] == pytest.approx(error, abs=1e-12)
    entropy = -(maps * np.log(maps)).sum(-1).mean((1, 2, 3))
    np.testing.assert_allclose(analysis.layers["entropy"], entropy, atol=1e-12)
    assert analysis.layers["similarity_to_previous"].iloc[2] == analysis.similarity.iloc[1, 2]


def test_similarity_ratio_counts_columns_above_the_threshold(model):
    wide = cp.analyze(model, IMAGES.double(), threshold=0.5, nearest=2)
    maps = torch.stack(_reference_dropped_maps(unfused_twin("vit_tiny_patch16_224", model), IMAGES.double()))
    unit = maps / maps.norm(dim=-2, keepdim=True)
    above = (torch.einsum("pbhik,qbhik->pqbhk", unit, unit) > 0.5).double().mean((2, 3, 4))
    assert 0.05 < above[0, 1] < 0.95
    expected = [(above[0, 1] + above[0, 2]) / 2, (above[1, 0] + above[1, 2]) / 2, (above[2, 0] + above[2, 1]) / 2]
    np.testing.assert_allclose(wide.layers["similarity_ratio"], expected, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 3},
        {"batch_size": 5},
        {"batch_size": 8},
        {"tile_bytes": 1},
        {"tile_bytes": 40_000},
    ],
    ids=str,
)
def test_batch_and_tile_size_change_nothing(model, analysis, options):
    assert_same_numbers(cp.analyze(model, IMAGES.double(), **options), analysis, atol=1e-9)


def test_order_of_images_changes_nothing(model, analysis):
    order = torch.randperm(14, generator=torch.Generator().manual_seed(5))
    assert_same_numbers(cp.analyze(model, IMAGES.double()[order], batch_size=4), analysis, atol=1e-9)


def test_float32_stays_within_its_tolerance(analysis):
    single = build("vit_tiny_patch16_224")
    assert_same_numbers(cp.analyze(single, IMAGES), analysis, atol=2e-5)


def test_mixed_precision_stays_within_its_tolerance(analysis):
    single = build("vit_tiny_patch16_224")
    mixed = cp.analyze(single, IMAGES, amp=True)
    assert mixed.provenance["options"]["amp"]
    np.testing.assert_allclose(mixed.similarity, analysis.similarity, atol=0.02)


def test_reattention_applied_and_softmax():
    deepvit = build("deepvit_16b").double()
    applied = cp.analyze(deepvit, IMAGES.double(), batch_size=5)
    softmax = cp.analyze(deepvit, IMAGES.double(), attention="softmax")
    assert not applied.layers["is_probability"].any()
    assert softmax.layers["is_probability"].all()
    assert applied.similarity.to_numpy().min() < 0.9
    assert not np.allclose(applied.similarity, softmax.similarity, atol=0.01)
    np.testing.assert_allclose(applied.layers["entropy"], softmax.layers["entropy"], atol=1e-12)
    for result in (applied, softmax):
        assert result.provenance["mixed_after_softmax"] == [f"blocks.{number}.attn" for number in range(3)]


def test_uniform_maps_that_are_mixed_afterwards_are_not_called_a_mean():
    """Re-attention may enlarge what little they differ in; without it they are what multiplies the values."""
    plain, mixed = (
        cp.analyze(timm.create_model(name, img_size=32, depth=3).eval(), IMAGES, attention="softmax")
        for name in ("deepvit_vit_16b", "deepvit_16b")
    )
    assert plain.provenance["mixed_after_softmax"] == []
    assert "could be replaced by a mean" in plain.finding("uniform-attention").advice
    finding = mixed.finding("uniform-attention")
    assert "replaced by a mean" not in finding.advice
    assert "Set the queries to zero" in finding.advice


def test_loaders_and_tensors_agree(model):
    loader = DataLoader(TensorDataset(IMAGES.double(), torch.arange(14)), batch_size=6)
    np.testing.assert_allclose(
        cp.analyze(model, loader).similarity, cp.analyze(model, IMAGES.double()).similarity, atol=1e-12
    )


def test_the_model_is_left_as_it_was(model):
    model.blocks[1].train()
    modes = [module.training for module in model.modules()]
    cp.analyze(model, IMAGES.double())
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_layers_can_be_chosen(model):
    some = cp.analyze(model, IMAGES.double(), layers=["blocks.[12].*"])
    assert list(some.layers.index) == ["blocks.1.attn", "blocks.2.attn"]
    with pytest.raises(UsageError, match=r"No layer matches nothing\.\*\. Layers with attention: blocks\.0\.attn"):
        cp.analyze(model, IMAGES.double(), layers=["nothing.*"])


def test_layers_of_different_kind_are_not_compared():
    mixed = cp.analyze(build("vit_base_patch16_siglip_224"), IMAGES)
    assert [group.layers[-1] for group in mixed.groups] == ["blocks.2.attn", "attn_pool"]
    assert np.isnan(mixed.similarity.loc["blocks.0.attn", "attn_pool"])
    # a single query's columns are numbers, any two of which are alike: absent, not 1
    assert np.isnan(mixed.similarity.loc["attn_pool", "attn_pool"])
    assert mixed.layers.loc["attn_pool", "normalized_entropy"] < 1
    assert all("attn_pool" not in finding.layers for finding in mixed.findings)


def test_a_single_pattern_may_be_a_plain_string(model):
    assert list(cp.analyze(model, IMAGES.double(), layers="blocks.0*").layers.index) == ["blocks.0.attn"]


def test_a_compiled_or_wrapped_model_is_unwrapped(model, analysis):
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        assert_same_numbers(cp.analyze(wrapped, IMAGES.double()), analysis, atol=1e-12)


def test_images_of_several_sizes_say_so():
    class Flexible(nn.Module):
        def forward(self, x):
            tokens = x.flatten(2).mT[:, None]
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    batches = [torch.randn(4, 3, 4, 4), torch.randn(4, 3, 6, 6)]
    with pytest.raises(CaptureError, match="images of one size"):
        cp.analyze(Flexible(), batches)


def test_a_single_layer_has_nothing_to_compare_with():
    single = cp.analyze(build("vit_tiny_patch16_224", depth=1), IMAGES)
    assert codes(single) == {"not-comparable"}


def test_the_verdict_does_not_hang_on_the_order_of_groups():
    """A group in which nothing is wrong does not clear one in which attention collapses."""
    images = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    clean, broken = cp.analyze(copied_attention(4, 3), images), cp.analyze(copied_attention(4, 7), images)
    for first, second in ((clean, broken), (broken, clean)):
        tables = []
        for name, part in (("A", first), ("B", second)):
            table = part.layers.assign(group=name)
            table.index = [f"{name}.{layer}" for layer in table.index]
            tables.append(table)
        groups = [
            replace(part.groups[0], name=name, layers=list(table.index))
            for name, part, table in zip("AB", (first, second), tables, strict=True)
        ]
        both = cp.Analysis(pd.concat(tables), groups)
        found = {finding.code for finding in diagnose(both)}
        assert "attention-collapse" in found
        assert "healthy" not in found
        where = "A" if first is broken else "B"
        finding = next(finding for finding in diagnose(both) if finding.code == "attention-collapse")
        assert finding.title.startswith(f"Group {where} (token attention, in {where}.blocks): ")


def test_one_image_gives_a_verdict_without_undefined_numbers():
    result = cp.analyze(build("vit_tiny_patch16_224"), IMAGES[:1])
    assert "nan" not in " ".join(finding.evidence for finding in result.findings)
    assert "one image" in result.finding("healthy").evidence


def test_unreadable_files_at_the_very_end_count_too(tmp_path):
    """Files that fill no batch of their own: nothing is delivered after them, and they are counted all the same."""
    for name in range(20):
        Image.fromarray(np.full((32, 32, 3), 10 * name, np.uint8)).save(tmp_path / f"{name}.png")
    order = open_images(tmp_path, config=data_config(build("vit_tiny_patch16_224"))).paths
    for name in order[-2:]:
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(ImagesError, match="2 of 20 images could not be read"):
        cp.analyze(build("vit_tiny_patch16_224"), tmp_path, batch_size=2)


def test_a_model_is_a_module_a_name_or_a_path():
    with pytest.raises(UsageError, match="got a int"):
        cp.analyze(3, IMAGES)


class Padded(nn.Module):
    """Two layers that attend uniformly to the first four of sixteen tokens."""

    def forward(self, x):
        tokens = x.flatten(2).mT[:, None]
        mask = (torch.arange(16) < 4)[None]
        for _ in range(2):
            tokens = nn.functional.scaled_dot_product_attention(tokens * 0, tokens * 0, tokens, mask)
        return tokens


def test_masked_keys_do_not_count_into_the_largest_entropy():
    result = cp.analyze(Padded(), torch.randn(8, 3, 4, 4))
    np.testing.assert_allclose(result.layers["normalized_entropy"], 1)
    np.testing.assert_allclose(result.layers["entropy"], np.log(4))
    assert codes(result) == {"uniform-attention"}


def test_a_layer_beside_uniform_ones_is_not_called_alike():
    """Half of the blocks uniform: the verdict on the others rests on pairs of which neither is."""
    model = copied_attention(4, 3)
    with torch.no_grad():
        for block in model.blocks[:3]:
            block.attn.qkv.weight.mul_(0.01)
            block.attn.qkv.bias.zero_()
    result = cp.analyze(model, torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert result.layers["similarity_to_previous"].iloc[1] > 0.99
    assert result.finding("uniform-attention").layers == tuple(f"blocks.{i}.attn" for i in range(3))
    assert "attention-collapse" not in codes(result)
    assert "M 0.9" not in result.finding("healthy").evidence


def test_it_stops_when_it_is_precise_enough(model):
    many = torch.randn(64, 3, 32, 32, dtype=torch.float64)
    early = cp.analyze(model, many, batch_size=8, until_se=0.05)
    assert early.provenance["images"]["count"] < 64
    assert early.groups[0].matrices["all"]["similarity_se"].diagonal(1).max() <= 0.05


def test_progress_is_told(model):
    class Told:
        def __init__(self):
            self.calls = []

        def __call__(self, done, total):
            self.calls.append((done, total))

        def note(self, text):
            raise AssertionError(text)

    told = Told()
    cp.analyze(model, IMAGES.double(), batch_size=5, progress=told)
    assert told.calls == [(5, 14), (10, 14), (14, 14)]


# -- windows and stages ----------------------------------------------------------------------------------------------

SWIN = {"img_size": 56, "embed_dim": 24, "depths": (4, 2), "num_heads": (2, 4), "num_classes": 5}


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    return perturbed(timm.create_model("swin_tiny_patch4_window7_224", **SWIN), 0.1).double()


@pytest.fixture(scope="module")
def squares():
    return torch.randn(10, 3, 56, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def staged(swin, squares):
    return cp.analyze(swin, squares)


def test_stages_and_shifts_are_groups_of_their_own(staged):
    described = [(group.name, group.module, group.description) for group in staged.groups]
    assert described == [
        ("A", "layers.0.blocks", "2 layers, window, 4 windows of 49 tokens"),
        ("B", "layers.0.blocks", "2 layers, window (shifted), 4 windows of 49 tokens"),
        ("C", "layers.1.blocks", "2 layers, token, 49 tokens"),
    ]
    assert staged.layers["windows"].tolist() == [4, 4, 4, 4, 1, 1]
    assert staged.layers["partition"].tolist() == ["", "shifted", "", "shifted", "", ""]
    assert staged.layers["group"].tolist() == ["A", "B", "A", "B", "C", "C"]
    assert staged.provenance["images"]["count"] == 10


def test_numbers_of_windows_are_those_of_loops_over_all_maps(swin, squares, staged):
    with torch.inference_mode(), capture(swin) as captured:
        swin(squares)
    for group in staged.groups:
        maps = torch.stack([captured.maps[name].materialize() for name in group.layers]).numpy()
        columns = _reference_columns(maps, group.windows)[..., ::7]  # every seventh, for the sake of time
        m, c = _reference_similarity(columns), _reference_centred(columns)
        i = _reference_image_independent(columns[:, :4])
        by_token = group.arrays["similarity_by_token"]
        assert by_token.shape == (2, 2, group.windows * 49)
        np.testing.assert_allclose(by_token[..., ::7], m.mean((0, 3)), atol=1e-9)
        np.testing.assert_allclose(group.arrays["centred_by_token"][..., ::7], np.nanmean(c, (0, 3)), atol=1e-9)
        few = cp.analyze(swin, squares[:4], layers=group.layers)
        parts = few.groups[0].arrays["image_independent_by_token"]
        np.testing.assert_allclose(parts[..., ::7], i.mean(2), atol=1e-9)
        for name, layer in zip(group.layers, maps, strict=True):
            entropy = _reference_entropy(layer).reshape(10, -1).mean(1)
            assert staged.layers.loc[name, "entropy"] == pytest.approx(entropy.mean(), abs=1e-9)
            error = entropy.std(ddof=1) / np.sqrt(10)
            assert staged.layers.loc[name, "entropy_se"] == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3}, {"tile_bytes": 1}], ids=str)
def test_batch_and_tile_size_change_nothing_in_windows(swin, squares, staged, options):
    assert_same_numbers(cp.analyze(swin, squares, **options), staged, atol=1e-9)


def synthetic(*layers):
    """A batch of made-up maps: (name, tensor or fields of the map)."""
    maps = {}
    for name, tensor, fields in layers:
        settings = {"kind": "token", "layout": TokenLayout()} | fields
        maps[name] = AttentionMap(name, source=Stored(torch.as_tensor(tensor)), **settings)
    return SimpleNamespace(maps=maps, not_captured={}, verification=None, features={}, no_features={}, head_norms={})


def run_on(*batches):
    run = Run(Options(), torch.device("cpu"), None, None)
    seen = 0
    for batch in batches:
        images = min(item.images for item in batch.maps.values())
        run._take(batch, torch.arange(seen, seen + images), None)
        seen += images
    run._feed(flush=True)
    return readings([run.partial()])


def test_images_are_counted_whatever_the_windows():
    maps = peaked_maps(layers=2, images=24, queries=4, keys=4)
    window = {"kind": "window", "windows": 4, "partition": "grid"}
    batches = [
        synthetic(("a", maps[0][start:stop], window), ("b", maps[1][start:stop], window), ("c", token, {}))
        for start, stop, token in ((0, 12, maps[0][:3]), (12, 24, maps[0][3:6]))
    ]
    result = run_on(*batches)
    assert [(group.layers, group.windows, group.partition) for group in result.groups] == [
        (["a", "b"], 4, "grid"),
        (["c"], 1, ""),
    ]
    expected = _reference_similarity(_reference_columns(maps, 4)).mean((0, 3, 4))
    np.testing.assert_allclose(result.groups[0].matrix(), expected, atol=1e-12)


def test_batches_of_other_windows_are_refused():
    maps = peaked_maps(layers=1, images=8)[0]
    batches = [synthetic(("a", maps, {"kind": "window", "windows": windows})) for windows in (4, 2)]
    with pytest.raises(CaptureError, match="images of one size"):
        run_on(*batches)


def test_layers_that_disagree_on_the_number_of_images_say_so():
    maps = peaked_maps(layers=2, images=8)
    batch = synthetic(("a", maps[0], {}), ("b", maps[1], {"kind": "window", "windows": 2}))
    with pytest.raises(CaptureError, match="how many images a batch held: b attended for 4 and a for 8"):
        run_on(batch)


@pytest.mark.parametrize("kind", list(NOT_COMPARED))
def test_kinds_that_are_not_compared_are_listed_with_their_reason(kind):
    maps = peaked_maps(layers=3, images=4)
    result = run_on(synthetic(("odd", maps[0][:1], {"kind": kind}), ("a", maps[1], {}), ("b", maps[2], {})))
    assert result.not_captured == [{"layer": "odd", "reason": NOT_COMPARED[kind]}]
    assert list(result.layers.index) == ["a", "b"]


def test_softmax_heads_of_different_number_leave_entropy_by_head_absent():
    maps = peaked_maps(layers=2, images=4)
    softmaxes = [peaked_maps(layers=1, images=4, heads=heads)[0] for heads in (4, 3)]
    layers = [
        (name, own, {"origin": Stored(torch.tensor(softmax))})
        for name, own, softmax in zip("ab", maps, softmaxes, strict=True)
    ]
    result = run_on(synthetic(*layers))
    assert "entropy_by_head" not in result.groups[0].arrays
    assert result.layers.loc["a", "entropy"] == pytest.approx(_reference_entropy(softmaxes[0]).mean(), abs=1e-12)


def test_an_analysis_saved_before_there_were_windows_can_be_read(analysis, staged, tmp_path):
    for name, result in (("one", analysis), ("several", staged)):
        folder = result.save(tmp_path / name)
        data = json.loads((folder / "analysis.json").read_text())
        data["schema_version"] = 1
        for group in data["groups"]:
            del group["windows"], group["partition"]
        for field in ("windows", "partition"):
            place = data["layers"]["columns"].index(field)
            for row in (data["layers"]["columns"], data["layers"]["dtypes"], *data["layers"]["rows"]):
                del row[place]
        (folder / "analysis.json").write_text(json.dumps(data))
        again = cp.Analysis.load(folder)
        assert list(again.layers.columns) == list(result.layers.columns)
        assert (again.layers["windows"] == 1).all()
        assert (again.layers["partition"] == "").all()
        assert all(group.windows == 1 and group.partition == "" for group in again.groups)
    assert_same_numbers(cp.Analysis.load(tmp_path / "one"), analysis, atol=0)
    data["schema_version"] = 4
    (folder / "analysis.json").write_text(json.dumps(data))
    with pytest.raises(DamagedFileError, match="schema version 4; this version of collapse_probe reads 1, 2, 3"):
        cp.Analysis.load(folder)


def test_save_and_load(analysis, tmp_path):
    again = cp.Analysis.load(analysis.save(tmp_path / "run"))
    pd.testing.assert_frame_equal(again.layers, analysis.layers)
    pd.testing.assert_frame_equal(again.similarity, analysis.similarity)
    assert_same_numbers(again, analysis, atol=0)
    assert again.findings == analysis.findings
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "analysis.json",
        "arrays.npz",
        "layers.csv",
        "similarity.csv",
    ]
    data = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert data["schema_version"] == 3
    assert data["provenance"]["images"]["count"] == 14
    table = pd.read_csv(tmp_path / "run" / "similarity.csv", index_col="layer")
    np.testing.assert_allclose(table, analysis.similarity)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 1000000; got 0"),
        ({"workers": -1}, "workers must be a whole number from 0 to 1000; got -1"),
        ({"threshold": 1.5}, r"threshold must lie within -1\.\.1"),
        ({"until_se": 0.0}, "until_se must lie between 0 and 1"),
        ({"attention": "raw"}, "'applied' or 'softmax'; got 'raw'"),
        ({"amp_dtype": "int8"}, "'bfloat16' or 'float16'"),
        ({"device": "warp"}, "device 'warp' is not known"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"batch_size": "4"}, "got '4'"),
        ({"threshold": "high"}, "threshold must be a number; got 'high'"),
        ({"arch": "vit_tiny_patch16_224"}, "the model given is a module"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_options(model, option, message):
    with pytest.raises(UsageError, match=message):
        cp.analyze(model, IMAGES.double(), **option)


def test_a_model_without_attention_says_so():
    with pytest.raises(CaptureError, match="No attention was seen"):
        cp.analyze(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), IMAGES)


def test_images_that_do_not_fit():
    with pytest.raises(ImagesError, match=r"\(3, 16, 16\)"):
        cp.analyze(build("vit_tiny_patch16_224"), torch.zeros(2, 3, 16, 16))


# -- the verdict -----------------------------------------------------------------------------------------------------


def codes(result):
    return {finding.code for finding in result.findings}


class Tokens(nn.Module):
    """Patches of an image through an `nn.TransformerEncoder`, whose layers start as copies of each other."""

    def __init__(self, width=96, heads=4, **kwargs):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True, **kwargs)
        self.encoder = nn.TransformerEncoder(layer, 5, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.embed(x).flatten(2).mT).mean(1)


@pytest.mark.parametrize("width", [48, 192, 384, 1024])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_vits_are_untrained_and_not_collapsed(width, seed):
    torch.manual_seed(seed)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=width, depth=4, num_heads=width // 16
    )
    result = cp.analyze(network, torch.randn(8, 3, 64, 64))
    assert codes(result) == {"uniform-attention"}
    assert result.findings[0].severity == "problem"
    assert "untrained" in result.findings[0].title


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"width": 256, "heads": 8}], ids=str)
def test_a_random_transformer_encoder_is_untrained_although_its_layers_are_copies(options):
    torch.manual_seed(0)
    result = cp.analyze(Tokens(**options), torch.randn(8, 3, 48, 48))
    assert result.layers["centred_to_previous"].iloc[1:].min() > 0.5  # M and C alone would call it collapsed
    assert codes(result) == {"uniform-attention"}


def test_a_random_deepvit_is_untrained():
    torch.manual_seed(0)
    network = timm.create_model("deepvit_16b", depth=4, img_size=64, patch_size=8, embed_dim=96, num_heads=4)
    assert "uniform-attention" in codes(cp.analyze(network, torch.randn(8, 3, 64, 64)))


def copied_attention(first, last, depth=8, seed=0):
    """Blocks first..last attend with the same weights on the same tokens: each adds nothing to the residual stream."""
    model = build("vit_tiny_patch16_224", depth=depth, img_size=64, embed_dim=96, num_heads=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.attn.qkv.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for index in range(first, last + 1):
            block = model.blocks[index]
            block.attn.load_state_dict(model.blocks[first].attn.state_dict())
            block.norm1.load_state_dict(model.blocks[first].norm1.state_dict())
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.mul_(1e-3)
                layer.bias.zero_()
    return model


def test_copied_blocks_are_found_with_their_onset():
    images = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    clean = cp.analyze(copied_attention(4, 3), images)
    assert not {"attention-collapse", "uniform-attention"} & codes(clean)
    broken = cp.analyze(copied_attention(4, 7), images)
    finding = broken.finding("attention-collapse")
    assert finding.layers == ("blocks.5.attn", "blocks.6.attn", "blocks.7.attn")
    assert "from blocks.4.attn on" in finding.title
    assert finding.severity == "problem"
    assert "uniform-attention" not in codes(broken)


def test_copied_heads_are_found_where_they_are():
    model = copied_attention(4, 3)
    with torch.no_grad():
        qkv = model.blocks[2].attn.qkv
        for part in (qkv.weight, qkv.bias):
            by_head = part.view(3, 4, 24, -1)
            by_head[:2, 1:] = by_head[:2, :1]
    result = cp.analyze(model, torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    finding = result.finding("head-redundancy")
    assert finding.layers == ("blocks.2.attn",)
    assert result.layers.loc["blocks.2.attn", "head_diversity"] == pytest.approx(0, abs=1e-5)
    assert "attention-collapse" not in codes(result)


class Windowed(nn.Module):
    """Three layers that attend uniformly within windows, to a quarter of the keys where the window is masked."""

    def __init__(self, masked):
        super().__init__()
        quarter = torch.arange(16) // 4
        self.mask = torch.stack([(quarter[:, None] == quarter) | (window >= masked) for window in range(4)])

    def forward(self, x):
        tokens = x.reshape(len(x), 3, 4, 16).permute(0, 2, 3, 1).flatten(0, 1)[:, None]
        mask = self.mask.repeat(len(x), 1, 1)[:, None]
        for _ in range(3):
            tokens = nn.functional.scaled_dot_product_attention(tokens * 0, tokens * 0, tokens, mask)
        return tokens.unflatten(0, (len(x), 4))


@pytest.mark.parametrize("masked", [0, 1, 4])
def test_uniform_attention_within_masked_windows_is_uniform(masked):
    result = cp.analyze(Windowed(masked), torch.randn(8, 3, 8, 8))
    assert result.groups[0].windows == 4
    np.testing.assert_allclose(result.layers["normalized_entropy"], 1)
    np.testing.assert_allclose(result.layers["relative_variation"], masked / 4 * np.sqrt(3 / 4), atol=1e-7)
    assert codes(result) == {"uniform-attention"}
    assert ("what masks add" in result.findings[0].threshold) == (masked == 4)


def test_peaked_attention_within_masked_windows_is_not_uniform():
    """What masks add to r does not excuse everything."""
    table = hierarchy().layers.iloc[:1].assign(keys=16, entropy=0.95 * np.log(4), normalized_entropy=0.95)
    limits = Thresholds()
    for own in (0.3, 0.54, 0.56, 0.9):
        r = np.sqrt(1 - (1 - own**2) / 4)  # a quarter of the queries sees each key
        assert is_uniform(table.assign(relative_variation=r), limits).all() == (own < limits.uniform_variation)


def alike(analysis, *layers):
    analysis.layers.loc[list(layers), "similarity_to_previous"] = 0.95
    analysis.layers.loc[list(layers), "similar_to_previous"] = True
    return analysis


def test_each_group_is_judged_and_named():
    assert [finding.code for finding in diagnose(hierarchy())] == ["healthy"]
    evidence = diagnose(hierarchy())[0].evidence
    assert "most alike neighbours are layers.1.blocks." in evidence
    assert evidence.endswith("2 of 10 layers have no other to be compared with")
    broken = alike(hierarchy(), "layers.1.blocks.3.attn", "layers.1.blocks.5.attn", "layers.2.blocks.1.attn")
    found = diagnose(broken)
    assert [finding.code for finding in found] == ["attention-collapse"] * 2
    assert found[0].title.startswith(
        "Group D (window attention, shifted, in layers.1.blocks): Attention collapses across layers"
    )
    assert "from layers.1.blocks.1.attn on" in found[0].title
    assert "2 of 3 blocks" in found[0].evidence
    assert found[1].title.startswith("Group E (token attention, in layers.2.blocks): ")
    assert [finding.severity for finding in found] == ["warning"] * 2  # 3 of 10 layers
    more = diagnose(alike(broken, "layers.1.blocks.4.attn"))
    assert [finding.severity for finding in more] == ["problem"] * 3


@pytest.mark.parametrize("kind", ["class", "pooling", "cross"])
def test_other_kinds_stay_out_of_the_verdict(kind):
    result = alike(hierarchy(), "layers.2.blocks.1.attn")
    result.groups[4].kind = kind
    result.layers.loc[result.groups[4].layers, ["normalized_entropy", "cross_head_similarity"]] = 0.999
    assert [finding.code for finding in diagnose(result)] == ["healthy"]


def test_what_is_said_of_single_layers_is_said_of_all_groups_together():
    result = hierarchy()
    uniform = ["layers.0.blocks.0.attn", "layers.2.blocks.1.attn"]
    result.layers.loc[uniform, "normalized_entropy"] = 0.99
    result.layers.loc[uniform, "relative_variation"] = 0.2
    redundant = ["layers.0.blocks.1.attn", "layers.2.blocks.0.attn"]
    result.layers.loc[redundant, ["cross_head_similarity", "centred_cross_head_similarity"]] = 0.95
    found = {finding.code: finding for finding in diagnose(result)}
    assert found.keys() == {"uniform-attention", "head-redundancy", "healthy"}
    assert found["uniform-attention"].layers == tuple(uniform)
    assert found["uniform-attention"].severity == "note"
    assert "2 of 10 layers" in found["uniform-attention"].evidence
    assert found["head-redundancy"].layers == tuple(redundant)
    assert found["head-redundancy"].severity == "note"
    assert "of 3 to 6 heads" in found["head-redundancy"].evidence
    result.layers["normalized_entropy"], result.layers["relative_variation"] = 0.99, 0.2
    (finding,) = diagnose(result)
    assert (finding.code, finding.severity) == ("uniform-attention", "problem")
    assert "untrained" in finding.title


def test_groups_of_single_layers_are_not_comparable_whatever_else_is_said_of_them():
    result = hierarchy()
    result.groups = result.groups[:2]
    result.layers = result.layers.iloc[:2]
    assert {finding.code for finding in diagnose(result)} == {"not-comparable"}
    result.layers[["cross_head_similarity", "centred_cross_head_similarity"]] = 0.95
    assert {finding.code for finding in diagnose(result)} == {"not-comparable", "head-redundancy"}
    result.layers["normalized_entropy"], result.layers["relative_variation"] = 0.99, 0.2
    assert {finding.code for finding in diagnose(result)} == {"uniform-attention"}


def test_nan_is_reported_and_poisons_nothing_else():
    model = build("vit_tiny_patch16_224")
    images = IMAGES.clone()
    images[3] = torch.nan
    result = cp.analyze(model, images)
    finding = result.finding("non-finite")
    assert finding.severity == "problem"
    assert result.similarity.notna().all().all()
    np.testing.assert_allclose(
        result.similarity, cp.analyze(model, IMAGES[[i for i in range(14) if i != 3]]).similarity, atol=1e-6
    )


# -- a trained model on photographs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deit():
    return cp.load_model(shared_data() / "deit_tiny_patch16_224_in1k.safetensors", arch="deit_tiny_patch16_224")


@pytest.fixture(scope="module")
def photographs():
    return shared_data() / "imagenet_sample"


@needs_data
def test_trained_deit_on_photographs(deit, photographs):
    result = cp.analyze(deit, photographs)
    adjacent = result.layers["similarity_to_previous"].to_numpy()[1:]
    # measured apart from this code: rises from about 0.3 at blocks 2-3 to about 0.9 at blocks 11-12
    published = [0.50, 0.33, 0.32, 0.59, 0.53, 0.61, 0.68, 0.58, 0.69, 0.80, 0.89]
    np.testing.assert_allclose(adjacent, published, atol=0.03)
    excess = result.layers["excess_to_previous"].to_numpy()[1:]
    assert (excess > 0).all()
    assert excess.max() < 0.15
    assert excess[-1] < 0.07
    assert result.layers["similarity_to_previous_se"].max() < 0.01
    assert codes(result) == {"healthy"}
    assert result.provenance["images"]["count"] == 100


@needs_data
def test_trained_deit_agrees_with_loops_in_float64(deit, photographs):
    """From the same captured queries and keys, and in its means with the maps of the unfused model."""
    from collapse_probe.metrics import CrossLayerSimilarity

    images = next(open_images(photographs, config=data_config(deit), batch_size=4, num_samples=4).batches()).images
    with torch.inference_mode(), capture(deit) as captured:
        deit(images)
    metric = CrossLayerSimilarity()
    metric.update(captured.maps)
    by_token = metric.compute()["similarity_by_token"].numpy()
    by_head = metric.compute()["similarity_by_head"].numpy()
    maps = {}
    for name, item in captured.maps.items():
        logits = item.source.q.double() @ item.source.k.double().mT * item.source.scale
        exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
        maps[name] = (exponentials / exponentials.sum(-1, keepdim=True)).numpy()
    names = list(maps)
    for p, q in ((0, 1), (1, 2), (3, 9), (10, 11)):
        one, other = maps[names[p]], maps[names[q]]
        values = np.array(
            [
                [[_reference_cosine(one[b, h, :, t], other[b, h, :, t]) for t in range(0, 197, 14)] for h in range(3)]
                for b in range(4)
            ]
        )
        np.testing.assert_allclose(by_token[p, q, 0:197:14], values.mean((0, 1)), atol=1e-5)
        whole = np.einsum("bhit,bhit->bht", one, other) / np.sqrt((one**2).sum(2) * (other**2).sum(2))
        np.testing.assert_allclose(by_head[p, q], whole.mean((0, 2)), atol=1e-5)
    timm.layers.set_fused_attn(False)
    try:
        twin = timm.create_model("deit_tiny_patch16_224").eval()
    finally:
        timm.layers.set_fused_attn(True)
    twin.load_state_dict(deit.state_dict())
    for name, dropped in zip(names, _reference_dropped_maps(twin, images), strict=True):
        np.testing.assert_allclose(maps[name], dropped.numpy(), atol=2e-5)


@needs_data
def test_workers_change_nothing(deit, photographs):
    double = timm.create_model("deit_tiny_patch16_224", depth=3).eval()
    double.load_state_dict(deit.state_dict(), strict=False)
    one = cp.analyze(double, photographs, num_samples=12, batch_size=4)
    two = cp.analyze(double, photographs, num_samples=12, batch_size=4, workers=2)
    assert_same_numbers(one, two, atol=1e-9)


@needs_data
def test_a_random_deit_is_untrained(photographs):
    result = cp.analyze("deit_tiny_patch16_224", photographs, pretrained=False, num_samples=16)
    assert codes(result) == {"uniform-attention"}
    assert result.layers["similarity_to_previous"].iloc[1:].min() > 0.98


def test_perturbed_is_not_uniform():
    """The helper that all these tests rest on does what its name says."""
    result = cp.analyze(perturbed(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)), IMAGES)
    assert "uniform-attention" not in codes(result)
