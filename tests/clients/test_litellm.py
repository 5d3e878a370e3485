"""litellm, unchanged, in an environment of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients import litellm_home
from tests.clients.contract import ClientContract, Errors, ForeignClient
from tests.clients.foreign_process import running

pytestmark = pytest.mark.timeout(litellm_home.INSTALL_SECONDS + 120)


@pytest.fixture(scope="module")
def client() -> Iterator[ForeignClient]:
    with running([litellm_home.installed(), litellm_home.HOME / "client.py"]) as process:
        yield ForeignClient(process)


class TestLiteLLM(ClientContract):
    errors = Errors(
        bad_field="BadRequestError",
        wrong_key="AuthenticationError",
        no_such_model="NotFoundError",
        overloaded="RateLimitError",
        midway="MidStreamFallbackError",
    )
