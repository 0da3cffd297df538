"""The server that is measured: where it is, what it can do beyond the OpenAI API, and prompts for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tools.client import Ask, Client, Json, ProtocolError, Reply, ServerError
from tools.vocabulary import Vocabulary

QWEN_END_IDS = (151645, 151643)  # <|im_end|>, <|endoftext|>
WORDS = (
    "river",
    "stone",
    "light",
    "over",
    "green",
    "cloud",
    "seven",
    "paper",
    "walk",
    "north",
    "quiet",
    "bread",
)
Prompt = str | list[int]

NEEDS = {
    "return_token_ids": "return_token_ids (vLLM's field): choices and chunks carry every counted id",
    "ignore_eos": "ignore_eos: generation goes on to max_tokens",
    "end_token_id": "an end token that logit_bias can force, counted in completion_tokens",
    "token_id_prompts": "/v1/completions with a prompt of token ids",
    "health": "/health with running, waiting, free_pages and total_pages",
}


@dataclass(frozen=True)
class Health:
    """What /health counts: requests running and waiting, cache pages free and in all."""

    running: int
    waiting: int
    free_pages: int
    total_pages: int

    @property
    def idle(self) -> bool:
        return (self.running, self.waiting, self.free_pages) == (0, 0, self.total_pages)

    def __str__(self) -> str:
        pages = f"{self.free_pages} of {self.total_pages} pages free"
        return f"{self.running} running, {self.waiting} waiting, {pages}"


@dataclass(frozen=True)
class Target:
    """A running server. `lacks` says, for each missing entry of NEEDS, what was seen instead.

    `speed` names the row of V1_003's thresholds that applies; `tokens_per_word` is measured;
    `context_length` is huge where the server does not tell.
    """

    client: Client
    model: str = "default"
    speed: str = "other"
    vocabulary: Vocabulary | None = None
    end_token_id: int | None = None
    tokens_per_word: float = 1.5
    context_length: int = 1 << 20
    lacks: Mapping[str, str] = field(default_factory=dict)

    def ask(self, prompt: Prompt, *, stream: bool, to_limit: bool = False, **fields: Any) -> Ask:
        """A request for `prompt`: a text is one chat message, token ids are a completion's prompt.

        `to_limit` asks the server to go on past end tokens, where it can.
        """
        spoken = isinstance(prompt, str)
        body: Json = {"model": self.model, "stream": stream, **fields}
        body |= {"messages": [{"role": "user", "content": prompt}]} if spoken else {"prompt": prompt}
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        body |= {"return_token_ids": True} if "return_token_ids" not in self.lacks else {}
        body |= {"ignore_eos": True} if to_limit and "ignore_eos" not in self.lacks else {}
        return Ask("/v1/chat/completions" if spoken else "/v1/completions", body)

    def room(self, prompt_tokens: int) -> int:
        """The most tokens that may safely be asked for after a text of about `prompt_tokens`."""
        return max(1, self.context_length - 32 - round(1.1 * prompt_tokens))

    def text_of(self, num_tokens: int, salt: int = 0) -> str:
        """Words that come to about `num_tokens` tokens; another `salt` gives other words."""
        count = max(2, round(num_tokens / self.tokens_per_word))
        return " ".join(random.Random(salt).choices(WORDS, k=count))

    async def health(self) -> Health:
        """/health now. Raises ServerError or ProtocolError where there is no such thing."""
        found = await self.client.get("/health")
        try:
            return Health(*(int(found[name]) for name in Health.__dataclass_fields__))
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"/health has no {error}") from error

    async def idle(self, seconds: float) -> Health:
        """The first /health that is idle, or the last one seen after `seconds`."""
        clock = asyncio.get_running_loop()
        until = clock.time() + seconds
        while True:
            health = await self.health()
            if health.idle or clock.time() > until:
                return health
            await asyncio.sleep(0.01)


async def probe(client: Client, *, speed: str, vocabulary: Vocabulary | None) -> Target:
    """Ask the running server what it can do, each thing by one or two short requests."""
    blank = Target(client, speed=speed, vocabulary=vocabulary, lacks=dict.fromkeys(NEEDS, "not probed"))
    named = await _named(blank)
    target = replace(named, tokens_per_word=await _tokens_per_word(named))
    for need, check in PROBES.items():
        lacks = {name: reason for name, reason in target.lacks.items() if name != need}
        trying = replace(target, lacks=lacks)
        try:
            target = await check(trying)
        except (ServerError, ProtocolError, _Lacking) as error:
            target = replace(trying, lacks={**lacks, need: str(error)})
    return target


class _Lacking(Exception):
    pass


def _expect(found: bool, otherwise: str) -> None:
    if not found:
        raise _Lacking(otherwise)


async def _named(target: Target) -> Target:
    """With the first model that /v1/models lists, and its max_model_len (vLLM's field)."""
    try:
        card = (await target.client.get("/v1/models"))["data"][0]
        length = int(card.get("max_model_len") or target.context_length)
        return replace(target, model=str(card["id"]), context_length=length)
    except (ServerError, ProtocolError, KeyError, IndexError):
        return target


async def _tokens_per_word(target: Target) -> float:
    """How many tokens a word of WORDS is, from the usage of a short and a longer prompt."""
    counts = []
    for words in (16, 80):
        reply = await _short(target, " ".join(random.Random(words).choices(WORDS, k=words)))
        counts.append(reply.prompt_tokens or 0)
    return max(0.5, (counts[1] - counts[0]) / 64)


async def _short(target: Target, prompt: Prompt, *, to_limit: bool = False, **fields: Any) -> Reply:
    asked = {"max_tokens": 4, "temperature": 0, **fields}
    return await target.client.complete(target.ask(prompt, stream=False, to_limit=to_limit, **asked))


async def _probe_token_ids(target: Target) -> Target:
    reply = await _short(target, "Say yes.")
    same = len(reply.token_ids) == reply.completion_tokens
    _expect(same, f"{len(reply.token_ids)} ids came for {reply.completion_tokens} completion_tokens")
    record = await target.client.stream(target.ask("Say yes.", stream=True, max_tokens=4, temperature=0))
    _expect(bool(record.token_ids), "no ids came in the stream")
    return target


async def _probe_end_token(target: Target) -> Target:
    known = target.vocabulary.end_token_id if target.vocabulary else None
    for token_id in QWEN_END_IDS if known is None else (known,):
        if await _ends(target, token_id):
            return replace(target, end_token_id=token_id)
    for seed in range(4):
        reply = await _short(target, "Say yes.", max_tokens=192, temperature=1, seed=seed)
        if reply.finish_reason == "stop" and reply.token_ids and await _ends(target, reply.token_ids[-1]):
            return replace(target, end_token_id=reply.token_ids[-1])
    raise _Lacking("neither a known end id nor the last id of a text, forced by logit_bias, ended a text")


async def _ends(target: Target, token_id: int) -> bool:
    """Whether this id, forced, ends a text as its one counted token."""
    try:
        reply = await _short(target, "Say yes.", logit_bias={str(token_id): 100})
    except ServerError:
        return False
    return (reply.finish_reason, reply.completion_tokens) == ("stop", 1)


async def _probe_ignore_eos(target: Target) -> Target:
    bias = {} if target.end_token_id is None else {"logit_bias": {str(target.end_token_id): 100}}
    tokens = 3 if bias else 192
    reply = await _short(target, "Say yes.", to_limit=True, max_tokens=tokens, **bias)
    _expect(reply.completion_tokens == tokens, f"{reply.completion_tokens} of {tokens} tokens came")
    return target


async def _probe_token_id_prompts(target: Target) -> Target:
    reply = await _short(target, [1, 2, 3])
    _expect(reply.prompt_tokens in (3, 4), f"a prompt of 3 ids counted as {reply.prompt_tokens}")
    return target


async def _probe_health(target: Target) -> Target:
    health = await target.idle(seconds=30)
    _expect(health.idle, f"the server is at work for somebody else: {health}")
    return target


PROBES: dict[str, Callable[[Target], Awaitable[Target]]] = {
    "return_token_ids": _probe_token_ids,
    "end_token_id": _probe_end_token,
    "ignore_eos": _probe_ignore_eos,
    "token_id_prompts": _probe_token_id_prompts,
    "health": _probe_health,
}
