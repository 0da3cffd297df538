"""The gates of qwen3-moe-streaming-sse-v1: a token on the wire before the next one is made."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from statistics import median, quantiles
from typing import Any

from tools.client import StreamRecord
from tools.trial import GateFailed, NotRun, Trial

# The machine's scheduler lets a process wait that has just been busy, the longer the stream before.
PAUSE_SECONDS = 0.03
Runs = Mapping[int, list[StreamRecord]]  # by length


async def token_by_token(trial: Trial) -> str:
    """V1_001: an event for each token before the next one is generated, then finish_reason and [DONE]."""
    told = []
    for prompt_tokens in trial.limits["prompt_tokens"]:
        prompt = trial.target.text_of(prompt_tokens)
        runs: Runs = {length: [] for length in trial.limits["max_tokens"]}
        await trial.complete(prompt, max_tokens=1)
        await _add_rounds(trial, prompt, runs)
        try:
            told.append(_expect_spread(trial, runs))
        except GateFailed:
            # What a busy machine did to these rounds it does not do to as many again.
            await _add_rounds(trial, prompt, runs)
            told.append(_expect_spread(trial, runs))
        if trial.target.vocabulary is None:
            _expect_few_held(trial, runs)
    return "; ".join(told)


async def _add_rounds(trial: Trial, prompt: str, runs: Runs) -> None:
    """Streams of each length in turn, and back, so that a slow moment meets all lengths alike."""
    for round_number in range(trial.scale.repeats):
        for length in sorted(runs, reverse=bool(round_number % 2)):
            fields: dict[str, Any] = {"max_tokens": length, "temperature": 1, "seed": len(runs[length])}
            await asyncio.sleep(PAUSE_SECONDS)
            record = await trial.stream(prompt, to_limit=True, **fields)
            _expect_terminal(trial, record)
            _expect_ids(trial, record, length)
            _expect_one_id_a_chunk(trial, record)
            runs[length].append(record)


def _expect_terminal(trial: Trial, record: StreamRecord) -> None:
    ends = f"{record.done} [DONE], {record.after_done} events after it, finish {record.finish_reasons}"
    trial.expect(record.done == 1 and record.after_done == 0, "done_is_last", ends)
    trial.expect(record.finish_reasons in (["stop"], ["length"]), "one_finish_reason", ends)


def _expect_ids(trial: Trial, record: StreamRecord, length: int) -> None:
    ids = len(record.token_ids)
    evidence = f"{ids} ids came, usage counts {record.completion_tokens}, {length} were asked for"
    trial.expect(ids == record.completion_tokens == length, "ids_exact", evidence)


def _expect_one_id_a_chunk(trial: Trial, record: StreamRecord) -> None:
    """Several ids in a chunk are right only where an unfinished character was held back."""
    if trial.target.vocabulary is not None:
        groups = _id_groups(record)
        several = sum(len(group) > 1 for group in groups)
        evidence = f"{several} of {len(groups)} chunks have several ids, not all for an unfinished character"
        trial.expect(trial.target.vocabulary.held_rightly(groups), "one_id_a_chunk", evidence)


def _expect_few_held(trial: Trial, runs: Runs) -> None:
    """Where the vocabulary is unknown: unfinished characters are the exception."""
    groups = [group for records in runs.values() for record in records for group in _id_groups(record)]
    share = sum(len(group) > 1 for group in groups) / len(groups)
    few = share <= trial.limits["held_chunk_share"]
    trial.expect(few, "one_id_a_chunk", f"{share:.2f} of {len(groups)} chunks have several ids")


def _id_groups(record: StreamRecord) -> list[tuple[int, ...]]:
    return [chunk.token_ids for chunk in record.chunks if chunk.token_ids]


def _expect_spread(trial: Trial, runs: Runs) -> str:
    """The times: the first token does not wait for the rest, and the rest do not come in lumps."""
    first = {length: [record.ttft_ms for record in records] for length, records in runs.items()}
    rounds = zip(first[min(first)], first[max(first)], strict=True)
    ratio = median(late / early for early, late in rounds)
    times = ", ".join(f"{median(ms):.1f} ms for {length}" for length, ms in first.items())
    evidence = f"median time to the first token: {times} tokens, longest over shortest {ratio:.2f}"
    trial.expect(ratio < trial.limits["first_token_ratio"], "first_token_does_not_grow", evidence)

    # Bursts first: in the shortest stream one burst is also a long gap.
    spread = median(map(_median_over_mean_gap, runs[max(runs)]))
    evidence += f"; median gap {spread:.2f} of the mean gap"
    trial.expect(spread >= trial.limits["median_over_mean_gap"], "no_bursts", evidence)

    # The shortest stream lasts a few milliseconds after its first token, less than a busy machine's tick.
    share = max(
        median(_longest_gap_share(record, from_request=length == min(runs)) for record in records)
        for length, records in runs.items()
    )
    evidence += f"; longest gap {share:.3f} of the stream"
    trial.expect(share <= trial.limits["longest_gap_share"], "no_long_gap", evidence)
    return f"prompt of {runs[max(runs)][0].prompt_tokens} tokens: {evidence}"


def _longest_gap_share(record: StreamRecord, *, from_request: bool) -> float:
    """The longest wait for one id, as a share of the stream from the request or its first token to the end.

    A chunk that carries k ids (an unfinished character was held) has waited for k tokens.
    """
    sizes = [max(1, len(chunk.token_ids)) for chunk in record.token_chunks[1:]]
    waits = [gap / size for gap, size in zip(record.gaps_ms, sizes, strict=True)]
    length = 1000 * record.ended_at - (0.0 if from_request else record.ttft_ms)
    return max(waits) / length if any(waits) else 0.0


def _median_over_mean_gap(record: StreamRecord) -> float:
    gaps = record.gaps_ms or [0.0]
    mean = sum(gaps) / len(gaps)
    return median(gaps) / mean if mean else 0.0


async def whole_response(trial: Trial) -> str:
    """V1_002: stream=false is one JSON response whose text and ids equal the stream's."""
    told = []
    for prompt_tokens in trial.limits["prompt_tokens"]:
        prompt = trial.target.text_of(prompt_tokens, salt=prompt_tokens)
        for sampling in ({"temperature": 0}, {"temperature": 1, "seed": 11}):
            asked = {"max_tokens": trial.limits["max_tokens"], **sampling}
            record = await trial.stream(prompt, to_limit=True, **asked)
            told.append(await _expect_same(trial, record, prompt, asked))
    return f"text and ids equal for prompts of {', '.join(map(str, told))} tokens"


