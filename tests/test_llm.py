"""Text in, text out, with a real engine over a stand-in for the device."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import NUM_PLAIN, fake_llm, plain, script
from fake_steps import FakeSteps
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe import EngineConfig, Event, Generation, QueueFull, RequestError, SamplingParams, TokenLogprobs
from jaxmoe.engine import Engine
from jaxmoe.gguf import GGUFFile
from jaxmoe.llm import LLM, MAX_UNREAD_EVENTS, StopMatcher, Transcript, read_sampling_defaults
from jaxmoe.tokenizer import TextStream, Tokenizer

END = 507  # <|im_end|> of the tiny vocabulary
PROMPT = (40, 41, 42)
SEEDED = SamplingParams(seed=7, max_tokens=8)


@pytest.fixture(scope="module")
def llm(tiny_gguf: Path) -> Iterator[LLM]:
    with fake_llm(tiny_gguf) as loaded:
        yield loaded


def scripted(path: Path, ids: list[int], **kwargs: Any) -> LLM:
    return fake_llm(path, script(ids, after=len(PROMPT)), **kwargs)


async def all_events(generation: Generation) -> list[Event]:
    events: list[Event] = []
    async with asyncio.timeout(20):
        while not generation.finished:
            events += await generation.next_events()
    return events


async def submit(llm: LLM, params: SamplingParams, n: int = 1) -> list[Event]:
    return await all_events(llm.submit(PROMPT, params, loop=asyncio.get_running_loop(), n=n))


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def ids_of(events: list[Event]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


async def wait_idle(llm: LLM) -> None:
    """Well before a generation of 900 tokens in steps of 20 ms would end by itself."""
    end = time.perf_counter() + 6
    while time.perf_counter() < end:
        stats = llm.stats()
        if not (stats.running or stats.waiting) and stats.free_pages == stats.total_pages:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"still busy: {stats}")


# Stop strings.


def earliest_stop(text: str, stop: list[str]) -> int | None:
    """Where the stop string that is complete first begins; of several, the longest."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return min(starts)
    return None


def held_length(text: str, stop: list[str]) -> int:
    prefixes = [s[:i] for s in stop for i in range(1, len(s))]
    return max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)


short_texts = st.text("ab\n", max_size=12)


@settings(deadline=None)
@given(st.lists(short_texts, max_size=6), st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4))
def test_stop_matcher_agrees_with_a_plain_search(pieces: list[str], stop: list[str]) -> None:
    matcher, seen = StopMatcher(stop), ""
    for piece in pieces:
        cut, seen = matcher.push(piece), seen + piece
        assert cut == earliest_stop(seen, stop)
        if cut is not None:
            return
        assert matcher.held == held_length(seen, stop)


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["aab"], "aaab", "a"),
        (["abab"], "abaabab", "aba"),
        (["User:"], "Hi\nUser: x", "Hi\n"),
        (["b", "ab"], "xab", "x"),
        (["ö"], "größer", "gr"),
    ],
)
def test_stop_matcher_cuts(stop: list[str], text: str, expected: str) -> None:
    matcher = StopMatcher(stop)
    cuts = [cut for character in text if (cut := matcher.push(character)) is not None]
    assert text[: cuts[0]] == expected


# Transcripts: ids in, events out.


def play(tokenizer: Tokenizer, ids: list[int], **kwargs: Any) -> list[Event]:
    """What a transcript says of these ids, as the engine would feed them."""
    events: list[Event] = []
    params = SamplingParams(**kwargs)
    transcript = Transcript(
        TextStream(tokenizer), params, end_ids=tokenizer.eos_ids, emit=events.append, index=0
    )
    for token_id in ids:
        if not transcript.on_token(token_id):
            break
    transcript.finish("length")
    return events


def test_one_event_a_token_and_an_empty_last_one(llm: LLM) -> None:
    ids = llm.tokenizer.encode(" rain in the garden", parse_special=False)
    events = play(llm.tokenizer, ids)
    assert [event.token_ids for event in events] == [*((token_id,) for token_id in ids), ()]
    assert [event.text for event in events] == [*map(llm.token_text, ids), ""]
    assert [event.finish_reason for event in events[:-1]] == [None] * len(ids)
    assert events[-1].finish_reason == "length"


