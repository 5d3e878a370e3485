"""Steps in C on several threads: the same numbers, and no thread left over."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from inference_worker.model import fast_forward
from inference_worker.model.decoder import FusedDecoder
from inference_worker.model.native.decoder import NativeDecoder
from tests.worker.model.driver import new_runner, prompt_of
from tests.worker.model.native_models import logits_of, native_runner
from tests.worker.model.tiny_models import build, build_from, config

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_do_not_change_a_bit(dtype: torch.dtype, num_threads: int) -> None:
    """More threads than cores, too, on sizes that give each of them something to do."""
    model: PreTrainedModel = build_from(
        config("Llama", hidden_size=256, intermediate_size=800, vocab_size=1003)
    )
    model.to(dtype)  # type: ignore[arg-type]
    prompts = [prompt_of(length, vocabulary=1003) for length in (34, 1, 17)]
    alone = logits_of(native_runner(model), prompts)
    torch.set_num_threads(num_threads)
    try:
        runner = native_runner(model)
        for chunk in (1, 5, 1000):
            shared = logits_of(runner, prompts, chunk)
            assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_threads_end_with_their_decoder() -> None:
    native_runner(build("llama"))  # torch has made its own threads after this
    gc.collect()
    before = num_threads_here()
    runner = native_runner(build("llama"))
    assert num_threads_here() == before + 1
    runner.close()
    gc.collect()
    assert num_threads_here() == before


def num_threads_here() -> int:
    return len(os.listdir("/proc/self/task"))


def test_more_threads_than_there_can_be_are_as_many_as_there_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inference_worker.model.native.decoder._MOST_THREADS", 2)
    torch.set_num_threads(5)
    try:
        forward = native_runner(build("llama"))._forward
    finally:
        torch.set_num_threads(1)
    assert isinstance(forward, NativeDecoder)
    assert forward._num_threads == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("limits", "dtype", "has_tiles", "is_for_c"),
    [
        ((10**6, 10**6, 1), torch.bfloat16, True, True),
        ((1000, 10**6, 2), torch.bfloat16, False, True),
        ((1000, 10**6, 2), torch.float32, True, True),
        ((1000, 10**6, 2), torch.bfloat16, True, False),
        ((1000, 10**6, 1), torch.float32, False, False),
        ((1000, 1000, 2), torch.float32, False, False),
    ],
)
def test_large_models_on_several_threads_are_for_torch(
    limits: tuple[int, int, int],
    dtype: torch.dtype,
    has_tiles: bool,
    is_for_c: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("_FEW_PARAMETERS", "_MANY_PARAMETERS", "_FEW_THREADS")
    for name, limit in zip(names, limits, strict=True):
        monkeypatch.setattr(fast_forward, name, limit)
    monkeypatch.setattr(fast_forward, "has_tiles", lambda: has_tiles)
    model: PreTrainedModel = build("llama")
    model.to(dtype)  # type: ignore[arg-type]
    forward = new_runner(model, native=True)._forward
    assert isinstance(forward, NativeDecoder if is_for_c else FusedDecoder)
