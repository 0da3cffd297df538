"""The ASGI app: routes, errors, access, and what must happen around every request."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final
from uuid import uuid4

from quart import Quart, Response, request

from jaxmoe import printable
from server import lifetime
from server.access import check_access
from server.backend import Backend, Load, load_llm
from server.errors import LOG, failure_of
from server.page import add_page
from server.routes import Call, Service, add_routes, current_call, json_response
from server.schema import MAX_BODY_SIZE
from server.settings import SettingError, Settings, read_settings

# The engine's thread and the event loop take turns; Python's 5 ms would be most of a token's time.
# Measured at 64 streams, 32,000 tokens a second: 5 % of the steps come 0.6 ms late with 5 ms, 0.2 with this.
SWITCH_SECONDS: Final = 0.0005

Scope = dict[str, Any]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]


def create_app(settings: Settings | None = None, *, load: Load = load_llm) -> Quart:
    """The app; without `settings` they are read from the environment when it starts."""
    app = Quart("server", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_SIZE
    service = Service(settings or Settings(), Backend(load))
    add_routes(app, service)
    add_page(app)
    _add_checks(app, service)
    _add_start_and_stop(app, service, read=settings is None)
    app.asgi_app = _around_requests(app.asgi_app, service)  # type: ignore[assignment,method-assign]
    return app


def _add_checks(app: Quart, service: Service) -> None:
    @app.before_request
    async def check() -> None:
        check_access(request, service.settings)

    @app.errorhandler(Exception)
    async def answer_error(error: Exception) -> Response:
        failure = failure_of(error, current_call().request_id)
        return json_response(failure.body, failure.status, failure.headers)

    @app.after_request
    async def name_request(response: Response) -> Response:
        response.headers["X-Request-Id"] = current_call().request_id
        return response


def _add_start_and_stop(app: Quart, service: Service, *, read: bool) -> None:
    tasks: set[asyncio.Task[None]] = set()

    def stop() -> None:
        service.backend.stop()
        loop = asyncio.get_running_loop()
        loop.call_later(service.settings.grace_seconds, _end_calls, service)

    @app.before_serving
    async def start() -> None:
        _log_to_stderr()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            service.settings = read_settings(os.environ) if read else service.settings
            _check_workers()
        except SettingError as error:
            service.backend.fail(error)
            lifetime.stop_soon()
            return
        grace_seconds = service.settings.grace_seconds
        lifetime.raise_limits(grace_seconds)
        tasks.add(asyncio.create_task(lifetime.watch(stop, grace_seconds)))
        service.backend.start(service.settings, lifetime.stop_soon)

    @app.after_serving
    async def close() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.to_thread(service.backend.close)
        if service.backend.status == "error":
            asyncio.get_running_loop().call_soon(lifetime.end_process, 1)


def _check_workers() -> None:
    if lifetime.num_workers() > 1:
        raise SettingError("run one worker: each would load the model once more, and none would share it")


def _end_calls(service: Service) -> None:
    for call in tuple(service.calls):
        call.cancel("the server is shutting down")


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """The record's line; names that a file holds cannot act on the terminal that shows it."""
        return printable(super().format(record))


def _log_to_stderr() -> None:
    if LOG.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormatter("[%(asctime)s] %(levelname)s %(message)s"))
    for logger in (LOG, logging.getLogger("jaxmoe")):  # the engine says what runs its steps
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _around_requests(inner: App, service: Service) -> App:
    """The app with an end for every request: whatever happens inside, its generations end with it."""

    async def app(scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1000})
        if scope["type"] != "http":
            return await inner(scope, receive, send)
        call = Call(uuid4().hex)
        scope["jaxmoe.call"] = call
        service.calls.add(call)

        async def heard() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect":
                # Quart cancels its handler too, but Python 3.11's wait_for may swallow that.
                call.cancel()
            return message

        bounded = BoundedSend(send, service.settings)
        try:
            await inner(scope, heard, bounded)
        finally:
            # A generator that never started runs no `finally` of its own.
            call.cancel()
            service.calls.discard(call)
            bounded.close()

    return app


class BoundedSend:
    """A send that waits for a slow client, and gives up with TimeoutError on one that takes nothing.

    As asyncio.timeout around each message would, but with one timer for many messages: starting and
    stopping one for each token costs as much as its JSON.
    """

    def __init__(self, send: Send, settings: Settings) -> None:
        self._send = send
        self._settings = settings
        self._unsent_size = _unsent_size(send)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[Any] | None = None
        self._until = 0.0
        self._gave_up = False

    async def __call__(self, message: Any) -> None:
        self._until = self._loop.time() + self._settings.write_seconds
        self._sending = asyncio.current_task()
        if self._timer is None:
            self._timer = self._loop.call_at(self._until, self._look)
        try:
            await self._send(message)
            while self._unsent_size() > self._settings.write_size:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            gave_up, self._gave_up = self._gave_up, False
            if gave_up and self._sending is not None and self._sending.uncancel() == 0:
                raise TimeoutError from None
            raise
        finally:
            self._sending = None

    def close(self) -> None:
        """Leave nothing behind on the event loop."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._sending is None:
            return
        if self._loop.time() < self._until:
            self._timer = self._loop.call_at(self._until, self._look)
        else:
            self._gave_up = self._sending.cancel()


def _unsent_size(send: Any) -> Callable[[], int]:
    """Bytes that hypercorn holds for an HTTP/2 stream, whose own limit does not stop a writer.

    Not public: where it is not as expected there is no such limit.
    """
    try:
        http_stream = send.__self__
        held = http_stream.send.__self__.stream_buffers[http_stream.stream_id]
        return lambda: len(held.buffer)
    except (AttributeError, KeyError, TypeError):
        return lambda: 0
