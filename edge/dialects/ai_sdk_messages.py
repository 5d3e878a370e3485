"""The AI SDK's UI messages in the contract's words, by the rules of its own convertToModelMessages."""

from collections.abc import Sequence
from typing import Final

from edge.dialects.ai_sdk_schema import AiSdkMessage, AiSdkPart
from edge.errors import invalid_request
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb

# Parts that a page shows and no model reads.
_SHOWN_ONLY: Final = frozenset({"step-start", "source-url", "source-document"})
_DATA, _TOOL, _DYNAMIC_TOOL = "data-", "tool-", "dynamic-tool"
_DENIED: Final = "Tool call execution denied."


def chat_messages(messages: Sequence[AiSdkMessage], name: str) -> list[pb.ChatMessage]:
    """All of them; `name` is the field they stand in. Raises a 400 that names a part nobody here can read."""
    told: list[pb.ChatMessage] = []
    for index, message in enumerate(messages):
        path = f"{name}[{index}]"
        if message.role == "assistant":
            told += _assistant(message, path)
        else:
            told.append(pb.ChatMessage(role=message.role, content=_said(message, path)))
    return told


def _said(message: AiSdkMessage, path: str) -> str:
    texts: list[str] = []
    for index, part in enumerate(message.parts):
        part_path = f"{path}.parts[{index}]"
        if part.type == "text":
            texts.append(_text(part, part_path))
        elif not _is_shown_only(part):
            raise _unreadable(part, part_path, f"a {message.role}'s message")
    return "".join(texts)


def _assistant(message: AiSdkMessage, path: str) -> list[pb.ChatMessage]:
    """Its steps: what the model wrote in one go, then what the tools that it called gave."""
    told: list[pb.ChatMessage] = []
    step = pb.ChatMessage(role="assistant")
    results: list[pb.ChatMessage] = []
    # Joined once a step: a field of a message is copied whole whenever it grows.
    said: list[str] = []
    thought: list[str] = []

    def end_step() -> None:
        nonlocal step, results
        if any(said):
            step.content = "".join(said)
        if any(thought):
            step.reasoning = "".join(thought)
        if any(said) or any(thought) or step.tool_calls:
            told.extend([step, *results])
        step, results = pb.ChatMessage(role="assistant"), []
        said.clear()
        thought.clear()

    for index, part in enumerate(message.parts):
        part_path = f"{path}.parts[{index}]"
        if part.type == "step-start":
            end_step()
        elif part.type == "text":
            said.append(_text(part, part_path))
        elif part.type == "reasoning":
            thought.append(_text(part, part_path))
        elif part.type == _DYNAMIC_TOOL or part.type.startswith(_TOOL):
            _add_call(part, part_path, step, results)
        elif not _is_shown_only(part):
            raise _unreadable(part, part_path, "an assistant's message")
    end_step()
    return told


def _add_call(
    part: AiSdkPart, path: str, step: pb.ChatMessage, results: list[pb.ChatMessage]
) -> None:
    if part.state == "input-streaming":  # the answer broke off within the call
        return
    name = part.tool_name if part.type == _DYNAMIC_TOOL else part.type.removeprefix(_TOOL)
    if not name:
        raise invalid_request("A tool's part names the tool.", f"{path}.toolName")
    if part.tool_call_id is None:
        raise invalid_request(f"{path}.toolCallId is required.", f"{path}.toolCallId")
    given = part.input
    if not isinstance(given, dict):
        # What max_tokens cut is no object, and no tool was called with it.
        if given is not None and part.state != "output-error":
            raise invalid_request(f"{path}.input: must be an object.", f"{path}.input")
        given = {}
    step.tool_calls.add(id=part.tool_call_id, name=name, arguments=encode(given).decode())
    result = _result(part)
    if result is not None:
        results.append(
            pb.ChatMessage(role="tool", content=result, tool_call_id=part.tool_call_id, name=name)
        )


def _result(part: AiSdkPart) -> str | None:
    """What the tool gave, as text; None where there is nothing yet."""
    approval = part.approval or {}
    is_denied = part.state == "approval-responded" and approval.get("approved") is False
    if is_denied or part.state == "output-denied":
        reason = approval.get("reason")
        return reason if isinstance(reason, str) else _DENIED
    if part.state == "output-error":
        return f"Error: {part.error_text or ''}"
    if part.state != "output-available":
        return None
    return part.output if isinstance(part.output, str) else encode(part.output).decode()


def _text(part: AiSdkPart, path: str) -> str:
    if part.text is None:
        raise invalid_request(f"{path}.text is required.", f"{path}.text")
    return part.text


def _is_shown_only(part: AiSdkPart) -> bool:
    return part.type in _SHOWN_ONLY or part.type.startswith(_DATA)


def _unreadable(part: AiSdkPart, path: str, place: str) -> Exception:
    # Not the type itself, of which a caller may have made anything.
    if part.type in ("file", "reasoning-file"):
        return invalid_request("The model reads text alone, and no files.", path, "unsupported")
    return invalid_request(f"{path}.type: not a part of {place}.", f"{path}.type", "unsupported")
