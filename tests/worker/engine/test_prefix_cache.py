"""What the prefix cache keeps, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from inference_worker.engine.block_pool import BlockPool
from inference_worker.engine.engine import Engine
from inference_worker.engine.event import Started
from inference_worker.engine.fair_queue import Share
from tests.worker.engine.engines import completion, make_engine, make_request, run
from tests.worker.engine.hash_runner import HashRunner, reference_completion

pytestmark = pytest.mark.usefixtures("runs_ahead")

KNOWN = list(range(24))


def ask(engine: Engine, prompt: Sequence[int], max_tokens: int = 1, key_id: str = "") -> int:
    """Run a request; prompt tokens that were in the cache."""
    request = make_request("a", prompt, max_tokens)
    engine.add(replace(request, share=Share(key_id)))
    events = run(engine)["a"]
    assert completion(events) == reference_completion(prompt, max_tokens)
    assert isinstance(events[0], Started)
    return events[0].cached_tokens


def look(engine: Engine, prompt: Sequence[int]) -> int:
    """Prompt tokens that are in the cache; nothing is taken from it."""
    request = make_request("a", prompt)
    engine.add(request)
    ((_, started),) = engine.take_events()
    engine.cancel(request, None)
    assert isinstance(started, Started)
    return started.cached_tokens


def test_what_leaves_no_prefix_takes_none_away() -> None:
    """However many short requests come by: they share the blocks that nobody can find anything in."""
    engine = make_engine(HashRunner(12, 4))
    ask(engine, KNOWN)
    for number in range(40):
        assert ask(engine, [50 + number % 40, 3], 2) == 0
    assert ask(engine, KNOWN) == 20


def test_equal_prompts_computed_side_by_side_are_kept_once() -> None:
    """The copies make room before anything that somebody may look for."""
    engine = make_engine(HashRunner(18, 4), max_batch_tokens=64)
    ask(engine, KNOWN)  # six blocks, and one for what came of it
    for name in ("a", "b"):
        engine.add(make_request(name, [60] * 16, 1))
    run(engine)  # four blocks each, twice
    ask(engine, [70] * 24)  # takes those of the copy, and what was never used
    assert ask(engine, KNOWN) == 20
    assert ask(engine, [60] * 16) == 12


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    engine = make_engine(HashRunner(12, 4), max_batch_tokens=64)
    older, newer = [60] * 24, [61] * 24
    ask(engine, older)
    ask(engine, newer)
    ask(engine, [62] * 8)
    assert (look(engine, older), look(engine, newer)) == (16, 20)
    ask(engine, older[:17])
    ask(engine, [63] * 24)
    assert (look(engine, older), look(engine, newer)) == (16, 0)


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_key_finds_what_another_asked_only_where_that_is_wanted(is_shared: bool) -> None:
    engine = make_engine(HashRunner(64, 4), prefix_cache_across_keys=is_shared)
    assert ask(engine, KNOWN, key_id="alice") == 0
    assert ask(engine, KNOWN, key_id="alice") == 20
    for key_id in ("bob", ""):
        assert ask(engine, KNOWN, key_id=key_id) == (20 if is_shared else 0)
    assert ask(engine, KNOWN, key_id="alice") == 20


def test_nobody_can_look_for_colliding_prefixes_beforehand() -> None:
    pools = [BlockPool(4, 4) for _ in range(2)]
    assert pools[0]._digest(b"a prefix") == pools[0]._digest(b"a prefix")
    assert pools[0]._digest(b"a prefix") != pools[1]._digest(b"a prefix")
