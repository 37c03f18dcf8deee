"""What a pickle asks for, read by disassembly: nothing in it is executed.

`torch.load(weights_only=True)` is the loader's lock; this is the look through the spyhole before it is opened. A file
whose pickle names anything beyond what a state dict is made of does not reach torch at all.
"""

from __future__ import annotations

import pickletools
import re
from pathlib import Path
from typing import IO

from collapse_probe.errors import UnsafeFileError

#: How to turn an unsafe file into a safe one, where it can be trusted; appended to every refusal.
EXPORT_ADVICE = (
    "Ask whoever wrote it, or use the program that did, to export the weights alone:\n"
    "    from safetensors.torch import save_file\n"
    "    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}\n"
    '    save_file(state, "weights.safetensors")'
)

# What tensors, their storages and plain containers are rebuilt from, and timm's `args`.
_ORDINARY = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)|torch\.\w+Storage"
    r"|torch\.storage\.(_LegacyStorage|TypedStorage|UntypedStorage)|torch\.nn\.parameter\.Parameter"
    r"|torch\.(Size|device|dtype|b?float\w*|u?int\d*|long|short|half|double|bool|strided)"
    r"|torch\.serialization\._get_layout|collections\.(OrderedDict|Counter)|argparse\.Namespace|_codecs\.encode"
    r"|(builtins|__builtin__)\.(bytearray|set|complex)"
)
_PUSHES_MEMO = ("BINGET", "LONG_BINGET", "GET")
_WRITES_MEMO = ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE")


def foreign_globals(stream: IO[bytes]) -> list[str]:
    """Classes and functions that consecutive pickles name beyond those of a state dict, in order."""
    return [name for name in _globals(stream) if not _ORDINARY.fullmatch(name)]


def refusal(path: Path, names: list[str]) -> UnsafeFileError:
    """The error for a torch file whose pickle needs more than tensors and plain containers."""
    asks = f"asks for {listed(names)}" if names else "holds pickle instructions that the safe loader refuses"
    return UnsafeFileError(
        f"{path} {asks}: more than tensors and plain containers, such as a whole pickled model. Reading it could run "
        f"any code, so it was not read. {EXPORT_ADVICE}"
    )


def listed(names: list[str], limit: int = 3) -> str:
    """The first few names in words."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _globals(stream: IO[bytes]) -> list[str]:
    names: dict[str, None] = {}
    try:
        while True:
            strings: list[str] = []  # as they were pushed
            memo: dict[int, str | None] = {}
            last: str | None = None  # what the opcode before pushed, where that is a string
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in _WRITES_MEMO:
                    memo[len(memo) if argument is None else int(str(argument))] = last
                    continue
                if opcode.name in ("GLOBAL", "INST"):
                    names[str(argument).replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL":
                    names[".".join(strings[-2:])] = None
                last = memo.get(int(str(argument))) if opcode.name in _PUSHES_MEMO else argument
                last = last if isinstance(last, str) else None
                if last is not None:
                    strings.append(last)
    except Exception:  # the end of the pickles, or bytes that are no pickle: what was found so far stands
        return list(names)
