"""The Vercel AI SDK's /api/chat (useChat), /api/completion (useCompletion) and /api/text (plain text streams).

The UI message stream is specified at https://ai-sdk.dev/docs/ai-sdk-ui/stream-protocol, and by the SDK's own
uiMessageChunkSchema, which these events are of.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final

from starlette.responses import PlainTextResponse, Response

from edge.dialects.ai_sdk_messages import chat_messages
from edge.dialects.ai_sdk_schema import (
    AiSdkChatRequest,
    AiSdkCompletionRequest,
    AiSdkNamedTool,
    AiSdkSettings,
    AiSdkTextRequest,
)
from edge.dialects.common import WHILE_UNREAD, field_names, new_id, window_message
from edge.dialects.dialect import (
    Collector,
    Headers,
    ParsedRequest,
    PromptLimits,
    StreamEncoder,
    sse_data,
    stream_headers,
)
from edge.dialects.schema import Model, validate
from edge.errors import EdgeError, from_finish, invalid_request, server_error
from edge.json_codec import decode, encode
from protos.sluice.v1 import generation_pb2 as pb

_ID_PREFIX = "msg"
_FINISH_REASONS: Final = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_STOP_SEQUENCE: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool-calls",
}
_MODES: Final = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}
# An application's own fields have no effect; one that means a setting by another dialect's name must not be among them.
_OTHER_NAMES: Final = {
    "max_tokens": "maxOutputTokens",
    "maxTokens": "maxOutputTokens",
    "max_completion_tokens": "maxOutputTokens",
    "max_output_tokens": "maxOutputTokens",
    "top_p": "topP",
    "top_k": "topK",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
    "stop": "stopSequences",
    "stop_sequences": "stopSequences",
    "tool_choice": "toolChoice",
}
# An answer that is not, or no longer, kept.
_GONE: Final = "stream_gone"
_CUT_CALL: Final = "The answer ended before the tool's input did."


def parse_chat(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:
    """A useChat request in the contract's words."""
    request = _validate(AiSdkChatRequest, body)
    is_continued = request.messages[-1].role == "assistant"
    generation_id = new_id(_ID_PREFIX)
    # An answer that goes on after a tool's result stays the message that it is, whose id the client keeps.
    message_id = None if is_continued else generation_id
    encoder = partial(UiMessageEncoder, message_id, bool(request.send_usage))
    messages = chat_messages(request.messages, "messages")
    parsed = _parsed(generation_id, request, messages, "messages", encoder)
    seconds = request.resume_window
    window = window_message(limits.resume_window_seconds if seconds is None else seconds)
    if request.id and window is not None:
        told = parsed.requests[0]
        told.resume_window.CopyFrom(window)
        told.resume_tag = _tag(request.id)
        told.while_unread = WHILE_UNREAD[request.while_unread or "park"]
        told.annotation = encode([message_id, bool(request.send_usage)])
    elif request.while_unread is not None:
        raise invalid_request("whileUnread goes with an id and a resumeWindow.", "whileUnread")
    return parsed


def resume_chat(chat_id: str) -> ParsedRequest:
    """The chat's latest answer from its beginning, in the contract's words."""
    request = pb.GenerateRequest(resume=pb.Resume(resume_tag=_tag(chat_id)))
    encoder = partial(UiMessageEncoder, None, False)  # until the header says what it was
    return ParsedRequest(new_id("resume"), [request], True, encoder, _never, lambda _: "id")


def refuse_resume(error: EdgeError, request_id: str = "") -> Response:
    """As `refuse`, but for a chat that has no answer to give, of which the SDK hears by a 204."""
    return Response(status_code=204) if error.code == _GONE else refuse(error, request_id)


def _tag(chat_id: str) -> str:
    """What the worker is to know a chat's latest answer by: of a length that it takes, whatever the client's id is."""
    return "chat:" + hashlib.sha256(chat_id.encode()).hexdigest()


