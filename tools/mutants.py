"""The mutants: each breaks a running app in one known way, on which a gate has to fail.

They stand outside the product, which has no switch for any of this; tools/mutant_app.py serves them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

Json = dict[str, Any]
Events = AsyncIterator[Json | None]  # None is [DONE]

HEADER = "x-mutant"
RELEASE_PATH = "/x-mutant/release"
SLOW_SECONDS = 0.01
BURST = 8  # events
STALL = range(3, 40)  # events held until the next one, by number: most of a 64-token stream


async def _unchanged(events: Events, body: Json) -> Events:
    async for event in events:
        yield event


@dataclass(frozen=True)
class Mutant:
    """What is done to a request's body, to a stream's events and to a whole response.

    `events` and `reply` get the body as the client sent it. `leaving` is what becomes of a client's
    disconnect: "told" to the app, told "late", "swallowed", or "shared" by all other requests of this mutant.
    """

    request: Callable[[Json], Json] = lambda body: body
    events: Callable[[Events, Json], Events] = _unchanged
    reply: Callable[[Json, Json], Json] = lambda payload, body: payload
    leaving: Literal["told", "late", "swallowed", "shared"] = "told"


# What an event or a response says


def _choice(payload: Json | None) -> Json:
    choices = (payload or {}).get("choices") or [{}]
    found: Json = choices[0]
    return found


def _spoken(choice: Json) -> tuple[Json, str]:
    """Where a choice's text stands: (object, key)."""
    for part in ("delta", "message"):
        if part in choice:
            return choice[part], "content"
    return choice, "text"


def _text(payload: Json | None) -> str:
    place, key = _spoken(_choice(payload))
    return place.get(key) or ""


def _with_text(payload: Json, text: str) -> Json:
    place, key = _spoken(_choice(payload))
    place[key] = text
    return payload


def _change_text(change: Callable[[str], str]) -> Callable[[Json, Json], Json]:
    def changed(payload: Json, body: Json) -> Json:
        return _with_text(payload, change(_text(payload))) if _text(payload) else payload

    return changed


def _other_first_id(payload: Json, body: Json) -> Json:
    ids = _choice(payload).get("token_ids")
    if ids:
        ids[0] ^= 1
    return payload


def _with_finish(payload: Json, reason: str) -> Json:
    choice = _choice(payload)
    if choice.get("finish_reason") is not None:
        choice["finish_reason"] = reason
    return payload


def _each(change: Callable[[Json, Json], Json]) -> Callable[[Events, Json], Events]:
    """The same change to each event that a response in one piece gets."""

    async def changed(events: Events, body: Json) -> Events:
        async for event in events:
            yield event if event is None else change(event, body)

    return changed


# Streams that come at the wrong time


async def _buffered(events: Events, body: Json) -> Events:
    for event in [event async for event in events]:
        yield event


async def _replayed(events: Events, body: Json) -> Events:
    for event in [event async for event in events]:
        await asyncio.sleep(0.002)
        yield event


async def _first_token_only(events: Events, body: Json) -> Events:
    async for event in events:
        yield event
        if _text(event):
            break
    async for event in _buffered(events, body):
        yield event


async def _bursts(events: Events, body: Json) -> Events:
    kept: list[Json | None] = []
    async for event in events:
        kept.append(event)
        if len(kept) == BURST or event is None:
            for one in kept:
                yield one
            kept = []


async def _stalls(events: Events, body: Json) -> Events:
    kept: list[Json | None] = []
    numbers = count(1)
    async for event in events:
        kept.append(event)
        if event is None or next(numbers) not in STALL:
            for one in kept:
                yield one
            kept = []


def _often(change: Callable[[Events, Json], Events]) -> Callable[[Events, Json], Events]:
    """The change to three streams of five, by seed: a gate gives its rounds the seeds from 0 on."""
    return lambda events, body: (change if body.get("seed", 0) % 5 in (0, 2, 4) else _unchanged)(events, body)


async def _slow(events: Events, body: Json) -> Events:
    async for event in events:
        await asyncio.sleep(SLOW_SECONDS)
        yield event


_one_at_a_time = asyncio.Lock()


async def _serialised(events: Events, body: Json) -> Events:
    async with _one_at_a_time:
        async for event in events:
            yield event


# Streams that carry the wrong things


async def _lost_done(events: Events, body: Json) -> Events:
    async for event in events:
        if event is not None:
            yield event


async def _lost_finish(events: Events, body: Json) -> Events:
    async for event in events:
        if _choice(event).get("finish_reason") is None:
            yield event


async def _third_token(events: Events, copies: int) -> Events:
    tokens = count(1)
    async for event in events:
        for _ in range(copies if _text(event) and next(tokens) == 3 else 1):
            yield event


def _lost_token(events: Events, body: Json) -> Events:
    return _third_token(events, 0)


def _extra_token(events: Events, body: Json) -> Events:
    return _third_token(events, 2)


async def _merged_tokens(events: Events, body: Json) -> Events:
    first: Json | None = None
    async for event in events:
        if event is not None and _text(event) and first is None:
            first = event
            continue
        if first is not None and event is not None and _text(event):
            ids = _choice(first).get("token_ids", []) + _choice(event).get("token_ids", [])
            _choice(event)["token_ids"] = ids
            yield _with_text(event, _text(first) + _text(event))
        else:
            if first is not None:
                yield first
            yield event
        first = None


