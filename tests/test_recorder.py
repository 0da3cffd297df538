"""Streams recorded raw and parsed later, from a server of the test's own."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tools.client import Ask, Client, ProtocolError, ServerError, parse_stream
from tools.recorder import record

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PAUSE = 0.05


def frame(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "token_ids": [1]}]}).encode() + b"\n\n"


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


@contextmanager
def serve(answer: Callable[[socket.socket, str], None], count: int) -> Iterator[Client]:
    """Answers `count` connections, each on a thread; `answer` gets the prompt."""

    def one(connection: socket.socket) -> None:
        with connection:
            request = b""
            while not request.endswith(b"}"):
                request += connection.recv(1 << 16)
            answer(connection, json.loads(request.partition(b"\r\n\r\n")[2])["prompt"])

    def accept() -> None:
        for _ in range(count):
            thread = threading.Thread(target=one, args=(listener.accept()[0],))
            thread.start()
            threads.append(thread)

    threads: list[threading.Thread] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        accepting = threading.Thread(target=accept)
        accepting.start()
        yield Client("127.0.0.1", listener.getsockname()[1])
        for thread in (accepting, *threads):
            thread.join(10)


def ask(prompt: str) -> Ask:
    return Ask("/v1/completions", {"prompt": prompt})


def slowly(connection: socket.socket, prompt: str) -> None:
    connection.sendall(HEAD)
    for text in (prompt, "0"):
        time.sleep(PAUSE)
        connection.sendall(chunk(frame(text)))
    time.sleep(PAUSE)
    connection.sendall(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def test_every_stream_is_recorded_with_its_own_times() -> None:
    with serve(slowly, 3) as client:
        found = record(client, [ask(f"p{i}") for i in range(3)])
    assert [one.text for one in found] == ["p00", "p10", "p20"]
    for one in found:
        assert one.done == 1
        assert one.content_type == "text/event-stream"
        first, second = (chunk.at for chunk in one.token_chunks)
        assert PAUSE <= first < second
        assert 0.5 * PAUSE < second - first < 20 * PAUSE


def test_a_refusal_is_raised_with_its_body() -> None:
    def refuse(connection: socket.socket, _: str) -> None:
        connection.sendall(b"HTTP/1.1 429 Busy\r\ncontent-length: 4\r\n\r\nfull")

    with serve(refuse, 1) as client, pytest.raises(ServerError, match="429: full"):
        record(client, [ask("x")])


def test_a_stream_that_breaks_off_is_malformed() -> None:
    def breaks(connection: socket.socket, prompt: str) -> None:
        connection.sendall(HEAD + chunk(frame(prompt)))

    with serve(breaks, 1) as client, pytest.raises(ProtocolError, match="closed inside"):
        record(client, [ask("x")])


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_pieces_may_be_cut_anywhere(size: int) -> None:
    raw = HEAD + chunk(frame("a") + frame("b")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    pieces = [(5 + at / 1000, raw[at : at + size]) for at in range(0, len(raw), size)]
    found = parse_stream(4.0, pieces)
    assert (found.text, found.done, found.sent) == ("ab", 1, 4.0)
    assert 1 <= found.chunks[0].at <= found.chunks[1].at <= found.ended_at < 3


def test_nothing_at_all_is_no_response() -> None:
    with pytest.raises(ProtocolError, match="before a response"):
        parse_stream(0.0, [(1.0, b"")])
