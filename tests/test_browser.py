"""The chat page in a real Chromium, against the app in a real hypercorn.

JAXMOE_NEEDS_BROWSER makes a missing browser a failure; without it these tests are skipped where there
is none. JAXMOE_BROWSER names one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from page_server import ANSWERS
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright
from test_hypercorn import Process, free_port, started

from tools.launch import launch

pytestmark = [pytest.mark.e2e, pytest.mark.browser]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 10_000  # milliseconds
KEY = "secret key"


def find_browser() -> str:
    path = os.environ.get("JAXMOE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is not None:
        return path
    reason = f"no browser is here: install one of {', '.join(NAMES)}, or name it in JAXMOE_BROWSER"
    if os.environ.get("JAXMOE_NEEDS_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    # Chromium's own sandbox refuses to run as root
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=options)
        yield chromium
        chromium.close()


@contextmanager
def serving(model: Path, port: int | None = None, **environment: str) -> Iterator[Process]:
    port = port or free_port()
    command = ["hypercorn", "-b", f"127.0.0.1:{port}", "page_server:app"]
    with started(command, port=port, FAKE_MODEL=str(model), **environment) as process:
        yield process


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[Process]:
    """Tokens come every 4 ms."""
    with serving(tiny_gguf, FAKE_STEP_SECONDS="0.004") as process:
        process.wait_for(status="ok")
        yield process


class Tab:
    """A tab, and what must not happen in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.wrong: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        page.on("console", self._hear)
        page.on("request", self._see)
        page.set_default_timeout(PATIENCE)

    def _hear(self, message: Any) -> None:
        # an answer other than 2xx is on the console too; the page says it in words
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.wrong.append(message.text)

    def _see(self, request: Any) -> None:
        if request.url.endswith("/v1/chat/completions"):
            self.bodies.append(json.loads(request.post_data))

    def open(self, url: str) -> Tab:
        self.page.goto(url)
        expect(self.page.locator("html.ready")).to_be_attached()
        return self

    def ask(self, text: str) -> None:
        expect(self.page.locator("html.ready")).to_be_attached()
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def ask_and_wait(self, text: str) -> None:
        self.ask(text)
        self.wait()

    def wait(self) -> None:
        expect(self.page.locator("#send")).to_be_visible()

    @property
    def answer(self) -> Locator:
        return self.page.locator(".assistant").last

    @property
    def text(self) -> str:
        return self.answer.locator(".answer").inner_text()

    @property
    def error(self) -> Locator:
        return self.answer.locator(".error")

    @property
    def users(self) -> list[str]:
        return self.page.locator(".user .text").all_inner_texts()

    def stored(self) -> list[Any]:
        script = "Object.entries(localStorage).filter(([k]) => k.includes('.chat.')).map(([, v]) => v)"
        return [json.loads(text) for text in self.page.evaluate(script)]


@contextmanager
def new_tab(browser: Browser, **options: Any) -> Iterator[Tab]:
    context = browser.new_context(**{"viewport": {"width": 1100, "height": 700}, **options})
    tab = Tab(context.new_page())
    try:
        yield tab
    finally:
        context.close()
    assert tab.wrong == []


@pytest.fixture
def tab(browser: Browser, server: Process) -> Iterator[Tab]:
    with new_tab(browser) as tab:
        yield tab.open(server.url)
    server.wait_idle()


@pytest.fixture
def slow_tab(browser: Browser, tiny_gguf: Path) -> Iterator[Tab]:
    """Tokens come every 20 ms: on a busy machine too, an answer can be seen to grow."""
    with serving(tiny_gguf, FAKE_STEP_SECONDS="0.02") as process, new_tab(browser) as tab:
        process.wait_for(status="ok")
        yield tab.open(process.url)


def until(holds: Callable[[], object]) -> None:
    end = time.perf_counter() + PATIENCE / 1000
    while not holds():
        assert time.perf_counter() < end, "waited in vain"
        time.sleep(0.02)


# Chatting.


