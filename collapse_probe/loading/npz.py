"""NumPy archives of arrays, as the original JAX releases of ViT are: checked before numpy spends memory on them."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from collapse_probe.errors import DamagedFileError, UnsafeFileError

_CHUNK = 1 << 20
# Trained weights hardly compress; an archive that does is mostly one value.
_MAX_RATIO = 100


def check_arrays(path: Path, archive: zipfile.ZipFile) -> None:
    """Sizes, checksums and headers of all members.

    Raises:
        DamagedFileError: a member would unpack to a hundred times the file, or is not the array it claims to be.
        UnsafeFileError: a member holds Python objects.
        zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError: a member is damaged.
    """
    members = archive.infolist()
    if sum(member.file_size for member in members) > _MAX_RATIO * path.stat().st_size:
        raise DamagedFileError(f"{path} would unpack to more than {_MAX_RATIO} times its size; it was not unpacked.")
    for member in members:
        with archive.open(member) as stream:
            promised = _bytes_of(stream)
            rest = 0
            while chunk := stream.read(_CHUNK):
                rest += len(chunk)
        if promised != rest:
            raise DamagedFileError(
                f"{path} is a damaged NumPy archive: {member.filename} describes {promised} bytes of numbers and holds "
                f"{rest}."
            )


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a checked archive as tensors.

    Raises:
        DamagedFileError: one of them cannot be read, or holds something else than numbers.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            try:
                with archive.open(member) as stream:
                    values = np.lib.format.read_array(stream, allow_pickle=False)
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
                raise DamagedFileError(f"{path} is a damaged NumPy archive, in {name}: {error}.") from None
            if values.dtype == np.dtype("V2"):  # how numpy stores JAX's bfloat16
                found[name] = torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
                continue
            try:
                native = values.astype(values.dtype.newbyteorder("="), order="C", copy=False)
                found[name] = torch.from_numpy(native)
            except TypeError:
                raise DamagedFileError(f"{path}: {name} holds {values.dtype}, which are no weights.") from None
    return found


def _bytes_of(stream: IO[bytes]) -> int:
    """What the array that starts here will take, by its header. Raises ValueError where that is none."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise UnsafeFileError("An array of Python objects would have to be unpickled; it was not read.")
    return int(np.prod(shape, dtype=object)) * dtype.itemsize
