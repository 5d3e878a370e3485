"""The AI SDK (ai, @ai-sdk/openai-compatible), unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.contract import ClientContract, Errors, ForeignClient
from tests.clients.node_clients import NodeClients


@pytest.fixture(scope="module")
def client(node_clients: NodeClients) -> Iterator[ForeignClient]:
    with node_clients.run("ai_openai_compatible.mjs") as process:
        yield ForeignClient(process)


class TestAIOpenAICompatible(ClientContract):
    errors = Errors(
        bad_field="APICallError",
        wrong_key="APICallError",
        no_such_model="APICallError",
        overloaded="APICallError",
        midway="StreamProviderError",
    )
