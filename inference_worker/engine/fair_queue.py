"""A queue that serves several keys in proportion to their weights, however much each of them asks for.

The Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each key has a
counter of the tokens it was served, divided by its weight, and the next to be served is the key with the lowest one
among those that wait. A key that begins to wait is lifted to the lowest counter of those that do, so that nobody saves
up credit while away. Between keys that always have something waiting, counters differ by no more than what the requests
of one key that run at a time can use.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")

MAX_KEYS: Final = (
    4096  # counters kept; beyond it those that have nothing waiting and used least are forgotten
)


@dataclass(frozen=True, slots=True)
class Share:
    """Whose an item is, and how it stands among the others."""

    key_id: str = ""
    weight: float = 1.0  # of the key, above 0; that of its latest item holds
    priority: int = 0  # among the key's own items, higher first


@dataclass(slots=True)
class _Line(Generic[Item]):
    """The items of one key, first one first."""

    weight: float
    entries: list[tuple[int, int, Item]] = field(default_factory=list)  # -priority, number, item


class FairQueue(Generic[Item]):
    """Invariants: an item is in it at most once; a key has a line exactly while it has items, and a counter then."""

    def __init__(self) -> None:
        self._returned: deque[Item] = deque()
        self._lines: dict[str, _Line[Item]] = {}
        self._places: dict[Item, tuple[str, int, int]] = {}  # key, -priority and number
        self._counters: dict[str, float] = {}  # tokens by weight, which only grow
        self._last_key = ""  # the one that was served last
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._returned) + len(self._places)

    def add(self, item: Item, share: Share) -> None:
        """Put a new item behind those of its key that have its priority."""
        key_id = share.key_id
        line = self._lines.get(key_id)
        if line is None:
            self._counters[key_id] = self._first_counter(key_id)
            line = self._lines[key_id] = _Line(share.weight)
            self._forget_some()
        line.weight = share.weight
        place = (-share.priority, self._next_number)
        self._next_number += 1
        insort(line.entries, (*place, item))
        self._places[item] = (key_id, *place)

    def put_back(self, item: Item) -> None:
        """Put an item before all others: it was served already, in part, and goes on as soon as it can."""
        self._returned.appendleft(item)

    def put_behind_returned(self, item: Item) -> None:
        """Put a new item before all others but those that were put back: it was served in part elsewhere."""
        self._returned.append(item)

    def first(self) -> Item:
        """The next one. Raises: IndexError, if there is none."""
        if self._returned:
            return self._returned[0]
        if not self._lines:
            raise IndexError("the queue is empty")
        return min(self._lines.items(), key=self._turn)[1].entries[0][-1]

    def remove(self, item: Item) -> None:
        """Take an item out, wherever it stands. Raises: ValueError, if it is not here."""
        place = self._places.pop(item, None)
        if place is None:
            self._returned.remove(item)
            return
        key_id, *rest = place
        line = self._lines[key_id]
        del line.entries[bisect_left(line.entries, tuple(rest))]
        if not line.entries:
            del self._lines[key_id]
            self._last_key = key_id

    def charge(self, share: Share, tokens: int) -> None:
        """Tokens were served to a key."""
        counter = self._counters.get(share.key_id)
        if counter is None:  # it was forgotten while it ran
            counter = self._floor()
            self._counters[share.key_id] = counter
            self._forget_some()
        self._counters[share.key_id] = counter + tokens / share.weight

    def position(self, share: Share) -> int:
        """New items that are likely to be served before one that comes now: keys take turns, all items equally long."""
        if (line := self._lines.get(share.key_id)) is None:
            index, turn = 0, (self._first_counter(share.key_id), self._next_number)
        else:
            index = bisect_left(line.entries, (-share.priority, self._next_number))
            turn = self._turn((share.key_id, line))
        position = index
        for other_id, other in self._lines.items():
            if other_id != share.key_id:
                turns = index + (self._turn((other_id, other)) < turn)
                position += min(len(other.entries), math.ceil(turns * other.weight / share.weight))
        return position

    def _turn(self, entry: tuple[str, _Line[Item]]) -> tuple[float, int]:
        """The lowest goes first; of equal counters the one whose item came first."""
        key_id, line = entry
        return self._counters[key_id], line.entries[0][1]

    def _first_counter(self, key_id: str) -> float:
        """What a key begins to wait with."""
        return max(self._counters.get(key_id, 0.0), self._floor())

    def _floor(self) -> float:
        """The counter that a key has to begin with."""
        if self._lines:
            return min(self._counters[key_id] for key_id in self._lines)
        return self._counters.get(self._last_key, 0.0)

    def _forget_some(self) -> None:
        """Keep the counters few. Who is forgotten begins at the floor, to which most of them would be lifted anyway."""
        if len(self._counters) <= MAX_KEYS + len(self._lines):
            return
        idle = self._counters.keys() - self._lines.keys() - {self._last_key}
        few = heapq.nsmallest(len(idle) - MAX_KEYS // 2, idle, key=self._counters.__getitem__)
        for key_id in few:
            del self._counters[key_id]
