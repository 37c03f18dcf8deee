"""At which step of its training each checkpoint of a series is: what it states, what its name says, when it was
written.

What a checkpoint states goes before its name. A series has one unit, in which most of its checkpoints are known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from collapse_probe.series import in_words

#: Endings of files that hold weights; some have two.
_ENDINGS = re.compile(r"(\.(pt|pth|ckpt|bin|tar|safetensors|npz|index|json))+$", re.IGNORECASE)

_STEP, _EPOCH = "(?:global|train)?[ _-]?steps?|iterations?|iters?|it|updates?", "epochs?|ep"
# Not part of a word, a hash or a decimal number: k stands for thousands.
_NUMBER = r"(?P<number>[0-9]{1,15})(?P<k>k)?(?![a-z0-9])(?!\.[0-9])"

#: A unit and its number, in the order in which they are looked for: "step=500", "e12"; then "500steps", "12e".
_LABELLED = {
    "step": (
        rf"(?<![a-z0-9])(?:{_STEP})[ _=.:-]*{_NUMBER}",
        rf"(?<![0-9.])(?P<number>[0-9]{{1,15}})(?P<k>k)?[ _-]?(?:{_STEP})(?![a-z])",
    ),
    "epoch": (
        rf"(?<![a-z0-9])(?:{_EPOCH})[ _=.:-]*{_NUMBER}",
        rf"(?<![a-z0-9.])e{_NUMBER}",
        rf"(?<![0-9.])(?P<number>[0-9]{{1,15}})(?P<k>k)?[ _-]?(?:(?:{_EPOCH})(?![a-z])|e(?![a-z0-9]|-[0-9]))",
    ),
}
# "v1" is a version.
_BARE = rf"(?P<word>[a-z]*)(?<![0-9])(?<![0-9]\.){_NUMBER}"


@dataclass(frozen=True)
class Clues:
    """What is known of where one checkpoint stands.

    Attributes:
        label: what it is called.
        digest: tells its content from that of others.
        stated: unit -> the number that it states, and under which name.
        named: unit -> the number in its name, see :func:`numbers_in_names`.
        modified: when it was last written, in seconds.
    """

    label: str
    digest: str = ""
    stated: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    named: Mapping[str, int] = field(default_factory=dict)
    modified: float = 0.0


@dataclass(frozen=True)
class Placed:
    """Where a checkpoint stands: its number and how that is known; without a number the reason why it has no place."""

    number: float | None
    words: str


def natural(text: str) -> tuple[list[Any], str]:
    """A key by which "2" comes before "10", and "a" before "a-1"."""
    parts = re.split("([0-9]+)", _ENDINGS.sub("", text))
    return [(int(part), part) if number % 2 else part.casefold() for number, part in enumerate(parts)], text


def numbers_in_names(paths: Sequence[Path]) -> list[dict[str, int]]:
    """For each checkpoint the numbers in its name by unit; ``"number"`` for one whose unit the name does not say.

    What all names have in common tells no checkpoint from another and is not looked at, such as the sizes in
    ``vit_small_patch16_224_0010.pth``. Where a name holds no number, that of the folder that it lies in counts.
    """
    own = _numbers([_ENDINGS.sub("", path.name) for path in paths])
    folders = _numbers([path.parent.name for path in paths]) if len(paths) > 1 else [{}]
    return [name or folder for name, folder in zip(own, folders, strict=True)]


def place(series: Sequence[Clues]) -> tuple[str, list[Placed]]:
    """The unit of a series, and the place of each checkpoint; no two have the same.

    Of checkpoints at one step the first by name has it. Where fewer than half are known in any unit, all are numbered
    by the time at which they were written.
    """
    chosen = max((_in_unit(series, unit) for unit in ("step", "epoch", "number")), key=_merit)
    unit, known = chosen
    if 2 * len(known) < len(series) or not known:
        return "order", _by_time(series)
    return unit, _without_ties(series, unit, known)


def _numbers(texts: Sequence[str]) -> list[dict[str, int]]:
    distinct = sorted(set(texts))
    start = end = 0
    if len(distinct) > 1:
        start = _shared(distinct)
        end = _shared([text[::-1] for text in distinct])
    elif len(texts) > 1:
        return [{} for _ in texts]
    return [_numbers_between(text, start, len(text) - end) for text in texts]


def _shared(texts: Sequence[str]) -> int:
    """How many characters all texts begin with, without a number that goes on differently."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    shared = "".join(letters[0] for letters in alike)
    if any(text[len(shared) : len(shared) + 1].isdecimal() for text in texts):
        shared = shared.rstrip("0123456789")
    return len(shared)


