"""The compiled kernels at the sizes of real models. The tests of every case, `tests/worker/model/kernels`, run compiled
too where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional


@pytest.mark.parametrize("num_rows", [1, 8, 33])
@pytest.mark.parametrize("window", [None, 1000])
def test_decode_attention_over_long_contexts(num_rows: int, window: int | None) -> None:
    pytest.importorskip("triton")
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
