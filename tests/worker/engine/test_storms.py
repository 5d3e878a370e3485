"""Any sequence of add, step, cancel and failure on the engine, in too little memory."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inference_worker.engine.event import Event, FinishReason
from inference_worker.engine.request import Request
from inference_worker.engine.runner import Row
from tests.worker.engine.engines import assert_idle, completion, make_engine, make_request
from tests.worker.engine.hash_runner import VOCABULARY, HashRunner, reference_completion


class EngineMachine(RuleBasedStateMachine):
    """Any sequence of add, step and cancel, in too little memory: no block is lost, every output is right."""

    runs_ahead = False

    def __init__(self) -> None:
        super().__init__()
        runner = HashRunner(12, 4, before_row=self.fail_if_bad)
        runner.runs_ahead = self.runs_ahead
        self.engine = make_engine(runner, max_running=3, max_batch_tokens=7)
        self.bad: set[str] = set()
        self.requests: dict[str, Request] = {}
        self.events: dict[str, list[Event]] = defaultdict(list)
        self.cancelled: set[str] = set()

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=20),
        max_tokens=st.integers(1, 20),
        n=st.integers(1, 3),
        seed=st.integers(0, 3),
        stop=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=20),
        has_penalties=st.booleans(),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        n: int,
        seed: int,
        stop: frozenset[int],
        has_penalties: bool,
    ) -> None:
        request = make_request(
            f"r{len(self.requests)}",
            prompt,
            max_tokens,
            n=n,
            seed=seed,
            stop_token_ids=stop,
            frequency_penalty=float(has_penalties),
        )
        self.requests[request.request_id] = request
        self.engine.add(request)

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
        self.collect()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), reason=st.sampled_from([None, FinishReason.CANCELLED]))
    def cancel(self, data: st.DataObject, reason: FinishReason | None) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.engine.cancel(self.requests[request_id], reason)
        self.cancelled.add(request_id)
        self.collect()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.bad.add(data.draw(st.sampled_from(sorted(self.requests))))

    def fail_if_bad(self, row: Row) -> None:
        if row.sequence.request.request_id in self.bad:
            raise ArithmeticError("boom")

    @invariant()
    def no_block_is_lost(self) -> None:
        self.engine.check()

    def collect(self) -> None:
        for request, event in self.engine.take_events():
            self.events[request.request_id].append(event)

    def teardown(self) -> None:
        while self.engine.has_work:
            self.engine.step()
            self.engine.check()
        self.collect()
        assert_idle(self.engine)
        for request_id, request in self.requests.items():
            may_be_cut = request_id in self.cancelled | self.bad
            self.check_output(request, self.events[request_id], may_be_cut)

    @staticmethod
    def check_output(request: Request, events: list[Event], may_be_cut: bool) -> None:
        for choice_index in range(request.n):
            got = completion(events, choice_index)
            expected = reference_completion(
                request.prompt, request.stopping.max_tokens, request.sampling.seed, choice_index
            )
            ends = [i for i, x in enumerate(expected) if x in request.stopping.stop_token_ids]
            expected = expected[: ends[0]] if ends else expected
            assert got == expected[: len(got)]
            assert may_be_cut or len(got) == len(expected)


class RunningAheadMachine(EngineMachine):
    """The same with a step in flight while the host goes on."""

    runs_ahead = True


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRunningAheadMachine = RunningAheadMachine.TestCase
TestRunningAheadMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
