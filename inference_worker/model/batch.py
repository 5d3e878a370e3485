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
from inference_worker.model.transfer import upload

IntArray: TypeAlias = npt.NDArray[np.int64]
Int32Array: TypeAlias = npt.NDArray[np.int32]

# Keys and values of one layer that are gathered from the cache at once, for decode rows.
_GATHERED_BYTES_CPU = 4 * 2**20
_GATHERED_BYTES_GPU = 512 * 2**20
# Keys that a token which attends alone looks at together.
_PIECE = 128


@dataclass(frozen=True, slots=True)
class Span:
    """The part of one sequence that a step computes: `token_ids[start:stop]`, with everything before it cached."""

    token_ids: Sequence[int]  # of the whole sequence; a decode span's own may not be known yet
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
    def tables(self) -> torch.Tensor:
        """The block table of each token's sequence [tokens, blocks], padded with a block of its own."""

    @abstractmethod
    def _make_view(self, window: int | None) -> KeyView: ...

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        # made once, in the dtype of the scores: a boolean mask would be converted again by every layer
        mask = torch.zeros(visible.shape, dtype=self._cache.dtype, device=visible.device)
        return mask.masked_fill_(~visible, -torch.inf)


class DecodeRows(Queries):
    """Single tokens of several sequences. The mask of their views is [rows, 1, 1, keys]."""

    def __init__(
        self,
        cache: KVCache,
        first: int,
        lengths: torch.Tensor,
        block_table: torch.Tensor,
        bounds: tuple[int, int],
    ) -> None:
        """`lengths` [rows] include the token of this step and lie within `bounds`; `block_table` [rows, blocks] is
        padded with any block. Both are int32.
        """
        self._shortest, longest = bounds
        super().__init__(cache, first, first + len(lengths), longest)
        self.lengths = lengths
        self.block_table = block_table

    @classmethod
    def of(cls, cache: KVCache, first: int, lengths: Int32Array, table: Int32Array) -> DecodeRows:
        """Rows that are still on the host."""
        bounds = int(lengths.min()), int(lengths.max())
        width = -(-bounds[1] // cache.block_size)
        on_device = upload(np.ascontiguousarray(table[:, :width]), cache.device)
        return cls(cache, first, upload(lengths, cache.device), on_device, bounds)

    def tables(self) -> torch.Tensor:
        """See Queries."""
        return self.block_table.long()

    def _make_view(self, window: int | None) -> KeyView:
        size, table = self._cache.block_size, self.block_table
        device = table.device
        lengths = self.lengths[:, None]
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
        block_ids = table.gather(1, columns.clamp_max_(table.shape[1] - 1).long())
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
        self.block_ids = upload(block_ids, cache.device)
        self._cumulative: dict[int, torch.Tensor] = {}

    def sees_itself_only(self, window: int | None) -> bool:
        """Whether plain causal attention among its own tokens is all there is to compute."""
        return self.start == 0 and (window is None or self.stop <= window)

    def tables(self) -> torch.Tensor:
        """See Queries."""
        return self.block_ids.expand(self.stop - self.start, -1)

    def first_key(self, window: int | None) -> int:
        """Position of the first token in the first block that any of its tokens sees through a window."""
        size = self._cache.block_size
        return 0 if window is None else max(0, self.start - window + 1) // size * size

    @property
    def cumulative_queries(self) -> torch.Tensor:
        """0 and the number of its tokens, int32."""
        return self._from_zero(self.stop - self.start)

    def cumulative_keys(self, first: int) -> torch.Tensor:
        """0 and the number of visible tokens from position `first` on, int32."""
        return self._from_zero(self.stop - first)

    def _from_zero(self, count: int) -> torch.Tensor:
        # made once and shared by the layers
        if (bounds := self._cumulative.get(count)) is None:
            bounds = upload(np.array([0, count], dtype=np.int32), self._cache.device)
            self._cumulative[count] = bounds
        return bounds

    def _make_view(self, window: int | None) -> KeyView:
        size, device = self._cache.block_size, self.block_ids.device
        begin = self.first_key(window)
        queries = torch.arange(self.start, self.stop, device=device)[:, None]
        keys = torch.arange(begin, self.stop, device=device)
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        block_ids = self.block_ids[begin // size :]
        return KeyView(block_ids, self.stop - begin, self._additive(visible))


@dataclass(frozen=True, slots=True)
class PieceOfKeys:
    """Some consecutive positions of each token's own sequence."""

    slots: torch.Tensor  # [tokens * keys], where in the cache they are
    mask: torch.Tensor  # [tokens, keys], 0 or -inf, float32


class TokenRows:
    """Tokens each of which attends alone, to keys in pieces that are cut at the same positions for all."""

    def __init__(self, cache: KVCache, positions: torch.Tensor, tables: torch.Tensor) -> None:
        """`positions` [tokens]; `tables` [tokens, blocks] are their sequences', padded with a block of their own."""
        self._block_size = cache.block_size
        self._positions = positions[:, None]
        self._tables = tables
        self._pieces: dict[int | None, list[PieceOfKeys]] = {}

    def pieces(self, window: int | None) -> list[PieceOfKeys]:
        """All that any of the tokens sees through a window, in order of positions."""
        if (pieces := self._pieces.get(window)) is None:
            pieces = self._pieces[window] = list(self._make_pieces(window))
        return pieces

    def _make_pieces(self, window: int | None) -> Iterator[PieceOfKeys]:
        least, greatest = (int(x) for x in self._positions.aminmax())
        begin = 0 if window is None else max(0, least - window + 1)
        size = self._block_size
        for start in range(begin // _PIECE * _PIECE, greatest + 1, _PIECE):
            keys = torch.arange(start, start + _PIECE, device=self._positions.device)
            visible = keys <= self._positions
            if window is not None:
                visible &= keys > self._positions - window
            mask = torch.zeros(visible.shape, device=visible.device)
            mask.masked_fill_(~visible, -torch.inf)
            # positions past a table's end are masked; clamping only keeps the look-up inside
            columns = (keys // size).clamp_max_(self._tables.shape[1] - 1)
            slots = self._tables[:, columns] * size + keys % size
            yield PieceOfKeys(slots.flatten(), mask)


@dataclass(frozen=True, slots=True)
class Batch:
    """What the layers need to know of a step. Decode rows are packed before prefill chunks."""

    cache: KVCache
    input_ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens], where keys and values go: block * block_size + offset
    decode: list[DecodeRows]
    chunks: list[Chunk]
    rows: TokenRows | None = None  # if set, in place of the two above

    def block_tables(self) -> torch.Tensor:
        """The block table of each token's sequence [tokens, blocks], padded with a block of its own."""
        tables = [part.tables() for part in (*self.decode, *self.chunks)]
        width = max(table.shape[1] for table in tables)
        return torch.cat(
            [torch.cat([x, x[:, :1].expand(-1, width - x.shape[1])], 1) for x in tables]
        )


def pack(spans: Sequence[Span], cache: KVCache) -> Batch:
    """Pack the spans of one step, at least one; decode spans stand before all others."""
    num_decode = next((i for i, span in enumerate(spans) if not span.is_decode), len(spans))
    decode, prefill = spans[:num_decode], spans[num_decode:]
    columns = [lay_out(decode, cache.block_size)]
    lengths = (columns[0][1] + 1).astype(np.int32)
    table = lay_out_blocks(decode, int(lengths.max(initial=0)), cache.block_size)
    chunks = []
    first = num_decode
    for span in prefill:
        chunk, chunk_columns = _pack_chunk(span, first, cache)
        chunks.append(chunk)
        columns.append(chunk_columns)
        first = chunk.last
    # one transfer for the three arrays of a token
    input_ids, positions, slots = upload(np.concatenate(columns, 1), cache.device).unbind()
    groups = [
        DecodeRows.of(cache, begin, lengths[begin:end], table[begin:end])
        for begin, end in _group(lengths.tolist(), cache)
    ]
    return Batch(cache, input_ids, positions, slots, groups, chunks)


def lay_out(spans: Sequence[Span], block_size: int) -> IntArray:
    """Token id, position and slot of each decode span: [3, spans]. A token that is not known yet is given as 0."""
    ids = [s.token_ids[s.start] if s.start < len(s.token_ids) else 0 for s in spans]
    slots = [
        s.block_table[s.start // block_size] * block_size + s.start % block_size for s in spans
    ]
    return np.array([ids, [s.start for s in spans], slots], dtype=np.int64)


def _pack_chunk(span: Span, first: int, cache: KVCache) -> tuple[Chunk, IntArray]:
    """A prefill chunk, and its tokens' ids, positions and slots [3, tokens]."""
    size = cache.block_size
    blocks = np.array(span.block_table[: -(-span.stop // size)], dtype=np.int64)
    ids = np.array(span.token_ids[span.start : span.stop], dtype=np.int64)
    positions = np.arange(span.start, span.stop)
    slots = blocks[positions // size] * size + positions % size
    return Chunk(cache, first, span.start, span.stop, blocks), np.stack([ids, positions, slots])


def _group(lengths: list[int], cache: KVCache) -> Iterator[tuple[int, int]]:
    """Cut the decode rows into groups (begin, end) whose keys and values, once gathered, stay within a limit.

    On a CPU a group's copy then is still in the processor's cache when it is attended to, several times as fast as
    from memory; on a GPU the limit bounds the memory of a step. The kernels gather nothing.
    """
    if cache.uses_kernels:
        if lengths:
            yield 0, len(lengths)
        return
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


def lay_out_blocks(spans: Sequence[Span], max_length: int, block_size: int) -> Int32Array:
    """The blocks of each decode span: [spans, blocks of `max_length` tokens]."""
    width = -(-max_length // block_size)
    rows = []
    for span in spans:
        blocks = span.block_table[: -(-span.stop // block_size)]
        # padded with a block of its own: it is masked, but a masked NaN of somebody else's would still be NaN
        rows.append([*blocks, *[blocks[0]] * (width - len(blocks))])
    return np.array(rows, dtype=np.int32).reshape(len(rows), width)
