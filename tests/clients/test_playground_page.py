"""What the playground's page shows: text as it is, and never as markup; tokens; on a phone, too."""

from __future__ import annotations

from typing import Any

from tests.clients.browser import Visit
from tests.integration.stack import Stack


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
