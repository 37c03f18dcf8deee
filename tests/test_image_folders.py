"""What an analysis of a folder of images says of files that are bad, of other preprocessing, and of labels."""

from __future__ import annotations

import html
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from _models import build
from PIL import Image
from rich.console import Console
from shared_data import shared_data
from typer.testing import CliRunner

import collapse_probe as cp
from collapse_probe.cli.app import app
from collapse_probe.errors import ImagesError, UsageError
from collapse_probe.loading.decode import DECODING
from collapse_probe.loading.folder import seeded_order
from collapse_probe.models import bundled_images
from collapse_probe.report import content, print_summary, render_html
from collapse_probe.report.terminal import print_comparison
from tests.analysis_factory import make_analysis

FAST = {"metrics": "attention_entropy"}


def vit(**kwargs):
    return build("vit_tiny_patch16_224", **kwargs)


def pictures(folder, count=20, broken=()):
    """A folder of noise; the broken files hold no picture."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = torch.randint(0, 255, (40, 36, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        if number in broken:
            (folder / f"{number}.png").write_bytes(b"no picture")
    return folder


def probe(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (done.stderr, done.exception)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than all the rest, and have tests of their own."""
    monkeypatch.setattr("collapse_probe.cli.results.write", lambda analysis, folder, _: analysis.save(folder))


# -- unreadable files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allowed", "enough"), [(0.01, False), (0.09, False), (0.1, True), (0.5, True), (1, True)])
def test_as_many_files_may_be_unreadable_as_the_caller_says(tmp_path, allowed, enough):
    folder = pictures(tmp_path, broken={3, 12})
    if enough:
        provenance = cp.analyze(vit(), folder, max_skipped=allowed, **FAST).provenance
        assert provenance["options"]["max_skipped"] == allowed
        assert provenance["images"]["count"] == 18
        assert sorted(entry["path"] for entry in provenance["images"]["skipped"]) == ["12.png", "3.png"]
    else:
        said = rf"^[12] of 20 images could not be read, more than {100 * allowed:g}%: .* --max-skipped \(max_skipped"
        with pytest.raises(ImagesError, match=said):
            cp.analyze(vit(), folder, batch_size=4, max_skipped=allowed, **FAST)


def test_what_is_no_share_is_refused_before_anything_is_loaded(tmp_path):
    for value in (float("nan"), -0.1, 1.01, True, None, "0.05", float("inf")):
        for call in (
            lambda value=value: cp.analyze("no_such_model", tmp_path, max_skipped=value),
            lambda value=value: cp.measure("no_such_model", tmp_path, max_skipped=value),
        ):
            with pytest.raises(UsageError, match=r"max_skipped must be a share of the images within 0..1; got .*0\.05"):
                call()


def test_shards_are_judged_together_by_what_they_were_measured_with(tmp_path):
    folder, model = pictures(tmp_path, 30, broken={3, 12}), vit()
    lenient = [cp.measure(model, folder, shard=f"{n}/2", max_skipped=0.1, **FAST) for n in (1, 2)]
    assert cp.merge(lenient).provenance["options"]["max_skipped"] == 0.1
    with pytest.raises(ImagesError, match="2 of 30 images could not be read, more than 5%"):
        cp.merge(lenient, max_skipped=0.05)
    assert cp.merge(lenient, max_skipped=0.5).provenance["options"]["max_skipped"] == 0.5
    for value in (True, float("nan"), 2):
        with pytest.raises(UsageError, match="max_skipped must be a share"):
            cp.merge(lenient, max_skipped=value)


def test_one_shard_may_have_been_measured_again_with_another_limit(tmp_path):
    order = seeded_order([f"{number}.png" for number in range(60)], 0)
    broken = {int(order[place].removesuffix(".png")) for place in (0, 8)}  # one for each shard
    folder, model = pictures(tmp_path, 60, broken), vit()
    strict, lenient = _parts(model, folder, 0.02)[0], _parts(model, folder, 0.05)[1]
    assert cp.merge([strict, lenient]).provenance["images"]["count"] == 58
    with pytest.raises(ImagesError, match="2 of 60 images could not be read, more than 2%"):
        cp.merge([strict, _parts(model, folder, 0.02)[1]])


