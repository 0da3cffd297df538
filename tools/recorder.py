"""Many streams recorded at once by one thread that only reads and looks at the clock; parsing comes after.

At thousands of events a second a client that parses as it reads would measure itself.
"""

from __future__ import annotations

import gc
import selectors
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter

from tools.client import READ_SIZE, Ask, Client, ProtocolError, StreamRecord, parse_stream

SILENCE_SECONDS = 300.0
_LAST_CHUNK = b"0\r\n\r\n"

Pieces = list[tuple[float, bytes]]


def record(client: Client, asks: Sequence[Ask]) -> list[StreamRecord]:
    """Send all requests at once and record every response, in the order of `asks`.

    Raises ServerError for another status than 200, ProtocolError for anything malformed or SILENCE_SECONDS
    without a byte.
    """
    requests = [client.request("POST", ask.path, ask.body) for ask in asks]
    with ExitStack() as stack, _no_collection():
        sockets = [stack.enter_context(_connected(client)) for _ in requests]
        sent = []
        for one, request in zip(sockets, requests, strict=True):
            one.sendall(request)
            sent.append(perf_counter())
        found = _read_all(sockets)
    return [parse_stream(at, pieces) for at, pieces in zip(sent, found, strict=True)]


def _connected(client: Client) -> socket.socket:
    if client.tls:
        raise ValueError("only http:// is recorded")
    return socket.create_connection((client.host, client.port), timeout=SILENCE_SECONDS)


def _read_all(sockets: Sequence[socket.socket]) -> list[Pieces]:
    """(clock, bytes) of every read of every socket, until each has ended."""
    found: list[Pieces] = [[] for _ in sockets]
    with selectors.DefaultSelector() as waiting:
        for one, pieces in zip(sockets, found, strict=True):
            one.setblocking(False)
            waiting.register(one, selectors.EVENT_READ, pieces)
        left = len(sockets)
        while left:
            ready = waiting.select(SILENCE_SECONDS)
            if not ready:
                raise ProtocolError(f"the server sent nothing for {SILENCE_SECONDS:.0f} s")
            for key, _ in ready:
                piece = key.fileobj.recv(READ_SIZE)  # type: ignore[union-attr]
                key.data.append((perf_counter(), piece))
                # events end in two line feeds, so that nothing else ends a piece like this
                if not piece or piece.endswith(_LAST_CHUNK):
                    waiting.unregister(key.fileobj)
                    left -= 1
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection of garbage would stop the clock's reader for milliseconds."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
