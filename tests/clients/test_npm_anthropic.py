"""The @anthropic-ai/sdk package of npm, unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.contract import ClientContract, Errors, ForeignClient
from tests.clients.node_clients import NodeClients


@pytest.fixture(scope="module")
def client(node_clients: NodeClients) -> Iterator[ForeignClient]:
    with node_clients.run("anthropic.mjs") as process:
        yield ForeignClient(process)


class TestAnthropic(ClientContract):
    finish_reasons = ("end_turn", "max_tokens")
    overloaded_status = 529
    errors = Errors(
        bad_field="BadRequestError",
        wrong_key="AuthenticationError",
        no_such_model="NotFoundError",
        overloaded="OverloadedError",
        midway="APIError",
    )
