"""Request fields that both OpenAI routes share, and how they read."""

from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

from pydantic import Field

from edge.dialects.constraint import ConstraintFields
from edge.dialects.schema import (
    OnlyFalse,
    OnlyTrue,
    OnlyZero,
    RequestModel,
    SamplingFields,
    StoppingFields,
    TimeoutField,
    Uint32,
)
from edge.errors import invalid_request
from protos.sluice.v1 import generation_pb2 as pb

Value = TypeVar("Value", int, bool)

# How OpenAI calls what a model may do with its tools.
TOOL_CHOICE_MODES: Final = {
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}

ReasoningEffort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORT_EFFECT: Final = "Told to the chat template as reasoning_effort, and as enable_thinking, which is false for none."


def tell_effort(chat: pb.Chat, effort: ReasoningEffort | None) -> None:
    """Tells the chat template how much to reason, if the request says."""
    if effort is not None:
        # the first is what Qwen 3 and its like read, the second what gpt-oss does
        chat.template_arguments["enable_thinking"] = effort != "none"
        chat.template_arguments["reasoning_effort"] = effort


class StreamOptions(RequestModel):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(None, description="Send token counts in a last chunk.")
    continuous_usage_stats: bool | None = Field(
        None, description="Send token counts so far in every chunk, and in a last one."
    )
    include_obfuscation: OnlyFalse | None = Field(None, description="Not supported.")


class OpenAIFields(SamplingFields, StoppingFields, ConstraintFields, TimeoutField):
    """Fields of both OpenAI routes."""

    model: str | None = Field(
        None, max_length=1024, description="The served model or one of its aliases."
    )
    n: Uint32 | None = Field(None, description="Number of choices; 1 when left out.")
    max_tokens: Uint32 | None = Field(None, description="Most tokens of each choice.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None

    # Accepted, and without effect here: they name, count, bill or store, and change no token.
    user: str | None = Field(None, description="No effect.")
    metadata: dict[str, Any] | None = Field(None, description="No effect.")
    store: bool | None = Field(None, description="No effect.")
    service_tier: str | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    prompt_cache_key: str | None = Field(None, description="No effect.")
    prompt_cache_retention: str | None = Field(None, description="No effect.")

    # Names of vLLM's, accepted with the values that this server has anyway.
    skip_special_tokens: OnlyTrue | None = None
    spaces_between_special_tokens: OnlyTrue | None = None
    min_tokens: OnlyZero | None = None
    priority: Annotated[int, Field(ge=-(2**31) + 1, le=2**31 - 1)] | None = Field(
        None,
        description="Order among the waiting requests of the same key, -100 to 100; as vLLM's, lower first.",
    )

    UNSUPPORTED = frozenset({"skip_special_tokens", "spaces_between_special_tokens", "min_tokens"})

    def contract_priority(self) -> int | None:
        """The priority in the contract's words, where higher goes first."""
        return None if self.priority is None else -self.priority

    def require_stream_for_options(self) -> None:
        """Raises a 400 for options of a stream that is none."""
        if self.stream_options is not None and not self.stream:
            raise invalid_request("stream_options needs stream to be true.", "stream_options")

    def sends_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        options = self.stream_options
        return options is not None and bool(options.include_usage or options.continuous_usage_stats)

    def sends_running_usage(self) -> bool:
        """Whether each chunk has the counts so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


def agreed(values: dict[str, Value | None]) -> Value | None:
    """The one value that several names of one field have, or a 400."""
    given = {name: value for name, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        name = next(iter(given))
        others = ", ".join(list(given)[1:])
        raise invalid_request(f"{name} contradicts {others}.", name)
    return next(iter(given.values()), None)
