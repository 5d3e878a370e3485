"""What a constraint costs: tokens a second with it and without, what a mask takes, and how long it compiles.

`python -m benchmarks.structured_output` runs the engine in this process, without a server, on a Llama of random weights
and a vocabulary of 32,000 tokens, and on the embedded model. Texts are drawn with a seed. A constrained batch runs
first, each text until it is whole; then the same prompts without the constraint, each for as many tokens as its text
had, so that both make the same steps. The two make a repetition, and the ratio is taken within it. Tokens a second are
of the process's CPU time, prompts included, with one torch thread.

A mask is timed alone, on the texts that were drawn: CPU time, its token's acceptance included. Compiling is timed as a
request meets it, from the constraint's text to the grammar, the trial in a process of its own included: wall time, of
constraints that are not in the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.engine import make_prompts
from benchmarks.random_llama import Shape, write_random_llama
from benchmarks.report import Report
from benchmarks.table import Table, percentile, spread
from inference_worker.default_model import CHECKPOINT
from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.event import Delta, Failed
from inference_worker.engine.request import Request, SamplingParams, StoppingParams
from inference_worker.grammar.compiled import CompiledGrammar
from inference_worker.grammar.compiler import CompilerLimits, GrammarCompiler
from inference_worker.grammar.source import GrammarSource
from inference_worker.model.loader import load_model
from inference_worker.settings import WorkerSettings

MODELS: Final = ("10M", "embedded")
_PROMPT_TOKENS: Final = 16
_KV_CACHE_MIB: Final = 256
_SHAPE: Final = Shape(vocabulary=32_000, logit_deviation=6.0)
_TEXT: Final = {"type": "string", "maxLength": 24}
_OBJECT: Final = {
    "type": "object",
    "properties": {
        "name": _TEXT,
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "state": {"enum": ["new", "active", "blocked"]},
        "tags": {"type": "array", "items": _TEXT, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"street": _TEXT, "city": _TEXT},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "state", "tags", "address"],
    "additionalProperties": False,
}
_SENTENCE: Final = "the parcel was {} by the {} and will be with you {}"
_CHOICES: Final = [
    _SENTENCE.format(what, who, when)
    for what in ("sent", "lost", "held", "found")
    for who in ("shop", "post", "customs")
    for when in ("today", "tomorrow", "next week")
]
_LARK: Final = """start: sum
sum: product (("+" | "-") product)~8
product: atom (("*" | "/") atom)~1
atom: NUMBER | "(" NUMBER "+" NUMBER ")"
NUMBER: /[1-9][0-9]{0,3}/"""
CONSTRAINTS: Final = {
    "JSON schema": GrammarSource("json_schema", json.dumps(_OBJECT)),
    "regex": GrammarSource("regex", r"([0-9]{4}-[0-9]{2}-[0-9]{2} [a-z]{3,12}\n){6}"),
    "choice": GrammarSource("choice", json.dumps(_CHOICES)),
    "Lark": GrammarSource("lark", _LARK),
}


@dataclass(frozen=True)
class Plan:
    """How much to run."""

    models: tuple[str, ...] = MODELS
    rows: tuple[int, ...] = (1, 32)  # at once
    max_tokens: int = 48
    repetitions: int = 3
    shape: Shape = _SHAPE


class Bench:
    """An engine and a compiler for one model."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        settings = WorkerSettings(
            model=str(folder),
            dtype="float32",
            threads=1,
            kv_cache_mib=_KV_CACHE_MIB,
            device="cpu",
            prefix_cache=False,
        )
        served = load_model(settings)
        self._max_tokens = max_tokens
        self._ends = served.info.eos_token_ids
        options = EngineOptions(
            settings.max_running,
            settings.max_batch_tokens,
            served.info.context_length,
            prefix_cache=False,
        )
        self._engine = Engine(served.runner, served.tokenizer.new_detokenizer, options)
        limits = CompilerLimits(
            settings.grammar_seconds, cached=0, token_seconds=settings.grammar_token_ms / 1e3
        )
        self.compiler = GrammarCompiler(served.tokenizer, served.info.vocabulary_size, limits)

    def close(self) -> None:
        """Give memory, threads and processes back."""
        self.compiler.close()
        self._engine.close()

    def write(
        self, prompts: Sequence[Sequence[int]], seed: int, grammar: CompiledGrammar
    ) -> tuple[list[list[int]], float]:
        """Texts of the grammar, as tokens, and the CPU seconds that they took."""
        return self._run(prompts, seed, [self._max_tokens] * len(prompts), grammar)

    def write_freely(
        self, prompts: Sequence[Sequence[int]], seed: int, lengths: Sequence[int]
    ) -> float:
        """CPU seconds of texts of these lengths, without a constraint."""
        texts, seconds = self._run(prompts, seed, lengths, None)
        assert [len(text) for text in texts] == list(lengths)
        return seconds

    def mask_seconds(self, text: Sequence[int], grammar: CompiledGrammar) -> list[float]:
        """CPU seconds of each token's mask and its acceptance."""
        state = grammar.start(self._ends)
        found: list[float] = []
        for token_id in text:
            if token_id in self._ends:
                break
            began_at = time.process_time()
            grammar.masks([state])
            state.accept(token_id)
            found.append(time.process_time() - began_at)
        return found

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        lengths: Sequence[int],
        grammar: CompiledGrammar | None,
    ) -> tuple[list[list[int]], float]:
        ends: frozenset[int] = frozenset() if grammar is None else self._ends
        requests = [
            Request(
                "benchmark",
                tuple(prompt),
                StoppingParams(length, (), ends),
                SamplingParams(seed=seed + row),
                grammar=grammar,
            )
            for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        texts: dict[int, list[int]] = {request.key: [] for request in requests}
        began_at = time.process_time()
        for request in requests:
            self._engine.add(request)
        while self._engine.has_work:
            self._engine.step()
            for request, event in self._engine.take_events():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Delta):
                    texts[request.key] += [token.token_id for token in event.tokens]
        return list(texts.values()), time.process_time() - began_at


