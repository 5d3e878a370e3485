"""Size and contents of the KV cache, and how much memory is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference_worker.model import memory
from inference_worker.model.errors import LoadError
from inference_worker.model.kv_cache import KVCache, LayerShape, bytes_per_token, count_blocks

CPU = torch.device("cpu")
LAYERS = {0: LayerShape(2, 16, 16, None), 3: LayerShape(4, 32, 24, 8)}


def new_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(LAYERS, num_blocks=6, block_size=4, dtype=dtype, device=CPU)


def test_bytes_of_a_token() -> None:
    elements = 2 * (16 + 16) + 4 * (32 + 24)
    assert bytes_per_token(LAYERS, torch.float32) == 4 * elements
    assert bytes_per_token(LAYERS, torch.bfloat16) == 2 * elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_have_the_shapes_and_bytes_that_were_computed(dtype: torch.dtype) -> None:
    cache = new_cache(dtype)
    assert cache.keys[3].shape == (6, 4, 4, 32)
    assert cache.values[3].shape == (6, 4, 4, 24)
    tensors = [*cache.keys.values(), *cache.values.values()]
    assert sum(x.nbytes for x in tensors) == 6 * 4 * cache.bytes_per_token
    assert all(x.dtype is dtype and not x.any() for x in tensors)


def test_written_slots_are_read_by_block_and_cleared() -> None:
    cache = new_cache()
    keys, values = torch.randn(3, 4, 32), torch.randn(3, 4, 24)
    cache.write(3, torch.tensor([9, 20, 21]), keys, values)
    read_keys, read_values = cache.read(3, torch.tensor([5, 2]))
    assert torch.equal(read_keys[[5, 0, 1]], keys)
    assert torch.equal(read_values[[5, 0, 1]], values)
    assert not read_keys[[2, 3, 4, 6, 7]].any()
    cache.clear(torch.tensor([20]))
    assert not cache.keys[3].flatten(0, 1)[20].any()
    assert torch.equal(cache.keys[3].flatten(0, 1)[21], keys[2])


def test_description() -> None:
    cache = KVCache(
        {0: LayerShape(2, 64, 64, None)},
        num_blocks=64,
        block_size=16,
        dtype=torch.float32,
        device=CPU,
    )
    assert str(cache) == "KV cache: 64 blocks of 16 tokens, 1.0 MiB (1.0 KiB a token)"


@given(
    num_bytes=st.integers(0, 10**12),
    block_size=st.integers(1, 256),
    token_bytes=st.integers(1, 10**6),
    most_tokens=st.none() | st.integers(1, 10**7),
)
def test_blocks_fit_and_are_no_more_than_can_be_used(
    num_bytes: int, block_size: int, token_bytes: int, most_tokens: int | None
) -> None:
    size = block_size * token_bytes
    if num_bytes < 2 * size:
        with pytest.raises(LoadError, match="no memory for the KV cache"):
            count_blocks(
                num_bytes=num_bytes,
                block_size=block_size,
                token_bytes=token_bytes,
                most_tokens=most_tokens,
            )
        return
    blocks = count_blocks(
        num_bytes=num_bytes, block_size=block_size, token_bytes=token_bytes, most_tokens=most_tokens
    )
    assert 2 <= blocks <= num_bytes // size
    if most_tokens is not None and blocks > 2:
        assert (blocks - 1) * block_size < most_tokens
        assert blocks * block_size >= most_tokens or blocks == num_bytes // size


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_system_memory_is_what_is_available(tmp_path: Path) -> None:
    root = write(tmp_path, {"meminfo": "MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable:   77 kB\n"})
    assert memory._system_free_bytes(root / "meminfo") == 77 * 1024


def test_without_meminfo_half_of_the_machine_counts(tmp_path: Path) -> None:
    assert memory._system_free_bytes(tmp_path / "absent") > 0


def test_container_limits(tmp_path: Path) -> None:
    v2 = {
        "memory.max": "1000\n",
        "memory.current": "700\n",
        "memory.stat": "anon 5\ninactive_file 200\n",
    }
    assert memory._cgroup_free_bytes(write(tmp_path / "v2", v2)) == 500
    v1 = {
        "memory/memory.limit_in_bytes": "1000",
        "memory/memory.usage_in_bytes": "1100",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
    }
    assert memory._cgroup_free_bytes(write(tmp_path / "v1", v1)) == 0
    unlimited = {**v2, "memory.max": "max\n"}
    assert memory._cgroup_free_bytes(write(tmp_path / "unlimited", unlimited)) is None
    assert memory._cgroup_free_bytes(tmp_path / "none") is None


def test_free_memory_of_this_machine() -> None:
    assert memory.free_bytes(CPU) > 0
