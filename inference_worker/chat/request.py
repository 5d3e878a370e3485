"""Checks a chat and turns it into what a chat template takes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf import json_format, struct_pb2

from inference_worker.chat.format import ChatFormat, ToolSpec
from inference_worker.count_limits import CONTRACT, CountLimits
from inference_worker.errors import InvalidField
from inference_worker.field_rules import check_count, refuse_unknown_fields
from protos.sluice.v1 import generation_pb2 as pb

_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_ARGUMENT_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_NO_ARGUMENTS: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
_REQUIRED: Final = pb.TOOL_CHOICE_MODE_REQUIRED


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that a chat offers, and how free the model is with them."""

    specs: tuple[ToolSpec, ...] = ()  # empty: no calls are looked for
    is_required: bool = False
    is_parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(spec.name for spec in self.specs)


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The variables of a chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    arguments: dict[str, Any] | None = None


def check_chat(
    chat: pb.Chat, path: str, chat_format: ChatFormat, limits: CountLimits = CONTRACT
) -> None:
    """Check all but the JSON inside; cheap whatever its size.

    Raises: InvalidField, UnsupportedField.
    """
    refuse_unknown_fields(chat, path)
    if not chat.messages:
        raise InvalidField(f"{path}.messages", "is empty")
    check_count(f"{path}.messages", len(chat.messages), limits.max_messages, "messages")
    for index, message in enumerate(chat.messages):
        _check_message(message, f"{path}.messages[{index}]", limits)
    _check_tools(chat, path, chat_format, limits)
    _check_choice(chat, path)
    _check_arguments(chat.template_arguments, f"{path}.template_arguments", limits)
    if chat.continue_final_message:
        _check_continued(chat, f"{path}.continue_final_message")


def read_tools(chat: pb.Chat, path: str) -> Tools:
    """The tools of a checked chat that the model may call. Raises: InvalidField, for a schema that is none."""
    if chat.tool_choice.mode == pb.TOOL_CHOICE_MODE_NONE:
        return Tools()
    wanted = chat.tool_choice.name
    return Tools(
        specs=tuple(
            ToolSpec(tool.name, _schema(tool, f"{path}.tools[{index}].parameters"))
            for index, tool in enumerate(chat.tools)
            if wanted in ("", tool.name)
        ),
        is_required=chat.tool_choice.mode == _REQUIRED,
        is_parallel=not chat.HasField("parallel_tool_calls") or chat.parallel_tool_calls,
    )


def render(chat: pb.Chat, path: str) -> RenderedChat:
    """The template's variables for a checked chat. Raises: InvalidField, for arguments that are no JSON object."""
    tools = None
    if chat.tools and chat.tool_choice.mode != pb.TOOL_CHOICE_MODE_NONE:
        tools = [_rendered_tool(tool, f"{path}.tools[{i}]") for i, tool in enumerate(chat.tools)]
    return RenderedChat(
        messages=[
            _rendered_message(message, f"{path}.messages[{index}]")
            for index, message in enumerate(chat.messages)
        ],
        tools=tools,
        arguments=_rendered_arguments(chat.template_arguments, f"{path}.template_arguments")
        or None,
    )


def _check_arguments(arguments: struct_pb2.Struct, path: str, limits: CountLimits) -> None:
    check_count(path, len(arguments.fields), limits.max_template_arguments, "arguments")
    check_count(path, arguments.ByteSize(), limits.max_template_bytes, "bytes")
    for name in arguments.fields:
        if not _ARGUMENT_NAME.fullmatch(name):
            raise InvalidField(path, "names must be identifiers")


def _check_message(message: pb.ChatMessage, path: str, limits: CountLimits) -> None:
    refuse_unknown_fields(message, path)
    if not message.role:
        raise InvalidField(f"{path}.role", "is required")
    if message.tool_calls and message.role != "assistant":
        raise InvalidField(f"{path}.tool_calls", "only an assistant calls functions")
    check_count(f"{path}.tool_calls", len(message.tool_calls), limits.max_tools, "calls")
    for index, call in enumerate(message.tool_calls):
        refuse_unknown_fields(call, f"{path}.tool_calls[{index}]")
        if not call.name:
            raise InvalidField(f"{path}.tool_calls[{index}].name", "is required")


