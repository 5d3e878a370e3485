"""Reads one call of a function out of a stream of text, as far as it goes, and gives its arguments out as they come."""

from __future__ import annotations

import json
from enum import Enum, auto
from typing import Final

_SPACES: Final = " \t\r\n"
_NAME_KEYS: Final = frozenset({"name"})
# Hermes, Qwen and Mistral say arguments, Llama 3 says parameters.
_ARGUMENT_KEYS: Final = frozenset({"arguments", "parameters"})


class _Fault(ValueError):
    """The text is no call."""


class _State(Enum):
    BEFORE = auto()  # of the object
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    DONE = auto()


class RawValue:
    """Finds the end of one JSON value by its brackets and quotes, and looks no further into it."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._num_taken = 0  # characters
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False
        self.is_done = False

    @property
    def text(self) -> str:
        return "".join(self._text)

    def take(self) -> str:
        """What is new since the last call."""
        new = "".join(self._text[self._num_taken :])
        self._num_taken = len(self._text)
        return new

    def push_all(self, text: str) -> int:
        """Read as much as belongs to the value, and return how many characters that is."""
        for index, character in enumerate(text):
            if self.is_done or not self.push(character):
                return index
        return len(text)

    def push(self, character: str) -> bool:
        """Take a character; False if it stands behind the value, which a number's or a word's end is known by."""
        if self._is_in_string:
            self._take_in_string(character)
        elif character == '"':
            self._is_in_string = True
            self._text.append(character)
        elif character in "{[":
            self._depth += 1
            self._text.append(character)
        elif character in "}]" and self._depth:
            self._depth -= 1
            self._text.append(character)
            self.is_done = not self._depth
        elif not self._depth and character in ",}]" + _SPACES:
            self.is_done = True
            return False
        else:
            self._text.append(character)
        return True

    def _take_in_string(self, character: str) -> None:
        self._text.append(character)
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._is_in_string = False
            self.is_done = not self._depth


class CallScanner:
    """Reads `{"name": …, "arguments": …}`; other members are skipped.

    `name` is set once it is whole. Once it `is_certain` that this is a call, `take_arguments` gives what came
    of its arguments.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_malformed = False
        self._state = _State.BEFORE
        self._key = ""
        self._value: RawValue | None = None
        self._arguments: RawValue | None = None

    @property
    def is_done(self) -> bool:
        """Whether the object is closed."""
        return self._state is _State.DONE

    @property
    def is_certain(self) -> bool:
        """Whether there are a name and the beginning of arguments, an object."""
        return self.name is not None and self._arguments is not None

    def push(self, text: str) -> int:
        """Read as much as belongs to the call, or up to its first fault, and return how many characters that is."""
        for index, character in enumerate(text):
            if self._state is _State.DONE or self.is_malformed:
                return index
            try:
                self._push(character)
            except _Fault:
                self.is_malformed = True
                return index
        return len(text)

    def take_arguments(self) -> str:
        """The arguments' text that is new since the last call."""
        if self._arguments is None:
            return ""
        return self._arguments.take()

    def _push(self, character: str) -> None:
        if self._value is not None:
            taken = self._value.push(character)
            if self._value.is_done:
                self._end_value()
            if taken:
                return
        match self._state:
            case _ if character in _SPACES:
                pass
            case _State.BEFORE if character == "{":
                self._state = _State.KEY
            case _State.KEY if character == '"':
                self._value = RawValue()
                self._value.push(character)
            case _State.KEY if character == ",":
                pass
            case _State.KEY if character == "}":
                self._close()
            case _State.COLON if character == ":":
                self._state = _State.VALUE
            case _State.VALUE:
                self._begin_value(character)
            case _:
                raise _Fault(f"unexpected {character!r}")

    def _begin_value(self, character: str) -> None:
        self._value = RawValue()
        if self._key in _ARGUMENT_KEYS and self._arguments is None:
            if character != "{":
                raise _Fault("arguments that are no object")
            self._arguments = self._value
        self._value.push(character)

    def _end_value(self) -> None:
        assert self._value is not None  # noqa: S101 - the caller has seen it end
        value, self._value = self._value, None
        if self._state is _State.KEY:
            self._key = str(_parsed(value.text))
            self._state = _State.COLON
            return
        self._state = _State.KEY
        if self._key in _NAME_KEYS and self.name is None:
            name = _parsed(value.text)
            if not isinstance(name, str) or not name:
                raise _Fault("a name that is no text")
            self.name = name

    def _close(self) -> None:
        if self.name is None:
            raise _Fault("no name")
        if self._arguments is None:  # a function without any
            self._arguments = RawValue()
            for character in "{}":
                self._arguments.push(character)
        self._state = _State.DONE


def _parsed(text: str) -> object:
    try:
        value: object = json.loads(text)
    except ValueError as error:
        raise _Fault("no JSON") from error
    return value
