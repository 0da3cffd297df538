"""An OpenAI client on a bare socket: each server-sent event keeps the time its bytes arrived.

HTTP/1.1, one connection a request, so that closing the connection is the disconnect that is meant.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

Json = dict[str, Any]
READ_SIZE = 1 << 16  # bytes
DONE = "[DONE]"


class ServerError(Exception):
    """The server answered with another status than 200: `status`, and `body` as text."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"the server answered {status}: {body[:300]}")
        self.status = status
        self.body = body


class ProtocolError(Exception):
    """What came over the socket is not HTTP, not server-sent events, or ended too early."""


@dataclass(frozen=True)
class Ask:
    """One POST: the path below the server's address, and the JSON body."""

    path: str
    body: Json


@dataclass(frozen=True)
class Chunk:
    """One `data: {...}` event. `at` is in seconds since the request was sent."""

    at: float
    payload: Json

    @property
    def choice(self) -> Json:
        choices = self.payload.get("choices") or [{}]
        return dict(choices[0])

    @property
    def text(self) -> str:
        return _text(self.choice, "delta")

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self.choice.get("token_ids") or ())

    @property
    def finish_reason(self) -> str | None:
        reason = self.choice.get("finish_reason")
        return None if reason is None else str(reason)

    @property
    def bears_tokens(self) -> bool:
        """Role, finish and usage chunks are not tokens, even where a finish carries ids without text."""
        return bool(self.text or (self.token_ids and self.finish_reason is None))


@dataclass
class StreamRecord:
    """Everything that arrived on one stream, filled while it arrives.

    `sent` is the client's clock when the request went out; all other times are seconds since then.
    """

    sent: float = 0.0
    chunks: list[Chunk] = field(default_factory=list)
    done: int = 0
    after_done: int = 0
    ended_at: float = 0.0
    content_type: str = ""

    def add(self, at: float, payload: str) -> None:
        self.ended_at = at
        self.after_done += bool(self.done)
        if payload == DONE:
            self.done += 1
            return
        self.chunks.append(Chunk(at, _json_object(payload)))

    @property
    def token_chunks(self) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.bears_tokens]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for chunk in self.chunks for token_id in chunk.token_ids]

    @property
    def finish_reasons(self) -> list[str]:
        return [chunk.finish_reason for chunk in self.chunks if chunk.finish_reason is not None]

    @property
    def completion_tokens(self) -> int | None:
        return _usage(self._last("usage"), "completion_tokens")

    @property
    def prompt_tokens(self) -> int | None:
        return _usage(self._last("usage"), "prompt_tokens")

    @property
    def engine_ms(self) -> float | None:
        """Milliseconds between tokens as the server reports them: `timings` of the last chunk that has them.

        predicted_ms runs from the first token to the last, so that n tokens span n - 1 gaps.
        """
        timings = self._last("timings")
        gaps = (timings.get("predicted_n") or 0) - 1
        return float(timings["predicted_ms"]) / gaps if gaps > 0 else None

    @property
    def ttft_ms(self) -> float:
        """Milliseconds from sending the request to the first token chunk."""
        return 1000 * self.token_chunks[0].at if self.token_chunks else float("inf")

    @property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between token chunks."""
        times = [chunk.at for chunk in self.token_chunks]
        return [1000 * (late - early) for early, late in pairwise(times)]

    @property
    def step_ms(self) -> float:
        """Milliseconds a token: the mean over the token chunks, or the first one's time if it is alone."""
        gaps = self.gaps_ms
        return sum(gaps) / len(gaps) if gaps else self.ttft_ms

    def _last(self, name: str) -> Json:
        found = [chunk.payload[name] for chunk in self.chunks if chunk.payload.get(name)]
        return found[-1] if found else {}


@dataclass(frozen=True)
class Reply:
    """One whole response. `at` is in seconds since the request was sent."""

    at: float
    content_type: str
    body: bytes

    @property
    def payload(self) -> Json:
        return _json_object(self.body.decode())

    @property
    def choice(self) -> Json:
        return dict(self.payload["choices"][0])

    @property
    def text(self) -> str:
        return _text(self.choice, "message")

    @property
    def token_ids(self) -> list[int]:
        return list(self.choice.get("token_ids") or ())

    @property
    def finish_reason(self) -> str | None:
        reason = self.choice.get("finish_reason")
        return None if reason is None else str(reason)

    @property
    def completion_tokens(self) -> int | None:
        return _usage(self.payload.get("usage") or {}, "completion_tokens")

    @property
    def prompt_tokens(self) -> int | None:
        return _usage(self.payload.get("usage") or {}, "prompt_tokens")


