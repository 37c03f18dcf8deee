"""Files that are no checkpoints: each is refused with its own sentence, and no code in them runs."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import struct
import tarfile
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
from collapse_probe.loading.content import NPZ, SAFETENSORS, TORCH_LEGACY, TORCH_ZIP, recognise
from collapse_probe.loading.pickles import foreign_globals

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
        (gzip.compress(b"weights", mtime=0), "is compressed by gzip. Unpack it first"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "is an HDF5 file"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "is a picture"),
        (b"GGUF" + b"\0" * 99, "is a GGUF file"),
        (b'{"model_type": "vit"}', "is not a checkpoint"),
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
    whole = bytearray(
        _bytes({"model": {"first": torch.zeros(5), "weight": torch.full((64,), 3.25)}, "z": torch.ones(9)})
    )
    at = whole.index(np.float32(3.25).tobytes() * 8)
    whole[at + 5] ^= 1
    path = _write(tmp_path, bytes(whole))
    torch.load(path, weights_only=True)  # torch itself does not notice
    text = _refused(path, DamagedFileError, "is a damaged zip archive: Bad CRC-32")
    assert text.endswith("The damage is in model.weight.")


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = _write(tmp_path, _bytes(STATE))
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read_checkpoint(path).state["weight"], STATE["weight"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpy_archive(tmp_path: Path, save: Any) -> None:
    weight = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    save(tmp_path / "weights.pt", weight=weight, scalar=np.float32(2))
    checkpoint = read_checkpoint(tmp_path / "weights.pt.npz")
    assert checkpoint.facts["format"] == NPZ
    assert np.array_equal(checkpoint.state["weight"].numpy(), weight)
    assert checkpoint.state["scalar"].shape == ()


def test_numpy_archive_of_objects(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    np.savez(tmp_path / "weights.npz", weight=np.array([Canary(canary)], dtype=object), allow_pickle=True)
    _refused(tmp_path / "weights.npz", UnsafeFileError, "array of Python objects would have to be unpickled")
    assert not canary.exists()


def test_numpy_bomb(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", weight=np.zeros(30_000_000, np.float32))
    _refused(tmp_path / "bomb.npz", DamagedFileError, "would unpack to more than 100 times its size")


def test_numpy_header_that_claims_too_much(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (100000, 100000)})
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("weight.npy", header.getvalue() + b"\0" * 64)
    _refused(tmp_path / "w.npz", DamagedFileError, "weight.npy describes 40000000000 bytes of numbers and holds 64")


def test_damaged_numpy_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", weight=np.full(64, 3.25, np.float32))
    whole = bytearray((tmp_path / "w.npz").read_bytes())
    whole[whole.index(np.float32(3.25).tobytes() * 8) + 5] ^= 1
    _refused(_write(tmp_path, bytes(whole)), DamagedFileError, "is a damaged zip archive: Bad CRC-32")
    _refused(_write(tmp_path, bytes(whole[:200])), DamagedFileError, "is a truncated zip archive")


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


# -- other archives ----------------------------------------------------------------------------------------------------


def test_archive_on_several_disks(tmp_path: Path) -> None:
    whole = bytearray(_bytes(STATE))
    whole[whole.rindex(b"PK\x06\x07") + 16] = 3  # disks; some versions of zipfile raise where others say no
    _refused(_write(tmp_path, bytes(whole)), DamagedFileError, "zip archive")


def test_members_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    with zipfile.ZipFile(io.BytesIO(_bytes(STATE))) as good, zipfile.ZipFile(path, "w") as doubled:
        for name in good.namelist():
            doubled.writestr(name, good.read(name))
        with pytest.warns(UserWarning, match="Duplicate name"):
            doubled.writestr("archive/data.pkl", good.read("archive/data.pkl"))
    _refused(path, DamagedFileError, "it holds members of the same name")


def test_torch_export(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    _refused(tmp_path / "program.pt2", UnsafeFileError, "is an archive of torch.export")


def _tar(folder: Path, names: list[str]) -> Path:
    path = folder / "weights.tar"
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


def test_tar_archives(tmp_path: Path) -> None:
    old = _tar(tmp_path, ["sys_info", "pickle", "storages", "tensors"])
    assert "save_file(state" in _refused(old, UnsafeFileError, "is of the tar format that torch.save wrote before 2017")
    _refused(_tar(tmp_path, ["vit/weights.pt"]), DamagedFileError, r"is a tar archive \(vit/weights.pt\). Unpack it")


@pytest.mark.parametrize("protocol", [2, 4])
def test_names_are_found_however_a_pickle_spells_them(tmp_path: Path, protocol: int) -> None:
    """Protocol 4 pushes module and name as strings, which later uses take from the memo."""
    hostile = [System(tmp_path / "a"), Canary(tmp_path / "b"), System(tmp_path / "c")]
    names = foreign_globals(io.BytesIO(pickle.dumps(hostile, protocol=protocol)))
    assert any(name.endswith(".system") for name in names)
    assert any("pathlib" in name for name in names)


def test_torch_never_sees_a_pickle_with_foreign_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch read the file"))
    for zipped in (True, False):
        content = _bytes({**STATE, "x": System(tmp_path / "canary")}, _use_new_zipfile_serialization=zipped)
        _refused(_write(tmp_path, content), UnsafeFileError, "asks for posix.system")


def test_many_names_for_one_storage(tmp_path: Path) -> None:
    weight = torch.zeros(1000)
    _refused(_write(tmp_path, _bytes({f"w{i}": weight for i in range(200)})), DamagedFileError, "its tensors claim")
    tied = {"a": weight, "b": weight}
    assert read_checkpoint(_write(tmp_path, _bytes(tied))).state.keys() == tied.keys()


# -- weights in several files ------------------------------------------------------------------------------------------


def _indexed(folder: Path, weight_map: dict[str, str]) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": weight_map}))
    return path


def test_index_of_several_files(tmp_path: Path) -> None:
    save_file({"weight": STATE["weight"]}, tmp_path / "model-1.safetensors")
    save_file({"bias": STATE["bias"]}, tmp_path / "model-2.safetensors")
    path = _indexed(tmp_path, {"weight": "model-1.safetensors", "bias": "model-2.safetensors"})
    checkpoint = read_checkpoint(path)
    assert all(torch.equal(checkpoint.state[key], STATE[key]) for key in STATE)
    files = [path, tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]
    assert checkpoint.facts["size_bytes"] == sum(file.stat().st_size for file in files)
    (tmp_path / "model-2.safetensors").unlink()
    _refused(path, DamagedFileError, "names 2 files of weights, and model-2.safetensors is missing beside it")


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/passwd", "", 3, "model.safetensors.index.json"])
def test_index_that_leads_elsewhere(tmp_path: Path, name: Any) -> None:
    save_file({"weight": STATE["weight"]}, tmp_path / "model-1.safetensors")
    _refused(_indexed(tmp_path, {"weight": name}), DamagedFileError, "index")


def test_index_that_promises_more_than_there_is(tmp_path: Path) -> None:
    save_file({"weight": STATE["weight"]}, tmp_path / "model-1.safetensors")
    path = _indexed(tmp_path, {"weight": "model-1.safetensors", "bias": "model-1.safetensors"})
    _refused(path, DamagedFileError, "promises 1 tensors that its files do not hold, bias first")
