"""The app over a real engine and a stand-in for the device, spoken to in ASGI."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asgi_client import DISCONNECT, Exchange, health_when, until
from fake_model import fake_llm, script
from quart import Quart

from jaxmoe import EngineConfig, demo
from jaxmoe.llm import LLM
from server import backend, lifetime
from server.app import BoundedSend, create_app
from server.settings import Settings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
END = 507  # <|im_end|> of the tiny vocabulary
PROMPT = [40, 41, 42]
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "seed": 5, "max_tokens": 12}
TEXT: dict[str, Any] = {"prompt": PROMPT, "seed": 5, "max_tokens": 12}
LONG: dict[str, Any] = {**HELLO, "max_tokens": 900, "ignore_eos": True}


class Server:
    """A running app and its model."""

    def __init__(self, app: Quart, llm: LLM) -> None:
        self.app = app
        self.llm = llm
        self.steps: Any = llm.steps  # type: ignore[attr-defined]

    def open(self, body: object, path: str = CHAT, method: str = "POST", **kwargs: Any) -> Exchange:
        return Exchange(self.app, method, path, body, **kwargs)

    async def ask(self, body: object, path: str = CHAT, **kwargs: Any) -> Exchange:
        return await self.open(body, path, **kwargs).end()

    async def get(self, path: str, **kwargs: Any) -> Exchange:
        return await Exchange(self.app, "GET", path, **kwargs).end()

    async def wait_idle(self) -> None:
        wanted = {"running": 0, "waiting": 0, "free_pages": self.steps.num_pages}
        await health_when(self.app, lambda health: health == {**health, **wanted})


@asynccontextmanager
async def serving(llm: LLM, settings: Settings | None = None) -> AsyncIterator[Server]:
    app = create_app(settings or Settings(), load=lambda settings, progress: llm)
    async with app.test_app():
        server = Server(app, llm)
        await health_when(app, lambda health: health["status"] == "ok")
        yield server


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What would have been done to this process: None is a request to stop, a number its exit status."""
    ended: list[int | None] = []
    monkeypatch.setattr(lifetime, "LINGER_SECONDS", 0.0)
    monkeypatch.setattr(lifetime, "ask_to_stop", lambda: ended.append(None))
    monkeypatch.setattr(lifetime, "end_process", ended.append)
    return ended


@pytest.fixture
async def server(tiny_gguf: Path) -> AsyncIterator[Server]:
    async with serving(fake_llm(tiny_gguf)) as running:
        yield running


@pytest.fixture
async def slow_server(tiny_gguf: Path) -> AsyncIterator[Server]:
    """LONG takes 9 seconds here."""
    async with serving(fake_llm(tiny_gguf, step_seconds=0.01)) as running:
        yield running


def deltas(chunks: list[Any], index: int = 0) -> list[Any]:
    return [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]


def streamed_text(chunks: list[Any], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join((c["delta"].get("content") or "") if "delta" in c else c["text"] for c in choices)


def streamed_ids(chunks: list[Any], index: int = 0) -> list[int]:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return [token_id for c in choices for token_id in c["token_ids"]]


# The stream.


async def test_a_stream_is_role_tokens_finish_and_done(server: Server) -> None:
    exchange = await server.ask({**HELLO, "stream": True})
    assert exchange.status == 200
    assert exchange.headers["content-type"].startswith("text/event-stream")
    chunks = exchange.chunks
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["id"] == f"chatcmpl-{exchange.headers['x-request-id']}"
    assert chunks[0]["model"] == "Synthetic tiny"
    first, *middle, last = deltas(chunks)
    assert first == {"role": "assistant", "content": None}
    assert all(list(delta) == ["content"] and delta["content"] for delta in middle)
    assert last == {}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [*[None] * (len(chunks) - 1), "length"]
    assert [chunk for chunk in chunks if "usage" in chunk] == []
    assert [chunk for chunk in chunks if "timings" in chunk] == [chunks[-1]]
    assert chunks[-1]["timings"]["predicted_n"] == 12


async def test_usage_is_one_more_chunk_where_it_is_asked_for(server: Server) -> None:
    chunks = (await server.ask({**HELLO, "stream": True, "stream_options": {"include_usage": True}})).chunks
    assert chunks[-1]["choices"] == []
    prompt_length = chunks[-1]["usage"]["prompt_tokens"]
    assert prompt_length == len(server.llm.encode_chat(HELLO["messages"]))
    assert chunks[-1]["usage"] == {
        "prompt_tokens": prompt_length,
        "completion_tokens": 12,
        "total_tokens": prompt_length + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert [chunk for chunk in chunks if "timings" in chunk] == [chunks[-1]]
    assert {"cache_n", "prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_ms"} < set(
        chunks[-1]["timings"]
    )


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (COMPLETIONS, TEXT)])
async def test_the_whole_response_equals_the_stream(server: Server, path: str, body: dict[str, Any]) -> None:
    asked = {**body, "return_token_ids": True, "n": 3, "max_tokens": 40, "stop": [" the", "\ufffd\ufffd"]}
    whole = (await server.ask(asked, path)).json
    chunks = (await server.ask({**asked, "stream": True}, path)).chunks
    for index, choice in enumerate(whole["choices"]):
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        assert choice["index"] == index
        assert streamed_text(chunks, index) == text
        assert streamed_ids(chunks, index) == choice["token_ids"]
        reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert reasons == [*[None] * (len(reasons) - 1), choice["finish_reason"]]
    counts = sum(len(choice["token_ids"]) for choice in whole["choices"])
    assert whole["usage"]["completion_tokens"] == counts
    assert any(choice["token_ids"] != whole["choices"][0]["token_ids"] for choice in whole["choices"])


