"""Reads calls of functions out of a stream of text, one reader for each format."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from inference_worker.chat.call_scanner import CallScanner, RawValue
from inference_worker.chat.format import (
    ARGS,
    CALL_END,
    CALL_START,
    PYTHON_TAG,
    TOOL_CALLS,
    ChatFormat,
    ToolFormat,
)
from inference_worker.chat.marks import SPACES, held_length

_MAX_NAME_CHARS: Final = 256  # of a function, until its arguments must have begun


@dataclass(frozen=True, slots=True)
class CallEvent:
    """The beginning of a call, which has its name, or more of its arguments."""

    arguments: str
    name: str | None = None


# Yields what is certain, and returns the text that is still to be read.
_Rest: TypeAlias = Generator[str | CallEvent, None, str]


class CallReader(Protocol):
    """Tells the calls in one format apart from text."""

    def push(self, text: str) -> Iterator[str | CallEvent]:
        """Text and calls in a text."""
        ...

    def flush(self) -> Iterator[str | CallEvent]:
        """What was held, at the end."""
        ...


def call_reader(chat_format: ChatFormat, tool_names: frozenset[str]) -> CallReader:
    """The reader for a format; one that finds none where there are no tools."""
    if not tool_names or chat_format.tools is None:
        return _NoCalls()
    match chat_format.tools:
        case ToolFormat.HERMES:
            return _MarkedCalls(CALL_START, CALL_END)
        case ToolFormat.MISTRAL:
            return _MistralCalls()
        case ToolFormat.LLAMA3:
            return _BareCalls(tool_names)


class _NoCalls:
    def push(self, text: str) -> Iterator[str | CallEvent]:
        yield text

    def flush(self) -> Iterator[str | CallEvent]:
        yield from ()


class _OpenCall:
    """A call that is being read, and all of its text, in case it is none."""

    def __init__(self, prefix: str) -> None:
        self._raw = prefix
        self._scanner = CallScanner()
        self.is_told = False  # its name was given out: it cannot become text any more

    @property
    def is_done(self) -> bool:
        return self._scanner.is_done

    @property
    def name(self) -> str | None:
        return self._scanner.name

    @property
    def is_malformed(self) -> bool:
        return self._scanner.is_malformed

    @property
    def raw(self) -> str:
        """The call as text, if nothing of it was given out."""
        return "" if self.is_told else self._raw

    def push(self, text: str) -> str:
        """Read on; gives what stands behind the call, or behind its first fault."""
        length = self._scanner.push(text)
        self._raw += text[:length]
        return text[length:]

    def events(self) -> Iterator[CallEvent]:
        """What is new of it."""
        if not self._scanner.is_certain:
            return
        arguments = self._scanner.take_arguments()
        if not self.is_told:
            self.is_told = True
            yield CallEvent(arguments, self._scanner.name)
        elif arguments:
            yield CallEvent(arguments)


class _MarkedCalls:
    """Text with calls between two marks."""

    def __init__(self, start: str, end: str) -> None:
        self._start, self._end = start, end
        self._held = ""
        self._call: _OpenCall | None = None
        self._is_after_call = False  # spaces between calls are nobody's text

    def push(self, text: str) -> Iterator[str | CallEvent]:
        text, self._held = self._held + text, ""
        while text:
            if self._call is None:
                text = yield from self._read_text(text)
            elif self._call.is_done:
                text = self._read_end(text)
            else:
                text = yield from self._read_call(self._call, text)

    def flush(self) -> Iterator[str | CallEvent]:
        held, self._held = self._held, ""
        if self._call is not None:
            yield self._call.raw
            self._call = None
        elif not (self._is_after_call and not held.strip(SPACES)):
            yield held

    def _read_text(self, text: str) -> _Rest:
        before, mark, rest = text.partition(self._start)
        if not mark:
            kept = len(text) - held_length(text, self._start)
            # spaces before a call are held as well
            kept = len(text[:kept].rstrip(SPACES))
            self._held = text[kept:]
            if text[:kept]:
                self._is_after_call = False
                yield text[:kept]
            return ""
        if before.strip(SPACES):
            yield before.rstrip(SPACES)
        self._call = _OpenCall(before[len(before.rstrip(SPACES)) :] + mark)
        return rest

    def _read_call(self, call: _OpenCall, text: str) -> _Rest:
        rest = call.push(text)
        yield from call.events()
        if call.is_malformed:
            self._call = None
            self._is_after_call = False
            yield call.raw
        return rest

    def _read_end(self, text: str) -> str:
        text = text.lstrip(SPACES)
        if not text:
            return ""
        if text.startswith(self._end):
            self._call = None
            self._is_after_call = True
            return text.removeprefix(self._end)
        if self._end.startswith(text):
            self._held = text
            return ""
        self._call = None  # its end is missing, which changes nothing about it
        self._is_after_call = True
        return text


class _MistralCalls:
    """Text, then `[TOOL_CALLS]` and a list of calls, or for each call `[TOOL_CALLS]name[ARGS]{…}`."""

    def __init__(self) -> None:
        self._held = ""
        self._is_calling = False
        self._lead = ""  # what stands behind text and may yet turn out to be more of it
        self._call: _OpenCall | None = None
        self._arguments: RawValue | None = None

    def push(self, text: str) -> Iterator[str | CallEvent]:
        text, self._held = self._held + text, ""
        while text:
            if self._call is not None:
                text = yield from self._read_listed(self._call, text)
            elif self._arguments is not None:
                text = yield from self._read_arguments(self._arguments, text)
            elif self._is_calling:
                text = yield from self._read_calling(text)
            else:
                text = yield from self._read_text(text)

    def flush(self) -> Iterator[str | CallEvent]:
        held, self._held = self._held, ""
        if self._call is not None:
            yield self._call.raw
        elif self._is_calling:
            yield self._lead + held if held.strip(SPACES) else ""
        else:
            yield held

    def _read_text(self, text: str) -> _Rest:
        before, mark, rest = text.partition(TOOL_CALLS)
        if not mark:
            kept = len(text) - held_length(text, TOOL_CALLS)
            self._held = text[kept:]
            yield text[:kept]
            return ""
        self._is_calling = True
        self._lead = mark
        yield before
        return rest

    def _read_calling(self, text: str) -> _Rest:
        """Behind the mark: a list, a name, or what stands between two calls."""
        stripped = text.lstrip(SPACES + ",")
        self._skip(text[: len(text) - len(stripped)])
        if not stripped or TOOL_CALLS.startswith(stripped):
            self._held = stripped
            return ""
        if stripped.startswith(TOOL_CALLS):
            self._skip(TOOL_CALLS)
            return stripped.removeprefix(TOOL_CALLS)
        if stripped[0] in "[]":
            self._skip(stripped[0])
            return stripped[1:]
        if stripped[0] == "{":
            self._call, self._lead = _OpenCall(self._lead), ""
            return stripped
        name, mark, rest = stripped.partition(ARGS)
        if len(name) - (0 if mark else held_length(name, ARGS)) > _MAX_NAME_CHARS:
            self._is_calling = False
            yield self._lead
            return stripped
        if mark:
            self._arguments, self._lead = RawValue(), ""
            yield CallEvent("", name.strip(SPACES))
            return rest
        self._held = stripped
        return ""

    def _skip(self, text: str) -> None:
        """Behind a call, what separates it from the next is nobody's text."""
        if self._lead:
            self._lead += text

    def _read_listed(self, call: _OpenCall, text: str) -> _Rest:
        rest = call.push(text)
        yield from call.events()
        if call.is_malformed:
            self._call = None
            self._is_calling = False
            yield call.raw
        elif call.is_done:
            self._call = None
        return rest

    def _read_arguments(self, arguments: RawValue, text: str) -> _Rest:
        length = arguments.push_all(text)
        yield CallEvent(arguments.take())
        if arguments.is_done:
            self._arguments = None
        return text[length:]


