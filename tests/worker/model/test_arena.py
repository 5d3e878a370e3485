"""Weights are moved side by side: the same values, nothing kept twice, and none that are too many."""

from __future__ import annotations

import errno
import gc
import mmap
import weakref

import pytest
import torch
from torch import nn

from inference_worker.model.native import arena
from inference_worker.model.native.decoder import NativeDecoder
from tests.worker.model.driver import new_runner
from tests.worker.model.tiny_models import build_from, config

LARGE_PAGE = 2 * 2**20


def test_tensors_of_any_kind_lie_behind_each_other() -> None:
    tensors = [
        torch.randn(3, 5),
        torch.randn(7, dtype=torch.bfloat16),
        torch.arange(24, dtype=torch.int32).view(2, 3, 4),
    ]
    copies = [x.clone() for x in tensors]
    arena.gather(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    first = tensors[0].data_ptr()
    assert first % LARGE_PAGE == 0
    assert [x.data_ptr() - first for x in tensors] == [0, 64, 128]  # a line each


def test_where_there_is_no_room_for_them_twice_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    tensor = torch.randn(3, 5)
    address, copy = tensor.data_ptr(), tensor.clone()
    arena.gather([tensor])
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, copy)


def test_memory_lives_as_long_as_any_of_its_tensors() -> None:
    tensors = [torch.randn(1000), torch.full((1000,), 5.0)]
    arena.gather(tensors)
    last = tensors.pop()
    tensors.clear()
    gc.collect()
    assert bool((last == 5).all())


def test_too_many_bytes_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_MOST_BYTES", 100)
    tensor = torch.randn(64)
    before = tensor.data_ptr()
    arena.gather([tensor])
    assert tensor.data_ptr() == before


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("is_tied", [False, True])
def test_weights_are_not_kept_twice(is_tied: bool) -> None:
    """Those that a step reads whole; an embedding that is the output head too goes on being the same memory."""
    model = build_from(config("Llama", tie_word_embeddings=is_tied))
    old = [
        weakref.ref(module.weight.untyped_storage())
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    runner = new_runner(model, native=True)
    assert isinstance(runner._forward, NativeDecoder)
    embedding, head = (model.get_submodule(name) for name in ("model.embed_tokens", "lm_head"))
    same = embedding.get_parameter("weight").data_ptr() == head.get_parameter("weight").data_ptr()
    assert same is is_tied
    del embedding, head, model
    gc.collect()
    assert {reference() for reference in old} == {None}
