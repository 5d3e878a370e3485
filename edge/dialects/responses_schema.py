"""Body of POST /v1/responses, as OpenAI documents it."""

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from edge.dialects.constraint import JsonObjectFormat, NamedSchema, TextFormat
from edge.dialects.openai_schema import EFFORT_EFFECT, ReasoningEffort
from edge.dialects.schema import (
    Items,
    Nothing,
    OnlyFalse,
    RequestModel,
    SamplingFields,
    SomeItems,
    StoppingFields,
    Uint32,
)

# What may be included: the log-probabilities, and what belongs to tools and inputs that do not exist here.
LOGPROBS: Final = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]
ItemId = Annotated[str, Field(max_length=256)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ResponsesTextPart(RequestModel):
    """Text in a message, or in what a function gave."""

    type: Literal["input_text"]
    text: str


class ResponsesOutputText(RequestModel):
    """Text of an answer, sent back."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = Field(None, description="Not looked at.")
    logprobs: list[Any] | None = Field(None, description="Not looked at.")


ResponsesPart = Annotated[ResponsesTextPart | ResponsesOutputText, Field(discriminator="type")]


class ResponsesMessage(RequestModel):
    """One message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Items[ResponsesPart]
    id: ItemId | None = Field(None, description="Not looked at.")
    status: ItemStatus | None = Field(None, description="Not looked at.")
    phase: Literal["commentary", "final_answer"] | None = Field(None, description="No effect.")


class ResponsesFunctionCall(RequestModel):
    """The model's own call of a function, sent back."""

    type: Literal["function_call"]
    call_id: ItemId
    name: str = Field(min_length=1, max_length=128)
    arguments: str = Field(description="A JSON object, as JSON text.")
    id: ItemId | None = Field(None, description="Not looked at.")
    status: ItemStatus | None = Field(None, description="Not looked at.")


class ResponsesFunctionOutput(RequestModel):
    """What a function gave."""

    type: Literal["function_call_output"]
    call_id: ItemId
    output: str | Items[ResponsesTextPart]
    id: ItemId | None = Field(None, description="Not looked at.")
    status: ItemStatus | None = Field(None, description="Not looked at.")


class ResponsesSummaryPart(RequestModel):
    """A part of a summary of reasoning."""

    type: Literal["summary_text"]
    text: str


class ResponsesReasoningPart(RequestModel):
    """A part of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ResponsesReasoningItem(RequestModel):
    """The model's own reasoning, sent back."""

    type: Literal["reasoning"]
    summary: Items[ResponsesSummaryPart] = Field(description="Read where there is no content.")
    content: Items[ResponsesReasoningPart] | None = None
    encrypted_content: None = None
    id: ItemId | None = Field(None, description="Not looked at.")
    status: ItemStatus | None = Field(None, description="Not looked at.")


def _with_type(value: object) -> object:
    """A message may leave its type out."""
    if not isinstance(value, dict):
        return value
    if value.get("type") == "item_reference":
        raise PydanticCustomError(
            "item_reference",
            "nothing is stored that item_reference could mean; send the item itself, as clients do with store: false",
        )
    return {"type": "message", **value} if "role" in value and "type" not in value else value


ResponsesItem = Annotated[
    ResponsesMessage | ResponsesFunctionCall | ResponsesFunctionOutput | ResponsesReasoningItem,
    Field(discriminator="type"),
    BeforeValidator(_with_type),
]


class ResponsesTool(RequestModel):
    """A function that the model may call. There are no built-in tools."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments.")
    strict: bool | None = Field(
        None,
        description="No effect: arguments are held to the schema where tool_choice requires a call, strict or not.",
    )


class ResponsesToolChoice(RequestModel):
    """The function that is to be called."""

    type: Literal["function"]
    name: str


class ResponsesJsonSchema(NamedSchema):
    """JSON of a schema."""

    type: Literal["json_schema"]


class ResponsesText(RequestModel):
    """What the text of the answer is."""

    format: (
        Annotated[TextFormat | JsonObjectFormat | ResponsesJsonSchema, Field(discriminator="type")]
        | None
    ) = None
    verbosity: Literal["medium"] | None = None


class ResponsesReasoning(RequestModel):
    """How the model reasons is its own affair; its chat template may be told."""

    effort: ReasoningEffort | None = Field(None, description=EFFORT_EFFECT)
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="No effect: all of the reasoning is sent."
    )


class ResponsesStreamOptions(RequestModel):
    """What a stream carries besides."""

    include_obfuscation: OnlyFalse | None = None


class ResponsesRequest(SamplingFields, StoppingFields):
    """Body of POST /v1/responses."""

    input: str | SomeItems[ResponsesItem]
    model: str | None = Field(
        None, max_length=1024, description="The served model or one of its aliases."
    )
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: Uint32 | None = Field(None, description="Most tokens of the answer.")
    text: ResponsesText | None = None
    tools: Items[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    reasoning: ResponsesReasoning | None = None
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: ResponsesStreamOptions | None = None

    store: bool | None = Field(
        None,
        description="Keep the response for the resume window, to retrieve it, resume its stream and go on with it."
        " True when left out; the answer says whether it was done. False: it ends with its connection.",
    )
    previous_response_id: ItemId | None = Field(
        None,
        description="A kept response whose conversation, with its answer, comes before the input.",
    )

    include: Items[Includable] | None = Field(
        None,
        description="message.output_text.logprobs sends log-probabilities. The others have no effect: reasoning is sent"
        " as it is, and there is none of the rest.",
    )
    top_logprobs: Uint32 | None = Field(
        None,
        description="Likeliest candidates at each position; above 0 only with message.output_text.logprobs included.",
    )

    # Accepted, and without effect here.
    truncation: Literal["auto", "disabled"] | None = Field(
        None,
        description="No effect: nothing is ever dropped. What does not fit the context is a 400.",
    )
    metadata: Annotated[dict[str, str], Field(fail_fast=True)] | None = Field(
        None, description="Comes back in the answer."
    )
    user: str | None = Field(None, description="No effect.")
    service_tier: str | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    prompt_cache_key: str | None = Field(None, description="No effect.")
    prompt_cache_retention: str | None = Field(None, description="No effect.")

    # Accepted with values that ask for nothing.
    conversation: None = None
    background: OnlyFalse | None = None
    prompt: None = None
    max_tool_calls: None = None
    moderation: None = None
    context_management: Nothing | None = None

    UNSUPPORTED = frozenset(
        {
            "conversation",
            "background",
            "prompt",
            "max_tool_calls",
            "moderation",
            "context_management",
            "include",
            "stream_options",
        }
    )
