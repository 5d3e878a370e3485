"""Compiling: what is refused, what is kept, and that a hostile grammar holds nobody up."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from unittest.mock import AsyncMock

import psutil
import pytest

from inference_worker.continuation import DeliveredRequest
from inference_worker.default_model import CHECKPOINT
from inference_worker.engine.continuation import Delivered
from inference_worker.engine.fair_queue import Share
from inference_worker.engine.grammar import GrammarFailed
from inference_worker.errors import InvalidField, UnsupportedField
from inference_worker.grammar.compiled import CompiledGrammar
from inference_worker.grammar.compiler import CompilerLimits, GrammarCompiler, in_llguidance
from inference_worker.grammar.lane import STACK_BYTES
from inference_worker.grammar.source import GrammarSource
from inference_worker.grammar.trial import TooCostly, Trial
from inference_worker.grammar.trial_process import _STACK_BYTES
from inference_worker.tokenizer import Tokenizer
from tests.patience import PATIENCE
from tests.worker.grammar.hostile import ENDLESS, LAZY, REFUSED
from tests.worker.grammar.noise import Noise
from tests.worker.test_tokenizer import save, word_piece

DIGITS = GrammarSource("regex", "[0-9]+")
LETTERS = GrammarSource("regex", "[a-z]+")
MANY = Share("many")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(CHECKPOINT))


@pytest.fixture
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocabulary_size, CompilerLimits(0.3, 4, 1))
    yield compiler
    compiler.close()


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The grammars that were tried."""
    tried: list[str] = []
    run = Trial.run

    def recorded(trial: Trial, grammar: str) -> str:
        tried.append(grammar)
        return run(trial, grammar)

    monkeypatch.setattr(Trial, "run", recorded)
    return tried


@dataclass
class Gate:
    """What is to be tried is noted, and waits until it opens."""

    tried: list[str] = field(default_factory=list)
    opened: threading.Event = field(default_factory=threading.Event)

    def open(self) -> None:
        self.opened.set()

    async def wait_for(self, count: int) -> None:
        """Until so many are or were at it."""
        async with asyncio.timeout(PATIENCE):
            while len(self.tried) < count:
                await asyncio.sleep(0.005)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    run = Trial.run

    def held(trial: Trial, grammar: str) -> str:
        gate.tried.append(grammar)
        assert gate.opened.wait(PATIENCE)
        return run(trial, grammar)

    monkeypatch.setattr(Trial, "run", held)
    return gate


@pytest.mark.parametrize("name", REFUSED)
async def test_refuses(compiler: GrammarCompiler, name: str) -> None:
    source = REFUSED[name]
    with pytest.raises(InvalidField) as refusal:
        await compiler.compile(source)
    assert refusal.value.field == f"constraint.{source.kind}"
    assert len(str(refusal.value)) <= 400
    assert ("compile" in str(refusal.value)) == (name in ENDLESS)
    assert isinstance(await compiler.compile(DIGITS), CompiledGrammar)


@pytest.mark.parametrize("name", LAZY)
def test_what_grows_later_is_bounded_then(noise: Noise, name: str) -> None:
    """It goes on for some tokens, or fails; it neither ends nor runs away."""
    grammar = asyncio.run(noise.compiler.compile(LAZY[name]))
    choice = noise.write(grammar, max_tokens=60, stop_token_ids=frozenset())
    if choice.failed is None:
        assert choice.reason in ("LENGTH", "STOP")
        assert choice.text
    else:
        assert isinstance(choice.failed.error, GrammarFailed)


async def test_a_hostile_grammar_holds_nobody_up(compiler: GrammarCompiler) -> None:
    hostile = [asyncio.create_task(compiler.compile(source)) for source in ENDLESS.values()]
    await asyncio.sleep(0)
    for i in range(20):
        await compiler.compile(GrammarSource("regex", f"[a-z]{{{i + 1}}}"))
    assert not hostile[-1].done()
    for task in hostile:
        with pytest.raises(InvalidField):
            await task


async def test_keys_take_turns(compiler: GrammarCompiler, gate: Gate) -> None:
    """However many grammars of one key wait, another key's is next."""
    many = [
        asyncio.create_task(compiler.compile(GrammarSource("regex", f"[a-z]{{{n}}}"), MANY))
        for n in range(1, 9)
    ]
    await gate.wait_for(1)
    one = asyncio.create_task(compiler.compile(DIGITS, Share("one")))
    await asyncio.sleep(0)  # it waits with the others
    gate.open()
    await asyncio.gather(one, *many)
    assert gate.tried.index(in_llguidance(DIGITS)) == 1
    assert len(gate.tried) == 9


async def test_who_leaves_keeps_the_turn_until_the_work_is_over(
    compiler: GrammarCompiler, gate: Gate
) -> None:
    """Otherwise one key could have as many as it likes for the price of none."""
    gone = [
        asyncio.create_task(compiler.compile(GrammarSource("regex", f"[a-z]{{{n}}}"), MANY))
        for n in range(1, 5)
    ]
    await gate.wait_for(1)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    one = asyncio.create_task(compiler.compile(DIGITS, Share("one")))
    await asyncio.sleep(0)
    gate.open()
    assert isinstance(await one, CompiledGrammar)
    assert len(gate.tried) == 2


