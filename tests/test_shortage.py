"""Memory that runs out: smaller batches, the same readings, and a sentence with sizes where one image is too much."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from _models import build
from test_resuming import Notes
from test_scale_out import IMAGES, assert_same, pictures, vit
from torch.utils.data import DataLoader, TensorDataset

import collapse_probe as cp
from collapse_probe import measured, resuming, streaming
from collapse_probe.errors import CaptureError, ResourceError, is_out_of_memory
from collapse_probe.partial import Partial

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 96 bytes."
)
WINDOWS = (
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 96 bytes."
)
CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB."
MPS = "MPS backend out of memory (MPS allocated: 9.0 GB). Tried to allocate 2.00 GB on private pool."


def of_numpy():
    with pytest.raises(MemoryError, match="Unable to allocate") as caught:
        np.empty(1 << 40)
    return caught.value


SHORTAGES = {
    "cuda": lambda: torch.OutOfMemoryError(CUDA),
    "cpu": lambda: RuntimeError(CPU),
    "windows": lambda: RuntimeError(WINDOWS),
    "mps": lambda: RuntimeError(MPS),
    "python": MemoryError,
    "numpy": lambda: of_numpy(),
}


def holding(model, most, error=SHORTAGES["cuda"]):
    """A model that has memory for so many images."""

    def check(_module, inputs):
        if len(inputs[0]) > most:
            raise error()

    model.blocks[1].register_forward_pre_hook(check)
    return model


@pytest.mark.parametrize("kind", SHORTAGES)
def test_what_is_a_shortage(kind):
    assert is_out_of_memory(SHORTAGES[kind]())


def test_what_is_none():
    for error in (RuntimeError("shapes differ"), ValueError(CPU), CaptureError("no map"), KeyboardInterrupt()):
        assert not is_out_of_memory(error)


@pytest.mark.parametrize("kind", ["cuda", "cpu", "python"])
@pytest.mark.parametrize("metrics", ["fast", "all"])
def test_batches_are_halved_where_the_model_needs_too_much(kind, metrics):
    notes = Notes()
    whole = cp.analyze(vit(), IMAGES, metrics=metrics)
    model = holding(vit(), 6, SHORTAGES[kind])
    halved = cp.analyze(model, IMAGES, batch_size=16, metrics=metrics, progress=notes)
    assert_same(whole, halved)
    assert notes == [
        "Out of memory with 16 images at a time: going on with 8.",
        "Out of memory with 8 images at a time: going on with 4.",
    ]
    assert halved.provenance["batch_size_used"] == 4
    assert halved.provenance["options"]["batch_size"] == 16
    assert "batch_size_used" not in whole.provenance


def test_the_first_batch_is_verified_and_turned_around_also_where_it_is_halved():
    halved = cp.analyze(holding(vit(), 2), IMAGES, verify=True)
    assert halved.provenance["verification"]["passed"]
    assert halved.provenance["verification"]["kernels"] == 3


def test_images_are_told_apart_also_where_memory_was_short_for_that(monkeypatch):
    out_of_order, sizes = streaming.out_of_order, []

    def short(model, images, maps):
        sizes.append(len(images))
        if len(images) > 8:
            raise torch.OutOfMemoryError(CUDA)
        return [*out_of_order(model, images, maps), "blocks.1.attn"]

    monkeypatch.setattr(streaming, "out_of_order", short)
    assert list(cp.analyze(vit(), IMAGES).layers.index) == ["blocks.0.attn", "blocks.2.attn"]
    assert sizes == [30, 15, 7]


def test_a_model_that_runs_short_in_mid_run():
    """What was measured before stays as it was."""
    model, calls = vit(), []

    def check(_module, inputs):
        calls.append(len(inputs[0]))
        if len(calls) > 3 and len(inputs[0]) > 2:
            raise torch.OutOfMemoryError(CUDA)

    model.blocks[2].register_forward_pre_hook(check)
    assert_same(cp.analyze(vit(), IMAGES), cp.analyze(model, IMAGES, batch_size=7))
    assert calls == [7, 7, 7, 7, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "step",
    ["capture.context.head_norms", "capture.context.product_error", "capture.dataflow.AttentionTracer._observe",
     "capture.residual.ResidualFollower.before"],
)  # fmt: skip
def test_a_shortage_while_maps_are_captured_is_no_gap(monkeypatch, step, kind):
    """What goes wrong there is a reason not to capture a layer; a shortage is a reason to try fewer images."""
    whole = cp.analyze(vit(), IMAGES, verify=True)
    import importlib

    path = f"collapse_probe.{step}".split(".")
    owner = importlib.import_module(".".join(path[:3]))
    for name in path[3:-1]:
        owner = getattr(owner, name)
    job, images = getattr(owner, path[-1]), [0]

    def short(*arguments):
        if images[0] > 8:
            raise SHORTAGES[kind]()
        return job(*arguments)

    monkeypatch.setattr(owner, path[-1], short)
    model = vit()
    model.register_forward_pre_hook(lambda _module, inputs: images.__setitem__(0, len(inputs[0])))
    halved = cp.analyze(model, IMAGES, verify=True)
    assert halved.provenance["batch_size_used"] == 7
    assert_same(whole, halved)


def test_a_loaders_own_batches_are_split():
    loader = DataLoader(TensorDataset(IMAGES), batch_size=15)
    assert_same(cp.analyze(vit(), loader), cp.analyze(holding(vit(), 4), loader))


def test_precision_is_judged_where_it_would_be_without_a_shortage():
    options = {"batch_size": 6, "until_se": 0.012}
    whole, halved = cp.analyze(vit(), IMAGES, **options), cp.analyze(holding(vit(), 4), IMAGES, **options)
    assert 16 <= whole.provenance["images"]["count"] < 30
    assert_same(whole, halved)
    assert halved.provenance["images"] == whole.provenance["images"]


def shortage_while_adding(monkeypatch, most, error=SHORTAGES["cpu"]):
    """Metrics that have memory for so many images; a part of the sums is added to by then."""
    feed = measured.feed

    def short(metrics, maps, tile_bytes, index):
        if len(index) > most:
            feed(metrics[:2], maps, tile_bytes, index)
            raise error()
        feed(metrics, maps, tile_bytes, index)

    monkeypatch.setattr(measured, "feed", short)


@pytest.mark.parametrize("partial", [False, True])
def test_sums_that_were_spoilt_are_made_anew(monkeypatch, tmp_path, partial):
    batches = [IMAGES[:4], *IMAGES[4:].split(13)]
    whole = cp.analyze(vit(), batches)
    shortage_while_adding(monkeypatch, 8)
    monkeypatch.setattr(resuming, "SAVE_EVERY", 0.0)
    model, notes, calls = vit(), Notes(), []
    model.register_forward_pre_hook(lambda _module, inputs: calls.append(len(inputs[0])))
    more = {"partial": tmp_path / "partial"} if partial else {}
    assert_same(whole, cp.analyze(model, batches, progress=notes, **more))
    assert calls[:2] == [4, 13]
    assert sum(calls[2:]) == (26 if partial else 30)  # from the state that was saved, or from the beginning
    assert notes == ["Out of memory with 13 images at a time: going on with 6."]
    assert not (tmp_path / "partial").exists()


def test_images_that_cannot_be_had_again(monkeypatch):
    shortage_while_adding(monkeypatch, 8)
    with pytest.raises(ResourceError, match=r"cannot be had again: give a DataLoader or a list instead of an iterator"):
        cp.analyze(vit(), iter([IMAGES]))


@pytest.mark.parametrize("kind", SHORTAGES)
@pytest.mark.parametrize("where", ["model", "metrics"])
def test_one_image_is_too_much(monkeypatch, where, kind):
    model = vit()
    if where == "model":
        holding(model, 0, SHORTAGES[kind])
    else:
        shortage_while_adding(monkeypatch, 0, SHORTAGES[kind])
    with pytest.raises(ResourceError, match=r"^Out of memory, even with one image at a time: ") as caught:
        cp.analyze(model, IMAGES)
    sizes = {"cuda": "20.00 GiB", "mps": "2.00 GB", "numpy": "8.00 TiB"}
    said = str(caught.value)
    assert ("what did not fit asked for" in said) == (kind != "python")
    assert sizes.get(kind, "") in said
    assert ("the model's weights take" in said) == (where == "model")
    assert "free are" in said
    assert model(IMAGES[:0]).shape[0] == 0 if where == "metrics" else True
    assert not any(module._forward_hooks for module in model.modules())


def test_states_survive_a_shortage(tmp_path, monkeypatch):
    """What was saved before one image was too much can go on on a larger machine."""
    monkeypatch.setattr(resuming, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(resuming, "SHARE", 1e9)
    model, calls = vit(), []

    def check(*_):
        calls.append(0)
        if len(calls) > 3:
            raise MemoryError

    handle = model.register_forward_pre_hook(check)
    with pytest.raises(ResourceError, match="after 24 images"):
        cp.analyze(model, IMAGES, batch_size=8, partial=tmp_path / "p")
    handle.remove()
    assert Partial.load(tmp_path / "p").images == 24
    assert_same(cp.analyze(vit(), IMAGES, batch_size=8),
                cp.analyze(vit(), IMAGES, batch_size=8, partial=tmp_path / "p", resume=True))  # fmt: skip


def test_other_errors_are_not_taken_for_a_shortage():
    model = build("vit_tiny_patch16_224")
    model.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("by design")))
    with pytest.raises(RuntimeError, match="by design"):
        cp.analyze(model, IMAGES.float())


def test_the_command_says_it_with_code_6(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from collapse_probe.cli.app import app
    from collapse_probe.loading import folder as folder_module

    def short(*_):
        raise MemoryError

    monkeypatch.setattr(folder_module, "_readable_only", short)
    done = CliRunner().invoke(app, ["analyze", "digits_vit_24b", "--images", str(pictures(tmp_path / "p", 4)), "-q"])
    assert done.exit_code == 6, done.stderr
    assert done.stderr.startswith("Error: Out of memory")


@pytest.mark.sweep
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs limits on address space as Linux keeps them")
def test_memory_that_really_ends(tmp_path):
    code = """
        import resource, torch, timm, collapse_probe as cp
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=224)
        images = torch.randn(256, 3, 224, 224)
        cp.analyze(model, images[:2], metrics="attention_entropy")  # all libraries are loaded by now
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
        analysis = cp.analyze(model, images, batch_size=256, metrics="attention_entropy")
        print(analysis.provenance["batch_size_used"], analysis.provenance["images"]["count"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    used, count = map(int, done.stdout.split())
    assert count == 256
    assert used < 256