async def test_choices_are_interleaved_and_carry_their_index(slow_server: Server) -> None:
    chunks = (await slow_server.ask({**HELLO, "n": 2, "stream": True, "ignore_eos": True})).chunks
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order[:2] == [0, 1]
    assert order[2:] != sorted(order[2:])
    for index in (0, 1):
        assert deltas(chunks, index)[0] == {"role": "assistant", "content": None}
        assert deltas(chunks, index)[-1] == {}
    assert [chunk for chunk in chunks if "timings" in chunk] == [chunks[-1]]


async def test_the_first_chunk_leaves_before_the_last_token_is_made(slow_server: Server) -> None:
    exchange = await slow_server.open({**LONG, "stream": True, "max_tokens": 100}).first_write()
    assert len(slow_server.steps.launched) < 30
    await exchange.end()
    assert len(exchange.writes) > 30


async def test_the_end_token_rides_on_the_finishing_chunk(tiny_gguf: Path) -> None:
    async with serving(fake_llm(tiny_gguf, script([65, 66, END], after=3))) as server:
        body = {**TEXT, "max_tokens": 3, "return_token_ids": True}
        whole = (await server.ask(body, COMPLETIONS)).json
        assert whole["choices"][0]["token_ids"] == [65, 66, END]
        assert whole["choices"][0]["finish_reason"] == "stop"
        assert whole["usage"]["completion_tokens"] == 3
        chunks = (await server.ask({**body, "stream": True}, COMPLETIONS)).chunks
        assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[65], [66], [END]]
        assert [chunk["choices"][0]["text"] for chunk in chunks] == [
            *map(server.llm.token_text, [65, 66]),
            "",
        ]


async def test_an_empty_answer_is_an_empty_string(tiny_gguf: Path) -> None:
    llm = fake_llm(tiny_gguf, lambda known, seed: END)
    async with serving(llm) as server:
        whole = (await server.ask(HELLO)).json
        assert whole["choices"][0]["message"] == {"role": "assistant", "content": ""}
        chunks = (await server.ask({**HELLO, "stream": True})).chunks
        assert deltas(chunks) == [{"role": "assistant", "content": None}, {}]


async def test_token_ids_only_where_they_are_asked_for(server: Server) -> None:
    exchange = await server.ask({**HELLO, "stream": True})
    assert "token_ids" not in exchange.body.decode()
    assert "token_ids" not in (await server.ask(HELLO)).body.decode()


async def test_every_character_passes_as_ascii(tiny_gguf: Path) -> None:
    async with serving(fake_llm(tiny_gguf)) as server:
        text = 'a"\\\n\r\u2028\u2029\x85\x00 🙂 你好'
        ids = server.llm.encode(text)
        server.steps.rule = script([*ids, END], after=3)
        exchange = await server.ask({**TEXT, "max_tokens": 500, "stream": True}, COMPLETIONS)
        assert exchange.body.isascii()
        assert streamed_text(exchange.chunks) == text


