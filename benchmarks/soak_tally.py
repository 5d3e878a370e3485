"""How the requests of a soak ended."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from benchmarks.soak_client import Call
from benchmarks.table import Table


@dataclass
class Tally:
    """How requests ended, by what their clients did. Only what is in `failures` is wrong."""

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)  # of each failure

    @property
    def requests(self) -> int:
        """How many there were in all."""
        return self.ended.total() + self.failures.total()

    def clear(self) -> None:
        """Count from here."""
        self.ended.clear()
        self.failures.clear()
        self.details.clear()

    def table(self) -> Table:
        """Every kind of ending, the failures last."""
        table = Table(["client", "its request", "times"], labels=2)
        for (action, ending), times in sorted(self.ended.items()):
            table.rows.append([action, ending, f"{times:,}"])
        for (action, failure), times in sorted(self.failures.items()):
            table.rows.append([action, f"**failed: {failure}**", f"{times:,}"])
        return table


class Wrong(Exception):
    """A request ended as none may; the message says how, in a few words."""


async def expect(call: Call, wanted: int) -> None:
    """Raises: Wrong, for another status."""
    if call.status != wanted:
        raise Wrong(f"status {call.status}: {(await call.body()).decode(errors='replace')}")


def compare(text: str, known: str) -> None:
    """Raises: Wrong, for another text."""
    if text != known:
        raise Wrong("another text")
