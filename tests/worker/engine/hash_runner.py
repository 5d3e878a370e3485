"""A runner whose "KV cache" is real paged memory, and whose next token is a hash of what it reads back from it.

What it keeps of a position depends on all positions before it, as real keys and values do. So a mistake in paging,
sharing, preemption or prefix caching changes the next token, and comparing with `reference_completion`, which knows no
paging, finds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace

from inference_worker.engine.event import Token
from inference_worker.engine.runner import InFlight, Row, RowOutput, SynchronousRunner
from inference_worker.engine.sequence import Sequence

VOCABULARY = 97


def key_value(previous: int, token_id: int, position: int) -> int:
    """What is kept of a position: like a real key and value, it depends on everything before it."""
    return (previous * 1_003 + token_id * 17 + position + 1) % 1_000_003


def next_token(last: int, seed: int, choice_index: int) -> int:
    return (last * 31 + seed * 7 + choice_index * 3) % 1_000_003 % VOCABULARY


def reference_completion(
    prompt: Rows[int], num_tokens: int, seed: int = 0, choice_index: int = 0
) -> list[int]:
    state = 0
    for position, token_id in enumerate(prompt):
        state = key_value(state, token_id, position)
    completion: list[int] = []
    for position in range(len(prompt), len(prompt) + num_tokens):
        completion.append(next_token(state, seed, choice_index))
        state = key_value(state, completion[-1], position)
    return completion


class HashRunner(SynchronousRunner):
    """Runs rows over paged memory; `before_row` may raise to make a row fail.

    With `runs_ahead` it is a device with a queue: a step is kept, with all that the host says of it at its launch, and
    runs only when it or a later one is collected, long after the host has gone on.
    """

    runs_ahead = False

    def __init__(
        self, num_blocks: int, block_size: int, before_row: Callable[[Row], None] = lambda _: None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.memory: list[int | None] = [None] * (num_blocks * block_size)
        self.num_computed = 0  # tokens, over all steps
        self.batch_sizes: list[int] = []  # tokens of each step
        self.most_in_flight = 0  # steps
        self.is_closed = False
        self._before_row = before_row
        self._queue: deque[QueuedStep] = deque()
        self._latest: dict[Sequence, int] = {}  # token that each row of the latest step drew

    def launch(self, rows: Rows[Row]) -> InFlight:
        if not self.runs_ahead:
            return super().launch(rows)
        step = QueuedStep(self, [QueuedRow.of(row) for row in rows])
        self._queue.append(step)
        self.most_in_flight = max(self.most_in_flight, len(self._queue))
        return step

    def execute(self, rows: Rows[Row]) -> list[RowOutput]:
        return self.run([QueuedRow.of(row) for row in rows])

    def run_queue(self, until: QueuedStep) -> None:
        """Run the steps in the order of their launches, up to this one."""
        while until in self._queue:
            self._queue.popleft().run()

    def close(self) -> None:
        self.is_closed = True

    def run(self, rows: Rows[QueuedRow]) -> list[RowOutput]:
        kinds = [len(queued.token_ids) == 1 and queued.row.start > 0 for queued in rows]
        assert kinds == sorted(kinds, reverse=True), "decode rows come first"
        previous, self._latest = self._latest, {}
        self.batch_sizes.append(sum(len(queued.token_ids) for queued in rows))
        for queued in rows:
            self._before_row(queued.row)
        return [self._run_row(queued, previous) for queued in rows]

    def _run_row(self, queued: QueuedRow, previous: dict[Sequence, int]) -> RowOutput:
        row, sequence = queued.row, queued.row.sequence
        state = 0 if row.start == 0 else self._read(queued, row.start - 1)
        for position, known in enumerate(queued.token_ids, row.start):
            token_id = previous[sequence] if known is None else known
            state = key_value(state, token_id, position)
            self.memory[self._slot(queued, position)] = state
        self.num_computed += row.num_tokens
        scores: tuple[Token, ...] = ()
        if sequence.request.output.prompt_logprobs:
            prompt = sequence.request.prompt
            scores = tuple(map(Token, prompt[row.start + 1 : min(row.stop + 1, len(prompt))]))
        if not row.is_whole:
            return RowOutput(prompt_logprobs=scores)
        last = self._read(queued, row.stop - 1)
        output = self.draw(last, sequence)
        if output.token is not None:
            self._latest[sequence] = output.token.token_id
        return replace(output, prompt_logprobs=scores)

    def draw(self, last: int, sequence: Sequence) -> RowOutput:
        """The next token, from what was kept of the last position."""
        token_id = next_token(last, sequence.request.sampling.seed, sequence.choice_index)
        return RowOutput(Token(token_id))

    def _read(self, queued: QueuedRow, position: int) -> int:
        value = self.memory[self._slot(queued, position)]
        assert value is not None, "read a slot that was never written"
        return value

    def _slot(self, queued: QueuedRow, position: int) -> int:
        block = queued.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size


@dataclass(frozen=True)
class QueuedRow:
    """A row as it was when it was launched."""

    row: Row
    token_ids: list[int | None]  # None: what the step before draws
    block_table: list[int]

    @classmethod
    def of(cls, row: Row) -> QueuedRow:
        sequence = row.sequence
        assert (row.start == len(sequence.token_ids)) == (sequence.num_pending_tokens > 0)
        token_ids: list[int | None] = [*sequence.token_ids[row.start : row.stop]] or [None]
        assert len(token_ids) == row.num_tokens
        return cls(row, token_ids, list(sequence.block_table))


@dataclass(eq=False)
class QueuedStep:
    """A step in the queue, or one that was run."""

    runner: HashRunner
    rows: list[QueuedRow]
    outputs: list[RowOutput] = field(default_factory=list)
    error: Exception | None = None

    def run(self) -> None:
        try:
            self.outputs = self.runner.run(self.rows)
        except Exception as error:
            self.error = error

    def collect(self) -> list[RowOutput]:
        self.runner.run_queue(until=self)
        if self.error is not None:
            raise self.error
        return self.outputs
