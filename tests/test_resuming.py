"""Runs that are interrupted and go on: the same readings as if nothing had happened, and no run that is another one."""

from __future__ import annotations

import json
import signal
import threading

import numpy as np
import pytest
import timm
import torch
from _models import perturbed
from PIL import Image
from test_scale_out import CASES, IMAGES, WIDE, assert_same, pictures, swin, vit
from torch.utils.data import DataLoader, TensorDataset

import collapse_probe as cp
from collapse_probe import partial as partial_module
from collapse_probe import resuming
from collapse_probe.errors import CaptureError, DamagedFileError, OutputError, UsageError
from collapse_probe.measured import MeasuredGroup
from collapse_probe.partial import Partial, _digest
from collapse_probe.resuming import Keeper
from collapse_probe.signals import undisturbed

#: What an interruption leaves.
STATE = {"shard.json", "sums.npz"}
SO_FAR = {"analysis.json", "arrays.npz", "layers.csv", "similarity.csv"}


class Notes(list):
    """Who is told how a run goes on."""

    def __bool__(self):
        return True

    def __call__(self, done, total):
        pass

    def note(self, text):
        self.append(text)

    @property
    def text(self):
        return "\n".join(self)


class CutAt:
    """A hook that interrupts the model when it is called for the n-th time."""

    def __init__(self, model, call):
        self.calls, self.left = 0, call
        self._handle = model.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.calls += 1
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()


def calls_of(run, model):
    with CutAt(model, 0) as hook:
        run(model)
    return hook.calls


def cut_and_resumed(run, model, folder, call):
    """The analysis of a run that was interrupted at this call of the model, and what was said when it went on."""
    with CutAt(model, call), pytest.raises(KeyboardInterrupt):
        run(model, partial=folder)
    notes = Notes()
    return run(model, partial=folder, resume=True, progress=notes), notes


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


RUNS = {
    **{case: (make, images, options) for case, (make, images, options) in CASES.items()},
    "some layers": (vit, IMAGES, {"layers": "blocks.[02].*", "batch_size": 5, "verify": True}),
    "precise enough": (vit, IMAGES, {"until_se": 0.012, "batch_size": 3}),
    "windows, whole suite": (swin, WIDE[:9], {"metrics": "all", "batch_size": 2}),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.sweep if case in ("some layers", "windows") else []) for case in RUNS]
)
def test_cut_at_every_batch(tmp_path, case):
    make, images, options = RUNS[case]
    model = make()

    def run(model, **more):
        return cp.analyze(model, images, **{"batch_size": 4, **options, **more})

    whole = run(model)
    if case == "precise enough":
        assert 16 <= whole.provenance["images"]["count"] < len(images)
    went_on = 0
    for call in range(1, calls_of(run, model) + 1):
        folder = tmp_path / str(call)
        resumed, notes = cut_and_resumed(run, model, folder, call)
        assert_same(whole, resumed, atol=1e-12)
        assert resumed.complete
        assert resumed.provenance["images"] == whole.provenance["images"]
        assert resumed.provenance.get("verification") == whole.provenance.get("verification")
        assert resumed.provenance["mixed_after_softmax"] == whole.provenance["mixed_after_softmax"]
        assert not folder.exists()
        went_on += "Going on after" in notes.text
    assert went_on


def test_silent_heads_are_counted_once(tmp_path):
    model = vit()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[2 * 48 + 16 : 2 * 48 + 32] = 0
        model.blocks[1].attn.qkv.bias[2 * 48 + 16 : 2 * 48 + 32] = 0

    def run(model, **more):
        return cp.measure(model, IMAGES[:27], batch_size=5, **more)

    sums = run(model).sums["A/heads/silent"]
    assert sums[0, 1].tolist() == [0, 27, 0]
    for call in (2, 4, 6):
        resumed, _ = cut_and_resumed(run, model, tmp_path / str(call), call)
        np.testing.assert_array_equal(resumed.sums["A/heads/silent"], sums)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.sweep)])
def test_unreadable_files_before_and_after_the_cut(tmp_path, workers):
    folder = pictures(tmp_path / "pictures", 240, broken={7, 190})
    model = vit().float()

    def run(model, **more):
        return cp.analyze(model, folder, batch_size=25, workers=workers, metrics="fast,cka", **more)

    whole = run(model)
    skipped = whole.provenance["images"]["skipped"]
    assert len(skipped) == 2
    seen = set()
    for call in range(2, 11):
        state = tmp_path / f"run{call}"
        with CutAt(model, call), pytest.raises(KeyboardInterrupt):
            run(model, partial=state)
        if state.exists():
            seen.add(len(Partial.load(state).provenance["images"]["skipped"]))
        resumed = run(model, partial=state, resume=True)
        assert resumed.provenance["images"]["skipped"] == skipped
        assert resumed.provenance["images"]["count"] == 238
        assert_same(whole, resumed, atol=1e-5)
    assert seen == {0, 1, 2}


