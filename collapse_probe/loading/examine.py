"""Open a weights file and find out whose weights they are, without building a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor

from collapse_probe.errors import DamagedFileError, UnknownModelError, UsageError, WeightsMismatchError
from collapse_probe.loading.anatomy import in_words
from collapse_probe.loading.checkpoint import Checkpoint, read_checkpoint
from collapse_probe.loading.folders import Configuration
from collapse_probe.loading.key_schemes import to_timm
from collapse_probe.loading.names import is_name
from collapse_probe.loading.prefixes import rivals
from collapse_probe.loading.recognition import Candidate, Known, Recognition, recognise_architecture

#: How something is known: the caller says so.
GIVEN = "given"
# Matrices of every ViT, which training in parts may have flattened.
_MATRIX = re.compile(r"(qkv|proj|fc[12]|query|key|value|dense|patch_embedding)\.weight$")
_READABLE = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip
_MOCO_SMALL = 384


@dataclass(frozen=True)
class Examined:
    """A weights file, read.

    Attributes:
        checkpoint: what was in it.
        state: its tensors in timm's names, where the names are of a release that is known.
        scheme: the words for those names, or None where they are timm's or unknown.
        known: what the caller, the names, or a configuration beside the file say of the model.
        implied: constructor arguments that the names imply.
        left_out: keys that belong to other parts than the vision model.
    """

    checkpoint: Checkpoint
    state: dict[str, Tensor]
    scheme: str | None = None
    known: Known = field(default_factory=Known)
    implied: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @cached_property
    def recognition(self) -> Recognition:
        """What keys and shapes say of the architecture; without the caller's arguments where none takes those."""
        found = recognise_architecture(self.state, self.known)
        if found.candidates or self.known.arguments == self.implied:
            return found
        return recognise_architecture(self.state, replace(self.known, arguments=self.implied))

    @property
    def stored(self) -> str | None:
        """The architecture that the file names, if it is one that timm knows."""
        name = self.checkpoint.architecture
        return name if name is not None and is_name(name) else None

    def only_candidate(self) -> Candidate:
        """The architecture that was recognised.

        Raises:
            UsageError: several that differ in what they compute take these weights.
            UnknownModelError: none does.
        """
        found = self.recognition.candidates
        file, named = self.checkpoint.facts["path"], self.checkpoint.architecture
        if len(found) == 1:
            return found[0]
        if found:
            listed = "\n".join(f"    --model {item}" for item in found)
            raise UsageError(
                f"{file} does not say which architecture it is for, and its weights fit {len(found)} that differ in "
                f"what they compute:\n{listed}\nChoose one (arch=)."
            )
        if names := rivals(self.state):
            raise UsageError(
                f"{file} holds several models side by side: {', '.join(names[:6])}. Choose one with --key (key=)."
            )
        says = f"names the architecture {named!r}, which timm does not know," if named else "names no architecture,"
        raise UnknownModelError(
            f"{file} {says} and its weights fit none that is known{_seen(self.recognition)}. "
            f"{_unseen(self.recognition)}Pass --model (arch=) and --model-kwargs.{_nearest(self.recognition)} "
            f"{self.recognition.mismatch}".rstrip()
        )