def _parts(model, folder, allowed):
    return [cp.measure(model, folder, shard=f"{n}/2", max_skipped=allowed, **FAST) for n in (1, 2)]


def test_the_flag_of_both_commands(tmp_path):
    folder = pictures(tmp_path / "pictures", broken={3, 12})
    words = ["analyze", "digits_vit_24b", "--images", folder, "--metrics", "attention_entropy"]
    refused = probe(*words, code=4)
    assert "more than 1%" in refused.stderr
    assert "--max-skipped" in refused.stderr
    probe(*words, "--max-skipped", "0.1", "--out", tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "analysis.json").read_text())["provenance"]
    assert stored["options"]["max_skipped"] == 0.1
    assert len(stored["images"]["skipped"]) == 2
    probe(*words, "--max-skipped", "0.1", "--shard", "1/1", "--out", tmp_path / "s")
    probe("merge", tmp_path / "s")
    assert "more than 5%" in probe("merge", tmp_path / "s", "--max-skipped", "0.05", code=4).stderr
    for value in ("nan", "2", "-1"):
        assert "within 0..1" in probe(*words, "--max-skipped", value, code=2).stderr
        assert "within 0..1" in probe("merge", tmp_path / "s", "--max-skipped", value, code=2).stderr


# -- what was done to pixels -------------------------------------------------------------------------------------------


def test_decoding_stands_in_the_provenance(tmp_path):
    analysis = cp.analyze(vit(), pictures(tmp_path), **FAST)
    assert analysis.provenance["images"]["decoding"] == DECODING
    assert "transparency composited on white" in DECODING
    assert "decoding" not in cp.analyze(vit(), torch.randn(2, 3, 32, 32), **FAST).provenance["images"]


def test_preprocessing_that_is_the_models_own(tmp_path):
    folder = pictures(tmp_path)
    own = {"mean": (0.5, 0.5, 0.5), "crop_pct": 0.9, "interpolation": "bicubic"}
    for given in ({}, own, {"mean": [0.5]}):
        analysis = cp.analyze(vit(), folder, **given, **FAST)
        assert analysis.provenance["images"]["matches_model"] is True
        assert content.preprocessing(analysis) == ""
        assert dict(content.provenance_rows(analysis))["images.matches_model"] == "True"


def test_preprocessing_that_is_not(tmp_path):
    given = {"mean": (0.5, 0.4, 0.3), "crop_pct": 1.0}
    analysis = cp.analyze(vit(), pictures(tmp_path / "pictures"), **given, **FAST)
    differs = [
        {"setting": "mean", "model": (0.5, 0.5, 0.5), "used": (0.5, 0.4, 0.3)},
        {"setting": "crop_pct", "model": 0.9, "used": 1.0},
    ]
    assert analysis.provenance["images"]["matches_model"] == differs
    words = "not the model's own: mean 0.5, 0.4, 0.3 instead of 0.5, 0.5, 0.5; crop_pct 1.0 instead of 0.9"
    for item in (analysis, cp.Analysis.load(analysis.save(tmp_path / "run"))):
        assert f"preprocessing: {words}" in printed(item)
        assert html.unescape(render_html(item)).count(words) == 2  # beside the verdict, and in the provenance


def test_an_image_size_that_was_asked_for(tmp_path):
    named = {"arch": "vit_tiny_patch16_224", "model_kwargs": {"depth": 1}, "img_size": 32}
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).state_dict(), tmp_path / "a.pt")
    provenance = cp.analyze(tmp_path / "a.pt", pictures(tmp_path / "pictures"), **named, **FAST).provenance
    differs = [{"setting": "input_size", "model": (3, 224, 224), "used": (3, 32, 32)}]
    assert provenance["images"]["matches_model"] == differs


