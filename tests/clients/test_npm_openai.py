"""The openai package of npm, unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.contract import ClientContract, Errors, ForeignClient
from tests.clients.node_clients import NodeClients


@pytest.fixture(scope="module")
def client(node_clients: NodeClients) -> Iterator[ForeignClient]:
    with node_clients.run("openai.mjs") as process:
        yield ForeignClient(process)


class TestOpenAI(ClientContract):
    errors = Errors(
        bad_field="BadRequestError",
        wrong_key="AuthenticationError",
        no_such_model="NotFoundError",
        overloaded="RateLimitError",
        midway="APIError",
    )
