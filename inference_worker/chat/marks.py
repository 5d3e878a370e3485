"""Looking for marks in text that comes in pieces."""

from __future__ import annotations

from typing import Final

SPACES: Final = " \t\r\n"


def held_length(text: str, mark: str) -> int:
    """How many characters at the end of the text may be the beginning of the mark."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0
