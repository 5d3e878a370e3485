"""Keeps names of special tokens that stand in what a caller wrote from becoming those tokens.

A tokenizer takes `<|im_end|>` for the end of a turn wherever it stands, so a user who writes it could speak as somebody
else. It finds such a name only where a text has it in one piece; so texts are cut inside the names that the caller
wrote, and the pieces encoded one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

# Characters that Unicode keeps out of texts for ever: section 23.7, "Noncharacters".
_MARKS: Final = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class ControlTokenError(ValueError):
    """A text whose special tokens cannot be taken apart."""


class ControlTokens:
    """The names of a tokenizer's special tokens. Immutable."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted({name for name in names if name})
        self._has_single = any(len(name) == 1 for name in self._names)
        self._any = re.compile(_alternatives(self._names))
        self._beginnings = {name[:end] for name in self._names for end in range(1, len(name))}
        self._ends = {name[begin:] for name in self._names for begin in range(1, len(name))}
        self._longest = max(map(len, self._names), default=0)

    def pieces(self, text: str) -> list[str]:
        """The text, cut so that no piece has a special token. Raises: ControlTokenError."""
        return _cut(text, [begin + 1 for begin, _ in self._found(text)])

    def marked(self, value: Any, mark: str) -> Any:
        """A copy of JSON-like data, with `mark` wherever its texts have to be cut if they stay as they are.

        That is inside a name, and where a text begins or ends with a part of one: what a template writes beside it may
        be the rest. The value itself if there is no such place. Raises: ControlTokenError.
        """
        if isinstance(value, str):
            return self._marked_text(value, mark)
        if isinstance(value, list):
            return [self.marked(item, mark) for item in value]
        if isinstance(value, dict):
            return {
                self.marked(name, mark): self.marked(item, mark) for name, item in value.items()
            }
        return value

    def marked_pieces(self, text: str, mark: str) -> list[str]:
        """What a template made of marked texts, cut at those marks alone that stand inside a special token's name."""
        parts = text.split(mark)
        places, at = [], 0
        for part in parts[:-1]:
            at += len(part)
            places.append(at)
        whole = "".join(parts)
        inside = _inside(places, self._found(whole))
        return _cut(whole, inside)

    def _marked_text(self, text: str, mark: str) -> str:
        places = {begin + 1 for begin, _ in self._found(text)}
        # templates like to trim
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if any(text[begin:stop] in self._ends for stop in range(begin + 1, begin + self._longest)):
            places.add(begin)
        if any(
            text[start:end] in self._beginnings
            for start in range(max(begin, end - self._longest), end)
        ):
            places.add(end)
        return mark.join(_cut(text, sorted(places), keep_empty=True)) if places else text

    def _found(self, text: str) -> list[tuple[int, int]]:
        """Begin and end of each name in a text, overlapping or not; of those that begin together the longest."""
        found: list[tuple[int, int]] = []
        at = 0
        while self._names and (match := self._any.search(text, at)) is not None:
            found.append(match.span())
            at = match.start() + 1
        if self._has_single and any(end - begin == 1 for begin, end in found):
            raise ControlTokenError("a special token of one character cannot be text")
        return found


def unused_mark(value: Any) -> str:
    """A character that no text of JSON-like data has. Raises: ControlTokenError."""
    used = set().union(*(_MARKS_FOUND.findall(text) for text in _texts(value)))
    for mark in _MARKS:
        if mark not in used:
            return mark
    raise ControlTokenError("the texts have every noncharacter of Unicode")


_MARKS_FOUND: Final = re.compile("[\ufdd0-\ufdef]")


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(name)
            yield from _texts(item)


def _inside(places: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """Those of ascending places that lie inside a span, between its begin and its end."""
    inside, reach, index = [], 0, 0
    for place in places:
        while index < len(spans) and spans[index][0] < place:
            reach = max(reach, spans[index][1])
            index += 1
        if place < reach:
            inside.append(place)
    return inside


def _cut(text: str, places: list[int], *, keep_empty: bool = False) -> list[str]:
    pieces = [
        text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)
    ]
    return pieces if keep_empty else [piece for piece in pieces if piece]


def _alternatives(names: Iterable[str]) -> str:
    """A pattern for the longest of these names, which looks at each character once however many names there are."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for character in name:
            node = node.setdefault(character, {})
        node[""] = {}  # a name may end here
    return _pattern(tree)


def _pattern(tree: dict[str, Any]) -> str:
    branches = [re.escape(key) + _pattern(rest) for key, rest in sorted(tree.items()) if key]
    if not branches:
        return ""
    joined = f"(?:{'|'.join(branches)})" if len(branches) > 1 else branches[0]
    return f"(?:{joined})?" if "" in tree else joined
