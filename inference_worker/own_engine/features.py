"""Refuses what an engine of the user's own does not honour: an allow-list, so that what the contract gains later is
refused until somebody decides whose it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from google.protobuf.message import Message

from inference_worker.errors import UnsupportedField
from inference_worker.own_engine.protocol import FEATURES, EngineCard
from protos.sluice.v1 import generation_pb2 as pb

# What the worker does for every engine. A group stands for itself: its fields are looked at one by one.
_WORKERS: Final = frozenset(
    {
        "request_id",
        "model",
        "prompt",
        "n",
        "priority",
        "caller",
        "timeout",
        "stopping.max_tokens",
        "stopping.stop_sequences",
        "stopping.stop_token_ids",
        "output.token_ids",
        "output.echo",
        "is_continuable",  # to which `started` says no
    }
)
_GROUPS: Final = frozenset({"sampling", "stopping", "output"})
_FLOAT32: Final = 1e-6  # how exactly a value survives the wire


def refuse_unhonoured(message: pb.GenerateRequest, card: EngineCard) -> None:
    """Check a request that is otherwise fine. Raises: UnsupportedField."""
    if message.prompt.chat.tool_choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED:
        # kept by a constraint, which only our own engine draws under
        raise UnsupportedField("prompt.chat.tool_choice")
    for path, value in _set_fields(message):
        name = path.rpartition(".")[2]
        if path in _WORKERS or name in card.honours:
            continue
        if not _asks_for_nothing(path, name, value, card):
            raise UnsupportedField(path)


def _set_fields(message: pb.GenerateRequest) -> Iterator[tuple[str, Any]]:
    for field, value in message.ListFields():
        if field.name in _GROUPS:
            yield from ((f"{field.name}.{inner.name}", each) for inner, each in value.ListFields())
        else:
            yield field.name, value


def _asks_for_nothing(path: str, name: str, value: Any, card: EngineCard) -> bool:
    """Whether this is what the engine does anyway."""
    if isinstance(value, Message) or name in ("seed", "logprobs"):
        return False
    if path.startswith("sampling.") and name in FEATURES:
        default = getattr(card.default_sampling, name)
        if isinstance(default, float | int):
            return math.isclose(value, default, rel_tol=_FLOAT32, abs_tol=_FLOAT32)
        return default is not None and dict(value) == dict(default)
    return not value
