"""The README: its snippets run as they stand there, its output is real, its links and settings exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from edge.settings import EdgeSettings
from inference_worker.settings import WorkerSettings
from tests.integration.stack import PATIENCE, Stack

ROOT: Final = Path(__file__).parents[2]
README: Final = (ROOT / "README.md").read_text()
BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Flags of other programs, and of those here that have no settings.
OTHER_FLAGS: Final = {
    *("wait", "scale", "rm", "url", "port", "worker-urls", "help", "strict"),
    *("weight", "max-concurrent", "tokens-per-minute", "calibration"),
}


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(README) if found == language]


def at(stack: Stack, text: str) -> str:
    """With the stack's addresses in place of the usual ones."""
    return text.replace("localhost:8000", f"127.0.0.1:{stack.edge_port}").replace(
        "localhost:50051", stack.worker_address
    )


def output_of(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_snippets_run_one_after_the_other(stack: Stack) -> None:
    openai, direct, parsed, constraint, tools = (at(stack, text) for text in blocks("python"))
    asked = "print(*[message.delta.text for message in stub.Generate(request)], sep='')"
    mark = "print(end='\\0')"
    script = "\n".join((openai, mark, direct, mark, parsed, mark, constraint, asked, mark, tools))
    outputs = output_of(sys.executable, "-c", script).split("\0")
    assert outputs[0].startswith("Streaming means sending an answer piece by piece")
    assert outputs[1] == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
    assert re.fullmatch(r"colour='(red|green)' is_large=(True|False)\n", outputs[2])
    assert outputs[3] in ("yes\n", "no\n")
    assert "get_weather" in outputs[4]
    assert "Paris" in outputs[4]


def chunks_of(events: str) -> list[Any]:
    """Without what differs each time: ids, times, and how many tokens share a chunk when the reader is slow."""
    chunks = []
    for event in events.strip().split("\n\n"):
        payload = event.removeprefix("data: ")
        if payload.startswith("{"):
            chunk = json.loads(payload) | {"id": "", "created": 0}
            if chunk["choices"][0]["delta"].get("content"):
                chunk["choices"][0]["delta"]["content"] = "some"
            chunks.append(chunk)
        else:
            chunks.append(payload)
    return chunks


def test_curl_prints_what_it_says(stack: Stack) -> None:
    console = next(text for text in blocks("console") if text.startswith("$ curl"))
    command, _, shown = console.removeprefix("$ ").partition("}'\n")
    printed = chunks_of(output_of("bash", "-c", at(stack, command) + "}'"))
    first, last = map(chunks_of, shown.split("...\n\n"))
    assert printed[: len(first)] == first
    assert printed[-len(last) :] == last


def test_links_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        path, _, anchor = target.partition("#")
        if not path:
            assert anchor in headings
        elif "://" not in path:
            assert (ROOT / path).exists()


def test_settings_exist() -> None:
    fields = WorkerSettings.model_fields.keys() | EdgeSettings.model_fields.keys()
    known = {name.replace("_", "-") for name in fields} | OTHER_FLAGS
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README)) <= known
    variables = {f"SLUICE_WORKER_{name.upper()}" for name in WorkerSettings.model_fields}
    variables |= {f"SLUICE_EDGE_{name.upper()}" for name in EdgeSettings.model_fields}
    told = set(re.findall(r"SLUICE_(?:WORKER|EDGE)_[A-Z_]+[A-Z]", README))
    assert told <= variables
