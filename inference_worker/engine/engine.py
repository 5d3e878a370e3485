"""The continuous-batching engine: schedules steps, runs them, and turns drawn tokens into events.

Purely synchronous and owned by one thread; `engine_thread` gives it one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from inference_worker.engine.block_pool import BlockPool
from inference_worker.engine.choice_output import ChoiceOutput
from inference_worker.engine.continuation import Continued
from inference_worker.engine.deadlines import Deadlines
from inference_worker.engine.detokenizer import NewDetokenizer
from inference_worker.engine.event import (
    Event,
    Expired,
    Failed,
    Finished,
    FinishReason,
    Interrupted,
    Scheduled,
    Started,
    Token,
)
from inference_worker.engine.live_request import LiveRequest
from inference_worker.engine.load import Load
from inference_worker.engine.observer import Phase
from inference_worker.engine.request import Request
from inference_worker.engine.runner import OutOfMemory, Row, RowOutput, Runner
from inference_worker.engine.scheduler import Scheduler
from inference_worker.engine.sequence import Sequence
from inference_worker.engine.steps import Steps

# How often a sequence may find no memory for a step of its own before its next token: a chunk of 512 tokens is halved
# to one of 1 meanwhile, and a single token tried some times more.
MAX_REFUSALS = 16


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The engine's limits."""

    max_running: int  # sequences in one step
    max_batch_tokens: int  # tokens computed in one step; at least max_running
    context_length: int  # most tokens of a sequence
    # whether different requests share blocks; choices of one request always do
    prefix_cache: bool = True
    prefix_cache_across_keys: bool = False  # whether requests of different keys do, too


