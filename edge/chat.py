"""A conversation in the terminal: `python -m edge.chat [--url URL]`. Ctrl-C stops the answer, Ctrl-D the program."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TextIO
from urllib.parse import urlsplit

with contextlib.suppress(ImportError):  # not on every system; it lets input() edit lines
    import readline  # noqa: F401

_ATTEMPTS: Final = 8  # refusals in a row for want of room
_CONNECT_SECONDS: Final = 10.0
_WAIT_SECONDS: Final = 2.0  # after a refusal that does not say for how long
_LONGEST_WAIT_SECONDS: Final = 30.0
_SILENCE_SECONDS: Final = 60.0  # the edge sends a ping every 15 s
# What a terminal would obey instead of showing it: all controls but line ends and tabs.
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SAMPLING: Final = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}


class ChatError(Exception):
    """Why there is no answer, in words."""


class Busy(ChatError):
    """The server has no room now. `seconds` is when it wants to be asked again."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class Server:
    """Where the edge listens, and the key for it."""

    url: str
    key: str | None

    def stream(self, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of one generation as (name, data). Closing the iterator closes the connection, which stops it.

        Raises: Busy, ChatError.
        """
        connection = self._connect()
        try:
            response = self._post(connection, body)
            yield from _events(response)
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"the connection to {self.url} failed ({error})") from error
        except ValueError as error:
            raise ChatError(f"what came from {self.url} is no stream of events") from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(parts.hostname or "localhost", parts.port, timeout=_CONNECT_SECONDS)

    def _post(
        self, connection: http.client.HTTPConnection, body: dict[str, Any]
    ) -> http.client.HTTPResponse:
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        connection.connect()
        connection.sock.settimeout(_SILENCE_SECONDS)
        path = urlsplit(self.url).path.rstrip("/") + "/v1/streams"
        connection.request("POST", path, json.dumps(body).encode(), headers)
        response = connection.getresponse()
        if response.status == 200:
            return response
        message = _error_message(response.read(), response.status)
        if response.status in (429, 503):
            raise Busy(message, _wait_seconds(response.headers.get("retry-after", "")))
        raise ChatError(message)


def _wait_seconds(given: str) -> float:
    """What a Retry-After header says, where that is a number of seconds."""
    try:
        seconds = float(given)
    except ValueError:
        return _WAIT_SECONDS
    return min(seconds, _LONGEST_WAIT_SECONDS) if seconds > 0 else _WAIT_SECONDS


def _error_message(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}"


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    while line := response.readline():
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


class Chat:
    """A conversation and where it is written."""

    def __init__(self, server: Server, fields: dict[str, Any], system: str | None) -> None:
        self._server = server
        self._fields = fields
        self._messages: list[dict[str, str]] = []
        if system:
            self._messages.append({"role": "system", "content": system})

    def ask(self, question: str, out: TextIO, notes: TextIO) -> bool:
        """Ask, write the answer as it comes, and keep both. Returns whether there was one, stopped or not.

        What is not the answer goes to `notes`.
        """
        self._messages.append({"role": "user", "content": question})
        answer: list[str] = []
        try:
            self._answer(answer, out, notes)
        except KeyboardInterrupt:
            _say(notes, "\n[stopped]")
        except ChatError as error:
            _say(notes, f"{chr(10) if answer else ''}[{error}]")
            if not answer:
                self._messages.pop()
                return False
        text = "".join(answer)
        if text:
            self._messages.append({"role": "assistant", "content": text})
        return True

    def _answer(self, answer: list[str], out: TextIO, notes: TextIO) -> None:
        body = {**self._fields, "messages": self._messages}
        for attempt in range(_ATTEMPTS + 1):
            try:
                self._write(self._server.stream(body), answer, out, notes)
                return
            except Busy as error:
                if attempt == _ATTEMPTS:
                    raise
                _say(notes, f"[{error} Trying again in {error.seconds:.0f} s; Ctrl-C gives up.]")
                time.sleep(error.seconds)

    def _write(
        self,
        events: Iterator[tuple[str, dict[str, Any]]],
        answer: list[str],
        out: TextIO,
        notes: TextIO,
    ) -> None:
        begun = time.monotonic()
        first: float | None = None
        with contextlib.closing(events):  # type: ignore[type-var]
            for name, data in events:
                if name == "delta":
                    first = first or time.monotonic()
                    answer.append(data["text"])
                    out.write(_CONTROLS.sub("\ufffd", data["text"]))
                    out.flush()
                elif name == "failed":
                    raise ChatError(f"the answer broke off: {data['error']['message']}")
                elif name == "finished":
                    out.write("\n")
                    out.flush()
                    _say(notes, _figures(data, begun, first))
                    return
        raise ChatError("the connection was lost within the answer")


def _figures(finished: dict[str, Any], begun: float, first: float | None) -> str:
    count = finished["usage"]["completion_tokens"]
    parts = [f"{count} tokens"]
    if first is not None:
        parts.append(f"first after {first - begun:.2f} s")
        # What comes in one burst took the worker longer than us; an end that is not the worker's has no timings.
        decoded = finished.get("timings", {}).get("decode_seconds", 0.0)
        spent = max(time.monotonic() - first, decoded)
        if count > 1 and spent > 0:
            parts.append(f"{(count - 1) / spent:.0f} tokens/s")
    if finished["finish_reason"] not in ("stop", "stop_sequence"):
        parts.append(f"ended by {finished['finish_reason']}")
    return f"[{', '.join(parts)}]"


def _say(notes: TextIO, text: str) -> None:
    text = _CONTROLS.sub(" ", text)  # some of it may be the server's
    notes.write(f"\033[2m{text}\033[0m\n" if notes.isatty() else f"{text}\n")
    notes.flush()


def _url(text: str) -> str:
    parts = urlsplit(text if "://" in text else f"http://{text}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is not http://host[:port]")
    try:
        _ = parts.port
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return parts.geturl().rstrip("/")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="edge.chat",
        description="Talk with the model. Ctrl-C stops the answer, Ctrl-D ends the program; questions may also be"
        " piped in, one a line.",
    )
    parser.add_argument(
        "--url",
        type=_url,
        default="http://localhost:8000",
        help="where the edge listens (default: %(default)s)",
    )
    parser.add_argument("--system", help="system prompt")
    parser.add_argument(
        "--key", default=os.environ.get("SLUICE_API_KEY"), help="API key (env: SLUICE_API_KEY)"
    )
    for name, kind in _SAMPLING.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, help="default: the server's choice"
        )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the conversation to the end of the input; the exit code is 1 if the last question got no answer."""
    given = _arguments(arguments)
    fields = {name: value for name in _SAMPLING if (value := getattr(given, name)) is not None}
    chat = Chat(Server(given.url, given.key), fields, given.system)
    is_answered = True
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return 0 if is_answered else 1
        except KeyboardInterrupt:
            _say(sys.stderr, "\n[Ctrl-D ends the program]")
            continue
        if question.strip():
            is_answered = chat.ask(question, sys.stdout, sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