async def test_silence_is_filled_with_pings(tiny_gguf: Path) -> None:
    llm = fake_llm(tiny_gguf, step_seconds=0.08)
    async with serving(llm, Settings(ping_seconds=0.01)) as server:
        exchange = await server.ask({**HELLO, "max_tokens": 2, "stream": True})
        assert b": ping\n\n" in exchange.writes
        assert json.loads(exchange.frames[0])["choices"][0]["delta"]["role"] == "assistant"
        assert deltas(exchange.chunks)[-1] == {}


# Log probabilities.


async def test_chat_logprobs(server: Server) -> None:
    body = {**HELLO, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    choice = (await server.ask(body)).json["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [*map(server.llm.token_text, choice["token_ids"])]
    assert [bytes(entry["bytes"]) for entry in content] == [*map(server.llm.token_bytes, choice["token_ids"])]
    assert {entry["logprob"] for entry in content} == {-0.5}
    assert all(entry["top_logprobs"] == [] for entry in content)
    chunks = (await server.ask({**body, "stream": True})).chunks
    entries = [c["logprobs"]["content"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    assert [entry for part in entries for entry in part] == content
    assert (await server.ask(HELLO)).json["choices"][0]["logprobs"] is None


async def test_completion_logprobs(server: Server) -> None:
    ids = server.llm.encode("rain 好 in the")
    server.steps.rule = script(ids, after=3)
    body = {**TEXT, "logprobs": 1, "return_token_ids": True, "max_tokens": len(ids)}
    choice = (await server.ask(body, COMPLETIONS)).json["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [*map(server.llm.token_text, choice["token_ids"])]
    assert logprobs["token_logprobs"] == [-0.5] * len(ids)
    assert logprobs["top_logprobs"] == [{}] * len(ids)
    for token, start in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        wanted = "好" if "\ufffd" in token else token
        assert choice["text"][start:].startswith(wanted)
    chunks = (await server.ask({**body, "stream": True}, COMPLETIONS)).chunks
    parts = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    for name, values in logprobs.items():
        assert [value for part in parts for value in part[name]] == values


# Models and health.


async def test_models(tiny_gguf: Path) -> None:
    async with serving(fake_llm(tiny_gguf), Settings(model_id="org/mine")) as server:
        listed = (await server.get("/v1/models")).json
        assert [card["id"] for card in listed["data"]] == ["org/mine"]
        card = (await server.get("/v1/models/org/mine")).json
        assert (card["object"], card["max_model_len"]) == ("model", 1024)
        missing = await server.get("/v1/models/other")
        assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")
        for model in ({}, {"model": "anything"}, {"model": None}):
            assert (await server.ask({**HELLO, **model})).json["model"] == "org/mine"


async def test_health_counts(slow_server: Server) -> None:
    total = slow_server.steps.num_pages
    idle = {"running": 0, "waiting": 0, "free_pages": total, "total_pages": total}
    assert (await slow_server.get("/health")).json == {
        "status": "ok",
        "phase": "ready",
        "progress": 1.0,
        **idle,
    }
    exchange = await slow_server.open({**LONG, "stream": True, "n": 6}).first_write()
    busy = await health_when(slow_server.app, lambda health: health["running"] == 4)
    assert busy.json["waiting"] == 2
    assert busy.json["free_pages"] < total
    exchange.leave()
    await exchange.end()
    await slow_server.wait_idle()


async def test_while_loading_everything_else_is_a_503(tiny_gguf: Path) -> None:
    go_on = threading.Event()

    def load(settings: Settings, progress: Callable[[str, float], None]) -> LLM:
        progress("loading", 0.25)
        go_on.wait(20)
        return fake_llm(tiny_gguf)

    app = create_app(Settings(), load=load)
    async with app.test_app():
        health = await health_when(app, lambda health: health["phase"] == "loading")
        assert health.status == 503
        assert health.json == {
            "status": "loading",
            "phase": "loading",
            "progress": 0.25,
            "running": 0,
            "waiting": 0,
            "free_pages": 0,
            "total_pages": 0,
        }
        for method, path in (("POST", CHAT), ("POST", COMPLETIONS), ("GET", "/v1/models")):
            early = await Exchange(app, method, path, HELLO).end()
            assert (early.status, early.json["error"]["type"]) == (503, "service_unavailable_error")
            assert "loading, 25%" in early.json["error"]["message"]
            assert early.headers["retry-after"]
        go_on.set()
        await health_when(app, lambda health: health["status"] == "ok")
        assert (await Exchange(app, "POST", CHAT, HELLO).end()).status == 200


async def test_a_failed_load_is_shown_and_ends_the_process(
    ended: list[int | None], caplog: pytest.LogCaptureFixture
) -> None:
    def load(settings: Settings, progress: object) -> LLM:
        raise ValueError("m.gguf: at byte 0: no GGUF file")

    app = create_app(Settings(), load=load)
    async with app.test_app():
        await until(lambda: bool(ended))
        health = await Exchange(app, "GET", "/health").end()
        assert (health.status, health.json["status"]) == (503, "error")
        assert health.json["error"] == "m.gguf: at byte 0: no GGUF file"
        assert (await Exchange(app, "POST", CHAT, HELLO).end()).status == 503
        assert ended == [None]
    assert ended == [None, 1]
    assert "no GGUF file" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_loaded_model_is_left_out_of_garbage_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: frozen.append(0))
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(len(loaded)))
    loaded: list[object] = []
    monkeypatch.setattr(backend, "LLM", lambda *args: loaded.append(args))
    backend.load_llm(Settings(model="a.gguf"), lambda phase, progress: None)
    assert frozen == [0, 1]


def test_without_a_model_the_demo_model_is_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(backend, "_freeze_garbage_collector", lambda: None)
    monkeypatch.setattr(backend, "demo_model", lambda: Path("demo.gguf"))
    monkeypatch.setattr(backend, "LLM", lambda *args: loaded.append(args[0]))
    with caplog.at_level("INFO"):
        backend.load_llm(Settings(model="a.gguf"), lambda phase, progress: None)
        assert "demo model" not in caplog.text
        backend.load_llm(Settings(), lambda phase, progress: None)
    assert loaded == ["a.gguf", Path("demo.gguf")]
    assert "serving the demo model" in caplog.text


async def test_a_missing_demo_model_is_said(
    ended: list[int | None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("JAXMOE_MODEL", raising=False)
    monkeypatch.setattr(demo, "_FILE", tmp_path / "demo.gguf")
    app = create_app()
    async with app.test_app():
        await health_when(app, lambda health: health["status"] == "error")
    assert f"the embedded demo model is not there ({tmp_path / 'demo.gguf'})" in caplog.text
    assert "Traceback" not in caplog.text
    assert ended[-1] == 1


async def test_a_bad_setting_and_more_than_one_worker_are_refused(
    ended: list[int | None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JAXMOE_SLOTS", "none")
    async with create_app().test_app():
        assert "JAXMOE_SLOTS='none'" in caplog.text
    monkeypatch.delenv("JAXMOE_SLOTS")
    monkeypatch.setattr(lifetime, "num_workers", lambda: 2)
    async with create_app().test_app():
        assert "run one worker" in caplog.text
    assert ended.count(1) == 2


# Errors.


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "param"),
    [
        ("GET", "/nothing", b"", {}, 404, None),
        ("GET", CHAT, b"", {}, 405, None),
        ("DELETE", "/v1/models", b"", {}, 405, None),
        ("POST", CHAT, HELLO, {"content-type": "text/plain"}, 415, None),
        ("POST", CHAT, HELLO, {"content-type": "application/json; charset=utf-16"}, 415, None),
        ("POST", CHAT, b" " * (8 << 20) + b"{}", {}, 413, None),
        ("POST", CHAT, b"{", {}, 400, None),
        ("POST", CHAT, b"[" * 100_000, {}, 400, None),
        ("POST", CHAT, b"\xff\xfe{\x00}\x00", {}, 400, None),
        ("POST", CHAT, b'{"temperature": NaN}', {}, 400, None),
        ("POST", CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400, "messages"),
        ("POST", CHAT, {"messages": []}, {}, 400, "messages"),
        ("POST", CHAT, {**HELLO, "temperature": True}, {}, 400, "temperature"),
        ("POST", CHAT, {**HELLO, "tools": [{}]}, {}, 400, "tools"),
        ("POST", CHAT, {**HELLO, "max_tokens": 1020}, {}, 400, "max_tokens"),
        ("POST", CHAT, {**HELLO, "max_completion_tokens": 1020}, {}, 400, "max_completion_tokens"),
        ("POST", CHAT, {**HELLO, "logit_bias": {"512": 1}}, {}, 400, "logit_bias"),
        ("POST", CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]}, {}, 400, "messages"),
        ("POST", COMPLETIONS, {"prompt": ""}, {}, 400, "prompt"),
        ("POST", COMPLETIONS, {"prompt": [512]}, {}, 400, "prompt"),
        ("POST", COMPLETIONS, {"prompt": [1] * 1024}, {}, 400, "prompt"),
        ("POST", COMPLETIONS, {"prompt": "a", "echo": True}, {}, 400, "echo"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_openais_json(
    server: Server,
    method: str,
    path: str,
    body: object,
    headers: dict[str, str],
    status: int,
    param: str | None,
    stream: bool,
) -> None:
    if isinstance(body, dict):
        body = {**body, "stream": stream}
    exchange = await server.open(body, path, method, headers=headers).end()
    assert exchange.status == status
    assert exchange.headers["content-type"] == "application/json"
    error = exchange.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]
    assert exchange.headers["x-request-id"]
    assert status != 405 or exchange.headers["allow"]


async def test_a_chunked_body_that_grows_too_large_is_a_413(server: Server) -> None:
    exchange = server.open(b"", headers={"content-length": ""})
    exchange.inbox.get_nowait()
    for _ in range(9):
        exchange.inbox.put_nowait({"type": "http.request", "body": b" " * (1 << 20), "more_body": True})
    assert (await exchange.end()).status == 413


async def test_too_long_says_both_numbers(server: Server) -> None:
    error = (await server.ask({"prompt": [1] * 2000}, COMPLETIONS)).json["error"]
    assert error["code"] == "context_length_exceeded"
    assert "1024" in error["message"]
    assert "2000" in error["message"]
    error = (await server.ask({"prompt": [1] * 24, "max_tokens": 1001}, COMPLETIONS)).json["error"]
    assert error["code"] == "context_length_exceeded"
    assert "1024" in error["message"]
    assert "1001" in error["message"]


async def test_a_full_queue_is_a_429_and_leaves_nothing_behind(tiny_gguf: Path) -> None:
    llm = fake_llm(tiny_gguf, num_slots=1, step_seconds=0.01, engine_config=EngineConfig(max_waiting=2))
    async with serving(llm) as server:
        exchange = await server.open({**LONG, "stream": True}).first_write()
        refused = await server.ask({**HELLO, "n": 3})
        assert (refused.status, refused.json["error"]["type"]) == (429, "rate_limit_error")
        assert refused.headers["retry-after"] == "1"
        exchange.leave()
        await exchange.end()
        await server.wait_idle()


async def test_a_bug_shows_the_request_id_and_no_more(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def encode_chat(*_: object, **__: object) -> list[int]:
        raise KeyError("a secret")

    monkeypatch.setattr(server.llm, "encode_chat", encode_chat)
    exchange = await server.ask(HELLO)
    request_id = exchange.headers["x-request-id"]
    assert exchange.status == 500
    assert exchange.json["error"]["message"] == f"internal error in request {request_id}"
    assert exchange.json["error"]["type"] == "server_error"
    assert request_id in caplog.text


async def test_prompts_are_not_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for body in (HELLO, {**HELLO, "stream": True}, {**HELLO, "temperature": 9}):
        await server.ask({**body, "messages": [{"role": "user", "content": "my password"}]})
    assert "my password" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_step_that_fails_before_the_first_token_is_a_500(
    server: Server, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(number: int) -> None:
        server.steps.on_read = lambda number: None
        raise RuntimeError("a bad step")

    server.steps.on_read = fail
    exchange = await server.ask({**HELLO, "stream": stream})
    assert (exchange.status, exchange.json["error"]["type"]) == (500, "server_error")
    assert "bad step" not in exchange.body.decode()
    assert (await server.ask(HELLO)).status == 200


async def test_a_step_that_fails_later_ends_the_stream_with_an_error(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(number: int) -> None:
        if number == 5:
            raise RuntimeError("a bad step")

    server.steps.on_read = fail
    exchange = await server.ask({**LONG, "stream": True})
    assert exchange.status == 200
    assert exchange.frames[-1] == "[DONE]"
    assert json.loads(exchange.frames[-2])["error"]["type"] == "server_error"
    assert "bad step" not in exchange.body.decode()


async def test_a_dead_engine_ends_the_process(
    ended: list[int | None], server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.llm.close()
    assert (await server.ask(HELLO)).status == 503
    await asyncio.sleep(0.01)
    assert (await server.get("/health")).json["status"] == "error"
    await server.ask(HELLO)
    await asyncio.sleep(0.01)
    assert ended == [None]


async def test_an_engine_that_dies_is_noticed_without_a_request(
    ended: list[int | None], server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: int) -> None:
        raise RuntimeError("the device is gone")

    server.steps.on_read = server.steps.reset = fail
    assert (await server.ask(HELLO)).status == 500
    health = await health_when(server.app, lambda health: health["status"] == "error")
    assert (health.status, health.json["error"]) == (503, "the engine has stopped")
    await until(lambda: bool(ended))
    assert ended == [None]


# Clients that leave.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("moment", [0.0, 0.004, 0.02, 0.1])
async def test_a_client_that_leaves_frees_everything(
    slow_server: Server, stream: bool, moment: float
) -> None:
    # Four run and two wait, which takes 8 seconds; the long prompt is prefilled in two chunks.
    prompt = {"prompt": [1] * 600, "max_tokens": 420, "ignore_eos": True}
    exchanges = [slow_server.open({**prompt, "stream": stream}, COMPLETIONS) for _ in range(6)]
    await asyncio.sleep(moment)
    for exchange in exchanges:
        exchange.leave()
    for exchange in exchanges:
        await exchange.end()
    await slow_server.wait_idle()


async def test_leaving_while_the_body_arrives_is_not_overheard(slow_server: Server) -> None:
    # Python 3.11's wait_for swallows a cancellation that comes together with its result.
    for _ in range(20):
        exchange = slow_server.open({**LONG, "stream": True})
        exchange.leave()
        await exchange.end()
    await slow_server.wait_idle()


async def test_a_stream_that_was_never_started_is_cancelled(tiny_gguf: Path) -> None:
    llm = fake_llm(tiny_gguf, step_seconds=0.01)
    async with serving(llm, replace(Settings(), write_seconds=0.05)) as server:
        exchange = server.open({**LONG, "stream": True})
        exchange.may_write.clear()  # the status line is never taken, so the generator never starts
        await until(lambda: len(server.steps.launched) > 3)
        await server.wait_idle()
        await exchange.end()
        assert exchange.writes == []


async def test_a_client_that_takes_nothing_is_given_up(tiny_gguf: Path) -> None:
    llm = fake_llm(tiny_gguf, step_seconds=0.01)
    async with serving(llm, replace(Settings(), write_seconds=0.05)) as server:
        exchange = await server.open({**LONG, "stream": True}).first_write()
        exchange.may_write.clear()
        await server.wait_idle()
        await exchange.end()
        assert len(llm.steps.launched) < 500  # type: ignore[attr-defined]
        assert DISCONNECT not in list(exchange.inbox._queue)  # type: ignore[attr-defined]


class Sink:
    """A client that takes what is sent to it while `open` is set."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.taken: list[str] = []

    async def send(self, message: str) -> None:
        await self.open.wait()
        self.taken.append(message)


async def test_each_write_has_its_own_time() -> None:
    sink, loop = Sink(), asyncio.get_running_loop()
    send = BoundedSend(sink.send, Settings(write_seconds=0.3))
    await send("a")
    await asyncio.sleep(0.2)  # the timer of the first write goes off in the middle of the second
    sink.open.clear()
    loop.call_later(0.2, sink.open.set)
    await send("b")
    await asyncio.sleep(0.35)  # and between two
    sink.open.clear()
    start = loop.time()
    with pytest.raises(TimeoutError):
        await send("c")
    assert 0.29 <= loop.time() - start < 1.0
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert sink.taken == ["a", "b"]


async def test_a_request_that_has_ended_leaves_no_timer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[BoundedSend] = []
    start = BoundedSend.__init__
    monkeypatch.setattr(BoundedSend, "__init__", lambda self, *args: made.append(self) or start(self, *args))
    await server.ask({**HELLO, "stream": True})
    (send,) = made
    assert send._timer is not None
    assert send._timer.cancelled()


async def test_a_cancelled_write_is_not_one_that_took_too_long() -> None:
    sink = Sink()
    send = BoundedSend(sink.send, Settings(write_seconds=0.05))
    sink.open.clear()
    task: asyncio.Future[None] = asyncio.ensure_future(send("a"))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    timer = send._timer
    send.close()
    assert timer is not None
    assert timer.cancelled()


async def test_leaving_at_done_is_no_cancellation(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[int] = []
    monkeypatch.setattr(server.llm._engine, "cancel", cancelled.append)
    exchange = server.open({**HELLO, "stream": True})
    await exchange.first_write()
    await until(lambda: b"[DONE]" in exchange.body)
    exchange.leave()
    await exchange.end()
    assert cancelled == []


async def test_shutdown_ends_streams_with_an_error(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[Callable[[], None]] = []

    async def watch(on_stop: Callable[[], None], grace_seconds: float) -> None:
        stopped.append(on_stop)

    monkeypatch.setattr(lifetime, "watch", watch)
    llm = fake_llm(tiny_gguf, step_seconds=0.01)
    async with serving(llm, Settings(grace_seconds=0.05)) as server:
        streamed = await server.open({**LONG, "stream": True}).first_write()
        whole = server.open(LONG)
        await asyncio.sleep(0.01)
        stopped[0]()
        late = await server.ask(HELLO)
        assert (late.status, late.json["error"]["message"]) == (503, "the server is shutting down")
        assert (await server.get("/health")).json["status"] == "stopping"
        await asyncio.gather(streamed.end(), whole.end())
        assert streamed.frames[-1] == "[DONE]"
        assert json.loads(streamed.frames[-2])["error"]["message"] == "the server is shutting down"
        assert whole.status == 503


async def test_websockets_are_refused(server: Server) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await server.app({"type": "websocket", "path": CHAT}, asyncio.Queue().get, send)  # type: ignore[typeddict-item,arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


# Access.


async def test_an_api_key_guards_all_but_health(tiny_gguf: Path) -> None:
    async with serving(fake_llm(tiny_gguf), Settings(api_key="schlüssel")) as server:
        assert (await server.get("/health")).status == 200
        raw = "schlüssel".encode().decode("latin-1")
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": f"Basic {raw}"}, 401),
            ({"x-api-key": "wrong"}, 401),
            ({"x-api-key": ""}, 401),
            ({"authorization": f"Bearer {raw}"}, 200),
            ({"authorization": f"bearer {raw}"}, 200),
            ({"x-api-key": raw}, 200),
        ):
            asked = await server.ask(HELLO, headers=headers)
            assert asked.status == status, headers
            assert status == 200 or asked.json["error"]["type"] == "authentication_error"
        assert (await server.get("/nothing")).status == 401


@pytest.mark.parametrize(
    ("host", "origin", "address", "status"),
    [
        ("localhost:8000", "", "127.0.0.1", 200),
        ("LOCALHOST", "", "127.0.0.1", 200),
        ("127.0.0.1:9", "", "127.0.0.1", 200),
        ("[::1]:8000", "", "::1", 200),
        ("proxy.example", "", "127.0.0.1", 200),
        ("evil.example", "", "127.0.0.1", 403),
        ("evil.example", "", "::1", 403),
        ("localhost.evil.example", "", "127.0.0.1", 403),
        ("[::1", "", "127.0.0.1", 403),
        ("gpu.example:8000", "", "10.0.0.5", 200),
        ("localhost:8000", "http://localhost:8000", "127.0.0.1", 200),
        ("localhost:8000", "http://localhost:3000", "127.0.0.1", 403),
        ("localhost:8000", "https://evil.example", "127.0.0.1", 403),
        ("localhost:8000", "null", "127.0.0.1", 403),
    ],
)
async def test_foreign_hosts_and_origins_are_refused(
    tiny_gguf: Path, host: str, origin: str, address: str, status: int
) -> None:
    async with serving(fake_llm(tiny_gguf), Settings(allowed_hosts=("proxy.example",))) as server:
        headers = {"host": host, "origin": origin}
        exchange = await server.get("/v1/models", headers=headers, address=address)
        assert exchange.status == status
        assert "access-control-allow-origin" not in exchange.headers
