"""Bodies and parameters of the native dialect."""

from typing import Annotated, Any

from pydantic import Field

from edge.dialects.common import MAX_WINDOW_SECONDS, WhileUnread
from edge.dialects.constraint import JsonSchema, of_choice, of_schema
from edge.dialects.schema import (
    Float,
    Int32,
    Items,
    RequestModel,
    SamplingFields,
    SomeItems,
    StoppingFields,
    TimeoutField,
    Uint32,
)
from edge.errors import invalid_request
from protos.sluice.v1 import generation_pb2 as pb


class StreamToolCall(RequestModel):
    """A call in an answer that is sent back."""

    id: str = Field(max_length=256)
    name: str
    arguments: str = Field(description="A JSON object, as JSON text.")


class StreamMessage(RequestModel):
    """One message of a conversation."""

    role: str = Field(min_length=1, max_length=64)
    content: str
    name: str | None = None
    reasoning: str | None = Field(None, description="What an assistant thought before it.")
    tool_calls: Items[StreamToolCall] | None = Field(None, description="An assistant's calls.")
    tool_call_id: str | None = Field(
        None, max_length=256, description="Of a tool's message: the call that it answers."
    )

    def message(self) -> pb.ChatMessage:
        """In the contract's words."""
        calls = [
            pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
            for call in self.tool_calls or []
        ]
        return pb.ChatMessage(
            role=self.role,
            content=self.content,
            name=self.name,
            reasoning=self.reasoning,
            tool_calls=calls,
            tool_call_id=self.tool_call_id,
        )


class StreamTool(RequestModel):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")


class StreamFields(SamplingFields, StoppingFields, TimeoutField):
    """What POST and GET have in common."""

    model: str | None = Field(
        None, max_length=1024, description="The served model or one of its aliases."
    )
    max_tokens: Uint32 | None = Field(None, description="Most tokens of each choice.")
    n: Uint32 | None = Field(None, description="Number of choices; 1 when left out.")
    priority: Int32 | None = Field(
        None,
        description="Order among the waiting requests of the same key, -100 to 100, higher first; 0 when left out.",
    )
    logprobs: Uint32 | None = Field(
        None, description="Send log-probabilities and this many likeliest candidates."
    )
    return_token_ids: bool | None = Field(None, description="Send token ids.")
    echo: bool | None = Field(None, description="Send the prompt as each choice's first delta.")
    prompt_logprobs: bool | None = Field(
        None, description="With echo and logprobs: the prompt's log-probabilities too."
    )
    resume_window: Annotated[Float, Field(ge=0, le=MAX_WINDOW_SECONDS)] | None = Field(
        None,
        description="Seconds for which the stream may be resumed with Last-Event-ID: after its reader went away, and"
        " after its end. 0 is not at all: the generation ends with its connection. When left out, 0 for POST, and for"
        " GET what the server is set to.",
    )
    while_unread: WhileUnread | None = Field(
        None,
        description="What becomes of a generation with such a window while nobody reads: park stops it and frees its"
        " memory at once, and it goes on when a reader comes back; continue lets it go on for the window. When left"
        " out, continue for POST, and for GET park.",
    )
    special_tokens: bool | None = Field(
        None,
        description="Whether the name of a special token in the prompt or messages becomes that token, and is not text."
        " By default it does in a prompt, and does not in messages.",
    )


class StreamConstraint(RequestModel):
    """A language that the text of each choice belongs to. Exactly one of these."""

    json_schema: JsonSchema | None = None
    regex: str | None = Field(None, description="A regular expression that the whole text matches.")
    choice: Items[str] | None = Field(None, description="Texts to choose from.")
    lark: str | None = Field(None, description="A Lark grammar.")

    def message(self) -> pb.Constraint:
        """In the contract's words. Raises a 400 for more than one, or none."""
        given = [
            constraint
            for constraint in (
                None if self.json_schema is None else of_schema(self.json_schema),
                None if self.regex is None else pb.Constraint(regex=self.regex),
                None if self.choice is None else of_choice(self.choice),
                None if self.lark is None else pb.Constraint(lark=self.lark),
            )
            if constraint is not None
        ]
        if len(given) != 1:
            raise invalid_request(
                "Give exactly one of json_schema, regex, choice and lark.", "constraint"
            )
        return given[0]


class StreamRequest(StreamFields):
    """Body of POST /v1/streams. Exactly one of prompt, token_ids and messages."""

    prompt: str | None = Field(None, description="Plain text.")
    token_ids: SomeItems[Uint32] | None = Field(None, description="A prompt of token ids.")
    messages: SomeItems[StreamMessage] | None = Field(None, description="A conversation.")
    tools: Items[StreamTool] | None = Field(None, description="Functions for a conversation.")
    constraint: StreamConstraint | None = Field(
        None, description="A language that the text of each choice belongs to."
    )


class StreamQuery(StreamFields):
    """Parameters of GET /v1/streams; `stop` and `stop_token_ids` may be repeated."""

    prompt: str = Field(description="Plain text.")
    stop: Items[str] | None = Field(None, description="Texts that end a choice.")
    # Has no form as a query parameter.
    logit_bias: None = Field(None, exclude=True)
