"""The answers that the embedded model is known to give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PINNED = Path(__file__).parents[1] / "worker" / "pinned_answers.json"


@pytest.fixture(scope="session")
def pinned() -> list[dict[str, Any]]:
    """Conversations and the greedy answers that the embedded model gives to them."""
    answers: list[dict[str, Any]] = json.loads(PINNED.read_text())
    return answers