def test_unreadable_files_after_the_last_image(tmp_path):
    """A run that is done, and whose results are yet to be written, knows of them too."""
    from collapse_probe.loading.folder import list_images, seeded_order

    folder = pictures(tmp_path / "pictures", 120)
    last = seeded_order(list_images(folder)[0], 0)[-1]
    (folder / last).write_bytes(b"")
    model = vit().float()
    cp.measure(model, folder, partial=Keeper(tmp_path / "state"))
    for _ in range(2):
        resumed = cp.measure(model, folder, partial=Keeper(tmp_path / "state", resume=True))
        assert [entry["path"] for entry in resumed.provenance["images"]["skipped"]] == [last]
        assert resumed.images == 119


def test_files_before_the_cut_are_not_opened_again(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "pictures", 40)
    model = vit().float()
    with CutAt(model, 4), pytest.raises(KeyboardInterrupt):
        cp.analyze(model, folder, batch_size=8, partial=tmp_path / "state")
    assert Partial.load(tmp_path / "state").images == 24
    opened = []
    from collapse_probe.loading import folder as folder_module

    decode = folder_module.decode
    monkeypatch.setattr(folder_module, "decode", lambda path, channels: opened.append(path) or decode(path, channels))
    cp.analyze(model, folder, batch_size=8, partial=tmp_path / "state", resume=True)
    assert len(opened) == 16


@pytest.mark.parametrize("shard", ["1/1", "2/3"])
def test_a_loader_is_iterated_up_to_the_cut(tmp_path, shard):
    loader = DataLoader(TensorDataset(IMAGES), batch_size=7)
    model = vit()

    def run(model, **more):
        return cp.measure(model, loader, shard=shard, **more)

    whole = run(model)
    count = calls_of(run, model)
    for call in range(2, count + 1):
        resumed, notes = cut_and_resumed(run, model, tmp_path / str(call), call)
        if "Going on" in notes.text:
            assert "The loader is taken to deliver the same images in the same order." in notes.text
        assert resumed.sums.keys() == whole.sums.keys()
        for name, values in whole.sums.items():
            np.testing.assert_allclose(resumed.sums[name], values, rtol=1e-12, atol=1e-12, err_msg=name)


def test_a_run_goes_on_with_other_batches(tmp_path):
    model = vit()
    with CutAt(model, 5), pytest.raises(KeyboardInterrupt):
        cp.analyze(model, IMAGES, batch_size=5, partial=tmp_path)
    assert_same(cp.analyze(model, IMAGES), cp.analyze(model, IMAGES, batch_size=4, partial=tmp_path, resume=True))


# -- what is saved, and when -------------------------------------------------------------------------------------------


def test_what_an_interruption_leaves(tmp_path):
    model, notes = vit().train(), Notes()
    folder = tmp_path / "run" / "partial"
    with CutAt(model, 5), pytest.raises(KeyboardInterrupt):
        cp.analyze(model, IMAGES, batch_size=6, partial=folder, progress=notes)
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert names(folder) == STATE | SO_FAR
    assert notes == [f"Saved the sums over 24 of 30 images to {folder}. To go on: resume=True"]
    part = cp.Analysis.load(folder)
    assert part.provenance["complete"] is False
    assert part.provenance["images"]["planned"] == 30
    assert not part.complete
    assert "partial: 24 of 30 images" in repr(part)
    from collapse_probe.report.content import extent
    from collapse_probe.report.html import render_html

    assert extent(part) == "3 attention layers · partial: 24 of 30 images (tensor)"
    assert "partial: 24 of 30 images" in render_html(part)
    assert "VisionTransformer (partial)</title>" in render_html(part)


def test_nothing_is_left_where_nothing_was_measured(tmp_path):
    model, notes = vit(), Notes()
    with CutAt(model, 1), pytest.raises(KeyboardInterrupt):
        cp.analyze(model, IMAGES, partial=tmp_path / "partial", progress=notes)
    assert not (tmp_path / "partial").exists()
    assert notes == []


