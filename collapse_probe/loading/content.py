"""What a weights file is, decided by its bytes, before torch, numpy or safetensors reads any of it.

Recognised are a torch zip archive (`torch.save` since 1.6), torch's legacy pickle, safetensors
(https://github.com/huggingface/safetensors#format), the JSON index of weights in several files, and a NumPy archive.
Everything else, and every damaged file, is refused with a sentence. torch does not verify the checksums of its
archives; this module does. Safetensors and legacy pickles carry none: there, a flipped bit of a number is a number.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from collapse_probe.errors import DamagedFileError, ModelError, UnsafeFileError
from collapse_probe.loading.npz import check_arrays
from collapse_probe.loading.pickles import EXPORT_ADVICE, foreign_globals, listed, refusal

TORCH_ZIP = "torch zip archive"
TORCH_LEGACY = "torch legacy pickle"
SAFETENSORS = "safetensors"
SAFETENSORS_INDEX = "index of weights in several files"
NPZ = "NumPy archive"

#: File name endings, and what a file of that name should be.
SUFFIXES = {
    ".safetensors": (SAFETENSORS,),
    ".npz": (NPZ,),
    ".json": (SAFETENSORS_INDEX,),
    **dict.fromkeys((".bin", ".pth", ".pt", ".ckpt", ".tar"), (TORCH_ZIP, TORCH_LEGACY)),
}

_AGAIN = "Download or copy it again."
_CHUNK = 1 << 20
_MAX_HEADER = 10_000_000  # a tenth of what safetensors allows; those of the largest models take a few 100 kB
# What torch.save writes first in its legacy format: the pickled magic number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TAR_MAGIC_AT = 257
# Other kinds of files that are taken for weights, by their first bytes, and what to do with them.
_OTHERS = {
    b"\x1f\x8b": "is compressed by gzip. Unpack it first: gunzip.",
    b"\xfd7zXZ\0": "is compressed by xz. Unpack it first: unxz.",
    b"BZh": "is compressed by bzip2. Unpack it first: bunzip2.",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd. Unpack it first: unzstd.",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive. Unpack it first.",
    b"Rar!": "is a RAR archive. Unpack it first.",
    b"\x89HDF": "is an HDF5 file (Keras or TensorFlow weights). Export the weights of the PyTorch model.",
    b"GGUF": "is a GGUF file, whose weights are quantised. Export the weights of the PyTorch model.",
    b"\x93NUMPY": "is a single NumPy array. A model needs all of its arrays by name: numpy.savez.",
    b"\x89PNG": "is a picture. Images are given by --images.",
    b"\xff\xd8\xff": "is a picture. Images are given by --images.",
}


class DamagedMemberError(DamagedFileError):
    """A member of a torch zip archive does not have its checksum.

    Attributes:
        member: its name in the archive.
    """

    def __init__(self, message: str, member: str) -> None:
        super().__init__(message)
        self.member = member


def recognise(path: Path) -> str:
    """The file's format: one of the five names above.

    Raises:
        ModelError: it cannot be read.
        DamagedFileError: it is empty, truncated, altered, or none of the five.
        UnsafeFileError: it is a program (TorchScript, torch.export) or a pickle that asks for more than tensors and
            plain containers.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}.") from None
    if not head:
        raise DamagedFileError(f"{path} is empty (0 bytes). {_AGAIN}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        _check_safetensors(path, int.from_bytes(head[:8], "little"))
        return SAFETENSORS
    if head.startswith(b"PK"):
        return _check_zip(path)
    if head.startswith(_LEGACY_MAGIC):
        with path.open("rb") as stream:
            _check_pickle(path, foreign_globals(stream))
        return TORCH_LEGACY
    if head.lstrip().startswith(b"{") and "weight_map" in _as_json(path):
        return SAFETENSORS_INDEX
    raise _unrecognised(path, head)


def _check_pickle(path: Path, foreign: list[str]) -> None:
    if foreign:
        raise refusal(path, foreign)


def _as_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_HEADER else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _unrecognised(path: Path, head: bytes) -> ModelError:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"version https://git-lfs"):
        return DamagedFileError(f"{path} is a Git LFS pointer, not the weights. Fetch the file itself: git lfs pull.")
    if text.startswith(b"<"):
        return DamagedFileError(
            f"{path} is a web page (HTML or XML), not weights: the download probably met a login or an error page. "
            f"{_AGAIN}"
        )
    if head.startswith(b"\x80"):
        with path.open("rb") as stream:
            names = foreign_globals(stream)
        asks = f" It asks for {listed(names)}." if names else ""
        return UnsafeFileError(
            f"{path} is a Python pickle that torch.save did not write; reading it could run any code.{asks} "
            f"{EXPORT_ADVICE}"
        )
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return _tar(path)
    for magic, words in _OTHERS.items():
        if head.startswith(magic):
            return DamagedFileError(f"{path} {words}")
    return DamagedFileError(
        f"{path} is not a checkpoint: it starts with {head[:8]!r}. Expected a file written by torch.save, "
        "safetensors, or a NumPy archive of weights."
    )


