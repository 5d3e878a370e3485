"""What one connection may ask of the server, and how many there may be."""

from collections import Counter
from dataclasses import dataclass
from typing import Final

from edge.settings import EdgeSettings

# Connections beyond the limit of all that are answered with a 429; further ones would take the files that the edge
# itself needs.
MAX_SURPLUS: Final = 128


@dataclass(frozen=True)
class ConnectionLimits:
    """Those that hold before a request reaches the application."""

    read_timeout_seconds: float
    max_connections: int
    max_connections_per_address: int
    max_header_bytes: int
    max_headers: int
    max_url_bytes: int
    max_query_parameters: int

    @classmethod
    def of(cls, settings: EdgeSettings) -> "ConnectionLimits":
        """Those that are set."""
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})

    def are_far_too_many(self, connections: int) -> bool:
        """Whether the last of so many is not even worth an answer."""
        return connections > self.max_connections + MAX_SURPLUS


class Addresses:
    """How many connections each address has."""

    # Connections beyond the limit are answered with a 429; those beyond this many times the limit are not.
    _MOST_FACTOR = 2

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts: Counter[str] = Counter()

    def add(self, address: str) -> None:
        """Counts a connection."""
        self._counts[address] += 1

    def remove(self, address: str) -> None:
        """Counts it no more."""
        self._counts[address] -= 1
        if self._counts[address] <= 0:
            del self._counts[address]

    def has_too_many(self, address: str) -> bool:
        """Whether an address is over the limit."""
        return self._counts[address] > self._limit

    def has_far_too_many(self, address: str, uncounted: int = 0) -> bool:
        """Whether its last connection is not even worth an answer, with so many that are not counted here."""
        return self._counts[address] + uncounted > self._limit * self._MOST_FACTOR
