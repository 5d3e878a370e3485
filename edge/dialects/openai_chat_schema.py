"""Body of POST /v1/chat/completions."""

from typing import Any, Literal

from pydantic import Field, model_validator

from edge.dialects.openai_schema import EFFORT_EFFECT, OpenAIFields, ReasoningEffort
from edge.dialects.schema import Items, Nothing, RequestModel, SomeItems, Uint32


class TextPart(RequestModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatCalledFunction(RequestModel):
    """A function and its arguments."""

    name: str = Field(min_length=1, max_length=128)
    arguments: str = Field(description="A JSON object, as JSON text.")


class ChatToolCall(RequestModel):
    """A call in an answer that is sent back."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: ChatCalledFunction
    index: Uint32 | None = None


class ChatFunction(RequestModel):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")
    strict: bool | None = Field(
        None,
        description="No effect: arguments fit the schema wherever tool_choice requires a call.",
    )


class ChatTool(RequestModel):
    """A tool."""

    type: Literal["function"]
    function: ChatFunction


class ChatFunctionName(RequestModel):
    """Names a function."""

    name: str


class ChatNamedTool(RequestModel):
    """The tool that is to be called."""

    type: Literal["function"]
    function: ChatFunctionName


class ChatMessage(RequestModel):
    """One message. The fields after `tool_call_id` are those of an answer that is sent back as it came.

    Other servers' answers have fields of their own, which are ignored in an assistant's message when they are null.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[TextPart] | None = Field(
        None, description="Null only in an assistant's message, where it is an empty text."
    )
    name: str | None = None
    tool_call_id: str | None = Field(None, description="Of a tool's message: what it answers.")
    tool_calls: Items[ChatToolCall] | None = Field(None, description="Of an assistant's message.")
    reasoning_content: str | None = Field(None, description="Of an assistant's message.")
    refusal: None = None
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_nulls(cls, value: object) -> object:
        if not isinstance(value, dict) or value.get("role") != "assistant":
            return value
        return {
            name: field
            for name, field in value.items()
            if field is not None or name in cls.model_fields
        }

    def text(self) -> str:
        """The content as one text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class ChatCompletionRequest(OpenAIFields):
    """Body of POST /v1/chat/completions."""

    messages: SomeItems[ChatMessage]
    max_completion_tokens: Uint32 | None = Field(None, description="Another name of max_tokens.")
    logprobs: bool | None = Field(None, description="Send log-probabilities.")
    top_logprobs: Uint32 | None = Field(None, description="Likeliest candidates at each position.")

    tools: Items[ChatTool] | None = Field(None, description="Functions that the model may call.")
    tool_choice: Literal["none", "auto", "required"] | ChatNamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    reasoning_effort: ReasoningEffort | None = Field(None, description=EFFORT_EFFECT)
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="More variables of the chat template; they go before those of reasoning_effort.",
    )

    # vLLM's.
    continue_final_message: bool | None = Field(
        None,
        description="Go on with the last message, an assistant's, and send what follows of it. By default a last"
        " message of the assistant's is followed by a new answer.",
    )
    add_generation_prompt: bool | None = Field(
        None,
        description="Has to be the contrary of continue_final_message, which is enough by itself.",
    )

    # Accepted with values that ask for nothing.
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Items[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    verbosity: None = None
    web_search_options: None = None

    UNSUPPORTED = OpenAIFields.UNSUPPORTED | {
        "functions",
        "function_call",
        "modalities",
        "audio",
        "prediction",
        "verbosity",
        "web_search_options",
    }