async def test_what_goes_on_waits_for_no_compilation(
    compiler: GrammarCompiler, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.open()
    grammar = await compiler.compile(DIGITS)
    gate.opened.clear()
    compiling = [asyncio.create_task(compiler.compile(LETTERS))]
    await gate.wait_for(2)  # in the quick lane
    monkeypatch.setattr(compiler._quick, "run", AsyncMock(side_effect=TooCostly))
    compiling.append(asyncio.create_task(compiler.compile(GrammarSource("regex", "[a-f]"))))
    await gate.wait_for(3)  # in the slow one
    vocabulary = compiler._vocabulary
    assert vocabulary is not None
    digits = tuple(i for i in range(300) if vocabulary.tokens[i].isdigit())
    delivered = DeliveredRequest({1: Delivered(digits)}, {}, {1: "path"}, {})
    assert list(await compiler.replay(grammar, frozenset(), delivered)) == [1]
    assert not any(task.done() for task in compiling)
    gate.open()
    await asyncio.gather(*compiling)


async def test_the_same_grammar_again_costs_nothing(
    compiler: GrammarCompiler, trials: list[str]
) -> None:
    first, second = await asyncio.gather(compiler.compile(DIGITS), compiler.compile(DIGITS))
    assert first is second is await compiler.compile(GrammarSource("regex", "[0-9]+"))
    assert len(trials) == 1
    bad = REFUSED["an unknown rule"]
    for _ in range(3):
        with pytest.raises(InvalidField):
            await compiler.compile(bad)
    assert len(trials) == 2


async def test_an_endless_grammar_is_remembered(
    compiler: GrammarCompiler, trials: list[str]
) -> None:
    bad = ENDLESS["definitions that double"]
    for _ in range(3):
        with pytest.raises(InvalidField):
            await compiler.compile(bad)
    assert len(trials) == 2  # one in each lane


async def test_the_cache_forgets_what_was_not_used_for_longest(
    compiler: GrammarCompiler, trials: list[str]
) -> None:
    sources = [GrammarSource("regex", f"x{{{i + 1}}}") for i in range(5)]
    for source in [*sources[:4], sources[0], sources[4]]:  # the second is the oldest then
        await compiler.compile(source)
    assert len(trials) == 5
    await compiler.compile(sources[0])
    assert len(trials) == 5
    await compiler.compile(sources[1])
    assert len(trials) == 6


async def test_a_spent_grammar_is_compiled_anew(compiler: GrammarCompiler) -> None:
    grammar = await compiler.compile(DIGITS)
    state = grammar.start(frozenset())
    with pytest.raises(GrammarFailed):
        state.accept(1)  # a special token
    assert grammar.is_spent
    assert await compiler.compile(DIGITS) is not grammar


async def test_a_cancelled_one_stops_nobody(compiler: GrammarCompiler) -> None:
    source = GrammarSource("json_schema", json.dumps({"enum": list(range(500))}))
    gone = asyncio.create_task(compiler.compile(source))
    stays = asyncio.create_task(compiler.compile(source))
    await asyncio.sleep(0)
    gone.cancel()
    assert isinstance(await stays, CompiledGrammar)
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_the_processes_end_with_the_compiler(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocabulary_size, CompilerLimits(60, 4, 1))
    await compiler.compile(DIGITS)
    before = {child.pid for child in psutil.Process().children()}
    hostile = asyncio.create_task(compiler.compile(ENDLESS["definitions that double"]))
    while not (children := {c.pid for c in psutil.Process().children()} - before):
        await asyncio.sleep(0.01)  # until it is in the slow lane
    compiler.close()
    assert not {c.pid for c in psutil.Process().children()} & children
    hostile.cancel()
    await asyncio.gather(hostile, return_exceptions=True)


async def test_a_process_that_died_is_replaced(
    compiler: GrammarCompiler, trials: list[str]
) -> None:
    before = {child.pid for child in psutil.Process().children()}
    await compiler.compile(DIGITS)
    (trial,) = [child for child in psutil.Process().children() if child.pid not in before]
    os.kill(trial.pid, 9)
    trial.wait(5)
    await compiler.compile(GrammarSource("regex", "[a-z]+"))
    assert len(trials) == 2


def test_what_has_passed_the_trial_fits_into_the_workers_stack() -> None:
    """Also where `ulimit -s` leaves other threads next to none."""
    assert STACK_BYTES >= 2 * _STACK_BYTES
    program = """
        import asyncio
        from llguidance import LLMatcher, LLTokenizer
        from inference_worker.engine.fair_queue import Share
        from inference_worker.grammar.lane import Lane
        from inference_worker.grammar.trial import Trial

        rules = "start: r0\\n" + "".join(f"r{i}: r{i + 1}\\n" for i in range(1200)) + 'r1200: "a"'
        grammar = LLMatcher.grammar_from_lark(rules)
        trial = Trial(60)
        assert trial.run(grammar) == ""
        trial.close()
        compiling = Lane("lane").run(Share(), lambda: LLMatcher.validate_grammar(grammar))
        assert asyncio.run(compiling) == ""
    """
    done = subprocess.run(
        ["sh", "-c", 'ulimit -s 1024; exec "$@"', "sh", sys.executable, "-c", dedent(program)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr


async def test_a_tokenizer_without_fixed_bytes_has_no_grammars(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, word_piece())
    compiler = GrammarCompiler(tokenizer, tokenizer.vocabulary_size, CompilerLimits(1, 4, 1))
    with pytest.raises(UnsupportedField) as refusal:
        await compiler.compile(DIGITS)
    assert refusal.value.field == "constraint"
    compiler.close()


async def test_a_choice_may_hold_any_character(compiler: GrammarCompiler) -> None:
    texts = [f"x{character}y" for character in '\x01\t\n\x7f\x85\u2028\ufeff/\\"é👋']
    assert isinstance(
        await compiler.compile(GrammarSource("choice", json.dumps(texts))), CompiledGrammar
    )