def test_an_answer_grows_and_is_measured(slow_tab: Tab) -> None:
    tab = slow_tab
    assert tab.page.title() == "jaxmoe"
    expect(tab.page.locator("#model-name")).to_have_text("Synthetic tiny")
    tab.ask("program")
    expect(tab.answer).to_have_attribute("aria-busy", "true")
    lengths = [len(tab.text)]
    while not tab.page.is_visible("#send"):
        lengths.append(len(tab.text))
    assert len(set(lengths)) >= 5
    assert lengths[0] < lengths[len(lengths) // 2] < lengths[-1]
    assert tab.answer.locator("pre code").inner_text() == "def add(a, b):\n    return a + b"
    assert tab.answer.locator("li").all_inner_texts() == ["It adds two numbers.", "add(17, 25) is 42."]
    expect(tab.answer).to_have_attribute("aria-busy", "false")
    stats = tab.answer.locator(".stats").inner_text()
    measured = re.fullmatch(r"(\S+) tok/s · first token (\S+) s · (\d+) tokens · prompt (\d+)", stats)
    assert measured, stats
    rate, first, tokens, prompt = map(float, measured.groups())
    (message,) = [m for m in tab.stored()[0]["messages"] if m["role"] == "assistant"]
    assert (message["tokens"], message["promptTokens"], message["finish"]) == (tokens, prompt, "stop")
    assert 0 < rate <= 250
    assert first > 0
    used = f"{int(prompt + tokens)} of 1,024 tokens of context"
    expect(tab.page.locator("#context-text")).to_have_text(used)


def test_the_code_is_copied(browser: Browser, server: Process) -> None:
    with new_tab(browser, permissions=["clipboard-read", "clipboard-write"]) as tab:
        tab.open(server.url).ask_and_wait("program")
        tab.answer.get_by_label("Copy the code").click()
        until(lambda: "return a + b" in str(tab.page.evaluate("navigator.clipboard.readText()")))
        tab.answer.get_by_label("Copy the answer").click()
        until(lambda: tab.page.evaluate("navigator.clipboard.readText()") == ANSWERS["program"])


@pytest.mark.parametrize("how", ["click", "Escape"])
def test_stop_ends_the_answer_on_the_server_too(tab: Tab, server: Process, how: str) -> None:
    tab.ask("long")
    expect(tab.answer.locator(".answer")).to_contain_text("Line 0 of a")
    server.wait(2, running=1)
    if how == "click":
        tab.page.click("#stop")
    else:
        tab.page.keyboard.press("Escape")
    server.wait(1, running=0, waiting=0)
    tab.wait()
    expect(tab.answer.locator(".note")).to_have_text("Stopped.")
    # without the server's own account of it
    expect(tab.answer.locator(".stats")).to_have_text(
        re.compile(r"^[\d.]+ tok/s · first token \S+ s · \d+ tokens$")
    )
    assert tab.text.startswith("Line 0 of")
    assert "Line 49" not in tab.text
    kept = tab.text
    tab.page.reload()
    assert tab.text == kept
    tab.ask_and_wait("next")
    assert tab.text == "You said: next"
    assert tab.bodies[-1]["messages"][1]["content"].startswith("Line 0 of")


def test_a_reload_keeps_the_conversation_and_what_came_of_an_answer(tab: Tab) -> None:
    tab.ask_and_wait("program")
    before = tab.page.locator("#conversation").inner_text()
    tab.page.reload()
    assert tab.page.locator("#conversation").inner_text() == before
    tab.ask("long")
    expect(tab.answer.locator(".answer")).to_contain_text("Line 0 of")
    tab.page.reload()
    assert tab.users == ["program", "long"]
    assert "Line 0 of" in tab.text
    expect(tab.answer.locator(".note")).to_have_text("Stopped.")


def test_nothing_that_is_stored_breaks_the_page(tab: Tab, server: Process) -> None:
    tab.ask_and_wait("hello")
    chat = tab.stored()[0]
    bad = {
        **{f"jaxmoe.v1.chat.{i}": text for i, text in enumerate(("", "{", "null", "[]", '"x"', "{}", "7"))},
        "jaxmoe.v1.chat.a": json.dumps(
            {**chat, "id": "a", "messages": [None, 1, {"role": "x", "content": 1}]}
        ),
        "jaxmoe.v1.chat.b": json.dumps({**chat, "id": "c"}),
        "jaxmoe.v1.chat.d": json.dumps({**chat, "id": "d", "messages": {}}),
        "jaxmoe.v1.settings": '{"temperature": {}, "system": 3}',
        "jaxmoe.v1.theme": "sepia",
        "jaxmoe.v1.starts-inside": "[",
    }
    tab.page.evaluate("bad => { for (const name in bad) localStorage.setItem(name, bad[name]) }", bad)
    tab.open(server.url).ask_and_wait("again")
    assert tab.text == "You said: again"
    assert tab.page.locator("#chat-list li").count() == 2


def test_a_full_storage_gives_up_the_oldest_chats(tab: Tab, server: Process) -> None:
    fill = """() => {
      let i = 1;
      for (const size of [500000, 50000, 5000, 500, 50]) {
        for (;;) {
          const messages = [{ role: "user", content: "x".repeat(size) }];
          const text = JSON.stringify({ id: `${i}`, updated: i, messages });
          try { localStorage.setItem(`jaxmoe.v1.chat.${i}`, text); } catch { break; }
          i += 1;
        }
      }
      return i - 1;
    }"""
    last = tab.page.evaluate(fill)
    tab.open(server.url)
    tab.page.click("#new-chat")
    tab.ask_and_wait("hello " * 20)
    tab.page.reload()
    assert tab.users == [("hello " * 20).strip()]
    kept = {chat["id"] for chat in tab.stored()}
    assert "1" not in kept
    assert {"2", str(last)} <= kept


def test_a_chat_too_large_to_keep_costs_no_other(tab: Tab, server: Process) -> None:
    tab.ask_and_wait("hello")
    tab.page.click("#new-chat")
    answer_with(tab, {"choices": [{"index": 0, "delta": {"content": "```\n" + "x" * 2_100_000}}]}, FINISH)
    tab.ask("large")
    expect(tab.page.locator("#toast")).to_contain_text("too large for the browser to keep")
    assert "hello" in [chat["messages"][0]["content"] for chat in tab.stored()]


def test_without_storage_the_page_still_chats(browser: Browser, server: Process) -> None:
    with new_tab(browser) as tab:
        tab.page.add_init_script(
            "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no') } });"
            "Object.defineProperty(window, 'sessionStorage', { get() { throw new DOMException('no') } });"
        )
        tab.open(server.url).ask_and_wait("hello")
        assert tab.text == "You said: hello"


def test_edit_runs_again_from_there(tab: Tab) -> None:
    for text in ("one", "two", "three"):
        tab.ask_and_wait(text)
    tab.page.locator(".user").nth(1).hover()
    tab.page.get_by_label("Edit, and answer again from here").nth(1).click()
    area = tab.page.get_by_label("Edit the message")
    assert area.input_value() == "two"
    area.press("Escape")
    assert tab.users == ["one", "two", "three"]
    tab.page.get_by_label("Edit, and answer again from here").nth(1).click()
    area.fill("another two")
    area.press("Enter")
    tab.wait()
    assert tab.users == ["one", "another two"]
    assert tab.text == "You said: another two"
    assert [m["content"] for m in tab.bodies[-1]["messages"]] == ["one", "You said: one", "another two"]
    tab.page.reload()
    assert tab.users == ["one", "another two"]


def test_regenerate_answers_the_last_message_again(tab: Tab) -> None:
    tab.ask_and_wait("one")
    tab.ask_and_wait("two")
    again = tab.page.get_by_title("Answer again", exact=True)
    expect(again.first).to_be_hidden()
    again.last.click()
    tab.wait()
    assert len(tab.bodies) == 3
    assert tab.bodies[2] == tab.bodies[1]
    assert tab.page.locator(".assistant").count() == 2


def test_chats_are_new_switched_deleted_and_brought_back(tab: Tab) -> None:
    chats = tab.page.locator("#chat-list .chat")
    tab.ask_and_wait("first chat")
    tab.page.click("#new-chat")
    expect(tab.page.locator("#welcome")).to_be_visible()
    tab.ask("long")
    expect(tab.answer.locator(".answer p")).not_to_have_count(0)
    chats.get_by_text("first chat").click()
    assert tab.users == ["first chat"]
    tab.ask_and_wait("beside the other")
    assert tab.text == "You said: beside the other"
    chats.get_by_text("long").click()
    expect(tab.page.locator("#stop")).to_be_visible()
    tab.page.click("#stop")
    tab.page.hover("#chat-list li >> nth=0")
    tab.page.get_by_label("Delete the chat: long").click()
    assert chats.all_inner_texts() == ["first chat"]
    assert tab.users == ["first chat", "beside the other"]
    tab.page.get_by_role("button", name="Undo").click()
    assert chats.all_inner_texts() == ["long", "first chat"]
    assert tab.users == ["long"]


def test_deleting_a_chat_ends_its_answer(tab: Tab, server: Process) -> None:
    tab.ask("long")
    server.wait(2, running=1)
    tab.page.hover("#chat-list li")
    tab.page.get_by_label("Delete the chat: long").click()
    server.wait(1, running=0)
    tab.page.reload()
    expect(tab.page.locator("#chat-list li")).to_have_count(0)


def test_two_tabs_keep_each_others_chats(tab: Tab, server: Process) -> None:
    other = Tab(tab.page.context.new_page()).open(server.url)
    other.ask_and_wait("from the other tab")
    expect(tab.page.locator("#chat-list")).to_contain_text("from the other tab")
    tab.ask_and_wait("from this tab")
    tab.page.reload()
    expect(tab.page.locator("#chat-list li")).to_have_count(2)
    assert tab.users == ["from this tab"]
    assert other.wrong == []


# Thinking.


def test_thinking_is_folded_and_not_sent_again(tab: Tab) -> None:
    tab.ask("think")
    expect(tab.answer.locator("summary")).to_contain_text("Thinking")
    tab.wait()
    expect(tab.answer.locator("summary")).to_contain_text("Thought for")
    expect(tab.answer.locator(".thought")).to_be_hidden()
    assert tab.text == "It is 42."
    tab.answer.locator("summary").click()
    assert tab.answer.locator(".thought").inner_text() == "Seventeen and twenty-five."
    tab.ask_and_wait("next")
    assert [m["content"] for m in tab.bodies[-1]["messages"]] == ["think", "It is **42**.", "next"]


def test_thinking_that_the_prompt_has_opened(tab: Tab) -> None:
    tab.ask_and_wait("think inside")
    assert tab.text == "It is 42."
    assert tab.answer.locator(".thought").text_content() == "Seventeen and twenty-five."
    # from the second answer on the page knows it from the first word
    tab.ask("think inside")
    expect(tab.answer.locator("summary")).to_contain_text("Thinking")
    assert tab.text == ""
    tab.wait()
    assert tab.text == "It is 42."
    tab.ask_and_wait("no thought at all")
    assert tab.text == "You said: no thought at all"


def test_thinking_that_comes_apart(tab: Tab) -> None:
    deltas = [{"reasoning_content": "Hm, "}, {"reasoning_content": "<b>so</b>."}, {"content": "Yes </think>"}]
    answer_with(tab, *({"choices": [{"index": 0, "delta": delta}]} for delta in deltas), FINISH)
    tab.ask_and_wait("x")
    assert tab.answer.locator(".thought").text_content() == "Hm, <b>so</b>."
    assert tab.text == "Yes </think>"


def test_an_answer_that_only_begins_like_a_tag(tab: Tab) -> None:
    answer_with(tab, {"choices": [{"index": 0, "delta": {"content": "<"}}]}, FINISH)
    tab.ask_and_wait("less than")
    assert tab.text == "<"
    tab.ask_and_wait("next")
    assert [m["content"] for m in tab.bodies[-1]["messages"]] == ["less than", "<", "next"]


# What goes into a request.


def test_only_settings_that_are_given_are_sent(tab: Tab, server: Process) -> None:
    tab.ask_and_wait("plain")
    always = {"model", "messages", "return_token_ids", "stream", "stream_options"}
    assert set(tab.bodies[-1]) == always
    tab.page.click("#open-settings")
    given = {
        "temperature": "0.5",
        "top_p": "0.9",
        "top_k": "40",
        "min_p": "0",
        "max_tokens": "3",
        "seed": "7",
    }
    for name, value in {**given, "system": " Be short. "}.items():
        tab.page.fill(f"[name={name}]", value)
    tab.page.select_option("[name=thinking]", "off")
    tab.page.fill("[name=top_p]", "7")
    assert tab.page.locator("[name=top_p]").evaluate("input => !input.validity.valid")
    tab.page.get_by_role("button", name="Done").click()
    tab.ask_and_wait("more")
    body = tab.bodies[-1]
    assert {name: body[name] for name in given} == {name: float(value) for name, value in given.items()}
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    expect(tab.answer.locator(".note")).to_contain_text("Cut off")
    tab.open(server.url)
    tab.page.click("#open-settings")
    assert tab.page.input_value("[name=temperature]") == "0.5"
    tab.page.get_by_role("button", name="Reset all").click()
    tab.page.keyboard.press("Escape")
    tab.ask_and_wait("less")
    assert set(tab.bodies[-1]) == always
    assert tab.bodies[-1]["messages"][0]["role"] == "user"


# What goes wrong.

FINISH = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def answer_with(tab: Tab, *chunks: object, end: str = "data: [DONE]\r\n\r\n", **response: Any) -> None:
    """Have the next requests answered with these chunks instead of by the server."""
    body = ": ping\r\n\r\n" + "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks) + end

    def fulfill(route: Route) -> None:
        route.fulfill(**{"status": 200, "content_type": "text/event-stream", "body": body, **response})

    tab.page.route("**/v1/chat/completions", fulfill)


def test_a_refused_field_is_named(tab: Tab, server: Process) -> None:
    tab.page.evaluate("""localStorage.setItem('jaxmoe.v1.settings', '{"temperature": "7"}')""")
    tab.open(server.url).ask("hello")
    expect(tab.error).to_contain_text("The server refused the request: temperature")
    expect(tab.error).to_have_attribute("role", "alert")
    tab.page.reload()
    expect(tab.error).to_contain_text("temperature")
    expect(tab.page.locator("html.ready")).to_be_attached()
    tab.page.click("#open-settings")
    tab.page.get_by_role("button", name="Reset all").click()
    tab.page.keyboard.press("Escape")
    tab.error.get_by_role("button", name="Try again").click()
    tab.wait()
    assert tab.text == "You said: hello"
    assert tab.page.locator(".assistant").count() == 1


def test_a_conversation_over_the_context(tab: Tab) -> None:
    tab.ask("word " * 3000)
    expect(tab.error).to_contain_text("This does not fit into the model's context")
    expect(tab.error).to_contain_text("1024")


def test_an_answer_that_breaks_off_keeps_what_came(tab: Tab) -> None:
    tab.ask("break")
    expect(tab.error).to_contain_text("The answer broke off: internal error in request")
    assert tab.text.startswith("It starts")
    tab.ask_and_wait("go on")
    assert tab.text == "You said: go on"


def error_body(message: str, code: str | None = None) -> str:
    return json.dumps({"error": {"message": message, "code": code, "param": None}})


FAILURES: list[tuple[dict[str, Any], str]] = [
    (
        {"status": 429, "headers": {"Retry-After": "3"}, "body": error_body("full", "queue_full")},
        "Try again in 3 s",
    ),
    (
        {"status": 502, "body": "<html>Bad gateway</html>"},
        "The proxy in front of the server does not reach it",
    ),
    ({"status": 500, "body": error_body("internal error in request 7")}, "internal error in request 7."),
    ({"status": 403, "body": error_body("requests of other origins are not served")}, "other origins"),
    ({"body": "data: {not json\n\n"}, "cannot read"),
    ({"body": 'data: {"choices":[{"delta":{"content":"Half"}}]}\n\n'}, "ended before the answer did"),
    ({"body": 'data: {"error":{"message":"<b>gone</b>"}}\n\ndata: [DONE]\n\n'}, "broke off: <b>gone</b>."),
]


def test_every_failure_is_a_sentence(tab: Tab) -> None:
    for response, sentence in FAILURES:
        answer_with(tab, **response)
        tab.ask("hello")
        expect(tab.error).to_contain_text(sentence)
        expect(tab.page.locator("#send")).to_be_enabled()


def test_an_empty_answer_is_said(tab: Tab) -> None:
    tab.ask_and_wait("nothing")
    expect(tab.answer.locator(".note")).to_have_text("The model ended without a word.")


def test_a_server_that_goes_away_and_comes_back(browser: Browser, tiny_gguf: Path) -> None:
    port = free_port()
    with new_tab(browser) as tab:
        with serving(tiny_gguf, port, FAKE_STEP_SECONDS="0.02") as process:
            process.wait_for(status="ok")
            tab.open(process.url).ask("lines")
            expect(tab.answer.locator(".answer")).to_contain_text("Line 0")
            os.killpg(process.popen.pid, signal.SIGKILL)
            expect(tab.error).to_contain_text("The connection broke before the answer was complete.")
            expect(tab.page.locator("#banner")).to_contain_text("cannot be reached")
            assert "Line 0" in tab.text
            expect(tab.page.locator("#send")).to_be_disabled()
        with serving(tiny_gguf, port, FAKE_LOAD_SECONDS="1"):
            expect(tab.page.locator("#banner")).to_contain_text("not ready yet: reading the weights")
            expect(tab.page.locator("#banner progress")).to_be_visible()
            expect(tab.page.locator("html.ready")).to_be_attached()
            expect(tab.page.locator("#banner")).to_be_hidden()
            tab.error.get_by_role("button", name="Try again").click()
            tab.wait()
            assert "Line 29" in tab.text
            tab.page.context.set_offline(True)
            tab.ask("hello")
            expect(tab.error).to_contain_text("The server cannot be reached")
            tab.page.context.set_offline(False)
            expect(tab.page.locator("html.ready")).to_be_attached()


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, tiny_gguf: Path) -> None:
    with (
        serving(tiny_gguf, JAXMOE_API_KEY=KEY, FAKE_LOAD_SECONDS="1") as process,
        new_tab(browser) as tab,
    ):
        until(lambda: process.health() is not None)
        tab.page.goto(process.url)
        expect(tab.page.locator("#banner")).to_contain_text("reading the weights")
        dialog = tab.page.locator("#key-dialog")
        expect(dialog).to_be_visible()
        tab.page.fill("#key", "wrong")
        tab.page.keyboard.press("Enter")
        expect(tab.page.locator("#banner")).to_contain_text("this one is missing or wrong")
        expect(dialog).to_be_visible()
        tab.page.fill("#key", KEY)
        tab.page.keyboard.press("Enter")
        expect(tab.page.locator("html.ready")).to_be_attached()
        tab.ask_and_wait("hello")
        assert tab.text == "You said: hello"
        tab.page.reload()
        expect(tab.page.locator("html.ready")).to_be_attached()
        assert KEY not in tab.page.evaluate("JSON.stringify(localStorage)")
        tab.page.evaluate("sessionStorage.clear()")
        tab.ask("without a key")
        expect(tab.error).to_contain_text("asks for an API key")
        tab.page.fill("#key", KEY)
        tab.page.keyboard.press("Enter")
        expect(tab.answer.locator(".answer")).to_have_text("You said: without a key")


