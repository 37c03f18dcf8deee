"""Where weights lie: wrappers in wrappers, prefixes, heads of self-supervised training, folders of every exporter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from collapse_probe.errors import DamagedFileError, UsageError, WeightsMismatchError
from collapse_probe.loading import load_model
from collapse_probe.loading.prefixes import cut_prefixes
from tests.loading.conftest import ARCH, TINY

Build = Callable[..., nn.Module]
Same = Callable[[nn.Module, nn.Module], bool]


def _prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def _save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture
def pair(tiny: Build) -> tuple[nn.Module, nn.Module]:
    """Two models of one shape and different weights."""
    other = tiny()
    for parameter in other.parameters():
        parameter.data.add_(1)
    return tiny(), other


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        (lambda state, _: {"state": {"epoch": 3}, "model": {"state_dict": state}}, "model.state_dict"),
        (lambda state, other: {"student": other, "teacher": state, "epoch": 3}, "teacher"),
        (lambda state, _: {"net": state, "optimizer": {"lr": 0.1}}, "net"),
        (lambda state, _: {**state, "epoch": 3, "name": "mine", "loss": None}, None),
        (lambda state, other: {"ema": other, "model": state}, "model"),
        (lambda state, _: {"checkpoint": {"weights": state}}, "checkpoint.weights"),
    ],
)
def test_wrappers(
    tmp_path: Path, pair: tuple[nn.Module, nn.Module], same: Same, layout: Callable[..., Any], key: str | None
) -> None:
    first, second = pair
    loaded = load_model(_save(tmp_path / "w.pt", layout(first.state_dict(), second.state_dict())), ARCH,
                        model_kwargs=TINY)  # fmt: skip
    assert same(loaded, first)
    assert loaded.provenance["weights"]["key"] == key


def test_a_key_chooses_among_weights(tmp_path: Path, pair: tuple[nn.Module, nn.Module], same: Same) -> None:
    first, second = pair
    content = {"teacher": first.state_dict(), "runs": {"student": second.state_dict()}, "epoch": 1}
    path = _save(tmp_path / "w.pt", content)
    loaded = load_model(path, ARCH, model_kwargs=TINY, key="runs.student")
    assert same(loaded, second)
    assert loaded.provenance["weights"]["key"] == "runs.student"
    with pytest.raises(UsageError, match=r"holds no 'pupil' at its top level \('teacher', 'runs', 'epoch'\)"):
        load_model(path, ARCH, key="pupil")
    with pytest.raises(UsageError, match=r"holds no 'x' under 'runs' \('student'\)"):
        load_model(path, ARCH, key="runs.x")
    with pytest.raises(UsageError, match="holds no tensors by name under 'epoch'"):
        load_model(path, ARCH, key="epoch")
    with pytest.raises(UsageError, match=f"key needs a weights file; {ARCH} is a name"):
        load_model(ARCH, key="teacher", pretrained=False)


@pytest.mark.parametrize(
    "prefix",
    ["backbone.", "encoder.", "net.", "module.backbone.", "model.net._orig_mod.", "vit.", "my.feature_extractor."],
)
def test_prefixes(tmp_path: Path, tiny: Build, same: Same, prefix: str) -> None:
    model = tiny()
    loaded = load_model(_save(tmp_path / "w.pt", _prefixed(model.state_dict(), prefix)), ARCH, model_kwargs=TINY)
    assert same(loaded, model)
    assert loaded.provenance["weights"]["prefix_cut"] == prefix
    assert loaded.provenance["weights"]["left_out"] == []


def test_projection_heads_are_left_out_and_listed(tmp_path: Path, tiny: Build, same: Same) -> None:
    """As DINO saves them: backbone and head of the teacher."""
    model = tiny(num_classes=0)
    state = _prefixed(model.state_dict(), "backbone.") | {"head.mlp.0.weight": torch.ones(3, 2).cumsum(0)}
    path = _save(tmp_path / "w.pt", {"teacher": _prefixed(state, "module."), "student": {}})
    loaded = load_model(path, ARCH, model_kwargs=TINY)
    assert same(loaded, model)
    assert loaded.provenance["weights"]["prefix_cut"] == "module.backbone."
    assert loaded.provenance["weights"]["left_out"] == ["module.head.mlp.0.weight"]


def test_of_teacher_and_student_in_one_dict_the_teacher_is_taken(
    tmp_path: Path, pair: tuple[nn.Module, nn.Module], same: Same
) -> None:
    first, second = pair
    state = _prefixed(second.state_dict(), "student.backbone.") | _prefixed(first.state_dict(), "teacher.backbone.")
    loaded = load_model(_save(tmp_path / "lightning.ckpt", {"state_dict": state}), ARCH, model_kwargs=TINY)
    assert same(loaded, first)
    assert len(loaded.provenance["weights"]["left_out"]) == len(second.state_dict())


def test_prefixes_that_belong_to_the_model_stay() -> None:
    """torchvision's `encoder.` and Hugging Face's `encoder.layer.` do not hold the patch embedding."""
    for stem in ("conv_proj.weight", "embeddings.patch_embeddings.projection.weight"):
        state = {stem: torch.zeros(1), "encoder.layer.0.attention.query.weight": torch.zeros(1)}
        assert cut_prefixes(state) == ("", state, [])
    two = {"backbone.patch_embed.w": torch.zeros(1), "backbone.attn.w": torch.zeros(1), "other.attn.w": torch.zeros(1)}
    assert cut_prefixes(two)[0] == ""


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folder_with_one_weights_file(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny()
    _save(tmp_path / "a.pth", model.state_dict())
    (tmp_path / "notes.txt").write_text("mine")
    loaded = load_model(tmp_path, ARCH, model_kwargs=TINY)
    assert same(loaded, model)
    assert loaded.provenance["kind"] == "folder"
    _save(tmp_path / "b.pth", model.state_dict())
    with pytest.raises(UsageError, match=r"holds 2 weights files: a.pth, b.pth. Name one of them"):
        load_model(tmp_path, ARCH)


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UsageError, match=r"holds no weights file .*For images give --images"):
        load_model(tmp_path)


def test_export_of_timm_needs_no_prefix(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny()
    timm.models.save_for_hf(model, tmp_path, model_args=TINY, safe_serialization="both")
    loaded = load_model(tmp_path)
    assert same(loaded, model)
    assert loaded.provenance["architecture"] == ARCH
    assert loaded.provenance["architecture_from"] == "stored in the file"
    assert loaded.provenance["weights"]["format"] == "safetensors"
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(DamagedFileError, match=r"config.json cannot be read"):
        load_model(tmp_path)


def test_trainer_folders(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny()
    folder = tmp_path / "out" / "checkpoint-500"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        _save(folder / name, {"state": {}})
    save_file(model.state_dict(), folder / "model.safetensors")
    assert same(load_model(folder, ARCH, model_kwargs=TINY), model)
    assert same(load_model(tmp_path / "out", ARCH, model_kwargs=TINY), model)
    (tmp_path / "out" / "checkpoint-1000").mkdir()
    with pytest.raises(UsageError, match=r"holds several checkpoints: checkpoint-1000, checkpoint-500. Name one"):
        load_model(tmp_path / "out", ARCH)


def test_lightning_folders(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny()
    content = {"epoch": 1, "pytorch-lightning_version": "2.5", "state_dict": _prefixed(model.state_dict(), "net.")}
    _save(tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "epoch=1-step=9.ckpt", content)
    assert same(load_model(tmp_path, ARCH, model_kwargs=TINY), model)


def test_sharded_folder(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny()
    keys = list(model.state_dict())
    weight_map = {key: f"model-0000{1 + (place > 9)}-of-00002.safetensors" for place, key in enumerate(keys)}
    for name in set(weight_map.values()):
        save_file({key: model.state_dict()[key] for key in keys if weight_map[key] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert same(load_model(source, ARCH, model_kwargs=TINY), model)


def test_a_misleading_name_is_noted(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny()
    save_file(model.state_dict(), tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match=r"named .pth, but its content is of the format safetensors"):
        loaded = load_model(tmp_path / "weights.pth", ARCH, model_kwargs=TINY)
    assert same(loaded, model)


# -- bad weights -------------------------------------------------------------------------------------------------------


def test_constant_matrices_are_refused(tmp_path: Path, tiny: Build) -> None:
    state = tiny().state_dict()
    state["blocks.1.mlp.fc1.weight"].fill_(0)
    state["blocks.0.attn.qkv.weight"].fill_(0.25)
    path = _save(tmp_path / "w.pt", state)
    words = r"2 of 32 tensors are one number throughout: blocks.0.attn.qkv.weight, blocks.1.mlp.fc1.weight"
    with pytest.raises(DamagedFileError, match=words) as caught:
        load_model(path, ARCH, model_kwargs=TINY)
    assert "--allow-bad-weights" in str(caught.value)
    load_model(path, ARCH, model_kwargs=TINY, allow_bad_weights=True)


def test_classifiers_may_start_at_zero(tmp_path: Path, tiny: Build) -> None:
    state = tiny().state_dict()
    state["head.weight"].fill_(0)
    load_model(_save(tmp_path / "w.pt", state), ARCH, model_kwargs=TINY)


def test_strict_as_ever(tmp_path: Path, tiny: Build) -> None:
    state = tiny().state_dict()
    state["blocks.0.attn.extra"] = state.pop("blocks.0.attn.proj.bias")
    with pytest.raises(WeightsMismatchError, match=r"1 missing in the file: blocks.0.attn.proj.bias \[48\]; 1 unknown"):
        load_model(_save(tmp_path / "w.pt", state), ARCH, model_kwargs=TINY)


def test_a_classifier_of_another_make_is_left_out(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny(num_classes=0)
    head = {"head.0.weight": torch.randn(8, 48), "head.0.bias": torch.randn(8), "head.2.weight": torch.randn(3, 8)}
    loaded = load_model(_save(tmp_path / "w.pt", model.state_dict() | head), ARCH, model_kwargs=TINY)
    assert same(loaded, model)
    assert loaded.provenance["weights"]["left_out"] == list(head)
    odd = tiny().state_dict() | {"head.extra": torch.zeros(2)}  # beside the architecture's own: strict
    with pytest.raises(WeightsMismatchError, match=r"1 unknown to the model: head.extra"):
        load_model(_save(tmp_path / "w.pt", odd), ARCH, model_kwargs=TINY)


def test_a_key_of_any_length_leaves_the_message_readable(tmp_path: Path, tiny: Build) -> None:
    path = _save(tmp_path / "w.pt", {**tiny().state_dict(), "x" * 100_000: torch.zeros(2)})
    with pytest.raises(WeightsMismatchError) as caught:
        load_model(path, ARCH, model_kwargs=TINY)
    assert len(str(caught.value)) < 2000