def test_logprobs_belong_to_the_next_id_only(llm: LLM) -> None:
    events: list[Event] = []
    stream, params = TextStream(llm.tokenizer), SamplingParams()
    transcript = Transcript(stream, params, end_ids=frozenset(), emit=events.append)
    logprobs = TokenLogprobs(65, -0.5, ())
    transcript.on_logprobs(logprobs)
    transcript.on_token(65)
    transcript.on_token(66)
    assert [event.logprobs for event in events] == [(logprobs,), ()]


def test_an_unfinished_character_is_held_with_its_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode("a好b", parse_special=False)
    assert len(ids) > 3, "the vocabulary should split this character"
    events = play(llm.tokenizer, ids)
    assert [event.text for event in events] == ["a", "好", "b", ""]
    assert [event.token_ids for event in events] == [(ids[0],), tuple(ids[1:-1]), (ids[-1],), ()]
    assert [event.starts for event in events] == [(0,), (1,) * (len(ids) - 2), (2,), ()]


def test_half_a_character_at_the_end_is_replaced_once(llm: LLM) -> None:
    ids = llm.tokenizer.encode("a好", parse_special=False)[:-1]
    events = play(llm.tokenizer, ids)
    assert text_of(events) == "a\ufffd"
    assert events[-2].token_ids == tuple(ids[1:])


def test_a_possible_stop_string_is_held_and_released_whole(llm: LLM) -> None:
    ids = [
        *llm.tokenizer.encode("a", parse_special=False) * 2,
        *llm.tokenizer.encode("x", parse_special=False),
    ]
    events = play(llm.tokenizer, ids, stop=("aab",))
    assert [(event.text, event.token_ids) for event in events] == [("aax", tuple(ids)), ("", ())]


def test_a_stop_string_is_cut_and_ends_at_once(llm: LLM) -> None:
    ids = llm.tokenizer.encode("rain END garden", parse_special=False)
    stop_at = len(llm.tokenizer.encode("rain END", parse_special=False))
    events = play(llm.tokenizer, ids, stop=("END",))
    assert text_of(events) == "rain "
    assert ids_of(events) == ids[:stop_at]
    assert events[-1].finish_reason == "stop"


def test_text_before_a_stop_inside_a_token_is_kept(llm: LLM) -> None:
    (rain,) = llm.tokenizer.encode(" rain", parse_special=False)
    events = play(llm.tokenizer, [rain], stop=("ai",))
    assert [(event.text, event.token_ids) for event in events] == [(" r", (rain,)), ("", ())]


def test_the_end_token_is_counted_and_silent(llm: LLM) -> None:
    (rain,) = llm.tokenizer.encode(" rain", parse_special=False)
    events = play(llm.tokenizer, [rain, END])
    assert [(event.text, event.token_ids) for event in events] == [(" rain", (rain,)), ("", (END,))]


def test_an_end_token_after_half_a_character_rides_behind_it(llm: LLM) -> None:
    ids = llm.tokenizer.encode("好", parse_special=False)[:1]
    events = play(llm.tokenizer, [*ids, END])
    assert [(event.text, event.token_ids) for event in events] == [("\ufffd", tuple(ids)), ("", (END,))]


def test_an_ignored_end_token_does_not_split_a_character(llm: LLM) -> None:
    first, *rest = llm.tokenizer.encode("好", parse_special=False)
    events = play(llm.tokenizer, [first, END, *rest], ignore_eos=True)
    assert [(event.text, event.token_ids) for event in events] == [("好", (first, END, *rest)), ("", ())]


ids_lists = st.lists(st.integers(0, 511), max_size=30)