# Text that a model says is text.


def test_hostile_text_is_text(tab: Tab) -> None:
    tab.ask_and_wait("hostile")
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate("window.hacked") is None
    made = tab.answer.locator(".answer").evaluate(
        "e => [...new Set([...e.querySelectorAll('*')].map(n => n.tagName))]"
    )
    assert not {"IMG", "SCRIPT", "B", "I", "IFRAME"} & set(made)
    assert '<img src=x onerror="window.hacked=1">' in tab.text
    assert "<svg onload=window.hacked=1>" in tab.answer.locator("td").first.inner_text()
    links = tab.answer.locator(".answer a")
    assert links.evaluate_all("a => a.map(({href, rel, target}) => [href, rel, target])") == [
        ["https://evil.example/x.png", "noopener noreferrer", "_blank"],
        ["https://example.org/a?b=1", "noopener noreferrer", "_blank"],
    ]
    assert tab.answer.locator("pre code").inner_text() == "</code><img src=x onerror=window.hacked=1>"
    tab.ask_and_wait("<img src=x onerror=window.hacked=1>")
    assert tab.users[-1] == "<img src=x onerror=window.hacked=1>"
    tab.page.reload()
    assert tab.page.evaluate("window.hacked") is None
    assert tab.page.locator("img").count() == 0


