"""OpenAI's POST /v1/responses."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from edge.dialects.common import field_names, window_message
from edge.dialects.constraint import JsonObjectFormat, of_schema
from edge.dialects.dialect import ParsedRequest, PromptLimits, StreamEncoder
from edge.dialects.openai_schema import TOOL_CHOICE_MODES, tell_effort
from edge.dialects.responses_annotation import MAX_BYTES, Annotation
from edge.dialects.responses_input import Conversation
from edge.dialects.responses_output import IN_PROGRESS, Event
from edge.dialects.responses_schema import (
    LOGPROBS,
    ResponsesJsonSchema,
    ResponsesRequest,
    ResponsesToolChoice,
)
from edge.dialects.responses_state import ResponseState
from edge.dialects.schema import validate
from edge.errors import EdgeError, invalid_request
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb


def read(body: Mapping[str, Any]) -> ResponsesRequest:
    """The body. Raises a 400 for a bad one."""
    return validate(ResponsesRequest, body)


def parse(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:
    """A request in the contract's words, where nothing comes before it."""
    return build(read(body), limits)


def build(
    request: ResponsesRequest, limits: PromptLimits, before: Sequence[pb.ChatMessage] = ()
) -> ParsedRequest:
    """A request in the contract's words, which goes on with the conversation `before`."""
    response_id = f"resp_{uuid.uuid4().hex}"
    conversation = Conversation(request.instructions, request.input, before)
    message = pb.GenerateRequest(
        request_id=response_id,
        model=request.model,
        prompt=pb.Prompt(chat=_chat(request, conversation)),
        sampling=request.sampling(),
        stopping=request.stopping(request.max_output_tokens),
        output=_output(request),
        constraint=_constraint(request),
    )
    echo = _echo(request)
    if request.store is not False:
        _keep(message, echo, conversation, limits.resume_window_seconds)
    return ParsedRequest(
        response_id,
        [message],
        bool(request.stream),
        partial(ResponsesEncoder, response_id, echo),
        partial(ResponsesCollector, response_id, echo),
        field_names(
            {
                "prompt": "input",
                "prompt.chat": "input",
                "prompt.chat.messages": "input",
                **conversation.names,
                "prompt.chat.tools": "tools",
                "prompt.chat.tool_choice": "tool_choice",
                "prompt.chat.template_arguments": "reasoning",
                "stopping.max_tokens": "max_output_tokens",
                "stopping.stop_sequences": "stop",
                "output.logprobs": "top_logprobs",
                "constraint": "text.format",
                "constraint.json_schema": "text.format.schema",
            }
        ),
    )


def _keep(
    message: pb.GenerateRequest, echo: dict[str, Any], conversation: Conversation, window: float
) -> None:
    """Has the worker keep the response. One too large for that is not stored, and says so in its `store`."""
    annotation = Annotation(echo, conversation.without_instructions).pack()
    duration = window_message(window)
    if duration is not None and len(annotation) <= MAX_BYTES:
        message.resume_window.CopyFrom(duration)
        message.annotation = annotation


def _chat(request: ResponsesRequest, conversation: Conversation) -> pb.Chat:
    chat = pb.Chat(messages=conversation.messages)
    for tool in request.tools or []:
        parameters = None if tool.parameters is None else encode(tool.parameters).decode()
        chat.tools.add(name=tool.name, description=tool.description, parameters=parameters)
    choice = request.tool_choice
    if isinstance(choice, ResponsesToolChoice):
        chat.tool_choice.mode = pb.TOOL_CHOICE_MODE_REQUIRED
        chat.tool_choice.name = choice.name
    elif choice == "required" or (choice is not None and request.tools):
        chat.tool_choice.mode = TOOL_CHOICE_MODES[choice]
    if request.tools and request.parallel_tool_calls is not None:
        chat.parallel_tool_calls = request.parallel_tool_calls
    if request.reasoning is not None:
        tell_effort(chat, request.reasoning.effort)
    return chat


def _output(request: ResponsesRequest) -> pb.Output | None:
    if LOGPROBS in (request.include or []):
        return pb.Output(logprobs=request.top_logprobs or 0)
    if request.top_logprobs:
        raise invalid_request(f"top_logprobs needs include to have {LOGPROBS}.", "top_logprobs")
    return None


def _constraint(request: ResponsesRequest) -> pb.Constraint | None:
    wanted = None if request.text is None else request.text.format
    if isinstance(wanted, ResponsesJsonSchema):
        return of_schema(wanted.schema_)
    return of_schema({"type": "object"}) if isinstance(wanted, JsonObjectFormat) else None


def _echo(request: ResponsesRequest) -> dict[str, Any]:
    """What the response repeats of the request."""
    choice, wanted, reasoning = request.tool_choice, request.text, request.reasoning
    is_parallel = request.parallel_tool_calls is None or request.parallel_tool_calls
    given = None if wanted is None else wanted.format
    return {
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": is_parallel,
        "previous_response_id": request.previous_response_id,
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": None if reasoning is None else reasoning.summary,
        },
        "text": {
            "format": {"type": "text"}
            if given is None
            else given.model_dump(by_alias=True, exclude_none=True)
        },
        "tool_choice": choice.model_dump()
        if isinstance(choice, ResponsesToolChoice)
        else choice or "auto",
        "tools": [tool.model_dump() for tool in request.tools or []],
        "top_logprobs": request.top_logprobs or 0,
        "truncation": request.truncation or "disabled",
    }


class ResponsesEncoder(StreamEncoder):
    """Messages to OpenAI's typed events."""

    def __init__(self, response_id: str, echo: dict[str, Any], first: int = 0) -> None:
        """`first` is the sequence number of the first event that is sent: the same messages give the same events."""
        self._response = ResponseState(response_id, echo)
        self._sequence_number = 0
        self._first = first

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:  # noqa: ARG002
        """The events of one message."""
        events = self._response.add(message)
        if message.HasField("started"):
            events = [self._whole("created"), self._whole(IN_PROGRESS)]
        return self._events(events)

    def end(self) -> bytes:
        """The last event."""
        return self._events([self._whole(self._response.status)])

    def error(self, error: EdgeError) -> bytes:
        """The events of a failure: of the response, unless only this reader loses it.

        The second one makes OpenAI's SDKs raise, which read the first like any other; no response can fail that was
        not created before.
        """
        events = []
        goes_on = self._response.is_stored and (error.is_resumable or error.code == "taken_over")
        if self._response.is_started and not goes_on:
            self._response.fail(error)
            events.append(self._whole("failed"))
        told = error.body()["error"]
        flat = {"code": told["code"], "message": told["message"], "param": told["param"]}
        return self._events([*events, {"type": "error", **flat, "error": told}])

    def _whole(self, what: str) -> Event:
        return {"type": f"response.{what}", "response": self._response.as_json()}

    def _events(self, events: Iterable[Event]) -> bytes:
        parts = []
        for event in events:
            numbered = {**event, "sequence_number": self._sequence_number}
            self._sequence_number += 1
            if numbered["sequence_number"] >= self._first:
                parts.append(
                    f"event: {event['type']}\ndata: ".encode() + encode(numbered) + b"\n\n"
                )
        return b"".join(parts)


class ResponsesCollector:
    """Messages to one response."""

    def __init__(self, response_id: str, echo: dict[str, Any]) -> None:
        self._response = ResponseState(response_id, echo)

    def add(self, prompt: int, message: pb.GenerateResponse) -> None:  # noqa: ARG002
        """Takes one message."""
        self._response.add(message)

    def body(self) -> bytes:
        """The whole answer."""
        return encode(self._response.as_json())
