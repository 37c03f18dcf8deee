"""A depth study small enough for a test: trained, analysed, interrupted, continued, compared, drawn."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import depth_study
import numpy as np
import pandas as pd
import pytest
import study_runs
import timm
import torch
from image_sets import load
from PIL import Image
from study_table import OF_A_RUN
from training import RECIPES, accuracy, normalise
from typer.testing import CliRunner

import collapse_probe as cp

EXAMPLES = Path(depth_study.__file__).parent
pytestmark = pytest.mark.sweep  # what `small` trains takes most of a minute

TINY = (
    "--depths", "2,3", "--epochs", "3", "--seeds", "2", "--limit", "256", "--images", "12", "--width", "16",
    "--heads", "2", "--patch-size", "4", "--jobs", "1",
)  # fmt: skip


def study(*words, code=0):
    app = depth_study.typer.Typer(pretty_exceptions_enable=False)
    app.command()(depth_study.main)
    done = CliRunner().invoke(app, [str(word) for word in words])
    if code == 0 and done.exception:
        raise done.exception
    return done


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, study("--out", out, *TINY).stdout


def test_a_row_for_each_block_of_each_run_at_each_look(small):
    out, _ = small
    table = pd.read_csv(out / "depth_study.csv")
    keys = ["kind", "maps", "depth", "seed", "epoch", "block"]
    assert not table.duplicated(keys).any()
    # blocks 2 + 3, two seeds, looks at epochs 0, 1, 2 and 3, maps of the ViT and two kinds of the DeepViT
    assert len(table) == (2 + 3) * 2 * 4 * 3
    assert set(table["epoch"]) == {0, 1, 2, 3}
    assert table[table["block"] > 0].drop(columns="train_loss").notna().all(axis=None)
    assert (table["train_loss"].isna() == (table["epoch"] == 0)).all()


def test_rows_are_the_readings_of_saved_analyses(small):
    out, _ = small
    table = pd.read_csv(out / "runs" / "deepvit-3-seed1" / "readings.csv")
    for maps in ("applied", "softmax"):
        analysis = cp.Analysis.load(out / "runs" / "deepvit-3-seed1" / "analyses" / f"epoch0003-{maps}")
        assert analysis.provenance["options"]["attention"] == maps
        assert analysis.provenance["images"]["count"] == 12
        rows = table[(table["epoch"] == 3) & (table["maps"] == maps)]
        for reading in OF_A_RUN.values():
            np.testing.assert_allclose(rows[reading], analysis.layers[reading], atol=1e-9)


def test_weights_left_behind_are_those_that_were_analysed(small):
    out, _ = small
    run = out / "runs" / "deepvit-3-seed0"
    data = load(out / "data")
    model = cp.load_model(f"local-dir:{run / 'model'}")
    rows = pd.read_csv(run / "readings.csv").query("epoch == 3 and maps == 'softmax'")
    assert accuracy(model, data) == pytest.approx(rows["test_accuracy"].iloc[0])
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == pytest.approx(data.mean)
    assert config["crop_pct"] == 1
    again = cp.analyze(model, normalise(data.test_images[:12] / 255, data), attention="softmax").layers
    np.testing.assert_allclose(again["similarity_to_previous"], rows["similarity_to_previous"], atol=1e-4)


def test_kinds_differ_in_re_attention_only(small):
    out, _ = small
    plain, mixed = (
        cp.load_model(f"local-dir:{out / 'runs' / f'{kind}-2-seed0' / 'model'}") for kind in ("vit", "deepvit")
    )
    additional = set(mixed.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) < set(mixed.state_dict())
    assert all("reatten_matrix" in name or "var_norm" in name for name in additional)


def test_models_start_alike_but_for_their_seed_with_positions_that_tell_near_from_far(small):
    data, size = load(small[0] / "data"), study_runs.SIZES["digits"]
    first, again, other = (
        study_runs.build(study_runs.Run("vit", 2, seed, size, RECIPES["digits"], Path(), Path()), data)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.blocks[1].mlp.fc1.weight, again.blocks[1].mlp.fc1.weight)
    assert not torch.equal(first.blocks[1].mlp.fc1.weight, other.blocks[1].mlp.fc1.weight)
    near_and_far = torch.nn.functional.cosine_similarity(first.pos_embed[0, 1:2], first.pos_embed[0, 1:], dim=-1)
    assert near_and_far[1] > 1.2 * near_and_far[15]  # the patch beside it and the one across the image
    assert torch.equal(first.pos_embed[0, 1:], other.pos_embed[0, 1:])


def test_figures_are_not_empty(small):
    out, _ = small
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert names == {
        "accuracy_by_depth", "similar_blocks", "similarity_heatmaps", "similarity_by_block", "similarity_ratio",
        "centred_by_block", "cross_head_similarity", "entropy_by_block", "feature_similarity", "over_training",
    }  # fmt: skip
    for path in (out / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 400
            assert np.asarray(image.convert("L")).std() > 5


def test_the_summary_says_what_came_out(small):
    out, printed = small
    assert "similar" in printed
    assert printed.count("deepvit") == 4
    assert f"Written to {out}" in printed
    about = json.loads((out / "depth_study.json").read_text())
    assert about["recipe"]["epochs"] == 3
    assert about["training_images_at_most"] == 256
    assert about["device"]
    assert about["torch"] == torch.__version__.split("+")[0] or about["torch"] == torch.__version__


def test_a_finished_study_is_drawn_again_without_training(small, tmp_path, monkeypatch):
    shutil.copytree(small[0], tmp_path / "again")
    monkeypatch.setattr(study_runs, "perform", lambda *_: pytest.fail("trained again"))
    (tmp_path / "again" / "depth_study.csv").unlink()
    study("--out", tmp_path / "again", *TINY)
    first, again = (pd.read_csv(folder / "depth_study.csv") for folder in (small[0], tmp_path / "again"))
    pd.testing.assert_frame_equal(first, again)


def test_an_interrupted_study_continues_where_it_stopped(small, tmp_path, monkeypatch):
    words = ("--out", tmp_path, *TINY, "--kinds", "deepvit", "--depths", "3", "--seeds", "1")
    saved = cp.Analysis.save

    def interrupted(self, folder):
        if folder.name == "epoch0002-softmax":
            raise KeyboardInterrupt
        return saved(self, folder)

    monkeypatch.setattr(cp.Analysis, "save", interrupted)
    assert study(*words, code=130).exit_code != 0
    assert not (tmp_path / "depth_study.csv").exists()
    monkeypatch.undo()
    study(*words)
    whole, parts = (
        pd.read_csv(folder / "runs" / "deepvit-3-seed0" / "readings.csv") for folder in (small[0], tmp_path)
    )
    pd.testing.assert_frame_equal(whole, parts)


def test_a_study_is_compared_with_an_earlier_one(small, tmp_path):
    out, _ = small
    done = study("--out", out, *TINY, "--compare", out / "depth_study.csv")
    assert "lie within" in done.stdout
    other = pd.read_csv(out / "depth_study.csv").assign(test_accuracy=0.0)
    other.to_csv(tmp_path / "other.csv", index=False)
    done = study("--out", out, *TINY, "--compare", tmp_path / "other.csv", code=1)
    assert done.exit_code == 1
    for content, words in (("", "no table"), ("a,b\n1,2\n", "no table"), (None, "no two seeds")):
        if content is None:
            other[other["seed"] == 0].to_csv(tmp_path / "other.csv", index=False)
        else:
            (tmp_path / "other.csv").write_text(content)
        done = study("--out", tmp_path / "new", *TINY, "--compare", tmp_path / "other.csv", code=2)
        assert words in str(done.exception)
        assert not (tmp_path / "new").exists()


def test_a_run_that_fails_leaves_the_others_alone(small, tmp_path):
    shutil.copytree(small[0], tmp_path / "study")
    runs = tmp_path / "study" / "runs"
    for name in ("vit-3-seed0", "vit-3-seed1"):
        (runs / name / "readings.csv").unlink()
    (runs / "vit-3-seed0" / "state.pt").write_bytes(b"PK, but no more")
    done = study("--out", tmp_path / "study", *TINY, code=1)
    assert done.exit_code == 1
    assert "Error: vit-3-seed0: " in done.stderr
    assert "remove it to start this training again" in done.stderr
    table = pd.read_csv(tmp_path / "study" / "depth_study.csv")
    assert set(table.query("kind == 'vit' and depth == 3")["seed"]) == {1}
    (runs / "vit-3-seed0" / "state.pt").unlink()
    study("--out", tmp_path / "study", *TINY)
    first, again = (pd.read_csv(folder / "depth_study.csv") for folder in (small[0], tmp_path / "study"))
    pd.testing.assert_frame_equal(first, again)


def test_an_unforeseen_error_is_a_sentence(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise MemoryError("no more")

    monkeypatch.setattr(study_runs, "train", broken)
    done = study("--out", tmp_path, *TINY, "--kinds", "vit", "--depths", "2", "--seeds", "1", code=1)
    assert "Error: vit-2-seed0: MemoryError: no more" in done.stderr
    assert done.exit_code == 1


def test_damaged_tables_and_settings_are_told(small, tmp_path):
    shutil.copytree(small[0], tmp_path / "study")
    run = tmp_path / "study" / "runs" / "vit-2-seed0"
    whole = (run / "readings.csv").read_text()
    for content in ("", whole[:500], whole[:-300]):
        (run / "readings.csv").write_text(content)
        assert "readings.csv is damaged" in str(study("--out", tmp_path / "study", *TINY, code=2).exception)
    (run / "readings.csv").write_text(whole)
    (run / "run.json").write_text("{")
    assert "run.json is damaged" in str(study("--out", tmp_path / "study", *TINY, code=2).exception)


def test_what_is_named_twice_is_done_once(small):
    words = [word if word != "2,3" else "2,3,2" for word in TINY]
    study("--out", small[0], *words, "--kinds", "vit,vit,deepvit")
    table = pd.read_csv(small[0] / "depth_study.csv")
    assert len(table) == (2 + 3) * 2 * 4 * 3


def test_ended_from_outside_it_leaves_no_process_behind(tmp_path):
    words = [word if word != "3" else "5000" for word in TINY] + ["--jobs", "2", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, str(EXAMPLES / "depth_study.py"), *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*/state.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    assert process.wait(60) == 143
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    time.sleep(1.5)  # an epoch takes a tenth of that
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_runs_side_by_side_give_what_they_give_one_by_one(small, tmp_path):
    words = [word if word != "1" else "2" for word in TINY]  # --jobs 2
    study("--out", tmp_path, *words, "--kinds", "vit", "--depths", "2")
    for seed in (0, 1):
        first, again = (
            pd.read_csv(folder / "runs" / f"vit-2-seed{seed}" / "readings.csv") for folder in (small[0], tmp_path)
        )
        pd.testing.assert_frame_equal(first, again, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--dataset", "mnist"], "there are digits and cifar10"),
        (["--kinds", "vit,resnet"], "'resnet' is none of vit, deepvit"),
        (["--depths", "6,x"], "'x' is no number of blocks"),
        (["--depths", "1"], "'1' is no number of blocks"),
        (["--patch-size", "3"], "cannot be cut into patches"),
        (["--width", "30"], "is not a multiple of"),
        (["--img-size", "16"], "--img-size is for --data-dir"),
        (["--data-dir", "nowhere"], "there is no such folder"),
        (["--compare", "nowhere.csv"], "there is no such file"),
        (["--device", "quantum"], "cannot be used"),
    ],
)
def test_wrong_options_are_told_in_a_sentence(tmp_path, words, sentence):
    done = study("--out", tmp_path / "out", *TINY, *words, code=2)
    assert isinstance(done.exception, cp.errors.UsageError)
    assert sentence in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_study_is_not_continued(small):
    done = study("--out", small[0], *TINY, "--lr", "0.5", code=2)
    assert "other settings" in str(done.exception)
    assert not done.stdout


def test_the_command_ends_with_a_sentence_and_the_exit_code_of_the_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["depth_study.py", "--out", str(tmp_path), "--depths", "none"])
    with pytest.raises(SystemExit) as ending:
        depth_study.command()
    assert ending.value.code == 2
    assert capsys.readouterr().err.startswith("Error: --depths: 'none' is no number of blocks")