@dataclass(frozen=True)
class Client:
    """Where the server is, and the headers each request carries."""

    host: str
    port: int
    prefix: str = ""
    tls: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_url(cls, url: str, headers: Mapping[str, str] | None = None) -> Client:
        """`http://host:port`, with or without the `/v1` that OpenAI's own clients want."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url must look like http://host:port, got {url}")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if tls else 80), prefix, tls, headers or {})

    async def stream(self, ask: Ask, record: StreamRecord | None = None, stop_after: int = 0) -> StreamRecord:
        """Send `ask` and record its events until the server ends them.

        With `stop_after` the connection is closed after that many token chunks. Cancelling the task
        closes it at once; what had arrived stands in `record`.
        Raises ServerError for another status than 200, ProtocolError for anything malformed.
        """
        record = StreamRecord() if record is None else record
        async with self._exchange("POST", ask.path, ask.body) as response:
            await response.expect_ok()
            record.sent, record.content_type = response.sent, response.content_type
            frames = _Frames()
            async for at, piece in response.pieces():
                for payload in frames.feed(piece):
                    record.add(at, payload)
                if stop_after and len(record.token_chunks) >= stop_after:
                    return record
            frames.close()
        return record

    async def complete(self, ask: Ask) -> Reply:
        """Send `ask` and return the whole response. Raises ServerError for another status than 200."""
        async with self._exchange("POST", ask.path, ask.body) as response:
            await response.expect_ok()
            body, at = await response.whole()
            return Reply(at, response.content_type, body)

    async def get(self, path: str) -> Json:
        """The JSON object at `path`. Raises ServerError for another status than 200."""
        async with self._exchange("GET", path, None) as response:
            await response.expect_ok()
            return _json_object((await response.whole())[0].decode())

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: Json | None) -> AsyncIterator[_Response]:
        context = ssl.create_default_context() if self.tls else None
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=context)
        try:
            writer.write(self.request(method, path, body))
            sent = perf_counter()
            await writer.drain()
            yield await _Response.read_head(reader, sent)
        finally:
            writer.close()

    def request(self, method: str, path: str, body: Json | None) -> bytes:
        """The bytes of a request; the server is asked to close the connection after its response."""
        content = b"" if body is None else json.dumps(body).encode()
        headers = {
            "host": f"{self.host}:{self.port}",
            "connection": "close",
            "content-type": "application/json",
            "content-length": str(len(content)),
            **self.headers,
        }
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


class _Response:
    def __init__(self, reader: asyncio.StreamReader, sent: float, status: int, headers: Json) -> None:
        self._reader = reader
        self.sent = sent
        self._headers = headers
        self.status = status

    @classmethod
    async def read_head(cls, reader: asyncio.StreamReader, sent: float) -> _Response:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise ProtocolError("the connection closed before a response came") from error
        return cls(reader, sent, *_parse_head(head))

    @property
    def content_type(self) -> str:
        return str(self._headers.get("content-type", "")).split(";")[0].strip().lower()

    async def expect_ok(self) -> None:
        if self.status != 200:
            raise ServerError(self.status, (await self.whole())[0].decode(errors="replace"))

    async def whole(self) -> tuple[bytes, float]:
        """The whole body, and when its last byte came (seconds since the request was sent)."""
        pieces = [piece async for piece in self.pieces()]
        return b"".join(piece for _, piece in pieces), pieces[-1][0] if pieces else 0.0

    async def pieces(self) -> AsyncIterator[tuple[float, bytes]]:
        """(seconds since the request was sent, body bytes) as each read of the socket returns."""
        decoder = self._decoder()
        while not decoder.done:
            raw = await self._reader.read(READ_SIZE)
            at = perf_counter() - self.sent
            if not raw:
                decoder.close()
                return
            piece = decoder.feed(raw)
            if piece:
                yield at, piece

    def _decoder(self) -> _Chunked | _Sized:
        return _decoder(self._headers)


def _parse_head(head: str) -> tuple[int, Json]:
    """Status and headers, their names in small letters."""
    first, *lines = head.strip().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


def _decoder(headers: Json) -> _Chunked | _Sized:
    if "chunked" in str(headers.get("transfer-encoding", "")).lower():
        return _Chunked()
    length = headers.get("content-length")
    return _Sized(None if length is None else int(length))


def parse_stream(sent: float, pieces: Sequence[tuple[float, bytes]]) -> StreamRecord:
    """The record of one whole response: `pieces` are (clock, bytes) of each read of the socket.

    Raises ServerError for another status than 200, ProtocolError for anything malformed.
    """
    raw = b"".join(piece for _, piece in pieces)
    head, found, _ = raw.partition(b"\r\n\r\n")
    if not found:
        raise ProtocolError("the connection closed before a response came")
    status, headers = _parse_head(head.decode("latin-1"))
    decoder, frames, skip = _decoder(headers), _Frames(), len(head) + 4
    record = StreamRecord(sent=sent, content_type=str(headers.get("content-type", "")).split(";")[0].lower())
    body = []
    for at, piece in pieces:
        part, skip = piece[skip:], max(0, skip - len(piece))
        body.append(decoder.feed(part) if part and not decoder.done else b"")
        if status == 200:
            for payload in frames.feed(body[-1]):
                record.add(at - sent, payload)
    if not decoder.done:
        decoder.close()
    if status != 200:
        raise ServerError(status, b"".join(body).decode(errors="replace"))
    frames.close()
    return record


class _Sized:
    """A body of a known size in bytes, or one that lasts until the connection closes (None)."""

    def __init__(self, size: int | None) -> None:
        self._left = size
        self.done = size == 0

    def feed(self, raw: bytes) -> bytes:
        if self._left is not None:
            self._left -= len(raw)
            self.done = self._left <= 0
        return raw

    def close(self) -> None:
        if self._left is not None and self._left > 0:
            raise ProtocolError(f"the connection closed {self._left} bytes before the end of the response")


class _Chunked:
    """Chunked transfer coding (RFC 9112, section 7.1)."""

    def __init__(self) -> None:
        self._buffer = b""
        self.done = False

    def feed(self, raw: bytes) -> bytes:
        self._buffer += raw
        out = b""
        while not self.done:
            line, found, rest = self._buffer.partition(b"\r\n")
            size = int(line.split(b";")[0], 16) if found else 0
            if not found or len(rest) < size + 2:
                break
            out += rest[:size]
            self._buffer = rest[size + 2 :]
            self.done = size == 0
        return out

    def close(self) -> None:
        raise ProtocolError("the connection closed inside the stream")


class _Frames:
    """Server-sent events out of bytes (HTML standard, section 9.2); comment lines are left out."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, piece: bytes) -> list[str]:
        self._buffer = (self._buffer + piece).replace(b"\r\n", b"\n")
        *frames, self._buffer = self._buffer.split(b"\n\n")
        payloads = ("\n".join(_payload_lines(frame.decode())) for frame in frames)
        return [payload for payload in payloads if payload]

    def close(self) -> None:
        if self._buffer.strip():
            raise ProtocolError(f"the stream ended inside an event: {self._buffer[:80]!r}")


def _payload_lines(frame: str) -> list[str]:
    lines = frame.split("\n")
    return [line[5:].removeprefix(" ") for line in lines if line.startswith("data:")]


def _json_object(text: str) -> Json:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"not JSON: {text[:120]!r}") from error
    if not isinstance(found, dict):
        raise ProtocolError(f"not a JSON object: {text[:120]!r}")
    if "error" in found:
        raise ServerError(200, json.dumps(found["error"]))
    return found


def _text(choice: Json, part: str) -> str:
    """Reasoning and content of a chat choice (`delta` or `message`), or a completion's text."""
    spoken = choice.get(part)
    if spoken is None:
        return str(choice.get("text") or "")
    return (spoken.get("reasoning_content") or "") + (spoken.get("content") or "")


def _usage(usage: Json, name: str) -> int | None:
    value = usage.get(name)
    return None if value is None else int(value)
