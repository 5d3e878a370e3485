"""The output of a chat, told apart as it streams: reasoning, text, calls of functions.

Whatever is not what its format says stays text, so that nothing the model wrote is lost.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from inference_worker.chat_format import (
    ARGS,
    CALL_END,
    CALL_START,
    PYTHON_TAG,
    THINK_END,
    THINK_START,
    TOOL_CALLS,
    ChatFormat,
    ToolFormat,
)
from inference_worker.tool_call_scanner import CallScanner, RawValue

_ID_BYTES: Final = 12
_SPACES: Final = " \t\r\n"
_MAX_NAME_CHARS: Final = 256  # of a function, until its arguments must have begun


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPiece:
    """More of one call. The first piece has its id and name."""

    index: int
    arguments: str
    call_id: str | None = None
    name: str | None = None


Piece = Reasoning | Text | CallPiece


class ChatOutput:
    """Takes one choice's text apart."""

    def __init__(
        self,
        chat_format: ChatFormat,
        tool_names: frozenset[str],
        *,
        is_reasoning: bool,
        is_parallel: bool = True,
    ) -> None:
        """`tool_names` is empty where no calls are looked for; `is_reasoning` if the prompt has begun to.

        Not `is_parallel`: calls behind the first one are dropped.
        """
        self._most_calls = None if is_parallel else 1
        self._reasoning = _ReasoningReader(
            is_reasoning=is_reasoning, may_begin=chat_format.marks_reasoning
        )
        self._calls = _call_reader(chat_format, tool_names)
        self._num_calls = 0
        self._is_dropping = False

    @property
    def has_calls(self) -> bool:
        return self._num_calls > 0

    def push(self, text: str) -> list[Piece]:
        """Take more text, and give what is certain of it."""
        pieces: list[Piece] = []
        reasoning, answer = self._reasoning.push(text)
        if reasoning:
            pieces.append(Reasoning(reasoning))
        pieces += self._read(self._calls.push(answer))
        return pieces

    def flush(self) -> list[Piece]:
        """The text ends here."""
        pieces: list[Piece] = []
        reasoning, answer = self._reasoning.flush()
        if reasoning:
            pieces.append(Reasoning(reasoning))
        pieces += self._read(self._calls.push(answer))
        pieces += self._read(self._calls.flush())
        return pieces

    def _read(self, found: Iterator[str | _CallEvent]) -> Iterator[Piece]:
        for one in found:
            if isinstance(one, str):
                if one:
                    yield Text(one)
            elif one.name is not None and self._num_calls == self._most_calls:
                self._is_dropping = True
            elif self._is_dropping:
                pass
            elif one.name is not None:
                self._num_calls += 1
                call_id = f"call_{secrets.token_hex(_ID_BYTES)}"
                yield CallPiece(self._num_calls - 1, one.arguments, call_id, one.name)
            elif one.arguments:
                yield CallPiece(self._num_calls - 1, one.arguments)


def held_length(text: str, mark: str) -> int:
    """How many characters at the end of the text may be the beginning of the mark."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0


class _ReasoningReader:
    """`<think>` at the very beginning, or before it in the prompt, until `</think>`."""

    def __init__(self, *, is_reasoning: bool, may_begin: bool) -> None:
        self._is_open = is_reasoning
        self._may_begin = may_begin and not is_reasoning
        self._skips_spaces = is_reasoning
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Reasoning and answer in a text."""
        if not (self._is_open or self._may_begin or self._skips_spaces):
            return "", text
        text, self._held = self._held + text, ""
        if self._may_begin:
            start = text.lstrip(_SPACES)
            if THINK_START.startswith(start):
                self._held = text
                return "", ""
            self._may_begin = False
            if not start.startswith(THINK_START):
                return "", text
            self._is_open = self._skips_spaces = True
            text = start.removeprefix(THINK_START)
        if self._is_open:
            return self._push_open(text)
        return "", self._without_spaces(text)

    def flush(self) -> tuple[str, str]:
        """What was held, at the end."""
        held, self._held = self._held, ""
        return (held, "") if self._is_open else ("", held)

    def _push_open(self, text: str) -> tuple[str, str]:
        text = self._without_spaces(text)
        reasoning, mark, answer = text.partition(THINK_END)
        if not mark:
            # spaces before the mark belong to neither
            kept = len(text) - held_length(text, THINK_END)
            kept = len(text[:kept].rstrip(_SPACES))
            self._held = text[kept:]
            return text[:kept], ""
        self._is_open = False
        self._skips_spaces = True
        return reasoning.rstrip(_SPACES), self._without_spaces(answer)

    def _without_spaces(self, text: str) -> str:
        if self._skips_spaces:
            text = text.lstrip(_SPACES)
            self._skips_spaces = not text
        return text


