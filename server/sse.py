"""Server-sent events: how a frame is written, and the generator that writes them.

Source of the format: the WHATWG HTML standard, "Server-sent events".
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from typing import Final, Protocol

from jaxmoe import Event, Generation

CONTENT_TYPE: Final = "text/event-stream; charset=utf-8"
PING: Final = b": ping\n\n"


def frame(*texts: str) -> bytes:
    """Events; each text is a single line."""
    return "".join([f"data: {text}\n\n" for text in texts]).encode()


DONE: Final = frame("[DONE]")


class Chunks(Protocol):
    """What a stream is made of, as JSON texts of one line each."""

    def opening(self) -> Iterable[str]:
        """What comes before the first token."""

    def of(self, event: Event) -> Iterable[str]:
        """What one event gives; raises for an event that carries an error."""

    def closing(self) -> Iterable[str]:
        """What comes after the last choice's end."""

    def failure(self, error: Exception) -> str:
        """The error object that ends a stream which cannot go on."""


async def stream(
    generation: Generation, chunks: Chunks, first: list[Event], *, ping_seconds: float
) -> AsyncGenerator[bytes, None]:
    """Write a generation as server-sent events: all that has arrived in one write.

    No exception leaves it but cancellation, since an HTTP/2 client would wait for ever; `first` are the
    events that were taken out already.
    """
    try:
        written, events = frame(*chunks.opening()), first
        while True:
            written += frame(*[text for event in events for text in chunks.of(event)])
            if generation.finished:
                break
            yield written or PING
            # It lets other tasks run: a write that never blocks would not notice that its client has left.
            written, events = b"", await generation.next_events(ping_seconds or None)
        yield written + frame(*chunks.closing()) + DONE
    except Exception as error:
        generation.cancel()
        yield frame(chunks.failure(error)) + DONE
    finally:
        generation.cancel()
