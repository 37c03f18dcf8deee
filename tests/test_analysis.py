"""The pipeline: right numbers on a real model, the same numbers however it is run, and a right verdict."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from _models import _reference_dropped_maps, build, perturbed, unfused_twin
from _reference import _reference_cosine
from PIL import Image
from shared_data import shared_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import collapse_probe as cp
from collapse_probe.capture import capture
from collapse_probe.diagnosis import diagnose
from collapse_probe.errors import CaptureError, ImagesError, UsageError
from collapse_probe.loading import data_config, open_images

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
        for part, readings in group.matrices.items():
            for name, values in readings.items():
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
            replace(first.groups[0], layers=list(tables[0].index)),
            replace(second.groups[0], layers=list(tables[1].index)),
        ]
        both = cp.Analysis(pd.concat(tables), groups)
        found = {finding.code for finding in diagnose(both)}
        assert "similar-blocks" in found
        assert "healthy" not in found
        where = "A" if first is broken else "B"
        assert next(f for f in diagnose(both) if f.code == "similar-blocks").title.startswith(f"Group {where}: ")


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
    assert "similar-blocks" not in codes(result)
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
    assert data["schema_version"] == 1
    assert data["provenance"]["images"]["count"] == 14
    table = pd.read_csv(tmp_path / "run" / "similarity.csv", index_col="layer")
    np.testing.assert_allclose(table, analysis.similarity)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        ({"workers": -1}, "workers must be a whole number of at least 0"),
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
    assert not {"similar-blocks", "uniform-attention"} & codes(clean)
    broken = cp.analyze(copied_attention(4, 7), images)
    finding = broken.finding("similar-blocks")
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
    assert "similar-blocks" not in codes(result)


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
    assert codes(result) == {"healthy", "head-redundancy"}
    assert result.finding("head-redundancy").severity == "note"
    assert result.provenance["images"]["count"] == 100


@needs_data
def test_trained_deit_agrees_with_loops_in_float64(deit, photographs):
    """From the same captured queries and keys, and in its means with the maps of the unfused model."""
    from collapse_probe.metrics import CrossLayerSimilarity

    images = next(open_images(photographs, config=data_config(deit), batch_size=4, num_samples=4).batches())
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