def _compile(bench: Bench, source: GrammarSource) -> tuple[CompiledGrammar, float]:
    """The grammar, and the seconds of wall time that it took."""
    began_at = time.perf_counter()
    grammar = asyncio.run(bench.compiler.compile(source))
    return grammar, time.perf_counter() - began_at


def measure(bench: Bench, plan: Plan, source: GrammarSource) -> tuple[list[str], list[list[str]]]:
    """Cells of the costs of compiling and of a mask, and of the speeds at each number of rows."""
    _compile(bench, source)  # starts the trial's process, if it is the first
    compiled = [_compile(bench, source) for _ in range(plan.repetitions)]
    masks: list[float] = []
    speeds: list[list[str]] = []
    for rows in plan.rows:
        pairs: list[tuple[float, float]] = []
        for repetition in range(-1, plan.repetitions):  # the first one warms up
            grammar = compiled[max(repetition, 0)][0]
            prompts = make_prompts(rows, _PROMPT_TOKENS, seed=repetition + 50)
            seed = 1000 * repetition
            texts, bound = bench.write(prompts, seed, grammar)
            free = bench.write_freely(prompts, seed, [len(text) for text in texts])
            if repetition >= 0:
                num_tokens = sum(map(len, texts))
                pairs.append((num_tokens / bound, num_tokens / free))
                masks += bench.mask_seconds(texts[0], grammar)
        speeds.append(
            [
                str(rows),
                spread([bound for bound, _ in pairs], 0),
                spread([free for _, free in pairs], 0),
                spread([bound / free for bound, free in pairs], 2),
            ]
        )
    costs = [
        spread([1e3 * seconds for _, seconds in compiled], 1),
        f"{1e6 * percentile(masks, 50):.0f}",
        f"{1e6 * percentile(masks, 99):.0f}",
    ]
    return costs, speeds


def report(plan: Plan, model: str) -> Report:
    """Run with one model, and write it up."""
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    columns = ("with: tokens/CPU s", "without", "ratio")
    speeds = Table(("Constraint", "At once", *columns), labels=2)
    costs = Table(("Constraint", "Compile ms", "Mask p50 µs", "p99 µs"), labels=1)
    with ExitStack() as stack:
        folder, what = CHECKPOINT, "embedded model"
        if model == "10M":
            folder, what = Path(stack.enter_context(tempfile.TemporaryDirectory())), str(plan.shape)
            write_random_llama(folder, plan.shape)
        bench = Bench(folder, plan.max_tokens)
        stack.callback(bench.close)
        for name, source in CONSTRAINTS.items():
            cost, rows = measure(bench, plan, source)
            costs.rows.append((name, *cost))
            speeds.rows += [(name, *row) for row in rows]
    introduction = (
        f"The engine, float32, with and without a constraint, on the {what}; {_PROMPT_TOKENS} prompt tokens, at most "
        f"{plan.max_tokens} new ones, sampled; one torch thread, CPU time, {plan.repetitions} repetitions after one "
        "that warms up: median (lowest–highest). Without the constraint each text is as long as with it. A mask's time "
        "includes that of taking the token; compiling is wall time, with the trial in another process."
    )
    return Report(f"Structured output, {model}", (introduction, str(speeds), str(costs)), load)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = Plan()
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=plan.models)
    parser.add_argument("--rows", type=int, nargs="+", default=plan.rows)
    parser.add_argument("--repetitions", type=int, default=plan.repetitions)
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    changes: dict[str, Any] = {
        "models": tuple(given.models),
        "rows": tuple(given.rows),
        "repetitions": given.repetitions,
    }
    if given.quick:
        small = replace(_SHAPE, vocabulary=2000, layers=1)
        changes |= {"rows": (1, 3), "max_tokens": 12, "repetitions": 1, "shape": small}
    plan = replace(plan, **changes)
    for model in plan.models:
        result = report(plan, model)
        print(result, flush=True)
        if given.keep is not None:
            result.keep(given.keep)


if __name__ == "__main__":
    main()
