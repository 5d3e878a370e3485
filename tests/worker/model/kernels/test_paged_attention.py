"""The kernel of decode attention, against torch's attention over each row's own keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_worker.model.kernels.paged_attention import decode_attention, num_splits
from tests.worker.model.kernels.device import DEVICE
from tests.worker.model.kernels.nearness import COARSENESS, DTYPES

TOLERANCE = {torch.float32: COARSENESS * 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Case:
    """Rows of ragged lengths whose blocks lie anywhere; blocks of no row hold what is not a number."""

    def __init__(
        self,
        lengths: list[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        key_dim: int = 16,
        value_dim: int | None = None,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
        spare_columns: int = 2,
    ) -> None:
        torch.manual_seed(sum(lengths) + heads * 1000)
        self.block_size = block_size
        needed = [-(-length // block_size) for length in lengths]
        num_blocks = sum(needed) + 3
        shape = (num_blocks, block_size, kv_heads)
        self.keys = torch.full((*shape, key_dim), torch.nan, device=DEVICE).to(dtype)
        self.values = torch.full((*shape, value_dim or key_dim), torch.nan, device=DEVICE).to(dtype)
        free = torch.randperm(num_blocks).tolist()
        width = max(needed, default=0) + spare_columns
        table = torch.full((len(lengths), width), num_blocks + 1000)  # never read
        for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            blocks = [free.pop() for _ in range(count)]
            table[row, :count] = torch.tensor(blocks, dtype=torch.long)
            slots = self._slots(blocks, length)
            for cache in (self.keys, self.values):
                flat = cache.flatten(0, 1)
                flat[slots] = torch.randn(length, *flat.shape[1:], device=DEVICE).to(dtype)
        self.table = table.int().to(DEVICE)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.query = (2 * torch.randn(len(lengths), heads, key_dim, device=DEVICE)).to(dtype)

    def run(self, scale: float = 0.3, **options: Any) -> torch.Tensor:
        return decode_attention(
            self.query, self.keys, self.values, self.table, self.lengths, scale=scale, **options
        )

    def expected(
        self,
        scale: float = 0.3,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """In float64, row by row."""
        rows = []
        for row, length in enumerate(self.lengths.tolist()):
            if length == 0:
                rows.append(torch.zeros(self.query.shape[1], self.values.shape[-1], device=DEVICE))
                continue
            blocks = self.table[row, : -(-length // self.block_size)].tolist()
            slots = self._slots(blocks, length)[-(window or length) :]
            group = self.query.shape[1] // self.keys.shape[2]
            k, v = (
                cache.flatten(0, 1)[slots].double().repeat_interleave(group, 1)
                for cache in (self.keys, self.values)
            )
            scores = torch.einsum("hd,thd->ht", self.query[row].double(), k) * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None]], 1)
            weights = scores.softmax(-1)[:, : len(slots)]
            rows.append(torch.einsum("ht,thd->hd", weights, v))
        return torch.stack([row.double() for row in rows])

    def check(self, splits: int | None = None, **options: Any) -> None:
        """The kernel gives what is expected."""
        actual, expected = self.run(splits=splits, **options), self.expected(**options)
        dtype = self.query.dtype
        assert actual.dtype == dtype
        tolerance = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
        # float32 scores near the cap are that much coarser
        tolerance += COARSENESS * (options.get("softcap") or 0) * torch.finfo(torch.float32).eps
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)

    def _slots(self, blocks: list[int], length: int) -> torch.Tensor:
        offsets = torch.arange(self.block_size, device=DEVICE)
        firsts = torch.tensor(blocks, dtype=torch.long, device=DEVICE)[:, None] * self.block_size
        return (firsts + offsets).flatten()[:length]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (7, 1), (20, 1)])
def test_groups_of_heads(heads: int, kv_heads: int, splits: int, dtype: torch.dtype) -> None:
    Case([1, 130], heads=heads, kv_heads=kv_heads, dtype=dtype).check(splits)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [1, 64, 100, 500])
def test_window(window: int, splits: int) -> None:
    Case([1, 5, 6, 64, 203]).check(splits, window=window)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(softcap: float, splits: int) -> None:
    Case([3, 150]).check(splits, softcap=softcap)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("size", [-3.0, 1.0, 40.0])
def test_sinks(size: float, splits: int) -> None:
    sinks = size + torch.arange(4.0, device=DEVICE)
    Case([0, 1, 150]).check(splits, sinks=sinks)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (24, 40), (80, 80), (128, 64)])
@pytest.mark.parametrize("splits", [1, 2])
def test_widths(key_dim: int, value_dim: int, splits: int) -> None:
    Case([9, 100], key_dim=key_dim, value_dim=value_dim).check(splits)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 3, 16, 32]),
    splits=st.sampled_from([None, 1, 2, 5, 16]),
    window=st.none() | st.integers(1, 200),
)
def test_any_lengths(
    lengths: list[int], block_size: int, splits: int | None, window: int | None
) -> None:
    Case(lengths, block_size=block_size).check(splits, window=window)


@pytest.mark.parametrize("splits", [1, 4])
def test_padded_rows_give_zeros_and_change_no_other_row(splits: int) -> None:
    case = Case([70, 1, 130])
    alone = case.run(splits=splits)
    case.lengths[1] = 0
    case.query[1] = torch.nan
    padded = case.run(splits=splits)
    assert torch.equal(padded[1], torch.zeros_like(padded[1]))
    assert torch.equal(padded[0], alone[0])
    assert torch.equal(padded[2], alone[2])


def test_the_width_of_the_table_changes_no_bit_of_a_split() -> None:
    case = Case([70, 130])
    alone = case.run(splits=4)
    case.table = torch.cat([case.table, case.table], 1)
    assert torch.equal(case.run(splits=4), alone)
    case.table = case.table[:, : case.table.shape[1] // 2]
    assert not case.table.is_contiguous()
    assert torch.equal(case.run(splits=4), alone)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    case = Case([200], heads=2)
    for splits in (1, 2):
        case.check(splits, scale=300.0)


@pytest.mark.parametrize(
    ("pairs", "tokens", "expected"),
    [(8, 100_000, 32), (8, 300, 2), (8, 10, 1), (264, 100_000, 1), (1, 10**9, 64), (0, 0, 1)],
)
def test_number_of_splits(pairs: int, tokens: int, expected: int) -> None:
    assert num_splits(pairs, tokens, 132) == expected


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("query", lambda x: x[:, :3].contiguous(), "3 heads"),
        ("query", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "not contiguous"),
        ("query", lambda x: x[..., :8].contiguous(), "key_cache"),
        ("keys", lambda x: x.half(), "key_cache"),
        ("values", lambda x: x[:-1], "key_cache"),
        ("table", lambda x: x.long(), "block_table"),
        ("table", lambda x: x[:1], "block_table"),
        ("lengths", lambda x: x.long(), "lengths"),
    ],
)
def test_what_does_not_fit_is_refused(field: str, wrong: Any, message: str) -> None:
    case = Case([3, 5])
    setattr(case, field, wrong(getattr(case, field)))
    with pytest.raises(ValueError, match=message):
        case.run()
