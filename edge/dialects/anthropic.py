"""Anthropic's POST /v1/messages."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from starlette.responses import Response

from edge.dialects.anthropic_schema import (
    AnthropicFields,
    AnthropicMessage,
    AnthropicRequest,
    AnthropicText,
    AnthropicThinking,
    AnthropicToolChoice,
    AnthropicToolResult,
    AnthropicToolUse,
)
from edge.dialects.common import field_names, new_id
from edge.dialects.dialect import ParsedRequest, PromptLimits, StreamEncoder
from edge.dialects.schema import validate
from edge.errors import EdgeError, from_finish, invalid_request, server_error
from edge.json_codec import decode, encode
from protos.sluice.v1 import generation_pb2 as pb

_STOP_REASONS: Final = {
    pb.FINISH_REASON_STOP: "end_turn",
    pb.FINISH_REASON_STOP_SEQUENCE: "stop_sequence",
    pb.FINISH_REASON_LENGTH: "max_tokens",
    pb.FINISH_REASON_TOOL_CALLS: "tool_use",
}
_OVERLOADED: Final = (
    529  # in the place of 429, which to Anthropic's clients is a limit of their own key
)
_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    _OVERLOADED: "overloaded_error",
}
_MODES: Final = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "any": pb.TOOL_CHOICE_MODE_REQUIRED,
    "tool": pb.TOOL_CHOICE_MODE_REQUIRED,
    "none": pb.TOOL_CHOICE_MODE_NONE,
}
NAMES: Final = field_names(
    {
        "prompt": "messages",
        "prompt.chat": "messages",
        "prompt.chat.messages": "messages",
        "prompt.chat.continue_final_message": "messages",
        "prompt.chat.tools": "tools",
        "prompt.chat.tool_choice": "tool_choice",
        "stopping.stop_sequences": "stop_sequences",
    }
)


def parse(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    """A request in the contract's words."""
    request = validate(AnthropicRequest, body)
    generation_id = new_id("msg")
    message = pb.GenerateRequest(
        request_id=generation_id,
        model=request.model,
        prompt=pb.Prompt(chat=to_chat(request)),
        sampling=pb.Sampling(
            temperature=request.temperature, top_p=request.top_p, top_k=request.top_k or None
        ),
        stopping=pb.Stopping(
            max_tokens=request.max_tokens, stop_sequences=request.stop_sequences or []
        ),
    )
    return ParsedRequest(
        generation_id,
        [message],
        bool(request.stream),
        partial(AnthropicEncoder, generation_id),
        partial(AnthropicCollector, generation_id),
        NAMES,
    )


def refuse(error: EdgeError, request_id: str = "") -> Response:
    """A failure before the 200, as Anthropic tells it."""
    status = _OVERLOADED if error.status == 429 and error.type == "overloaded" else error.status
    return Response(
        _error(error, status, request_id),
        status_code=status,
        headers=error.http_headers(),
        media_type="application/json",
    )


def _error(error: EdgeError, status: int, request_id: str) -> bytes:
    kind = _ERROR_TYPES.get(status)
    if kind is None:
        kind = "invalid_request_error" if status < 500 else "api_error"
    detail = {"type": kind, "message": error.message}
    if status in (429, _OVERLOADED) and error.code is not None:
        detail["code"] = error.code
    return encode({"type": "error", "error": detail, "request_id": request_id})


def to_chat(request: AnthropicFields) -> pb.Chat:
    messages: list[pb.ChatMessage] = []
    if request.system is not None:
        system = _text(request.system)
        messages.append(pb.ChatMessage(role="system", content=system))
    for index, message in enumerate(request.messages):
        messages += _messages(message, f"messages[{index}]")
    chat = pb.Chat(messages=messages)
    if request.messages[-1].role == "assistant":
        _continue(chat, request)
    for tool in request.tools or []:
        schema = encode(tool.input_schema).decode()
        chat.tools.add(name=tool.name, description=tool.description, parameters=schema)
    if request.tool_choice is not None:
        _choose(chat, request.tool_choice)
    if request.thinking is not None:
        # what Qwen 3 and its like read; other templates look at no such variable
        chat.template_arguments["enable_thinking"] = request.thinking.type != "disabled"
    return chat


