"""The client that measures: HTTP and server-sent events however the bytes are cut, and what is a token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tools.client import Ask, Chunk, Client, ProtocolError, ServerError, StreamRecord

ASK = Ask("/v1/chat/completions", {"stream": True})


def chunk_json(**delta: Any) -> str:
    return json.dumps({"choices": [{"delta": delta, "finish_reason": None}]}, ensure_ascii=False)


EVENTS = (
    ": a comment\n\n"
    f"data: {chunk_json(role='assistant', content=None)}\n\n"
    f"data: {chunk_json(content=' é')}\r\n\r\n"
    f"data:{chunk_json(content='中')}\n\n"
    "data: [DONE]\n\n"
).encode()


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x;x=y\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@asynccontextmanager
async def server_that_says(answer: bytes, cut: int = 1 << 20) -> AsyncIterator[Client]:
    """A server that reads a request and writes `answer` in pieces of `cut` bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for start in range(0, len(answer), cut):
            writer.write(answer[start : start + cut])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Client("127.0.0.1", server.sockets[0].getsockname()[1])


def response(body: bytes, headers: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + body


@pytest.mark.parametrize("cut", [1, 2, 7, 100_000])
@pytest.mark.parametrize("size", [1, 5, 100_000])
async def test_a_stream_is_read_however_it_is_cut(cut: int, size: int) -> None:
    headers = "Content-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked"
    async with server_that_says(response(chunked(EVENTS, size), headers), cut) as client:
        record = await client.stream(ASK)
    assert record.text == " é中"
    assert [chunk.text for chunk in record.token_chunks] == [" é", "中"]
    assert (record.done, record.after_done, record.content_type) == (1, 0, "text/event-stream")
    times = [chunk.at for chunk in record.chunks]
    assert times == sorted(times)
    assert record.ended_at >= times[-1] > 0


@pytest.mark.parametrize("headers", ["Content-Length: {}", "Connection: close"])
async def test_a_whole_response_is_read(headers: str) -> None:
    body = json.dumps(
        {"choices": [{"message": {"content": "x"}}], "usage": {"completion_tokens": 1}}
    ).encode()
    async with server_that_says(response(body, headers.format(len(body))), 3) as client:
        reply = await client.complete(ASK)
    assert (reply.text, reply.completion_tokens, reply.prompt_tokens, reply.token_ids) == ("x", 1, None, [])


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        response(b'{"a": 1', "Content-Length: 99"),
        response(chunked(EVENTS, 9)[:-5], "Transfer-Encoding: chunked"),
        response(chunked(EVENTS[:-1], 9), "Transfer-Encoding: chunked"),
        response(chunked(b"data: no\n\n", 9), "Transfer-Encoding: chunked"),
        response(chunked(b"data: [1]\n\n", 9), "Transfer-Encoding: chunked"),
    ],
    ids=["nothing", "half a head", "half a body", "half a stream", "half an event", "no JSON", "no object"],
)
async def test_what_breaks_off_or_is_malformed_is_an_error(answer: bytes) -> None:
    async with server_that_says(answer) as client:
        with pytest.raises(ProtocolError):
            await client.stream(ASK)


async def test_another_status_is_an_error_with_the_body() -> None:
    async with server_that_says(response(b"{}", "Content-Length: 2", "429 Too Many Requests")) as client:
        with pytest.raises(ServerError, match="429") as caught:
            await client.complete(ASK)
    assert (caught.value.status, caught.value.body) == (429, "{}")


async def test_an_error_event_is_an_error() -> None:
    body = chunked(b'data: {"error": {"message": "out of pages"}}\n\n', 9)
    async with server_that_says(response(body, "Transfer-Encoding: chunked")) as client:
        with pytest.raises(ServerError, match="out of pages"):
            await client.stream(ASK)


async def test_the_connection_closes_after_so_many_tokens_or_when_the_task_is_cancelled() -> None:
    closed = asyncio.Queue[bytes]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        event = f"data: {chunk_json(content='x')}\n\n".encode()
        writer.write(response(chunked(event * 3, 100_000)[:-5], "Transfer-Encoding: chunked"))
        closed.put_nowait(await reader.read())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        client = Client("127.0.0.1", server.sockets[0].getsockname()[1])
        record = await client.stream(ASK, stop_after=2)
        assert len(record.token_chunks) >= 2
        await asyncio.wait_for(closed.get(), 5)
        record = StreamRecord()
        task = asyncio.create_task(client.stream(ASK, record))
        while not record.chunks:  # noqa: ASYNC110 - nothing else tells that a chunk has come
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait_for(closed.get(), 5)
        with pytest.raises(asyncio.CancelledError):
            await task


def test_role_finish_and_usage_are_not_tokens_and_reasoning_is() -> None:
    role = {"choices": [{"delta": {"role": "assistant", "content": None}, "token_ids": []}]}
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}, "token_ids": [1]}]}
    spoken = {"choices": [{"text": "x", "token_ids": [2, 3], "finish_reason": None}]}
    finish = {"choices": [{"delta": {}, "token_ids": [4], "finish_reason": "stop"}]}
    usage = {
        "choices": [],
        "usage": {"completion_tokens": 4},
        "timings": {"predicted_n": 4, "predicted_ms": 6},
    }
    record = StreamRecord()
    for at, payload in enumerate((role, thought, spoken, finish, usage)):
        record.add(at, json.dumps(payload))
    record.add(5, "[DONE]")
    assert [chunk.bears_tokens for chunk in record.chunks] == [False, True, True, False, False]
    assert (record.text, record.token_ids, record.finish_reasons) == ("hmx", [1, 2, 3, 4], ["stop"])
    assert (record.ttft_ms, record.gaps_ms, record.step_ms) == (1000, [1000], 1000)
    assert (record.completion_tokens, record.engine_ms) == (4, 2)
    record.add(6, json.dumps(usage))
    assert record.after_done == 1


def test_one_token_has_no_gap_by_the_engine_either() -> None:
    record = StreamRecord(chunks=[Chunk(0.1, {"timings": {"predicted_n": 1, "predicted_ms": 0}})])
    assert record.engine_ms is None


def test_a_stream_without_tokens_has_no_first_one() -> None:
    record = StreamRecord(chunks=[Chunk(0.1, {"choices": []})])
    assert (record.ttft_ms, record.gaps_ms, record.engine_ms) == (float("inf"), [], None)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", ("127.0.0.1", 8000, "", False)),
        ("http://127.0.0.1:8000/v1/", ("127.0.0.1", 8000, "", False)),
        ("https://example.org/openai/v1", ("example.org", 443, "/openai", True)),
        ("http://localhost", ("localhost", 80, "", False)),
    ],
)
def test_a_url_with_or_without_v1(url: str, expected: tuple[object, ...]) -> None:
    client = Client.from_url(url)
    assert (client.host, client.port, client.prefix, client.tls) == expected


def test_a_url_that_is_none() -> None:
    with pytest.raises(ValueError, match="--url must look like"):
        Client.from_url("localhost:8000")
