"""POST /debug/profile: a trace of the running server, for an operator who has named a directory for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from jaxmoe import RequestError, profile
from server.errors import LOG, Failure

MIN_SECONDS: Final = 1.0
MAX_SECONDS: Final = 60.0
DEFAULT_SECONDS: Final = "3"
HOW_TO_OPEN: Final = (
    "open *.trace.json.gz at https://ui.perfetto.dev, or run `pip install xprof && xprof --port 8791 {}`"
)
_BUSY: Final = threading.Lock()  # JAX has one profiler a process


def read_seconds(arguments: Mapping[str, str]) -> float:
    """How long a trace is asked to be, from the URL's query; raises RequestError."""
    given = arguments.get("seconds", DEFAULT_SECONDS)
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        message = f"seconds must be a number from {MIN_SECONDS:g} to {MAX_SECONDS:g}, got {given[:40]!r}"
        raise RequestError(message, param="seconds")
    return seconds


class Recording:
    """One trace of `seconds`; it ends early, and is written, when its request is cancelled."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ended = threading.Event()

    def cancel(self, reason: str = "cancelled") -> None:
        """End it now; safe from any thread, any number of times."""
        self._ended.set()

    def take(self, root: Path) -> dict[str, Any]:
        """Trace into a new directory below `root` and say what is in it; blocks meanwhile.

        Raises Failure 409 while another trace is taken or written, 500 where `root` cannot be written.
        """
        if not _BUSY.acquire(blocking=False):
            raise Failure(409, "a trace is being taken: one at a time", code="profile_running")
        try:
            return self._take(root / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%fZ"))
        except OSError as error:
            raise Failure(500, f"the trace cannot be written: {error.strerror}") from error
        finally:
            _BUSY.release()

    def _take(self, directory: Path) -> dict[str, Any]:
        with profile(directory):
            started = time.perf_counter()
            self._ended.wait(self._seconds)
            seconds = time.perf_counter() - started
        LOG.info("a trace of %.1f s lies in %s", seconds, directory)
        return {
            "directory": str(directory),
            "files": sorted(str(path.relative_to(directory)) for path in directory.rglob("*.*")),
            "seconds": round(seconds, 3),
            "how_to_open": HOW_TO_OPEN.format(directory),
        }
