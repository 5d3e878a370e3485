"""The example that reads typed frames, as a program, before the embedded model."""

from __future__ import annotations

import subprocess
import sys

from protos.sluice.v1 import generation_pb2 as pb
from tests.integration.stack import ROOT, Stack

PROMPT = "Once upon a time"


def test_the_example_prints_header_items_and_footer(stack: Stack) -> None:
    request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT))
    messages = list(stack.stub.Generate(request))
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "typed_stream.py", stack.url, PROMPT],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd="/",  # it needs nothing of this repository
    )
    header, *items, footer = done.stdout.splitlines()
    assert "model='sluice-tiny'" in header
    assert "".join(items) == "".join(message.delta.text for message in messages)
    assert items
    usage = messages[-1].finished.usage
    assert "finish_reason='stop'" in footer
    assert f"'completion_tokens': {usage.completion_tokens}" in footer


def test_without_arguments_it_says_what_it_needs() -> None:
    command = [sys.executable, str(ROOT / "examples" / "typed_stream.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "usage: python examples/typed_stream.py URL PROMPT\n"
