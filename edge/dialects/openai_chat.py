"""POST /v1/chat/completions."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from edge.dialects.common import field_names, new_id
from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.dialects.openai_chat_schema import ChatCompletionRequest, ChatMessage, ChatNamedTool
from edge.dialects.openai_schema import TOOL_CHOICE_MODES, agreed, tell_effort
from edge.dialects.openai_wire import ChunkEncoder, UsageCount, finish_reason, token_logprobs
from edge.dialects.schema import validate
from edge.errors import invalid_request
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb


def parse(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    """A chat request in the contract's words."""
    chat = validate(ChatCompletionRequest, body)
    chat.require_stream_for_options()
    for index, message in enumerate(chat.messages):
        _check_message(message, f"messages[{index}]")
    if chat.top_logprobs is not None and not chat.logprobs:
        raise invalid_request("top_logprobs needs logprobs to be true.", "top_logprobs")
    generation_id = new_id("chatcmpl")
    constraint, constraint_names = chat.constraint()
    request = pb.GenerateRequest(
        request_id=generation_id,
        model=chat.model,
        prompt=pb.Prompt(chat=_chat(chat)),
        sampling=chat.sampling(),
        stopping=chat.stopping(_max_tokens(chat)),
        output=pb.Output(logprobs=(chat.top_logprobs or 0) if chat.logprobs else None),
        n=chat.n,
        priority=chat.contract_priority(),
        constraint=constraint,
        timeout=chat.timeout_duration(),
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
                "prompt.chat.tools": "tools",
                "prompt.chat.tool_choice": "tool_choice",
                "prompt.chat.continue_final_message": "continue_final_message",
                "prompt.chat.template_arguments": "chat_template_kwargs",
                "stopping.max_tokens": "max_completion_tokens"
                if chat.max_completion_tokens is not None
                else "max_tokens",
                "stopping.stop_sequences": "stop",
                "output.logprobs": "top_logprobs",
                **constraint_names,
            }
        ),
    )


def _check_message(message: ChatMessage, path: str) -> None:
    if message.content is None and message.role != "assistant":
        raise invalid_request("Only an assistant's content may be null.", f"{path}.content")
    if message.tool_call_id is not None and message.role != "tool":
        raise invalid_request("Only a tool's message has one.", f"{path}.tool_call_id")
    for name in ("tool_calls", "reasoning_content"):
        if getattr(message, name) and message.role != "assistant":
            raise invalid_request("Only an assistant's message has one.", f"{path}.{name}")


def _chat(request: ChatCompletionRequest) -> pb.Chat:
    chat = pb.Chat(messages=map(_message, request.messages))
    for tool in request.tools or []:
        function = tool.function
        schema = None if function.parameters is None else encode(function.parameters).decode()
        chat.tools.add(name=function.name, description=function.description, parameters=schema)
    choice = request.tool_choice
    if isinstance(choice, ChatNamedTool):
        chat.tool_choice.mode = pb.TOOL_CHOICE_MODE_REQUIRED
        chat.tool_choice.name = choice.function.name
    elif choice == "required" or (choice is not None and request.tools):
        chat.tool_choice.mode = TOOL_CHOICE_MODES[choice]
    if request.tools and request.parallel_tool_calls is not None:
        chat.parallel_tool_calls = request.parallel_tool_calls
    if request.add_generation_prompt == bool(request.continue_final_message):
        raise invalid_request(
            "add_generation_prompt has to be the contrary of continue_final_message.",
            "add_generation_prompt",
        )
    if request.continue_final_message:
        chat.continue_final_message = True
    tell_effort(chat, request.reasoning_effort)
    if request.chat_template_kwargs:
        chat.template_arguments.update(request.chat_template_kwargs)
    return chat


def _message(message: ChatMessage) -> pb.ChatMessage:
    role = "system" if message.role == "developer" else message.role
    made = pb.ChatMessage(
        role=role,
        content=message.text(),
        name=message.name,
        tool_call_id=message.tool_call_id,
        reasoning=message.reasoning_content,
    )
    for call in message.tool_calls or []:
        function = call.function
        made.tool_calls.add(id=call.id, name=function.name, arguments=function.arguments)
    return made


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
        return _logprobs_json(delta)

    def _other_choices(self, index: int, delta: pb.Delta) -> Iterator[dict[str, Any]]:
        if delta.reasoning:
            yield _choice(index, {"reasoning_content": delta.reasoning})
        for call in delta.tool_calls:
            yield _choice(index, {"tool_calls": [_call_json(call)]})


def _call_json(call: pb.ToolCallDelta) -> dict[str, Any]:
    function = {"arguments": call.arguments}
    if not call.HasField("name"):
        return {"index": call.index, "function": function}
    function = {"name": call.name, **function}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


class _Choice:
    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[tuple[str, str, list[str]]] = []  # id, name, arguments
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason = ""

    def add(self, delta: pb.Delta) -> None:
        self.text.append(delta.text)
        self.reasoning.append(delta.reasoning)
        for call in delta.tool_calls:
            if call.HasField("name"):
                self.calls.append((call.id, call.name, []))
            self.calls[call.index][2].append(call.arguments)

    def message(self) -> dict[str, Any]:
        text = "".join(self.text)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not self.calls else None,
            "refusal": None,
        }
        if reasoning := "".join(self.reasoning):
            message["reasoning_content"] = reasoning
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": call_id,
                    "type": "function",
                    "function": {"name": name, "arguments": "".join(arguments)},
                }
                for call_id, name, arguments in self.calls
            ]
        return message


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
            choice.add(message.delta)
            if self._has_logprobs:
                choice.logprobs += token_logprobs(message.delta)
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
                        "message": choice.message(),
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


def _logprobs_json(delta: pb.Delta) -> dict[str, Any]:
    return {"content": token_logprobs(delta), "refusal": None}