class _BareCalls:
    """The whole output is calls, or none of it is; only a name of a given function tells."""

    def __init__(self, tool_names: frozenset[str]) -> None:
        self._names = tool_names
        self._held = ""
        self._is_text = False
        self._has_calls = False
        self._call: _OpenCall | None = None

    def push(self, text: str) -> Iterator[str | CallEvent]:
        text, self._held = self._held + text, ""
        while text:
            if self._is_text:
                yield text
                return
            if self._call is None:
                text = self._read_start(text)
            else:
                text = yield from self._read_call(self._call, text)

    def flush(self) -> Iterator[str | CallEvent]:
        held, self._held = self._held, ""
        if self._call is not None:
            yield self._call.raw
        elif not self._has_calls:
            yield held

    def _read_start(self, text: str) -> str:
        stripped = text.lstrip(SPACES + (";," if self._has_calls else ""))
        tagged = stripped.removeprefix(PYTHON_TAG).lstrip(SPACES)
        if not tagged or PYTHON_TAG.startswith(stripped):
            self._held = text
            return ""
        if tagged[0] != "{":
            self._is_text = True
            return text
        self._call = _OpenCall(text[: len(text) - len(tagged)])
        return tagged

    def _read_call(self, call: _OpenCall, text: str) -> _Rest:
        rest = call.push(text)
        if call.name is not None and call.name not in self._names:
            return self._give_up(call.raw + rest)
        yield from call.events()
        if call.is_malformed:
            return self._give_up(call.raw + rest)
        if call.is_done:
            self._call = None
            self._has_calls = True
        return rest

    def _give_up(self, text: str) -> str:
        """It is no call, nor is anything behind it."""
        self._call = None
        self._is_text = True
        return text
