"""The playground in a real browser, as its visitors use it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.integration.stack import PATIENCE, Stack

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# Nothing but the page under test reaches for the network.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
PATIENCE_MS = PATIENCE * 1000

Page = Any
STORY = "Tell me a short story"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium. Skips where there is none, or nothing to drive it with."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Visit:
    """A page open in a browser of its own, and what it did behind the scenes."""

    def __init__(self, browser: Any, url: str, script: str = "") -> None:
        """`script` runs before the page's own."""
        self.context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._note)
        self.page.add_init_script(script)
        self.page.goto(url)
        self.page.wait_for_selector(".light[data-state=ready]")

    def _note(self, message: Any) -> None:
        # a status above 399 is told on the console too, and is no fault of the page
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")

    def wait_written(self) -> None:
        self.page.wait_for_selector("#send:visible")

    def regenerate(self, act: Callable[[], None]) -> None:
        """Do it, and wait for the answer that takes the last one's place."""
        self.page.evaluate(
            "document.querySelectorAll('.answer')[0].parentNode.lastChild.id = 'old'"
        )
        act()
        self.page.wait_for_selector("#old", state="detached")
        self.wait_written()

    def answer(self) -> str:
        return str(self.page.locator(".answer-body").last.inner_text())


@contextmanager
def visiting(browser: Any, stack: Stack) -> Iterator[Visit]:
    visit = Visit(browser, stack.url)
    yield visit
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith(stack.url)] == []
    visit.context.close()
    stack.wait_idle()


@pytest.fixture
def visit(browser: Any, stack: Stack) -> Iterator[Visit]:
    with visiting(browser, stack) as visit:
        yield visit


@pytest.fixture
def slow_visit(browser: Any, slow_stack: Stack) -> Iterator[Visit]:
    """Where an answer lasts for a minute, and one other caller makes the server full."""
    with visiting(browser, slow_stack) as visit:
        yield visit