def test_preprocessing_by_the_caller_or_of_a_model_without_settings(tmp_path):
    analysis = cp.analyze(vit(), torch.randn(4, 3, 32, 32), **FAST)
    assert analysis.provenance["images"]["matches_model"] == "done by the caller"
    assert content.preprocessing(analysis) == ""
    stranger = vit()
    del stranger.pretrained_cfg
    analysis = cp.analyze(stranger, pictures(tmp_path), img_size=32, **FAST)
    assert "states none of its own" in content.preprocessing(analysis)


# -- labels ------------------------------------------------------------------------------------------------------------


class Told(torch.nn.Module):
    """A ViT whose answer is how red an image is, in steps of ten."""

    def __init__(self, classes=12):
        super().__init__()
        self.vit, self.num_classes, self.pretrained_cfg = vit(), classes, {"input_size": (3, 32, 32)}

    def forward(self, images):
        self.vit(images)
        red = (images[:, 0].mean((1, 2)) * 255 / 10).round().long()
        red = red.clamp(0, self.num_classes - 1)
        return torch.nn.functional.one_hot(red, self.num_classes).to(images.dtype)


#: Class of the folder -> the answers to its images.
ANSWERS = {0: [0, 0, 3], 1: [1, 1, 1, 2], 3: [3], 10: [10, 9, 10, 10, 0, 0, 0, 0, 0, 0, 0, 0]}
CORRECT, LABELLED = 2 + 3 + 1 + 3, 3 + 4 + 1 + 12
PLAIN = {"mean": [0.0], "std": [1.0]} | FAST


@pytest.fixture
def reds(tmp_path):
    for label, answers in ANSWERS.items():
        for number, answer in enumerate(answers):
            path = tmp_path / "reds" / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (10 * answer, 0, 0)).save(path)
    return tmp_path / "reds"


