"""Gates of qwen3-moe-serving-v1 about who is served: disconnects, slots, pages, streams side by side."""

from __future__ import annotations

import asyncio
import random
from itertools import chain, pairwise
from statistics import median

from tools.client import ProtocolError, ServerError, StreamRecord
from tools.target import Health
from tools.trial import Crowd, GateFailed, NotRun, Trial

MOST_STREAMS = 64
CHUNK_LENGTH = 512  # tokens prefilled in one step; discharge serves with this
SECONDS = 60.0


async def disconnect_in_queue(trial: Trial) -> str:
    """SERVING_003: a client that leaves while it waits leaves the queue, and nobody else notices."""
    async with trial.crowd() as crowd:
        victim, full = await _fill_until_one_waits(trial, crowd)
        await crowd.disconnect(victim)
        bound = trial.limits["steps"] * crowd.step_ms + trial.limits["allowance_ms"]
        waited, health = await trial.until(lambda health: health.waiting == 0, bound)
        evidence = f"{bound:.0f} ms after the client had gone: {health}"
        trial.expect(health.waiting == 0, "queue_left", evidence)
        await asyncio.sleep(0.1)
        health = await trial.target.health()
        trial.expect(health.running == full.running, "others_run_on", f"of {full.running} streams: {health}")
    return f"out of the queue behind {full.running} streams after {waited:.1f} ms"


async def _fill_until_one_waits(trial: Trial, crowd: Crowd) -> tuple[asyncio.Task[StreamRecord], Health]:
    for count in range(1, MOST_STREAMS + 1):
        task = crowd.open(trial.target.text_of(24, salt=count), to_limit=True, temperature=1, seed=count)
        health = await _waits(trial, crowd, task)
        if health is not None:
            return task, health
    raise NotRun(f"{MOST_STREAMS} streams ran at once and none had to wait")


async def _waits(trial: Trial, crowd: Crowd, task: asyncio.Task[StreamRecord]) -> Health | None:
    """/health if the newest stream is kept waiting for many steps, None once it has its first token."""
    clock = asyncio.get_running_loop()
    waiting_since: float | None = None
    async with asyncio.timeout(SECONDS):
        while not crowd.records[-1].token_chunks:
            if task.done():
                await task
            health = await trial.target.health()
            now = clock.time()
            waiting_since = (waiting_since or now) if health.waiting else None
            if waiting_since is not None and now - waiting_since > max(0.1, 0.02 * crowd.step_ms):
                return health
            await asyncio.sleep(0.002)
    return None


async def disconnect_in_prefill(trial: Trial) -> str:
    """SERVING_004: a client that leaves before its first token stops the prefill at the next chunk."""
    ttft_ms, num_tokens = await _long_prompt(trial)
    step_ms = ttft_ms * min(1.0, CHUNK_LENGTH / num_tokens)
    for salt in range(1, 6):
        async with trial.crowd() as crowd:
            task = crowd.open(trial.target.text_of(num_tokens, salt), to_limit=True, temperature=0)
            await trial.until(lambda health: health.running > 0, 1000 * SECONDS)
            await crowd.disconnect(task)
            caught = not crowd.records[0].token_chunks
        idle = await trial.expect_idle("all_freed", step_ms)
        if caught:
            return f"prompt of {num_tokens} tokens (first token after {ttft_ms:.0f} ms): {idle}"
    raise NotRun(f"a prompt of {num_tokens} tokens gave its first token before the client could leave")


async def _long_prompt(trial: Trial) -> tuple[float, int]:
    """Time to the first token (ms) and length of the longest prompt of the gate's list that fits."""
    for num_tokens in trial.limits["prompt_tokens"]:
        try:
            record = await trial.stream(trial.target.text_of(num_tokens), max_tokens=1, temperature=0)
        except ServerError as error:
            if error.status != 400:
                raise
        else:
            return record.ttft_ms, record.prompt_tokens or num_tokens
    raise NotRun(f"no prompt of {trial.limits['prompt_tokens']} tokens fits the server's context")


async def disconnect_midway(trial: Trial) -> str:
    """SERVING_005: a client that leaves in the middle of its stream frees slot and pages."""
    told = []
    for tokens in trial.limits["after_tokens"]:
        record = await trial.stream(
            trial.target.text_of(40, tokens), stop_after=tokens, to_limit=True, temperature=1, seed=tokens
        )
        told.append(f"left after {tokens}: {await trial.expect_idle('all_freed', record.step_ms)}")
    return "; ".join(told)


