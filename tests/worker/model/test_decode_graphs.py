"""Padding to fixed sizes and fixed input tensors, with a forward pass that keeps to the kernels' conventions."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference_worker.model.batch import Batch, Span, pack
from inference_worker.model.decode_graphs import DecodeGraphs, call_again, sizes
from inference_worker.model.kv_cache import KVCache, LayerShape
from inference_worker.model.runner import ModelRunner
from tests.worker.model.driver import Driver, new_sequence, prompt_of

VOCABULARY = 101
MAX_LENGTH = 40
BLOCK = 4


class SumForward:
    """Keeps each token in the cache; the likeliest next token is a hash of what its row sees there."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # tokens of each call

    def __call__(self, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(batch.input_ids))
        kept = batch.cache.keys[0].view(-1)
        real = batch.slots >= 0  # a slot of -1 writes nothing
        values = (batch.input_ids + 1) * (batch.positions + 1)
        kept[batch.slots[real]] = values[real].to(kept.dtype)
        sums = [self.sum_of_row(kept, *row) for rows in batch.decode for row in row_views(rows)]
        for chunk in batch.chunks:
            of_chunk = chunk.block_ids
            sums += [
                self.sum_of_row(kept, of_chunk, position + 1)
                for position in range(chunk.start, chunk.stop)
            ]
        logits = torch.zeros(len(sums), VOCABULARY)
        logits[torch.arange(len(sums)), torch.tensor(sums) % VOCABULARY] = 1
        return logits[wanted]

    @staticmethod
    def sum_of_row(kept: torch.Tensor, blocks: torch.Tensor, length: int) -> int:
        at = torch.arange(length)
        return int(kept[blocks[at // BLOCK].long() * BLOCK + at % BLOCK].sum()) * 7 + 3


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the memory that torch's operations are given and that none of them has made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, Any] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # of a literal, which a capture copies
            for at, memory in _memory_of((args, kwargs)):
                if at not in self._made:
                    self.found.setdefault(at, StorageWeakRef(memory))  # type: ignore[no-untyped-call]
        result = func(*args, **(kwargs or {}))
        self._made |= {at for at, _ in _memory_of(result)} - self.found.keys()
        return result


def _memory_of(values: object) -> list[tuple[int, torch.UntypedStorage]]:
    tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    return [(x.untyped_storage()._cdata, x.untyped_storage()) for x in tensors]


def row_views(rows) -> list[tuple[torch.Tensor, int]]:  # type: ignore[no-untyped-def]
    return list(zip(rows.block_table, rows.lengths.tolist(), strict=True))


@pytest.fixture
def cache() -> KVCache:
    shape = LayerShape(num_kv_heads=1, key_dim=1, value_dim=1, window=None)
    return KVCache(
        {0: shape},
        num_blocks=64,
        block_size=BLOCK,
        dtype=torch.float64,
        device=torch.device("cpu"),
        uses_kernels=True,
    )


def make_graphs(forward: SumForward, cache: KVCache, max_rows: int = 6) -> DecodeGraphs:
    return DecodeGraphs(
        forward, cache, max_rows=max_rows, max_length=MAX_LENGTH, capture=call_again
    )


def test_sizes_hold_every_number_of_rows() -> None:
    assert sizes(1) == [1]
    assert sizes(6) == [1, 2, 4, 8]
    assert sizes(32) == [1, 2, 4, 8, 16, 24, 32]
    assert sizes(100_000)[-1] == 256


def test_padded_steps_draw_what_unpadded_ones_do(cache: KVCache) -> None:
    lengths = (2, 9, 17, 5, 12, 3)
    plain = Driver(ModelRunner(SumForward(), cache, runs_ahead=False), max_chunk=7)
    expected = [new_sequence(prompt_of(length, vocabulary=VOCABULARY)) for length in lengths]
    plain.run(expected, 16)

    forward = SumForward()
    graphs = make_graphs(forward, cache)
    driver = Driver(ModelRunner(forward, cache, graphs=graphs, runs_ahead=False), max_chunk=7)
    sequences = [new_sequence(prompt_of(length, vocabulary=VOCABULARY)) for length in lengths]
    forward.sizes.clear()
    for count, sequence in enumerate(sequences, 1):  # one more row each time, at other lengths
        driver.run([sequence], 2)
        driver.run(sequences[:count], 2 + count)
    driver.run(sequences, 16)
    assert [s.token_ids for s in sequences] == [s.token_ids for s in expected]
    assert {1, 2, 4, 8} <= set(forward.sizes)


def test_what_is_captured_depends_on_its_input_tensors_alone(cache: KVCache) -> None:
    """Whatever the capture ran is run again, and nothing else is called."""
    captured: list[int] = []

    def capture(compute: Callable[[], None]) -> Callable[[], None]:
        compute()
        captured.append(forward.sizes[-1])
        return compute

    forward = SumForward()
    before = cache.keys[0].clone()
    graphs = DecodeGraphs(forward, cache, max_rows=3, max_length=MAX_LENGTH, capture=capture)
    assert captured == [4, 2, 1]
    assert torch.equal(cache.keys[0], before)  # the captures' padded rows wrote nothing
    spans = [Span([5, 6], 1, 2, [3]), Span([7, 8, 9], 2, 3, [9]), Span([1, 2], 1, 2, [11])]
    batch = graphs.batch(spans)
    assert batch is not None
    inputs = [x.data_ptr() for x in (batch.input_ids, batch.positions, batch.slots)]
    assert batch.slots.tolist() == [13, 38, 45, -1]
    assert batch.decode[0].lengths.tolist() == [2, 3, 2, 0]
    got = graphs.logits(batch, 3)
    assert torch.equal(got, forward(pack(spans, cache), torch.arange(3)))
    again = graphs.batch([Span([5, 6, 4], 2, 3, [3]), *spans[1:]])
    assert again is batch
    assert inputs == [x.data_ptr() for x in (again.input_ids, again.positions, again.slots)]
    assert not torch.equal(got, graphs.logits(again, 3))


def test_what_is_captured_reads_nothing_that_is_gone_by_then(cache: KVCache) -> None:
    """As a CUDA graph, which knows addresses alone, the capture keeps nothing of what it ran."""
    reads = Reads()

    def capture(compute: Callable[[], None]) -> Callable[[], None]:
        with reads:
            compute()
        return lambda: None

    graphs = DecodeGraphs(SumForward(), cache, max_rows=3, max_length=MAX_LENGTH, capture=capture)
    gc.collect()
    # the rows, their table, the indices of the wanted ones, the cache, and where the logits go
    assert len(reads.found) == 5
    assert [memory.expired() for memory in reads.found.values()] == [False] * 5
    assert graphs.batch([Span([5, 6], 1, 2, [3])]) is not None  # they were kept until here


def test_other_batches_are_left_to_the_forward_pass(cache: KVCache) -> None:
    graphs = make_graphs(SumForward(), cache, max_rows=2)
    row = Span([5, 6], 1, 2, [3])
    chunk = Span([5, 6, 7], 0, 3, [4])
    long = Span([1] * (MAX_LENGTH + 1), MAX_LENGTH, MAX_LENGTH + 1, list(range(11)))
    assert graphs.batch([row, chunk]) is None
    assert graphs.batch([row] * 3) is None
    assert graphs.batch([row, long]) is None
    assert graphs.batch([row]) is not None