def _check_tools(chat: pb.Chat, path: str, chat_format: ChatFormat, limits: CountLimits) -> None:
    path = f"{path}.tools"
    if chat.tools and chat_format.tools is None:
        raise InvalidField(path, "the model's chat template knows no tools")
    check_count(path, len(chat.tools), limits.max_tools, "tools")
    seen = set()
    for index, tool in enumerate(chat.tools):
        refuse_unknown_fields(tool, f"{path}[{index}]")
        if not _TOOL_NAME.fullmatch(tool.name):
            raise InvalidField(
                f"{path}[{index}].name", "must be 1 to 128 characters of [A-Za-z0-9_.-]"
            )
        if tool.name in seen:
            raise InvalidField(f"{path}[{index}].name", f"{tool.name} comes twice")
        seen.add(tool.name)
    size = sum(tool.ByteSize() for tool in chat.tools)
    check_count(path, size, limits.max_tool_bytes, "bytes")


def _check_choice(chat: pb.Chat, path: str) -> None:
    choice = chat.tool_choice
    refuse_unknown_fields(choice, f"{path}.tool_choice")
    if choice.mode not in pb.ToolChoiceMode.values():
        raise InvalidField(f"{path}.tool_choice.mode", f"{choice.mode} is none of the modes")
    if choice.mode == _REQUIRED and not chat.tools:
        raise InvalidField(f"{path}.tool_choice", "requires a call, but there are no tools")
    if choice.HasField("name"):
        if choice.mode != _REQUIRED:
            raise InvalidField(f"{path}.tool_choice.name", "only with mode REQUIRED")
        if all(tool.name != choice.name for tool in chat.tools):
            raise InvalidField(f"{path}.tool_choice.name", f"{choice.name!r} is none of the tools")


def _check_continued(chat: pb.Chat, path: str) -> None:
    last = chat.messages[-1]
    if last.role != "assistant":
        raise InvalidField(path, "the last message is not the assistant's")
    if last.tool_calls:
        raise InvalidField(path, "the last message calls functions")
    if not last.content:
        raise InvalidField(path, "the last message has no content")
    if chat.tool_choice.mode == _REQUIRED:
        raise InvalidField(path, "not where tool_choice requires a call")


def _schema(tool: pb.Tool, path: str) -> dict[str, Any]:
    if not tool.parameters:
        return _NO_ARGUMENTS
    try:
        schema = json.loads(tool.parameters)
    except (ValueError, RecursionError) as error:
        raise InvalidField(path, "is not JSON") from error
    if not isinstance(schema, dict):
        raise InvalidField(path, "is not a JSON schema of an object")
    return {"type": "object"} | schema


def _rendered_tool(tool: pb.Tool, path: str) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    function["parameters"] = _schema(tool, f"{path}.parameters")
    return {"type": "function", "function": function}


def _rendered_message(message: pb.ChatMessage, path: str) -> dict[str, Any]:
    rendered: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.HasField("name"):
        rendered["name"] = message.name
    if message.HasField("tool_call_id"):
        rendered["tool_call_id"] = message.tool_call_id
    if message.HasField("reasoning"):
        rendered["reasoning_content"] = message.reasoning
    if message.tool_calls:
        rendered["tool_calls"] = _rendered_calls(message.tool_calls, f"{path}.tool_calls")
    return rendered


def _rendered_calls(calls: Sequence[pb.ToolCall], path: str) -> list[dict[str, Any]]:
    rendered = []
    for index, call in enumerate(calls):
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InvalidField(f"{path}[{index}].arguments", "is not JSON") from error
        if not isinstance(arguments, dict):
            raise InvalidField(f"{path}[{index}].arguments", "is not a JSON object")
        function = {"name": call.name, "arguments": arguments}
        rendered.append({"id": call.id, "type": "function", "function": function})
    return rendered


def _refuse_unknown_within(value: struct_pb2.Struct | struct_pb2.Value, path: str) -> None:
    """As `refuse_unknown_fields`, at any depth, of which the wire format allows no more than Python."""
    refuse_unknown_fields(value, path)
    if isinstance(value, struct_pb2.Struct):
        for name, inner in value.fields.items():
            _refuse_unknown_within(inner, f"{path}.{name}")
    elif value.HasField("struct_value"):
        _refuse_unknown_within(value.struct_value, path)
    elif value.HasField("list_value"):
        refuse_unknown_fields(value.list_value, path)
        for index, inner in enumerate(value.list_value.values):
            _refuse_unknown_within(inner, f"{path}[{index}]")


def _rendered_arguments(arguments: struct_pb2.Struct, path: str) -> dict[str, Any]:
    """A Struct knows no whole numbers; templates compare with them."""
    _refuse_unknown_within(arguments, path)
    try:
        given: dict[str, Any] = json_format.MessageToDict(arguments)
    except ValueError as error:  # NaN or infinite
        raise InvalidField(path, "numbers must be finite") from error
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in given.items()
    }
