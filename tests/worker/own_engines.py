"""Engines that a user could bring, good and bad; tests name them as module:factory."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from inference_worker.own_engine.protocol import (
    Candidate,
    EngineCard,
    EngineRequest,
    Feature,
    Piece,
    SamplingParams,
    Token,
)
from inference_worker.settings import WorkerSettings

EOS = 2


class Obedient:
    """Does what the prompt says; its log tells what reached it."""

    honours: frozenset[Feature] = frozenset({"temperature", "seed", "logprobs", "ignore_eos"})

    def __init__(self) -> None:
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.ended: list[tuple[str, int]] = []  # generators that are gone: request id, choice index
        self.is_closed = False
        self.closes_badly = False
        self.bad_end: type[BaseException] = RuntimeError
        self.may_go_on = threading.Event()

    async def initialize(self, settings: WorkerSettings) -> EngineCard:
        self.settings = settings
        return EngineCard(
            context_length=256,
            eos_token_ids=frozenset({EOS}),
            honours=self.honours,
            default_sampling=SamplingParams(temperature=0.25),
            architecture="Obedience",
            dtype="int1",
            device="abacus",
            parameter_count=3,
        )

    async def generate(self, request: EngineRequest) -> AsyncIterator[Piece]:
        self.requests.append(request)
        command, _, rest = request.prompt.partition(" ")
        try:
            async for piece in getattr(self, f"_{command}")(request, rest):
                yield piece
        finally:
            self.ended.append((request.request_id, request.choice_index))

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if request_id.startswith("bad-abort"):
            raise self.bad_end("secret of abort")

    async def close(self) -> None:
        self.is_closed = True
        if self.closes_badly:
            raise self.bad_end("secret of close")

    async def _say(self, _: EngineRequest, text: str) -> AsyncIterator[Piece]:
        for word in text.split(" "):
            yield word + " "

    async def _ids(self, _: EngineRequest, ids: str) -> AsyncIterator[Piece]:
        for number in ids.split():
            await asyncio.sleep(0)
            yield int(number)

    async def _score(self, request: EngineRequest, _: str) -> AsyncIterator[Piece]:
        for token_id in (70, 71):
            top = tuple(Candidate(i, -float(i)) for i in range(5))  # more than anybody wants
            yield Token(token_id, -0.5, top)

    async def _endless(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        while True:
            await asyncio.sleep(0.002)
            yield "la "

    async def _slow(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        while True:
            await asyncio.sleep(0.05)
            yield "la "

    async def _spin(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        while True:
            yield 70

    async def _stubborn(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        while True:
            try:
                await asyncio.sleep(0.002)
            except asyncio.CancelledError:
                continue
            yield "no "

    async def _quitting(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        yield "so far "
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    async def _silent(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        await asyncio.Event().wait()
        yield "never"

    async def _block(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        self.may_go_on.wait()  # what one should not do
        yield "done"

    async def _hang(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        yield "so far "
        threading.Event().wait()

    async def _deaf(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        yield "so far "
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    async def _raise(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        yield "so far "
        raise RuntimeError("secret of generate")

    async def _exit(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        yield "so far "
        sys.exit("secret of exit")

    async def _cancel(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        yield "so far "
        raise asyncio.CancelledError("secret of cancel")

    async def _nonsense(self, _: EngineRequest, what: str) -> AsyncIterator[Piece]:
        yield "so far "
        yield {"float": 1.5, "large": 10**6, "negative": -1, "bool": True, "none": None}[what]  # type: ignore[misc]

    async def _collapse(self, _: EngineRequest, __: str) -> AsyncIterator[Piece]:
        yield "so far "
        asyncio.get_running_loop().call_soon(sys.exit, "the loop is gone")
        await asyncio.sleep(60)


class Watched(Obedient):
    """Writes down, in the file that --model-name names, what reached it."""

    async def abort(self, request_id: str) -> None:
        await super().abort(request_id)
        self._note(f"abort {request_id}")

    async def close(self) -> None:
        self._note(f"ended {len(self.ended)}")
        self._note("close")

    def _note(self, line: str) -> None:
        with Path(self.settings.served_name).open("a") as file:
            file.write(line + "\n")


class Failing(Obedient):
    async def initialize(self, settings: WorkerSettings) -> EngineCard:
        raise RuntimeError("no weights\nat all")


class Leaving(Obedient):
    async def initialize(self, settings: WorkerSettings) -> EngineCard:
        sys.exit(3)


class Cardless(Obedient):
    async def initialize(self, settings: WorkerSettings) -> EngineCard:
        return {"context_length": 12}  # type: ignore[return-value]


class Boastful(Obedient):
    honours = frozenset({"temprature"})  # type: ignore[arg-type]


class Hanging(Obedient):
    """Blocks for ever, as code does that waits for a device or a network that is not there."""

    async def initialize(self, settings: WorkerSettings) -> EngineCard:
        threading.Event().wait()
        raise AssertionError


class Endless(Obedient):
    """Its model has no end-of-sequence token."""

    async def initialize(self, settings: WorkerSettings) -> EngineCard:
        return EngineCard(context_length=12, eos_token_ids=frozenset({None}))  # type: ignore[arg-type]


class Shapeless(Obedient):
    """Its model's config does not say how long a context may be."""

    async def initialize(self, settings: WorkerSettings) -> EngineCard:
        return EngineCard(context_length=None)  # type: ignore[arg-type]


class Listing(Obedient):
    honours = ["seed"]  # type: ignore[assignment]  # noqa: RUF012


class Blocking(Obedient):
    def initialize(self, settings: WorkerSettings) -> EngineCard:  # type: ignore[override]
        return EngineCard(context_length=12)


class Awaiting(Obedient):
    async def generate(self, request: EngineRequest) -> list[int]:  # type: ignore[override]
        return [1]


class Clumsy:
    def __init__(self) -> None:
        raise ValueError("cannot even be made")


A_NUMBER = 12


def make_dict() -> dict[str, int]:
    return {"generate": 1}
