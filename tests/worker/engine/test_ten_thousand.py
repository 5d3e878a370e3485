"""Ten thousand requests of every kind through a small engine: checked all the way, and nothing is left at the end."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

import pytest

from inference_worker.engine.choice_output import ChoiceOutput
from inference_worker.engine.continuation import Continuation, Delivered, continue_choice
from inference_worker.engine.event import Delta, Event, Failed, FinishReason
from inference_worker.engine.request import OutputParams, Request, SamplingParams, StoppingParams
from inference_worker.engine.runner import OutOfMemory, Row
from tests.worker.engine.engines import (
    assert_idle,
    completion,
    footers,
    make_engine,
    new_detokenizer,
)
from tests.worker.engine.hash_runner import HashRunner, reference_completion

NUM_REQUESTS = 10_000  # half of them on each kind of runner
SYSTEM_PROMPTS = [[i] * 9 for i in range(4)]  # beginnings that requests share


@dataclass
class Storm:
    """Adds, cancels and fails requests at random, faster than they are served."""

    rng: random.Random
    runs_ahead: bool
    requests: dict[int, Request] = field(default_factory=dict)  # those that still run, by key
    events: dict[int, list[Event]] = field(default_factory=lambda: defaultdict(list))
    cut: set[int] = field(default_factory=set)  # cancelled
    bad: set[int] = field(default_factory=set)  # fail at some row
    ends: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    num_added: int = 0

    def __post_init__(self) -> None:
        runner = HashRunner(16, 4, before_row=self.before_row)
        runner.runs_ahead = self.runs_ahead
        self.engine = make_engine(runner, max_running=6, max_batch_tokens=24)

    def before_row(self, row: Row) -> None:
        if row.sequence.request.key in self.bad and self.rng.random() < 0.3:
            raise ArithmeticError("boom")
        if self.rng.random() < (0.6 if row.sequence.request.key % 10 == 0 else 0.01):
            raise OutOfMemory

    def run(self, num_requests: int) -> None:
        while self.num_added < num_requests:
            while self.num_added < num_requests and len(self.requests) < 10:
                self.add()
            if self.rng.random() < 0.2:
                self.cancel()
            self.step()
        while self.engine.has_work:
            self.step()
        assert not self.requests
        assert_idle(self.engine)

    def step(self) -> None:
        self.engine.step()
        self.engine.check()
        self.collect()

    def add(self) -> None:
        request = self.make_request()
        self.num_added += 1
        self.requests[request.key] = request
        if self.rng.random() < 0.03:
            self.bad.add(request.key)
        self.engine.add(request)
        self.collect()

    def cancel(self) -> None:
        request = self.rng.choice(list(self.requests.values()))
        reason = self.rng.choice([None, FinishReason.CANCELLED])
        self.cut.add(request.key)
        self.engine.cancel(request, reason)
        self.engine.check()
        self.collect()
        if reason is None and request.key in self.requests:
            self.end(request.key)

    def make_request(self) -> Request:
        rng = self.rng
        prompt = [*rng.choice(SYSTEM_PROMPTS), *rng.choices(range(3), k=rng.randint(0, 8))]
        echo = rng.random() < 0.1
        n = rng.choice([1, 1, 1, 2, 3])
        max_tokens = rng.randint(1, 12)
        seed = rng.randint(0, 5)
        output = OutputParams(
            logprobs=0 if echo else None, echo=echo, prompt_logprobs=echo and rng.random() < 0.5
        )
        return Request(
            request_id="r",
            prompt=tuple(prompt),
            stopping=StoppingParams(max_tokens),
            sampling=SamplingParams(seed=seed, frequency_penalty=rng.choice([0, 0, 0.5])),
            output=output,
            n=n,
            continuation=self.make_continuation(prompt, max_tokens, seed, n, echo)
            if rng.random() < 0.15
            else Continuation(),
        )

    def make_continuation(
        self, prompt: list[int], max_tokens: int, seed: int, n: int, echo: bool
    ) -> Continuation:
        """Some choices over, some begun, some not, at least one to go on."""
        continued = {}
        finished = {i: max_tokens for i in range(1, n) if self.rng.random() < 0.3}
        for index in range(n):
            if index in finished or self.rng.random() < 0.3:
                continue
            tokens = reference_completion(prompt, self.rng.randint(0, max_tokens), seed, index)
            delivered = Delivered(tuple(tokens), num_echoed=len(prompt) if echo else 0)
            output = ChoiceOutput(index, new_detokenizer(), ())
            continued[index] = continue_choice(output, delivered, prompt, is_echoed=echo)
        return Continuation(continued, finished)

    def collect(self) -> None:
        for request, event in self.engine.take_events():
            events = self.events[request.key]
            events.append(event)
            if isinstance(event, Failed) or (footers([event]) and footers([event])[0].usage):
                self.end(request.key)

    def end(self, key: int) -> None:
        request, events = self.requests.pop(key), self.events.pop(key, [])
        reasons = {footer.reason for footer in footers(events)}
        has_failed = any(isinstance(event, Failed) for event in events)
        assert not has_failed or key in self.bad
        is_cut = has_failed or key in self.cut or FinishReason.PREEMPTED in reasons
        self.ends["cut" if is_cut else "whole"] += 1
        for index in range(request.n):
            if index not in request.continuation.finished:
                self.check_choice(request, index, events, is_cut)

    @staticmethod
    def check_choice(request: Request, index: int, events: list[Event], is_cut: bool) -> None:
        """A whole choice is the reference's; one that was cut is a beginning of it."""
        continued = request.continuation.continued.get(index)
        before = [] if continued is None else list(continued.token_ids)
        got = before + completion(events, index)
        expected = reference_completion(
            request.prompt, request.stopping.max_tokens, request.sampling.seed, index
        )
        assert got == expected[: len(got)]
        assert is_cut or len(got) == len(expected)
        if request.output.echo and not is_cut and (continued is None or not continued.num_echoed):
            echoed = [
                token.token_id
                for event in events
                if isinstance(event, Delta) and event.is_prompt and event.choice_index == index
                for token in event.tokens
            ]
            assert echoed == list(request.prompt)


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["step by step", "running ahead"])
def test_ten_thousand_requests_lose_no_block(runs_ahead: bool) -> None:
    storm = Storm(random.Random(7), runs_ahead)
    storm.run(NUM_REQUESTS // 2)
    assert sum(storm.ends.values()) == NUM_REQUESTS // 2
    assert storm.engine.load().preemptions > 100
    assert storm.ends["whole"] > NUM_REQUESTS // 4
    assert storm.ends["cut"] > 100
