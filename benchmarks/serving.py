"""How fast OpenAI-compatible servers stream, under the same load: `--url http://localhost:8000/v1 --url PEER …`.

Closed loop (`--concurrency 1 8 32`): so many readers, each of whom asks again as soon as it has its answer. Open loop
(`--rate 5`): requests arrive at random as a Poisson process, so many a second on average, however many are under way.
The servers take turns; a repetition sends the same prompts to each, one server after the other, and ratios to the first
one are taken within it. No prompt comes twice to a server, so a prefix cache does not help, unless the prompts come
from a file.

Tokens are counted by the servers' own `usage` where they tell it, which is asked for with `stream_options`; where they
do not, an event with text counts as a token, and the output says so. Time to the first token runs from the request to
the first event with text, a connection included; a gap is the time between two events with text. Goodput counts the
answers within `--slo-ttft-ms` and `--slo-itl-ms`: an answer's average time per token after its first. A failure is
never a figure: failures are counted by kind.

This client takes part of the machine's time itself: its share of a core is printed, and when that comes near 100 %, the
figures are its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import uvloop

from benchmarks.report import Report
from benchmarks.served_answer import Objective
from benchmarks.serving_load import (
    CHAT,
    PATHS,
    Load,
    Measurement,
    NoServer,
    Plan,
    Sender,
    first_model,
)
from benchmarks.sse_client import BadUrl, Endpoint
from benchmarks.table import Table, spread

Rounds = dict[str, list[Measurement]]  # by URL, one a repetition


async def run(plan: Plan) -> dict[Load, Rounds]:
    """Every load, in turns. Raises: NoServer, BadUrl."""
    senders: dict[str, Sender] = {}
    for url in plan.urls:
        model = plan.model or await first_model(Endpoint(url), plan.key)
        senders[url] = Sender(plan, url, model)
    found: dict[Load, Rounds] = {}
    for load in plan.loads:
        rounds: Rounds = {url: [] for url in plan.urls}
        for number in range(plan.repetitions + 1):
            for url in plan.urls:
                measurement = await senders[url].measure(load, number)
                if number > 0:  # the first round warms up
                    rounds[url].append(measurement)
        found[load] = rounds
    return found


def table_of(plan: Plan, found: dict[Load, Rounds]) -> Table:
    """One row for each load and server."""
    columns = ("Tokens/s", "÷ first", "First token p50 ms", "p99 ms", "Gap p50 ms", "p99 ms")
    more = ("Goodput/s", "Failures", "Client's core %")
    table = Table(("Load", "Server", *columns, *more), labels=2)
    for load, rounds in found.items():
        first = rounds[plan.urls[0]]
        for place, (url, measured) in enumerate(rounds.items()):
            speeds = [m.tokens_per_second for m in measured]
            ratios = [
                a / b.tokens_per_second
                for a, b in zip(speeds, first, strict=True)
                if b.tokens_per_second
            ]
            failures = sum((m.failures for m in measured), Counter())
            table.rows.append(
                (
                    str(load),
                    plan.names[place] if plan.names else url,
                    spread(speeds, 0),
                    spread(ratios, 2) if place and ratios else "",
                    spread([m.first_token_ms(50) for m in measured], 1),
                    spread([m.first_token_ms(99) for m in measured], 1),
                    spread([m.gap_ms(50) for m in measured], 2),
                    spread([m.gap_ms(99) for m in measured], 2),
                    spread([m.goodput for m in measured], 2),
                    ", ".join(f"{count} × {kind}" for kind, count in failures.items()) or "0",
                    spread([100 * m.client_share for m in measured], 0),
                )
            )
    return table


def _introduction(plan: Plan, found: dict[Load, Rounds]) -> str:
    by_events = [
        url
        for url in plan.urls
        if any(not a.is_counted for rounds in found.values() for m in rounds[url] for a in m.good)
    ]
    counting = (
        f"Tokens are the servers' own count, but for {', '.join(by_events)}: events with text."
        if by_events
        else "Tokens are the servers' own count."
    )
    wishes = [
        f"{what} of at most {1e3 * seconds:g} ms"
        for what, seconds in (
            ("a first token", plan.objective.first_token),
            ("an average gap", plan.objective.gap),
        )
        if seconds is not None
    ]
    goodput = (
        f"Goodput: answers with {' and '.join(wishes)}." if wishes else "Goodput: whole answers."
    )
    return (
        f"{plan.api}, at least {plan.requests} requests a measurement, at most {plan.max_tokens} tokens each; "
        f"{plan.repetitions} repetitions: median (lowest–highest). {counting} {goodput}"
    )


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--url",
        action="append",
        required=True,
        dest="urls",
        help="such as http://localhost:8000/v1; again for a peer",
    )
    add(
        "--name",
        action="append",
        dest="names",
        default=[],
        help="what the table calls it; one for each --url",
    )
    add("--concurrency", type=int, nargs="+", help="closed loop: readers at once (default: 1 8 32)")
    add("--rate", type=float, nargs="+", help="open loop: requests a second")
    add("--requests", type=int, default=32, help="of one measurement, at least (32)")
    add(
        "--repetitions",
        type=int,
        default=3,
        help="of each measurement, after one that warms up (3)",
    )
    add("--api", choices=list(PATHS), default=CHAT)
    add("--model", help="default: the first one that the server lists")
    add(
        "--key",
        help="sent as a bearer token; default: $OPENAI_API_KEY",
        default=os.environ.get("OPENAI_API_KEY"),
    )
    add("--prompt-words", type=int, default=48, help="of a prompt made of random words (48)")
    add(
        "--prompts",
        type=Path,
        help="file of prompts, one a line, drawn at random, in place of random words",
    )
    add("--max-tokens", type=int, default=128)
    add(
        "--extra",
        type=json.loads,
        default={},
        help="further fields of the body, as JSON: '{\"ignore_eos\": true}'",
    )
    add("--no-usage", action="store_true", help="do not ask for usage; count events")
    add("--timeout", type=float, default=300.0, help="seconds that an answer may take (300)")
    add("--slo-ttft-ms", type=float, help="objective: most time to the first token")
    add("--slo-itl-ms", type=float, help="objective: most average time per token after it")
    add("--seed", type=int, default=0, help="of prompts and arrivals (0)")
    add(
        "--json",
        type=Path,
        help="file for all figures as JSON; - for standard output in place of the table",
    )
    add("--keep", type=Path, help="Markdown file that keeps the result")
    return parser


def _plan(given: argparse.Namespace) -> Plan:
    rates, readers = given.rate or [], given.concurrency or []
    if not rates and not readers:
        readers = [1, 8, 32]
    return Plan(
        urls=tuple(url.rstrip("/") for url in given.urls),
        loads=(*(Load(readers=n) for n in readers), *(Load(rate=rate) for rate in rates)),
        names=tuple(given.names),
        requests=given.requests,
        repetitions=given.repetitions,
        api=given.api,
        model=given.model,
        key=given.key,
        prompt_words=given.prompt_words,
        prompts=tuple(given.prompts.read_text().splitlines()) if given.prompts else (),
        max_tokens=given.max_tokens,
        extra=given.extra,
        asks_usage=not given.no_usage,
        timeout_seconds=given.timeout,
        objective=Objective(
            None if given.slo_ttft_ms is None else given.slo_ttft_ms / 1e3,
            None if given.slo_itl_ms is None else given.slo_itl_ms / 1e3,
        ),
        seed=given.seed,
    )


def main() -> None:
    parser = _arguments()
    given = parser.parse_args()
    if given.names and len(given.names) != len(given.urls):
        parser.error("give --name once for each --url, or not at all")
    if len({url.rstrip("/") for url in given.urls}) < len(given.urls):
        parser.error("each --url is another server")
    plan = _plan(given)
    load = os.getloadavg()[0]
    try:
        found = uvloop.run(run(plan))
    except (NoServer, BadUrl) as error:
        sys.exit(str(error))
    report = Report("Serving", (_introduction(plan, found), str(table_of(plan, found))), load)
    if given.json is not None:
        figures = [
            {**asdict(load), "url": url, "repetitions": [m.summary() for m in measured]}
            for load, rounds in found.items()
            for url, measured in rounds.items()
        ]
        text = json.dumps(figures, indent=1)
        if str(given.json) == "-":
            print(text)
        else:
            given.json.write_text(text)
    if str(given.json) != "-":
        print(report)
    if given.keep is not None:
        report.keep(given.keep)


if __name__ == "__main__":
    main()
