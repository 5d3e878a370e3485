"""Each key its share, whatever the others ask for; and within a key by priority and arrival."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_worker.engine import fair_queue as fair_queue_module
from inference_worker.engine.fair_queue import FairQueue, Share


def drain(queue: FairQueue[str], tokens: int = 0) -> list[str]:
    """Items in the order that they are served; each uses so many tokens of the key it begins with."""
    served = []
    while queue:
        item = queue.first()
        queue.remove(item)
        served.append(item)
        queue.charge(Share(item[0]), tokens)
    return served


def test_one_key_is_first_come_first_served() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "abc":
        assert queue.position(Share()) == len(queue)
        queue.add(item, Share())
    assert drain(queue, 10) == ["a", "b", "c"]


def test_priority_goes_first_within_a_key_and_changes_nothing_between_keys() -> None:
    queue: FairQueue[str] = FairQueue()
    for item, priority in (("a1", 0), ("a2", 5), ("a3", -1), ("a4", 5)):
        queue.add(item, Share("a", priority=priority))
    queue.add("b1", Share("b"))
    queue.add("b2", Share("b", priority=100))
    assert queue.position(Share("a", priority=5)) == 2 + 2
    assert queue.position(Share("a", priority=-2)) == 4 + 2
    assert drain(queue, 10) == ["a2", "b2", "a4", "b1", "a1", "a3"]


def test_a_newcomer_is_before_those_who_were_served_but_saves_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(1000):
        queue.add(f"a{number}", Share("a"))
    for number in range(10):
        queue.remove(f"a{number}")
        queue.charge(Share("a"), 100)
    queue.add("b0", Share("b"))
    queue.charge(Share("a"), 1)
    assert queue.position(Share("b")) == 2  # b0, one of a, and then it
    for number in range(1, 50):
        queue.add(f"b{number}", Share("b"))
    order = drain(queue, 100)[:40]
    assert order[0] == "b0"
    # it takes turns from its arrival on; nothing of the time before is made up for
    assert Counter(item[0] for item in order) == {"a": 20, "b": 20}


def test_a_key_that_used_the_worker_alone_owes_nobody_anything() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("a0", Share("a"))
    drain(queue, 1_000_000)
    for number in range(20):
        queue.add(f"b{number}", Share("b"))
        queue.add(f"a{number}", Share("a"))
    assert Counter(item[0] for item in drain(queue, 10)[:20]) == {"a": 10, "b": 10}


def test_what_is_put_back_goes_first() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("b", Share("b"))
    queue.put_back("a2")
    queue.put_back("a1")
    assert queue.position(Share("c")) == 1  # of those that wait for their first turn
    assert len(queue) == 3
    queue.remove("a2")
    assert drain(queue) == ["a1", "b"]
    with pytest.raises(ValueError, match="not in deque"):
        queue.remove("a1")
    with pytest.raises(IndexError):
        queue.first()


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=5),
    slots=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_weights_hold_within_a_bound_among_keys_that_always_wait(
    weights: list[float], slots: int, seed: int
) -> None:
    """Counters differ by no more than the tokens that the requests of one key in all slots can use."""
    draws = random.Random(seed)
    longest = 50
    queue: FairQueue[int] = FairQueue()
    shares = [Share(str(key), weight) for key, weight in enumerate(weights)]
    used = [0] * len(weights)
    running: list[tuple[int, int]] = []  # key, tokens left
    items = iter(range(10**9))
    whose: dict[int, int] = {}

    def refill() -> None:
        waiting = Counter(whose.values())
        for key, share in enumerate(shares):
            while waiting[key] < 2:
                item = next(items)
                whose[item] = key
                queue.add(item, share)
                waiting[key] += 1

    for _ in range(2000):
        refill()
        while len(running) < slots:
            item = queue.first()
            queue.remove(item)
            key = whose.pop(item)
            running.append((key, draws.randint(1, longest)))
            refill()
        for key, _ in running:
            used[key] += 1
            queue.charge(shares[key], 1)
        running = [(key, left - 1) for key, left in running if left > 1]
    counters = [tokens / weight for tokens, weight in zip(used, weights, strict=True)]
    assert max(counters) - min(counters) <= 2 * slots * longest / min(weights)
    assert min(used) > 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(-2, 2)),
            st.tuples(st.sampled_from(["serve", "back", "drop"]), st.just(""), st.integers(0, 20)),
        ),
        max_size=80,
    )
)
def test_within_a_key_the_order_is_that_of_a_plain_queue(
    steps: list[tuple[str, str, int]],
) -> None:
    """Whatever comes, goes and is put back: each key's items come in the order of a stable sort by priority."""
    queue: FairQueue[str] = FairQueue()
    lines: dict[str, deque[tuple[int, str]]] = {key: deque() for key in "abc"}
    back: deque[str] = deque()
    out: list[str] = []
    for number, (kind, key, amount) in enumerate(steps):
        waiting = [item for line in lines.values() for _, item in line]
        if kind == "add":
            item = f"{key}{number}"
            queue.add(item, Share(key, priority=amount))
            lines[key] = deque(sorted([*lines[key], (-amount, item)], key=lambda pair: pair[0]))
        elif kind == "back" and out:
            back.appendleft(out.pop())
            queue.put_back(back[0])
        elif kind == "drop" and waiting:
            item = waiting[amount % len(waiting)]
            queue.remove(item)
            lines[item[0]] = deque(pair for pair in lines[item[0]] if pair[1] != item)
        elif kind == "serve" and (waiting or back):
            item = queue.first()
            if back:
                assert item == back.popleft()
            else:
                assert item == lines[item[0]].popleft()[1]
            queue.remove(item)
            out.append(item)
            queue.charge(Share(item[0]), amount)
        assert len(queue) == len(back) + sum(map(len, lines.values()))


def test_the_counters_of_keys_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue_module, "MAX_KEYS", 10)
    queue: FairQueue[str] = FairQueue()
    queue.add("w", Share("waits"))
    for number in range(100):
        key = Share(f"k{number}")
        queue.add(f"i{number}", key)
        queue.remove(f"i{number}")
        queue.charge(key, 1000 - number)
    assert len(queue._counters) <= 10 + 2
    assert queue.first() == "w"


def test_keys_that_are_served_without_waiting_are_forgotten_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fair_queue_module, "MAX_KEYS", 10)
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.charge(Share(f"k{number}"), 1)
    assert len(queue._counters) <= 10 + 2
