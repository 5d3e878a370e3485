"""Who has keys in the tests, and how they show them."""

import signal
from typing import Any

from edge.api_keys import ApiKey, digest_of, line_of
from tests.edge.edge_process import EdgeProcess

ALICE, BOB, CAROL = "sluice_alices-key", "sluice_bobs-key", "sluice_carols-key"

KEYS = [
    ApiKey("alice", (digest_of(ALICE),), 2.0, 8, 100_000),
    ApiKey("bob", (digest_of(BOB),)),
    ApiKey("carol", (digest_of(CAROL),), is_disabled=True),
]

LINES = "\n".join(["# who may call", "", *map(line_of, KEYS)])

SECRET = b"a secret that is longer than 32 bytes"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def hang_up(edge: EdgeProcess, event: str = "api keys reloaded") -> dict[str, Any]:
    """Sends SIGHUP, and returns the log line of what came of it."""
    since = len(edge.lines)
    edge.process.send_signal(signal.SIGHUP)
    return await edge.line(lambda line: line["event"] == event, since)
