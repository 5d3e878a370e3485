"""Prefill by torch's `varlen_attn`, in whose place stands what its documentation says: a GPU alone runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as torch_varlen

from inference_worker.model import varlen
from inference_worker.model.attention import attend_cached
from inference_worker.model.batch import Batch, Span, pack
from inference_worker.model.kv_cache import KVCache, LayerShape

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 8, 0.4


def documented(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence, through a block table or over packed keys."""
    assert enable_gqa
    assert all(x.dtype == torch.int32 for x in (cu_seq_q, cu_seq_k))
    assert cu_seq_q.tolist() == [0, max_q] == [0, len(query)]
    assert cu_seq_k.tolist() == [0, max_k]
    left, right = window_size
    assert right == 0
    if block_table is None:
        assert len(key) == len(value) == max_k
    else:
        assert seqused_k is not None
        assert seqused_k.tolist() == [max_k]
        assert block_table.dtype == torch.int32
        assert block_table.shape[0] == 1
        key, value = (x[block_table[0].long()].flatten(0, 1)[:max_k] for x in (key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    last = torch.arange(max_k - max_q, max_k)[:, None]  # what each query sees last
    keys = torch.arange(max_k)
    visible = (keys <= last) & ((keys >= last - left) if left >= 0 else True)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def prefill(start: int, stop: int, block_size: int, window: int | None) -> Batch:
    """A chunk of one sequence whose keys and values are in the cache."""
    torch.manual_seed(start + stop)
    cache = KVCache(
        {0: LayerShape(KV_HEADS, DIM, DIM, window)},
        num_blocks=40,
        block_size=block_size,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.keys[0].normal_()
    cache.values[0].normal_()
    table = torch.randperm(40).tolist()
    return pack([Span(list(range(stop)), start, stop, table)], cache)


@pytest.mark.parametrize("block_size", [4, 256])
@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 30), (21, 30), (29, 31)])
def test_same_as_by_a_mask(
    start: int, stop: int, window: int | None, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = prefill(start, stop, block_size, window)
    query = torch.randn(stop - start, HEADS, DIM)
    expected = attend_cached(batch, 0, query, SCALE)
    monkeypatch.setattr(torch_varlen, "varlen_attn", documented)
    monkeypatch.setattr(varlen, "can_attend", lambda *_: True)
    torch.testing.assert_close(attend_cached(batch, 0, query, SCALE), expected)


def test_the_installed_torch_takes_the_call() -> None:
    """Through its operator's own shape function, which checks no layout."""
    for block_size in (16, 256):
        batch = prefill(3, 9, block_size, 5)
        cache, (chunk,) = batch.cache, batch.chunks
        for tensors in (cache.keys, cache.values):
            tensors[0] = tensors[0].to("meta", torch.bfloat16)
        chunk.block_ids = chunk.block_ids.to("meta")
        query = torch.empty(6, HEADS, DIM, dtype=torch.bfloat16, device="meta")
        attended = varlen.attend_chunk(cache, 0, chunk, query, SCALE)
        assert attended.shape == query.shape


def test_softcap_and_sinks_are_not_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = prefill(0, 9, 4, None)
    query = torch.randn(9, HEADS, DIM)
    options: list[dict[str, Any]] = [{"softcap": 2.0}, {"sinks": torch.zeros(HEADS)}]
    expected = [attend_cached(batch, 0, query, SCALE, **option) for option in options]
    monkeypatch.setattr(varlen, "can_attend", lambda *_: True)
    monkeypatch.setattr(torch_varlen, "varlen_attn", None)
    for option, result in zip(options, expected, strict=True):
        assert torch.equal(attend_cached(batch, 0, query, SCALE, **option), result)


def test_where_it_can_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    cache = prefill(0, 9, 4, None).cache
    assert not varlen.can_attend(cache, 0)
    cache.device = torch.device("cuda", 7)
    assert not varlen.can_attend(cache, 0)
    cache.dtype = torch.bfloat16
    assert varlen.can_attend(cache, 0)
    for key_dim, value_dim in ((8, 16), (12, 12), (264, 264)):
        cache.layers[0] = LayerShape(KV_HEADS, key_dim, value_dim, None)
        assert not varlen.can_attend(cache, 0)
    cache.layers[0] = LayerShape(KV_HEADS, DIM, DIM, None)
    cache.device = torch.device("cuda", 6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not varlen.can_attend(cache, 0)
