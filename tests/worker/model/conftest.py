"""Tests of the model side run on one thread: the models are so small that more only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.worker.model.c_library import c_library
from tests.worker.model.draws import scans

__all__ = ["scans"]


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def native_library() -> None:
    """Skips where the C code cannot run."""
    c_library()