_live: set[int] = set()
_numbers = count()


async def _neighbours_leak(events: Events, body: Json) -> Events:
    number = next(_numbers)
    _live.add(number)
    async for event in events:
        if event is None:
            _live.discard(number)
        yield event if event is None or len(_live) < 2 or not _text(event) else _with_text(event, "~")
    _live.discard(number)


async def _finish_by_count(events: Events, body: Json) -> Events:
    tokens = 0
    async for event in events:
        tokens += len(_choice(event).get("token_ids") or ())
        full = event is not None and tokens == body.get("max_tokens")
        yield _with_finish(event, "length") if event is not None and full else event


def _reply_finish_by_count(payload: Json, body: Json) -> Json:
    full = payload["usage"]["completion_tokens"] == body.get("max_tokens")
    return _with_finish(payload, "length") if full else payload


# Stop strings


def _without(name: str) -> Callable[[Json], Json]:
    return lambda body: {key: value for key, value in body.items() if key != name}


def _cut(text: str, stops: list[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _reply_cut(payload: Json, body: Json) -> Json:
    return _with_finish(_with_text(payload, _cut(_text(payload), body.get("stop") or [])), "stop")


async def _stop_filters_text(events: Events, body: Json) -> Events:
    """Cuts the text at the stop string while the app goes on to generate."""
    stops = body.get("stop") or []
    held = max(map(len, stops), default=1) - 1  # characters that may be the start of a stop string
    told = whole = ""
    async for event in events:
        whole += _text(event)
        cut = _cut(whole, stops)
        ready = cut if cut != whole else whole[: len(whole) - held]
        if event is None or not _text(event):
            yield event if event is None else _with_finish(event, "stop")
        elif len(ready) > len(told):
            yield _with_text(event, ready[len(told) :])
            told = ready


async def _stop_answers_early(events: Events, body: Json) -> Events:
    """Ends the stream at the stop string while the app goes on to generate."""
    whole = ""
    async for event in events:
        whole += _text(event)
        if event is not None and _cut(whole, body.get("stop") or []) != whole:
            delta: Json = {"index": 0, "delta": {}, "finish_reason": "stop"}
            yield {**event, "choices": [delta]}
            yield None
            return
        yield event


def _says_length(payload: Json, body: Json) -> Json:
    return _with_finish(payload, "length")


def _says_stop(payload: Json, body: Json) -> Json:
    return _with_finish(payload, "stop")


def _lose_the_last_id(payload: Json, body: Json) -> Json:
    del _choice(payload)["token_ids"][-1:]
    return payload


def _other_id_for_odd_prompts(payload: Json, body: Json) -> Json:
    return _other_first_id(payload, body) if len(body.get("prompt") or ()) % 2 else payload


_only_ascii = _change_text(lambda text: re.sub(r"[^\x00-\x7f]", "?", text))

MUTANTS: dict[str, Mutant] = {
    "buffered": Mutant(events=_buffered),
    "replayed": Mutant(events=_replayed),
    "first_token_only": Mutant(events=_first_token_only),
    "bursts": Mutant(events=_bursts),
    "often_bursts": Mutant(events=_often(_bursts)),
    "often_stalls": Mutant(events=_often(_stalls)),
    "slow": Mutant(events=_slow),
    "serialised": Mutant(events=_serialised),
    "lost_done": Mutant(events=_lost_done),
    "lost_finish": Mutant(events=_lost_finish),
    "lost_token": Mutant(events=_lost_token),
    "extra_token": Mutant(events=_extra_token),
    "merged_tokens": Mutant(events=_merged_tokens),
    "whole_as_stream": Mutant(request=lambda body: {**body, "stream": True}),
    "whole_loses_an_id": Mutant(reply=_lose_the_last_id),
    "whole_has_other_ids": Mutant(reply=_other_first_id),
    "whole_text_cut": Mutant(reply=_change_text(lambda text: text[:-1])),
    "dropped_spaces": Mutant(events=_each(_change_text(lambda text: text.lstrip(" ")))),
    "replacement_characters": Mutant(
        events=_each(_change_text(lambda text: re.sub(r"[^\x00-\x7f]", "\ufffd", text)))
    ),
    "only_ascii": Mutant(events=_each(_only_ascii), reply=_only_ascii),
    "finish_always_stop": Mutant(events=_each(_says_stop), reply=_says_stop),
    "finish_always_length": Mutant(events=_each(_says_length), reply=_says_length),
    "finish_by_count": Mutant(events=_finish_by_count, reply=_reply_finish_by_count),
    "late_disconnect": Mutant(leaving="late"),
    "swallowed_disconnect": Mutant(leaving="swallowed"),
    "shared_disconnect": Mutant(leaving="shared"),
    "stop_ignored": Mutant(request=_without("stop")),
    "stop_filters_text": Mutant(request=_without("stop"), events=_stop_filters_text, reply=_reply_cut),
    "stop_answers_early": Mutant(
        request=_without("stop"), events=_stop_answers_early, reply=_reply_cut, leaving="swallowed"
    ),
    "seed_ignored": Mutant(request=_without("seed")),
    "seed_always_1": Mutant(request=lambda body: {**body, "seed": 1}),
    "neighbours_leak": Mutant(events=_neighbours_leak),
    "cached_ids_differ": Mutant(reply=_other_id_for_odd_prompts),
}
