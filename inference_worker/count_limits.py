"""How many of each thing one request may bring."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from inference_worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class CountLimits:
    """Limits of lists and texts in a GenerateRequest; the defaults are the contract's, and settings make them lower."""

    max_messages: int = 10_000  # checked one by one on the event loop
    max_tools: int = 128
    # of all tools together: their schemas are parsed on the event loop
    max_tool_bytes: int = 256 * 1024
    max_template_arguments: int = 32
    max_template_bytes: int = 256 * 1024  # of all of a template's arguments together
    max_stop_sequences: int = 16
    max_stop_characters: int = 1024
    max_stop_token_ids: int = 64
    max_logit_biases: int = 1024
    max_logprobs: int = 20
    max_grammar_texts: int = 4096  # of a constraint that is a choice of texts

    @classmethod
    def of(cls, settings: WorkerSettings) -> CountLimits:
        """Those that are set."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


CONTRACT: Final = CountLimits()
