"""A small OpenAI-compatible app with nothing of jaxmoe in it, for the tests of tools.discharge.

Ids are a hash of all ids before them and of the seed. Slots, a queue, pages, prefill chunks and decode
steps are counted and take time, so that every gate has something to measure. With FAKE_PLAIN in the
environment it knows nothing beyond the OpenAI API.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

STEP_SECONDS, CHUNK_SECONDS = 0.002, 0.01
SLOTS, PAGES, PAGE_LENGTH, CHUNK_LENGTH, CONTEXT = 6, 800, 64, 512, 4096
WORDS = (
    " the",
    " rain",
    " came",
    " garden",
    " lamp",
    "ing",
    "ed",
    "\n",
    "  x",
    "中",
    "你好",
    "日",
    "😀",
    " 🌍",
    "é",
)
PIECES = (*(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS), b"")
END = len(PIECES) - 1
PLAIN = "FAKE_PLAIN" in os.environ


@dataclass(eq=False)
class Job:
    prompt_ids: list[int]
    body: dict[str, Any]
    max_tokens: int
    seed: int
    state: int = 0
    chunks_left: int = 1
    tokens: int = 0
    times: list[float] = field(default_factory=list)
    out: asyncio.Queue[tuple[int, str | None]] = field(default_factory=asyncio.Queue)
    gone: bool = False

    @property
    def pages(self) -> int:
        return -(-(len(self.prompt_ids) + self.tokens) // PAGE_LENGTH)

    def next_id(self) -> int:
        drawn = crc32(str(self.seed).encode(), self.state)
        bias = {int(token_id): value for token_id, value in (self.body.get("logit_bias") or {}).items()}
        forced = [token_id for token_id, value in bias.items() if value == 100]
        if forced:
            return forced[drawn % len(forced)]
        likely = [token_id for token_id, value in bias.items() if drawn % 1000 < 10 * value]
        plain = 256 + drawn // 7 % len(WORDS) if drawn % 10 else drawn // 7 % 256
        return likely[0] if likely else plain

    def step(self) -> None:
        token_id = self.next_id()
        self.state = crc32(token_id.to_bytes(4, "little"), self.state)
        self.tokens += 1
        self.times.append(time.perf_counter())
        ended = token_id == END and (PLAIN or not self.body.get("ignore_eos"))
        self.gone = ended or self.tokens == self.max_tokens
        self.out.put_nowait((token_id, "stop" if ended else "length" if self.gone else None))


waiting: list[Job] = []
running: list[Job] = []
loops: list[asyncio.Task[None]] = []


async def engine() -> None:
    while True:
        running[:] = [job for job in running if not job.gone]
        waiting[:] = [job for job in waiting if not job.gone]
        while waiting and len(running) < SLOTS:
            running.append(waiting.pop(0))
        prefilling = next((job for job in running if job.chunks_left), None)
        await asyncio.sleep(CHUNK_SECONDS if prefilling else STEP_SECONDS)
        for job in running:
            if not job.chunks_left and not job.gone:
                job.step()
        if prefilling:
            prefilling.chunks_left -= 1


def submit(body: dict[str, Any]) -> Job:
    if "messages" in body:
        words = body["messages"][0]["content"].split()
        prompt_ids = [0, 1, 2, *(crc32(word.encode()) % END for word in words)]
    else:
        prompt_ids = body["prompt"]
        if PLAIN:
            raise ValueError("prompt must be a string")
    if any(int(token_id) >= len(PIECES) for token_id in body.get("logit_bias") or ()):
        raise ValueError("logit_bias names a token that is not there")
    left = CONTEXT - len(prompt_ids)
    if left < (body.get("max_tokens") or 1):
        raise ValueError(f"{len(prompt_ids)} tokens leave no room for {body.get('max_tokens')}")
    seed = body["seed"] if body.get("seed") is not None else random.randrange(1 << 30)
    job = Job(prompt_ids, body, body.get("max_tokens") or left, seed if body.get("temperature", 1) else 0)
    for token_id in prompt_ids:
        job.state = crc32(token_id.to_bytes(4, "little"), job.state)
    job.chunks_left = -(-len(prompt_ids) // CHUNK_LENGTH)
    waiting.append(job)
    return job


async def pieces(job: Job) -> AsyncIterator[tuple[str, list[int], str | None]]:
    """(text, ids, finish_reason): text that is complete and cannot be part of a stop string."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    stops = [job.body["stop"]] if isinstance(job.body.get("stop"), str) else job.body.get("stop") or []
    held, ids, reason = "", [], None
    while reason is None:
        token_id, reason = await job.out.get()
        ids.append(token_id)
        held += decoder.decode(PIECES[token_id], final=reason is not None)
        found = [held.find(stop) for stop in stops if stop in held]
        if found:
            held, reason, job.gone = held[: min(found)], "stop", True
        starts = (
            [] if reason else [n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])]
        )
        keep = max(starts, default=0)
        text, held = held[: len(held) - keep], held[len(held) - keep :]
        if text:
            yield text, ids, None
            ids = []
    yield "", ids, reason


