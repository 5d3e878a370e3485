"""One step's tokens packed in a row, and where their keys and values lie in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from inference_worker.model.kv_cache import KVCache


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
class DecodeView:
    """The cached tokens that the decode rows attend to, through a window of one size."""

    block_ids: torch.Tensor  # [rows * blocks]; each row padded to the same number of blocks
    mask: torch.Tensor | None  # [rows, 1, 1, blocks * block_size], 0 or -inf; None: all is visible


@dataclass(frozen=True, slots=True)
class ChunkView:
    """The cached tokens that a prefill chunk attends to, through a window of one size."""

    block_ids: torch.Tensor  # [blocks]
    num_keys: int  # keys in these blocks, from the first one on
    mask: torch.Tensor  # [queries, num_keys], 0 or -inf


@dataclass(slots=True)
class Chunk:
    """A prefill chunk: packed tokens `first` .. `last` - 1, at positions `start` .. `stop` - 1."""

    first: int
    last: int
    start: int
    stop: int
    block_ids: torch.Tensor  # [blocks] of the whole sequence up to `stop`
    views: dict[int | None, ChunkView] = field(default_factory=dict)


@dataclass(slots=True)
class Batch:
    """What the attention of every layer needs to know of a step.

    Decode rows, one token each, are packed before the prefill chunks. The views are made once for each window size
    and shared by the layers that have it.
    """

    cache: KVCache
    input_ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    slots: (
        torch.Tensor
    )  # [tokens]; where each token's key and value go, block * block_size + offset
    num_decode: int
    decode_blocks: torch.Tensor  # [num_decode, blocks], padded with block 0
    decode_lengths: torch.Tensor  # [num_decode], the token of this step included
    min_decode_length: int
    max_decode_length: int
    chunks: list[Chunk]
    decode_views: dict[int | None, DecodeView] = field(default_factory=dict)

    def decode_view(self, window: int | None) -> DecodeView:
        """The view of the decode rows; `window` is the number of visible tokens, None for all."""
        if window is not None and self.max_decode_length <= window:
            window = None
        if (view := self.decode_views.get(window)) is None:
            view = self._full_view() if window is None else self._window_view(window)
            self.decode_views[window] = view
        return view

    def chunk_view(self, chunk: Chunk, window: int | None) -> ChunkView:
        """The view of a prefill chunk; `window` is the number of visible tokens, None for all."""
        if window is not None and chunk.stop <= window:
            window = None
        if (view := chunk.views.get(window)) is None:
            view = chunk.views[window] = self._make_chunk_view(chunk, window)
        return view

    def _full_view(self) -> DecodeView:
        num_keys = self.decode_blocks.shape[1] * self.cache.block_size
        mask = None
        if self.min_decode_length < num_keys:
            keys = torch.arange(num_keys, device=self.slots.device)
            mask = self._additive(keys < self.decode_lengths[:, None])[:, None, None]
        return DecodeView(self.decode_blocks.flatten(), mask)

    def _window_view(self, window: int) -> DecodeView:
        size, table = self.cache.block_size, self.decode_blocks
        begin = (self.decode_lengths - window).clamp_min_(0)
        # a window that starts inside a block reaches into one block more
        num_blocks = min(table.shape[1], -(-window // size) + 1)
        device = self.slots.device
        columns = (begin // size)[:, None] + torch.arange(num_blocks, device=device)
        offsets = torch.arange(size, device=device)
        keys = (columns[:, :, None] * size + offsets).flatten(1)
        visible = (keys >= begin[:, None]) & (keys < self.decode_lengths[:, None])
        # columns past a row's end are masked; clamping only keeps the look-up inside the table
        block_ids = table.gather(1, columns.clamp_max_(table.shape[1] - 1))
        return DecodeView(block_ids.flatten(), self._additive(visible)[:, None, None])

    def _make_chunk_view(self, chunk: Chunk, window: int | None) -> ChunkView:
        size, device = self.cache.block_size, self.slots.device
        begin = 0 if window is None else max(0, chunk.start - window + 1) // size * size
        queries = torch.arange(chunk.start, chunk.stop, device=device)[:, None]
        keys = torch.arange(begin, chunk.stop, device=device)
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        block_ids = chunk.block_ids[begin // size :]
        return ChunkView(block_ids, chunk.stop - begin, self._additive(visible))

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        # made once here, in the dtype of the scores: a boolean mask would be converted again by every layer
        mask = torch.zeros(visible.shape, dtype=self.cache.dtype, device=visible.device)
        return mask.masked_fill_(~visible, -torch.inf)


def pack(spans: Sequence[Span], cache: KVCache) -> Batch:
    """Pack the spans of one step, at least one; decode spans stand before all others."""
    size, device = cache.block_size, cache.device
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
        end = first + span.stop - span.start
        on_device = torch.from_numpy(blocks).to(device)
        chunks.append(Chunk(first, end, span.start, span.stop, on_device))
        first = end
    # one transfer for the three arrays of a token
    columns = torch.from_numpy(np.stack([np.concatenate(x) for x in (ids, positions, slots)]))
    input_ids, position, slot = columns.to(device).unbind()
    return Batch(
        cache=cache,
        input_ids=input_ids,
        positions=position,
        slots=slot,
        num_decode=num_decode,
        decode_blocks=torch.from_numpy(table).to(device),
        decode_lengths=torch.from_numpy(lengths).to(device),
        min_decode_length=int(lengths.min()) if num_decode else 0,
        max_decode_length=int(lengths.max()) if num_decode else 0,
        chunks=chunks,
    )


def _block_table(spans: Sequence[Span], max_length: int, block_size: int) -> npt.NDArray[np.int64]:
    width = -(-max_length // block_size)
    table = np.zeros((len(spans), width), dtype=np.int64)
    for row, span in zip(table, spans, strict=True):
        num_blocks = -(-span.stop // block_size)
        row[:num_blocks] = span.block_table[:num_blocks]
    return table
