"""The process around the app: how it is told to stop, and what hypercorn's worker does not do itself.

A worker that `hypercorn` started learns of its end by an event of the parent process, which is no
public interface: each use of it is guarded, and without it only the grace period is lost.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

POLL_SECONDS: Final = 0.2
LINGER_SECONDS: Final = 1.0
STOP_SECONDS: Final = 10.0
BACKLOG: Final = 2048
KEEP_ALIVE_SECONDS: Final = 75.0


def end_process(status: int) -> None:
    """End the process from a callback of the event loop; hypercorn passes SystemExit on."""
    raise SystemExit(status)


def stop_soon() -> None:
    """Have hypercorn stop, after a moment in which /health can say why."""
    asyncio.get_running_loop().call_later(LINGER_SECONDS, ask_to_stop)


def ask_to_stop() -> None:
    """Have hypercorn close its connections and stop; end the process if it does not."""
    event = worker_arguments().get("shutdown_event")
    if event is not None:
        event.set()
    else:
        signal.raise_signal(signal.SIGTERM)
    asyncio.get_running_loop().call_later(STOP_SECONDS, end_process, 1)


def worker_arguments() -> Mapping[str, Any]:
    """What hypercorn's parent gave to this worker process; empty anywhere else."""
    return getattr(multiprocessing.current_process(), "_kwargs", None) or {}


def num_workers() -> int:
    """How many worker processes hypercorn runs."""
    return int(getattr(worker_arguments().get("config"), "workers", 1))


def raise_limits(grace_seconds: float) -> None:
    """Set hypercorn's limits to ours where they still have hypercorn's own values."""
    config = worker_arguments().get("config")
    for name, default, wanted in (
        ("backlog", 100, BACKLOG),
        ("keep_alive_timeout", 5.0, KEEP_ALIVE_SECONDS),
        ("graceful_timeout", 3.0, grace_seconds + 1.0),
    ):
        if getattr(config, name, None) == default:
            setattr(config, name, wanted)


async def watch(on_stop: Callable[[], None], grace_seconds: float) -> None:
    """Call `on_stop` once when the process is told to stop; end it when its parent has died.

    Runs until then, in the main thread of a server process.
    """
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    parent = multiprocessing.parent_process()
    if parent is not None:
        loop.add_reader(parent.sentinel, end_process, 1)
    event = worker_arguments().get("shutdown_event")
    with _chained_signals(loop, stopped):
        while not (stopped.is_set() or (event is not None and event.is_set())):
            await _wait(stopped, POLL_SECONDS if event is not None else None)
    on_stop()
    if parent is not None:  # nothing else would end a worker that only got the signal
        loop.call_later(grace_seconds + 2.0, end_process, 0)


async def _wait(stopped: asyncio.Event, seconds: float | None) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stopped.wait()
    except TimeoutError:
        pass


@contextmanager
def _chained_signals(loop: asyncio.AbstractEventLoop, stopped: asyncio.Event) -> Iterator[None]:
    """Hear SIGTERM and SIGINT beside whoever hears them now."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if is_main}

    def hear(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stopped.set)
        heard = before[signal.Signals(number)]
        if callable(heard):
            heard(number, frame)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