async def watch(receive: Any, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.gone = True


def ending(job: Job, tokens: int) -> dict[str, Any]:
    usage = {"prompt_tokens": len(job.prompt_ids), "completion_tokens": tokens}
    spent = 1000 * (job.times[-1] - job.times[0])
    timings = {} if PLAIN else {"timings": {"predicted_n": job.tokens, "predicted_ms": spent}}
    return {"usage": usage, **timings}


def choice(job: Job, part: str, text: str | None, ids: list[int], reason: str | None) -> dict[str, Any]:
    spoken: dict[str, Any] = {"text": text or ""}
    if "messages" in job.body:
        spoken = {part: {} if text is None else {"content": text}}
    return {"index": 0, **spoken, **({} if PLAIN else {"token_ids": ids}), "finish_reason": reason}


async def stream(job: Job, send: Any) -> None:
    async def event(payload: str) -> None:
        await send({"type": "http.response.body", "body": f"data: {payload}\n\n".encode(), "more_body": True})

    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await event(json.dumps({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]}))
    tokens = 0
    async for text, ids, reason in pieces(job):
        tokens += len(ids)
        await event(json.dumps({"choices": [choice(job, "delta", text or None, ids, reason)]}))
    await event(json.dumps({"choices": [], **ending(job, tokens)}))
    await event("[DONE]")
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def whole(job: Job, send: Any) -> None:
    found = [piece async for piece in pieces(job)]
    ids = [token_id for _, some, _ in found for token_id in some]
    said = choice(job, "message", "".join(text for text, _, _ in found), ids, found[-1][2])
    await answer(send, 200, {"choices": [said], **ending(job, len(ids))})


async def answer(send: Any, status: int, payload: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(payload).encode(), "more_body": False})


def get(path: str) -> dict[str, Any]:
    if path == "/v1/models":
        return {"data": [{"id": "fake", "max_model_len": CONTEXT}]}
    used = sum(job.pages for job in running if not job.gone)
    active = sum(not job.gone for job in running)
    queued = sum(not job.gone for job in waiting)
    pages = {"free_pages": PAGES - used, "total_pages": PAGES}
    return {"status": "ok", "running": active, "waiting": queued, **pages}


async def lifespan(receive: Any, send: Any) -> None:
    for kind in ("startup", "shutdown"):
        await receive()
        if kind == "startup":
            loops.append(asyncio.create_task(engine()))
        await send({"type": f"lifespan.{kind}.complete"})


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["method"] == "GET":
        found = get(scope["path"])
        await answer(send, 200, {"status": "ok"} if PLAIN and "running" in found else found)
    else:
        await post(receive, send)


async def post(receive: Any, send: Any) -> None:
    content, more = b"", True
    while more:
        message = await receive()
        content, more = content + message.get("body", b""), message.get("more_body", False)
    body = json.loads(content)
    try:
        job = submit(body)
    except ValueError as error:
        await answer(send, 400, {"error": {"message": str(error)}})
        return
    watching = asyncio.create_task(watch(receive, job))
    serving = asyncio.create_task((stream if body.get("stream") else whole)(job, send))
    await asyncio.wait((watching, serving), return_when=asyncio.FIRST_COMPLETED)
    job.gone = True
    watching.cancel()
    serving.cancel()
