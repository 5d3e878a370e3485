"""A client in a process of its own, another language's or one with other dependencies.

The process reads one JSON object a line, `{"call": NAME, "arguments": {…}}`, and answers each with one line:
`{"value": …}`, or `{"raised": {"name", "message", "status", …}}` with what the client raised.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE as PATIENCE


class ForeignError(Exception):
    """What the client raised over there. `name` is its class, `fields` all that it told."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(f"{fields['name']}: {fields['message']}")
        self.name: str = fields["name"]
        self.message: str = fields["message"]
        self.status: int | None = fields.get("status")
        self.fields = dict(fields)


class ForeignProcess:
    """Calls functions by name, one after another."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def call(self, name: str, **arguments: object) -> Any:
        """What the function returns.

        Raises:
            ForeignError: what it raised.
        """
        self.send(name, **arguments)
        return self.reply()

    def send(self, name: str, **arguments: object) -> None:
        """Begins a call, whose `reply` may be waited for later."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()

    def reply(self) -> Any:
        """What the call begun with `send` returns.

        Raises:
            ForeignError: what it raised.
        """
        reply = self._replies.get(timeout=PATIENCE)
        assert reply is not None, "the client's process ended; its stderr says why"
        if "raised" in reply:
            raise ForeignError(reply["raised"])
        return reply["value"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(json.loads(line))
        self._replies.put(None)


@contextmanager
def running(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None
) -> Iterator[ForeignProcess]:
    """Starts it; at the end its input closes, on which it must exit with 0."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as process:
        try:
            yield ForeignProcess(process)
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(timeout=PATIENCE) == 0
        finally:
            process.kill()
