"""Files that are no checkpoints: each is refused with its own sentence, and no code in them runs."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from collapse_probe.errors import DamagedFileError, ModelError, UnsafeFileError
from collapse_probe.loading.checkpoint import read_checkpoint
from collapse_probe.loading.content import SAFETENSORS, TORCH_LEGACY, TORCH_ZIP, recognise

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(3)}


class Canary:
    """Writes a file when unpickled by a loader that is not careful."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class System:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.path}",)


def _bytes(content: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def _write(folder: Path, content: bytes, name: str = "weights.pt") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _safetensors(folder: Path) -> bytes:
    save_file(STATE, folder / "good.safetensors")
    return (folder / "good.safetensors").read_bytes()


def _refused(path: Path, error: type[ModelError], fragment: str) -> str:
    with pytest.raises(error, match=fragment) as caught:
        read_checkpoint(path)
    text = str(caught.value)
    # The loader's advice to switch its protection off never reaches a user, not even as a cause.
    assert "weights_only" not in text
    assert "add_safe_globals" not in text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def test_the_three_formats_are_told_apart_by_content(tmp_path: Path) -> None:
    assert recognise(_write(tmp_path, _bytes(STATE), "a.safetensors")) == TORCH_ZIP
    assert recognise(_write(tmp_path, _bytes(STATE, _use_new_zipfile_serialization=False), "b.zip")) == TORCH_LEGACY
    assert recognise(_write(tmp_path, _safetensors(tmp_path), "c.pt")) == SAFETENSORS


@pytest.mark.parametrize("format_", [TORCH_ZIP, TORCH_LEGACY, SAFETENSORS])
def test_every_format_is_read_whatever_the_name(tmp_path: Path, format_: str) -> None:
    content = {
        TORCH_ZIP: _bytes(STATE),
        TORCH_LEGACY: _bytes(STATE, _use_new_zipfile_serialization=False),
        SAFETENSORS: _safetensors(tmp_path),
    }[format_]
    checkpoint = read_checkpoint(_write(tmp_path, content, "weights.xyz"))
    assert checkpoint.facts["format"] == format_
    assert checkpoint.state.keys() == STATE.keys()
    assert all(torch.equal(checkpoint.state[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "is a Git LFS pointer"),
        (b"\n  <!DOCTYPE html><html><body>Log in</body></html>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        (b"\0" * 4096, "is not a checkpoint: it starts with"),
        (b"hello, this is a note about weights", "is not a checkpoint"),
        (b"cposix\nsystem\n(S'true'\ntR.", "is not a checkpoint"),
        (b"PK\x03\x04" + b"\1" * 500, "is a truncated zip archive"),
    ],
)
def test_other_content_is_named(tmp_path: Path, content: bytes, fragment: str) -> None:
    _refused(_write(tmp_path, content), DamagedFileError, fragment)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Cannot read .*missing"):
        read_checkpoint(tmp_path / "missing.pt")


# -- zip archives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_zip(tmp_path: Path, share: float) -> None:
    whole = _bytes(STATE)
    _refused(_write(tmp_path, whole[: int(len(whole) * share)]), DamagedFileError, "is a truncated zip archive")


def test_flipped_bit_in_a_tensor_is_found(tmp_path: Path) -> None:
    whole = bytearray(_bytes({"weight": torch.full((64,), 3.25)}))
    at = whole.index(np.float32(3.25).tobytes() * 8)
    whole[at + 5] ^= 1
    path = _write(tmp_path, bytes(whole))
    torch.load(path, weights_only=True)  # torch itself does not notice
    _refused(path, DamagedFileError, "is a damaged zip archive: Bad CRC-32")


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = _write(tmp_path, _bytes(STATE))
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read_checkpoint(path).state["weight"], STATE["weight"])


def test_numpy_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", weight=np.zeros(3))
    _refused(tmp_path / "weights.npz", DamagedFileError, r"torch.save did not write \(it holds weight.npy\)")


def test_compressed_archive(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(io.BytesIO(_bytes(STATE))) as good,
        zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in good.namelist():
            packed.writestr(name, good.read(name))
    _refused(path, DamagedFileError, "is a compressed zip archive")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "script.pt")
    text = _refused(tmp_path / "script.pt", UnsafeFileError, "is a TorchScript archive")
    assert "torch.save(model.state_dict(), 'weights.pt')" in text


# -- pickles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("make", [Canary, System])
@pytest.mark.parametrize("under", [None, "state_dict", "args"])
def test_code_in_a_checkpoint_never_runs(tmp_path: Path, zipped: bool, make: type, under: str | None) -> None:
    canary = tmp_path / "canary"
    hostile = make(canary)
    content = hostile if under is None else {**STATE, under: hostile}
    path = _write(tmp_path, _bytes(content, _use_new_zipfile_serialization=zipped))
    text = _refused(path, UnsafeFileError, "asks for")
    assert ("system" if make is System else "touch") in text or "pathlib" in text
    assert "save_file(state" in text
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the file is armed: a careless loader does run it
    assert canary.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_are_refused_before_torch_reads_them(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    path = _write(tmp_path, pickle.dumps({"weight": System(canary)}, protocol=protocol))
    text = _refused(path, UnsafeFileError, "is a Python pickle that torch.save did not write")
    assert "posix.system" in text or "nt.system" in text
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_model_is_refused_and_the_export_shown(tmp_path: Path, zipped: bool) -> None:
    path = _write(tmp_path, _bytes(nn.Sequential(nn.Linear(2, 2)), _use_new_zipfile_serialization=zipped))
    text = _refused(path, UnsafeFileError, "asks for torch.nn.modules.container.Sequential")
    assert "model.state_dict()" in text


def test_foreign_object_beside_the_weights(tmp_path: Path) -> None:
    path = _write(tmp_path, _bytes({"state_dict": STATE, "config": Path("x")}))
    _refused(path, UnsafeFileError, "asks for pathlib")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_legacy_file(tmp_path: Path, share: float) -> None:
    whole = _bytes({"weight": torch.zeros(500)}, _use_new_zipfile_serialization=False)
    _refused(_write(tmp_path, whole[: int(len(whole) * share)]), DamagedFileError, "is damaged")


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, _bytes({"head.weight": torch.zeros(1).expand(10**9, 192)}))
    _refused(path, DamagedFileError, "is larger than the file")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, {1: torch.zeros(2)}, torch.zeros(2)])
