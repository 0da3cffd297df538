"""Frames, and what a stream does when things go right and wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxmoe import Event
from server.sse import DONE, PING, frame, stream


class FakeGeneration:
    """Gives batches of events; [] stands for a wait without any."""

    def __init__(self, *batches: list[Event]) -> None:
        self.batches = list(batches)
        self.cancelled = 0
        self.waits: list[float | None] = []

    @property
    def finished(self) -> bool:
        return not self.batches

    async def next_events(self, seconds: float | None = None) -> list[Event]:
        self.waits.append(seconds)
        return self.batches.pop(0)

    def cancel(self, reason: str = "") -> None:
        self.cancelled += 1


class FakeChunks:
    def opening(self) -> list[str]:
        return ["open"]

    def of(self, event: Event) -> Iterator[str]:
        if event.error:
            raise RuntimeError(event.error)
        yield event.text

    def closing(self) -> list[str]:
        return ["close"]

    def failure(self, error: Exception) -> str:
        return f"failed: {error}"


def event(text: str, error: str | None = None) -> Event:
    return Event(text, (1,), error=error)


def started(generation: FakeGeneration, first: list[Event], ping_seconds: float = 15.0) -> Any:
    return stream(generation, FakeChunks(), first, ping_seconds=ping_seconds)  # type: ignore[arg-type]


async def writes(generation: FakeGeneration, first: list[Event], ping_seconds: float = 15.0) -> list[bytes]:
    return [written async for written in started(generation, first, ping_seconds)]


def test_a_frame_is_one_line_and_an_empty_one() -> None:
    assert frame('{"a":1}') == b'data: {"a":1}\n\n'
    assert frame("é") == b"data: \xc3\xa9\n\n"
    assert DONE == b"data: [DONE]\n\n"
    assert PING.startswith(b":")
    assert PING.endswith(b"\n\n")


async def test_all_that_has_arrived_goes_out_in_one_write() -> None:
    generation = FakeGeneration([event("b"), event("c")], [event("d")])
    assert await writes(generation, [event("a")]) == [
        frame("open") + frame("a"),
        frame("b") + frame("c"),
        frame("d") + frame("close") + DONE,
    ]


async def test_silence_gives_pings() -> None:
    generation = FakeGeneration([], [], [event("a")])
    assert await writes(generation, []) == [frame("open"), PING, PING, frame("a") + frame("close") + DONE]
    assert generation.waits == [15.0] * 3
    generation = FakeGeneration([event("a")])
    await writes(generation, [], ping_seconds=0)
    assert generation.waits == [None]


async def test_an_error_becomes_the_last_frame() -> None:
    generation = FakeGeneration([event("a")], [event("b"), event("c", error="broken")], [event("d")])
    assert await writes(generation, []) == [frame("open"), frame("a"), frame("failed: broken") + DONE]
    assert generation.cancelled


async def test_every_end_cancels() -> None:
    generation = FakeGeneration([event("a")], [event("b")])
    body = started(generation, [])
    await anext(body)
    await body.aclose()
    assert generation.cancelled == 1
