"""The playground in a real browser, before real processes."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from edge.api_keys import ApiKey, digest_of, line_of
from tests.integration.stack import PATIENCE, LoggedProcess, Stack, running_stack

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

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


def test_an_answer_grows_on_the_page(slow_visit: Visit) -> None:
    visit = slow_visit
    visit.ask(STORY)
    visit.page.wait_for_selector(".answer-body.writing:not(:empty)")
    seen: list[str] = []
    deadline = time.monotonic() + PATIENCE
    while len(seen) < 4:
        if (text := visit.answer()) not in seen:
            seen.append(text)
        assert time.monotonic() < deadline, seen
        visit.page.wait_for_timeout(20)
    assert seen == sorted(seen, key=len)
    visit.page.keyboard.press("Escape")
    visit.wait_written()


def test_an_answers_figures_are_shown(visit: Visit) -> None:
    page = visit.page
    visit.ask(STORY)
    visit.wait_written()
    assert visit.answer().startswith("Once upon a time, there was a small river")
    foot = page.locator(".foot").last.inner_text()
    assert re.search(r"\d+ tokens\s", foot)
    assert re.search(r"[\d.]+ tokens/s", foot)
    assert re.search(r"first token after [\d.]+ m?s", foot)


def test_stop_ends_the_generation_on_the_worker(slow_visit: Visit, slow_stack: Stack) -> None:
    visit = slow_visit
    for stop in ("#stop", "Escape"):
        visit.ask(STORY)
        visit.page.wait_for_selector(".answer-body.writing:not(:empty)")
        with visit.page.expect_response(
            lambda response: response.request.method == "DELETE"
        ) as end:
            if stop == "Escape":
                visit.page.keyboard.press(stop)
            else:
                visit.page.click(stop)
        assert end.value.ok  # else it goes on for a reader who might come back
        visit.wait_written()
        slow_stack.wait_idle()
        assert "stopped" in visit.page.locator(".foot").last.inner_text()


def test_the_conversation_goes_along_and_the_last_answer_can_be_made_again(visit: Visit) -> None:
    visit.ask("What is 2 + 3?")
    visit.wait_written()
    visit.ask("And plus 4?")
    visit.wait_written()
    assert visit.answer() == "5 + 4 = 9"
    visit.regenerate(lambda: visit.page.keyboard.press("Alt+KeyR"))
    assert visit.answer() == "5 + 4 = 9"
    assert visit.page.locator("article.answer").count() == 2
    assert visit.page.locator(".foot button:has-text('Regenerate')").count() == 1


def test_a_refused_setting_is_named_and_marked(visit: Visit) -> None:
    page = visit.page
    page.click("#open-settings")
    page.fill("[name=top_p]", "7")
    page.click("#close-settings")
    visit.ask("Hello")
    page.wait_for_selector(".notice[data-kind=failed]")
    assert "top_p" in page.locator(".notice").inner_text()
    assert "refused" in page.locator("[name=top_p]").get_attribute("class")
    page.click("#open-settings")
    page.click("text=Reset")
    visit.ask("Count to 10")
    visit.wait_written()
    assert visit.answer().endswith("9, 10")


def test_settings_reach_the_model(visit: Visit) -> None:
    page = visit.page
    page.click("#open-settings")
    page.fill("[name=max_tokens]", "4")
    page.fill("[name=system]", "You are a helpful assistant.")
    visit.ask("Count to 10")
    visit.wait_written()
    foot = page.locator(".foot").last.inner_text()
    assert "4 tokens" in foot
    assert "cut at the token limit" in foot
    body = page.evaluate("JSON.parse(localStorage['sluice.settings'])")
    assert body["system"] == "You are a helpful assistant."


def test_a_browser_that_keeps_nothing_for_the_page_still_talks(browser: Any, stack: Stack) -> None:
    forbidden = "{get() { throw new DOMException('not allowed', 'SecurityError'); }}"
    visit = Visit(
        browser,
        stack.url,
        f"for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, {forbidden});",
    )
    visit.page.click("#open-settings")
    visit.page.fill("[name=max_tokens]", "4")
    visit.ask("Count to 10")
    visit.wait_written()
    assert "4 tokens" in visit.page.locator(".foot").last.inner_text()
    assert visit.complaints == []
    visit.context.close()


@contextmanager
def hogging(browser: Any, stack: Stack) -> Iterator[None]:
    """Somebody else has the only slot, until the block ends."""
    hog = Visit(browser, stack.url)
    hog.ask(STORY)
    hog.page.wait_for_selector(".answer-body.writing:not(:empty)")
    yield
    hog.page.keyboard.press("Escape")
    hog.wait_written()
    hog.context.close()
    stack.wait_idle()


def test_a_full_server_is_told_in_words_with_a_countdown(
    slow_visit: Visit, browser: Any, slow_stack: Stack
) -> None:
    visit = slow_visit
    visit.page.click("#open-settings")
    visit.page.fill("[name=max_tokens]", "5")
    notice = visit.page.locator(".notice[data-kind=waiting]")
    with hogging(browser, slow_stack):
        visit.ask("Count to 10")
        notice.wait_for()
        told = notice.inner_text()
    assert re.search(r"The server is busy: .+ Trying again in \d s\.", told)
    with contextlib.suppress(sync_api.TimeoutError):  # it has tried by itself
        visit.page.click("text=Try now", timeout=1000)
    visit.wait_written()
    assert visit.answer().startswith("The quick")
    assert not notice.is_visible()


def test_giving_up_ends_the_wait(slow_visit: Visit, browser: Any, slow_stack: Stack) -> None:
    visit = slow_visit
    with hogging(browser, slow_stack):
        visit.ask("Count to 10")
        visit.page.click("text=Give up")
        visit.wait_written()
        assert "stopped" in visit.page.locator(".foot").last.inner_text()


def test_a_reload_keeps_the_conversation(visit: Visit) -> None:
    visit.ask("Count to 10")
    visit.wait_written()
    visit.page.reload()
    visit.page.wait_for_selector(".answer-body")
    assert visit.answer() == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
    visit.page.click("text=New chat")
    visit.page.reload()
    visit.page.wait_for_selector(".light[data-state=ready]")
    assert visit.page.locator("article").count() == 0


def test_a_reload_within_an_answer_loses_nothing_in_silence(visit: Visit) -> None:
    visit.ask(STORY)
    visit.page.wait_for_selector(".answer-body:has-text('small river')")
    visit.page.reload()
    visit.page.wait_for_selector(".answer-body")
    visit.wait_written()
    assert visit.answer().startswith("Once upon a time, there was a small river")
    assert visit.answer().endswith(".")
    assert visit.page.locator("article.answer").count() == 1


SCRIPT = "It was a dark and stormy night; the rain fell in torrents. "


def test_an_answer_survives_the_death_of_its_edge(browser: Any) -> None:
    flags = {"text": SCRIPT, "repeats": 8, "step_milliseconds": 15}
    with running_stack(flags, worker_module="inference_worker.scripted_model") as stack:
        visit = Visit(browser, stack.url)
        visit.ask(STORY)
        visit.page.wait_for_selector(".answer-body:has-text('stormy')")
        stack.edge.stop(signal.SIGKILL)
        visit.page.wait_for_selector(".notice[data-kind=waiting]")
        edge = {"host": "127.0.0.1", "port": stack.edge_port, "worker": stack.worker_address}
        stack.edge = LoggedProcess("edge", edge)
        stack.edge.wait_for_line(event="edge listening")
        visit.wait_written()
        assert visit.page.locator(".answer-body").last.inner_text().strip() == (SCRIPT * 8).strip()
        assert visit.complaints == []
        visit.context.close()


def test_spaces_and_lines_are_shown_exactly(visit: Visit) -> None:
    text = "Repeat  after   me:\n\n\n    four\tfields"
    visit.ask(text)
    visit.wait_written()
    assert visit.page.locator(".question").inner_text() == text
    shown = visit.page.evaluate(
        """async (text) => { const {parseBlocks, renderBlock} = await import('/static/markdown.js');
        const body = document.createElement('div'); body.className = 'formatted';
        body.append(...parseBlocks(text).map(renderBlock)); document.body.append(body);
        const lines = [...body.children].map((child) => child.textContent); body.remove(); return lines; }""",
        text,
    )
    assert shown == ["Repeat  after   me:", "", "", "    four\tfields"]
    visit.page.click("text=Plain")
    code = "Show me Python code that prints hello"
    visit.ask(code)
    visit.wait_written()
    assert '    print("hello")\n\n\nmain()' in visit.answer()


HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "[click](javascript:window.hit=1)",
    '[click]( https://a.example/"onmouseover=window.hit=1 )',
    "![pixel](https://evil.example/p.png)",
    "`<b>` **<i onclick=x>bold</i>** _<u>em</u>_",
    "```<script>\n</code></pre><script>window.hit = 1</script>\n```",
    "| <svg onload=window.hit=1> | b |\n|---|---|\n| <iframe src=//evil> | d |",
    "> <style>*{display:none}</style>\n- <form action=//evil>\n# <object data=x>",
    "https://a.example/<script> http://b.example\u2028\u202e",
    "*" * 3000 + "_" * 3000 + "[" * 3000,
]


def test_no_text_becomes_markup(visit: Visit) -> None:
    found = visit.page.evaluate(
        """async (texts) => { const {parseBlocks, renderBlock} = await import('/static/markdown.js');
        const body = document.createElement('div'); document.body.append(body);
        for (const text of texts) body.append(...parseBlocks(text).map(renderBlock));
        const all = [...body.querySelectorAll('*')];
        const result = { names: [...new Set(all.map((one) => one.localName))],
          attributes: [...new Set(all.flatMap((one) => one.getAttributeNames()))],
          links: all.filter((one) => one.href).map((one) => one.protocol), hit: window.hit ?? 0,
          script: body.textContent.includes('<script>window.hit = 1</script>') };
        body.remove(); return result; }""",
        HOSTILE,
    )
    allowed = "p div strong em s code pre a figure figcaption button table tbody tr th td"
    assert set(found["names"]) <= {*allowed.split(), "blockquote", "ul", "ol", "li", "span", "hr"}
    assert set(found["attributes"]) <= {
        *("class", "data-level", "role", "aria-level", "type", "tabindex"),
        *("href", "rel", "target", "title"),
    }
    assert set(found["links"]) <= {"http:", "https:"}
    assert found["hit"] == 0
    assert found["script"]


def test_the_policy_stops_what_is_not_ours(visit: Visit) -> None:
    """Should markup get in one day, nothing of it would run or be fetched."""
    blocked = visit.page.evaluate(
        """async () => { const seen = [];
        document.addEventListener('securitypolicyviolation', (event) => seen.push(event.effectiveDirective));
        const script = document.createElement('script');
        try { script.textContent = 'window.hit = 1'; document.body.append(script); } catch { seen.push('script'); }
        const image = document.createElement('img'); image.src = 'https://evil.example/p.png';
        document.body.append(image);
        await fetch('https://evil.example/').catch(() => {});
        try { document.body.innerHTML = '<b>x</b>'; } catch { seen.push('innerHTML'); }
        const all = ['img-src', 'connect-src', 'innerHTML'];
        for (let left = 600; left && !all.every((one) => seen.includes(one)); left--)
          await new Promise((resolve) => setTimeout(resolve, 100));
        return { seen, hit: window.hit ?? 0 }; }"""
    )
    assert blocked["hit"] == 0
    assert {"img-src", "connect-src", "innerHTML"} <= set(blocked["seen"])
    visit.complaints.clear()  # the violations, which were the point
    visit.requests.clear()


def test_token_probabilities_by_pointer_and_by_keys(visit: Visit) -> None:
    page = visit.page
    visit.ask("Count to 10")
    visit.wait_written()
    page.click("text=Tokens")
    assert page.locator(".token").first.is_visible()
    texts = page.locator(".token").all_text_contents()
    assert "".join(texts) == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
    page.hover(".token >> nth=0")
    box = page.locator("#candidates")
    box.wait_for()
    assert box.locator("tr").count() >= 5
    assert box.locator(".drawn td").first.inner_text() == "1"
    page.mouse.move(0, 0)
    page.focus(".tokens")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert box.locator(".drawn td").first.inner_text() == texts[1].replace(" ", "␣")


def test_a_phone_shows_everything_without_scrolling_sideways(browser: Any, stack: Stack) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 700}, color_scheme="dark")
    page = context.new_page()
    page.goto(stack.url)
    page.wait_for_selector(".light[data-state=ready]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("#open-settings")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.fill("[name=temperature]", "0.5")
    page.click("#close-settings")
    assert page.locator("#question").is_visible()
    context.close()


def test_a_key_is_asked_for_used_and_forgotten_with_the_tab(browser: Any, stack: Stack) -> None:
    secret = "sluice_somebodys"
    line = line_of(ApiKey("somebody", (digest_of(secret),)))
    flags = {"host": "127.0.0.1", "port": 0, "worker": stack.worker_address, "api_keys": line}
    edge = LoggedProcess("edge", flags)
    try:
        port = edge.wait_for_line(event="edge listening")["port"]
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"http://127.0.0.1:{port}")
        page.wait_for_selector("#model-name:has-text('Give an API key')")
        page.click("#open-settings")
        page.fill("[name=key]", secret)
        page.press("[name=key]", "Tab")
        page.wait_for_selector(".light[data-state=ready]")
        page.fill("#question", "Count to 10")
        page.press("#question", "Enter")
        page.wait_for_selector("#send:visible")
        assert "9, 10" in page.locator(".answer-body").last.inner_text()
        kept = page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage)]")
        assert [secret in storage for storage in kept] == [True, False]
        context.close()
        stack.wait_idle()
    finally:
        assert edge.stop() == 0
