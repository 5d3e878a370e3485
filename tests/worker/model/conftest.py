"""Tests of the model side run on one thread: the models are so small that more only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from inference_worker.model.native.compiler import CannotCompile
from inference_worker.model.native.library import NotSuited, load_library


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def native_library() -> None:
    """Skips where the C code cannot be compiled."""
    try:
        load_library("float32")
    except (CannotCompile, NotSuited) as error:
        pytest.skip(str(error))
