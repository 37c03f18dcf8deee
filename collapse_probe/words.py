"""Words from outside (names of files, layers and models, messages of libraries) as they can be shown anywhere."""

from __future__ import annotations

#: What stands for a character that has no picture, or that would do something to a terminal.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def neutral(text: str, lines: bool = False) -> str:
    """The text on one line without control characters, halves of surrogate pairs, or marks that turn its direction.

    Each of them becomes a �: escape sequences, line ends that would forge a line of the output, bytes of file names
    that are no UTF-8.

    Args:
        text: anything.
        lines: whether line ends are the author's own and stay.
    """
    if text.isprintable():
        return text
    kept = "\n" if lines else ""
    return "".join(character if character.isprintable() or character in kept else REPLACEMENT for character in text)
