"""The @huggingface/inference package of npm, unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.contract import ClientContract, Errors, ForeignClient
from tests.clients.node_clients import NodeClients


@pytest.fixture(scope="module")
def client(node_clients: NodeClients) -> Iterator[ForeignClient]:
    with node_clients.run("huggingface.mjs") as process:
        yield ForeignClient(process)


class TestHuggingFace(ClientContract):
    errors = Errors(
        bad_field="InferenceClientProviderApiError",
        wrong_key="InferenceClientProviderApiError",
        no_such_model="InferenceClientProviderApiError",
        overloaded="InferenceClientProviderApiError",
        midway="InferenceClientProviderApiError",
    )