def test_the_policy_stops_what_the_page_would_never_do(tab: Tab) -> None:
    injected = """() => {
      const found = [];
      const attempt = (name, use) => { try { use(); found.push(name); } catch { } };
      attempt("html", () => document.body.innerHTML = "<b>x</b>");
      attempt("script", () => document.createElement("script").src = "https://evil.example/x.js");
      const image = document.createElement("img");
      image.src = "https://evil.example/x.png";
      return fetch("https://evil.example/").then(() => [...found, "fetch"], () => found);
    }"""
    assert tab.page.evaluate(injected) == []
    until(
        lambda: (
            any("connect-src" in text for text in tab.wrong) and any("img-src" in text for text in tab.wrong)
        )
    )
    tab.wrong.clear()


# Parts of the page by themselves.


def test_events_are_read_from_pieces_of_any_size(tab: Tab) -> None:
    stream = (
        ": ping\n\ndata: one\n\ndata:two\r\ndata:  lines\r\n\r\nevent: x\nid: 3\n\ndata: é😀\r\rdata: never"
    )
    script = """async (stream) => {
      const { EventParser } = await import("/static/api.js");
      const bytes = new TextEncoder().encode(stream);
      const read = (cuts) => {
        const parser = new EventParser(), decoder = new TextDecoder(), found = [];
        let start = 0;
        for (const cut of [...cuts, bytes.length]) {
          found.push(...parser.push(decoder.decode(bytes.slice(start, cut), { stream: true })));
          start = cut;
        }
        return JSON.stringify(found);
      };
      const all = [...bytes.keys()];
      return [...new Set([read(all), ...all.map((cut) => read([cut]))])];
    }"""
    assert tab.page.evaluate(script, stream) == [
        json.dumps(["one", "two\n lines", "é😀"], ensure_ascii=False, separators=(",", ":"))
    ]