def _continue(chat: pb.Chat, request: AnthropicFields) -> None:
    """Has the model go on with the answer that the last message begins. An empty one begins nothing."""
    last = chat.messages[-1]
    if not (last.content or last.tool_calls or last.reasoning):
        del chat.messages[-1]
        return
    if last.content != last.content.rstrip():
        path = f"messages[{len(request.messages) - 1}].content"
        raise invalid_request("An answer to continue cannot end with whitespace.", path)
    if request.thinking is not None and request.thinking.type == "enabled":
        raise invalid_request("An answer to continue has no thinking before it.", "thinking")
    chat.continue_final_message = True


def _choose(chat: pb.Chat, choice: AnthropicToolChoice) -> None:
    if (choice.name is not None) != (choice.type == "tool"):
        raise invalid_request("A name goes with type tool, and with no other.", "tool_choice.name")
    chat.tool_choice.mode = _MODES[choice.type]
    if choice.name is not None:
        chat.tool_choice.name = choice.name
    if choice.disable_parallel_tool_use:
        chat.parallel_tool_calls = False


def _text(content: str | list[AnthropicText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _messages(message: AnthropicMessage, path: str) -> list[pb.ChatMessage]:
    """One message as the contract's: results of tools are messages of their own there, before the user's text."""
    if isinstance(message.content, str):
        return [pb.ChatMessage(role=message.role, content=message.content)]
    results: list[pb.ChatMessage] = []
    own = pb.ChatMessage(role=message.role)
    # Joined once: a field of a message is copied whole whenever it grows.
    said: list[str] = []
    thought: list[str] = []
    for index, block in enumerate(message.content):
        if isinstance(block, AnthropicToolResult) != (message.role == "user") and not isinstance(
            block, AnthropicText
        ):
            raise invalid_request(
                f"A {message.role}'s message has no {block.type}.",
                f"{path}.content[{index}].type",
            )
        match block:
            case AnthropicText():
                said.append(block.text)
            case AnthropicThinking():
                thought.append(block.thinking)
            case AnthropicToolUse():
                own.tool_calls.add(
                    id=block.id, name=block.name, arguments=encode(block.input).decode()
                )
            case AnthropicToolResult():
                text = _text(block.content or "")
                results.append(
                    pb.ChatMessage(
                        role="tool",
                        content=f"Error: {text}" if block.is_error else text,
                        tool_call_id=block.tool_use_id,
                    )
                )
    if any(said):
        own.content = "".join(said)
    if any(thought):
        own.reasoning = "".join(thought)
    has_own = any(said) or any(thought) or bool(own.tool_calls) or not results
    return [*results, own] if has_own else results


class _Answer:
    """What both forms of the answer are made of."""

    def __init__(self, generation_id: str) -> None:
        self._id = generation_id
        self._model = ""
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0

    def started(self, started: pb.Started) -> None:
        """Takes what the worker said of the request."""
        self._model = started.model
        self._prompt_tokens = started.prompt_tokens
        self._cached_tokens = started.cached_tokens

    def finished(self, finished: pb.Finished) -> tuple[str, str | None]:
        """The stop reason and stop sequence of a successful end; raises for any other."""
        reason = _STOP_REASONS.get(finished.finish_reason)
        if reason is None:
            raise from_finish(finished.finish_reason) or server_error()
        usage = finished.usage
        self._cached_tokens = usage.cached_tokens
        self._completion_tokens = usage.completion_tokens
        return reason, finished.stop_sequence if reason == "stop_sequence" else None

    def message(
        self, content: list[dict[str, Any]], reason: str | None, sequence: str | None
    ) -> dict[str, Any]:
        """The message object."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, int]:
        """The usage object."""
        return {
            "input_tokens": self._prompt_tokens - self._cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._cached_tokens,
            "output_tokens": self._completion_tokens,
        }


# The kinds of block, as they begin, and the field of a delta that has more of one.
_EMPTY_BLOCKS: Final[dict[str, dict[str, Any]]] = {
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
    "text": {"type": "text", "text": ""},
}
_DELTA_FIELDS: Final = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}


class AnthropicEncoder(StreamEncoder):
    """Messages to Anthropic's events: blocks one after the other, each between its start and its stop."""

    def __init__(self, generation_id: str) -> None:
        self._answer = _Answer(generation_id)
        self._id = generation_id
        self._index = -1  # of the open block, or the last one
        self._open: str | None = None  # its kind

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:  # noqa: ARG002
        """The events of one message."""
        match message.WhichOneof("event"):
            case "delta":
                return self._delta(message.delta)
            case "finished":
                return self._finished(message.finished)
            case "started":
                self._answer.started(message.started)
                start = self._answer.message([], None, None)
                return _event("message_start", message=start) + _event("ping")
            case _:
                return b""

    def end(self) -> bytes:
        """The last event."""
        return _event("message_stop")

    def error(self, error: EdgeError) -> bytes:
        """The event of a failure."""
        status = _OVERLOADED if error.status == 429 else error.status
        return b"event: error\ndata: " + _error(error, status, self._id) + b"\n\n"

    def _delta(self, delta: pb.Delta) -> bytes:
        events = []
        if delta.reasoning:
            events += [self._enter("thinking"), self._more(delta.reasoning)]
        if delta.text:
            events += [self._enter("text"), self._more(delta.text)]
        for call in delta.tool_calls:
            if call.HasField("name"):
                block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
                events += [self._close(), self._begin("tool_use", block)]
            if call.arguments:
                events.append(self._more(call.arguments))
        return b"".join(events)

    def _finished(self, finished: pb.Finished) -> bytes:
        reason, sequence = self._answer.finished(finished)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return self._close() + _event("message_delta", delta=delta, usage=self._answer.usage())

    def _enter(self, kind: str) -> bytes:
        if self._open == kind:
            return b""
        return self._close() + self._begin(kind, _EMPTY_BLOCKS[kind])

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        self._index += 1
        self._open = kind
        return _event("content_block_start", index=self._index, content_block=block)

    def _more(self, text: str) -> bytes:
        kind, name = _DELTA_FIELDS[self._open or "text"]
        delta = {"type": kind, name: text}
        return _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", index=self._index)


class AnthropicCollector:
    """Messages to one answer."""

    def __init__(self, generation_id: str) -> None:
        self._answer = _Answer(generation_id)
        self._thinking: list[str] = []
        self._text: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, arguments
        self._end: tuple[str, str | None] = ("end_turn", None)

    def add(self, prompt: int, message: pb.GenerateResponse) -> None:  # noqa: ARG002
        """Takes one message."""
        match message.WhichOneof("event"):
            case "started":
                self._answer.started(message.started)
            case "delta":
                self._thinking.append(message.delta.reasoning)
                self._text.append(message.delta.text)
                for call in message.delta.tool_calls:
                    if call.HasField("name"):
                        self._calls.append((call.id, call.name, []))
                    self._calls[call.index][2].append(call.arguments)
            case "finished":
                self._end = self._answer.finished(message.finished)
            case _:
                pass

    def body(self) -> bytes:
        """The whole answer."""
        content: list[dict[str, Any]] = []
        if thinking := "".join(self._thinking):
            content.append(_EMPTY_BLOCKS["thinking"] | {"thinking": thinking})
        if text := "".join(self._text):
            content.append(_EMPTY_BLOCKS["text"] | {"text": text})
        for call_id, name, arguments in self._calls:
            given = _arguments("".join(arguments))
            content.append({"type": "tool_use", "id": call_id, "name": name, "input": given})
        return encode(self._answer.message(content, *self._end))


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call; empty where max_tokens cut them, since this form has no place for a part of them."""
    try:
        given = decode(text.encode())
    except ValueError:
        return {}
    return given if isinstance(given, dict) else {}


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + encode({"type": kind, **fields}) + b"\n\n"
