"""The endpoints: a checked body in, a generation's events out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from quart import Quart, Response, request

from jaxmoe import LLM, Event, Generation, RequestError, SamplingParams
from server.backend import Backend
from server.errors import Failure
from server.profiler import Recording, read_seconds
from server.replies import ChatReply, CompletionReply, Reply, check_event, to_json
from server.schema import Body, read_chat, read_completion
from server.settings import Settings
from server.sse import CONTENT_TYPE, stream


class Cancellable(Protocol):
    """What a request has begun; it can be ended from any thread, any number of times."""

    def cancel(self, reason: str = ...) -> None:
        """End it soon."""


@dataclass(eq=False)
class Call:
    """One HTTP request: its id and what must not outlive it."""

    request_id: str
    cancelled: str | None = None
    under_way: list[Cancellable] = field(default_factory=list)

    def add(self, begun: Cancellable) -> None:
        """Take what has begun, which ends at once if the request has been cancelled before."""
        self.under_way.append(begun)
        if self.cancelled is not None:
            begun.cancel(self.cancelled)

    def cancel(self, reason: str = "the client has left") -> None:
        """End what still runs, and what is added from now on."""
        self.cancelled = reason
        for begun in self.under_way:
            begun.cancel(reason)


@dataclass
class Service:
    """What the app holds: settings, the model, and the requests under way."""

    settings: Settings
    backend: Backend
    calls: set[Call] = field(default_factory=set)


def json_response(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(to_json(body), status, headers, content_type="application/json")


def add_routes(app: Quart, service: Service) -> None:
    """Add every endpoint to the app."""

    @app.get("/health")
    async def health() -> Response:
        body = service.backend.health()
        return json_response(body, 200 if body["status"] == "ok" else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/<path:model_id>")
    async def model(model_id: str) -> Response:
        card = _model(service)
        if model_id != card["id"]:
            raise Failure(404, f"the model {model_id!r} is not served here", code="model_not_found")
        return json_response(card)

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        return await _generate(service, read_chat, ChatReply)

    @app.post("/v1/completions")
    async def completions() -> Response:
        return await _generate(service, read_completion, CompletionReply)

    @app.post("/debug/profile")
    async def profile() -> Response:
        return json_response(await _record(service))


def _model(service: Service) -> dict[str, Any]:
    llm = service.backend.llm
    return {
        "id": service.settings.model_id or llm.model_id,
        "object": "model",
        "created": llm.created,
        "owned_by": "jaxmoe",
        "max_model_len": llm.context_length,
    }


def current_call() -> Call:
    """The call that the request of this task is."""
    call: Call = request.scope["jaxmoe.call"]  # type: ignore[typeddict-item]
    return call


async def _generate(service: Service, read: Callable[[bytes], Body], reply_class: type[Reply]) -> Response:
    llm = service.backend.llm
    _check_content_type()
    raw = await request.get_data(cache=False, as_text=False, parse_form_data=False)
    # Parsing and tokenising a large body takes long enough to hold up every stream.
    body, params, prompt_ids = await asyncio.to_thread(_prepare, service, llm, read, raw)
    call = current_call()
    generation = _submit(llm, body, params, prompt_ids)
    call.add(generation)
    reply = reply_class(
        body,
        generation,
        llm,
        request_id=call.request_id,
        created=int(time.time()),
        model=service.settings.model_id or llm.model_id,
    )
    if body.stream:
        return await _streamed(generation, reply, service.settings.ping_seconds)
    return json_response(reply.whole(await _all_events(generation)))


async def _record(service: Service) -> dict[str, Any]:
    directory = service.settings.profile_dir
    if directory is None:
        raise Failure(404, "no traces are taken here: see JAXMOE_PROFILE_DIR")
    _ = service.backend.llm  # without a model there is nothing to see
    recording = Recording(read_seconds(request.args))
    current_call().add(recording)
    return await asyncio.to_thread(recording.take, directory)


def _check_content_type() -> None:
    charset = request.mimetype_params.get("charset", "utf-8").lower()
    if request.mimetype not in ("", "application/json") or charset not in ("utf-8", "utf8"):
        given = request.headers.get("Content-Type", "")[:80]
        raise Failure(415, f"the body must be application/json in UTF-8, got {given!r}")


def _prepare(
    service: Service, llm: LLM, read: Callable[[bytes], Body], raw: bytes
) -> tuple[Body, SamplingParams, list[int]]:
    body = read(raw)
    params = body.params({**llm.sampling_defaults, **service.settings.sampling})
    return body, params, _prompt_ids(llm, body)


def _prompt_ids(llm: LLM, body: Body) -> list[int]:
    if body.messages is not None:
        return llm.encode_chat(body.messages, enable_thinking=body.enable_thinking)
    return llm.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt


def _submit(llm: LLM, body: Body, params: SamplingParams, prompt_ids: list[int]) -> Generation:
    try:
        return llm.submit(prompt_ids, params, loop=asyncio.get_running_loop(), n=body.n)
    except RequestError as error:
        raise body.renamed(error) from None


async def _streamed(generation: Generation, reply: Reply, ping_seconds: float) -> Response:
    # Until the first token or the first ping an error still is a status of its own.
    first = await generation.next_events(ping_seconds or None)
    for event in first[:1]:
        check_event(event)
    body = stream(generation, reply, first, ping_seconds=ping_seconds)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = Response(body, 200, headers, content_type=CONTENT_TYPE)
    response.timeout = None  # Quart would end the stream after 60 seconds
    return response


async def _all_events(generation: Generation) -> list[Event]:
    events: list[Event] = []
    while not generation.finished:
        events += await generation.next_events()
    return events
