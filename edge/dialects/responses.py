"""OpenAI's POST /v1/responses."""

import uuid
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Final

from edge.dialects.common import field_names, shown_float
from edge.dialects.constraint import JsonObjectFormat, of_schema
from edge.dialects.dialect import ParsedRequest, PromptLimits, StreamEncoder
from edge.dialects.openai_schema import TOOL_CHOICE_MODES
from edge.dialects.openai_wire import finish_reason
from edge.dialects.responses_input import Conversation
from edge.dialects.responses_output import COMPLETED, IN_PROGRESS, INCOMPLETE, Event, Output
from edge.dialects.responses_schema import (
    ResponsesJsonSchema,
    ResponsesRequest,
    ResponsesToolChoice,
)
from edge.dialects.schema import validate
from edge.errors import EdgeError
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb

_CANCELLED: Final = 499  # the status of a generation that was aborted from elsewhere


def parse(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    """A request in the contract's words."""
    request = validate(ResponsesRequest, body)
    response_id = f"resp_{uuid.uuid4().hex}"
    conversation = Conversation(request.instructions, request.input)
    message = pb.GenerateRequest(
        request_id=response_id,
        model=request.model,
        prompt=pb.Prompt(chat=_chat(request, conversation)),
        sampling=request.sampling(),
        stopping=request.stopping(request.max_output_tokens),
        constraint=_constraint(request),
    )
    echo = _echo(request)
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
                "constraint": "text.format",
                "constraint.json_schema": "text.format.schema",
            }
        ),
    )


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
    if request.reasoning is not None and request.reasoning.effort is not None:
        effort = request.reasoning.effort
        # the first is what Qwen 3 and its like read, the second what gpt-oss does
        chat.template_arguments["enable_thinking"] = effort != "none"
        chat.template_arguments["reasoning_effort"] = effort
    return chat


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
        "previous_response_id": None,
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": None if reasoning is None else reasoning.summary,
        },
        "store": False,
        "text": {
            "format": {"type": "text"}
            if given is None
            else given.model_dump(by_alias=True, exclude_none=True)
        },
        "tool_choice": choice.model_dump()
        if isinstance(choice, ResponsesToolChoice)
        else choice or "auto",
        "tools": [tool.model_dump() for tool in request.tools or []],
        "truncation": "disabled",
    }


class _Response:
    """The response object, as far as it is known."""

    def __init__(self, response_id: str, echo: dict[str, Any]) -> None:
        self._id = response_id
        self._echo = echo
        self._started = pb.Started()
        self._usage: dict[str, Any] | None = None
        self.output = Output(response_id)
        self.status = IN_PROGRESS
        self._error: dict[str, str] | None = None

    @property
    def is_started(self) -> bool:
        """Whether the worker has admitted the request."""
        return bool(self._started.request_id)

    def start(self, started: pb.Started) -> None:
        """Takes what the worker said of the request."""
        self._started = started

    def finish(self, finished: pb.Finished) -> list[Event]:
        """The events of the output's end; raises where that is no success."""
        is_cut = finish_reason(finished) == "length"
        self.status = INCOMPLETE if is_cut else COMPLETED
        usage = finished.usage
        self._usage = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.output.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        return self.output.end(self.status)

    def fail(self, error: EdgeError) -> None:
        """Takes the reason why nothing more comes."""
        self.output.break_off()
        self.status = "cancelled" if error.status == _CANCELLED else "failed"
        # the closest of OpenAI's codes
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._error = {"code": code, "message": error.message}

    def as_json(self) -> dict[str, Any]:
        """The object."""
        is_cut = self.status == INCOMPLETE
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._started.created_at.seconds,
            "status": self.status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._started.model,
            "output": self.output.as_json(),
            "temperature": shown_float(self._started.sampling.temperature),
            "top_p": shown_float(self._started.sampling.top_p),
            "usage": self._usage,
            **self._echo,
        }


class ResponsesEncoder(StreamEncoder):
    """Messages to OpenAI's typed events."""

    def __init__(self, response_id: str, echo: dict[str, Any]) -> None:
        self._response = _Response(response_id, echo)
        self._sequence_number = 0

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:  # noqa: ARG002
        """The events of one message."""
        match message.WhichOneof("event"):
            case "delta":
                return self._events(self._response.output.take(message.delta))
            case "finished":
                return self._events(self._response.finish(message.finished))
            case "started":
                self._response.start(message.started)
                return self._events([self._whole("created"), self._whole(IN_PROGRESS)])
            case _:
                return b""

    def end(self) -> bytes:
        """The last event."""
        return self._events([self._whole(self._response.status)])

    def error(self, error: EdgeError) -> bytes:
        """The events of a failure.

        The second one makes OpenAI's SDKs raise, which read the first like any other; no response can fail that was
        not created before.
        """
        events = []
        if self._response.is_started:
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
            parts.append(f"event: {event['type']}\ndata: ".encode() + encode(numbered) + b"\n\n")
        return b"".join(parts)


class ResponsesCollector:
    """Messages to one response."""

    def __init__(self, response_id: str, echo: dict[str, Any]) -> None:
        self._response = _Response(response_id, echo)

    def add(self, prompt: int, message: pb.GenerateResponse) -> None:  # noqa: ARG002
        """Takes one message."""
        match message.WhichOneof("event"):
            case "delta":
                self._response.output.take(message.delta)
            case "finished":
                self._response.finish(message.finished)
            case "started":
                self._response.start(message.started)
            case _:
                pass

    def body(self) -> bytes:
        """The whole answer."""
        return encode(self._response.as_json())
