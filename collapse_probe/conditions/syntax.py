"""What a condition can say, in one line of text.

attention-collapse                       there is a finding of that code
attention-collapse:warning               there is one, and it is a warning or a problem
problem                                  there is a finding that grave
head_diversity<0.05                      a reading is beyond the bound in any layer
max(head_diversity)<0.05                 so is the largest, the smallest or the mean of the layers
similarity_to_previous>baseline+0.02     a reading is that far above the one of the same layer in the baseline
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from collapse_probe.diagnosis.codes import CODES, RESTS_ON
from collapse_probe.errors import UsageError
from collapse_probe.readings import DERIVED, READINGS, is_bookkeeping, reading_of
from collapse_probe.words import neutral

#: Severities that a condition can name, and those of findings that are at least that grave.
AT_LEAST = {"warning": ("warning", "problem"), "problem": ("problem",)}

#: Readings of all layers made one.
AGGREGATES = ("max", "min", "mean")

#: Columns of the layers table that count what had to be left out; the other ones beside readings describe a layer.
_COUNTS = ("zero_columns", "nonfinite_columns", "zero_tokens", "nonfinite_tokens")

_COMPARISON = re.compile(r"([^<>=]*)(>=|<=|>|<)([^<>=]*)")
_LEFT = re.compile(r"(?:(?P<aggregate>\w+)\s*\(\s*(?P<inner>\w+)\s*\)|(?P<reading>\w+))", re.ASCII)
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_BOUND = re.compile(rf"(?P<number>[+-]?{_NUMBER})", re.ASCII)
_RELATIVE = re.compile(rf"baseline(?:\s*(?P<sign>[+-])\s*(?P<offset>{_NUMBER}))?", re.ASCII)

_SYNTAX = (
    "A condition is the code of a finding, be it with a severity (attention-collapse, attention-collapse:warning), a "
    "severity (problem), or a reading with a bound (head_diversity<0.05, mean(normalized_entropy)>0.97, "
    "similarity_to_previous>baseline+0.02)."
)


@dataclass(frozen=True)
class OnFinding:
    """A condition that fails where the verdict holds a certain finding.

    Attributes:
        text: as the caller wrote it.
        code: of the finding; empty for any.
        severity: how grave it must be at least, ``"warning"`` or ``"problem"``; empty for any.
    """

    text: str
    code: str
    severity: str

    @property
    def readings(self) -> tuple[str, ...]:
        """Readings without which it cannot be judged."""
        return RESTS_ON.get(self.code, ())

    @property
    def relative(self) -> bool:
        """Whether it needs a baseline: it does not."""
        return False


@dataclass(frozen=True)
class OnReading:
    """A condition that fails where a reading is beyond a bound.

    Attributes:
        text: as the caller wrote it.
        reading: a column of the layers table, or a derived reading of the groups.
        aggregate: one of :data:`AGGREGATES`; empty for any layer.
        operator: ``">"``, ``">="``, ``"<"`` or ``"<="``.
        bound: the number; of a relative condition, what is added to the baseline's value.
        relative: whether the bound is relative to a baseline.
    """

    text: str
    reading: str
    aggregate: str
    operator: str
    bound: float
    relative: bool

    @property
    def readings(self) -> tuple[str, ...]:
        """Readings without which it cannot be judged."""
        return (self.reading,)

    @property
    def sign(self) -> int:
        """1 where values above the bound are beyond it, -1 where those below are."""
        return 1 if self.operator.startswith(">") else -1

    @property
    def touching_counts(self) -> bool:
        """Whether a value that is exactly the bound is beyond it."""
        return self.operator.endswith("=")

    @property
    def of_all(self) -> bool:
        """Whether all layers must be beyond the bound for the condition to fail: the largest is below a bound, or the
        smallest above, where all are; the largest is above it where any is."""
        return (self.aggregate, self.sign) in (("max", -1), ("min", 1))


Condition = OnFinding | OnReading


def parse(text: str) -> Condition:
    """A condition from its text; see the module.

    Raises:
        UsageError: it is empty or has another form, or there is no such finding, severity or reading.
    """
    if not isinstance(text, str):
        raise UsageError(f"A condition is text; got {text!r:.60}.")
    words = text.strip()
    if not words:
        raise UsageError(f"A condition is empty. {_SYNTAX}")
    if re.search("[<>=]", words):
        return _on_reading(words)
    return _on_finding(words)


def metric_of(reading: str) -> str | None:
    """The metric of the suite that a reading, a part of one, or a derived reading comes from; None for counts."""
    if reading in DERIVED:
        return "cross_layer_similarity"
    known = reading_of(reading)
    return None if known is None else known.metric


def _on_finding(words: str) -> OnFinding:
    code, colon, severity = (part.strip() for part in words.partition(":"))
    if not colon and code in AT_LEAST:
        return OnFinding(words, "", code)
    if code not in CODES:
        hint = f" A reading needs a bound, for example {code}>0.5." if _is_known(code) else _similar(code, CODES)
        raise UsageError(
            f"{neutral(words)!r:.80} is no condition: there is no finding of that code.{hint} Codes: "
            f"{', '.join(CODES)}. Severities: {', '.join(AT_LEAST)}."
        )
    if colon and severity not in AT_LEAST:
        raise UsageError(
            f"{neutral(words)!r:.80}: a severity is {' or '.join(AT_LEAST)}; got {neutral(severity)!r:.40}."
        )
    return OnFinding(words, code, severity)


def _on_reading(words: str) -> OnReading:
    parts = _COMPARISON.fullmatch(words)
    left = parts and _LEFT.fullmatch(parts[1].strip())
    if not parts or not left:
        raise UsageError(f"{neutral(words)!r:.80} is no condition. {_SYNTAX}")
    aggregate, reading = left["aggregate"] or "", left["inner"] or left["reading"]
    if aggregate and aggregate not in AGGREGATES:
        raise UsageError(
            f"{neutral(words)!r:.80}: {aggregate} is not known. Use {', '.join(AGGREGATES)}, or none of them."
        )
    if not _is_known(reading):
        raise UsageError(
            f"{neutral(words)!r:.80}: there is no reading {reading!r:.60}."
            f"{_similar(reading, [*READINGS, *DERIVED, *_COUNTS])} collapse-probe metrics --markdown lists all."
        )
    bound, relative = _bound(words, parts[3].strip())
    found = OnReading(words, reading, aggregate, parts[2], bound, relative)
    _check_meaning(found)
    return found


def _bound(words: str, text: str) -> tuple[float, bool]:
    """The number on the right of the sign, and whether it is added to that of the baseline."""
    if relative := _RELATIVE.fullmatch(text):
        bound = float(f"{relative['sign']}{relative['offset']}") if relative["offset"] else 0.0
    elif number := _BOUND.fullmatch(text):
        bound = float(number["number"])
    else:
        raise UsageError(
            f"{neutral(words)!r:.80}: the bound {neutral(text)!r:.40} is neither a finite number such as 0.95 (with a "
            "decimal point) nor one that is relative, such as baseline+0.02."
        )
    if not math.isfinite(bound):
        raise UsageError(f"{neutral(words)!r:.80}: the bound is too large to be a number.")
    return bound, bool(relative)


def _check_meaning(found: OnReading) -> None:
    """Raises UsageError where a condition can be read and says nothing."""
    if found.aggregate and found.reading in DERIVED:
        raise UsageError(f"{found.text!r}: {found.reading} is of a whole group of layers; leave out {found.aggregate}.")
    if found.reading == "onset" and found.sign > 0:
        raise UsageError(
            f"{found.text!r}: the sooner the run of similar blocks begins, the worse; and where there is none, there "
            "is no onset. Bound it from below, for example onset<12."
        )
    if found.relative and found.aggregate in ("max", "min"):
        raise UsageError(
            f"{found.text!r}: a baseline is compared with layer by layer, or by the mean of all layers. Leave out "
            f"{found.aggregate}, or use mean."
        )


def _is_known(name: str) -> bool:
    """Whether there are numbers of that name."""
    share_left_out = name.endswith("_absent") and is_bookkeeping(name)
    return reading_of(name) is not None or name in DERIVED or name in _COUNTS or share_left_out


def _similar(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {found[0]}?" if found else ""
