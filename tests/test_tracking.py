"""A series of checkpoints: each as if alone, in its place, kept for the next run, and no bad one stops the others."""

from __future__ import annotations

import copy
import functools
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from _models import build
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import collapse_probe as cp
import collapse_probe.tracking as tracking
from collapse_probe.errors import DamagedFileError, ImagesError, ModelError, OutputError, UsageError
from collapse_probe.series import Series, place_for
from tests import hostile_files
from tests.analysis_factory import make_analysis, two_groups

ARCH = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
OPTIONS = {"arch": ARCH, "model_kwargs": KWARGS, "metrics": "attention_entropy"}  # the cheapest
WHOLE = OPTIONS | {"metrics": "fast,cka"}
IMAGES = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@functools.cache
def weights(number):
    """Of the same model, later in a training of sorts."""
    state = build(ARCH).state_dict()
    generator = torch.Generator().manual_seed(number)
    return {key: value + 0.02 * number * torch.randn(value.shape, generator=generator) for key, value in state.items()}


@pytest.fixture
def run(tmp_path):
    """A training that has left three checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    for number in (2, 1, 10):
        torch.save({"state_dict": weights(number), "global_step": 100 * number}, folder / f"ckpt_{number}.pt")
    return folder


@pytest.fixture
def measured(monkeypatch):
    """The names of the checkpoints that are analysed from now on."""
    names = []

    def counted(path, *arguments, **options):
        names.append(path.name)
        return cp.analyze(path, *arguments, **options)

    monkeypatch.setattr(tracking, "analyze", counted)
    return names


class Notes:
    """Hears what is reported."""

    def __init__(self):
        self.calls, self.texts = [], []

    def __call__(self, done, total):
        self.calls.append((done, total))

    def note(self, text):
        self.texts.append(text)


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cp.track(*arguments, **{**OPTIONS, **options})


def timeless(analysis):
    """Everything in an analysis but how long it took."""
    data = copy.deepcopy(analysis.to_dict())
    data["provenance"].pop("seconds")
    arrays = {f"{owner.name}/{key}": value for owner in analysis.measured for key, value in owner.arrays.items()}
    return data, arrays


def assert_equal(one, other):
    (mine, arrays), (theirs, others) = timeless(one), timeless(other)
    assert mine == theirs
    assert arrays.keys() == others.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, others[name], err_msg=name)


def test_each_checkpoint_is_analysed_as_if_alone(run):
    more = {"threshold": 0.5, "layers": "blocks.[12].*", "num_samples": 7, "seed": 3}
    series = cp.track(run, IMAGES, **WHOLE, **(more | {"layers": iter(["blocks.[12].*"])}))
    assert series.unit == "step"
    assert series.steps == [100, 200, 1000]
    assert series.skipped == []
    for number, analysis in zip((1, 2, 10), series.analyses.values(), strict=True):
        assert_equal(analysis, cp.analyze(run / f"ckpt_{number}.pt", IMAGES, **WHOLE, **more))
    means = [analysis.layers["similarity_to_previous"].mean() for analysis in series.analyses.values()]
    assert len(set(means)) == 3


def test_a_folder_of_images_is_the_same_for_all(run, tmp_path):
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    series = cp.track(str(run / "*.pt"), tmp_path / "images", num_samples=5, workers=0, **OPTIONS)
    for number, analysis in zip((1, 2, 10), series.analyses.values(), strict=True):
        path = run / f"ckpt_{number}.pt"
        assert_equal(analysis, cp.analyze(path, tmp_path / "images", num_samples=5, workers=0, **OPTIONS))


def test_the_table_holds_every_reading(run):
    series = cp.track([run / "ckpt_1.pt", run / "ckpt_2.pt"], IMAGES, **WHOLE)
    table = series.table
    assert list(table.columns) == ["step", "layer", "reading", "value", "se"]
    layers = series.analyses[200].layers
    own = table[(table.step == 200) & (table.layer == "blocks.1.attn")].set_index("reading")
    assert own.value["normalized_entropy"] == layers.loc["blocks.1.attn", "normalized_entropy"]
    assert own.se["normalized_entropy"] == layers.loc["blocks.1.attn", "normalized_entropy_se"]
    assert own.value["sink_share_patch"] == layers.loc["blocks.1.attn", "sink_share_patch"]
    assert not {"heads", "group", "similar_to_previous"} & set(table.reading)
    assert not table.reading.str.contains(r"_se(?:$|_)|_(?:low|high)$").any()
    assert "similarity_to_previous" not in set(table[table.layer == "blocks.0.attn"].reading)
    derived = series.analyses[100].main_group.derived["similar_blocks"]["value"]
    assert table[(table.step == 100) & (table.reading == "similar_blocks")].value.tolist() == [derived]
    assert not table.duplicated(["step", "layer", "reading"]).any()


# -- bad checkpoints ---------------------------------------------------------------------------------------------------


def bad_files(folder):
    """Files that must not stop a series, by name, with what is said of them."""
    canary = folder / hostile_files.CANARY
    torch.save({"state_dict": weights(3), "hook": hostile_files.Touch(canary)}, folder / "hostile_3.pt")
    whole = (folder / "ckpt_1.pt").read_bytes()
    (folder / "half_4.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty_5.pt").write_bytes(b"")
    torch.save({"state_dict": {"other": torch.ones(2)}}, folder / "other_6.pt")
    torch.save({"state_dict": {**weights(7), "head.bias": torch.full((5,), torch.nan)}}, folder / "nan_7.pt")
    return {
        "hostile_3.pt": "posix.system", "half_4.pt": "truncated", "empty_5.pt": "is empty", "other_6.pt": "",
        "nan_7.pt": "NaN",
    }  # fmt: skip


def test_bad_checkpoints_are_named_and_skipped(run, tmp_path):
    expected = bad_files(run)
    with pytest.warns(UserWarning, match="is left out: ") as caught:
        series = cp.track(run / "*.pt", IMAGES, out=tmp_path / "out", **OPTIONS)
    assert series.steps == [100, 200, 1000]
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in series.skipped}
    assert reasons.keys() == expected.keys()
    for name, words in expected.items():
        assert words in reasons[name]
        assert "\n" not in reasons[name]
    assert {text for warning in caught if (text := str(warning.message)).startswith(str(run))} >= {
        f"{run / name} is left out: {reason}" for name, reason in reasons.items()
    }
    assert not (run / hostile_files.CANARY).exists()
    stored = json.loads((tmp_path / "out" / "track.json").read_text())
    assert stored["skipped"] == series.skipped


def test_nothing_but_bad_checkpoints(run):
    bad_files(run)
    paths = [path for path in run.iterdir() if not path.name.startswith("ckpt")]
    with pytest.raises(
        ModelError, match=r"None of 5 checkpoints could be analysed\. empty_5\.pt: .* is empty.*; and 2 more"
    ):
        quietly(paths, IMAGES)


def test_one_that_vanishes_is_no_reason_to_stop(run, monkeypatch):
    """Trainings delete their older checkpoints."""

    def gone(path, *arguments, **options):
        if path.name == "ckpt_1.pt":
            path.unlink()
        return cp.analyze(path, *arguments, **options)

    monkeypatch.setattr(tracking, "analyze", gone)
    series = quietly(run, IMAGES)
    assert series.steps == [200, 1000]
    assert "ckpt_1.pt" in series.skipped[0]["reason"]


def test_images_that_cannot_be_had_are_an_error_at_once(run, tmp_path, measured):
    with pytest.raises(ImagesError):
        quietly(run, tmp_path / "nowhere")
    assert measured == []


# -- places ------------------------------------------------------------------------------------------------------------


def test_copies_are_measured_once(run, measured):
    (run / "last.pt").write_bytes((run / "ckpt_10.pt").read_bytes())
    series = quietly(run, IMAGES)
    assert measured == ["ckpt_1.pt", "ckpt_2.pt", "ckpt_10.pt"]
    assert series.skipped == [{"path": str(run / "last.pt"), "reason": "It is the same as ckpt_10.pt."}]


def test_steps_from_names_and_from_times(tmp_path):
    for number, name in enumerate(["a_2", "a_1"]):
        save_file(weights(number), tmp_path / f"{name}.safetensors")
    series = cp.track(tmp_path, IMAGES, **OPTIONS)
    assert (series.unit, series.steps) == ("number", [1, 2])
    assert [point.known for point in series.points] == ["number in its name"] * 2
    for name in ("b", "c"):
        (tmp_path / f"a_{'12'['bc'.index(name)]}.safetensors").rename(tmp_path / f"{name}.safetensors")
    os.utime(tmp_path / "b.safetensors", (2e9, 2e9))
    with pytest.warns(UserWarning, match="in the order of their files' times"):
        series = cp.track(tmp_path, IMAGES, **OPTIONS)
    assert (series.unit, [point.label for point in series.points]) == ("order", ["c.safetensors", "b.safetensors"])


def test_trainer_folders(tmp_path):
    for number in (5, 10):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        save_file(weights(number), folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": number, "epoch": number / 4}))
    series = cp.track(tmp_path, IMAGES, out=tmp_path / "out", **OPTIONS)
    assert (series.unit, series.steps) == ("step", [5, 10])
    assert [point.known for point in series.points] == ["stated as trainer_state.json: global_step"] * 2
    for _ in range(2):  # what is written into the same folder is nothing to track
        series = cp.track(tmp_path, IMAGES, out=tmp_path, **OPTIONS)
        assert (series.steps, series.skipped) == ([5, 10], [])


def test_names_that_differ_only_in_their_folders(tmp_path):
    for number in (5, 10):
        (tmp_path / f"step_{number}").mkdir()
        torch.save(weights(number), tmp_path / f"step_{number}" / "model.pt")
    series = cp.track(tmp_path / "step_*" / "model.pt", IMAGES, out=tmp_path / "out", **OPTIONS)
    assert [(point.step, point.label) for point in series.points] == [(5, "step_5/model.pt"), (10, "step_10/model.pt")]
    assert [point.folder for point in series.points] == ["checkpoints/step_5_model.pt", "checkpoints/step_10_model.pt"]


# -- going on ----------------------------------------------------------------------------------------------------------


def times(out):
    return {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*") if path.is_file()}


def test_a_second_run_measures_what_is_new(run, tmp_path, measured):
    out = tmp_path / "out"
    first = quietly(run, IMAGES, out=out)
    assert measured == ["ckpt_1.pt", "ckpt_2.pt", "ckpt_10.pt"]
    before = times(out)
    measured.clear()
    notes = Notes()
    again = quietly(run, IMAGES, out=out, progress=notes)
    assert measured == []
    assert times(out) == before
    assert notes.texts == [f"3 of 3 checkpoints were measured before and are taken from {out}."]
    assert again.steps == first.steps
    for step, analysis in first.analyses.items():
        assert_equal(again.analyses[step], analysis)
    torch.save({"state_dict": weights(20), "global_step": 2000}, run / "ckpt_20.pt")
    torch.save({"state_dict": weights(11), "global_step": 1000}, run / "ckpt_10.pt")
    (run / "ckpt_1.pt").rename(run / "first.pt")
    series = quietly(run, IMAGES, out=out)
    assert measured == ["ckpt_10.pt", "ckpt_20.pt"]
    assert series.steps == [100, 200, 1000, 2000]
    assert_equal(series.analyses[1000], cp.analyze(run / "ckpt_10.pt", IMAGES, **OPTIONS))
    assert series.points[0].label == "first.pt"
    for point in series.points:
        assert_equal(cp.Analysis.load(out / point.folder), point.analysis)


def test_names_that_move_on_keep_their_own_analyses(run, tmp_path, measured):
    """The usual rotation: what was the last checkpoint gets another name, and a new one takes the old."""
    out = tmp_path / "out"
    quietly(run / "ckpt_10.pt", IMAGES, out=out)
    (run / "ckpt_10.pt").rename(run / "old.pt")
    torch.save({"state_dict": weights(12), "global_step": 1200}, run / "ckpt_10.pt")
    series = quietly([run / "ckpt_10.pt", run / "old.pt"], IMAGES, out=out)
    assert measured == ["ckpt_10.pt", "ckpt_10.pt"]
    assert [(point.step, point.label, point.folder) for point in series.points] == [
        (1000, "old.pt", "checkpoints/ckpt_10.pt"), (1200, "ckpt_10.pt", "checkpoints/ckpt_10.pt_2"),
    ]  # fmt: skip
    measured.clear()
    again = quietly([run / "ckpt_10.pt", run / "old.pt"], IMAGES, out=out)
    assert measured == []
    for one, other in zip(series.points, again.points, strict=True):
        assert_equal(one.analysis, other.analysis)


#: What is different in the second run -> what is said of it; None where results do not depend on it.
CHANGES = {
    "threshold": ({"threshold": 0.5}, "threshold (0.9, now 0.5)"),
    "several": ({"seed": 1, "metrics": "cka"}, "seed (0, now 1) and metrics (attention_entropy, now cka) and images"),
    "layers": ({"layers": ["blocks.1.*", "blocks.2.*"]}, "layers ([], now ['blocks.1.*', 'blocks.2.*'])"),
    "model": ({"model_kwargs": {**KWARGS, "num_heads": 6}}, "model_kwargs ("),
    "fewer images": ({"num_samples": 9}, "num_samples (None, now 9) and images"),
    "other images": ({"images": IMAGES + 1}, "images"),
    "batch size": ({"batch_size": 3, "workers": 0, "device": "cpu", "max_skipped": 0.5, "tile_bytes": 10**6}, None),
    "the same, spelt out": ({"threshold": 0.9, "layers": iter([]), "num_samples": None}, None),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.sweep if case in ("several", "layers", "fewer images") else [])
        for case in CHANGES
    ],
)
def test_another_option_measures_again_and_says_so(run, tmp_path, measured, case):
    changes, words = CHANGES[case]
    paths, images = [run / "ckpt_1.pt", run / "ckpt_2.pt"], changes.get("images", IMAGES)
    quietly(paths, IMAGES, out=tmp_path / "out")
    measured.clear()
    notes = Notes()
    options = {name: value for name, value in changes.items() if name != "images"}
    series = quietly(paths, images, out=tmp_path / "out", progress=notes, **options)
    assert measured == ([] if words is None else ["ckpt_1.pt", "ckpt_2.pt"])
    if words is not None:
        (text,) = notes.texts
        assert text.startswith(f"Measured before with other {words}")
        assert text.endswith(", and again now: ckpt_1.pt, ckpt_2.pt.")
        alone = cp.analyze(paths[0], images, **{**OPTIONS, **options})
        assert_equal(series.analyses[100], alone)
        assert_equal(cp.Analysis.load(tmp_path / "out" / series.points[0].folder), alone)


def test_another_version_measures_again(run, tmp_path, measured, monkeypatch):
    quietly(run / "ckpt_1.pt", IMAGES, out=tmp_path / "out")
    monkeypatch.setattr(tracking.importlib.metadata, "version", lambda _: "99")
    notes = Notes()
    quietly(run / "ckpt_1.pt", IMAGES, out=tmp_path / "out", progress=notes)
    assert measured == ["ckpt_1.pt", "ckpt_1.pt"]
    assert "now 99" in notes.texts[0]


@pytest.mark.parametrize("damage", ["arrays.npz", "measured.json"])
def test_what_was_kept_and_is_damaged_is_measured_again(run, tmp_path, measured, damage):
    out = tmp_path / "out"
    quietly(run / "ckpt_1.pt", IMAGES, out=out)
    (out / "checkpoints" / "ckpt_1.pt" / "report.html").write_text("of the first run")
    (out / "checkpoints" / "ckpt_1.pt" / damage).write_bytes(b"{")
    series = quietly(run / "ckpt_1.pt", IMAGES, out=out)
    assert measured == ["ckpt_1.pt", "ckpt_1.pt"]
    assert_equal(cp.Analysis.load(out / series.points[0].folder), series.points[0].analysis)
    assert not (out / "checkpoints" / "ckpt_1.pt" / "report.html").exists()
    quietly(run / "ckpt_1.pt", IMAGES, out=out)
    assert len(measured) == 2


def test_images_of_a_loader_are_taken_anew(run, tmp_path, measured):
    loader = DataLoader(IMAGES, batch_size=4)
    notes = Notes()
    for _ in range(2):
        quietly(run / "ckpt_1.pt", loader, out=tmp_path / "out", progress=notes)
    assert measured == ["ckpt_1.pt", "ckpt_1.pt"]
    assert notes.texts == [
        "Whether a loader delivers the same images as before cannot be known: every checkpoint is measured again."
    ]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, pytest.param(SystemExit, marks=pytest.mark.sweep)])
def test_interrupted_runs_leave_what_is_done(run, tmp_path, monkeypatch, interruption):
    out, notes, names = tmp_path / "out", Notes(), []

    def interrupted(path, *arguments, **options):
        names.append(path.name)
        if len(names) == 3:
            raise interruption
        return cp.analyze(path, *arguments, **options)

    monkeypatch.setattr(tracking, "analyze", interrupted)
    with pytest.raises(interruption):
        quietly(run, IMAGES, out=out, progress=notes)
    assert notes.texts == [
        f"2 of 3 checkpoints are measured and kept in {out / 'checkpoints'}: the same command goes on from there."
    ]
    assert not (out / "track.json").exists()
    names.append("from here on nothing is interrupted")
    assert quietly(run, IMAGES, out=out).steps == [100, 200, 1000]
    assert names[-1:] == ["ckpt_10.pt"]
    assert len(names) == 5


# -- what is heard and what is refused ---------------------------------------------------------------------------------


def test_one_progress_for_all(run):
    notes = Notes()
    quietly(run, IMAGES, progress=notes, batch_size=5)
    totals = {total for _, total in notes.calls}
    assert totals == {30}
    done = [done for done, _ in notes.calls]
    assert done == sorted(done)
    assert done[-1] == 30


def test_warnings_about_each_checkpoint_come_once(run):
    with pytest.warns(UserWarning, match="No images given") as caught:
        cp.track(run, None, num_samples=4, **OPTIONS)
    texts = [str(warning.message) for warning in caught]
    assert len([text for text in texts if text.startswith("No images given")]) == 1
    with pytest.warns(UserWarning, match="assumed|taken to be") as caught:
        cp.track(run, IMAGES, metrics="attention_entropy")  # whose architecture nobody registered
    assert len([text for text in map(str, (item.message for item in caught)) if "number of heads" in text]) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nonsense": 1}, "nonsense: not an option of track. Choose among arch, use_ema"),
        ({"checkpoint": "a.pt"}, "checkpoint: not an option of track"),
        ({"resume": True, "shard": "1/2"}, "resume, shard: not an option of track"),
        ({"threshold": 7}, "threshold must lie within"),
        ({"metrics": "nonsense"}, "metrics nonsense: not known"),
        ({"device": "nonsense"}, "device 'nonsense' is not known"),
        ({"std": (0.0,)}, "std must be finite numbers above 0"),
        ({"layers": 7}, "layers must be patterns"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(run, measured, options, words):
    with pytest.raises(UsageError, match="^" + words.replace("(", r"\(").replace(".", r"\.")):
        quietly(run, IMAGES, **options)
    assert measured == []


def test_other_arguments_that_cannot_be(run, tmp_path):
    with pytest.raises(UsageError, match="An iterator has its images only once"):
        quietly(run, iter([IMAGES]))
    with pytest.raises(UsageError, match="There is no checkpoint to track"):
        quietly([], IMAGES)
    with pytest.raises(UsageError, match="does not exist"):
        quietly(run / "nothing.pt", IMAGES)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        quietly(run, IMAGES, out=tmp_path / "file")


# -- the series as data ------------------------------------------------------------------------------------------------


def series_of(*steps, **more):
    return Series.from_analyses({step: make_analysis(4 + number) for number, step in enumerate(steps)}, **more)


def test_a_series_of_analyses_at_hand():
    series = series_of(30, 10, np.int64(20), unit="epoch")
    assert series.steps == [10, 20, 30]
    assert [len(item.layers) for item in series.analyses.values()] == [5, 6, 4]
    assert len(series) == 3
    assert repr(series) == "Series(3 checkpoints, epoch 10 to 30)"
    assert repr(series_of(1234567890)) == "Series(1 checkpoints, step 1234567890 to 1234567890)"
    assert set(series.table.step) == {10, 20, 30}
    assert "" not in set(Series.from_analyses({0: two_groups()}).table.layer)  # nothing was derived


def test_what_is_no_series():
    analysis = make_analysis()
    with pytest.raises(UsageError, match="at least one analysis"):
        Series.from_analyses({})
    for step in (float("nan"), float("inf"), "5", None, True):
        with pytest.raises(UsageError, match="Steps must be finite numbers"):
            Series.from_analyses({step: analysis})
    with pytest.raises(UsageError, match="unit='meters' is unknown"):
        Series.from_analyses({1: analysis}, unit="meters")
    with pytest.raises(UsageError, match="A series holds analyses; got a DataFrame at 1"):
        Series.from_analyses({1: analysis.layers})
    points = [*series_of(1).points, *series_of(1.0).points]
    with pytest.raises(UsageError, match="are both at step 1"):
        Series(points)


def test_saved_and_loaded(tmp_path):
    series = series_of(1, 2.5, 10)
    series.skipped = [{"path": "x.pt", "reason": "It is empty."}]
    series.provenance = {"options": {"seed": 0}}
    folder = series.save(tmp_path / "s")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.json")} == {
        "track.json", *(f"checkpoints/step_{step}/analysis.json" for step in ("1", "2.5", "10")),
    }  # fmt: skip
    loaded = Series.load(folder)
    assert loaded.steps == series.steps
    assert (loaded.unit, loaded.skipped, loaded.provenance) == (series.unit, series.skipped, series.provenance)
    pd.testing.assert_frame_equal(loaded.table, series.table)
    pd.testing.assert_frame_equal(
        pd.read_csv(folder / "track.csv", keep_default_na=True), series.table, check_exact=False
    )
    for step in series.steps:
        assert_equal_data(loaded.analyses[step], series.analyses[step])


def assert_equal_data(one, other):
    assert one.to_dict() == other.to_dict()


def test_tracked_series_load_where_they_were_written(run, tmp_path):
    series = quietly(run, IMAGES, out=tmp_path / "out")
    loaded = Series.load(tmp_path / "out")
    assert repr(loaded) == repr(series)
    pd.testing.assert_frame_equal(loaded.table, series.table)
    assert loaded.provenance["options"]["arch"] == ARCH


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a saved series: track.json is missing"),
        ("{", "cannot be read"),
        ("[]", "has schema version None"),
        ('{"schema_version": 9}', "has schema version 9; this version of collapse_probe reads 1"),
        ('{"schema_version": 1}', "is not as it was written"),
        ('{"schema_version": 1, "unit": "step", "points": [{"folder": "../elsewhere"}]}', "is not a folder in it"),
        ('{"schema_version": 1, "unit": "step", "points": [{"folder": "/elsewhere"}]}', "is not a folder in it"),
        ('{"schema_version": 1, "unit": "step", "points": [{"folder": "gone"}]}', "is not a saved analysis"),
        (
            '{"schema_version": 1, "unit": "step", "points": [], "skipped": [], "provenance": {}}',
            "at least one analysis",
        ),
    ],
)
def test_damaged_series(tmp_path, content, words):
    if content is not None:
        (tmp_path / "track.json").write_text(content)
    with pytest.raises(DamagedFileError, match=words):
        Series.load(tmp_path)


def test_places_are_names_that_every_system_takes():
    assert place_for("epoch=3-step=7.ckpt", []) == "epoch=3-step=7.ckpt"
    assert place_for("a/b.pt", ["x"]) == "a_b.pt"
    assert place_for("A.pt", ["a.pt", "a.pt_2"]) == "A.pt_3"
    assert place_for("../..", []) == "checkpoint"
    assert place_for("\x1b[31m<b>\n", []) == "31m_b"
    assert len(place_for("x" * 500, [])) == 80