def _numbers_between(text: str, start: int, end: int) -> dict[str, int]:
    """The numbers of a name that lie within its part from `start` to `end`."""
    found = {}
    for unit, patterns in _LABELLED.items():
        matches = (_last(pattern, text, start, end) for pattern in patterns)
        number = next((number for number in matches if number is not None), None)
        if number is not None:
            found[unit] = number
    if not found and (bare := _last(_BARE, text, start, end)) is not None:
        found["number"] = bare
    return found


def _last(pattern: str, text: str, start: int, end: int) -> int | None:
    last = None
    for match in re.finditer(pattern, text, re.IGNORECASE):
        version = match.groupdict().get("word", "").lower() == "v"
        if start <= match.start("number") and match.end("number") <= end and not version:
            last = int(match["number"]) * (1000 if match["k"] else 1)
    return last


def _in_unit(series: Sequence[Clues], unit: str) -> tuple[str, dict[int, tuple[float, str]]]:
    """The number of each checkpoint that is known in a unit, and how it is known, by its place in the series."""
    known = {}
    for number, clues in enumerate(series):
        if unit in clues.stated:
            value, name = clues.stated[unit]
            known[number] = (value, f"stated as {name}")
        elif unit in clues.named:
            known[number] = (clues.named[unit], f"{unit} in its name" if unit != "number" else "number in its name")
    if known and unit != "number":  # others may mean the same without saying so
        for number, clues in enumerate(series):
            if number not in known and "number" in clues.named:
                known[number] = (clues.named["number"], f"number in its name, taken to be its {unit}")
    return unit, known


def _merit(candidate: tuple[str, dict[int, tuple[float, str]]]) -> tuple[int, int, int]:
    """As many checkpoints as possible, as many different numbers as possible, as little guessed as possible."""
    _, known = candidate
    guessed = sum("taken to be" in words for _, words in known.values())
    return len(known), len({value for value, _ in known.values()}), -guessed


def _without_ties(series: Sequence[Clues], unit: str, known: Mapping[int, tuple[float, str]]) -> list[Placed]:
    placed: dict[int, Placed] = {}
    holders: dict[float, Clues] = {}
    for number in sorted(known, key=lambda number: natural(series[number].label)):
        value, words = known[number]
        holder = holders.setdefault(value, series[number])
        if holder is series[number]:
            placed[number] = Placed(value, words)
        elif holder.digest and holder.digest == series[number].digest:
            placed[number] = Placed(None, f"It is the same as {holder.label}.")
        else:
            placed[number] = Placed(
                None,
                f"It is at {unit} {in_words(value)} ({words}), and so is {holder.label}, which is shown. Of several at "
                "one step name the one that is meant.",
            )
    by_digest = {series[number].digest: series[number].label for number in known if placed[number].number is not None}
    for number, clues in enumerate(series):
        if number not in known:
            same = by_digest.get(clues.digest) if clues.digest else None
            placed[number] = Placed(None, f"It is the same as {same}." if same else _unknown(clues, unit))
    return [placed[number] for number in range(len(series))]


def _unknown(clues: Clues, unit: str) -> str:
    other = [f"{name} {in_words(value)}" for name, (value, _) in clues.stated.items()]
    other += [f"{name} {value}" for name, value in clues.named.items() if name not in clues.stated]
    instead = f", only {' and '.join(other)}" if other else ""
    words = "number" if unit == "number" else unit
    return (
        f"Neither its content nor its name says its {words}{instead}; that of most others is known. Put it into its "
        "name."
    )


def _by_time(series: Sequence[Clues]) -> list[Placed]:
    order = sorted(range(len(series)), key=lambda number: (series[number].modified, natural(series[number].label)))
    placed: dict[int, Placed] = {}
    holders: dict[str, str] = {}
    for number in order:
        clues = series[number]
        holder = holders.setdefault(clues.digest, clues.label) if clues.digest else clues.label
        if holder == clues.label:
            placed[number] = Placed(1 + sum(item.number is not None for item in placed.values()), "by time of writing")
        else:
            placed[number] = Placed(None, f"It is the same as {holder}.")
    return [placed[number] for number in range(len(series))]