@settings(deadline=None)
@given(ids_lists, st.lists(st.text("ae \ufffdr", min_size=1, max_size=3), max_size=3))
def test_events_add_up_to_the_text_and_ids(llm: LLM, ids: list[int], stop: list[str]) -> None:
    tokenizer = llm.tokenizer
    events = play(tokenizer, ids, stop=tuple(stop), ignore_eos=True)
    silent = {*tokenizer.control_tokens.values(), *tokenizer.eos_ids}
    whole = tokenizer.decode(token_id for token_id in ids if token_id not in silent)
    cut = earliest_stop(whole, stop)
    assert text_of(events) == whole[:cut]
    assert ids_of(events) == ids[: len(ids_of(events))]
    assert cut is not None or ids_of(events) == ids
    assert all(event.text for event in events[:-1])
    assert [event.finish_reason for event in events] == [
        *[None] * (len(events) - 1),
        "length" if cut is None else "stop",
    ]
    starts = [start for event in events for start in event.starts]
    assert starts == sorted(starts)
    assert len(starts) == len(ids_of(events))


# Generations: through the engine.


async def test_a_generation_streams_what_generate_returns(llm: LLM) -> None:
    events = await submit(llm, SEEDED)
    result = await asyncio.to_thread(llm.generate, PROMPT, SEEDED)
    assert (text_of(events), tuple(ids_of(events))) == (result.text, result.token_ids)
    assert events[-1].finish_reason == result.finish_reason == "length"
    assert len(result.token_ids) == 8


async def test_an_end_token_on_the_last_position_is_a_stop(tiny_gguf: Path) -> None:
    with scripted(tiny_gguf, [65, 66, END]) as llm:
        events = await submit(llm, SamplingParams(max_tokens=3))
        assert events[-1].finish_reason == "stop"
        assert ids_of(events) == [65, 66, END]
        events = await submit(llm, SamplingParams(max_tokens=3, ignore_eos=True))
        assert events[-1].finish_reason == "length"


async def test_a_stop_string_ends_the_work(tiny_gguf: Path) -> None:
    with fake_llm(tiny_gguf) as llm:
        ids = llm.encode("rain END")
        llm.steps.rule = script(ids, after=len(PROMPT))  # type: ignore[attr-defined]
        events = await submit(llm, SamplingParams(max_tokens=500, stop=("END",)))
        assert (text_of(events), events[-1].finish_reason) == ("rain ", "stop")
        await wait_idle(llm)
        launched = len(llm.steps.launched)  # type: ignore[attr-defined]
        assert launched <= len(ids) + 1, "one step may be in flight, no more"


async def test_every_id_has_its_logprobs(llm: LLM) -> None:
    events = await submit(llm, SamplingParams(max_tokens=9, logprobs=0))
    logprobs = [entry for event in events for entry in event.logprobs]
    assert logprobs == [TokenLogprobs(token_id, -0.5, ()) for token_id in ids_of(events)]
    assert all(len(event.logprobs) == len(event.token_ids) for event in events)


async def test_choices_have_seeds_of_their_own_that_reproduce(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, seed=2**63 - 2)
    first, again = await submit(llm, params, n=3), await submit(llm, params, n=3)
    choices = [[event for event in first if event.index == index] for index in range(3)]
    assert len({tuple(ids_of(choice)) for choice in choices}) == 3
    for index, choice in enumerate(choices):
        assert ids_of(choice) == ids_of([event for event in again if event.index == index])
    alone = await submit(llm, SamplingParams(max_tokens=6, seed=-(2**63)))
    assert ids_of(alone) == ids_of(choices[2]), "choice 2 uses seed + 2, wrapped to 64 bits"


async def test_choices_are_interleaved(tiny_gguf: Path) -> None:
    with fake_llm(tiny_gguf, step_seconds=0.002) as llm:
        events = await submit(llm, SamplingParams(max_tokens=8, seed=1, ignore_eos=True), n=2)
    order = [event.index for event in events]
    assert order != sorted(order)


async def test_one_wake_up_a_step_for_all_requests(tiny_gguf: Path) -> None:
    with fake_llm(tiny_gguf, step_seconds=0.001) as llm:
        loop, woken = asyncio.get_running_loop(), []
        real = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args, **kwargs: (woken.append(args), real(*args, **kwargs))[1]  # type: ignore[method-assign]
        try:
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            generations = [llm.submit(PROMPT, params, loop=loop) for _ in range(4)]
            for events in await asyncio.gather(*map(all_events, generations)):
                assert len(ids_of(events)) == 20
        finally:
            del loop.call_soon_threadsafe
        steps = len(llm.steps.launched)  # type: ignore[attr-defined]
        assert 20 <= len(woken) <= steps
        assert not llm._fresh