MARKDOWN: list[tuple[str, str | None]] = [
    (
        "a *b* **c** `d*e*` ***f***",
        "<p>a <em>b</em> <strong>c</strong> <code>d*e*</code> <strong><em>f</em></strong></p>",
    ),
    ("2*3*4 and snake_case_name * alone", "<p>2<em>3</em>4 and snake_case_name * alone</p>"),
    ("**open and `open", "<p>**open and `open</p>"),
    ("# One\n## Two", "<h3>One</h3><h4>Two</h4>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("3. c\n4. d", '<ol start="3"><li>c</li><li>d</li></ol>'),
    ("- a\n  - b\n    1. c\n- d", "<ul><li>a<ul><li>b<ol><li>c</li></ol></li></ul></li><li>d</li></ul>"),
    ("- a\n\n  more\n- b", "<ul><li><p>a</p><p>more</p></li><li>b</li></ul>"),
    ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
    ("---", "<hr>"),
    ("\\*a\\* &amp; <b>", "<p>*a* &amp;amp; &lt;b&gt;</p>"),
    (
        "| a | b |\n|---|:-:|\n| `1` | 2 | 3 |\nend",
        '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td><code>1</code></td><td>2</td></tr></tbody></table></div><p>end</p>",
    ),
    ("a | b\nno table", "<p>a | b<br>no table</p>"),
    ("~~~~ py x\n```\n~~~\n~~~~\nafter", None),
    ("[**x**](http://a.b/c_(d)) and http://e.f/g.", None),
    ("\t" * 30 + "- deep " * 40, None),
    ("> " * 200 + "x", None),
]


def test_markdown(tab: Tab) -> None:
    """Also: a text that grows gives at every length what it gives at once."""
    script = """async (source) => {
      const { showMarkdown } = await import("/static/markdown.js");
      const growing = document.createElement("div");
      for (let end = 1; end <= source.length; end++) {
        const whole = document.createElement("div");
        showMarkdown(growing, source.slice(0, end));
        showMarkdown(whole, source.slice(0, end));
        if (growing.innerHTML !== whole.innerHTML) return `at ${end}: ${growing.innerHTML}`;
      }
      return growing.innerHTML;
    }"""
    for source, html in MARKDOWN:
        found = tab.page.evaluate(script, source)
        assert found == html if html else not found.startswith("at "), source


def test_long_and_crooked_markdown_takes_time_in_proportion(tab: Tab) -> None:
    """With the square of the length each of them would take minutes."""
    script = """async (sources) => {
      const { showMarkdown } = await import("/static/markdown.js");
      const slow = [];
      for (const source of sources) {
        const start = performance.now();
        showMarkdown(document.createElement("div"), source.repeat(Math.max(1, 200000 / source.length)));
        if (performance.now() - start > 20000) slow.push(source);
      }
      return slow;
    }"""
    marks = [
        "*a ",
        "**a ",
        "_",
        "`",
        "``a`",
        "[",
        "[a](",
        "> ",
        "- ",
        "#  ",
        "|-",
        "~~~ ",
        "\\",
        " ",
        "http://",
    ]
    parts = ["1. a\n ", "- a\n", "|a|\n|-|\n", "a\n", "*a* ", "`a` "]
    gap = " " * 200_000
    wide = [f"a|b\n{gap}x", f"a|b\n|-{gap}x", f"```{gap}`"]
    assert tab.page.evaluate(script, [*marks, *parts, *wide]) == []


# Looks and manners.


def test_light_and_dark_and_the_choice_between_them(browser: Browser, server: Process) -> None:
    def back(tab: Tab) -> int:
        colour = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    for scheme, is_light in (("light", True), ("dark", False)):
        with new_tab(browser, color_scheme=scheme) as tab:
            tab.open(server.url)
            assert (back(tab) > 600) == is_light
            tab.page.click("#toggle-theme")
            assert (back(tab) > 600) != is_light
            tab.page.reload()
            assert (back(tab) > 600) != is_light
            tab.page.click("#toggle-theme")
            assert (back(tab) > 600) == is_light
            assert tab.page.evaluate("localStorage.getItem('jaxmoe.v1.theme')") is None


def test_a_narrow_screen_never_scrolls_sideways(browser: Browser, server: Process) -> None:
    def overflow(tab: Tab) -> int:
        elements = "[document.documentElement, document.body, document.querySelector('main')]"
        return int(tab.page.evaluate(f"Math.max(...{elements}.map(e => e.scrollWidth - e.clientWidth))"))

    def is_inside(box: Any) -> bool:
        return bool(box["x"] >= 0 and box["x"] + box["width"] <= 360)

    with new_tab(browser, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True) as tab:
        tab.open(server.url)
        assert overflow(tab) == 0
        tab.ask_and_wait("wide")
        tab.ask_and_wait("w" * 60)
        answer_with(tab, status=500, body=error_body("f" * 200))
        tab.ask("hello")
        expect(tab.error).to_be_visible()
        assert overflow(tab) == 0
        for selector in ("#send", "#open-settings", "#open-chats", ".error .again"):
            assert is_inside(tab.page.locator(selector).last.bounding_box()), selector
        tab.page.tap("#open-chats")
        assert is_inside(tab.page.locator("#chats").bounding_box())
        tab.page.locator("#chats #new-chat").tap()
        expect(tab.page.locator("#chats")).to_be_hidden()
        tab.page.tap("#open-settings")
        assert is_inside(tab.page.locator("#settings").bounding_box())
        assert tab.page.locator("#settings").evaluate("e => e.scrollWidth - e.clientWidth") == 0


def test_by_keyboard_alone(tab: Tab, server: Process) -> None:
    press = tab.page.keyboard.press
    focused = "(e => e.id || e.getAttribute('aria-label'))(document.activeElement)"

    def tab_to(name: str, *, back: bool = False) -> None:
        for _ in range(30):
            if tab.page.evaluate(focused) == name:
                return
            press("Shift+Tab" if back else "Tab")
        raise AssertionError(f"{name} is not reached")

    expect(tab.page.locator("#prompt")).to_be_focused()
    tab.page.keyboard.type("first")
    press("Shift+Enter")
    tab.page.keyboard.type("second")
    press("Enter")
    tab.wait()
    assert tab.users == ["first\nsecond"]
    expect(tab.page.locator("#prompt")).to_be_focused()
    tab.page.keyboard.type("long")
    press("Enter")
    server.wait(2, running=1)
    press("Escape")
    server.wait(1, running=0)
    tab_to("Answer again", back=True)
    outline = "(({ outlineStyle, outlineWidth }) => [outlineStyle, outlineWidth])"
    assert tab.page.evaluate(f"{outline}(getComputedStyle(document.activeElement))") == ["solid", "2px"]
    tab_to("Edit, and answer again from here", back=True)
    press("Enter")
    expect(tab.page.get_by_label("Edit the message")).to_be_focused()
    press("Control+a")
    tab.page.keyboard.type("shorter")
    press("Enter")
    tab.wait()
    assert tab.users == ["first\nsecond", "shorter"]
    tab_to("open-settings", back=True)
    press("Enter")
    expect(tab.page.locator("#settings")).to_be_visible()
    press("Escape")
    expect(tab.page.locator("#settings")).to_be_hidden()
    expect(tab.page.locator("#open-settings")).to_be_focused()
    tab_to("new-chat", back=True)
    press("Enter")
    expect(tab.page.locator("#welcome")).to_be_visible()
    expect(tab.page.locator("#prompt")).to_be_focused()


def test_everything_has_a_name(tab: Tab) -> None:
    tab.ask_and_wait("program")
    nameless = """() => {
      const isNamed = (e) => ["aria-label", "aria-labelledby"].some((name) => e.hasAttribute(name))
        || e.textContent.trim() || e.labels?.length || e.hidden;
      const all = document.querySelectorAll("button, input, select, textarea, progress, dialog, details");
      return [...all].filter((e) => !isNamed(e)).map((e) => e.outerHTML);
    }"""
    assert tab.page.evaluate(nameless) == []
    assert tab.page.locator("#conversation").get_attribute("aria-live") == "polite"
    assert tab.page.locator("html").get_attribute("lang") == "en"


def test_an_input_methods_enter_sends_nothing(tab: Tab) -> None:
    tab.page.fill("#prompt", "にほん")
    event = (
        "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true })"
    )
    tab.page.evaluate(f"document.getElementById('prompt').dispatchEvent({event})")
    assert tab.users == []


def test_following_does_not_fight_the_reader(browser: Browser, server: Process) -> None:
    place = (
        "(m => [m.scrollTop, m.scrollHeight - m.scrollTop - m.clientHeight])(document.querySelector('main'))"
    )
    with new_tab(browser, viewport={"width": 800, "height": 420}) as tab:
        tab.open(server.url).ask("lines")
        until(lambda: tab.page.evaluate(place)[0] > 250)
        assert tab.page.evaluate(place)[1] < 80
        tab.page.mouse.move(400, 200)
        tab.page.mouse.wheel(0, -150)
        expect(tab.page.locator("#jump")).to_be_visible()
        tab.page.wait_for_timeout(100)
        top = tab.page.evaluate(place)[0]
        until(lambda: tab.page.evaluate(place)[1] > 300)
        assert tab.page.evaluate(place)[0] == top
        tab.page.click("#jump")
        until(lambda: tab.page.evaluate(place)[1] < 80)
        expect(tab.page.locator("#jump")).to_be_hidden()
        tab.wait()
        assert tab.page.evaluate(place)[1] < 80


def test_the_wait_for_the_first_token_is_shown(tab: Tab) -> None:
    held: list[Route] = []
    tab.page.route("**/v1/chat/completions", lambda route: held.append(route))
    tab.ask("hello")
    expect(tab.answer.locator(".wait")).to_have_text("Reading the prompt…")
    expect(tab.answer.locator(".wait")).to_have_text("Reading the prompt… 1 s")
    tab.page.click("#stop")
    expect(tab.answer.locator(".note")).to_have_text("Stopped.")
    held[0].abort()


def test_the_real_engine(browser: Browser, tiny_gguf: Path, tmp_path: Path) -> None:
    limits = {"JAXMOE_CACHE_SIZE": "16M", "JAXMOE_CONTEXT_LENGTH": "256", "JAXMOE_SLOTS": "1"}
    with (
        launch("server:app", tiny_gguf, log=tmp_path / "log", seconds=60, environment=limits) as url,
        new_tab(browser) as tab,
    ):
        tab.open(url)
        tab.page.click("#open-settings")
        tab.page.fill("[name=max_tokens]", "40")
        tab.page.fill("[name=seed]", "5")
        tab.page.keyboard.press("Escape")
        tab.ask_and_wait("Hello")
        expect(tab.answer.locator(".note")).to_contain_text("Cut off")
        expect(tab.answer.locator(".stats")).to_contain_text("40 tokens")
        expect(tab.page.locator("#context-text")).to_contain_text("of 256 tokens of context")
        first = tab.text
        assert first
        tab.page.get_by_title("Answer again", exact=True).click()
        tab.wait()
        assert tab.text == first
