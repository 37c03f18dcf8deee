"""Weights files broken at random: a state dict or one of two errors, and nothing else, comes of them."""

from __future__ import annotations

import functools
import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from collapse_probe.errors import DamagedFileError, UnsafeFileError
from collapse_probe.loading.checkpoint import read_checkpoint

STATE = {"weight": torch.arange(12.0).reshape(3, 4), "norm.bias": torch.linspace(-1, 1, 5)}
ALLOWED = (DamagedFileError, UnsafeFileError)


def _saved(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


@functools.cache
def _whole() -> dict[str, bytes]:
    arrays = {name: tensor.numpy() for name, tensor in STATE.items()}
    return {
        "zip": _saved(lambda stream: torch.save(STATE, stream)),
        "legacy": _saved(lambda stream: torch.save(STATE, stream, _use_new_zipfile_serialization=False)),
        "safetensors": save(STATE),
        "npz": _saved(lambda stream: np.savez(stream, **arrays)),
        "compressed npz": _saved(lambda stream: np.savez_compressed(stream, **arrays)),
        "pickle": pickle.dumps(arrays),
    }


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A good file with some bytes changed, cut out, doubled, or moved in from a file of another format."""
    files = _whole()
    content = bytearray(files[draw(st.sampled_from(sorted(files)))])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(("flip", "write", "cut", "double", "splice", "truncate")))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "write":
            content[at : at + length] = draw(st.binary(min_size=1, max_size=length))
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "double":
            content[at:at] = content[at : at + length]
        elif kind == "splice":
            other = files[draw(st.sampled_from(sorted(files)))]
            start = draw(st.integers(0, len(other) - 1))
            content[at : at + length] = other[start : start + length]
        else:
            del content[at:]
    return bytes(content)


def _read(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        path.write_bytes(content)
        outcome: object
        try:
            outcome = read_checkpoint(path).state
        except ALLOWED as error:
            outcome = str(error)
    assert outcome
    if isinstance(outcome, str):
        assert "weights_only" not in outcome
        assert "allow_pickle" not in outcome
    else:
        assert isinstance(outcome, dict)
        assert all(isinstance(tensor, torch.Tensor) for tensor in outcome.values())


@pytest.mark.parametrize("name", ["zip", "legacy", "safetensors", "npz", "compressed npz"])
def test_the_whole_files_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(_whole()[name])
    state = read_checkpoint(tmp_path / "model.pt").state
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(broken())
def test_broken_files(content: bytes) -> None:
    _read(content)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from((b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", b"\x93NUMPY", b'{"weight_map": ', b"")), st.binary()
)
def test_arbitrary_bytes_after_a_known_start(start: bytes, rest: bytes) -> None:
    _read(start + rest)


@pytest.mark.sweep
@settings(max_examples=20_000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(broken())
def test_many_broken_files(content: bytes) -> None:
    _read(content)
