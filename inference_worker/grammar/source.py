"""Reads a request's constraint: what kind of grammar it is, and its text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Final, Literal

from inference_worker.errors import InvalidField
from inference_worker.field_rules import check_count, refuse_unknown_fields
from protos.sluice.v1 import generation_pb2 as pb

Kind = Literal["json_schema", "regex", "choice", "lark"]

_PATH: Final = "constraint"


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A grammar as its author wrote it; equal ones compile alike."""

    kind: Kind
    text: str  # of a choice: a JSON list of the texts
    path: str = field(
        default="", compare=False
    )  # of the field it was made from, where that is none of its own

    @property
    def field(self) -> str:
        """The path of the field that holds it."""
        return self.path or f"{_PATH}.{self.kind}"


def read_constraint(message: pb.Constraint, max_bytes: int, max_texts: int) -> GrammarSource:
    """Check what is cheap to check; whether it compiles is the compiler's to say. At most `max_bytes` of text,
    and `max_texts` to choose from.

    Raises: InvalidField, UnsupportedField.
    """
    refuse_unknown_fields(message, _PATH)
    match message.WhichOneof("grammar"):
        case "json_schema":
            source = GrammarSource("json_schema", message.json_schema)
        case "regex":
            source = GrammarSource("regex", message.regex)
        case "lark":
            source = GrammarSource("lark", message.lark)
        case "choice":
            return _read_choice(message.choice, max_bytes, max_texts)
        case _:
            raise InvalidField(_PATH, "set one of json_schema, regex, choice and lark")
    if not source.text.strip():
        raise InvalidField(source.field, "is empty")
    _check_size(source.field, len(source.text.encode()), max_bytes)
    return source


def _read_choice(message: pb.ChoiceList, max_bytes: int, max_texts: int) -> GrammarSource:
    path = f"{_PATH}.choice"
    refuse_unknown_fields(message, path)
    if not message.texts:
        raise InvalidField(f"{path}.texts", "is empty")
    check_count(f"{path}.texts", len(message.texts), max_texts, "texts")
    for index, text in enumerate(message.texts):
        if not text:
            raise InvalidField(f"{path}.texts[{index}]", "is empty")
    _check_size(f"{path}.texts", sum(len(text.encode()) for text in message.texts), max_bytes)
    return GrammarSource("choice", json.dumps(list(message.texts)))


def _check_size(path: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise InvalidField(path, f"at most {max_bytes} bytes, got {size}")
