"""One server under one load: who asks when, and what came of it."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.served_answer import Objective, ServedAnswer, read
from benchmarks.sse_client import Answer, Endpoint, exchange
from benchmarks.table import percentile

_WORDS: Final = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "thing",
    "life",
    "child",
    "world",
    "school",
)
_ASK_SECONDS: Final = 30.0
CHAT, _COMPLETIONS = "chat", "completions"
PATHS: Final = {CHAT: "/chat/completions", _COMPLETIONS: "/completions"}


@dataclass(frozen=True)
class Load:
    """How requests come: from so many readers, or so many a second."""

    readers: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.readers} at once" if self.readers else f"{self.rate:g}/s"


@dataclass(frozen=True)
class Plan:
    """What to send."""

    urls: tuple[str, ...]
    loads: tuple[Load, ...]
    names: tuple[str, ...] = ()
    requests: int = 32  # at least, of one measurement
    repetitions: int = 3
    api: str = CHAT
    model: str | None = None
    key: str | None = None
    prompt_words: int = 48
    prompts: tuple[str, ...] = ()
    max_tokens: int = 128
    extra: dict[str, Any] = field(default_factory=dict)
    asks_usage: bool = True
    timeout_seconds: float = 300.0
    objective: Objective = field(default_factory=Objective)
    seed: int = 0


@dataclass(frozen=True)
class Measurement:
    """One server under one load."""

    answers: list[ServedAnswer]
    objective: Objective
    client_share: float  # of a core, taken by this process

    @property
    def good(self) -> list[ServedAnswer]:
        """Those that are no failures."""
        return [answer for answer in self.answers if answer.failure is None]

    @property
    def seconds(self) -> float:
        first = min(answer.began_at for answer in self.answers)
        return max(answer.ended_at for answer in self.answers) - first

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.tokens for answer in self.good) / self.seconds

    @property
    def goodput(self) -> float:
        """Answers a second that meet the objective."""
        return sum(answer.meets(self.objective) for answer in self.answers) / self.seconds

    @property
    def failures(self) -> Counter[str]:
        return Counter(answer.failure for answer in self.answers if answer.failure is not None)

    def first_token_ms(self, share: float) -> float:
        """A percentile."""
        return _percentile_ms([answer.time_to_first_token for answer in self.good], share)

    def gap_ms(self, share: float) -> float:
        """A percentile."""
        return _percentile_ms([gap for answer in self.good for gap in answer.gaps], share)

    def summary(self) -> dict[str, Any]:
        """All figures, for a program."""
        return {
            "requests": len(self.answers),
            "failures": dict(self.failures),
            "seconds": self.seconds,
            "tokens": sum(answer.tokens for answer in self.good),
            "tokens_counted_by": "usage" if all(a.is_counted for a in self.good) else "events",
            "tokens_per_second": self.tokens_per_second,
            "first_token_ms": {p: self.first_token_ms(p) for p in (50, 90, 99)},
            "gap_ms": {p: self.gap_ms(p) for p in (50, 90, 99)},
            "goodput_per_second": self.goodput,
            "client_share_of_a_core": self.client_share,
        }


def _percentile_ms(seconds: Sequence[float], share: float) -> float:
    return percentile(seconds, share) * 1e3 if seconds else float("nan")


class Sender:
    """Sends a plan's requests to one server."""

    def __init__(self, plan: Plan, url: str, model: str) -> None:
        self._plan = plan
        self._endpoint = Endpoint(url)
        self._model = model

    async def measure(self, load: Load, round_number: int) -> Measurement:
        """One measurement; all servers get the same prompts in a round."""
        draws = random.Random(f"{self._plan.seed} {round_number} {load}")
        count = max(self._plan.requests, load.readers or 0)
        requests = [self._request(draws) for _ in range(count)]
        gc.collect()
        gc.disable()
        try:
            cpu, wall = time.process_time(), time.perf_counter()
            if load.rate is not None:
                answers = await self._send_at(requests, load.rate, draws)
            else:
                answers = await self._send_by_readers(requests, load.readers or 1)
            share = (time.process_time() - cpu) / (time.perf_counter() - wall)
        finally:
            gc.enable()
        return Measurement([read(answer) for answer in answers], self._plan.objective, share)

    def _request(self, draws: random.Random) -> bytes:
        plan = self._plan
        if plan.prompts:
            prompt = draws.choice(plan.prompts)
        else:
            # the number at the beginning makes it another prompt than any before
            words = (draws.choice(_WORDS) for _ in range(max(0, plan.prompt_words - 1)))
            prompt = " ".join([str(draws.randrange(10**9)), *words])
        content = (
            {"messages": [{"role": "user", "content": prompt}]}
            if plan.api == CHAT
            else {"prompt": prompt}
        )
        body: dict[str, Any] = {
            "model": self._model,
            **content,
            "max_tokens": plan.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        if plan.asks_usage:
            body["stream_options"] = {"include_usage": True}
        data = json.dumps({**body, **plan.extra}).encode()
        return self._endpoint.request("POST", PATHS[plan.api], plan.key, data)

    async def _send_by_readers(self, requests: list[bytes], readers: int) -> list[Answer]:
        answers: list[Answer] = []
        waiting = iter(requests)

        async def reader() -> None:
            while (request := next(waiting, None)) is not None:  # each takes the next one
                answers.append(await self._send(request))

        await asyncio.gather(*(reader() for _ in range(readers)))
        return answers

    async def _send_at(
        self, requests: list[bytes], rate: float, draws: random.Random
    ) -> list[Answer]:
        async def later(request: bytes, seconds: float) -> Answer:
            await asyncio.sleep(seconds)
            return await self._send(request)

        moments: list[float] = []
        for _ in requests:
            moments.append((moments[-1] if moments else 0.0) + draws.expovariate(rate))
        return await asyncio.gather(*map(later, requests, moments))

    async def _send(self, request: bytes) -> Answer:
        return await exchange(self._endpoint, request, self._plan.timeout_seconds)


class NoServer(Exception):
    """A server that does not say which models it has."""


async def first_model(endpoint: Endpoint, key: str | None) -> str:
    """The first model that a server lists. Raises: NoServer."""
    answer = await exchange(endpoint, endpoint.request("GET", "/models", key), _ASK_SECONDS)
    try:
        [(_moment, models), *_rest] = answer.chunks()
        name: str = models["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        reason = answer.failure or "no list of models"
        raise NoServer(
            f"{endpoint.url}/models: {reason}; is it up? Name the model with --model"
        ) from error
    return name