async def test_cancel_frees_slot_and_pages_and_is_idempotent(tiny_gguf: Path) -> None:
    with fake_llm(tiny_gguf, step_seconds=0.02, num_slots=2) as llm:
        loop, params = asyncio.get_running_loop(), SamplingParams(max_tokens=900, ignore_eos=True)
        generations = [llm.submit(PROMPT, params, loop=loop, n=2) for _ in range(3)]
        await generations[0].next_events()
        for generation in generations:
            generation.cancel("enough")
            generation.cancel("again")
        for generation in generations:
            events = await all_events(generation)
            assert [event.finish_reason for event in events if event.finish_reason] == ["cancelled"] * 2
            assert {event.error for event in events if event.finish_reason} == {"enough"}
        await wait_idle(llm)


async def test_a_cancelled_generation_takes_no_more_ids(tiny_gguf: Path) -> None:
    with fake_llm(tiny_gguf, step_seconds=0.002) as llm:
        generation = llm.submit(
            PROMPT, SamplingParams(max_tokens=500, ignore_eos=True), loop=asyncio.get_running_loop()
        )
        await generation.next_events()
        before = generation.timings.predicted_length
        generation.cancel()
        await all_events(generation)
        assert generation.timings.predicted_length <= before + 1


async def test_a_reader_that_takes_nothing_is_cancelled(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_UNREAD_EVENTS <= 10_000
    monkeypatch.setattr("jaxmoe.llm.MAX_UNREAD_EVENTS", 10)
    with scripted(tiny_gguf, [65]) as llm:
        generation = llm.submit(PROMPT, SamplingParams(max_tokens=900), loop=asyncio.get_running_loop())
        await wait_idle(llm)
        events = await all_events(generation)
    assert len(events) <= 12
    assert (events[-1].finish_reason, events[-1].error) == ("cancelled", "the client reads too slowly")


async def test_nothing_arrives_in_time(tiny_gguf: Path) -> None:
    with fake_llm(tiny_gguf, step_seconds=0.1) as llm:
        generation = llm.submit(PROMPT, SEEDED, loop=asyncio.get_running_loop())
        assert await generation.next_events(0.01) == []
        generation.cancel()
        await all_events(generation)


def generation_alone() -> Generation:
    """A generation whose events come from the test."""
    return Generation(PROMPT, num_choices=1, engine=None, loop=asyncio.get_running_loop())  # type: ignore[arg-type]


async def test_other_tasks_run_though_there_always_is_an_event() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task, generation = asyncio.create_task(other()), generation_alone()
    for _ in range(50):
        generation._put(Event("a", (1,)))
        assert await generation.next_events(15.0) == [Event("a", (1,))]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert turns >= 49


async def test_each_wait_has_its_own_time() -> None:
    generation, loop = generation_alone(), asyncio.get_running_loop()

    async def seconds_of(limit: float | None, event_after: float | None = None) -> float:
        if event_after is not None:
            loop.call_later(event_after, generation._put, Event("a", (1,)))
            loop.call_later(event_after, generation._wake)
        start = loop.time()
        assert len(await generation.next_events(limit)) == (event_after is not None)
        return loop.time() - start

    assert 0.04 <= await seconds_of(0.1, event_after=0.05) < 0.5
    assert 0.08 <= await seconds_of(0.09) < 0.5  # not when the timer of the wait before would go off
    assert 0.08 <= await seconds_of(5.0, event_after=0.09) < 0.5
    assert 0.02 <= await seconds_of(0.03) < 0.5  # though a timer for later was there
    assert 0.02 <= await seconds_of(0.06, event_after=0.03) < 0.5
    assert 0.08 <= await seconds_of(None, event_after=0.09) < 0.5


async def test_a_finished_generation_leaves_no_timer() -> None:
    generation = generation_alone()
    asyncio.get_running_loop().call_soon(generation._put, Event("", (), finish_reason="stop"))
    asyncio.get_running_loop().call_soon(generation._wake)
    await generation.next_events(60.0)
    timer = generation._bell._timer
    assert timer is not None
    assert timer.cancelled()


async def test_a_wake_up_that_finds_nobody_or_nothing_does_no_harm() -> None:
    generation = generation_alone()
    generation._wake()
    waiting = asyncio.create_task(generation.next_events())
    await asyncio.sleep(0)
    generation._wake()
    generation._wake()
    await asyncio.sleep(0.01)
    assert not waiting.done()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    generation._put(Event("a", (1,)))
    assert await generation.next_events() == [Event("a", (1,))]


async def test_submit_says_what_is_wrong_and_leaves_nothing_behind(tiny_gguf: Path) -> None:
    with fake_llm(
        tiny_gguf, num_slots=1, step_seconds=0.02, engine_config=EngineConfig(max_waiting=1)
    ) as llm:
        loop, params = asyncio.get_running_loop(), SamplingParams(max_tokens=900, ignore_eos=True)
        for ids, wanted, param in (
            ((), SEEDED, "prompt"),
            ((512,), SEEDED, "prompt"),
            (PROMPT, SamplingParams(logit_bias={512: 1.0}), "logit_bias"),
            (PROMPT, SamplingParams(max_tokens=1022), "max_tokens"),
        ):
            with pytest.raises(RequestError) as caught:
                llm.submit(ids, wanted, loop=loop)
            assert caught.value.param == param
        with pytest.raises(RequestError) as caught:
            llm.submit([40] * 1024, SEEDED, loop=loop)
        assert caught.value.code == "context_length_exceeded"
        assert "1024" in str(caught.value)
        with pytest.raises(QueueFull):
            llm.submit(PROMPT, params, loop=loop, n=4)
        await wait_idle(llm)


async def test_no_max_tokens_means_all_that_is_left(tiny_gguf: Path) -> None:
    with scripted(tiny_gguf, [65]) as llm:
        result = await asyncio.to_thread(llm.generate, PROMPT, SamplingParams())
    assert len(result.token_ids) == 1024 - len(PROMPT)
    assert result.finish_reason == "length"


def test_a_top_k_of_the_whole_vocabulary_is_none(llm: LLM) -> None:
    llm.generate(PROMPT, SamplingParams(max_tokens=1, top_k=2**40))
    llm.generate(PROMPT, SamplingParams(max_tokens=1, top_k=511))
    assert [occupant.params.top_k for occupant in llm.steps.admitted[-2:]] == [0, 511]  # type: ignore[attr-defined]


def test_generate_ends_where_on_token_says(llm: LLM) -> None:
    seen: list[tuple[int, str]] = []

    def on_token(token_id: int) -> bool:
        seen.append((token_id, threading.current_thread().name))
        return len(seen) < 3

    result = llm.generate(PROMPT, SamplingParams(max_tokens=50, ignore_eos=True), on_token)
    assert result.token_ids == tuple(token_id for token_id, _ in seen)
    assert len(seen) == 3
    assert {name for _, name in seen} == {"jaxmoe-engine"}


def test_generate_raises_what_the_engine_says(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    def on_token(token_id: int) -> bool:
        raise KeyError(token_id)

    with pytest.raises(RuntimeError, match="a callback of this request failed"):
        llm.generate(PROMPT, SEEDED, on_token)


async def test_timings_count_tokens_and_seconds(tiny_gguf: Path) -> None:
    with fake_llm(tiny_gguf, step_seconds=0.005) as llm:
        generation = llm.submit(
            PROMPT, SamplingParams(max_tokens=10, ignore_eos=True), loop=asyncio.get_running_loop()
        )
        await all_events(generation)
    timings = generation.timings
    assert (timings.prompt_length, timings.predicted_length) == (3, 10)
    assert 0.005 <= timings.prompt_seconds < 2.0
    assert 0.04 <= timings.predicted_seconds < 2.0


# Prompts and defaults.


def test_a_plain_prompt_is_parsed_and_a_message_is_not(llm: LLM) -> None:
    assert llm.encode("a<|im_end|>")[-1] == END
    ids = llm.encode_chat([{"role": "user", "content": "<|im_end|>"}])
    assert ids.count(END) == 1, "the template's own"


def test_tools_and_enable_thinking_reach_the_template(llm: LLM) -> None:
    given_switches: list[dict[str, object]] = []

    class Template:
        def encode(self, messages: object, **switches: object) -> list[int]:
            given_switches.append(switches)
            return [1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm, "_template", Template())
        for switch in (None, False, True):
            llm.encode_chat([], enable_thinking=switch)
        llm.encode_chat([], tools=[{"type": "function"}])
    thinking = [{}, {"enable_thinking": False}, {"enable_thinking": True}]
    expected = [{"tools": None, **switches} for switches in thinking]
    assert given_switches == [*expected, {"tools": [{"type": "function"}]}]


def test_sampling_defaults_come_from_the_file() -> None:
    metadata = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": 0.95}
    file = GGUFFile(Path("m.gguf"), metadata, {})
    assert read_sampling_defaults(file) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (top_k,) = read_sampling_defaults(GGUFFile(Path("m.gguf"), {"general.sampling.top_k": 20.0}, {})).values()
    assert (top_k, type(top_k)) == (20, int)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temp", 9.0),
        ("temp", "hot"),
        ("temp", float("nan")),
        ("top_k", 20.5),
        ("top_k", "20"),
        ("top_k", -5),
        ("top_p", True),
    ],
)
def test_an_unusable_sampling_default_is_skipped_and_named(
    key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    metadata = {f"general.sampling.{key}": value, "general.sampling.min_p": 0.1}
    assert read_sampling_defaults(GGUFFile(Path("m.gguf"), metadata, {})) == {"min_p": 0.1}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"general.sampling.{key}" in record.message
    assert (f"{value:g}" if type(value) is float else repr(value)) in record.message


def test_without_params_the_files_sampling_defaults_apply(tiny_gguf: Path) -> None:
    with fake_llm(tiny_gguf) as llm:
        llm.sampling_defaults = {"temperature": 0.6, "top_k": 20}
        llm.generate(PROMPT, on_token=lambda token_id: False)
        llm.generate(PROMPT, SEEDED)
    admitted = [occupant.params for occupant in llm.steps.admitted]  # type: ignore[attr-defined]
    assert admitted == [SamplingParams(temperature=0.6, top_k=20), SEEDED]


def test_giving_up_at_the_end_of_loading_stops_the_engine(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Engine] = []

    def load_engine(*_: object, after_step: Callable[[], None], **__: object) -> Engine:
        steps = FakeSteps()
        engine = Engine(steps, eos_ids=frozenset(), prefill_chunk=8, max_waiting=4, after_step=after_step)
        engine.start()
        started.append(engine)
        return engine

    def give_up(phase: str, share: float) -> None:
        if phase == "ready":
            raise KeyboardInterrupt

    monkeypatch.setattr("jaxmoe.engine.load_engine", load_engine)
    threads = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        LLM(tiny_gguf, progress=give_up)
    assert started
    assert set(threading.enumerate()) == threads


def test_an_engine_that_has_stopped_says_so(tiny_gguf: Path) -> None:
    with fake_llm(tiny_gguf) as llm:
        names: list[str] = []
        llm.when_stopped(lambda: names.append(threading.current_thread().name))
        llm.generate(PROMPT, SEEDED)
        assert names == []
        llm.close()
        assert names == ["jaxmoe-engine"]
        llm.when_stopped(lambda: names.append("at once"))
        assert names == ["jaxmoe-engine", "at once"]


def test_loading_reports_its_phases_and_names_the_model(tiny_gguf: Path) -> None:
    with fake_llm(tiny_gguf) as llm:
        assert llm.model_id == "Synthetic tiny"
        assert llm.vocab_size == 512
        assert llm.context_length == 1024
        assert plain([1], 0) < NUM_PLAIN


def test_importing_loads_no_jax() -> None:
    program = "import jaxmoe, server, sys; jaxmoe.LLM; assert 'jax' not in sys.modules; print(dir(jaxmoe))"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert "'SamplingParams'" in done.stdout
