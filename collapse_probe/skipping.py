"""How many images may be unreadable before an analysis of the rest would pass for one of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from collapse_probe.errors import ImagesError, UsageError
from collapse_probe.words import neutral

#: Share of all images that may be unreadable, unless the caller says otherwise.
SKIPPED_ALLOWED = 0.01

_FIRST = 3


def check_share(max_skipped: object) -> None:
    """Raises UsageError where this is no share of images."""
    number = isinstance(max_skipped, (int, float)) and not isinstance(max_skipped, bool)
    if not number or not 0 <= max_skipped <= 1:  # type: ignore[operator]  # NaN lies nowhere
        raise UsageError(
            f"max_skipped must be a share of the images within 0..1; got {max_skipped!r}. For 5 % give 0.05."
        )


def check_count(skipped: Sequence[Mapping[str, str]], total: int, allowed: float, where: str = "") -> None:
    """Stop where more than that share of all images could not be read.

    Args:
        skipped: those images, each with ``path`` and ``reason``.
        total: how many images there are.
        allowed: share, 0 to 1.
        where: added to the count, in words.

    Raises:
        ImagesError: names the first few and their reasons.
    """
    if len(skipped) > allowed * total:
        first = "; ".join(neutral(f"{entry['path']}: {entry['reason']}") for entry in skipped[:_FIRST])
        more = f"; and {len(skipped) - _FIRST} more" if len(skipped) > _FIRST else ""
        raise ImagesError(
            f"{len(skipped)} of {total} images could not be read{where}, more than {100 * allowed:g}%: {first}{more}. "
            "Remove or repair them, or allow for more with --max-skipped (max_skipped in Python)."
        )
