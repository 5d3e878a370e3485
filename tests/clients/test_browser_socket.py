"""The WebSocket from pages in a real browser: with a key, within TLS, and not from anybody's page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from edge.api_keys import ApiKey, digest_of, line_of
from tests.clients.browser import ARGUMENTS, CHROMIUM, PATIENCE_MS
from tests.integration.stack import PATIENCE, LoggedProcess, Stack

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

SECRET = "sluice_somebodys"
# Two turns of one conversation; resolves with what happened.
TALK = """(url) => new Promise(resolve => {
    const socket = new WebSocket(url), seen = []
    socket.onopen = () => socket.send(JSON.stringify(
        {type: 'generate', id: '1', messages: [{role: 'user', content: 'Count to 10'}], temperature: 0}))
    socket.onmessage = message => {
        const event = JSON.parse(message.data)
        seen.push(event)
        if (event.type === 'finished' && event.id === '1')
            socket.send(JSON.stringify({type: 'generate', id: '2',
                message: {role: 'user', content: 'Count to 10'}, temperature: 0}))
        else if (event.type === 'finished' || event.type === 'failed')
            socket.close(1000)
    }
    socket.onclose = event => resolve({seen, code: event.code})
})"""


@pytest.fixture(scope="module")
def pages() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        context = browser.new_context(ignore_https_errors=True)
        context.set_default_timeout(PATIENCE_MS)
        yield context
        browser.close()


@contextmanager
def guarded_edge(stack: Stack, **flags: object) -> Iterator[int]:
    """Its port."""
    line = line_of(ApiKey("somebody", (digest_of(SECRET),)))
    given = {"host": "127.0.0.1", "port": 0, "worker": stack.worker_address, "api_keys": line}
    edge = LoggedProcess("edge", given | flags)
    try:
        yield edge.wait_for_line(event="edge listening")["port"]
    finally:
        assert edge.stop() == 0


def token_of(url: str) -> str:
    headers = {"x-api-key": SECRET}
    with httpx.Client(trust_env=False, timeout=PATIENCE, verify=False) as http:  # noqa: S501
        token: str = http.post(f"{url}/v1/tokens", headers=headers).json()["access_token"]
        return token


@pytest.mark.parametrize("has_tls", [False, True])
def test_a_page_of_the_edge_holds_a_conversation(
    stack: Stack, pages: Any, tmp_path: Path, has_tls: bool
) -> None:
    flags: dict[str, object] = {}
    if has_tls:
        made = trustme.CA().issue_cert("127.0.0.1")
        made.private_key_pem.write_to_path(str(tmp_path / "key"))
        made.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
        flags = {"tls_cert": tmp_path / "cert", "tls_key": tmp_path / "key"}
    with guarded_edge(stack, **flags) as port:
        site = f"{'https' if has_tls else 'http'}://127.0.0.1:{port}"
        socket = f"{site.replace('http', 'ws', 1)}/v1/ws"
        page = pages.new_page()
        page.goto(site)  # whose policy lets it connect to its own server
        told = page.evaluate(TALK, f"{socket}?access_token={token_of(site)}")
        assert told["code"] == 1000
        for turn in ("1", "2"):
            events = [event for event in told["seen"] if event["id"] == turn]
            text = "".join(event.get("text", "") for event in events)
            assert text.startswith("1, 2, 3")
            assert events[-1]["type"] == "finished"
        without_token = page.evaluate(TALK, socket)
        assert without_token == {"seen": [], "code": 1006}  # all that a browser tells of a refusal
        page.close()
        stack.wait_idle()


def test_a_page_from_elsewhere_opens_none(stack: Stack, pages: Any) -> None:
    with guarded_edge(stack) as port:
        site = f"http://127.0.0.1:{port}"
        page = pages.new_page()
        page.goto(f"{stack.url}/health")  # another origin, without a policy of its own
        query = f"?access_token={token_of(site)}"
        told = page.evaluate(TALK, f"ws://127.0.0.1:{port}/v1/ws{query}")
        assert told == {"seen": [], "code": 1006}
        page.close()
    with guarded_edge(stack, cors_origins=stack.url) as port:
        page = pages.new_page()
        page.goto(f"{stack.url}/health")
        query = f"?access_token={token_of(f'http://127.0.0.1:{port}')}"
        told = page.evaluate(TALK, f"ws://127.0.0.1:{port}/v1/ws{query}")
        assert told["code"] == 1000
        page.close()
    stack.wait_idle()
