"""Bodies of POST /v1/messages and /v1/messages/count_tokens, as Anthropic documents them."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edge.dialects.schema import Float, Items, OnlyFalse, RequestModel, SomeItems, Uint32
from edge.response_schema import ResponseModel


class AnthropicBlockModel(RequestModel):
    """A content block. Blocks of an answer are sent back as they came, with fields of later versions that are null."""

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_nulls(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {
            name: field
            for name, field in value.items()
            if field is not None or name in cls.model_fields
        }


class AnthropicText(AnthropicBlockModel):
    """Text in a message."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = Field(None, description="No effect: all is cached.")
    citations: None = None


class AnthropicThinking(AnthropicBlockModel):
    """The model's own thinking, sent back."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(None, description="Not looked at.")


class AnthropicToolUse(AnthropicBlockModel):
    """The model's own call of a tool, sent back."""

    type: Literal["tool_use"]
    id: str = Field(max_length=256)
    name: str = Field(min_length=1, max_length=128)
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = Field(None, description="No effect.")
    caller: dict[str, Any] | None = Field(None, description="Not looked at.")


class AnthropicToolResult(AnthropicBlockModel):
    """What a tool gave."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(max_length=256)
    content: str | Items[AnthropicText] | None = None
    is_error: bool | None = Field(None, description="Told to the model.")
    cache_control: dict[str, Any] | None = Field(None, description="No effect.")


AnthropicBlock = Annotated[
    AnthropicText | AnthropicThinking | AnthropicToolUse | AnthropicToolResult,
    Field(discriminator="type"),
]


class AnthropicMessage(RequestModel):
    """One message."""

    role: Literal["user", "assistant"]
    content: str | Items[AnthropicBlock]


class AnthropicTool(RequestModel):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: dict[str, Any] | None = Field(None, description="No effect.")
    strict: OnlyFalse | None = None
    eager_input_streaming: bool | None = Field(None, description="No effect: it always is.")


class AnthropicToolChoice(RequestModel):
    """Whether the model may, has to or must not call tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="With tool: which one.")
    disable_parallel_tool_use: bool | None = Field(None, description="At most one call.")


class AnthropicThinkingConfig(RequestModel):
    """Whether the model thinks is its own affair; its template may be told."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Uint32 | None = Field(None, description="No effect.")
    display: Literal["summarized", "omitted"] | None = Field(None, description="No effect.")


class AnthropicFields(RequestModel):
    """What both routes have."""

    model: str = Field(max_length=1024, description="The served model or one of its aliases.")
    messages: SomeItems[AnthropicMessage]
    system: str | Items[AnthropicText] | None = None
    tools: Items[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: AnthropicThinkingConfig | None = None


class AnthropicRequest(AnthropicFields):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=2**32 - 1)]
    stop_sequences: Items[str] | None = None
    stream: bool | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Uint32 | None = None
    metadata: dict[str, Any] | None = Field(None, description="No effect.")
    service_tier: str | None = Field(None, description="No effect.")
    inference_geo: str | None = Field(None, description="No effect.")
    container: None = None
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None
    context_management: None = None
    output_config: None = None
    output_format: None = None

    UNSUPPORTED = frozenset(
        {"container", "mcp_servers", "context_management", "output_config", "output_format"}
    )


class AnthropicUsage(ResponseModel):
    """Token counts."""

    input_tokens: int = Field(description="Of the prompt, without those found in the cache.")
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicTextOut(ResponseModel):
    """Text of the answer."""

    type: Literal["text"]
    text: str


class AnthropicThinkingOut(ResponseModel):
    """What the model thought before it answered."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class AnthropicToolUseOut(ResponseModel):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnthropicAnswer(ResponseModel):
    """The whole answer; also, without content, in `message_start`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnthropicThinkingOut | AnthropicTextOut | AnthropicToolUseOut]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: AnthropicUsage


class AnthropicMessageStart(ResponseModel):
    """The first event."""

    type: Literal["message_start"]
    message: AnthropicAnswer


class AnthropicBlockStart(ResponseModel):
    """A content block begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: AnthropicThinkingOut | AnthropicTextOut | AnthropicToolUseOut


class AnthropicBlockDelta(ResponseModel):
    """More of a content block."""

    type: Literal["content_block_delta"]
    index: int
    delta: dict[str, str]


class AnthropicBlockStop(ResponseModel):
    """A content block is over."""

    type: Literal["content_block_stop"]
    index: int


class AnthropicMessageDelta(ResponseModel):
    """Why the answer ended, and the counts."""

    type: Literal["message_delta"]
    delta: dict[str, str | None]
    usage: AnthropicUsage


class AnthropicMessageStop(ResponseModel):
    """The last event."""

    type: Literal["message_stop"]


class AnthropicPing(ResponseModel):
    """Nothing happened."""

    type: Literal["ping"]


class AnthropicErrorDetail(ResponseModel):
    """What went wrong."""

    type: str
    message: str
    code: str | None = Field(None, description="Of a refusal for want of room: why.")


class AnthropicError(ResponseModel):
    """Every failure; also the data of an `error` event."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


class AnthropicTokenCount(ResponseModel):
    """How long a prompt is."""

    input_tokens: int
