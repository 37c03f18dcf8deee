"""What checkpoints state of their place in training, and which checkpoints files, folders and patterns mean."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from collapse_probe.errors import ModelError, UsageError
from collapse_probe.loading import checkpoint_digest, list_checkpoints
from collapse_probe.loading.checkpoint import read_checkpoint
from tests.loading.conftest import ARCH, TINY

Build = Callable[..., nn.Module]


def _training(path: Path) -> dict[str, object]:
    return {unit: (entry["number"], entry["stated"]) for unit, entry in read_checkpoint(path).facts["training"].items()}


#: What lies beside the weights -> step and epoch that it states.
STATED = {
    "timm": ({"epoch": 12, "arch": ARCH, "version": 2, "metric": 0.7}, {"epoch": (12, "epoch")}),
    "Lightning": (
        {"epoch": 3, "global_step": 4000, "pytorch-lightning_version": "2.4.0", "loops": {"epoch": 9}},
        {"step": (4000, "global_step"), "epoch": (3, "epoch")},
    ),
    "DINOv2": ({"iteration": 624999}, {"step": (624999, "iteration")}),
    "OpenMMLab": ({"meta": {"epoch": 5, "iter": 600}}, {"step": (600, "meta.iter"), "epoch": (5, "meta.epoch")}),
    "DeepSpeed": ({"global_steps": 70, "global_samples": 4480}, {"step": (70, "global_steps")}),
    "a tensor": ({"step": torch.tensor(17)}, {"step": (17, "step")}),
    "before the first step": ({"step": 0}, {"step": (0, "step")}),
    "part of an epoch": ({"epoch": 2.5}, {"epoch": (2.5, "epoch")}),
    "how long training is to be": ({"epochs": 300, "args": {"epoch": 300}}, {}),
    "no numbers": ({"step": "500", "epoch": None, "iteration": [1], "meta": 3, "iter": True}, {}),
    "no numbers of steps": ({"step": -1, "epoch": float("nan"), "iteration": 10**400, "iter": torch.ones(2)}, {}),
}


@pytest.mark.parametrize("case", STATED)
def test_what_a_checkpoint_states(tmp_path: Path, tiny: Build, case: str) -> None:
    beside, expected = STATED[case]
    torch.save({"state_dict": tiny().state_dict(), **beside}, tmp_path / "c.pt")
    assert _training(tmp_path / "c.pt") == expected


def test_metadata_of_safetensors(tmp_path: Path, tiny: Build) -> None:
    save_file(
        tiny().state_dict(), tmp_path / "c.safetensors", {"global_step": "500", "epoch": "x" * 9000, "step": "[[["}
    )
    assert _training(tmp_path / "c.safetensors") == {"step": (500, "global_step")}


@pytest.mark.parametrize("content", ['{"global_step": 500, "epoch": 2.56, "max_steps": 900}', "[", "[1]", "[" * 10**5])
def test_a_trainers_file_beside_its_weights(tmp_path: Path, tiny: Build, content: str) -> None:
    for name in ("model.safetensors", "other.safetensors"):
        save_file(tiny().state_dict(), tmp_path / name)
    (tmp_path / "trainer_state.json").write_text(content)
    stated = {"step": (500, "trainer_state.json: global_step"), "epoch": (2.56, "trainer_state.json: epoch")}
    assert _training(tmp_path / "model.safetensors") == (stated if content[0] == "{" else {})
    assert _training(tmp_path / "other.safetensors") == {}  # one of several, whoever it belongs to


LIGHTNING = {f"lightning_logs/version_0/checkpoints/{name}" for name in ("epoch=0-step=9.ckpt", "last.ckpt")}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as trainings leave it; nothing in it is read."""
    names = [
        "step_1.pt", "step_2.pt", "optimizer.pt", "args.yaml", "notes.json", "hf/checkpoint-5/model.safetensors",
        "hf/checkpoint-5/optimizer.pt", "hf/checkpoint-5/config.json", "hf/checkpoint-10/model.safetensors",
        "hf/checkpoint-10/rng_state.pth", "hf/checkpoint-10/trainer_state.json", "hf/model.safetensors",
        "hf/config.json", *LIGHTNING, "lightning_logs/version_0/hparams.yaml", "steps/epoch_1/weights.pt",
        "steps/epoch_2/weights.pt", "out/checkpoints/a.npz", "odd/a[1].pt", "odd/a1.pt", "none/readme.txt",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


#: Sources -> what they mean.
MEANT = {
    ("step_1.pt", "step_*.pt"): {"step_1.pt", "step_2.pt"},
    (".",): {"step_1.pt", "step_2.pt", *LIGHTNING},
    ("*.pt",): {"step_1.pt", "step_2.pt"},
    ("optimizer.pt",): {"optimizer.pt"},
    ("hf",): {"hf", "hf/checkpoint-5", "hf/checkpoint-10"},
    ("hf/checkpoint-*",): {"hf/checkpoint-5", "hf/checkpoint-10"},
    ("hf/checkpoint-5",): {"hf/checkpoint-5"},
    ("hf/*/model.safetensors",): {"hf/checkpoint-5/model.safetensors", "hf/checkpoint-10/model.safetensors"},
    ("lightning_logs/version_0",): LIGHTNING,
    ("steps",): {"steps/epoch_1/weights.pt", "steps/epoch_2/weights.pt"},
    ("steps/**/*.pt",): {"steps/epoch_1/weights.pt", "steps/epoch_2/weights.pt"},
    ("**/*.npz", "step_1.pt"): None,
    ("odd/a[1].pt",): {"odd/a[1].pt"},
    ("odd/a[1]*",): {"odd/a1.pt"},
    ("none", "step_1.pt"): {"none", "step_1.pt"},
}  # fmt: skip


@pytest.mark.parametrize("sources", MEANT, ids="+".join)
def test_which_checkpoints_are_meant(run: Path, monkeypatch: pytest.MonkeyPatch, sources: tuple[str, ...]) -> None:
    monkeypatch.chdir(run)
    expected = MEANT[sources]
    if expected is None:
        with pytest.raises(UsageError, match=r"\*\*/\*\.npz matches no file; check the path"):
            list_checkpoints(sources, [Path("out/checkpoints")])
        return
    found = list_checkpoints(sources, [Path("out/checkpoints")])
    assert {os.path.normpath(path) for path in found} == expected
    assert len(found) == len(expected)


def test_what_is_not_there(run: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.pt does not exist; check the path"):
        list_checkpoints([run / "nowhere.pt"])
    with pytest.raises(UsageError, match="matches no checkpoint"):
        list_checkpoints([run / "non[e]"])


def test_a_folder_in_itself_ends(run: Path) -> None:
    (run / "steps" / "checkpoints").symlink_to(run / "steps")
    found = list_checkpoints([run / "steps"])
    assert len({path.resolve() for path in found}) == 2
    assert len(found) <= 8


def test_a_digest_tells_content_apart_and_nothing_else(tmp_path: Path, tiny: Build) -> None:
    state = tiny().state_dict()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    one, other = tmp_path / "a", tmp_path / "b"
    first = checkpoint_digest(one)
    assert checkpoint_digest(other) == first == checkpoint_digest(one / "model.safetensors")
    (other / "model.safetensors").rename(other / "x.safetensors")
    assert checkpoint_digest(other / "x.safetensors") == first
    (one / "config.json").write_text(json.dumps({"architecture": ARCH, "model_args": TINY}))
    second = checkpoint_digest(one)  # the same weights, and another model
    assert second != first
    save_file({**state, "head.bias": state["head.bias"] + 1}, one / "model.safetensors")
    assert checkpoint_digest(one) not in (first, second)


def test_what_cannot_be_read_has_no_digest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "gone.pt", tmp_path, tmp_path / "pipe"):
        with pytest.raises((ModelError, UsageError)):
            checkpoint_digest(path)