EXPECTED = {
    "correct": CORRECT, "labelled": LABELLED, "accuracy": 0.45, "se": pytest.approx((0.45 * 0.55 / 20) ** 0.5),
    "classes": 12, "labels": "names of folders are class indices",
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_answers_are_counted_where_labels_are_known(reds, batch_size):
    analysis = cp.analyze(Told(), reds, batch_size=batch_size, **PLAIN)
    assert analysis.provenance["top1"] == EXPECTED
    assert analysis.provenance["images"]["labels"]["source"] == "names of folders are class indices"


def test_files_that_cannot_be_read_are_not_counted(reds):
    (reds / "3" / "broken.png").write_bytes(b"")
    (reds / "3" / "0.png").write_bytes(b"")
    found = cp.analyze(Told(), reds, max_skipped=0.2, **PLAIN).provenance["top1"]
    assert (found["correct"], found["labelled"]) == (CORRECT - 1, LABELLED - 1)


def test_counts_of_shards_add_up_on_the_way_through_files(reds, tmp_path):
    shards = [cp.measure(Told(), reds, shard=f"{number}/4", **PLAIN) for number in (1, 2, 3, 4)]
    assert [shard.images for shard in shards] == [8, 8, 4, 0]
    for shard in shards[:3]:
        assert shard.sums["labels/top1/labelled"] == shard.images
        assert shard.sums["labels/top1/labelled"].dtype == np.int64
    folders = [shard.save(tmp_path / str(shard.shard.number)) for shard in shards]
    assert cp.merge(folders).provenance["top1"] == EXPECTED
    loaded = cp.Analysis.load(cp.merge(shards).save(tmp_path / "run"))
    assert loaded.provenance["top1"] == EXPECTED


def test_no_labels_no_answers_no_top1(reds):
    headless = vit(num_classes=0)
    several = Told()
    several.forward = lambda images: (several.vit(images), 0)
    for model, images in (
        (headless, reds),
        (several, reds),
        (Told(5), reds),  # folder 10 is none of five classes
        (Told(), torch.zeros(4, 3, 32, 32)),
        (Told(), reds / "1"),
    ):
        partial = cp.measure(model, images, **PLAIN)
        assert not [name for name in partial.sums if name.startswith("labels")]
        provenance = cp.merge([partial]).provenance
        assert "top1" not in provenance
        assert "labels" not in provenance["images"]


def test_top1_is_told_with_how_labels_are_known(reds):
    analysis = cp.analyze(Told(), reds, **PLAIN)
    words = "45.0 ± 11.1 % on 20 labelled images (names of folders are class indices)"
    assert f"top-1: {words}" in printed(analysis)
    for page in (render_html(analysis), analysis._repr_html_()):
        assert words in html.unescape(page)
    assert content.warnings(analysis) == []


def with_top1(correct, labelled, classes, **model):
    accuracy = correct / labelled
    analysis = make_analysis(2)
    analysis.provenance["model"] |= model
    analysis.provenance["top1"] = {
        "correct": correct, "labelled": labelled, "accuracy": accuracy, "classes": classes, "labels": "by hand",
        "se": (accuracy * (1 - accuracy) / labelled) ** 0.5,
    }  # fmt: skip
    return analysis


@pytest.mark.parametrize(
    ("correct", "labelled", "classes", "warned"),
    [
        (0, 30, 1000, True),
        (0, 29, 1000, False),  # too few to tell
        (1, 30, 1000, False),
        (3, 1000, 1000, True),
        (4, 1000, 1000, False),
        (30, 100, 10, True),
        (31, 100, 10, False),
        (50, 100, 2, True),
        (60, 100, 2, True),  # two standard errors above one half
        (61, 100, 2, False),
        (100, 100, 2, False),
    ],
)
def test_answers_no_better_than_chance_are_a_warning(correct, labelled, classes, warned):
    analysis = with_top1(correct, labelled, classes)
    assert bool(content.warnings(analysis)) == warned
    random = with_top1(correct, labelled, classes, weights={"random": True})
    assert content.warnings(random) == []


def test_the_warning_stands_before_the_verdict():
    analysis = with_top1(0, 50, 1000)
    sentence = (
        "Top-1 of 0.0 % on 50 labelled images (by hand) is not above chance level (0.1 %): preprocessing, the order"
    )
    text = printed(analysis)
    assert text.index(f"! {sentence}") < text.index("WARNING")
    for page in (render_html(analysis), analysis._repr_html_()):
        assert html.unescape(page).index(sentence) < page.index("OK")
    side_by_side = io.StringIO()
    print_comparison({"one": analysis}, Console(file=side_by_side, width=300))
    assert sentence in side_by_side.getvalue()


@pytest.fixture
def digits(tmp_path):
    """The bundled pictures of digits in a folder for each digit."""
    for picture in bundled_images().glob("*.png"):
        folder = tmp_path / "digits" / picture.stem[-1]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder)
    return tmp_path / "digits"


@pytest.mark.sweep
def test_a_trained_model_is_right_about_digits_whether_by_one_process_or_two(digits):
    alone = cp.analyze("digits_vit_24b", digits, **FAST)
    assert alone.provenance["top1"]["labelled"] == 64
    assert alone.provenance["top1"]["accuracy"] > 0.9
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "collapse_probe", "analyze",
        "digits_vit_24b", "--images", str(digits), "--metrics", "attention_entropy",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"top-1: {content.top1(alone)}" in done.stdout
    assert "labelled images (10 class folders in sorted order)" in done.stdout


@pytest.mark.sweep
@pytest.mark.skipif(shared_data() is None, reason="the development data are absent")
def test_a_trained_model_on_photographs_and_with_wrong_preprocessing():
    data = shared_data()
    arguments = {"arch": "deit_tiny_patch16_224", "batch_size": 25} | FAST
    weights, photographs = data / "deit_tiny_patch16_224_in1k.safetensors", data / "imagenet_sample"
    found = cp.analyze(weights, photographs, **arguments).provenance["top1"]
    assert found["labels"] == "ImageNet synsets in file names"
    assert found["labelled"] == 100
    assert 0.74 <= found["accuracy"] <= 0.81
    wrong = cp.analyze(weights, photographs, std=[0.001], num_samples=50, **arguments)
    assert wrong.provenance["top1"]["accuracy"] < 0.3


def printed(analysis):
    stream = io.StringIO()
    print_summary(analysis, Console(file=stream, width=1000))
    return stream.getvalue()
