"""One stack on the embedded model for all tests that only use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.stack import Stack, running_stack

PINNED = Path(__file__).parents[1] / "worker" / "pinned_answers.json"


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        yield running


@pytest.fixture(scope="session")
def pinned() -> list[dict[str, Any]]:
    """Conversations and the greedy answers that the embedded model gives to them."""
    answers: list[dict[str, Any]] = json.loads(PINNED.read_text())
    return answers
