"""All tests here share one event loop, one scripted worker and one edge process."""

from pathlib import Path

import pytest
from pytest_asyncio import is_async_test

from tests.edge.certificates import certificates
from tests.edge.fixtures import edge, http, shared_edge, shared_worker, target, worker

__all__ = ["certificates", "edge", "http", "shared_edge", "shared_worker", "target", "worker"]

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the async tests of this folder in the session's loop."""
    for item in items:
        if item.path.is_relative_to(_HERE) and is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