def test_states_are_saved_as_time_passes_and_seldom_where_that_takes_long(tmp_path, monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(resuming.time, "monotonic", lambda: clock[0])

    class Slow(Partial):
        def save(self, folder):  # noqa: ARG002
            saved.append(clock[0])
            clock[0] += 3.0

    keeper = Keeper(tmp_path)
    for _ in range(1000):
        clock[0] += 1.0
        if keeper.due:
            keeper.save(lambda: Slow(None, 0, {}), print)
    assert saved[0] == 60
    assert len(saved) * 3.0 <= 0.03 * clock[0]
    assert len(saved) > 5


def test_a_state_that_cannot_be_saved_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "SAVE_EVERY", 0.0)
    (tmp_path / "file").write_text("x")
    notes, model = Notes(), vit()
    analysis = cp.analyze(model, IMAGES, batch_size=4, partial=tmp_path / "file" / "partial", progress=notes)
    assert_same(cp.analyze(model, IMAGES, batch_size=4), analysis)
    assert len(notes) == 1
    assert "cannot be saved: Cannot write" in notes[0]
    with CutAt(model, 5), pytest.raises(KeyboardInterrupt):
        cp.analyze(model, IMAGES, batch_size=4, partial=tmp_path / "file" / "partial", progress=notes)


def test_killed_between_any_two_steps_of_a_save(tmp_path, monkeypatch):
    """The old pair or the new one, never a mixture, and the next save works."""
    model = vit()
    first, second = (cp.measure(model, IMAGES[:count]) for count in (8, 12))

    class Killed(BaseException):
        pass

    steps = []
    write, move = partial_module.write_atomically, partial_module.move
    for at in range(6):
        folder = first.save(tmp_path / str(at))
        taken = []

        def run(job, taken=taken, at=at):
            def stepped(*arguments):
                if len(taken) == at:
                    raise Killed
                taken.append("before")
                result = job(*arguments)
                if len(taken) == at:
                    raise Killed
                taken.append("after")
                return result

            return stepped

        monkeypatch.setattr(partial_module, "write_atomically", run(write))
        monkeypatch.setattr(partial_module, "move", run(move))
        with pytest.raises(Killed):
            second.save(folder)
        monkeypatch.undo()
        loaded = Partial.load(folder)
        steps.append(loaded.images)
        twin = first if loaded.images == 8 else second
        for name, values in twin.sums.items():
            np.testing.assert_array_equal(loaded.sums[name], values)
        first.save(folder)
        assert Partial.load(folder).images == 8
        assert names(folder) == STATE
    assert steps == [8, 8, 8, 12, 12, 12]


def test_a_full_disk_leaves_the_old_pair(tmp_path, monkeypatch):
    model = vit()
    first, second = (cp.measure(model, IMAGES[:count]) for count in (8, 12))
    folder = first.save(tmp_path)
    write = partial_module.write_atomically

    def full(path, content):
        if path.name == "shard.json":
            raise OutputError("No space left on device")
        return write(path, content)

    monkeypatch.setattr(partial_module, "write_atomically", full)
    with pytest.raises(OutputError):
        second.save(folder)
    assert names(folder) == STATE
    assert Partial.load(folder).images == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_end_of_a_block(number):
    came = []
    before = signal.signal(number, lambda *_: came.append("now"))
    try:
        with undisturbed():
            signal.raise_signal(number)
            with undisturbed():
                signal.raise_signal(number)
            came.append("done")
        assert came == ["done", "now"]
        signal.raise_signal(number)
        assert came == ["done", "now", "now"]
        signal.signal(number, signal.SIG_IGN)
        with undisturbed():
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_other_threads_measure_too(tmp_path):
    """Where signals cannot be deferred, they never come."""
    found = []
    thread = threading.Thread(target=lambda: found.append(cp.analyze(vit(), IMAGES[:9], partial=tmp_path / "p")))
    thread.start()
    thread.join()
    assert_same(found[0], cp.analyze(vit(), IMAGES[:9]))


