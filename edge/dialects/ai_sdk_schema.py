"""Bodies of the routes under /api, as the Vercel AI SDK sends them, and the events it is sent."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from edge.dialects.common import MAX_WINDOW_SECONDS, WhileUnread
from edge.dialects.schema import Float, Int64, Items, RequestModel, SomeItems, Uint32
from edge.response_schema import ResponseModel


class AiSdkModel(RequestModel):
    """A body, or a part of one. Fields beyond those named here are the application's own and have no effect.

    useChat's `body` carries whatever the application puts there, and later versions of the SDK put more into parts.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, alias_generator=to_camel)


class AiSdkPart(AiSdkModel):
    """A part of a message, of any type; which fields it has is its type's affair."""

    type: str = Field(
        max_length=256,
        description="text, reasoning, tool-NAME and dynamic-tool are told to the model. step-start, source-url,"
        " source-document and data-NAME are for the page alone. Others are refused.",
    )
    text: str | None = Field(None, description="Of text and reasoning.")
    tool_call_id: str | None = Field(None, max_length=256, description="Of a tool's part.")
    tool_name: str | None = Field(None, max_length=128, description="Of a dynamic-tool.")
    state: str | None = Field(None, max_length=64, description="How far a tool's part has come.")
    input: Any = Field(None, description="What the tool was called with.")
    output: Any = Field(None, description="What the tool gave.")
    error_text: str | None = Field(None, description="Why the tool gave nothing.")
    approval: dict[str, Any] | None = Field(None, description="Whether the user let it run.")


class AiSdkMessage(AiSdkModel):
    """A UIMessage."""

    id: str | None = None
    role: Literal["system", "user", "assistant"]
    parts: Items[AiSdkPart]


class AiSdkTool(AiSdkModel):
    """A function that the model may call."""

    description: str | None = None
    input_schema: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")
    parameters: dict[str, Any] | None = Field(None, description="Another name of inputSchema.")


class AiSdkNamedTool(AiSdkModel):
    """The tool that is to be called."""

    type: Literal["tool"]
    tool_name: str


class AiSdkSettings(AiSdkModel):
    """What streamText calls its settings, from the `body` of useChat or useCompletion."""

    model: str | None = Field(
        None, max_length=1024, description="The served model or one of its aliases."
    )
    system: str | None = Field(None, description="The system prompt.")
    max_output_tokens: Annotated[int, Field(ge=1, le=2**32 - 1)] | None = None
    temperature: Float | None = Field(None, description="0 is greedy.")
    top_p: Float | None = None
    top_k: Uint32 | None = Field(None, description="0 keeps all.")
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    stop_sequences: Items[str] | None = None
    seed: Int64 | None = None
    tools: Annotated[dict[str, AiSdkTool], Field(fail_fast=True)] | None = Field(
        None, description="By name."
    )
    tool_choice: Literal["auto", "none", "required"] | AiSdkNamedTool | None = None
    send_usage: bool | None = Field(
        None, description="Send token counts in the message's metadata, under usage."
    )


class AiSdkChatRequest(AiSdkSettings):
    """Body of POST /api/chat."""

    id: str | None = Field(
        None,
        max_length=1024,
        description="The chat's id, by which GET /api/chat/{id}/stream finds the answer.",
    )
    resume_window: Annotated[Float, Field(ge=0, le=MAX_WINDOW_SECONDS)] | None = Field(
        None,
        description="Seconds for which a page that has lost the answer may come back for it: after it went away, and"
        " after its end. 0 is not at all. When left out, what the server is set to.",
    )
    while_unread: WhileUnread | None = Field(
        None,
        description="What becomes of the generation once the page has gone, also by stop(): park, the default, stops it"
        " and frees its memory at once, and it goes on when the page comes back; continue lets it go on.",
    )
    messages: SomeItems[AiSdkMessage]
    trigger: str | None = Field(None, max_length=64, description="No effect.")
    message_id: str | None = Field(None, max_length=1024, description="No effect.")


class AiSdkCompletionRequest(AiSdkSettings):
    """Body of POST /api/completion."""

    prompt: str = Field(description="What the user says.")


class AiSdkTextRequest(AiSdkSettings):
    """Body of POST /api/text: a chat's messages or a completion's prompt, exactly one of them."""

    id: str | None = Field(None, max_length=1024, description="The chat's id.")
    messages: SomeItems[AiSdkMessage] | None = None
    prompt: str | None = None
    trigger: str | None = Field(None, max_length=64, description="No effect.")
    message_id: str | None = Field(None, max_length=1024, description="No effect.")


class UiMessageChunk(ResponseModel):
    """One event of a UI message stream.

    They come in this order: start, start-step, then reasoning-start, reasoning-delta and reasoning-end, text-start,
    text-delta and text-end, tool-input-start, tool-input-delta and tool-input-available (or -error) as the model writes
    them, finish-step, finish. An error may come instead of any of them and is the last.
    """

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)

    type: str
    id: str | None = None
    delta: str | None = None
    message_id: str | None = None
    message_metadata: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length", "tool-calls"] | None = None
    tool_call_id: str | None = None
    tool_name: str | None = None
    input_text_delta: str | None = None
    input: Any = None
    error_text: str | None = None
