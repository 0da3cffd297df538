"""A client that speaks ASGI to an app in this process, and can read slowly or leave at any moment."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

DISCONNECT = {"type": "http.disconnect"}
PATIENCE = 6.0  # seconds; what must be ended early would take longer by itself


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that another task or thread brings about."""
    end = time.perf_counter() + PATIENCE
    while time.perf_counter() < end:
        if holds():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("waited in vain")


async def health_when(app: Any, holds: Callable[[Any], bool]) -> Exchange:
    """Ask for /health until its body is as wanted."""
    end = time.perf_counter() + PATIENCE
    while time.perf_counter() < end:
        health = await Exchange(app, "GET", "/health").end()
        if holds(health.json):
            return health
        await asyncio.sleep(0.002)
    raise AssertionError(f"waited in vain: {health.json}")


class Exchange:
    """One request and its response so far; `writes` are the response's body messages."""

    def __init__(
        self,
        app: Any,
        method: str,
        path: str,
        body: bytes | object = b"",
        headers: Mapping[str, str] | None = None,
        *,
        address: str = "127.0.0.1",
    ) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"host": "localhost:8000", "content-type": "application/json", "content-length": str(len(raw))}
        sent.update(headers or {})
        self.status = 0
        self.headers: dict[str, str] = {}
        self.writes: list[bytes] = []
        self.arrived = asyncio.Event()
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.inbox.put_nowait({"type": "http.request", "body": raw, "more_body": False})
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "http_version": "1.1",
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in sent.items() if value],
            "client": ("127.0.0.1", 50000),
            "server": (address, 8000),
            "state": {},
            "extensions": {},
        }
        self.task = asyncio.create_task(app(scope, self.inbox.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        await self.may_write.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        elif message["body"]:
            self.writes.append(message["body"])
            self.arrived.set()

    def leave(self) -> None:
        """Close the connection."""
        self.inbox.put_nowait(DISCONNECT)

    async def end(self) -> Exchange:
        """Wait for the whole response."""
        async with asyncio.timeout(30):
            await self.task
        return self

    async def first_write(self) -> Exchange:
        """Wait for the first part of the body."""
        async with asyncio.timeout(30):
            await self.arrived.wait()
        return self

    @property
    def body(self) -> bytes:
        """All that was written."""
        return b"".join(self.writes)

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def frames(self) -> list[str]:
        """The data of each server-sent event."""
        events = [part for part in self.body.decode().split("\n\n") if part and not part.startswith(":")]
        assert all(event.startswith("data: ") for event in events)
        return [event.removeprefix("data: ") for event in events]

    @property
    def chunks(self) -> list[Any]:
        """The JSON of each event but [DONE], which must be the last."""
        *frames, done = self.frames
        assert done == "[DONE]"
        return [json.loads(frame) for frame in frames]
