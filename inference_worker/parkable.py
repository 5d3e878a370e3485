"""A generation that may stop while nobody reads: what it has given so far, and how to get the rest."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Protocol

from inference_worker.deadline import deadline_of, write_timeout
from inference_worker.delivered_choices import DeliveredChoices
from inference_worker.engine.event import FinishReason
from inference_worker.registry import Registry
from protos.sluice.v1 import generation_pb2 as pb

Messages = AsyncGenerator[pb.GenerateResponse, None]


class Generate(Protocol):
    """Runs a request, or the rest of it. The deadline is its call's, in time.monotonic's seconds."""

    def __call__(
        self,
        message: pb.GenerateRequest,
        deadline: float | None,
        parkable: Parkable | None,
        /,
    ) -> Messages:
        """Its messages."""
        ...


class Part(Protocol):
    """One part of it, while it runs."""

    @property
    def is_ending(self) -> bool:
        """Whether it was told to end, so that its last messages are about to come."""
        ...


class Parkable:
    """One request, generated in as many parts as it takes. Used from the event loop only.

    Between two parts it is parked: it has nothing in the engine and no place in admission, but keeps its id. The next
    part goes on after the messages that were taken. All that is kept of the earlier ones is their sum.
    """

    def __init__(
        self,
        request: pb.GenerateRequest,
        call_deadline: float | None,
        generate: Generate,
        registry: Registry,
    ) -> None:
        """`call_deadline` is that of the call that begins it. Raises: InvalidField, for its timeout."""
        self._request = pb.GenerateRequest()
        self._request.CopyFrom(request)
        self._call_deadline = call_deadline  # of the first part
        self._deadline = deadline_of(request, call_deadline, time.monotonic())
        self._seconds_left: float | None = None  # while parked; the clock stands still then
        self._generate = generate
        self._registry = registry
        self._given = DeliveredChoices(request.continuation.choices)
        self._started: pb.Started | None = None
        self._part: Part | None = None  # the one that runs
        self._is_whole = False  # all of its messages were given
        self.on_end: Callable[[FinishReason], bool] = lambda _: False  # of a parked one

    @property
    def is_begun(self) -> bool:
        """Whether its header was given."""
        return self._started is not None

    @property
    def has_tokens(self) -> bool:
        """Whether any were given."""
        return self._given.has_tokens

    @property
    def num_bytes(self) -> int:
        """About what it takes besides the request."""
        return self._given.num_bytes

    @property
    def can_park(self) -> bool:
        """Whether there is a rest to come back for. One that was told to end gives its last messages instead."""
        is_ending = self._part is not None and self._part.is_ending
        return self.is_begun and not self._is_whole and not is_ending

    @property
    def is_late(self) -> bool:
        """Whether it was parked when its time was over."""
        return self._seconds_left == 0.0

    @property
    def seconds_left(self) -> float | None:
        """Until its deadline, as far as its clock goes. None: it has no deadline."""
        if self._deadline is None or self._seconds_left is not None:
            return self._seconds_left
        return max(0.0, self._deadline - time.monotonic())

    def messages(self) -> Messages:
        """The first part, or what is left, with a header of its own. Raises, once iterated: SluiceError."""
        if self._started is not None:
            self._continue(self._started)
        return self._generate(self._request, self._call_deadline, self)

    def run(self, part: Part) -> None:
        """It was admitted, as this, which has read the request."""
        self._part = part
        self._request.ClearField("continuation")  # the sum has it

    def take(self, message: pb.GenerateResponse) -> None:
        """Count a message as given; a later part's header is none."""
        match message.WhichOneof("event"):
            case "started":
                self._started = pb.Started()
                self._started.CopyFrom(message.started)
                self._request.request_id = message.started.request_id
            case "finished":
                self._is_whole = message.finished.HasField("usage")
            case _:
                pass
        self._given.add(message)

    def park(self) -> None:
        """Stop the clock, and keep the id. Whoever reads `messages` leaves them."""
        self._part = None
        self._request.ClearField("continuation")  # of a part that found no place
        if self._deadline is not None:
            self._seconds_left = max(0.0, self._deadline - time.monotonic())
        request = self._request
        self._registry.park(request.request_id, self, request.caller.key_id)

    def forget(self) -> None:
        """It does not go on, and keeps nothing for it."""
        self._registry.forget_parked(self._request.request_id, self)
        self._part = None
        self._request = pb.GenerateRequest()  # not cleared: its last part may still be at it
        self._given = DeliveredChoices()

    def end(self, reason: FinishReason) -> bool:
        """End it while it is parked. False: it is not."""
        return self.on_end(reason)

    def footers(self, reason: FinishReason) -> Iterator[pb.GenerateResponse]:
        """The last messages of one that does not go on."""
        started = self._started or pb.Started()
        given = {choice.choice_index: choice for choice in self._given}
        nothing = pb.DeliveredChoice()
        num_tokens = [
            choice.completion_tokens or len(choice.token_ids)
            for choice in (given.get(index, nothing) for index in range(started.n))
        ]
        running = [
            index
            for index in range(started.n)
            if not given.get(index, nothing).HasField("completion_tokens")
        ]
        for index in running:
            message = pb.GenerateResponse()
            finished = message.finished
            finished.choice_index = index
            finished.finish_reason = pb.FinishReason.Value(f"FINISH_REASON_{reason.name}")
            finished.completion_tokens = num_tokens[index]
            if index == running[-1]:
                finished.usage.prompt_tokens = started.prompt_tokens
                finished.usage.cached_tokens = started.cached_tokens
                finished.usage.completion_tokens = sum(num_tokens)
                finished.timings.SetInParent()
            yield message

    def _continue(self, started: pb.Started) -> None:
        """Make the request one for what is missing, and let the clock go on. What was resolved for it still holds."""
        request = self._request
        request.request_id = started.request_id
        request.sampling.CopyFrom(started.sampling)
        request.stopping.max_tokens = started.max_tokens
        request.n = started.n
        request.continuation.Clear()
        request.continuation.choices.extend(self._given)
        request.continuation.SetInParent()
        self._call_deadline = None
        if self._seconds_left is not None:
            write_timeout(request, self._seconds_left)
            self._deadline = time.monotonic() + self._seconds_left
            self._seconds_left = None