def parse_completion(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    """A useCompletion request in the contract's words."""
    request = _validate(AiSdkCompletionRequest, body)
    generation_id = new_id(_ID_PREFIX)
    encoder = partial(UiMessageEncoder, generation_id, bool(request.send_usage))
    messages = [pb.ChatMessage(role="user", content=request.prompt)]
    return _parsed(generation_id, request, messages, "prompt", encoder)


def parse_text(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    """A request of useChat or useCompletion for a plain text stream, in the contract's words."""
    request = _validate(AiSdkTextRequest, body)
    if (request.messages is None) == (request.prompt is None):
        field = "messages" if request.messages is None else "prompt"
        raise invalid_request("Give exactly one of messages and prompt.", field)
    if request.tools:
        raise invalid_request("A text stream has no place for calls of tools.", "tools")
    if request.messages is not None:
        name, messages = "messages", chat_messages(request.messages, "messages")
    else:
        name, messages = "prompt", [pb.ChatMessage(role="user", content=request.prompt or "")]
    return _parsed(new_id(_ID_PREFIX), request, messages, name, PlainTextEncoder)


def refuse(error: EdgeError, request_id: str = "") -> Response:  # noqa: ARG001
    """A failure before the 200: its words alone, since the SDK shows the whole body as the error's message."""
    return PlainTextResponse(error.message, status_code=error.status, headers=error.http_headers())


def _validate(model: type[Model], body: Mapping[str, Any]) -> Model:
    for name in _OTHER_NAMES.keys() & body.keys():
        raise invalid_request(f"{name} is called {_OTHER_NAMES[name]} here.", name, "unknown_field")
    return validate(model, body)


def _parsed(
    generation_id: str,
    request: AiSdkSettings,
    messages: Sequence[pb.ChatMessage],
    name: str,
    encoder: Any,
) -> ParsedRequest:
    message = pb.GenerateRequest(
        request_id=generation_id,
        model=request.model,
        prompt=pb.Prompt(chat=_chat(request, messages)),
        sampling=pb.Sampling(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k or None,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=request.seed,
        ),
        stopping=pb.Stopping(
            max_tokens=request.max_output_tokens, stop_sequences=request.stop_sequences or []
        ),
    )
    names = field_names(
        {
            "prompt": name,
            "prompt.chat": name,
            "prompt.chat.messages": name,
            "prompt.chat.tools": "tools",
            "prompt.chat.tool_choice": "toolChoice",
            "sampling.top_p": "topP",
            "sampling.top_k": "topK",
            "sampling.presence_penalty": "presencePenalty",
            "sampling.frequency_penalty": "frequencyPenalty",
            "stopping.max_tokens": "maxOutputTokens",
            "stopping.stop_sequences": "stopSequences",
        }
    )
    return ParsedRequest(generation_id, [message], True, encoder, _never, names)


def _never() -> Collector:
    raise AssertionError("these routes always stream")


def _chat(request: AiSdkSettings, messages: Sequence[pb.ChatMessage]) -> pb.Chat:
    chat = pb.Chat()
    if request.system is not None:
        chat.messages.add(role="system", content=request.system)
    chat.messages.extend(messages)
    for name, tool in (request.tools or {}).items():
        schema = tool.parameters if tool.input_schema is None else tool.input_schema
        text = None if schema is None else encode(schema).decode()
        chat.tools.add(name=name, description=tool.description, parameters=text)
    choice = request.tool_choice
    if isinstance(choice, AiSdkNamedTool):
        chat.tool_choice.mode = pb.TOOL_CHOICE_MODE_REQUIRED
        chat.tool_choice.name = choice.tool_name
    elif choice == "required" or (choice is not None and request.tools):
        chat.tool_choice.mode = _MODES[choice]
    return chat


def _finish_reason(finished: pb.Finished) -> str:
    """The name of a successful end; raises for any other."""
    reason = _FINISH_REASONS.get(finished.finish_reason)
    if reason is None:
        raise from_finish(finished.finish_reason) or server_error()
    return reason


class UiMessageEncoder(StreamEncoder):
    """Messages to a UI message stream: one step of one message, part after part."""

    headers: ClassVar[Headers] = [
        *stream_headers("text/event-stream; charset=utf-8"),
        (b"x-vercel-ai-ui-message-stream", b"v1"),
    ]
    is_cut_on_error = False  # the error is an event that no reader takes for anything else

    def __init__(self, message_id: str | None, sends_usage: bool) -> None:
        self._message_id = message_id
        self._sends_usage = sends_usage
        self._prompt_tokens = 0
        self._open: str | None = None  # the kind of the open part: text or reasoning
        self._parts = 0
        self._call: tuple[str, str, list[str]] | None = None  # id, name and input of the open call

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:  # noqa: ARG002
        """The events of one message."""
        match message.WhichOneof("event"):
            case "delta":
                return self._delta(message.delta)
            case "finished":
                return self._finished(message.finished)
            case "started":
                self._prompt_tokens = message.started.prompt_tokens
                if message.started.HasField("annotation"):  # an answer that is told again
                    self._message_id, self._sends_usage = decode(message.started.annotation)
                start = {} if self._message_id is None else {"messageId": self._message_id}
                return _event("start", **start) + _event("start-step")
            case _:
                return b""

    def end(self) -> bytes:
        """What stands for the end of a stream."""
        return sse_data(b"[DONE]")

    def error(self, error: EdgeError) -> bytes:
        """The event of a failure."""
        return _event("error", errorText=error.message)

    def _delta(self, delta: pb.Delta) -> bytes:
        events = []
        for kind, text in (("reasoning", delta.reasoning), ("text", delta.text)):
            if text:
                events += [self._enter(kind), _event(f"{kind}-delta", id=self._id(), delta=text)]
        for call in delta.tool_calls:
            if call.HasField("name"):
                events += [self._close(), _begin_call(call)]
                self._call = (call.id, call.name, [])
            if call.arguments and self._call is not None:
                self._call[2].append(call.arguments)
                more = {"toolCallId": self._call[0], "inputTextDelta": call.arguments}
                events.append(_event("tool-input-delta", **more))
        return b"".join(events)

    def _finished(self, finished: pb.Finished) -> bytes:
        reason = _finish_reason(finished)
        metadata = {}
        if self._sends_usage:
            usage = finished.usage
            counts = {
                "inputTokens": self._prompt_tokens,
                "outputTokens": usage.completion_tokens,
                "totalTokens": self._prompt_tokens + usage.completion_tokens,
                "cachedInputTokens": usage.cached_tokens,
            }
            metadata = {"messageMetadata": {"usage": counts}}
        end = _event("finish-step") + _event("finish", finishReason=reason, **metadata)
        return self._close() + end

    def _id(self) -> str:
        return f"part-{self._parts}"

    def _enter(self, kind: str) -> bytes:
        if self._open == kind:
            return b""
        closing = self._close()
        self._open = kind
        self._parts += 1
        return closing + _event(f"{kind}-start", id=self._id())

    def _close(self) -> bytes:
        """Ends the open part, or the open call, whose input is then whole."""
        if self._open is not None:
            kind, self._open = self._open, None
            return _event(f"{kind}-end", id=self._id())
        if self._call is None:
            return b""
        (call_id, name, pieces), self._call = self._call, None
        text = "".join(pieces)
        call = {"toolCallId": call_id, "toolName": name}
        given = _object(text)
        if given is None:
            return _event("tool-input-error", **call, input=text, errorText=_CUT_CALL)
        return _event("tool-input-available", **call, input=given)


class PlainTextEncoder(StreamEncoder):
    """Messages to their text and nothing else. A failure can only break the stream off."""

    headers: ClassVar[Headers] = stream_headers("text/plain; charset=utf-8")
    ping = b""

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:  # noqa: ARG002
        """The text of one message."""
        if message.HasField("finished"):
            _finish_reason(message.finished)
        return message.delta.text.encode()

    def end(self) -> bytes:
        """Nothing: the end of the body is the end."""
        return b""

    def error(self, error: EdgeError) -> bytes:  # noqa: ARG002
        """Nothing: any word would be taken for the model's."""
        return b""


def _begin_call(call: pb.ToolCallDelta) -> bytes:
    return _event("tool-input-start", toolCallId=call.id, toolName=call.name)


def _object(text: str) -> dict[str, Any] | None:
    """The arguments of a call; None where max_tokens cut them."""
    try:
        given = decode(text.encode()) if text else {}
    except ValueError:
        return None
    return given if isinstance(given, dict) else None


def _event(kind: str, **fields: Any) -> bytes:
    return sse_data(encode({"type": kind, **fields}))
