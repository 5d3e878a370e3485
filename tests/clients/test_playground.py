"""The playground in a real browser, before real processes: what is asked, answered, stopped, refused and kept."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from edge.api_keys import ApiKey, digest_of, line_of
from tests.clients.browser import PATIENCE_MS, STORY, Visit
from tests.integration.stack import PATIENCE, LoggedProcess, Stack, running_stack


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
    sync_api = pytest.importorskip("playwright.sync_api")
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
