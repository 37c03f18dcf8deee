"""Generators of files that people call `model.pt`: damaged, dangerous, or something else altogether.

Each takes a folder and returns the path of what it wrote there. None is stored in the repository.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
CANARY = "canary"


class Touch:
    """Leaves a file behind when a careless loader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def state() -> dict[str, Tensor]:
    """Weights of a small ViT, all of them random."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **KWARGS)
    return {key: tensor + torch.randn_like(tensor) * 0.1 for key, tensor in model.state_dict().items()}


def whole(folder: Path) -> Path:
    return _torch(folder, state())


def truncated(folder: Path) -> Path:
    content = whole(folder).read_bytes()
    return _bytes(folder, content[: len(content) // 2])


def empty(folder: Path) -> Path:
    return _bytes(folder, b"")


def flipped_bit(folder: Path) -> Path:
    """One bit of one tensor; `torch.load` reads it without a word."""
    weights = state()
    content = bytearray(_torch(folder, weights).read_bytes())
    at = content.index(weights["blocks.1.mlp.fc1.weight"].numpy().tobytes()[:64])
    content[at + 40] ^= 4
    return _bytes(folder, bytes(content))


def truncated_safetensors(folder: Path) -> Path:
    save_file(state(), folder / "whole.safetensors")
    return _bytes(folder, (folder / "whole.safetensors").read_bytes()[:-100], "model.safetensors")


def lfs_pointer(folder: Path) -> Path:
    return _bytes(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def web_page(folder: Path) -> Path:
    return _bytes(folder, b"<!DOCTYPE html><html><body>Log in</body></html>", "model.pth")


def error_page(folder: Path) -> Path:
    return _bytes(folder, b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "model.pth")


def pickled_module(folder: Path) -> Path:
    return _torch(folder, nn.Sequential(nn.Linear(2, 2)))


def malicious(folder: Path) -> Path:
    return _torch(folder, {**state(), "extra": Touch(folder / CANARY)})


def malicious_legacy(folder: Path) -> Path:
    return _torch(folder, {"model": state(), "args": Touch(folder / CANARY)}, _use_new_zipfile_serialization=False)


def plain_pickle(folder: Path) -> Path:
    return _bytes(folder, pickle.dumps({"weight": Touch(folder / CANARY)}))


def harmless_foreign(folder: Path) -> Path:
    return _torch(folder, {"state_dict": state(), "config": Path("config.yaml")})


def torchscript(folder: Path) -> Path:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(folder / "model.pt")
    return folder / "model.pt"


def exported_program(folder: Path) -> Path:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), folder / "model.pt2")
    return folder / "model.pt2"


def old_tar(folder: Path) -> Path:
    with tarfile.open(folder / "model.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return folder / "model.pt"


def zip_bomb(folder: Path) -> Path:
    """A torch archive, compressed: a few kilobytes that unpack to 64 MB."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(4096, 4096)}, buffer)
    with (
        zipfile.ZipFile(buffer) as good,
        zipfile.ZipFile(folder / "model.pt", "w", compression=zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in good.namelist():
            packed.writestr(name, good.read(name))
    return folder / "model.pt"


def expanded_tensor(folder: Path) -> Path:
    """One number that claims, with strides of zero, to be 40 GB."""
    return _torch(folder, {**state(), "head.weight": torch.zeros(1).expand(100_000, 100_000)})


def numpy_bomb(folder: Path) -> Path:
    np.savez_compressed(folder / "model.npz", weight=np.zeros(20_000_000, np.float32))
    return folder / "model.npz"


def safetensors_of_other_sizes(folder: Path) -> Path:
    header = json.dumps({"w": {"dtype": "F32", "shape": [100_000, 100_000], "data_offsets": [0, 8]}}).encode()
    return _bytes(folder, struct.pack("<Q", len(header)) + header + b"\0" * 8, "model.safetensors")


def missing_key(folder: Path) -> Path:
    weights = state()
    del weights["blocks.0.attn.qkv.bias"]
    return _torch(folder, weights)


def other_architecture(folder: Path) -> Path:
    return _torch(folder, timm.create_model("deit3_small_patch16_224").state_dict())


def other_image_size(folder: Path) -> Path:
    return _torch(folder, timm.create_model("vit_tiny_patch16_224", **{**KWARGS, "img_size": 64}).state_dict())


def not_a_number(folder: Path) -> Path:
    weights = state()
    weights["blocks.1.attn.proj.weight"][3, 4] = float("nan")
    return _torch(folder, weights)


def zeros(folder: Path) -> Path:
    weights = state()
    weights["blocks.1.attn.proj.weight"].zero_()
    return _torch(folder, weights)


def no_weights(folder: Path) -> Path:
    return _torch(folder, {"epoch": 3, "optimizer": {"lr": 0.1}})


def text(folder: Path) -> Path:
    return _bytes(folder, b"my notes on weights\n" * 9)


def _torch(folder: Path, content: Any, **kwargs: Any) -> Path:
    torch.save(content, folder / "model.pt", **kwargs)
    return folder / "model.pt"


def _bytes(folder: Path, content: bytes, name: str = "model.pt") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


Generator = Callable[[Path], Path]
