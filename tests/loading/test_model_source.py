"""Names and files become models: round trips bit by bit, and a sentence for everything that does not fit."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from collapse_probe.errors import (
    DamagedFileError,
    ModelError,
    UnknownModelError,
    UnsafeFileError,
    UsageError,
    WeightsMismatchError,
    WeightsUnavailableError,
)
from collapse_probe.loading import load_model
from tests.shared_data import shared_data

ARCH = "vit_tiny_patch16_224"
TINY = {"depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3}

Build = Callable[..., nn.Module]
Same = Callable[[nn.Module, nn.Module], bool]


def _save(folder: Path, content: Any, name: str = "weights.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


# -- round trips -------------------------------------------------------------------------------------------------------


def test_plain_state_dict(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny()
    path = _save(tmp_path, model.state_dict())
    loaded = load_model(path, ARCH, model_kwargs=TINY)
    assert same(loaded, model)
    assert not loaded.training
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))


def test_provenance(tmp_path: Path, tiny: Build) -> None:
    path = _save(tmp_path, {"state_dict": {f"module.{k}": v for k, v in tiny().state_dict().items()}})
    provenance = load_model(str(path), ARCH, model_kwargs=TINY).provenance
    assert json.loads(json.dumps(provenance)) == provenance
    weights = provenance.pop("weights")
    versions = provenance.pop("versions")
    assert provenance == {
        "source": str(path),
        "kind": "file",
        "architecture": ARCH,
        "architecture_from": "given",
        "model_kwargs": TINY,
        "same_network": [],
        "heads": {"count": 3, "known": "given"},
        "parameters": sum(p.numel() for p in tiny().parameters()),
    }
    assert weights == {
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size_bytes": path.stat().st_size,
        "format": "torch zip archive",
        "note": None,
        "scheme": None,
        "left_out": [],
        "key": "state_dict",
        "prefix_cut": "module.",
        "dtype": "float32",
        "tensors": len(tiny().state_dict()),
        "adapted_by_timm": [],
        "non_finite": [],
        "norm_eps": None,
        "training": {},
    }
    assert versions["torch"] == torch.__version__
    assert versions["timm"] == timm.__version__


def _timm_checkpoint(model: nn.Module, ema: nn.Module | None = None, **args: Any) -> dict[str, Any]:
    content = {
        "epoch": 3,
        "arch": ARCH,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "version": 2,
        "args": argparse.Namespace(
            model=ARCH, model_kwargs=TINY, num_classes=7, gp=None, in_chans=None, lr=0.1, **args
        ),
        "state_dict": model.state_dict(),
        "metric": 12.5,
    }
    return content if ema is None else {**content, "state_dict_ema": ema.state_dict()}


def test_timm_training_checkpoint_needs_no_arguments(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny()
    ema = tiny()
    for parameter in ema.parameters():
        parameter.data.add_(1)
    path = _save(tmp_path, _timm_checkpoint(model, ema), "model_best.pth.tar")
    plain, averaged = load_model(path), load_model(path, use_ema=True)
    assert same(plain, model)
    assert same(averaged, ema)
    assert not same(plain, averaged)
    assert plain.provenance["architecture_from"] == "stored in the file"
    assert plain.provenance["weights"]["key"] == "state_dict"
    assert averaged.provenance["weights"]["key"] == "state_dict_ema"
    assert averaged.provenance["model_kwargs"] == TINY


def test_timm_arguments_that_shape_the_model(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny(in_chans=1, global_pool="avg")
    content = _timm_checkpoint(model)
    content["args"].in_chans, content["args"].gp = 1, "avg"
    assert same(load_model(_save(tmp_path, content)), model)


def test_what_the_caller_says_outranks_the_file(tmp_path: Path, tiny: Build) -> None:
    content = {**_timm_checkpoint(tiny()), "arch": "vit_small_patch16_224"}
    content["args"].model_kwargs = {**TINY, "drop_rate": 0.5}
    loaded = load_model(_save(tmp_path, content), ARCH, model_kwargs={"drop_rate": 0.25})
    assert loaded.provenance["architecture"] == ARCH
    assert loaded.head_drop.p == 0.25


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_wrappers_and_prefixes(tmp_path: Path, tiny: Build, same: Same, wrapper: str, prefix: str) -> None:
    model = tiny()
    path = _save(tmp_path, {wrapper: {f"{prefix}{k}": v for k, v in model.state_dict().items()}, "epoch": 1})
    loaded = load_model(path, ARCH, model_kwargs=TINY)
    assert same(loaded, model)
    assert loaded.provenance["weights"]["key"] == wrapper
    assert loaded.provenance["weights"]["prefix_cut"] == prefix


def test_a_prefix_that_only_some_keys_have_stays(tmp_path: Path, tiny: Build) -> None:
    state = {**tiny().state_dict(), "module.extra": torch.zeros(2)}
    with pytest.raises(WeightsMismatchError, match=r"1 unknown to the model: module.extra \[2\]"):
        load_model(_save(tmp_path, state), ARCH, model_kwargs=TINY)


def test_stored_image_size_is_left_out_where_the_architecture_takes_none(tmp_path: Path, same: Same) -> None:
    model = timm.create_model("resnet10t", num_classes=3).eval()
    args = argparse.Namespace(model="resnet10t", img_size=96)
    loaded = load_model(_save(tmp_path, {"args": args, "state_dict": model.state_dict()}))
    assert same(loaded, model)
    assert loaded.provenance["model_kwargs"] == {}


def test_averaged_model_of_torch(tmp_path: Path, tiny: Build, same: Same) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(tiny())
    path = _save(tmp_path, {"model": {}, "model_ema": averaged.state_dict()})
    assert same(load_model(path, ARCH, use_ema=True, model_kwargs=TINY), averaged.module)


def test_missing_ema(tmp_path: Path, tiny: Build) -> None:
    with pytest.raises(UsageError, match="holds no EMA weights"):
        load_model(_save(tmp_path, {"state_dict": tiny().state_dict()}), ARCH, use_ema=True, model_kwargs=TINY)


def test_safetensors_with_metadata(tmp_path: Path, tiny: Build, same: Same) -> None:
    model, path = tiny(), tmp_path / "weights.bin"
    save_file(model.state_dict(), path, metadata={"architecture": ARCH, "model_kwargs": json.dumps(TINY)})
    loaded = load_model(path)
    assert same(loaded, model)
    assert loaded.provenance["weights"]["format"] == "safetensors"
    assert loaded.provenance["architecture_from"] == "stored in the file"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_float32(tmp_path: Path, tiny: Build, dtype: torch.dtype) -> None:
    half = {key: tensor.to(dtype) for key, tensor in tiny().state_dict().items()}
    loaded = load_model(_save(tmp_path, half), ARCH, model_kwargs=TINY)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.state_dict()["head.weight"], half["head.weight"].float())
    assert loaded.provenance["weights"]["dtype"] == str(dtype).removeprefix("torch.")


def test_non_finite_weights_are_recorded(tmp_path: Path, tiny: Build) -> None:
    state = tiny().state_dict()
    state["blocks.0.attn.qkv.weight"][0, 0] = float("nan")
    state["norm.bias"][1] = float("inf")
    path = _save(tmp_path, state)
    with pytest.raises(
        DamagedFileError, match=r"2 of 32 tensors hold NaN or infinities: blocks\.0\.attn\.qkv\.weight, norm"
    ):
        load_model(path, ARCH, model_kwargs=TINY)
    loaded = load_model(path, ARCH, model_kwargs=TINY, allow_bad_weights=True)
    assert loaded.provenance["weights"]["non_finite"] == ["blocks.0.attn.qkv.weight", "norm.bias"]


def test_classes_follow_the_file(tmp_path: Path, tiny: Build, same: Same) -> None:
    for classes in (10, 3, 0):
        model = tiny(num_classes=classes)
        loaded = load_model(_save(tmp_path, model.state_dict()), ARCH, model_kwargs=TINY)
        assert loaded.num_classes == classes
        assert same(loaded, model)


def test_classes_that_were_asked_for_are_kept(tmp_path: Path, tiny: Build) -> None:
    with pytest.raises(WeightsMismatchError, match=r"head.weight is \[7, 48\] in the file and \[5, 48\] in the model"):
        load_model(_save(tmp_path, tiny().state_dict()), ARCH, model_kwargs={**TINY, "num_classes": 5})


def test_original_key_names_are_converted_by_timm(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny(num_classes=0)
    # DINOv2's own checkpoints hold a token that timm's models do not have; timm's converter drops it.
    original = {**model.state_dict(), "mask_token": torch.zeros(1, 48)}
    assert same(load_model(_save(tmp_path, original), ARCH, model_kwargs=TINY), model)


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_wrong_architecture_lists_keys_and_shapes(tmp_path: Path, tiny: Build) -> None:
    path = _save(tmp_path, tiny(depth=3, embed_dim=36).state_dict())
    with pytest.raises(WeightsMismatchError) as caught:
        load_model(path, ARCH, model_kwargs=TINY)
    text = str(caught.value)
    assert "12 unknown to the model: blocks.2.norm1.weight [36]," in text
    assert "cls_token is [1, 1, 36] in the file and [1, 1, 48] in the model" in text
    with pytest.raises(WeightsMismatchError, match=r"12 missing in the file: blocks.2.norm1.weight \[48\]"):
        load_model(_save(tmp_path, tiny().state_dict()), ARCH, model_kwargs={**TINY, "depth": 3})


def test_foreign_weights(tmp_path: Path) -> None:
    path = _save(tmp_path, nn.Linear(2, 3).state_dict())
    with pytest.raises(WeightsMismatchError, match=r"2 unknown to the model: weight \[3, 2\], bias \[3\]"):
        load_model(path, ARCH, model_kwargs=TINY)


def test_wrong_image_size_names_the_right_one(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny(img_size=64)
    path = _save(tmp_path, model.state_dict())
    with pytest.raises(WeightsMismatchError, match=r"17 position embeddings, the model 5: .*Use --img-size 64"):
        load_model(path, ARCH, model_kwargs=TINY)
    assert same(load_model(path, ARCH, model_kwargs=TINY, img_size=64), model)


def test_another_image_size_on_request_resizes_positions(tmp_path: Path, tiny: Build) -> None:
    path = _save(tmp_path, tiny(img_size=64).state_dict())
    loaded = load_model(path, ARCH, model_kwargs=TINY, img_size=96)
    assert loaded.pos_embed.shape == (1, 37, 48)
    assert loaded.provenance["weights"]["adapted_by_timm"] == ["pos_embed"]
    assert loaded(torch.zeros(1, 3, 96, 96)).shape == (1, 7)


def test_another_patch_size_is_never_resized(tmp_path: Path, tiny: Build) -> None:
    path = _save(tmp_path, tiny(patch_size=8, img_size=16).state_dict())
    for extra in ({}, {"img_size": 32}):
        with pytest.raises(WeightsMismatchError, match=r"patch_embed.proj.weight is \[48, 3, 8, 8\] in the file"):
            load_model(path, ARCH, model_kwargs=TINY, **extra)


def test_an_architecture_that_timm_does_not_know(tmp_path: Path, tiny: Build) -> None:
    state = tiny().state_dict()
    with pytest.warns(UserWarning, match="names the architecture 'mynet', which timm does not know"):
        loaded = load_model(_save(tmp_path, {"arch": "mynet", "state_dict": state}))
    assert loaded.provenance["architecture_from"] == "recognised by keys and shapes"
    foreign = {"arch": "mynet", "state_dict": nn.Linear(2, 3).state_dict()}
    with pytest.raises(
        UnknownModelError, match=r"names the architecture 'mynet', .* its weights fit none that is known"
    ):
        load_model(_save(tmp_path, foreign))


@pytest.mark.parametrize(
    "key", ["pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir", "pretrained_cfg_overlay"]
)
def test_stored_arguments_cannot_open_other_files(tmp_path: Path, tiny: Build, key: str) -> None:
    save_file(tiny().state_dict(), tmp_path / "w", {"architecture": ARCH, "model_kwargs": json.dumps({key: "x"})})
    with pytest.raises(UsageError, match=f"holds '{key}', which is not an argument of an architecture"):
        load_model(tmp_path / "w")
    with pytest.raises(UsageError, match=f"model_kwargs holds '{key}'"):
        load_model(ARCH, pretrained=False, model_kwargs={key: "x"})


# -- names -------------------------------------------------------------------------------------------------------------


def test_random_weights_only_on_request() -> None:
    model = load_model(ARCH, pretrained=False, model_kwargs=TINY)
    assert model.provenance["kind"] == "timm name"
    assert model.provenance["architecture_from"] == "name"
    assert model.provenance["weights"] == {"random": True, "non_finite": []}
    assert not model.training


def test_name_with_checkpoint(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny()
    loaded = load_model(ARCH, checkpoint=_save(tmp_path, model.state_dict()), model_kwargs=TINY)
    assert same(loaded, model)
    assert loaded.provenance["kind"] == "timm name"
    assert loaded.provenance["architecture_from"] == "name"


def test_a_file_named_like_a_model_is_a_file(
    tmp_path: Path, tiny: Build, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    _save(tmp_path, model.state_dict(), f"{ARCH}.pth")
    monkeypatch.chdir(tmp_path)
    assert same(load_model(f"{ARCH}.pth", ARCH, model_kwargs=TINY), model)


def test_typo_gets_the_nearest_names() -> None:
    with pytest.raises(
        UnknownModelError, match=r"neither a file nor a name that timm knows. Nearest: .*vit_tiny_patch16_224"
    ):
        load_model("vit_tiny_patch16_223")
    with pytest.raises(UnknownModelError, match=r"Its pretrained tags: .*vit_tiny_patch16_224.augreg_in21k"):
        load_model("vit_tiny_patch16_224.nonsense")


def test_unknown_architecture_for_a_file(tmp_path: Path, tiny: Build) -> None:
    with pytest.raises(
        UnknownModelError, match=r"timm knows no architecture 'vit_tinny_patch16_224'. Nearest: vit_tiny"
    ):
        load_model(_save(tmp_path, tiny().state_dict()), "vit_tinny_patch16_224")


@pytest.mark.parametrize("path", ["no/such/file.pt", "missing.safetensors", "x" * 5000 + ".pt"])
def test_missing_file(path: str) -> None:
    with pytest.raises(UnknownModelError, match="There is no file"):
        load_model(path)


def test_contradictions(tmp_path: Path, tiny: Build) -> None:
    path = _save(tmp_path, tiny().state_dict())
    with pytest.raises(UsageError, match="names a model already"):
        load_model(ARCH, "vit_small_patch16_224")
    with pytest.raises(UsageError, match="are both weights files"):
        load_model(path, ARCH, checkpoint=path)
    with pytest.raises(UsageError, match="random ones were asked for"):
        load_model(path, ARCH, pretrained=False)
    with pytest.raises(UsageError, match="use_ema needs a weights file"):
        load_model(ARCH, use_ema=True)
    with pytest.raises(UsageError, match="is not a file that exists"):
        load_model(ARCH, checkpoint=tmp_path / "missing.pt")


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="img_size=0 must be a whole number of pixels, 1 or more"):
        load_model(ARCH, img_size=0)
    with pytest.raises(UsageError, match="device='gpu9' is not a device that torch knows"):
        load_model(ARCH, device="gpu9")
    with pytest.raises(UsageError, match=r"cannot be built with model_kwargs=.*no_such_argument"):
        load_model(ARCH, pretrained=False, model_kwargs={"no_such_argument": 1})


# -- pretrained weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and an empty cache of the hub, which is returned."""
    from huggingface_hub import constants

    monkeypatch.setattr("collapse_probe.loading.hub.reachable", lambda _: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("offline")
def test_pretrained_weights_that_are_not_at_hand() -> None:
    with pytest.raises(WeightsUnavailableError, match="not in the local cache") as caught:
        load_model("deit_tiny_patch16_224")
    assert "--checkpoint FILE" in str(caught.value)
    assert "--no-pretrained" in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_hub_id_that_is_not_at_hand() -> None:
    with pytest.raises(WeightsUnavailableError, match="hf-hub:someone/tiny could not be fetched"):
        load_model("hf-hub:someone/tiny")


def _local_folder(folder: Path, model: nn.Module) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architecture": ARCH, "num_classes": 7, "model_args": TINY, "pretrained_cfg": {"num_classes": 7}}
    config["pretrained_cfg"] |= {"input_size": [3, 32, 32], "classifier": "head", "first_conv": "patch_embed.proj"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def test_cached_hub_weights_load_without_a_network(offline: Path, tiny: Build, same: Same) -> None:
    repository = offline / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    model = tiny()
    _local_folder(repository / "snapshots" / ("0" * 40), model)
    loaded = load_model("hf-hub:someone/tiny")
    assert same(loaded, model)
    assert loaded.provenance["kind"] == "hub"
    assert loaded.provenance["architecture"] == ARCH
    assert loaded.provenance["weights"]["pretrained"] == "hf-hub:someone/tiny"


def test_cached_hub_weights_that_are_not_timms(offline: Path) -> None:
    transformers = pytest.importorskip("transformers")
    repository = offline / "models--someone--vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=96,
                                    image_size=32, patch_size=8, layer_norm_eps=1e-6)  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(repository / "snapshots" / ("0" * 40))
    loaded = load_model("hf-hub:someone/vit")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), theirs(images).logits, rtol=0, atol=1e-4)
    assert loaded.provenance["kind"] == "hub"
    assert loaded.provenance["heads"] == {"count": 6, "known": "stored in config.json"}
    assert loaded.provenance["weights"]["pretrained"] == "hf-hub:someone/vit"