def examine(
    file: Path,
    use_ema: bool = False,
    key: str | None = None,
    num_heads: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    config: Configuration | None = None,
) -> Examined:
    """Read a weights file.

    Args:
        file: the file.
        use_ema, key: which of its weights.
        num_heads: what the caller says.
        arguments: constructor arguments by the caller.
        config: what lies beside the file.

    Raises:
        ModelError, UsageError: see :func:`collapse_probe.loading.checkpoint.read_checkpoint`; also shapes that no model
            has, and heads that contradict the weights.
    """
    checkpoint = read_checkpoint(file, use_ema, key)
    _check_shapes(file, checkpoint.state)
    try:
        converted = to_timm(checkpoint.state)
    except WeightsMismatchError as error:
        raise WeightsMismatchError(f"{file}: {error}") from None
    config, arguments = config or Configuration(), dict(arguments or {})
    implied = dict(converted.arguments)
    shown = implied.pop("num_heads", None)
    stated = arguments.pop("num_heads", None) if num_heads is None else num_heads
    if shown is not None and stated not in (None, shown):
        raise UsageError(
            f"{file} holds weights of {shown} heads, as the shapes of {converted.scheme} show, and {stated} were asked "
            f"for. Leave --num-heads out, or set it to {shown}."
        )
    says = (
        (shown, f"shown by the shapes of {converted.scheme}"),
        (stated, GIVEN),
        (config.num_heads, "stored in config.json"),
        (_of_moco(checkpoint), "those of MoCo v3's ViT-S (arXiv 2104.02057)"),
    )
    heads, origin = next(((count, words) for count, words in says if count is not None), (None, ""))
    known = Known(heads, origin, config.activation, {**implied, **arguments})
    return Examined(checkpoint, converted.state, converted.scheme, known, implied, list(converted.left_out))


def _check_shapes(file: Path, state: Mapping[str, Tensor]) -> None:
    """Raises DamagedFileError for one process's share of weights that were cut up in training."""
    matrices = [key for key in state if _MATRIX.search(key)]
    flat = matrices if all(state[key].ndim < 2 for key in matrices) else []
    shares = [
        key
        for key, tensor in state.items()
        if key in flat or key.endswith("flat_param") or (key.endswith(("weight", "bias")) and not tensor.numel())
    ]
    if shares:
        raise DamagedFileError(
            f"{file} holds {len(shares)} tensors that are empty or flattened, {shares[0]} "
            f"{list(state[shares[0]].shape)} first: one process's share of weights that were cut up in training "
            "(DeepSpeed ZeRO-3, FSDP). Gather them into whole weights with the program that trained them."
        )
    packed = [key for key, tensor in state.items() if tensor.dtype not in _READABLE and tensor.is_floating_point()]
    if packed:
        raise DamagedFileError(
            f"{file} holds {len(packed)} tensors of {str(state[packed[0]].dtype).removeprefix('torch.')}, {packed[0]} "
            "first. Quantised weights mean nothing without their scales: export them in floating point."
        )


def _of_moco(checkpoint: Checkpoint) -> int | None:
    """MoCo v3 trains ViT-S with 12 heads of 32 channels, everyone else with 6."""
    beside = ("momentum_encoder.", "predictor.")
    token = checkpoint.state.get("cls_token")
    momentum = any(part in key for key in checkpoint.facts["left_out"] for part in beside)
    small = token is not None and token.shape[-1:] == (_MOCO_SMALL,)
    return 12 if "base_encoder." in checkpoint.facts["prefix_cut"] and momentum and small else None


def better_fit(error: WeightsMismatchError, examined: Examined) -> WeightsMismatchError:
    """The same error with the architecture that the weights do fit, if there is one."""
    found = examined.recognition.candidates
    advice = f" They fit {' or '.join(f'--model {item}' for item in found[:3])}." if found else ""
    return WeightsMismatchError(f"{error}{advice}")


def preprocessing_of(names: list[str]) -> Mapping[tuple[float, ...], list[str]]:
    """Names by the mean that their preprocessing subtracts."""
    found: dict[tuple[float, ...], list[str]] = {}
    for name in names:
        cfg = get_pretrained_cfg(name)
        if cfg is not None:
            found.setdefault(tuple(cfg.mean), []).append(name)
    return found


def _seen(recognition: Recognition) -> str:
    if recognition.anatomy is None:
        return ""
    return " (" + ", ".join(f"{name}: {value}" for name, value in in_words(recognition.anatomy)) + ")"


def _unseen(recognition: Recognition) -> str:
    anatomy = recognition.anatomy
    if anatomy is None or anatomy.positions == "learnt" or anatomy.stages:
        return ""
    return "How it tells positions apart (rotary, fixed) does not show in weights. "


def _nearest(recognition: Recognition) -> str:
    return f" Of about that size: {', '.join(recognition.nearest)}." if recognition.nearest else ""
