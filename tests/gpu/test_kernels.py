"""The compiled kernels at the sizes of real models. The tests of every case, `tests/worker/model/kernels`, run compiled
too where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional


@pytest.mark.parametrize("num_rows", [1, 8, 33])
@pytest.mark.parametrize("window", [None, 1000])
def test_decode_attention_over_long_contexts(num_rows: int, window: int | None) -> None:
    from inference_worker.model.kernels.paged_attention import decode_attention

    heads, kv_heads, dim, size, width = 32, 8, 128, 16, 256
    generator = torch.Generator("cuda").manual_seed(num_rows)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    keys, values = (randn(num_rows * width, size, kv_heads, dim) for _ in range(2))
    table = torch.randperm(num_rows * width, device="cuda", generator=generator)
    table = table.view(num_rows, width).int()
    lengths = torch.randint(1, width * size + 1, (num_rows,), device="cuda", generator=generator)
    lengths[0] = width * size
    if num_rows > 1:
        lengths[1] = 0
    query = randn(num_rows, heads, dim)
    found = decode_attention(
        query, keys, values, table, lengths.int(), scale=dim**-0.5, window=window
    )
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            assert not found[row].any()
            continue
        begin = 0 if window is None else max(0, length - window)
        k, v = (
            x[table[row].long()].flatten(0, 1)[begin:length].transpose(0, 1).double()
            for x in (keys, values)
        )
        k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
        expected = functional.scaled_dot_product_attention(query[row, :, None].double(), k, v)[:, 0]
        torch.testing.assert_close(found[row].double(), expected, atol=2e-2, rtol=2e-2)


def test_offsets_beyond_32_bits() -> None:
    """A cache of more elements than an int32 counts: what lies at its end is what lies in one of a single block."""
    from inference_worker.model.kernels.paged_attention import decode_attention
    from inference_worker.model.kernels.rope_kv import rope_and_write

    heads, kv_heads, dim, size = 32, 8, 128, 16
    num_blocks = 2**31 // (size * kv_heads * dim) + 2
    needed = 3 * num_blocks * size * kv_heads * dim * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"the device has no {needed >> 30} GiB free")
    qkv = torch.randn(size, (heads + 2 * kv_heads) * dim, dtype=torch.bfloat16, device="cuda")
    positions = torch.arange(size, device="cuda")
    cos, sin = torch.randn(2, size, dim // 2, dtype=torch.bfloat16, device="cuda").unbind()

    def at_the_end_of(blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            torch.zeros(blocks, size, kv_heads, dim, dtype=torch.bfloat16, device="cuda")
            for _ in range(2)
        )
        slots = (blocks - 1) * size + positions
        query = rope_and_write(qkv, positions, slots, cos, sin, keys, values)
        table = torch.tensor([[blocks - 1]], dtype=torch.int32, device="cuda")
        lengths = torch.tensor([size], dtype=torch.int32, device="cuda")
        attended = decode_attention(query[-1:], keys, values, table, lengths, scale=dim**-0.5)
        return attended, torch.stack([keys[-1], values[-1]])

    for found, expected in zip(at_the_end_of(num_blocks), at_the_end_of(1), strict=True):
        assert expected.any()
        assert torch.equal(found, expected)
