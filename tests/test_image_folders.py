"""What an analysis of a folder of images says of files that are bad, of other preprocessing, and of labels."""

from __future__ import annotations

import json

import pytest
import torch
from _models import build
from PIL import Image
from typer.testing import CliRunner

import collapse_probe as cp
from collapse_probe.cli.app import app
from collapse_probe.errors import ImagesError, UsageError
from collapse_probe.loading.decode import DECODING
from collapse_probe.loading.folder import seeded_order

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
