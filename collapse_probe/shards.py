"""Shards: the images of one analysis dealt out to several processes, in units that always stay together.

Every process goes by the place of an image in the order of the whole source alone, so none needs to know of another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from collapse_probe.errors import UsageError

#: Images with the same ``index // UNIT`` belong to the same shard, whatever the number of shards.
UNIT = 8


@dataclass(frozen=True)
class Shard:
    """One part of `count` parts; the default is the whole.

    Attributes:
        number: which part, 1 to `count`.
        count: how many parts there are, 1 or more.

    Raises:
        UsageError: the two are no whole numbers with ``1 <= number <= count``.
    """

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (self.number, self.count))
        if not (whole and 1 <= self.number <= self.count):
            raise _wrong(f"{self.number}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``"2/4"``, the second of four.

        Raises:
            UsageError: the text is not of that form, or its first number does not lie between 1 and the second.
        """
        numbers = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text) if isinstance(text, str) else None
        if numbers is None:
            raise _wrong(text)
        return cls(int(numbers[1]), int(numbers[2]))

    def owns(self, index: int) -> bool:
        """Whether the image at this place of the whole order, counted from 0, belongs to this shard."""
        return index // UNIT % self.count == self.number - 1

    def indices(self, total: int) -> list[int]:
        """The places of this shard's images among `total`, ascending; none where there are too few units."""
        starts = range((self.number - 1) * UNIT, total, self.count * UNIT)
        return [index for start in starts for index in range(start, min(start + UNIT, total))]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


#: All images in one process.
WHOLE = Shard()


def _wrong(text: object) -> UsageError:
    return UsageError(
        f"{text!r:.60} is no shard: write NUMBER/COUNT with NUMBER between 1 and COUNT, such as 2/4 for the second of "
        "four."
    )
