"""One step's tokens packed in a row, and where their keys and values lie in the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from inference_worker.model.kv_cache import KVCache

IntArray: TypeAlias = npt.NDArray[np.int64]

# Keys and values of one layer that are gathered from the cache at once, for decode rows.
_GATHERED_BYTES_CPU = 4 * 2**20
_GATHERED_BYTES_GPU = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Span:
    """The part of one sequence that a step computes: `token_ids[start:stop]`, with everything before it cached."""

    token_ids: Sequence[int]  # of the whole sequence
    start: int
    stop: int
    block_table: Sequence[int]  # covers at least `stop` tokens

    @property
    def is_decode(self) -> bool:
        """Whether it is one token that follows cached ones."""
        return self.start > 0 and self.stop - self.start == 1


@dataclass(frozen=True, slots=True)
class KeyView:
    """The cached tokens that some queries attend to, through a window of one size."""

    block_ids: torch.Tensor  # [blocks], of all rows one after the other, each with the same number
    num_keys: int  # of each row, from its first block on
    mask: torch.Tensor | None  # 0 or -inf, broadcasts to the scores; None: all is visible


class Queries(ABC):
    """Packed tokens `first` .. `last` - 1, whose attention is computed together.

    The view of a window is made once and shared by the layers that have it.
    """

    def __init__(self, cache: KVCache, first: int, last: int, longest: int) -> None:
        self.first = first
        self.last = last
        self._cache = cache
        self._longest = longest  # tokens visible to the last query, the most of any row
        self._views: dict[int | None, KeyView] = {}

    def view(self, window: int | None) -> KeyView:
        """What is visible through a window of this many tokens, the querying one included; None: all."""
        if window is not None and self._longest <= window:
            window = None
        if (view := self._views.get(window)) is None:
            view = self._views[window] = self._make_view(window)
        return view

    @abstractmethod
    def _make_view(self, window: int | None) -> KeyView: ...

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        # made once, in the dtype of the scores: a boolean mask would be converted again by every layer
        mask = torch.zeros(visible.shape, dtype=self._cache.dtype, device=visible.device)
        return mask.masked_fill_(~visible, -torch.inf)


class DecodeRows(Queries):
    """Single tokens of several sequences. The mask of their views is [rows, 1, 1, keys]."""

    def __init__(self, cache: KVCache, first: int, lengths: IntArray, table: IntArray) -> None:
        """`lengths` [rows] include the token of this step; `table` [rows, blocks] is padded with any block."""
        longest = int(lengths.max())
        super().__init__(cache, first, first + len(lengths), longest)
        self._shortest = int(lengths.min())
        width = -(-longest // cache.block_size)
        self._lengths = torch.from_numpy(lengths).to(cache.device)
        self._table = torch.from_numpy(table[:, :width]).to(cache.device)

    def _make_view(self, window: int | None) -> KeyView:
        size, table = self._cache.block_size, self._table
        device = table.device
        lengths = self._lengths[:, None]
        if window is None:
            num_keys = table.shape[1] * size
            mask = None
            if self._shortest < num_keys:
                mask = self._additive(torch.arange(num_keys, device=device) < lengths)
            return KeyView(table.flatten(), num_keys, None if mask is None else mask[:, None, None])
        begin = (lengths - window).clamp_min_(0)
        # a window that starts inside a block reaches into one block more
        num_blocks = min(table.shape[1], -(-window // size) + 1)
        columns = begin // size + torch.arange(num_blocks, device=device)
        keys = (columns[:, :, None] * size + torch.arange(size, device=device)).flatten(1)
        mask = self._additive((keys >= begin) & (keys < lengths))[:, None, None]
        # columns past a row's end are masked; clamping only keeps the look-up inside the table
        block_ids = table.gather(1, columns.clamp_max_(table.shape[1] - 1))
        return KeyView(block_ids.flatten(), num_blocks * size, mask)


class Chunk(Queries):
    """Consecutive tokens of one sequence at positions `start` .. `stop` - 1; its mask is [queries, keys]."""

    def __init__(
        self, cache: KVCache, first: int, start: int, stop: int, block_ids: IntArray
    ) -> None:
        """`block_ids` [blocks] are the sequence's, up to `stop`."""
        super().__init__(cache, first, first + stop - start, stop)
        self.start = start
        self.stop = stop
        self._block_ids = torch.from_numpy(block_ids).to(cache.device)

    def sees_itself_only(self, window: int | None) -> bool:
        """Whether plain causal attention among its own tokens is all there is to compute."""
        return self.start == 0 and (window is None or self.stop <= window)

    def _make_view(self, window: int | None) -> KeyView:
        size, device = self._cache.block_size, self._block_ids.device
        begin = 0 if window is None else max(0, self.start - window + 1) // size * size
        queries = torch.arange(self.start, self.stop, device=device)[:, None]
        keys = torch.arange(begin, self.stop, device=device)
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        block_ids = self._block_ids[begin // size :]
        return KeyView(block_ids, self.stop - begin, self._additive(visible))


@dataclass(frozen=True, slots=True)
class Batch:
    """What the layers need to know of a step. Decode rows are packed before prefill chunks."""

    cache: KVCache
    input_ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens], where keys and values go: block * block_size + offset
    decode: list[DecodeRows]
    chunks: list[Chunk]


