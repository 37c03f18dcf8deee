"""What a weights file is, decided by its bytes, before torch or safetensors reads any of it.

Three formats are recognised: a torch zip archive (`torch.save` since 1.6), torch's legacy pickle, and safetensors
(https://github.com/huggingface/safetensors#format). Everything else, and every damaged file, is refused with a
sentence. torch does not verify the checksums of its archives; this module does.
"""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

from collapse_probe.errors import DamagedFileError, ModelError, UnsafeFileError

TORCH_ZIP = "torch zip archive"
TORCH_LEGACY = "torch legacy pickle"
SAFETENSORS = "safetensors"

#: How to turn an unsafe file into a safe one, where it can be trusted; appended to every refusal.
EXPORT_ADVICE = (
    "Ask whoever wrote it, or use the program that did, to export the weights alone:\n"
    "    from safetensors.torch import save_file\n"
    "    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}\n"
    '    save_file(state, "weights.safetensors")'
)

_AGAIN = "Download or copy it again."
_CHUNK = 1 << 20
_MAX_HEADER = 100_000_000  # the limit that safetensors sets itself
# What torch.save writes first in its legacy format: the pickled magic number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Names that an ordinary state dict asks for; only used to keep them out of the refusal's text.
_ORDINARY = re.compile(
    r"torch\._utils\.\w+|torch\.[A-Za-z0-9]+|torch\.storage\.\w+|torch\.nn\.parameter\.Parameter"
    r"|collections\.OrderedDict|argparse\.Namespace|_codecs\.encode"
)


def recognise(path: Path) -> str:
    """The file's format: :data:`TORCH_ZIP`, :data:`TORCH_LEGACY` or :data:`SAFETENSORS`.

    Raises:
        ModelError: it cannot be read.
        DamagedFileError: it is empty, truncated, altered, or none of the three.
        UnsafeFileError: it is a TorchScript archive, or a pickle that torch.save did not write.
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
        _check_zip(path)
        return TORCH_ZIP
    if head.startswith(_LEGACY_MAGIC):
        return TORCH_LEGACY
    raise _unrecognised(path, head)


def foreign_globals(path: Path, file_format: str) -> list[str]:
    """Names of classes and functions that a pickle asks for beyond those of a state dict; nothing is executed."""
    if file_format == TORCH_ZIP:
        with zipfile.ZipFile(path) as archive:
            record = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(record) as stream:
                names = _globals(stream)
    else:
        with path.open("rb") as stream:
            names = _globals(stream)
    return [name for name in names if not _ORDINARY.fullmatch(name)]


def _globals(stream: IO[bytes]) -> list[str]:
    """Every global that consecutive pickles name, in order, by disassembly."""
    names: dict[str, None] = {}
    strings: list[str] = []
    try:
        while True:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    names[str(argument).replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL":
                    # Its two operands are almost always the last two strings pushed; good enough for a message.
                    names[".".join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # the end of the pickles, or bytes that are no pickle: what was found so far stands
        return list(names)


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
        names = foreign_globals(path, TORCH_LEGACY)
        asks = f" It asks for {_listed(names)}." if names else ""
        return UnsafeFileError(
            f"{path} is a Python pickle that torch.save did not write; reading it could run any code.{asks} "
            f"{EXPORT_ADVICE}"
        )
    return DamagedFileError(
        f"{path} is not a checkpoint: it starts with {head[:8]!r}. Expected a file written by torch.save, or "
        "safetensors."
    )


def refusal(path: Path, names: list[str]) -> UnsafeFileError:
    """The error for a torch file whose pickle needs more than tensors and plain containers."""
    asks = f"asks for {_listed(names)}" if names else "holds pickle instructions that the safe loader refuses"
    return UnsafeFileError(
        f"{path} {asks}: reading it would run code from outside a state dict (a whole pickled model, perhaps), so it "
        f"was not read. {EXPORT_ADVICE}"
    )


def _listed(names: list[str], limit: int = 3) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _check_zip(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise DamagedFileError(f"{path} is a truncated zip archive: its table of contents is missing. {_AGAIN}")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_names(path, archive.namelist())
            _check_members(path, archive)
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is a damaged zip archive: {error}. {_AGAIN}") from None


def _check_names(path: Path, names: list[str]) -> None:
    tops = {name.partition("/")[2] for name in names}
    if "constants.pkl" in tops or any(name.startswith("code/") for name in tops):
        raise UnsafeFileError(
            f"{path} is a TorchScript archive, a program and not only weights. Export the state dict where the model "
            "was made: torch.save(model.state_dict(), 'weights.pt')."
        )
    if "data.pkl" not in tops:
        raise DamagedFileError(
            f"{path} is a zip archive that torch.save did not write (it holds {_listed(names) or 'nothing'})."
        )


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Every checksum, in chunks; torch.save never compresses, so a member that claims to is no checkpoint's."""
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise DamagedFileError(f"{path} is a compressed zip archive, which torch.save never writes. Unpack it first.")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise DamagedFileError(f"{path} is a damaged zip archive: its members are larger than the file. {_AGAIN}")
    for member in members:
        if member.CRC == 0:  # written with torch.serialization.set_crc32_options(False)
            continue
        with archive.open(member) as stream:
            while stream.read(_CHUNK):
                pass


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
