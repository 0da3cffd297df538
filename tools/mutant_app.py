"""The app and its mutants behind one port: `hypercorn tools.mutant_app:app`.

`server:app` (or what DISCHARGE_APP names) is served unchanged, except for requests whose `x-mutant` header
names an entry of MUTANTS: so the model loads once for all of them. A GET of RELEASE_PATH lets go of the
requests whose disconnect was swallowed.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import import_module

from tools.mutants import HEADER, MUTANTS, RELEASE_PATH, Events, Json, Mutant

Receive = Callable[[], Awaitable[Json]]
Send = Callable[[Json], Awaitable[None]]
App = Callable[[Json, Receive, Send], Awaitable[None]]

DISCONNECT = {"type": "http.disconnect"}
LATE_SECONDS = 0.5


class _Signal:
    """Wakes everybody who waits for it now, nobody who comes later."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def give(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()


_released = _Signal()
_somebody_left = _Signal()
_running: set[asyncio.Task[None]] = set()


def _load(name: str) -> App:
    module, _, attribute = name.partition(":")
    found: App = getattr(import_module(module), attribute)
    return found


_inner = _load(os.environ.get("DISCHARGE_APP", "server:app"))


async def app(scope: Json, receive: Receive, send: Send) -> None:
    """The app, or a mutant of it where a request's header names one."""
    headers = dict(scope.get("headers") or ())
    name = headers.get(HEADER.encode(), b"").decode()
    if scope["type"] == "http" and scope["path"] == RELEASE_PATH:
        _released.give()
        await _answer_json(send, {"released": True})
    elif scope["type"] == "http" and scope["method"] == "POST" and name:
        await _Mutated(MUTANTS[name], scope, receive, send).serve()
    else:
        await _inner(scope, receive, send)


class _Mutated:
    """One request through a mutant: the app runs in a task of its own and speaks into a queue."""

    def __init__(self, mutant: Mutant, scope: Json, receive: Receive, send: Send) -> None:
        self._mutant = mutant
        self._scope = scope
        self._receive = receive
        self._send = send
        self._said: asyncio.Queue[Json | None] = asyncio.Queue()

    async def serve(self) -> None:
        body = json.loads(await self._read_body())
        content = json.dumps(self._mutant.request(body)).encode()
        task = asyncio.create_task(self._run_inner(content))
        _running.add(task)
        task.add_done_callback(_running.discard)
        start = await self._said.get()
        if start is None:
            return
        kind = dict(start["headers"]).get(b"content-type", b"")
        if kind.startswith(b"text/event-stream"):
            await self._send(start)
            await self._stream(body)
        else:
            await self._whole(start, body)

    async def _read_body(self) -> bytes:
        content, more = b"", True
        while more:
            message = await self._receive()
            content += message.get("body", b"")
            more = message.get("more_body", False)
        return content

    async def _run_inner(self, content: bytes) -> None:
        """The app, told the changed body, and of a disconnect what the mutant lets through."""
        headers = [pair for pair in self._scope["headers"] if pair[0] != b"content-length"]
        scope = {**self._scope, "headers": [*headers, (b"content-length", str(len(content)).encode())]}
        first = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> Json:
            return first.pop() if first else await LEAVING[self._mutant.leaving](self._receive)

        try:
            await _inner(scope, receive, self._said.put)
        finally:
            self._said.put_nowait(None)

    async def _pieces(self) -> AsyncIterator[bytes]:
        while (message := await self._said.get()) is not None:
            yield message.get("body", b"")
            if not message.get("more_body", False):
                return

    async def _events(self) -> Events:
        buffer = b""
        async for piece in self._pieces():
            *frames, buffer = (buffer + piece).split(b"\n\n")
            for frame in frames:
                if frame.startswith(b"data: "):
                    payload = frame.removeprefix(b"data: ")
                    yield None if payload == b"[DONE]" else json.loads(payload)

    async def _stream(self, body: Json) -> None:
        async for event in self._mutant.events(self._events(), body):
            payload = "[DONE]" if event is None else json.dumps(event, ensure_ascii=False)
            frame = f"data: {payload}\n\n".encode()
            await self._send({"type": "http.response.body", "body": frame, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self, start: Json, body: Json) -> None:
        content = b"".join([piece async for piece in self._pieces()])
        if start["status"] == 200:
            content = json.dumps(self._mutant.reply(json.loads(content), body)).encode()
        await _answer(self._send, start["status"], content)


async def _answer_json(send: Send, payload: Json) -> None:
    await _answer(send, 200, json.dumps(payload).encode())


async def _answer(send: Send, status: int, content: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})


async def _swallow(receive: Receive) -> Json:
    await _released.wait()
    return DISCONNECT


async def _share(receive: Receive) -> Json:
    """Whoever leaves first takes all others along."""
    own = asyncio.ensure_future(receive())
    others = asyncio.ensure_future(_somebody_left.wait())
    try:
        await asyncio.wait((own, others), return_when=asyncio.FIRST_COMPLETED)
        if own.done():
            _somebody_left.give()
        return DISCONNECT
    finally:
        own.cancel()
        others.cancel()


async def _tell_late(receive: Receive) -> Json:
    message = await receive()
    await asyncio.sleep(LATE_SECONDS)
    return message


async def _tell(receive: Receive) -> Json:
    return await receive()


LEAVING = {"told": _tell, "late": _tell_late, "swallowed": _swallow, "shared": _share}