def test_local_dir(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny()
    folder = _local_folder(tmp_path / "export", model)
    loaded = load_model(f"local-dir:{folder}")
    assert same(loaded, model)
    assert loaded.provenance["kind"] == "local-dir"
    assert loaded.provenance["architecture"] == ARCH
    assert loaded.provenance["weights"]["format"] == "safetensors"
    torch.save(nn.Linear(2, 2), folder / "pytorch_model.bin")
    assert same(load_model(f"local-dir:{folder}"), model)  # of both formats, the one that needs no unpickling
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no weights file"):
        load_model(f"local-dir:{folder}")
    torch.save(nn.Linear(2, 2), folder / "pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match=r"asks for torch.nn.modules.linear.Linear"):
        load_model(f"local-dir:{folder}")


def _register(name: str, **cfg: Any) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(VisionTransformer, name, pretrained, **{"patch_size": 16, **TINY, **kwargs})

    build.__name__ = name
    build.__module__ = __name__
    globals()["default_cfgs"] = generate_default_cfgs({name: cfg})
    register_model(build)


def test_registered_model_without_weights() -> None:
    _register("loading_test_vit_random")
    with pytest.raises(
        WeightsUnavailableError, match="No pretrained weights are published for loading_test_vit_random"
    ):
        load_model("loading_test_vit_random")
    assert load_model("loading_test_vit_random", pretrained=False).provenance["weights"]["random"]


def test_registered_model_with_a_file_of_its_own(tmp_path: Path, tiny: Build, same: Same) -> None:
    model = tiny()
    save_file(model.state_dict(), tmp_path / "bundled.safetensors")
    _register("loading_test_vit_bundled", file=str(tmp_path / "bundled.safetensors"), num_classes=7, classifier="head")
    loaded = load_model("loading_test_vit_bundled")
    assert same(loaded, model)
    assert loaded.provenance["kind"] == "timm name"
    assert loaded.provenance["weights"]["path"] == "bundled.safetensors"
    assert len(loaded.provenance["weights"]["sha256"]) == 64


def test_refusals_are_model_errors_for_the_shell() -> None:
    with pytest.raises(ModelError) as caught:
        load_model("no_such_model_anywhere")
    assert caught.value.exit_code == 3


# -- a real model ------------------------------------------------------------------------------------------------------


def test_trained_deit_recognises_photographs() -> None:
    from collapse_probe.loading import data_config, open_images

    data = shared_data()
    if data is None:
        pytest.skip("the development data are absent")
    model = load_model(data / "deit_tiny_patch16_224_in1k.safetensors", "deit_tiny_patch16_224")
    assert model.provenance["weights"]["adapted_by_timm"] == []
    source = open_images(data / "imagenet_sample", config=data_config(model), batch_size=20)
    with torch.no_grad():
        predicted = torch.cat([model(batch.images).argmax(1) for batch in source.batches()])
    labels = torch.tensor([int(path.split("_")[0]) for path in source.paths])
    assert len(labels) == source.delivered == 100
    assert (predicted == labels).float().mean() > 0.7


def test_another_architecture_is_not_taken_for_another_image_size(tmp_path: Path, tiny: Build) -> None:
    path = _save(tmp_path, tiny().state_dict())
    with pytest.raises(WeightsMismatchError) as caught:
        load_model(path, "vit_small_patch16_224")
    assert "--img-size" not in str(caught.value)
    assert "48" in str(caught.value)


def test_quantised_weights_are_refused(tmp_path: Path, tiny: Build) -> None:
    state = {key: (tensor * 100).to(torch.int8) for key, tensor in tiny().state_dict().items()}
    with pytest.raises(WeightsMismatchError, match="Quantised weights mean nothing without their scales"):
        load_model(_save(tmp_path, state), ARCH, model_kwargs=TINY)
