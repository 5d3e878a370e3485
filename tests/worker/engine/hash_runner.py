"""A runner whose "KV cache" is real paged memory, and whose next token is a hash of what it reads back from it.

Any mistake in paging, sharing, preemption or prefix caching changes the hash, so that comparing with
`reference_completion`, which knows no paging, finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from inference_worker.engine.event import Token
from inference_worker.engine.runner import Row, RowOutput

VOCABULARY = 97


def next_token(token_ids: Sequence[int], seed: int, choice_index: int) -> int:
    state = (seed * 31 + choice_index * 7 + 1) % 1_000_003
    for position, token_id in enumerate(token_ids):
        state = (state * 1_003 + token_id * 17 + position + 1) % 1_000_003
    return state % VOCABULARY


def reference_completion(
    prompt: Sequence[int], num_tokens: int, seed: int = 0, choice_index: int = 0
) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, seed, choice_index))
    return tokens[len(prompt) :]


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
        for position in range(row.start, row.stop):
            self.memory[self._slot(row, position)] = sequence.token_ids[position]
        self.num_computed += row.num_tokens
        if not row.is_whole:
            return RowOutput()
        context = [self.memory[self._slot(row, position)] for position in range(row.stop)]
        tokens = [token_id for token_id in context if token_id is not None]
        assert len(tokens) == row.stop, "read a slot that was never written"
        seed = sequence.request.sampling.seed
        return RowOutput(Token(next_token(tokens, seed, sequence.choice_index)))

    def _slot(self, row: Row, position: int) -> int:
        block = row.sequence.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size