def test_no_state_dict_inside(tmp_path: Path, content: Any) -> None:
    _refused(_write(tmp_path, _bytes(content)), DamagedFileError, "holds no state dict")


# -- safetensors -------------------------------------------------------------------------------------------------------


def test_truncated_safetensors(tmp_path: Path) -> None:
    whole = _safetensors(tmp_path)
    header = struct.unpack("<Q", whole[:8])[0]
    _refused(_write(tmp_path, whole[:-1]), DamagedFileError, "is a truncated safetensors file: its header describes")
    _refused(_write(tmp_path, whole[: header // 2]), DamagedFileError, "truncated safetensors file: its header alone")
    _refused(_write(tmp_path, whole + b"x"), DamagedFileError, "is a damaged safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"{nonsense}",
        b'{"weight": 3}',
        b'{"weight": {"data_offsets": [0]}}',
        b'{"weight": {"data_offsets": ["0", "1"]}}',
    ],
)
def test_broken_safetensors_header(tmp_path: Path, header: bytes) -> None:
    path = _write(tmp_path, struct.pack("<Q", len(header)) + header)
    _refused(path, DamagedFileError, "is a damaged safetensors file: its header cannot be read")


def test_safetensors_that_only_the_library_rejects(tmp_path: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path = _write(tmp_path, struct.pack("<Q", len(header)) + header + b"\0" * 8)
    _refused(path, DamagedFileError, "is a damaged safetensors file")


def test_every_prefix_and_every_flipped_byte_ends_in_a_known_way(tmp_path: Path) -> None:
    """A closed set of outcomes: a state dict, or one of the room's own errors."""
    generator = np.random.default_rng(0)
    for whole in (_bytes(STATE), _bytes(STATE, _use_new_zipfile_serialization=False), _safetensors(tmp_path)):
        for _ in range(60):
            broken = bytearray(whole)
            broken[generator.integers(len(whole))] ^= int(generator.integers(1, 256))
            for content in (bytes(broken), whole[: generator.integers(len(whole))]):
                with contextlib.suppress(DamagedFileError, UnsafeFileError):
                    assert read_checkpoint(_write(tmp_path, content)).state
