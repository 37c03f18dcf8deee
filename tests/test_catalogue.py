"""The table of architectures, and the description of one by running it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from collapse_probe.architecture import Architecture, Layer, _described, describe
from collapse_probe.capture import group_name
from collapse_probe.catalogue import Row, in_words, look_up, near_misses, read_table, row_of, select, timm_version
from collapse_probe.catalogue import write_table as write
from collapse_probe.errors import CaptureError, UnknownModelError, UsageError

ROOT = Path(__file__).parents[1]

FEW = (
    "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "cait_xxs24_224", "xcit_nano_12_p8_224", "mvitv2_tiny",
    "vit_dwee_patch16_reg1_gap_256", "gcvit_xxtiny", "digits_vit_24b", "resnet18",
)  # fmt: skip
MANY = (
    "beit_base_patch16_224", "caformer_s18", "coat_tiny", "convit_tiny", "cpubone_nano", "crossvit_tiny_240", "csatv2",
    "davit_tiny", "deepvit_s", "eca_botnext26ts_256", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "efficientvim_m1", "efficientvit_m0", "eva02_tiny_patch14_224", "fastvit_mci0", "gc_efficientnetv2_rw_t",
    "gcresnext26ts", "halonet_h1", "hiera_tiny_224", "hieradet_small", "iformer_t", "lambda_resnet26t", "levit_128s",
    "lowformer_b0", "mobilenetv4_hybrid_medium_075", "mobilevit_xxs", "mobilevitv2_050",
    "naflexvit_base_patch16_parfac_gap", "naflexvit_base_patch16_siglip", "nest_tiny", "nextvit_small", "pit_ti_224",
    "pvt_v2_b0", "resnest14d", "resnet50_clip", "samvit_base_patch16_224", "shvit_s1", "skresnet18",
    "swinv2_cr_tiny_224", "swinv2_tiny_window8_256", "test_coatnet", "test_maxvit", "test_vit", "test_vit3",
    "test_vit_relpos", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "twins_svt_small", "visformer_tiny",
    "vit_dpwee_patch16_reg1_gap_256", "vit_pe_core_tiny_patch16_384", "vit_pwee_patch16_reg1_gap_256",
    "vit_tiny_r_s16_p8_224", "vitamin_small_224", "volo_d1_224",
)  # fmt: skip


@pytest.fixture(scope="module")
def table():
    return read_table()


def made_with_installed_timm():
    return timm_version(read_table().values()) == timm.__version__


needs_same_timm = pytest.mark.skipif(not made_with_installed_timm(), reason="the table is of another version of timm")


# -- the table that ships ----------------------------------------------------------------------------------------------


@needs_same_timm
def test_the_table_has_every_name(table):
    ours = ("timm.", "collapse_probe.")
    names = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(ours)}
    assert set(table) == names
    assert not [row.name for row in table.values() if row.failure]


def test_nothing_in_the_table_failed_for_want_of_values(table):
    assert [
        row.name for row in table.values() for reason in row.not_captured if "could not be followed" in reason
    ] == []


@needs_same_timm
@pytest.mark.parametrize("name", FEW)
def test_the_table_says_what_a_run_says(table, name):
    assert table[name] == row_of(describe(name))


def test_the_page_is_made_of_the_table(table):
    spec = importlib.util.spec_from_file_location("list_models", ROOT / "tools" / "list_models.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == tool.page(table.values())
    lines = page.splitlines()
    for row in table.values():
        assert sum(line.startswith(f"| {row.name} |") for line in lines) == bool(row.attends or row.failure), row.name


def test_the_table_is_read_without_torch():
    code = "import sys, collapse_probe.catalogue as c; c.read_table(); print({'torch', 'timm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# -- one architecture --------------------------------------------------------------------------------------------------


def test_a_plain_vit_is_described():
    found = describe("deit_tiny_patch16_224")
    assert (found.family, found.input_size, found.device) == ("deit", (3, 224, 224), "meta")
    assert found.source == f"timm {timm.__version__}"
    expected = [Layer(f"blocks.{n}.attn", "token", 3, 197, 197, 1, "", 1, "A", True) for n in range(12)]
    assert list(found.layers) == expected
    assert not found.not_captured
    assert not found.not_compared


def test_windows_and_their_partitions_are_described():
    found = describe("swin_tiny_patch4_window7_224")
    sizes = [(layer.kind, layer.heads, layer.queries, layer.keys, layer.windows) for layer in found.layers]
    stages = [("window", 3, 64)] * 2 + [("window", 6, 16)] * 2 + [("window", 12, 4)] * 6 + [("token", 24, 1)] * 2
    assert sizes == [(kind, heads, 49, 49, windows) for kind, heads, windows in stages]
    # A stage with more than one window shifts them in every second block; the last one has nothing to shift.
    assert [layer.group for layer in found.layers] == list("ABCDEFEFEFGG")


def test_maps_that_are_mixed_or_of_one_query_are_described():
    layers = describe("cait_xxs24_224").layers
    assert [(layer.kind, layer.is_probability) for layer in layers] == [("token", False)] * 24 + [("class", True)] * 2


def test_kinds_that_are_not_compared_have_a_reason_and_no_group():
    found = describe("xcit_nano_12_p8_224")
    assert set(found.not_compared) == {"channel"}
    assert {layer.group for layer in found.layers if layer.kind == "channel"} == {""}
    assert all(layer.group for layer in found.layers if layer.kind != "channel")


def test_size_and_arguments_reach_the_model():
    found = describe("vit_tiny_patch16_224", img_size=64, model_kwargs={"depth": 2, "num_heads": 6})
    assert found.input_size == (3, 64, 64)
    assert [(layer.heads, layer.queries) for layer in found.layers] == [(6, 17)] * 2
    assert describe("vit_tiny_patch16_224", model_kwargs={"in_chans": 1, "depth": 1}).input_size == (1, 224, 224)


def test_bundled_and_tagged_names_are_described():
    assert describe("digits_vit_24b").source == "collapse_probe"
    assert len(describe("vit_tiny_patch16_224.augreg_in21k").layers) == 12


def test_names_and_arguments_that_are_wrong():
    with pytest.raises(UnknownModelError, match="vit_tiny_patch61_224"):
        describe("vit_tiny_patch61_224")
    with pytest.raises(UsageError, match="nonsense"):
        describe("vit_tiny_patch16_224", model_kwargs={"nonsense": 1})
    with pytest.raises(CaptureError, match="3 x 2 x 2"):
        describe("levit_128s", img_size=2)


def test_group_names_go_on_after_z():
    assert [group_name(number) for number in (0, 1, 25, 26, 27, 701, 702)] == ["A", "B", "Z", "AA", "AB", "ZZ", "AAA"]


class Reader(nn.Module):
    """Attention with a temperature that it reads as a number, which has no meaning without values."""

    def __init__(self):
        super().__init__()
        self.weight, self.temperature = nn.Parameter(torch.rand(3, 3)), nn.Parameter(torch.ones(()))

    def forward(self, images):
        tokens = images.flatten(2).mT[:, :7] @ self.weight
        return (tokens @ tokens.mT / self.temperature.item()).softmax(-1) @ tokens


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: Reader())
    return "vit_tiny_patch16_224"


def test_a_model_that_reads_values_is_run_on_the_cpu(reader):
    found = describe(reader)
    assert found.device == "cpu"
    assert [(layer.queries, layer.keys) for layer in found.layers] == [(7, 7)]


def same_on_the_cpu(name):
    without, computed = (_described(name, {}, None, device) for device in ("meta", "cpu"))
    assert without.layers == computed.layers
    assert without.not_captured == computed.not_captured


@pytest.mark.parametrize("name", FEW)
def test_nothing_is_lost_without_values(name):
    same_on_the_cpu(name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", MANY)
def test_nothing_is_lost_without_values_in_many_architectures(name):
    same_on_the_cpu(name)


# -- rows --------------------------------------------------------------------------------------------------------------


def layer(name, kind, group, is_probability=True):
    return Layer(name, kind, 2, 5, 5, 1, "", 0, group, is_probability)


def test_a_row_counts_a_description():
    layers = (
        layer("a", "window", "A"), layer("b", "token", "B"), layer("c", "token", "C", False), layer("d", "token", "B"),
        layer("e", "gate", ""), layer("f", "window", "D"), layer("g", "token", "B"), layer("h", "token", "C"),
    )  # fmt: skip
    gaps = {
        "x": "a softmax over axis 1 of [2, 16, 64] has no use",
        "y": "a softmax over axis 1 of [2, 32] has no use",
        "z": "no",
    }
    row = row_of(Architecture("n", "f", "timm 1", (3, 32, 48), "meta", layers, gaps, {}))
    assert row == Row(
        "n", "f", "timm 1", "3x32x48", {"token": 5, "window": 2, "gate": 1}, 7, (3, 2), 1,
        {"a softmax over axis 1 of [...] has no use": 2, "no": 1},
    )  # fmt: skip
    assert (row.maps, row.gaps, row.attends) == (8, 3, True)
    assert in_words(row.kinds) == "5 token + 2 window + 1 gate"


def test_only_what_attends_attends():
    assert not Row("n", "f", "s").attends
    assert Row("n", "f", "s", not_captured={"why": 1}).attends
    assert Row("n", "f", "s", kinds={"gate": 1}).attends


def test_a_table_comes_back_as_it_was_written(tmp_path):
    rows = [
        Row("b", "f", "timm 1.2", "3x4x5", {"token": 3, "class": 1}, 4, (3, 2), 2, {'a, "quoted" + reason': 4, "é": 1}),
        Row("a", "f", "collapse_probe", failure="It fails, \nwith two lines."),
        Row("c", "g", "timm 1.2", "3x4x5"),
    ]
    write(rows, tmp_path / "models.csv")
    back = read_table(tmp_path / "models.csv")
    assert list(back) == ["a", "b", "c"]
    assert list(back.values()) == sorted(rows, key=lambda row: row.name)
    assert timm_version(back.values()) == "1.2"
    assert timm_version([*rows, Row("d", "g", "timm 1.1")]) == "1.1 and 1.2"


def test_names_are_sorted_by_what_the_table_says():
    rows = [Row("a", "f", "s", kinds={"token": 1}), Row("b", "f", "s"), Row("c", "f", "s", failure="why")]
    found = look_up(["a", "b", "c", "d"], {row.name: row for row in rows})
    assert [row.name for row in found.attending] == ["a"]
    assert (found.without_attention, found.failed, found.unknown) == (["b"], {"c": "why"}, ["d"])


def test_patterns():
    names = ["swin_tiny", "swin_base", "Swin", "vit_tiny"]
    assert select(names, []) == names
    assert select(names, ["*tiny", "swin*"]) == ["swin_tiny", "swin_base", "vit_tiny"]
    assert select(names, ["*_[a-c]*"]) == ["swin_base"]
    assert select(names, ["swin"]) == []


def test_near_misses():
    names = ["swin_tiny", "swin_base", "swin_large", "swin_huge", "vit_tiny"]
    assert near_misses("swin", names) == "'*swin*' matches 4: swin_tiny, swin_base, swin_large, ..."
    assert near_misses("tiny", names) == "'*tiny*' matches 2: swin_tiny, vit_tiny."
    assert near_misses("swim_tiny", names).startswith("Nearest: swin_tiny")
    assert near_misses("Swim_*", names) == "Nearest: swin_*."
    assert near_misses("swim", names) == "Nearest: swin*."
    assert near_misses("qqqqqq", names) == near_misses("*", []) == "Without a pattern, all names are listed."
