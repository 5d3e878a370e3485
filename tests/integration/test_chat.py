"""The terminal's chat, as a process on a terminal of its own."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.integration.stack import PATIENCE, ROOT, Stack
from tests.integration.terminal import start_on_terminal

SCRIPT = (
    "The quick brown fox"  # how every answer of the slow stack begins, which none of them ends soon
)


class Terminal:
    """`python -m edge.chat` with a person in front of it."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "edge.chat", *arguments]
        self.process, self._master = start_on_terminal(command)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> str:
        """All up to and including this text, which is then forgotten."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.text:
            left = deadline - time.monotonic()
            assert left > 0, self.text
            if select.select([self._master], [], [], left)[0]:
                self.text += os.read(self._master, 65536).decode()
        end = self.text.index(text) + len(text)
        seen, self.text = self.text[:end], self.text[end:]
        return seen

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)


@contextmanager
def talking(stack: Stack, *arguments: str) -> Iterator[Terminal]:
    terminal = Terminal("--url", stack.url, *arguments)
    terminal.wait_for("> ")
    yield terminal
    terminal.close()


@pytest.fixture
def terminal(stack: Stack) -> Iterator[Terminal]:
    with talking(stack) as terminal:
        yield terminal


def test_a_conversation(terminal: Terminal) -> None:
    terminal.type("What is 2 + 3?\n")
    assert "2 + 3 = 5\r\n" in terminal.wait_for("tokens/s]")
    terminal.wait_for("> ")
    terminal.type("And plus 4?\n")
    assert "5 + 4 = 9\r\n" in terminal.wait_for("tokens/s]")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(PATIENCE) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(slow_stack: Stack) -> None:
    with talking(slow_stack) as terminal:
        for _ in range(2):
            terminal.type("Tell me a story\n")
            terminal.wait_for(SCRIPT)
            terminal.type("\x03")
            terminal.wait_for("[stopped]")
            slow_stack.wait_idle()
            terminal.wait_for("> ")
            terminal.type("\x03")
            terminal.wait_for("Ctrl-D ends the program")


def test_a_full_server_is_waited_for(slow_stack: Stack) -> None:
    with talking(slow_stack) as hog, talking(slow_stack, "--max-tokens=8") as terminal:
        hog.type("Tell me a story\n")
        hog.wait_for(SCRIPT)
        terminal.type("Count to 10\n")
        terminal.wait_for("Trying again in")
        hog.type("\x03")
        hog.wait_for("[stopped]")
        assert SCRIPT in terminal.wait_for("ended by length]")


def chat(*arguments: str, question: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge.chat", *arguments],
        cwd=ROOT,
        input=question,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_piped_question_is_answered_on_stdout_alone(stack: Stack) -> None:
    done = chat("--url", stack.url, question="Count to 10\n")
    assert (done.returncode, done.stdout) == (0, "1, 2, 3, 4, 5, 6, 7, 8, 9, 10\n")
    assert "tokens, first after" in done.stderr


def test_refusals_are_told_in_one_line(stack: Stack) -> None:
    refused = chat("--url", stack.url, "--temperature=101", question="Hi\n")
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert "temperature" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    absent = chat("--url", "http://127.0.0.1:9", question="Hi\n")
    assert absent.returncode == 1
    assert "the connection to http://127.0.0.1:9 failed" in absent.stderr
    assert chat("--url", "ftp://x", question="").returncode == 2


def test_a_server_cannot_command_the_terminal() -> None:
    refusal = rb'{"error": {"message": "\u001b]0;mine\u0007\u009b2Jbusy"}}'
    answer = (
        rb'event: delta%cdata: {"text": "a\u001b[31mb"}%c'
        rb'event: finished%cdata: {"finish_reason": "\u001b[2J", "usage": {"completion_tokens": 11}, '
        rb'"timings": {"decode_seconds": 200}}%c'
    ) % (10, 10, 10, 10)
    answers = [(429, "0.01", refusal), (503, "nan", refusal), (400, "", refusal)]
    cut = (
        rb'event: delta%cdata: {"text": "c"}%c'
        rb'event: finished%cdata: {"finish_reason": "cancelled", "usage": {"completion_tokens": 12}}%c'
    ) % (10, 10, 10, 10)
    answers += [(200, "", answer), (200, "", b"data: {\n"), (200, "", cut)]

    class Hostile(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status, wait, body = answers.pop(0)
            self.send_response(status)
            self.send_header("retry-after", wait)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = chat("--url", f"http://127.0.0.1:{server.server_port}", question="1\n2\n3\n4\n")
        server.shutdown()
    assert not answers
    assert done.stdout == "a\ufffd[31mb\nc\n"
    assert done.stderr.count("busy") == 3
    assert "ended by" in done.stderr
    assert "11 tokens, " in done.stderr
    assert "12 tokens, " in done.stderr
    assert ", 0 tokens/s" in done.stderr  # the worker took that long, however fast they came
    assert "is no stream of events" in done.stderr
    assert not set(done.stderr) & {
        chr(code) for code in (*range(32), *range(127, 160)) if code != 10
    }