async def _expect_same(trial: Trial, record: StreamRecord, prompt: str, asked: dict[str, Any]) -> int | None:
    reply = await trial.complete(prompt, to_limit=True, **asked)
    kind = reply.content_type
    trial.expect(kind == "application/json", "one_json_response", f"the content type is {kind}")
    ids = len(reply.token_ids)
    streamed = len(record.token_ids)
    counted = f"{ids} ids came, usage counts {reply.completion_tokens}, the stream had {streamed}"
    trial.expect(ids == reply.completion_tokens == streamed, "holds_all_tokens", counted)
    trial.expect(reply.token_ids == record.token_ids, "ids_equal_the_stream", "the ids differ")
    texts = f"{reply.text[-40:]!r} against {record.text[-40:]!r} streamed"
    trial.expect(reply.text == record.text, "text_equals_the_stream", texts)
    return reply.prompt_tokens


async def speed(trial: Trial) -> str:
    """V1_003: the median time between tokens over HTTP."""
    prompt = trial.target.text_of(trial.limits["prompt_tokens"])
    tokens = trial.limits["max_tokens"]
    await trial.complete(prompt, max_tokens=1)
    records = [
        await trial.stream(prompt, to_limit=True, max_tokens=tokens, temperature=1, seed=seed)
        for seed in range(max(2, trial.scale.repeats // 3))
    ]
    gaps = [gap for record in records for gap in record.gaps_ms]
    if len(gaps) < trial.limits["fewest_gaps"]:
        raise NotRun(f"only {len(gaps)} gaps between tokens came; {trial.limits['fewest_gaps']} are needed")
    return SPEEDS[trial.target.speed](trial, records, gaps)


def _expect_near_the_engine(trial: Trial, records: list[StreamRecord], gaps: list[float]) -> str:
    """Over HTTP as fast as the engine itself, plus a little.

    The engine's median is that of what it reports of the same streams, milliseconds a gap.
    """
    engine = [record.engine_ms for record in records if record.engine_ms is not None]
    if not engine:
        raise NotRun("the server lacks timings (predicted_ms, predicted_n) on the last chunk")
    limit = median(engine) + trial.limits["tiny"]["over_engine_ms"]
    evidence = f"median gap {median(gaps):.2f} ms, the engine's {median(engine):.2f} ms a gap as it says"
    trial.expect(median(gaps) <= limit, "median_gap", f"{evidence}, the limit is {limit:.2f} ms")
    return evidence


def _expect_h200_speed(trial: Trial, records: list[StreamRecord], gaps: list[float]) -> str:
    limits = trial.limits["h200_30b"]
    p95 = quantiles(gaps, n=20)[-1]
    evidence = f"median gap {median(gaps):.2f} ms, p95 {p95:.2f} ms over {len(records)} streams"
    within = median(gaps) <= limits["median_ms"] and p95 <= limits["p95_over_median"] * median(gaps)
    trial.expect(within, "median_gap", f"{evidence}, the limits are {limits}")
    return evidence


def _expect_seed_speed(trial: Trial, records: list[StreamRecord], gaps: list[float]) -> str:
    limit = trial.limits["other"]["median_ms"]
    evidence = f"median gap {median(gaps):.2f} ms over {len(records)} streams"
    trial.expect(median(gaps) < limit, "median_gap", f"{evidence}, the limit is {limit} ms")
    return evidence


SPEEDS = {"tiny": _expect_near_the_engine, "h200_30b": _expect_h200_speed, "other": _expect_seed_speed}