async def random_disconnects(trial: Trial) -> str:
    """SERVING_006: many clients leave at random moments under steady streams; nothing is left behind."""
    leaving = asyncio.create_task(_come_and_go(trial, random.Random(6)))
    steady = [asyncio.create_task(_steady(trial, seed, leaving)) for seed in range(trial.limits["streams"])]
    try:
        records = list(chain.from_iterable(await asyncio.gather(*steady)))
        early = await leaving
    finally:
        for task in (leaving, *steady):
            task.cancel()
        await asyncio.gather(leaving, *steady, return_exceptions=True)
    idle = await trial.expect_idle("all_freed", median(record.step_ms for record in records))
    left = f"{trial.scale.disconnects} left, {early} of them before a token"
    return f"{left}, beside {len(steady)} streams at a time ({len(records)} in all); {idle}"


async def _steady(trial: Trial, seed: int, leaving: asyncio.Task[int]) -> list[StreamRecord]:
    """Streams one after another as long as others come and go; each must end as it was asked to."""
    records: list[StreamRecord] = []
    tokens = trial.limits["max_tokens"]
    prompt = trial.target.text_of(30, salt=seed)
    while not (records and leaving.done()):
        try:
            record = await trial.stream(prompt, to_limit=True, max_tokens=tokens, temperature=1, seed=seed)
        except (ProtocolError, ServerError) as error:
            evidence = f"a stream that nobody disconnected broke off: {error}"
            raise GateFailed("others_run_on", evidence) from error
        evidence = f"a stream that nobody disconnected ended after {len(record.token_ids)} of {tokens} tokens"
        trial.expect(len(record.token_ids) == tokens and record.done == 1, "others_run_on", evidence)
        records.append(record)
    return records


async def _come_and_go(trial: Trial, rng: random.Random) -> int:
    """Clients that leave after a random while, four at a time; how many had got no token yet."""
    pass_through = asyncio.Semaphore(4)
    longest = max(trial.limits["prompt_tokens"])
    tokens = min(trial.limits["visit_tokens"], trial.target.room(longest))

    async def visit(salt: int, length: int, seconds: float) -> bool:
        async with pass_through, trial.crowd() as crowd:
            prompt = trial.target.text_of(length, salt)
            crowd.open(prompt, to_limit=True, max_tokens=tokens, temperature=1, seed=salt)
            await asyncio.sleep(seconds)
            if crowd.tasks[0].done():
                await crowd.tasks[0]
            return not crowd.records[0].token_chunks

    visits = [
        visit(salt, rng.choice(trial.limits["prompt_tokens"]), rng.uniform(0, trial.limits["seconds"]))
        for salt in range(trial.scale.disconnects)
    ]
    return sum(await asyncio.gather(*visits))


async def interleaved(trial: Trial) -> str:
    """SERVING_008: streams opened together run together.

    The best of three rounds counts: a busy client reads much at once, a server that serialises always does.
    """
    rounds = [await _opened_together(trial, salt) for salt in range(3)]
    begin = [max(one[0] for one in times) - min(one[-1] for one in times) for times in rounds]
    evidence = (
        f"{len(rounds[0])} streams: the last one begins {-1000 * min(begin):.0f} ms before the first one ends"
    )
    trial.expect(min(begin) < 0, "all_begin_before_one_ends", evidence)
    share = max(map(_turn_share, rounds))
    evidence += f"; {share:.2f} of the tokens follow one of another stream"
    trial.expect(share >= trial.limits["turn_share"], "tokens_alternate", evidence)
    return evidence


async def _opened_together(trial: Trial, salt: int) -> list[list[float]]:
    """The times at which each stream's token chunks arrived, by one clock."""
    fields = {"to_limit": True, "max_tokens": trial.limits["max_tokens"], "temperature": 1}
    async with trial.crowd() as crowd:
        for seed in range(trial.limits["streams"]):
            crowd.open(trial.target.text_of(24, salt=10 * salt + seed), seed=seed, **fields)
        records = await crowd.finished()
    return [[record.sent + chunk.at for chunk in record.token_chunks] for record in records]


def _turn_share(times: list[list[float]]) -> float:
    """Of all tokens in the order of arrival, the share that come from another stream than the one before."""
    arrivals = sorted((at, stream) for stream, one in enumerate(times) for at in one)
    turns = sum(early[1] != late[1] for early, late in pairwise(arrivals))
    return turns / len(arrivals)
