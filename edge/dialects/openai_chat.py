"""POST /v1/chat/completions."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edge.dialects.common import field_names, new_id, shown_bytes, shown_logprob
from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.dialects.openai_schema import OpenAIFields, agreed
from edge.dialects.openai_wire import ChunkEncoder, UsageCount, finish_reason
from edge.dialects.schema import Items, RequestModel, SomeItems, Uint32, validate
from edge.errors import invalid_request
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb

Nothing = Annotated[list[Any], Field(max_length=0)]


class TextPart(RequestModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(RequestModel):
    """One message. The fields after `name` are those of an answer that is sent back as it came.

    Other servers' answers have fields of their own, which are ignored in an assistant's message when they are null.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[TextPart] | None = Field(
        description="Null only in an assistant's message, where it is an empty text."
    )
    name: str | None = None
    refusal: None = None
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None

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

    parallel_tool_calls: bool | None = Field(None, description="No effect without tools.")

    # Accepted with values that ask for nothing.
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Items[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    chat_template_kwargs: None = None

    UNSUPPORTED = OpenAIFields.UNSUPPORTED | {
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "modalities",
        "audio",
        "prediction",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
        "chat_template_kwargs",
    }


def parse(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    """A chat request in the contract's words."""
    chat = validate(ChatCompletionRequest, body)
    chat.require_stream_for_options()
    for index, message in enumerate(chat.messages):
        if message.content is None and message.role != "assistant":
            raise invalid_request(
                "Only an assistant's content may be null.", f"messages[{index}].content"
            )
    if chat.top_logprobs is not None and not chat.logprobs:
        raise invalid_request("top_logprobs needs logprobs to be true.", "top_logprobs")
    generation_id = new_id("chatcmpl")
    constraint, constraint_names = chat.constraint()
    request = pb.GenerateRequest(
        request_id=generation_id,
        model=chat.model,
        prompt=pb.Prompt(chat=pb.Chat(messages=map(_message, chat.messages))),
        sampling=chat.sampling(),
        stopping=chat.stopping(_max_tokens(chat)),
        output=pb.Output(logprobs=(chat.top_logprobs or 0) if chat.logprobs else None),
        n=chat.n,
        constraint=constraint,
    )
    return ParsedRequest(
        generation_id,
        [request],
        bool(chat.stream),
        partial(
            ChatEncoder,
            generation_id,
            chat.sends_usage(),
            chat.sends_running_usage(),
            bool(chat.logprobs),
        ),
        partial(ChatCollector, generation_id, bool(chat.logprobs)),
        field_names(
            {
                "prompt": "messages",
                "prompt.chat": "messages",
                "prompt.chat.messages": "messages",
                "stopping.max_tokens": "max_completion_tokens"
                if chat.max_completion_tokens is not None
                else "max_tokens",
                "stopping.stop_sequences": "stop",
                "output.logprobs": "top_logprobs",
                **constraint_names,
            }
        ),
    )


def _message(message: ChatMessage) -> pb.ChatMessage:
    role = "system" if message.role == "developer" else message.role
    return pb.ChatMessage(role=role, content=message.text(), name=message.name)


def _max_tokens(chat: ChatCompletionRequest) -> int | None:
    return agreed(
        {"max_tokens": chat.max_tokens, "max_completion_tokens": chat.max_completion_tokens}
    )


class ChatEncoder(ChunkEncoder):
    """Messages to `chat.completion.chunk` events."""

    object = "chat.completion.chunk"

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return _choice(index, {"content": text}, logprobs)

    def _first_choice(self, index: int, choices: int) -> dict[str, Any]:  # noqa: ARG002
        return _choice(index, {"role": "assistant", "content": ""})

    def _last_choice(self, index: int) -> dict[str, Any]:
        return _choice(index, {})

    def _logprobs(self, index: int, delta: pb.Delta) -> dict[str, Any]:  # noqa: ARG002
        return logprobs_json(delta)


def _choice(
    index: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


class _Choice:
    def __init__(self) -> None:
        self.text: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason = ""


class ChatCollector:
    """Messages to one `chat.completion`."""

    def __init__(self, generation_id: str, has_logprobs: bool) -> None:
        self._id = generation_id
        self._has_logprobs = has_logprobs
        self._usage = UsageCount()
        self._choices: list[_Choice] = []
        self._started = pb.Started()

    def add(self, prompt: int, message: pb.GenerateResponse) -> None:
        """Takes one message."""
        kind = message.WhichOneof("event")
        if kind == "started":
            self._started = message.started
            self._choices = [_Choice() for _ in range(message.started.n)]
            self._usage.started(prompt, message.started)
        elif kind == "delta":
            choice = self._choices[message.delta.choice_index]
            choice.text.append(message.delta.text)
            if self._has_logprobs:
                choice.logprobs += logprobs_json(message.delta)["content"]
            self._usage.delta(prompt, message.delta)
        elif kind == "finished":
            choice = self._choices[message.finished.choice_index]
            choice.finish_reason = finish_reason(message.finished)
            self._usage.finished(prompt, message.finished)

    def body(self) -> bytes:
        """The whole answer."""
        return encode(
            {
                "id": self._id,
                "object": "chat.completion",
                "created": self._started.created_at.seconds,
                "model": self._started.model,
                "choices": [
                    {
                        "index": index,
                        "message": {
                            "role": "assistant",
                            "content": "".join(choice.text),
                            "refusal": None,
                        },
                        "logprobs": {"content": choice.logprobs, "refusal": None}
                        if self._has_logprobs
                        else None,
                        "finish_reason": choice.finish_reason,
                    }
                    for index, choice in enumerate(self._choices)
                ],
                "usage": self._usage.as_json(),
            }
        )


def logprobs_json(delta: pb.Delta) -> dict[str, Any]:
    """Log-probabilities of one delta."""
    content = []
    for entry in delta.logprobs:
        token = _candidate(entry.token)
        token["top_logprobs"] = [_candidate(candidate) for candidate in entry.top]
        content.append(token)
    return {"content": content, "refusal": None}


def _candidate(candidate: pb.Candidate) -> dict[str, Any]:
    return {
        "token": shown_bytes(candidate.token),
        "logprob": shown_logprob(candidate),
        "bytes": list(candidate.token),
    }
