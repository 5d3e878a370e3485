"""A port for a process that must be told one, or keeps one over restarts."""

from __future__ import annotations

import itertools
import os
import socket

# Below those that the system gives out by itself, from 32768 on: nobody comes by one of these between two starts.
_FIRST, _COUNT = 20_000, 12_000
_offsets = itertools.count(
    os.getpid() * 101
)  # processes that test side by side begin far from one another


def free_port() -> int:
    """One that nobody listens on; another one each time."""
    for offset in itertools.islice(_offsets, _COUNT):
        port = _FIRST + offset % _COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("every port is taken")
