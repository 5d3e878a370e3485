"""What the edge answers, for the OpenAPI document. Encoders build the same shapes by hand, since they are hot."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class ResponseModel(BaseModel):
    """A body, or a part of one, that the edge sends."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(ResponseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(ResponseModel):
    """Every failure, on every route; also the data of an error event."""

    error: ErrorDetail


class PromptTokensDetails(ResponseModel):
    """More about the prompt."""

    cached_tokens: int


class CompletionUsage(ResponseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatCandidate(ResponseModel):
    """A token that could stand at one position."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChatTokenLogprob(ChatCandidate):
    """A token and the candidates besides it."""

    top_logprobs: list[ChatCandidate]


class ChatLogprobs(ResponseModel):
    """Log-probabilities of a chat choice."""

    content: list[ChatTokenLogprob]
    refusal: None


class ChatFunctionCall(ResponseModel):
    """A function and its arguments, JSON text unless max_tokens cut it."""

    name: str
    arguments: str


class ChatToolCallOut(ResponseModel):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: ChatFunctionCall


class ChatAnswer(ResponseModel):
    """The message of a choice."""

    role: Literal["assistant"]
    content: str | None = Field(description="Null where there are calls and no text.")
    refusal: None
    reasoning_content: str = Field("", description="Where the model marks its reasoning.")
    tool_calls: list[ChatToolCallOut] = Field(default_factory=list)


class ChatChoice(ResponseModel):
    """A whole choice."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(ResponseModel):
    """An unstreamed chat answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChatFunctionPiece(ResponseModel):
    """More of a call's arguments; the first piece has the name."""

    name: str | None = None
    arguments: str


class ChatToolCallPiece(ResponseModel):
    """More of a call; the first piece has its id and type."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: ChatFunctionPiece


class ChatDelta(ResponseModel):
    """What a chunk adds; the role comes once, the content any number of times."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ChatToolCallPiece] | None = None


class ChatChunkChoice(ResponseModel):
    """A part of a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletionChunk(ResponseModel):
    """The data of one event of a streamed chat answer. `data: [DONE]` is the last event."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None


class CompletionLogprobs(ResponseModel):
    """Four lists of one length, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """A choice, or a part of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class Completion(ResponseModel):
    """An unstreamed completion, and the data of one event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


class ModelObject(ResponseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str = Field(description="The model's own name, also where `id` is an alias.")
    aliases: list[str]
    max_model_len: int = Field(description="Most tokens of prompt and completion together.")
    kv_cache_bytes: int = Field(description="Memory of the whole KV cache; 0 if not known.")
    kv_bytes_per_token: int = Field(
        description="Memory of one token in the KV cache; 0 if not known."
    )


class ModelList(ResponseModel):
    """All served models; there is one."""

    object: Literal["list"]
    data: list[ModelObject]


class StreamStarted(ResponseModel):
    """Data of a `started` event."""

    request_id: str
    model: str
    created: int
    prompt_tokens: int
    cached_tokens: int
    queue_position: int
    max_tokens: int
    n: int
    sampling: dict[str, float]


class StreamCandidate(ResponseModel):
    """A token that could stand at one position."""

    token_id: int
    token: str
    bytes: list[int]
    logprob: float | None


class StreamTokenLogprob(StreamCandidate):
    """A token and the candidates besides it."""

    top: list[StreamCandidate]


class StreamToolCall(ResponseModel):
    """More of a call's arguments; the first piece has its id and name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str


class StreamDelta(ResponseModel):
    """Data of a `delta` event."""

    choice_index: int
    text: str
    token_count: int
    is_prompt: bool = False
    reasoning: str = Field("", description="Where the model marks its reasoning.")
    tool_calls: list[StreamToolCall] = Field(default_factory=list)
    token_ids: list[int] | None = None
    logprobs: list[StreamTokenLogprob] | None = None


class StreamUsage(ResponseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class StreamFinished(ResponseModel):
    """Data of a `finished` event. The last one has usage and timings."""

    choice_index: int
    finish_reason: Literal[
        "stop",
        "stop_sequence",
        "length",
        "cancelled",
        "deadline",
        "shutdown",
        "preempted",
        "slow_reader",
        "tool_calls",
    ]
    stop_sequence: str | None = None
    stop_token_id: int | None = None
    usage: StreamUsage | None = None
    timings: dict[str, float] | None = None


class Aborted(ResponseModel):
    """What DELETE found."""

    request_id: str
    outcome: Literal["aborted", "already_finished"]


class AccessToken(ResponseModel):
    """A token that stands for an API key."""

    access_token: str
    token_type: Literal["Bearer"]
    expires_in: int = Field(description="Seconds.")


class Health(ResponseModel):
    """The process runs."""

    status: Literal["ok"]


class Readiness(ResponseModel):
    """Whether requests can be answered."""

    status: Literal["ready", "not_ready"]
    reason: str | None


class AnyObject(ResponseModel):
    """A JSON object."""

    model_config = ConfigDict(extra="allow")

    openapi: str
    paths: dict[str, Any]