@dataclass(frozen=True, slots=True)
class _CallEvent:
    """The beginning of a call, which has its name, or more of its arguments."""

    arguments: str
    name: str | None = None


# Yields what is certain, and returns the text that is still to be read.
_Rest: TypeAlias = Generator[str | _CallEvent, None, str]


class _CallReader(Protocol):
    def push(self, text: str) -> Iterator[str | _CallEvent]:
        """Text and calls in a text."""
        ...

    def flush(self) -> Iterator[str | _CallEvent]:
        """What was held, at the end."""
        ...


def _call_reader(chat_format: ChatFormat, tool_names: frozenset[str]) -> _CallReader:
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
    def push(self, text: str) -> Iterator[str | _CallEvent]:
        yield text

    def flush(self) -> Iterator[str | _CallEvent]:
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

    def events(self) -> Iterator[_CallEvent]:
        """What is new of it."""
        if not self._scanner.is_certain:
            return
        arguments = self._scanner.take_arguments()
        if not self.is_told:
            self.is_told = True
            yield _CallEvent(arguments, self._scanner.name)
        elif arguments:
            yield _CallEvent(arguments)


class _MarkedCalls:
    """Text with calls between two marks."""

    def __init__(self, start: str, end: str) -> None:
        self._start, self._end = start, end
        self._held = ""
        self._call: _OpenCall | None = None
        self._is_after_call = False  # spaces between calls are nobody's text

    def push(self, text: str) -> Iterator[str | _CallEvent]:
        text, self._held = self._held + text, ""
        while text:
            if self._call is None:
                text = yield from self._read_text(text)
            elif self._call.is_done:
                text = self._read_end(text)
            else:
                text = yield from self._read_call(self._call, text)

    def flush(self) -> Iterator[str | _CallEvent]:
        held, self._held = self._held, ""
        if self._call is not None:
            yield self._call.raw
            self._call = None
        elif not (self._is_after_call and not held.strip(_SPACES)):
            yield held

    def _read_text(self, text: str) -> _Rest:
        before, mark, rest = text.partition(self._start)
        if not mark:
            kept = len(text) - held_length(text, self._start)
            # spaces before a call are held as well
            kept = len(text[:kept].rstrip(_SPACES))
            self._held = text[kept:]
            if text[:kept]:
                self._is_after_call = False
                yield text[:kept]
            return ""
        if before.strip(_SPACES):
            yield before.rstrip(_SPACES)
        self._call = _OpenCall(before[len(before.rstrip(_SPACES)) :] + mark)
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
        text = text.lstrip(_SPACES)
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

    def push(self, text: str) -> Iterator[str | _CallEvent]:
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

    def flush(self) -> Iterator[str | _CallEvent]:
        held, self._held = self._held, ""
        if self._call is not None:
            yield self._call.raw
        elif self._is_calling:
            yield self._lead + held if held.strip(_SPACES) else ""
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
        stripped = text.lstrip(_SPACES + ",")
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
            yield _CallEvent("", name.strip(_SPACES))
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
        yield _CallEvent(arguments.take())
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

    def push(self, text: str) -> Iterator[str | _CallEvent]:
        text, self._held = self._held + text, ""
        while text:
            if self._is_text:
                yield text
                return
            if self._call is None:
                text = self._read_start(text)
            else:
                text = yield from self._read_call(self._call, text)

    def flush(self) -> Iterator[str | _CallEvent]:
        held, self._held = self._held, ""
        if self._call is not None:
            yield self._call.raw
        elif not self._has_calls:
            yield held

    def _read_start(self, text: str) -> str:
        stripped = text.lstrip(_SPACES + (";," if self._has_calls else ""))
        tagged = stripped.removeprefix(PYTHON_TAG).lstrip(_SPACES)
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
