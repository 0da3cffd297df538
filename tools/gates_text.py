"""Gates of qwen3-moe-serving-v1 about what is said: text, finish reasons, stop strings, seeds, cached ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, cycle, islice, takewhile
from typing import Any

from tools.client import Reply, StreamRecord
from tools.target import Prompt
from tools.trial import NotRun, Trial
from tools.vocabulary import Vocabulary

Fields = dict[str, Any]
KINDS: dict[str, Callable[[str], bool]] = {
    "spaces": lambda text: " " in text,
    "emoji": lambda text: any(ord(character) >= 0x1F300 for character in text),
    "CJK": lambda text: any(0x4E00 <= ord(character) <= 0x9FFF for character in text),
}
# One of each kind that a vocabulary may have in single bytes only.
SPELT = {"emoji": "\U0001f600", "CJK": "\u4e2d"}
MORE_TEXTS = 24
WRITE_ALL_KINDS = "Write one line in Chinese, one line of emoji and one line in English: "


async def exact_text(trial: Trial) -> str:
    """SERVING_001: streamed and whole text are the same, and are what the ids spell."""
    seen: set[str] = set()
    held = texts = 0
    more = takewhile(lambda _: set(KINDS) - seen, _spelt_by_chance(trial, seen))
    for prompt, fields in chain(_writings(trial), more):
        record, reply = await _both(trial, prompt, **fields)
        trial.expect(reply.text == record.text, "text_equal", _first_difference(record.text, reply.text))
        _expect_spelt(trial, record)
        seen |= {kind for kind, is_in in KINDS.items() if is_in(record.text)}
        held += sum(len(chunk.token_ids) > 1 for chunk in record.chunks)
        texts += 1
    unseen = sorted(set(KINDS) - seen)
    if unseen:
        raise NotRun(f"{texts} texts were equal, but no {' and no '.join(unseen)} came up in them")
    return f"{texts} texts equal, with spaces, emoji and CJK; {held} chunks had held an unfinished character"


def _expect_spelt(trial: Trial, record: StreamRecord) -> None:
    if trial.target.vocabulary is not None and record.token_ids:
        spelt = trial.target.vocabulary.decode(record.token_ids)
        difference = _first_difference(record.text, spelt)
        trial.expect(spelt == record.text, "text_is_what_the_ids_spell", difference)


def _first_difference(streamed: str, other: str) -> str:
    at = next((i for i, pair in enumerate(zip(streamed, other, strict=False)) if len(set(pair)) > 1), None)
    at = min(len(streamed), len(other)) if at is None else at
    return f"at character {at}: {streamed[at : at + 16]!r} streamed, {other[at : at + 16]!r} otherwise"


def _writings(trial: Trial) -> Iterator[tuple[str, Fields]]:
    """Prompts and sampling under which all kinds of text come up, split characters too.

    Where the vocabulary is known its own tokens are forced by logit_bias: whole characters of each kind,
    then the single bytes of a CJK character and of an emoji, which are mostly no character at all.
    """
    sampled: Fields = {"temperature": 1, "max_tokens": trial.limits["max_tokens"], "to_limit": True}
    for seed in range(trial.scale.texts):
        for prompt_tokens in trial.limits["prompt_tokens"]:
            prompt = WRITE_ALL_KINDS + trial.target.text_of(prompt_tokens, salt=seed)
            yield prompt, {**sampled, "seed": seed}
    if trial.target.vocabulary is not None:
        for seed, ids in enumerate(_forced_ids(trial.target.vocabulary)):
            forced = {"logit_bias": {str(token_id): 100 for token_id in ids}}
            yield trial.target.text_of(16), {**sampled, **forced, "seed": seed}


def _spelt_by_chance(trial: Trial, seen: set[str]) -> Iterator[tuple[str, Fields]]:
    """Texts of nothing but one character's bytes, in any order, for each kind not yet seen.

    One place in 256 starts a whole emoji, one in 27 a CJK character, if the model finds all bytes as likely:
    the temperature is as high as can be.
    """
    sampled: Fields = {"temperature": 2, "max_tokens": trial.limits["max_tokens"], "to_limit": True}
    for seed in range(1, MORE_TEXTS + 1):
        for kind, ids in _byte_ids(trial.target.vocabulary).items():
            if ids and kind not in seen:
                forced = {"logit_bias": {str(token_id): 100 for token_id in ids}}
                yield trial.target.text_of(16), {**sampled, **forced, "seed": seed}


def _byte_ids(vocabulary: Vocabulary | None) -> dict[str, list[int]]:
    return {} if vocabulary is None else {kind: vocabulary.byte_ids(text) for kind, text in SPELT.items()}


def _forced_ids(vocabulary: Vocabulary) -> list[list[int]]:
    kinds = [vocabulary.ids_where(is_in, 16) for is_in in KINDS.values()]
    split = [vocabulary.byte_ids(character) for character in (SPELT["CJK"], "\u00e9", SPELT["emoji"])]
    return [ids for ids in ([token_id for ids in kinds for token_id in ids], *split) if ids]


async def _both(trial: Trial, prompt: Prompt, **fields: Any) -> tuple[StreamRecord, Reply]:
    return await trial.stream(prompt, **fields), await trial.complete(prompt, **fields)


async def exact_finish(trial: Trial) -> str:
    """SERVING_002: finish_reason says what happened, at the limit too."""
    prompt = trial.target.text_of(24, salt=2)
    cut = {"max_tokens": 5, "temperature": 0}
    await _expect_finish(trial, "length_at_the_limit", prompt, "length", 5, to_limit=True, **cut)
    forced = {"logit_bias": {str(trial.target.end_token_id): 100}, "max_tokens": 1, "temperature": 0}
    await _expect_finish(trial, "end_on_the_last_token", prompt, "stop", 1, **forced)
    fields, length = await _natural_end(trial, prompt)
    at, before = {**fields, "max_tokens": length}, {**fields, "max_tokens": length - 1}
    await _expect_finish(trial, "end_on_the_last_token", prompt, "stop", length, **at)
    await _expect_finish(trial, "length_at_the_limit", prompt, "length", length - 1, **before)
    return f"length after 5 of 5, stop on the end token at 1 of 1 and {length} of {length} tokens"


async def _expect_finish(
    trial: Trial, check: str, prompt: str, reason: str, tokens: int, **fields: Any
) -> None:
    record, reply = await _both(trial, prompt, **fields)
    for way, found in (("streamed", (record.finish_reasons, record.completion_tokens)),
                       ("whole", ([reply.finish_reason], reply.completion_tokens))):  # fmt: skip
        evidence = f"{way}: {found[0]} after {found[1]} tokens, expected {reason} after {tokens}"
        trial.expect(found == ([reason], tokens), check, evidence)


async def _natural_end(trial: Trial, prompt: str) -> tuple[Fields, int]:
    """Sampling under which the model itself ends after some tokens, and how many (the end token counts)."""
    end = str(trial.target.end_token_id)
    for bias in trial.limits["end_token_bias"]:
        for seed in range(3):
            fields: Fields = {"temperature": 1, "seed": seed, "logit_bias": {end: bias}}
            reply = await trial.complete(prompt, max_tokens=48, **fields)
            if reply.finish_reason == "stop" and (reply.completion_tokens or 0) > 1:
                return fields, reply.completion_tokens or 0
    raise NotRun("no text ended by itself after 2 to 48 tokens")


async def stop_string(trial: Trial) -> str:
    """SERVING_007: a stop string cuts the text, ends generation at once and frees the engine."""
    prompt = trial.target.text_of(24, salt=7)
    sampled: Fields = {"temperature": 1, "seed": 5, "to_limit": True}
    free = await trial.stream(prompt, max_tokens=trial.limits["free_tokens"], **sampled)
    stop, tokens = _spanning_stop(free)
    expected = free.text[: free.text.index(stop)]
    most = min(trial.limits["max_tokens"], trial.target.room(24))
    stopped = {**sampled, "stop": [stop], "max_tokens": most}
    reply = await trial.complete(prompt, **stopped)
    record = await trial.stream(prompt, **stopped)
    idle = await trial.expect_idle("engine_idle", free.step_ms)
    for text, reasons, counted in (
        (record.text, record.finish_reasons, record.completion_tokens),
        (reply.text, [reply.finish_reason], reply.completion_tokens),
    ):
        trial.expect(text == expected, "text_cut", _first_difference(text, expected))
        trial.expect(reasons == ["stop"], "finish_is_stop", f"finish_reason {reasons}")
        evidence = f"{counted} tokens were generated, the stop string was whole after {tokens}"
        extra = (counted or 0) - tokens
        trial.expect(extra <= trial.limits["extra_tokens"], "generation_ends", evidence)
    return f"cut after {len(expected)} characters, {tokens} tokens; {idle}"


def _spanning_stop(record: StreamRecord) -> tuple[str, int]:
    """A piece of the text that first occurs across a token boundary, and the tokens until it is whole."""
    chunks = record.token_chunks
    ends = list(accumulate(len(chunk.text) for chunk in chunks))
    tokens = list(accumulate(max(1, len(chunk.token_ids)) for chunk in chunks))
    text = record.text
    for at in range(len(chunks) // 4, len(chunks) - 4):
        for length in range(3, 12):
            start = ends[at] - 1
            stop = text[start : start + length]
            whole = next((i for i, end in enumerate(ends) if end >= start + length), None)
            if text.find(stop) == start and "\ufffd" not in stop and stop.strip() and whole is not None:
                return stop, tokens[whole]
    raise NotRun("the text repeats itself: no piece of it first occurs in its later part")


async def seeds(trial: Trial) -> str:
    """SERVING_009: equal seeds give equal ids, different seeds different ones."""
    prompt = "Write random words: " + trial.target.text_of(16, salt=9)
    sampled: Fields = {"temperature": 1, "max_tokens": trial.limits["max_tokens"], "to_limit": True}
    found = []
    for seed in trial.limits["seeds"]:
        first, second = await _both(trial, prompt, seed=seed, **sampled)
        same = (first.token_ids, first.text) == (second.token_ids, second.text)
        trial.expect(same, "equal_seeds_equal_ids", f"seed {seed} gave two texts")
        found.append(first.text)
    different = len(set(found))
    trial.expect(different > 1, "different_seeds_differ", f"{len(found)} seeds gave {different} text")
    return f"{len(found)} seeds gave {different} texts, each the same twice"


async def neighbours(trial: Trial) -> str:
    """SERVING_010: at temperature 0 a request says the same alone and beside others."""
    fields: Fields = {"temperature": 0, "max_tokens": trial.limits["max_tokens"], "to_limit": True}
    prompts = [trial.target.text_of(length, salt=length) for length in trial.limits["prompt_tokens"]]
    alone = [await trial.stream(prompt, **fields) for prompt in prompts]
    async with trial.crowd() as crowd:
        for seed in range(trial.limits["neighbours"]):
            crowd.open(trial.target.text_of(20, salt=seed), to_limit=True, temperature=1, seed=seed)
        await asyncio.sleep(0.05)
        beside = await asyncio.gather(*(trial.stream(prompt, **fields) for prompt in prompts))
    for one, other in zip(alone, beside, strict=True):
        same = (one.token_ids, one.text) == (other.token_ids, other.text)
        evidence = f"a prompt of {one.prompt_tokens} tokens: {_first_difference(one.text, other.text)}"
        trial.expect(same, "same_beside_others", evidence)
    return f"{len(prompts)} requests the same beside {trial.limits['neighbours']} others"


async def cached_ids(trial: Trial) -> str:
    """SERVING_011: what decode makes of the cache, prefill makes of the whole text: the same ids."""
    written = await trial.complete(
        trial.target.text_of(16), to_limit=True, max_tokens=97, temperature=1, seed=3
    )
    compared = 0
    for length in trial.limits["prompt_tokens"]:
        prompt = list(islice(cycle(written.token_ids), length))
        full = await _continued(trial, prompt, trial.limits["max_tokens"])
        for known in trial.limits["known_tokens"]:
            rest = await _continued(trial, prompt + full[:known], trial.limits["max_tokens"] - known)
            differ = f"{rest[:6]} against {full[known : known + 6]}"
            evidence = f"prompt of {length} ids and {known} of its continuation: {differ}"
            trial.expect(rest == full[known:], "ids_equal", evidence)
            compared += 1
    return f"{compared} continuations equal, prompts of {trial.limits['prompt_tokens']} ids"


async def _continued(trial: Trial, prompt: list[int], tokens: int) -> list[int]:
    return (await trial.complete(prompt, to_limit=True, temperature=0, max_tokens=tokens)).token_ids
