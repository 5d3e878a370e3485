"""How much an engine has to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is."""

    running: int  # sequences that hold blocks
    waiting: int  # sequences in the queue
    free_blocks: int
    total_blocks: int
    block_size: int  # tokens
    steps: int  # since the start, like the following
    generated_tokens: int
    preemptions: int
    prompt_tokens: int = 0  # of requests that ran
    cached_tokens: int = 0  # of those, found in the prefix cache
