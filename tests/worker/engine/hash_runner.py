"""A runner whose "KV cache" is real paged memory, and whose next token is a hash of what it reads back from it.

What it keeps of a position depends on all positions before it, as real keys and values do. So a mistake in paging,
sharing, preemption or prefix caching changes the next token, and comparing with `reference_completion`, which knows no
paging, finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from inference_worker.engine.event import Token
from inference_worker.engine.runner import Row, RowOutput

VOCABULARY = 97


def key_value(previous: int, token_id: int, position: int) -> int:
    """What is kept of a position: like a real key and value, it depends on everything before it."""
    return (previous * 1_003 + token_id * 17 + position + 1) % 1_000_003


def next_token(last: int, seed: int, choice_index: int) -> int:
    return (last * 31 + seed * 7 + choice_index * 3) % 1_000_003 % VOCABULARY


def reference_completion(
    prompt: Sequence[int], num_tokens: int, seed: int = 0, choice_index: int = 0
) -> list[int]:
    state = 0
    for position, token_id in enumerate(prompt):
        state = key_value(state, token_id, position)
    completion: list[int] = []
    for position in range(len(prompt), len(prompt) + num_tokens):
        completion.append(next_token(state, seed, choice_index))
        state = key_value(state, completion[-1], position)
    return completion


class HashRunner:
    """Runs rows over paged memory; `before_row` may raise to make a row fail."""

    def __init__(
        self, num_blocks: int, block_size: int, before_row: Callable[[Row], None] = lambda _: None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.memory: list[int | None] = [None] * (num_blocks * block_size)
        self.num_computed = 0  # tokens, over all steps
        self.batch_sizes: list[int] = []  # tokens of each step
        self.is_closed = False
        self._before_row = before_row

    def execute(self, rows: Sequence[Row]) -> list[RowOutput]:
        kinds = [row.num_tokens == 1 and row.start > 0 for row in rows]
        assert kinds == sorted(kinds, reverse=True), "decode rows come first"
        self.batch_sizes.append(sum(row.num_tokens for row in rows))
        for row in rows:
            self._before_row(row)
        return [self._execute_row(row) for row in rows]

    def close(self) -> None:
        self.is_closed = True

    def _execute_row(self, row: Row) -> RowOutput:
        sequence = row.sequence
        state = 0 if row.start == 0 else self._read(row, row.start - 1)
        for position in range(row.start, row.stop):
            state = key_value(state, sequence.token_ids[position], position)
            self.memory[self._slot(row, position)] = state
        self.num_computed += row.num_tokens
        if not row.is_whole:
            return RowOutput()
        last = self._read(row, row.stop - 1)
        seed = sequence.request.sampling.seed
        return RowOutput(Token(next_token(last, seed, sequence.choice_index)))

    def _read(self, row: Row, position: int) -> int:
        value = self.memory[self._slot(row, position)]
        assert value is not None, "read a slot that was never written"
        return value

    def _slot(self, row: Row, position: int) -> int:
        block = row.sequence.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size
