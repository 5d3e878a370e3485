"""A clock reading as text: every token is one, so that whoever receives it knows when it was made."""

from __future__ import annotations

import re
import time
from typing import Final

MARK: Final = b"@"  # stands in no other byte of a stream
PATTERN: Final = re.compile(rb"@\d{19}")


def stamp() -> bytes:
    """The present time, always 20 bytes long."""
    return b"@%019d" % time.monotonic_ns()


def nanoseconds(found: bytes) -> int:
    """The time that a stamp tells, in time.monotonic_ns()."""
    return int(found[1:])
