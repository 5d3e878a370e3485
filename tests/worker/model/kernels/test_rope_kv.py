"""The kernel of rotary embedding and cache writes, against transformers' own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from inference_worker.model.kernels.rope_kv import rope_and_write
from tests.worker.model.kernels.device import DEVICE
from tests.worker.model.kernels.nearness import DTYPES, assert_same_up_to_last_bit

NUM_POSITIONS, NUM_BLOCKS, BLOCK_SIZE, EPSILON = 40, 6, 4, 1e-6


class Case:
    """A batch of tokens of one layer."""

    def __init__(
        self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, tokens: int = 5
    ) -> None:
        torch.manual_seed(heads * 100 + dim)
        self.heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, dim, dtype
        self.qkv = (2 * torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=DEVICE)).to(dtype)
        self.positions = torch.randint(NUM_POSITIONS, (tokens,), device=DEVICE)
        self.slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, device=DEVICE)[:tokens]
        angles = torch.rand(NUM_POSITIONS, dim // 2, device=DEVICE) * 7
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        shape = (2, 1 + NUM_BLOCKS, BLOCK_SIZE, kv_heads, dim)
        # slot -1 would lie in the block before the first one
        self.guarded = torch.randn(shape, device=DEVICE).to(dtype)
        self.keys, self.values = self.guarded[:, 1:]

    def run(self, **options: Any) -> torch.Tensor:
        return rope_and_write(
            self.qkv,
            self.positions,
            self.slots,
            self.cos,
            self.sin,
            self.keys,
            self.values,
            **options,
        )

    def split(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [tokens, heads, dim] as projected."""
        heads = self.qkv.view(len(self.qkv), -1, self.dim)
        q, k, v = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], 1)
        return q, k, v

    def rotate(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys by transformers' function."""
        cos, sin = (torch.cat([x[self.positions]] * 2, -1) for x in (self.cos, self.sin))
        rotated: tuple[torch.Tensor, torch.Tensor] = apply_rotary_pos_emb(
            q, k, cos, sin, unsqueeze_dim=1
        )
        return rotated


SHAPES = [(4, 4, 16), (8, 2, 32), (6, 1, 64), (14, 2, 64), (3, 1, 80), (32, 8, 128)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_queries_and_cache(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    case = Case(heads, kv_heads, dim, dtype)
    keys, values = case.keys.clone(), case.values.clone()
    q, k, v = case.split()
    q, k = case.rotate(q, k)
    keys.flatten(0, 1)[case.slots] = k
    values.flatten(0, 1)[case.slots] = v
    query = case.run()
    tolerance = 2e-6 if dtype == torch.float32 else 0  # of sums that the processor may fuse
    torch.testing.assert_close(query, q, rtol=0, atol=tolerance)
    torch.testing.assert_close(case.keys, keys, rtol=0, atol=tolerance)
    assert torch.equal(case.values, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 1, 80)])
def test_norms_of_queries_and_keys(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    case = Case(heads, kv_heads, dim, dtype)
    # without rotation, so that the last bits of the norm stay the last bits
    case.cos.fill_(1)
    case.sin.zero_()
    norms = [Qwen3RMSNorm(dim, EPSILON).to(DEVICE, dtype) for _ in "qk"]
    with torch.no_grad():
        for norm in norms:
            norm.weight.normal_()
        q, k, v = case.split()
        query = case.run(query_norm=norms[0].weight, key_norm=norms[1].weight, epsilon=EPSILON)
        assert_same_up_to_last_bit(query, norms[0](q))
        assert_same_up_to_last_bit(case.keys.flatten(0, 1)[case.slots], norms[1](k))
    assert torch.equal(case.values.flatten(0, 1)[case.slots], v)


def test_norms_come_before_rotation() -> None:
    case = Case(4, 2, 16, torch.float32)
    norms = [Qwen3RMSNorm(16, EPSILON).to(DEVICE) for _ in "qk"]
    q, k, _v = case.split()
    with torch.no_grad():
        for norm in norms:
            norm.weight.normal_()
        q, k = case.rotate(norms[0](q), norms[1](k))
        query = case.run(query_norm=norms[0].weight, key_norm=norms[1].weight, epsilon=EPSILON)
    torch.testing.assert_close(query, q)
    torch.testing.assert_close(case.keys.flatten(0, 1)[case.slots], k)


def test_padding_writes_nothing_and_changes_no_other_row() -> None:
    case, padded = Case(8, 2, 32, torch.float32), Case(8, 2, 32, torch.float32)
    padded.slots[3:] = -1
    padded.qkv[3:] = torch.nan
    padded.positions[3:] = 0
    guards = padded.guarded[:, 0].clone()
    before = padded.keys.clone(), padded.values.clone()
    query = case.run()
    padded_query = padded.run()
    assert torch.equal(padded_query[:3], query[:3])
    assert torch.equal(padded.guarded[:, 0], guards)
    for after, old, full in zip(
        (padded.keys, padded.values), before, (case.keys, case.values), strict=True
    ):
        old.flatten(0, 1)[case.slots[:3]] = full.flatten(0, 1)[case.slots[:3]]
        assert torch.equal(after, old)


def test_no_tokens() -> None:
    assert Case(4, 2, 16, torch.float32, tokens=0).run().shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("qkv", lambda x: x[:, :-32]),
        ("qkv", lambda x: x.half()),
        ("positions", lambda x: x.int()),
        ("slots", lambda x: x[1:]),
        ("cos", lambda x: x.repeat(1, 2)),
        ("sin", lambda x: x[1:]),
        ("values", lambda x: x[1:]),
        ("keys", lambda x: x.transpose(0, 1)),
    ],
)
def test_what_does_not_fit_is_refused(field: str, wrong: Any) -> None:
    case = Case(4, 2, 16, torch.float32)
    setattr(case, field, wrong(getattr(case, field)))
    with pytest.raises(ValueError, match="wanted"):
        case.run()
    with pytest.raises(ValueError, match="norms"):
        Case(4, 2, 16, torch.float32).run(query_norm=torch.ones(16, device=DEVICE))
