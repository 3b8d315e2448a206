"""The page in a real browser: talking, rating, by keyboard, on a phone, in the dark; hostile text is text."""

import json
import re

import pytest

from mapo_jax.chat_log import ChatLog, read_chats
from mapo_jax.environment.scenario import load_scenarios

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script><|im_end|>"


@pytest.fixture
def visit(chromium):
    """`visit(server)`: the page, ready; errors of the browser and requests elsewhere fail the test."""
    contexts, troubles = [], []

    def opened(server, *, width=1000, height=800, scheme="light", expected=()):
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()

        def note(text):
            if not any(re.search(pattern, text) for pattern in expected):
                troubles.append(text)

        page.on("console", lambda m: note(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: note(str(error)))
        page.on("dialog", lambda dialog: note(f"dialog: {dialog.message}"))
        page.on("request", lambda r: None if r.url.startswith((server.url, "data:,")) else note(r.url))
        page.goto(server.url)
        page.wait_for_selector("html[data-ready]", timeout=30_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture
def kept(serving, tmp_path):
    """A server that keeps conversations, with the embedded cards."""
    return serving(chats=ChatLog(tmp_path / "kept"), cards=load_scenarios()[:5])


def say(page, text):
    """Sends a message by keyboard and waits for the reply's end."""
    replies = page.locator(".assistant").count()
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.locator(".assistant:not([aria-busy])").nth(replies).wait_for()


def test_talking_and_rating(kept, visit):
    page = visit(kept)
    assert "not kept unless you agree" in page.inner_text("#notice")
    page.check("#keep")
    assert "are kept" in page.inner_text("#notice")
    say(page, "Hello.")
    say(page, "And now?")
    assert page.locator(".user").count() == page.locator(".assistant").count() == 2
    assert page.inner_text("#status").startswith("Reply: ")
    page.locator(".up").first.click()
    page.locator(".saved", has_text="Saved.").first.wait_for()
    page.locator(".down").nth(1).click()
    page.locator(".comment input").nth(1).fill("It repeats itself.")
    page.locator(".comment input").nth(1).press("Enter")
    page.locator(".saved", has_text="Saved.").nth(1).wait_for()
    (chat,) = read_chats(kept.service.chats.folder)
    assert [message["role"] for message in chat["messages"]] == ["user", "assistant"] * 2
    assert [chat["feedback"][reply]["rating"] for reply in chat["replies"]] == [1, -1]
    assert chat["feedback"][chat["replies"][1]]["comment"] == "It repeats itself."
    page.locator(".up").first.click()  # taken back
    page.locator(".saved", has_text="Taken back.").wait_for()
    (chat,) = read_chats(kept.service.chats.folder)
    assert list(chat["feedback"]) == chat["replies"][1:]


def test_who_does_not_agree_is_not_kept(kept, visit):
    page = visit(kept)
    say(page, "Hello.")
    assert page.locator(".tools").count() == 0
    assert not list(kept.service.chats.folder.iterdir())
    assert page.is_disabled("#keep")
    page.click("#again")
    assert page.locator(".message").count() == 0 and page.is_enabled("#keep")


def test_a_scenario(kept, visit):
    page = visit(kept)
    card = kept.service.cards[1]
    page.check("#keep")
    page.select_option("#scenario", card.id)
    assert card.situation in page.inner_text("#card") and card.person.name in page.inner_text("#card h2")
    say(page, "Hello.")
    (chat,) = read_chats(kept.service.chats.folder)
    assert chat["scenario"] == card.id


def test_without_keeping_it_says_so(server, visit):
    page = visit(server)
    assert "Nothing of this conversation is kept" in page.inner_text("#notice")
    assert page.is_hidden("#consent")


def test_a_key(serving, visit):
    server = serving(key="letmein")
    page = visit(server, expected=["401"])
    say(page, "Hello.")
    assert "Incorrect API key" in page.inner_text(".problem")
    assert page.input_value("#text") == "Hello."  # nothing that was written is lost
    page.fill("#key", "letmein")
    page.press("#text", "Enter")
    page.locator(".assistant:not([aria-busy]) .said:not(:empty)").wait_for()


def test_stopping_a_reply(serving, visit, settled):
    server = serving(reply_tokens=None)
    page = visit(server)
    page.route("**/v1/chat/completions", lambda route: None)  # a server that never answers
    page.fill("#text", "Hello.")
    page.press("#text", "Enter")
    page.click("#stop")
    page.locator(".problem", has_text="Stopped.").wait_for()
    page.unroute("**/v1/chat/completions")
    say(page, "Hello again.")
    settled(server.model)


def test_hostile_text_stays_text(kept, visit):
    page = visit(kept)
    page.check("#keep")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream",
            body="".join(
                f"data: {data}\n\n"
                for data in (
                    json.dumps({"id": HOSTILE, "choices": [{"index": 0, "delta": {"content": HOSTILE}}]}),
                    "[DONE]",
                )
            ),
        ),
    )
    say(page, HOSTILE)
    assert page.locator(".said").all_inner_texts() == [HOSTILE, HOSTILE]
    assert page.locator("main img, main script").count() == 0


def test_it_works_by_keyboard_alone(kept, visit):
    page = visit(kept)
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("One line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another.")
    page.keyboard.press("Enter")
    page.locator(".assistant:not([aria-busy])").wait_for()
    assert page.locator(".user .said").inner_text() == "One line\nand another."
    assert page.evaluate("document.activeElement.id") == "text"
    named = page.evaluate(
        "[...document.querySelectorAll('button, select, input, textarea')]"
        ".every(e => e.labels?.length || e.textContent.trim() || e.ariaLabel)"
    )
    assert named


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phones_and_the_dark(kept, visit, width, scheme):
    page = visit(kept, width=width, height=740, scheme=scheme)
    page.check("#keep")
    page.select_option("#scenario", kept.service.cards[0].id)
    say(page, "Hello. " + "endless" * 9)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) == (scheme == "light")
    small = page.evaluate(
        "[...document.querySelectorAll('button')].filter(b => b.checkVisibility())"
        ".filter(b => b.getBoundingClientRect().height < 32).length"
    )
    assert small == 0


def test_the_content_security_policy(server):
    import httpx2

    policy = httpx2.get(server.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for path in ("/", "/page.css", "/page.js"):
        text = httpx2.get(server.url + path).text
        assert "http://" not in text and "https://" not in text
        assert "innerHTML" not in text