def test_interrupted_while_sums_are_added_to(tmp_path, monkeypatch):
    """The images at hand are in the sums as a whole, and the interruption comes after them."""
    from collapse_probe import measured

    feed, calls = measured.feed, []

    def interrupted(*arguments):
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        feed(*arguments)

    model = vit()
    with monkeypatch.context() as patched:
        patched.setattr(measured, "feed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cp.analyze(model, IMAGES, batch_size=4, partial=tmp_path)
    assert Partial.load(tmp_path).images == 12
    assert_same(cp.analyze(model, IMAGES, batch_size=4),
                cp.analyze(model, IMAGES, batch_size=4, partial=tmp_path, resume=True), atol=1e-12)  # fmt: skip


# -- what may go on ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(tmp_path):
    """What a run has left that was interrupted."""
    model = vit()
    with CutAt(model, 4), pytest.raises(KeyboardInterrupt):
        cp.analyze(model, IMAGES, batch_size=8, partial=tmp_path / "partial")
    return tmp_path / "partial"


def test_nothing_to_go_on_from(tmp_path):
    notes = Notes()
    analysis = cp.analyze(vit(), IMAGES, partial=tmp_path / "partial", resume=True, progress=notes)
    assert notes == [f"{tmp_path / 'partial'} holds nothing to go on from: starting with the first image."]
    assert_same(cp.analyze(vit(), IMAGES), analysis)


def test_without_resume_a_run_starts_over_and_says_so(cut):
    notes = Notes()
    (cut / "mine.txt").write_text("not ours to remove")
    analysis = cp.analyze(vit(), IMAGES, batch_size=8, partial=cut, progress=notes)
    assert notes == [f"{cut} held what an interrupted run has measured: starting over."]
    assert analysis.provenance["images"]["count"] == 30
    assert names(cut) == {"mine.txt"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": perturbed(vit(), 1e-6)}, r"weights \(\w+ and \w+\)"),
        ({"images": IMAGES[:29]}, r"numbers of images \(30 and 29\)"),
        ({"images": IMAGES + 1e-9}, "images"),
        ({"images": DataLoader(TensorDataset(IMAGES), 8)}, r"kinds of images \(tensor and loader\)"),
        ({"seed": 1}, r"options \(seed: 0 and 1\)"),
        ({"metrics": "all"}, r"options \(metrics: fast and all\)"),
        ({"layers": "blocks.0.*"}, "options"),
        ({"until_se": 0.01}, r"options \(until_se: None and 0.01\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_another_run_is_refused(cut, change, words):
    before = {path.name: path.read_bytes() for path in cut.iterdir()}
    arguments = {"model": vit(), "images": IMAGES, **change}
    with pytest.raises(UsageError, match=f"^The interrupted run was measured with different {words}.*start over"):
        cp.analyze(**arguments, batch_size=8, partial=cut, resume=True)
    assert {path.name: path.read_bytes() for path in cut.iterdir()} == before


def test_another_shard_or_version_is_refused(cut, monkeypatch):
    with pytest.raises(UsageError, match=r"different shards \(1/1 and 1/2\)"):
        cp.measure(vit(), IMAGES, shard="1/2", partial=cut, resume=True)
    from collapse_probe import analysis

    versions = analysis._versions()
    monkeypatch.setattr(analysis, "_versions", lambda: versions | {"torch": "9.9"})
    with pytest.raises(UsageError, match=r"different versions \(torch: .* and 9.9\)"):
        cp.analyze(vit(), IMAGES, partial=cut, resume=True)


def test_an_unfinished_run_is_no_shard(cut):
    with pytest.raises(UsageError, match=r"^Shard 1/1 is not finished: it holds 24 images"):
        cp.merge([cut])
    model, saved = vit(), Partial.load(cut)
    assert cp.measure(model, IMAGES, finished=saved) is not saved


def test_a_finished_shard_is_no_interrupted_run(tmp_path):
    cp.measure(vit(), IMAGES[:8], shard="1/2").save(tmp_path)
    with pytest.raises(UsageError, match="holds a finished shard"):
        cp.measure(vit(), IMAGES[:8], shard="1/2", partial=tmp_path, resume=True)


@pytest.mark.parametrize("what", ["shard", "analysis"])
def test_results_are_never_taken_for_a_state(tmp_path, what):
    if what == "shard":
        cp.measure(vit(), IMAGES[:8], shard="1/2").save(tmp_path)
    else:
        cp.analyze(vit(), IMAGES[:8]).save(tmp_path)
    before = names(tmp_path)
    with pytest.raises(UsageError, match=f"^{tmp_path} holds results. Keep the state of a run in a folder of its own"):
        cp.analyze(vit(), IMAGES, partial=tmp_path)
    assert names(tmp_path) == before


def test_resume_needs_a_folder():
    with pytest.raises(UsageError, match="resume=True needs partial"):
        cp.analyze(vit(), IMAGES, resume=True)


@pytest.mark.parametrize("what", ["sums", "header", "state"])
def test_a_damaged_state_is_refused(cut, what):
    if what == "sums":
        (cut / "sums.npz").write_bytes(b"x")
    elif what == "header":
        (cut / "shard.json").write_text("{")
    else:
        content = json.loads((cut / "shard.json").read_text())
        content["state"] = {"position": "far"}
        content["digest"] = _digest(content)
        (cut / "shard.json").write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=r"[Ss]tart over without --resume\.$"):
        cp.analyze(vit(), IMAGES, batch_size=8, partial=cut, resume=True)


def test_other_layers_after_the_restart_are_refused(cut, monkeypatch):
    model = vit()
    monkeypatch.setattr(model.blocks[1].attn, "forward", lambda tokens, **_: tokens)
    with pytest.raises(CaptureError, match="different layers"):
        cp.analyze(model, IMAGES, batch_size=8, partial=cut, resume=True)


def test_other_numbers_of_processes_are_refused(cut):
    """Shards of two are not shards of three, nor the whole."""
    keeper = Keeper(cut, resume=True)
    planned = Partial.load_header(cut)
    with pytest.raises(UsageError, match=r"left by 1 process, and this is a run of 2 processes"):
        keeper.of_rank(1, 2).begin(planned, print)
    for rank in (0, 1):
        Partial.load(cut).save(cut / f"rank-{rank + 1}-of-2")
    (cut / "shard.json").unlink()
    for processes, words in ((1, "1 process:"), (3, "3 processes:")):
        with pytest.raises(UsageError, match=f"left by 2 processes, and this is a run of {words}"):
            keeper.of_rank(0, processes).begin(planned, print)
    Keeper(cut).of_rank(1, 3).begin(planned, print)
    assert (cut / "rank-1-of-2" / "shard.json").exists()  # one process removes what is old, for all
    Keeper(cut).of_rank(0, 3).begin(planned, print)
    assert not cut.exists()


def test_sums_that_nobody_knows_are_kept(cut):
    saved = Partial.load(cut)
    saved.sums["labels/right"] = np.array([3, 4])
    saved.save(cut)
    keeper = Keeper(cut, resume=True)
    measured = cp.measure(vit(), IMAGES, batch_size=8, partial=keeper)
    np.testing.assert_array_equal(measured.sums["labels/right"], [3, 4])
    assert measured.images == 30


def test_right_answers_are_counted_once(tmp_path):
    """Images of a unit that was not complete when the run was cut are seen twice, and counted once."""
    for number in range(19):
        path = tmp_path / "images" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = perturbed(timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=3))

    def run(model, **more):
        return cp.analyze(model, tmp_path / "images", batch_size=3, **more)

    whole = run(model)
    assert whole.provenance["top1"]["labelled"] == 19
    for call in range(1, calls_of(run, model) + 1):
        resumed, _ = cut_and_resumed(run, model, tmp_path / str(call), call)
        assert resumed.provenance["top1"] == whole.provenance["top1"]


def test_what_weights_do_not_show_is_another_run(tmp_path):
    """Heads and scales: the same tensors, and other attention."""
    for change in ("num_heads", "scale"):
        model = vit()
        folder = tmp_path / change
        with CutAt(model, 4), pytest.raises(KeyboardInterrupt):
            cp.analyze(model, IMAGES, batch_size=8, partial=folder)
        attention = next(module for module in model.modules() if hasattr(module, change))
        setattr(attention, change, getattr(attention, change) * 2)
        with pytest.raises(UsageError, match="weights"):
            cp.analyze(model, IMAGES, batch_size=8, partial=folder, resume=True)


def test_an_interruption_survives_an_error_of_the_block():
    def fails():
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
            raise MemoryError

    with pytest.raises(KeyboardInterrupt):
        fails()


def test_files_of_others_are_not_removed(tmp_path):
    (tmp_path / "layers.csv").write_text("mine")
    with pytest.raises(UsageError, match="holds results"):
        cp.analyze(vit(), IMAGES, partial=tmp_path)
    newer = tmp_path / "newer"
    cp.analyze(vit(), IMAGES[:8]).save(newer)
    content = json.loads((newer / "analysis.json").read_text())
    (newer / "analysis.json").write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(UsageError, match="holds results"):
        cp.analyze(vit(), IMAGES, partial=newer)
    assert (tmp_path / "layers.csv").read_text() == "mine"
    assert len(names(newer)) == 4


def test_a_run_that_was_precise_enough_when_it_was_cut(tmp_path, monkeypatch):
    """Cut after a batch was added, before it was asked whether that was enough."""
    model, options = vit(), {"until_se": 0.5, "batch_size": 8}
    whole = cp.analyze(model, IMAGES, **options)
    assert whole.provenance["images"]["count"] == 16
    feed = MeasuredGroup.feed

    def interrupted(self, layers, index, tile_bytes):
        feed(self, layers, index, tile_bytes)
        if int(index[-1]) == 15:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MeasuredGroup, "feed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cp.analyze(model, IMAGES, **options, partial=tmp_path)
    monkeypatch.undo()
    resumed = cp.analyze(model, IMAGES, **options, partial=tmp_path, resume=True)
    assert_same(whole, resumed, atol=1e-12)