def _tar(path: Path) -> ModelError:
    try:
        with tarfile.open(path, "r:") as archive:
            member = archive.next()
            names = [] if member is None else [member.name, *(item.name for item in (archive.next(),) if item)]
    except (tarfile.TarError, OSError, EOFError):
        names = []
    if {name.strip("./") for name in names} & {"sys_info", "pickle", "storages", "tensors"}:
        return UnsafeFileError(
            f"{path} is of the tar format that torch.save wrote before 2017; its pickles could run any code, so it was "
            f"not read. {EXPORT_ADVICE}"
        )
    return DamagedFileError(
        f"{path} is a tar archive ({listed(names) or 'damaged'}). Unpack it and name the weights file in it."
    )


def _check_zip(path: Path) -> str:
    try:
        if not zipfile.is_zipfile(path):  # raises, too, on some versions of Python
            raise DamagedFileError(f"{path} is a truncated zip archive: its table of contents is missing. {_AGAIN}")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if names and all(name.endswith(".npy") for name in names):
                check_arrays(path, archive)
                return NPZ
            _check_names(path, names)
            _check_members(path, archive)
            record = next(item for item in archive.infolist() if item.filename.partition("/")[2] == "data.pkl")
            if record.CRC == 0:
                record.CRC = None  # type: ignore[assignment]  # otherwise zipfile takes it for a checksum
            _check_pickle(path, foreign_globals(io.BytesIO(archive.read(record))))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is a damaged zip archive: {error}. {_AGAIN}") from None
    return TORCH_ZIP


def _check_names(path: Path, names: list[str]) -> None:
    tops = {name.partition("/")[2] for name in names}
    if "constants.pkl" in tops or any(name.startswith("code/") for name in tops):
        raise UnsafeFileError(
            f"{path} is a TorchScript archive, a program and not only weights. Export the state dict where the model "
            "was made: torch.save(model.state_dict(), 'weights.pt')."
        )
    if "archive_format" in tops or any(name.endswith("serialized_exported_program.json") for name in names):
        raise UnsafeFileError(
            f"{path} is an archive of torch.export, a program and not only weights. Export the state dict where the "
            "model was made: torch.save(model.state_dict(), 'weights.pt')."
        )
    if "data.pkl" not in tops:
        raise DamagedFileError(
            f"{path} is a zip archive that torch.save did not write (it holds {listed(names) or 'nothing'})."
        )


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Every checksum, in chunks; torch.save never compresses, so a member that claims to is no checkpoint's."""
    members = archive.infolist()
    if len({member.filename.casefold() for member in members}) < len(members):
        # Readers differ in which of two members of one name they take; torch's does not heed upper and lower case.
        raise DamagedFileError(f"{path} is a damaged zip archive: it holds members of the same name. {_AGAIN}")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise DamagedFileError(f"{path} is a compressed zip archive, which torch.save never writes. Unpack it first.")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise DamagedFileError(f"{path} is a damaged zip archive: its members are larger than the file. {_AGAIN}")
    for member in members:
        if member.CRC == 0:  # none: written with torch.serialization.set_crc32_options(False)
            continue
        try:
            with archive.open(member) as stream:
                while stream.read(_CHUNK):
                    pass
        except zipfile.BadZipFile as error:
            raise DamagedMemberError(f"{path} is a damaged zip archive: {error}. {_AGAIN}", member.filename) from None


def _check_safetensors(path: Path, length: int) -> None:
    size = path.stat().st_size
    if 8 + length > size:
        raise DamagedFileError(f"{path} is a truncated safetensors file: its header alone has {length} bytes. {_AGAIN}")
    try:
        with path.open("rb") as stream:
            stream.seek(8)
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        promised = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise DamagedFileError(f"{path} is a damaged safetensors file: its header cannot be read. {_AGAIN}") from None
    if promised != size:
        state = "truncated" if promised > size else "damaged"
        raise DamagedFileError(
            f"{path} is a {state} safetensors file: its header describes {promised} bytes, the file has {size}. "
            f"{_AGAIN}"
        )
