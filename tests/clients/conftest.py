"""Real clients against the edge before a scripted worker, and before real ones."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_asyncio import is_async_test

from edge.api_keys import ApiKey, digest_of, line_of
from tests.clients import node_clients as node
from tests.clients.browser import browser, slow_visit, visit
from tests.clients.installation import INSTALL_SECONDS
from tests.edge.fixtures import edge, http, shared_edge, shared_worker, target, worker
from tests.integration.stack import LoggedProcess, Stack

__all__ = [
    "browser",
    "edge",
    "http",
    "shared_edge",
    "shared_worker",
    "slow_visit",
    "target",
    "visit",
    "worker",
]

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the async tests of this folder in the session's loop, and waits for the first one's installing."""
    for item in items:
        if not item.path.is_relative_to(_HERE):
            continue
        if is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
        if "node_clients" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(INSTALL_SECONDS + 120))


@pytest.fixture(scope="session")
def locked_url(slow_stack: Stack) -> Iterator[str]:
    """An edge that asks for a key."""
    keys = line_of(ApiKey("tests", (digest_of("sluice_a-key"),)))
    flags = {"host": "127.0.0.1", "port": 0, "worker": slow_stack.worker_address, "api_keys": keys}
    edge = LoggedProcess("edge", flags)
    try:
        yield f"http://127.0.0.1:{edge.wait_for_line(event='edge listening')['port']}"
    finally:
        assert edge.stop() == 0


@pytest.fixture(scope="session")
def node_clients() -> node.NodeClients:
    """The npm packages of `node/`, installed."""
    return node.installed()
