"""How a model marks reasoning and calls of functions in its output, told by its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final


class ToolFormat(Enum):
    """How calls are written.

    HERMES: `<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>`, of Hermes and Qwen models.
    LLAMA3: the whole output is `{"name": …, "parameters": {…}}`, perhaps after `<|python_tag|>`, several with "; "
    between.
    MISTRAL: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or from Mistral's eleventh tokenizer on
    `[TOOL_CALLS]name[ARGS]{…}` for each.
    """

    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"


THINK_START: Final = "<think>"
THINK_END: Final = "</think>"
CALL_START: Final = "<tool_call>"
CALL_END: Final = "</tool_call>"
PYTHON_TAG: Final = "<|python_tag|>"
TOOL_CALLS: Final = "[TOOL_CALLS]"
ARGS: Final = "[ARGS]"
# Some of these are special tokens, whose text is not shown otherwise.
MARKS: Final = frozenset(
    {THINK_START, THINK_END, CALL_START, CALL_END, PYTHON_TAG, TOOL_CALLS, ARGS}
)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What a chat template says about the model's output."""

    tools: ToolFormat | None = None  # None: the model knows no tools
    marks_reasoning: bool = False
    has_args_mark: bool = False  # MISTRAL: calls are name[ARGS]{…}

    @classmethod
    def of_template(cls, template: str | None) -> ChatFormat:
        """Read a chat template; None is no template, and tells nothing."""
        template = template or ""
        return cls(
            tools=_tool_format(template),
            marks_reasoning=THINK_END in template or THINK_START in template,
            has_args_mark=ARGS in template,
        )


def _tool_format(template: str) -> ToolFormat | None:
    if "tools" not in template:
        return None
    if TOOL_CALLS in template:
        return ToolFormat.MISTRAL
    if CALL_START in template:
        return ToolFormat.HERMES
    if PYTHON_TAG in template or "ipython" in template:
        return ToolFormat.LLAMA3
    return None


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function: its name, and the JSON schema of its arguments."""

    name: str
    schema: dict[str, Any]


def calls_grammar(
    chat_format: ChatFormat,
    tools: Sequence[ToolSpec],
    *,
    is_parallel: bool,
) -> str:
    """A Lark grammar in llguidance's dialect: nothing but calls of these functions, whose arguments fit the schemas.

    Each schema is a document of its own, so that what it refers to by "#/$defs/…" is found in it.
    """
    match chat_format.tools:
        case ToolFormat.HERMES:
            start = f'"{CALL_START}\\n" call "\\n{CALL_END}"'
            more = f'("\\n" {start})*' if is_parallel else ""
            calls = [_listed_call(tool, "arguments") for tool in tools]
        case ToolFormat.LLAMA3:
            start, more = "call", '("; " call)*' if is_parallel else ""
            calls = [_listed_call(tool, "parameters") for tool in tools]
        case ToolFormat.MISTRAL if chat_format.has_args_mark:
            start, more = "call", "call*" if is_parallel else ""
            calls = [(f"{TOOL_CALLS}{tool.name}{ARGS}", "") for tool in tools]
        case ToolFormat.MISTRAL:
            start = f'"{TOOL_CALLS}[" call'
            more = '(", " call)* "]"' if is_parallel else '"]"'
            calls = [_listed_call(tool, "arguments") for tool in tools]
        case None:
            raise ValueError("the model knows no tools")
    rules = [f"start: {start} {more}"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, (tool, (before, after)) in enumerate(zip(tools, calls, strict=True)):
        rules.append(f"call_{i}: {json.dumps(before)} arguments_{i} {after and json.dumps(after)}")
        rules.append(f"arguments_{i}: {_json(tool.schema)}")
    return "\n".join([*rules, ""])


def _listed_call(tool: ToolSpec, arguments_key: str) -> tuple[str, str]:
    """What stands before and after the arguments of a call that is an object."""
    return f'{{"name": "{tool.name}", "{arguments_key}": ', "}"


# Spaces as models write them: one behind each comma and colon.
_SPACING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _json(schema: dict[str, Any]) -> str:
    options = schema.get("x-guidance", {})
    if isinstance(options, dict):  # llguidance says what it is otherwise
        schema = schema | {"x-guidance": options | _SPACING}
    return "%json " + json.dumps(schema)
