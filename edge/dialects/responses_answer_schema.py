"""What /v1/responses answers, for the OpenAPI document."""

from typing import Any, Literal

from pydantic import Field

from edge.dialects.constraint import JsonObjectFormat, TextFormat
from edge.dialects.responses_schema import (
    ItemStatus,
    ResponsesJsonSchema,
    ResponsesReasoning,
    ResponsesTool,
    ResponsesToolChoice,
)
from edge.response_schema import ErrorDetail, ResponseModel


class ResponsesCandidate(ResponseModel):
    """A token that could stand at one position."""

    token: str
    logprob: float
    bytes: list[int]


class ResponsesLogprob(ResponsesCandidate):
    """A token of the answer. There are some only if they were included."""

    top_logprobs: list[ResponsesCandidate]


class ResponsesTextOut(ResponseModel):
    """Text of the answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field(max_length=0)
    logprobs: list[ResponsesLogprob]


class ResponsesReasoningOut(ResponseModel):
    """Text of the reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ResponsesMessageItem(ResponseModel):
    """The answer."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[ResponsesTextOut]


class ResponsesThought(ResponseModel):
    """What the model thought before it answered."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any] = Field(max_length=0)
    content: list[ResponsesReasoningOut]


class ResponsesCall(ResponseModel):
    """A call of a function."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str = Field(description="JSON, unless max_output_tokens cut it.")


class ResponsesInputDetails(ResponseModel):
    """More about the prompt."""

    cached_tokens: int
    cache_write_tokens: Literal[0]


class ResponsesOutputDetails(ResponseModel):
    """More about the answer."""

    reasoning_tokens: int = Field(description="Tokens up to the end of the reasoning.")


class ResponsesUsage(ResponseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: ResponsesInputDetails
    output_tokens: int
    output_tokens_details: ResponsesOutputDetails
    total_tokens: int


class ResponsesFailure(ResponseModel):
    """Why a response failed."""

    code: Literal["server_error", "rate_limit_exceeded"]
    message: str


class ResponsesIncomplete(ResponseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponsesTextConfig(ResponseModel):
    """What the text is."""

    format: TextFormat | JsonObjectFormat | ResponsesJsonSchema


class ResponsesAnswer(ResponseModel):
    """The response; also, as far as it is known, in the events that tell of all of it."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: ResponsesFailure | None
    incomplete_details: ResponsesIncomplete | None
    model: str
    output: list[ResponsesThought | ResponsesMessageItem | ResponsesCall]
    temperature: float
    top_p: float
    usage: ResponsesUsage | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ResponsesReasoning
    store: bool = Field(description="Whether it may be retrieved, for the resume window.")
    text: ResponsesTextConfig
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice
    tools: list[ResponsesTool]
    top_logprobs: int
    truncation: Literal["auto", "disabled"]


class ResponsesEvent(ResponseModel):
    """What every event has."""

    sequence_number: int = Field(description="From 0, without gaps.")


class ResponsesWhole(ResponsesEvent):
    """The response begins, or has ended."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponsesAnswer


class ResponsesItemEvent(ResponsesEvent):
    """An item begins, or is over."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: ResponsesThought | ResponsesMessageItem | ResponsesCall


class ResponsesPlaceEvent(ResponsesEvent):
    """What every event of an item's text has."""

    item_id: str
    output_index: int


class ResponsesPartEvent(ResponsesPlaceEvent):
    """A content part begins, or is over."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0]
    part: ResponsesTextOut | ResponsesReasoningOut


class ResponsesTextDelta(ResponsesPlaceEvent):
    """More of the answer."""

    type: Literal["response.output_text.delta"]
    content_index: Literal[0]
    delta: str
    logprobs: list[ResponsesLogprob]


class ResponsesTextDone(ResponsesPlaceEvent):
    """All of the answer."""

    type: Literal["response.output_text.done"]
    content_index: Literal[0]
    text: str
    logprobs: list[ResponsesLogprob]


class ResponsesReasoningDelta(ResponsesPlaceEvent):
    """More of the reasoning."""

    type: Literal["response.reasoning_text.delta"]
    content_index: Literal[0]
    delta: str


class ResponsesReasoningDone(ResponsesPlaceEvent):
    """All of the reasoning."""

    type: Literal["response.reasoning_text.done"]
    content_index: Literal[0]
    text: str


class ResponsesArgumentsDelta(ResponsesPlaceEvent):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ResponsesArgumentsDone(ResponsesPlaceEvent):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ResponsesErrorEvent(ResponsesEvent):
    """A failure, after `response.failed`."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None
    error: ErrorDetail


class ResponsesCancelled(ResponseModel):
    """What a cancel did."""

    id: str
    object: Literal["response"]
    status: Literal["cancelled"]


class ResponsesDeleted(ResponseModel):
    """What a deletion did."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


EVENTS: dict[str, type[ResponseModel]] = {
    "response.created": ResponsesWhole,
    "response.in_progress": ResponsesWhole,
    "response.output_item.added": ResponsesItemEvent,
    "response.content_part.added": ResponsesPartEvent,
    "response.reasoning_text.delta": ResponsesReasoningDelta,
    "response.reasoning_text.done": ResponsesReasoningDone,
    "response.output_text.delta": ResponsesTextDelta,
    "response.output_text.done": ResponsesTextDone,
    "response.function_call_arguments.delta": ResponsesArgumentsDelta,
    "response.function_call_arguments.done": ResponsesArgumentsDone,
    "response.content_part.done": ResponsesPartEvent,
    "response.output_item.done": ResponsesItemEvent,
    "response.completed": ResponsesWhole,
    "response.incomplete": ResponsesWhole,
    "response.failed": ResponsesWhole,
    "error": ResponsesErrorEvent,
}