class Engine:
    """Runs requests until each choice is finished.

    Every accepted request ends with Failed or with one Finished for each choice, unless its reader gave it up.
    """

    def __init__(
        self, runner: Runner, new_detokenizer: NewDetokenizer, options: EngineOptions
    ) -> None:
        self._runner = runner
        self._steps = Steps(runner)
        self._new_detokenizer = new_detokenizer
        self._options = options
        self._pool = BlockPool(runner.num_blocks, runner.block_size)
        # a sequence that holds every block can go no further
        self._max_tokens = min(options.context_length, runner.num_blocks * runner.block_size)
        self._scheduler = Scheduler(
            self._pool, max_running=options.max_running, max_batch_tokens=options.max_batch_tokens
        )
        self._live: dict[int, LiveRequest] = {}  # by the request's key
        self._deadlines = Deadlines()
        self._events: list[tuple[Request, Event]] = []
        self._num_steps = 0
        self._generated_tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._steps)

    def load(self) -> Load:
        """The state between two steps."""
        return Load(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            free_blocks=self._pool.num_free,
            total_blocks=self._pool.num_blocks,
            block_size=self._pool.block_size,
            steps=self._num_steps,
            generated_tokens=self._generated_tokens,
            preemptions=self._scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
        )

    def take_events(self) -> list[tuple[Request, Event]]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """Verify that no block is lost or owned twice. Raises: AssertionError."""
        self._pool.check(s for live in self._live.values() for s in live.sequences)

    def add(self, request: Request) -> None:
        """Take a request into the queue. A request that cannot even be prepared fails at once."""
        live = self._live[request.key] = LiveRequest(request)
        self._deadlines.add(request, self._live)
        try:
            leader = self._new_sequence(live, is_leader=True)
            cached = min(self._pool.count_cached_tokens(leader), len(request.prompt))
            is_next = leader.num_completion_tokens > 0  # whose reader has read of it already
            position = 0 if is_next else self._scheduler.waiting.position(request.share)
            self._emit(live, Started(len(request.prompt), cached, position))
            self._scheduler.add(leader)
            while self._end_if_complete(live, leader) and live.unbegun:
                leader = self._new_sequence(live, is_leader=True)
                self._scheduler.add(leader)
        except Exception as error:  # in its detokenizer or stop sequences; nobody else's
            self._fail(live, error)

    def cancel(self, request: Request, reason: FinishReason | None) -> None:
        """End a request now and free its blocks; tell its reader if there is a reason. Ended ones are ignored.

        A shutdown gives out nothing that is held back of a request that goes on elsewhere.
        """
        if (live := self._live.get(request.key)) is None:
            return
        if reason is None:
            self._retire(live)
            return
        if reason is FinishReason.SHUTDOWN and request.is_continuable:
            self._fail(live, Interrupted())
            return
        try:
            for sequence in list(live.sequences):
                self._finish(live, sequence, reason)
            while live.unbegun:
                self._emit_finished(live, self._unbegun_footer(live, reason))
        except Exception as error:  # in its text; nobody else's
            self._fail(live, error)

    def phase_of(self, request: Request) -> Phase | None:
        """How far a request came; None if it has ended."""
        live = self._live.get(request.key)
        return None if live is None else live.phase

    def count_drawn(self, request: Request) -> int:
        """Tokens drawn for a request; 0 if it has ended. Any thread may ask."""
        live = self._live.get(request.key)
        return 0 if live is None else live.num_completion_tokens

    def count_pending(self, request: Request) -> int:
        """Tokens that steps in flight draw for a request."""
        live = self._live.get(request.key)
        return 0 if live is None else sum(s.num_pending_tokens for s in live.sequences)

    def cancel_all(self, reason: FinishReason) -> None:
        """End every request."""
        for live in list(self._live.values()):
            self.cancel(live.request, reason)

    def close(self) -> None:
        """Release the model. Nothing follows."""
        self._runner.close()

    def step(self) -> None:
        """Compute one batch. A failing row fails its own request and no other.

        On a runner that runs ahead, a call launches one batch and ends the one that the call before has launched.
        """
        steps = self._steps
        if steps and not (steps.can_run_ahead and not self._scheduler.must_preempt):
            self._collect()
        self._expire()
        rows = self._scheduler.schedule()
        if rows:
            self._note_scheduled(rows)
            steps.launch(rows)
        elif not steps:
            self._finish_impossible()
        most_in_flight = 1 if rows and self._runner.runs_ahead else 0
        while len(steps) > most_in_flight:
            self._collect()

    def _expire(self) -> None:
        """End the requests whose deadline has passed: none of them takes part in a step that begins after it."""
        for key in self._deadlines.pop_passed(time.monotonic()):
            if (live := self._live.get(key)) is None:
                continue
            if live.has_tokens:
                self.cancel(live.request, FinishReason.DEADLINE)
            else:
                self._fail(live, Expired())

    def _collect(self) -> None:
        """End the oldest step in flight."""
        outputs = self._steps.collect()
        self._num_steps += 1
        for row, output in outputs:
            live = self._live.get(row.sequence.request.key)
            if live is None:  # failed by a sibling in this very step
                continue
            if isinstance(output.error, OutOfMemory):
                self._retry_smaller(live, row)
                continue
            if output.error is not None:
                self._fail(live, output.error)
                continue
            try:
                self._advance(live, row, output)
            except Exception as error:  # the batch's other rows have nothing to do with it
                self._fail(live, error)

    def _new_sequence(self, live: LiveRequest, *, is_leader: bool) -> Sequence:
        """The next choice that had none."""
        request = live.request
        choice_index = live.unbegun[0]
        continued = request.continuation.continued.get(choice_index)
        if continued is None:
            detokenizer = self._new_detokenizer(at_start=request.output.echo)
            output = ChoiceOutput(choice_index, detokenizer, live.stop_strings)
            continued = Continued(token_ids=(), num_echoed=0, output=output)
        grammar = continued.grammar
        if grammar is None and request.grammar is not None:
            grammar = request.grammar.start(request.stopping.stop_token_ids)
        sequence = Sequence(
            request=request,
            choice_index=choice_index,
            output=continued.output,
            token_ids=[*request.prompt, *continued.token_ids],
            max_tokens=min(len(request.prompt) + request.stopping.max_tokens, self._max_tokens),
            is_leader=is_leader,
            num_echoed=continued.num_echoed,
            grammar=grammar,
            cache_salt=self._cache_salt(request),
        )
        live.unbegun.popleft()
        live.sequences.append(sequence)
        return sequence

    def _cache_salt(self, request: Request) -> bytes:
        """The same for those who may find each other's prompts in the cache."""
        if not self._options.prefix_cache:
            return request.key.to_bytes(8, "little")
        return b"" if self._options.prefix_cache_across_keys else request.share.key_id.encode()

    def _end_if_complete(self, live: LiveRequest, sequence: Sequence) -> bool:
        """End a new choice that another engine brought to its last token but not to its footer."""
        if sequence.num_completion_tokens == 0 or not (sequence.is_spoken or sequence.is_full):
            return False
        reason = FinishReason.STOP if sequence.is_spoken else FinishReason.LENGTH
        self._finish(live, sequence, reason)
        return True

    def _note_scheduled(self, rows: Iterable[Row]) -> None:
        now = time.monotonic()
        for row in rows:
            live = self._live[row.sequence.request.key]
            if live.scheduled_at is None:
                live.scheduled_at = now
                live.num_cached_tokens = min(row.start, len(live.request.prompt))
                self._prompt_tokens += len(live.request.prompt)
                self._cached_tokens += live.num_cached_tokens
                self._emit(live, Scheduled(len(row.sequence.token_ids) - row.start))

    def _advance(self, live: LiveRequest, row: Row, output: RowOutput) -> None:
        sequence = row.sequence
        self._pool.publish(sequence, row.start, row.stop)
        if output.prompt_logprobs:
            live.add_prompt_scores(row.start, output.prompt_logprobs)
        if output.token is None:
            return
        sequence.num_times_refused = 0
        if not sequence.has_drawn:
            self._begin_completion(live, sequence)
        if live.request.stopping.max_tokens == 0:
            self._finish(live, sequence, FinishReason.LENGTH)
        else:
            self._append(live, sequence, output.token)

    def _begin_completion(self, live: LiveRequest, sequence: Sequence) -> None:
        """The prompt is computed: echo it, and let the other choices share it."""
        sequence.has_drawn = True
        if live.first_token_at is None:
            live.first_token_at = time.monotonic()
        if live.request.output.echo and sequence.num_echoed < sequence.num_prompt_tokens:
            for delta in sequence.output.echo(live.prompt_tokens(), sequence.num_echoed):
                self._emit(live, delta)
        if sequence.is_leader and live.unbegun:
            siblings = [self._new_sequence(live, is_leader=False) for _ in tuple(live.unbegun)]
            self._scheduler.add_siblings(siblings)
            for sibling in siblings:
                self._end_if_complete(live, sibling)

    def _append(self, live: LiveRequest, sequence: Sequence, token: Token) -> None:
        """Add a drawn token, and end the choice if it is the last."""
        sequence.token_ids.append(token.token_id)
        live.num_completion_tokens += 1
        self._generated_tokens += 1
        stopping = live.request.stopping
        if token.token_id in stopping.stop_token_ids:
            self._finish(live, sequence, FinishReason.STOP, stop_token=token)
            return
        if sequence.grammar is not None:
            sequence.grammar.accept(token.token_id)
        sequence.output.push(token)
        if sequence.output.stop_sequence is not None:
            self._finish(live, sequence, FinishReason.STOP_SEQUENCE)
        elif sequence.is_spoken:
            self._finish(live, sequence, FinishReason.STOP)
        elif sequence.is_full:
            self._finish(live, sequence, FinishReason.LENGTH)
        elif (delta := sequence.output.take()) is not None:
            self._emit(live, delta)

    def _finish(
        self,
        live: LiveRequest,
        sequence: Sequence,
        reason: FinishReason,
        stop_token: Token | None = None,
    ) -> None:
        """End one choice: the rest of its text, its footer, and its blocks."""
        sequence.output.flush()
        if (delta := sequence.output.take()) is not None:
            self._emit(live, delta)
        stop_sequence = sequence.output.stop_sequence
        if stop_sequence is not None:  # it may have come with the flushed rest
            reason = FinishReason.STOP_SEQUENCE
        live.sequences.remove(sequence)
        self._scheduler.finish(sequence)
        ending = () if stop_token is None else (stop_token,)
        footer = Finished(
            sequence.choice_index,
            reason,
            stop_sequence,
            None if stop_token is None else stop_token.token_id,
            completion_tokens=sequence.num_completion_tokens,
            withheld=sequence.output.withheld + ending,
        )
        self._emit_finished(live, footer)

    def _unbegun_footer(self, live: LiveRequest, reason: FinishReason) -> Finished:
        """The footer of the next choice that had no sequence; what was delivered of it before counts."""
        choice_index = live.unbegun.popleft()
        continued = live.request.continuation.continued.get(choice_index)
        brought = 0 if continued is None else len(continued.token_ids)
        return Finished(choice_index, reason, completion_tokens=brought)

    def _emit_finished(self, live: LiveRequest, footer: Finished) -> None:
        live.num_choices_left -= 1
        if live.num_choices_left == 0:
            footer = replace(footer, usage=live.usage(), timings=live.timings())
            del self._live[live.request.key]
        self._emit(live, footer)

    def _retry_smaller(self, live: LiveRequest, row: Row) -> None:
        """The device lacks memory for this row even alone: let it wait, and take half of it next time.

        A row that is refused too often ends its request, with what it has, as one that could not come back.
        """
        sequence = row.sequence
        sequence.num_times_refused += 1
        if (
            row.num_tokens > 1
        ):  # a single token tells nothing of chunks, in which it is computed again
            sequence.most_tokens_of_step = row.num_tokens // 2
        if sequence.num_times_refused >= MAX_REFUSALS:
            self.cancel(live.request, FinishReason.PREEMPTED)
        else:
            self._scheduler.preempt(sequence)

    def _finish_impossible(self) -> None:
        """Nothing runs and the first in the queue does not fit an empty cache: it cannot go on."""
        if self._scheduler.waiting:
            self.cancel(self._scheduler.waiting.first().request, FinishReason.PREEMPTED)

    def _fail(self, live: LiveRequest, error: Exception) -> None:
        self._retire(live)
        self._emit(live, Failed(error))

    def _retire(self, live: LiveRequest) -> None:
        for sequence in live.sequences:
            self._scheduler.finish(sequence)
        live.sequences.clear()
        del self._live[live.request.key]

    def _emit(self, live: LiveRequest, event: Event) -> None:
        self._events.append((live.request, event))