def pack(spans: Sequence[Span], cache: KVCache) -> Batch:
    """Pack the spans of one step, at least one; decode spans stand before all others."""
    size = cache.block_size
    num_decode = next((i for i, span in enumerate(spans) if not span.is_decode), len(spans))
    decode, prefill = spans[:num_decode], spans[num_decode:]
    lengths = np.array([span.stop for span in decode], dtype=np.int64)
    table = _block_table(decode, int(lengths.max(initial=0)), size)
    last = lengths - 1
    ids = [np.array([span.token_ids[span.start] for span in decode], dtype=np.int64)]
    positions = [last]
    slots = [table[np.arange(num_decode), last // size] * size + last % size]
    chunks = []
    first = num_decode
    for span in prefill:
        blocks = np.array(span.block_table[: -(-span.stop // size)], dtype=np.int64)
        chunk_positions = np.arange(span.start, span.stop)
        ids.append(np.array(span.token_ids[span.start : span.stop], dtype=np.int64))
        positions.append(chunk_positions)
        slots.append(blocks[chunk_positions // size] * size + chunk_positions % size)
        chunks.append(Chunk(cache, first, span.start, span.stop, blocks))
        first += span.stop - span.start
    # one transfer for the three arrays of a token
    columns = torch.from_numpy(np.stack([np.concatenate(x) for x in (ids, positions, slots)]))
    input_ids, position, slot = columns.to(cache.device).unbind()
    groups = [
        DecodeRows(cache, begin, lengths[begin:end], table[begin:end])
        for begin, end in _group(lengths.tolist(), cache)
    ]
    return Batch(cache, input_ids, position, slot, groups, chunks)


def _group(lengths: list[int], cache: KVCache) -> Iterator[tuple[int, int]]:
    """Cut the decode rows into groups (begin, end) whose keys and values, once gathered, stay within a limit.

    On a CPU a group's copy then is still in the processor's cache when it is attended to, several times as fast as
    from memory; on a GPU the limit bounds the memory of a step.
    """
    limit = _GATHERED_BYTES_CPU if cache.device.type == "cpu" else _GATHERED_BYTES_GPU
    most_tokens = limit // cache.bytes_per_token_of_layer
    begin = longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > begin and longest * (row + 1 - begin) > most_tokens:
            yield begin, row
            begin, longest = row, length
    if lengths:
        yield begin, len(lengths)


def _block_table(spans: Sequence[Span], max_length: int, block_size: int) -> IntArray:
    width = -(-max_length // block_size)
    table = np.zeros((len(spans), width), dtype=np.int64)
    for row, span in zip(table, spans, strict=True):
        num_blocks = -(-span.stop // block_size)
        row[:num_blocks] = span.block_table[:num_blocks]
        # padded with a block of its own: it is masked, but a masked NaN of somebody else's would still be NaN
        row[num_blocks:] = span.block_table[0]
    return table
