"""What a long conversation costs: the time to the first token of each turn, with the prefix cache on and off.

`python -m benchmarks.multi_turn` starts two stacks of worker and edge with the same model, which differ in
`--prefix-cache` alone. One reader talks with both in turns, over HTTP: every turn sends the whole conversation so far
and a new message. With the cache a worker has to compute only what is new since the last turn; `Cached` is what the
answer's usage says of it (`prompt_tokens_details.cached_tokens`). Every conversation begins with words of its own.

The model is a Llama of random weights (random_llama.py) unless another is named. Its answers are short here: its text
is noise, which its tokenizer may split otherwise when it comes back, and from there on nothing is cached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.processes import running_edge, running_worker
from benchmarks.random_llama import write_random_llama
from benchmarks.report import Report
from benchmarks.served_answer import ServedAnswer, read
from benchmarks.sse_client import Endpoint, exchange
from benchmarks.table import Table, spread

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
_TIMEOUT_SECONDS: Final = 60.0
_STATES: Final = {"on": "true", "off": "false"}


class TurnFailed(Exception):
    """A turn without a whole answer."""


@dataclass(frozen=True)
class Plan:
    """What to run."""

    model: str | None = None
    turns: int = 5
    words: int = 60  # of a message
    answer_tokens: int = 8
    repetitions: int = 5


Conversation = list[ServedAnswer]  # by turn


@contextlib.contextmanager
def stacks(model: str | None) -> Iterator[dict[str, Endpoint]]:
    """A server for each state of the prefix cache."""
    with contextlib.ExitStack() as stack:
        if model is None:
            model = stack.enter_context(tempfile.TemporaryDirectory())
            write_random_llama(Path(model))
        endpoints: dict[str, Endpoint] = {}
        for state, value in _STATES.items():
            _worker, address = stack.enter_context(
                running_worker(
                    "inference_worker", model=model, prefix_cache=value, threads=1, kv_cache_mib=128
                )
            )
            _edge, port = stack.enter_context(running_edge(address))
            endpoints[state] = Endpoint(f"http://127.0.0.1:{port}/v1")
        yield endpoints


async def talk(plan: Plan, endpoint: Endpoint, seed: str) -> Conversation:
    """A conversation. Raises: TurnFailed."""
    draws = random.Random(seed)
    messages: list[dict[str, str]] = []
    answers: Conversation = []
    for _ in range(plan.turns):
        words = [str(draws.randrange(10**9)), *(draws.choice(_WORDS) for _ in range(plan.words))]
        messages.append({"role": "user", "content": " ".join(words)})
        body = {
            "model": "default",
            "messages": messages,
            "max_tokens": plan.answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = endpoint.request("POST", "/chat/completions", None, json.dumps(body).encode())
        answer = read(await exchange(endpoint, request, _TIMEOUT_SECONDS))
        if answer.failure is not None:
            raise TurnFailed(answer.failure)
        messages.append({"role": "assistant", "content": answer.text})
        answers.append(answer)
    return answers


async def run(plan: Plan, endpoints: dict[str, Endpoint]) -> dict[str, list[Conversation]]:
    """Conversations with each server, in turns, by the state of its cache."""
    found: dict[str, list[Conversation]] = {state: [] for state in endpoints}
    for number in range(plan.repetitions + 1):
        for state, endpoint in endpoints.items():
            conversation = await talk(plan, endpoint, f"conversation {number}")
            if number > 0:  # the first one warms up
                found[state].append(conversation)
    return found


def table_of(plan: Plan, found: dict[str, list[Conversation]]) -> Table:
    """One row for each turn and state of the cache."""
    columns = ("Prompt tokens", "Cached", "First token ms", "÷ turn 1")
    table = Table(("Turn", "Prefix cache", *columns), labels=2)
    for turn in range(plan.turns):
        for state, conversations in found.items():
            answers = [conversation[turn] for conversation in conversations]
            firsts = [conversation[0] for conversation in conversations]
            table.rows.append(
                (
                    str(turn + 1),
                    state,
                    spread([answer.prompt_tokens or 0 for answer in answers], 0),
                    spread([answer.cached_tokens or 0 for answer in answers], 0),
                    spread([1e3 * answer.time_to_first_token for answer in answers], 1),
                    spread(
                        [
                            answer.time_to_first_token / first.time_to_first_token
                            for answer, first in zip(answers, firsts, strict=True)
                        ],
                        2,
                    ),
                )
            )
    return table


def report(plan: Plan) -> Report:
    """Run, and write it up."""
    load = os.getloadavg()[0]
    with stacks(plan.model) as endpoints:
        found = uvloop.run(run(plan, endpoints))
    introduction = (
        f"Conversations of {plan.turns} turns over HTTP, each message {plan.words} words, each answer "
        f"{plan.answer_tokens} tokens; {plan.repetitions} conversations: median (lowest–highest)."
    )
    return Report("Conversations", (introduction, str(table_of(plan, found))), load)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = Plan()
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--model", help="directory of a checkpoint; default: random weights")
    parser.add_argument("--turns", type=int, default=plan.turns)
    parser.add_argument("--words", type=int, default=plan.words, help="of a message")
    parser.add_argument("--answer-tokens", type=int, default=plan.answer_tokens)
    parser.add_argument("--repetitions", type=int, default=plan.repetitions)
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    plan = Plan(
        given.model,
        given.turns,
        given.words,
        given.answer_tokens,
        1 if given.quick else given.repetitions,
    )
    result = report(plan)
    print(result)
    if given.keep is not None:
        result.keep(given.keep)


if __name__ == "__main__":
    main()
