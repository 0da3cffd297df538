"""The model behind the server: loaded in a thread, while /health says how far it is."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final, Literal

from jaxmoe import LLM, EngineStopped, PhaseBars, demo_model, keep_command_buffers
from server.errors import LOG, Failure
from server.settings import Settings

Progress = Callable[[str, float], None]
Load = Callable[[Settings, Progress], LLM]

GIVE_UP_SECONDS: Final = 2.0


def load_llm(settings: Settings, progress: Progress) -> LLM:
    """Load the model that the settings name, or else the embedded one."""
    path = settings.model or demo_model()
    if settings.model is None:
        LOG.info("no model is named (jaxmoe serve MODEL.gguf, or JAXMOE_MODEL): serving the demo model")
    if settings.profile_dir is not None:
        keep_command_buffers()
    llm = LLM(path, settings.engine, progress)
    _freeze_garbage_collector()
    return llm


def _freeze_garbage_collector() -> None:
    """Leave out of every later collection what is there now, JAX and the model: 230,000 objects.

    Looking through them stops every stream for 150 ms or more, each time some tens of thousands are new.
    """
    gc.collect()
    gc.freeze()


class Backend:
    """A model that is loading, served, stopping, or could not be loaded."""

    def __init__(self, load: Load) -> None:
        self.status: Literal["loading", "ok", "stopping", "error"] = "loading"
        self.phase = "starting"
        self.progress = 0.0
        self.error: str | None = None
        self._load = load
        self._url: str | None = None
        self._bars = PhaseBars(LOG.info)
        self._llm: LLM | None = None
        self._thread: threading.Thread | None = None

    @property
    def llm(self) -> LLM:
        """The model; raises Failure 503 while there is none to serve."""
        if self.status == "ok" and self._llm is not None:
            return self._llm
        message = {
            "stopping": "the server is shutting down",
            "error": f"the server failed: {self.error}",
        }.get(self.status, f"the model is not ready: {self.phase}, {self.progress:.0%}")
        raise Failure(503, message, code="not_ready", headers={"Retry-After": "2"})

    def start(self, settings: Settings, on_failure: Callable[[], None]) -> None:
        """Load in a thread; `on_failure` is called on the event loop when that fails, or the engine later."""
        loop = asyncio.get_running_loop()
        self._url = settings.url

        def call_soon(call: Callable[[], None]) -> None:
            with suppress(RuntimeError):  # the loop is closed: the process ends anyway
                loop.call_soon_threadsafe(call)

        def notice() -> None:
            if self.status == "ok":
                self.fail(EngineStopped("the engine has stopped"))
                on_failure()

        def load() -> None:
            try:
                self._take(self._load(settings, self._report), lambda: call_soon(notice))
            except _GivenUp:
                return
            except Exception as error:
                self.fail(error)
                call_soon(on_failure)

        self._thread = threading.Thread(target=load, name="jaxmoe-load", daemon=True)
        self._thread.start()

    def fail(self, error: Exception) -> None:
        """Nothing can be served any more; an error of the program itself is logged with its trace."""
        self._bars.close()
        is_ours = not isinstance(error, ValueError | OSError)
        self.status, self.error = "error", str(error) or type(error).__name__
        LOG.error("the server failed: %s", self.error, exc_info=error if is_ours else None)

    def stop(self) -> None:
        """Take no more requests and give up loading."""
        if self.status in ("loading", "ok"):
            self.status = "stopping"

    def close(self) -> None:
        """Stop loading and the engine; blocks until their threads have ended, or ends the process."""
        self.stop()
        if self._thread is not None:
            self._thread.join(GIVE_UP_SECONDS)
        is_loading = self._thread is not None and self._thread.is_alive()
        if is_loading or not (self._llm is None or self._llm.close()):
            # Python's own end would abort under a thread that is inside XLA.
            LOG.warning("ending while the model is %s", "loading" if is_loading else "busy")
            os._exit(0)

    def health(self) -> dict[str, Any]:
        """The body of GET /health."""
        stats = {"running": 0, "waiting": 0, "free_pages": 0, "total_pages": 0}
        if self._llm is not None:
            stats = asdict(self._llm.stats())
        error = {} if self.error is None else {"error": self.error}
        return {"status": self.status, "phase": self.phase, "progress": self.progress, **stats, **error}

    def _take(self, llm: LLM, on_stopped: Callable[[], None]) -> None:
        self._llm = llm
        if self.status == "loading":
            self.status, self.phase, self.progress = "ok", "ready", 1.0
            LOG.info("serving %s%s", llm.model_id, f": chat at {self._url}" if self._url else "")
            llm.when_stopped(on_stopped)
        else:
            llm.close()

    def _report(self, phase: str, progress: float) -> None:
        if self.status != "loading":
            raise _GivenUp
        self._bars(phase, progress)
        self.phase, self.progress = phase, round(progress, 4)


class _GivenUp(Exception):
    """The server stops while its model loads."""
