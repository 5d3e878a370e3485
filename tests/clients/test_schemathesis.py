"""schemathesis asks every route of /openapi.json what it may be asked, and what it may not."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.stack import Stack, running_stack

pytest.importorskip("schemathesis")

CONFIG = Path(__file__).parent / "schemathesis.toml"
SEED = 1
EXAMPLES = 10  # of a route


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Without the playground, whose page is no operation; short answers, since their length tells nothing here."""
    with running_stack({"context_length": 128}, {"playground": "false"}) as running:
        yield running


def test_no_answer_breaks_the_document(stack: Stack, tmp_path: Path) -> None:
    """No 5xx, no undocumented status, content type, header, body or event; nothing against the schema is taken."""
    report = tmp_path / "junit.xml"
    done = subprocess.run(
        [
            *(Path(sys.executable).parent / "schemathesis", f"--config-file={CONFIG}", "run"),
            *(f"{stack.url}/openapi.json", f"--seed={SEED}", f"--max-examples={EXAMPLES}"),
            *("--phases=fuzzing", "--continue-on-failure", "--request-timeout=60", "--no-color"),
            f"--report-junit-path={report}",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    document = httpx.get(f"{stack.url}/openapi.json", trust_env=False).json()
    described = {
        f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method in methods
    }
    asked = {case.get("name") for case in ET.parse(report).iter("testcase")}  # noqa: S314  # its own
    assert described - asked == {"GET /openapi.json"}, "which it read in the beginning"
    assert [line for line in stack.edge.lines if line.get("status", 0) >= 500] == []
