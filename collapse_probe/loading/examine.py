"""Open a weights file and find out whose weights they are, without building a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg
from torch import Tensor

from collapse_probe.errors import UnknownModelError, UsageError, WeightsMismatchError
from collapse_probe.loading.anatomy import in_words
from collapse_probe.loading.checkpoint import Checkpoint, read_checkpoint
from collapse_probe.loading.key_schemes import to_timm
from collapse_probe.loading.names import is_name
from collapse_probe.loading.recognition import Candidate, Recognition, recognise_architecture


@dataclass(frozen=True)
class Examined:
    """A weights file, read.

    Attributes:
        checkpoint: what was in it.
        state: its tensors in timm's names, where the names are of a release that is known.
        scheme: the words for those names, or None where they are timm's or unknown.
        implied: constructor arguments that the scheme implies and shapes do not show.
        left_out: keys that belong to other parts than the vision model.
        num_heads: the number of heads, where the caller or a configuration beside the file says it.
    """

    checkpoint: Checkpoint
    state: dict[str, Tensor]
    scheme: str | None = None
    implied: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    num_heads: int | None = None

    @cached_property
    def recognition(self) -> Recognition:
        """What keys and shapes say of the architecture."""
        return recognise_architecture(self.state, self.num_heads, self.implied)

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
        says = f"names the architecture {named!r}, which timm does not know," if named else "names no architecture,"
        raise UnknownModelError(
            f"{file} {says} and its weights fit none that is known{_seen(self.recognition)}. "
            f"Pass --model (arch=) and --model-kwargs.{_nearest(self.recognition)} {self.recognition.mismatch}".rstrip()
        )


def examine(file: Path, use_ema: bool = False, key: str | None = None, num_heads: int | None = None) -> Examined:
    """Read a weights file.

    Raises:
        ModelError, UsageError: see :func:`collapse_probe.loading.checkpoint.read_checkpoint`.
    """
    checkpoint = read_checkpoint(file, use_ema, key)
    converted = to_timm(checkpoint.state)
    implied = dict(converted.arguments)
    shown = implied.pop("num_heads", None)
    return Examined(
        checkpoint, converted.state, converted.scheme, implied, list(converted.left_out), num_heads or shown
    )


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


def _nearest(recognition: Recognition) -> str:
    return f" Of about that size: {', '.join(recognition.nearest)}." if recognition.nearest else ""
