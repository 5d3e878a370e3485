"""Decode steps of fixed sizes over fixed input tensors, so that a CUDA graph launches all their kernels at once.

A batch of decode rows is padded to the next size by rows that compute nothing: length 0, slot -1 (see `kernels`).
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from inference_worker.model.batch import (
    Batch,
    DecodeRows,
    Int32Array,
    Span,
    lay_out,
    lay_out_blocks,
)
from inference_worker.model.forward import Forward
from inference_worker.model.kv_cache import KVCache
from inference_worker.model.transfer import upload_into

# Bigger batches run without a graph: the time of a launch is small beside that of their kernels.
_MOST_ROWS = 256
# A row's id, position and slot are of 8 bytes, its length is of 4.
_ROW_BYTES = 3 * 8 + 4


class Capture(Protocol):
    """Records what a function computes."""

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        """What computes the same again, from and into the same tensors."""
        ...


def call_again(compute: Callable[[], None]) -> Callable[[], None]:
    """The capture of a device without graphs: nothing is recorded."""
    return compute


class CudaCapture:
    """Records CUDA graphs. They share the memory of what is temporary in them: one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        """See Capture."""
        compute()  # compiles its kernels and makes its libraries' workspaces, neither of which can be recorded
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            compute()
        return graph.replay


def new_capture(device: torch.device) -> Capture | None:
    """What records on a device, if anything does."""
    return CudaCapture() if device.type == "cuda" else None


class DecodeGraphs:
    """A forward pass over decode rows alone, captured for some numbers of rows.

    A graph knows where what it reads lies, and keeps nothing alive: all that it reads and has not made itself, the
    weights included, is held here.
    """

    @torch.inference_mode()
    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        *,
        max_rows: int,
        max_length: int,
        capture: Capture,
    ) -> None:
        """For batches of up to `max_rows` rows of up to `max_length` tokens.

        Takes the time and memory of the captures. Raises: torch.OutOfMemoryError.
        """
        began = time.monotonic()
        self._forward = forward
        self._cache = cache
        self._sizes = sizes(max_rows)
        most = self._sizes[-1]
        width = -(-max_length // cache.block_size)
        self._max_length = max_length
        self._rows = torch.zeros(most * _ROW_BYTES, dtype=torch.uint8, device=cache.device)
        self._table = torch.zeros(most, width, dtype=torch.int32, device=cache.device)
        self._known_table: Int32Array = np.zeros((0, 0), dtype=np.int32)  # what _table begins with
        self._wanted = torch.arange(most, device=cache.device)
        self._logits: torch.Tensor | None = None  # [most, vocabulary]
        self._batches: dict[int, Batch] = {}
        self._graphs: dict[int, Callable[[], None]] = {}
        for size in reversed(self._sizes):  # the biggest first: the others fit in its memory
            self._batches[size] = self._make_batch(size)
            self._fill_rows(size, [])
            self._graphs[size] = capture(self._computation(size))
        self.seconds = time.monotonic() - began

    def __str__(self) -> str:
        first, last = self._sizes[0], self._sizes[-1]
        return f"{len(self._sizes)} decode graphs of {first} to {last} rows in {self.seconds:.1f} s"

    @torch.inference_mode()
    def batch(self, spans: Sequence[Span]) -> Batch | None:
        """The spans in the input tensors, padded; None if they are not decode rows alone, or too many or too long.

        It holds until the next call. Steps may still read what the call before has put there: the device takes the
        copies and the steps in order.
        """
        if len(spans) > self._sizes[-1]:
            return None
        if not all(span.is_decode and span.stop <= self._max_length for span in spans):
            return None
        size = self._sizes[bisect.bisect_left(self._sizes, len(spans))]
        self._fill_rows(size, spans)
        self._fill_table(spans)
        return self._batches[size]

    @torch.inference_mode()
    def logits(self, batch: Batch, num_rows: int) -> torch.Tensor:
        """Compute a batch made by `batch`: a copy of its first rows' logits [num_rows, vocabulary], in float32."""
        self._graphs[len(batch.slots)]()
        assert self._logits is not None  # noqa: S101 - made with the first graph
        return self._logits[:num_rows].to(torch.float32, copy=True)

    def _make_batch(self, size: int) -> Batch:
        """Views of the input tensors for this many rows."""
        columns = self._rows[: size * 24].view(torch.int64)
        input_ids, positions, slots = columns.view(3, size).unbind()
        lengths = self._rows[size * 24 : size * _ROW_BYTES].view(torch.int32)
        # what is launched must depend on shapes alone, so the bounds say nothing about the rows
        rows = DecodeRows(self._cache, 0, lengths, self._table[:size], (0, self._max_length))
        return Batch(self._cache, input_ids, positions, slots, [rows], [])

    def _computation(self, size: int) -> Callable[[], None]:
        forward, batch, wanted = self._forward, self._batches[size], self._wanted[:size]
        if self._logits is None:
            self._logits = torch.empty_like(forward(batch, wanted))
        out = self._logits[:size]

        def compute() -> None:
            out.copy_(forward(batch, wanted))

        return compute

    def _fill_rows(self, size: int, spans: Sequence[Span]) -> None:
        rows = np.zeros(size * _ROW_BYTES, dtype=np.uint8)
        columns = rows[: size * 24].view(np.int64).reshape(3, size)
        lengths = rows[size * 24 :].view(np.int32)
        columns[2] = -1
        if spans:
            columns[:, : len(spans)] = lay_out(spans, self._cache.block_size)
            lengths[: len(spans)] = [span.stop for span in spans]
        upload_into(rows, self._rows[: len(rows)])

    def _fill_table(self, spans: Sequence[Span]) -> None:
        """Most steps need no new block, and leave the table as it is."""
        table = lay_out_blocks(spans, max(span.stop for span in spans), self._cache.block_size)
        if not np.array_equal(table, self._known_table):
            upload_into(table, self._table[: table.shape[0], : table.shape[1]])
            self._known_table = table


def sizes(max_rows: int) -> list[int]:
    """Numbers of rows that are captured, ascending: 1, 2, 4 and multiples of 8, up to the first that holds all."""
    most = min(max_rows, _MOST_ROWS)
    steps = [1, 2, 4, *range(8, _MOST_ROWS + 1, 8)]
    return steps[: bisect.bisect_left(steps, most) + 1]
