"""Measure startup, prefill, decode and time to first token: the engine alone, and through HTTP.

`python -m tools.bench MODEL.gguf [--goals | --what decode,prefill,http_decode,http_ttft,startup,http_startup]
[--streams 1,4,8] [--prompt-tokens 128,512] [--context N] [--new-tokens N] [--repeats N] [--out FILE.json]
[--profile DIR]`

--goals measures the rows of GOALS, and says of each which figure it had to reach. Every figure is the median
over the repeats. Prompts are random ids, others for each stream and each repeat; a first round with few
tokens warms up and is not counted. Sampling is greedy and goes on past end tokens. One engine and one server,
with as many slots as the most streams, measure all rows; their other settings come from the environment
(JAXMOE_CACHE_SIZE ...).

- decode, http_decode: tokens per second of all streams together, and milliseconds between a stream's tokens,
  while all streams decode; ttft_ms is from the same streams. dispatch_us is the host's time to launch one
  decode step, in the engine's thread; engine_share is the rate through HTTP over the engine's.
- prefill: prompt tokens per second until every stream has its first token; http_ttft: that time alone.
- startup: the load in this process, with JAX's own start in load_s; compile_s is without the persistent
  compilation cache, unless JAX_COMPILATION_CACHE_DIR names one; host_peak_bytes is the highest RssAnon, read
  every 10 ms (VmHWM would count the mapped file's pages, which are the page cache's); device_bytes is what
  the device says is in use, or the size of all live arrays where it does not say.
- http_startup: start_s from the start of a server's process until /health says ok; the second of two starts,
  so that file and compiled steps are in their caches.
- gb_per_s: bytes of weights, as in the file, that the steps must read, per second; device_gb_per_s: the same
  weights in the device's format. KV cache and activations are left out. B tokens are expected to meet
  E * (1 - (1 - A/E)^B) experts a layer. floor_share is gb_per_s over the speed of a large copy (bytes read
  plus written, measured in the same run): 1 is the floor. Long prompts are bound by arithmetic, not by this.
- context is the longest context that the engine was built for, not what a stream had in its cache.

--profile DIR runs each row of `decode` once more, after all is measured, and leaves JAX's trace of that run
in DIR/decode-STREAMSxTOKENS; it counts in no figure.

Exit status: 0 all measured, 1 something was not; a row that could not be measured says why in `failed`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from random import Random
from statistics import median
from threading import Event, Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from jaxmoe.config import EngineConfig, ModelConfig
from jaxmoe.display import PhaseBars
from jaxmoe.gguf import GGUFFile, read_gguf
from jaxmoe.profiler import keep_command_buffers, profile
from jaxmoe.request import Decode, FinishReason, Request, RequestError, SamplingParams
from server.settings import read_settings
from tools.client import Client, ProtocolError, ServerError, StreamRecord
from tools.environment import host_name, read_environment
from tools.launch import LaunchError, launch
from tools.recorder import record
from tools.roofline import COPY_SIZE, Weights, device_sizes, file_sizes, measure_bandwidth
from tools.target import Target

if TYPE_CHECKING:
    from jaxmoe.engine import Engine, Pending

Row = dict[str, Any]
Prompts = list[list[int]]
Figures = dict[str, float | None]

FIGURES = ("tok_per_s", "ttft_ms", "gap_ms_p50", "gap_ms_p95", "gap_ms_p99", "dispatch_us")
DERIVED = ("engine_share", "start_s", "gb_per_s", "device_gb_per_s", "floor_share")
WARM_TOKENS = 8
SMALL_CHUNK = 512  # tokens: planned with where the engine chooses; the streams then run longer, if anything
LONG = 8192  # tokens: longer prompts are measured on the engine alone
# The first token may be part of a character, whose text waits for the next ones.
TTFT_TOKENS = 8


class BenchError(Exception):
    """A row that cannot be measured; the message says what to change, or what went wrong."""


@dataclass(frozen=True)
class Asked:
    """A row to measure: `what` of KINDS, for so many streams with prompts of so many tokens."""

    what: str
    streams: int
    prompt_tokens: int


@dataclass(frozen=True)
class Plan:
    """What to measure: the rows, and which of STARTUPS; `goals` are looked up in what was found.

    `profile` is where traces of the decode rows go.
    """

    rows: tuple[Asked, ...]
    startups: tuple[str, ...]
    context: int | None
    new_tokens: int
    repeats: int
    goals: tuple[Goal, ...] = ()
    profile: Path | None = None

    @property
    def num_slots(self) -> int:
        return max((row.streams for row in self.rows), default=1)

    def needs(self, *, over_http: bool) -> bool:
        """Whether something is to be measured on this side of the socket."""
        kinds = [KINDS[row.what].over_http for row in self.rows] + [
            one == HTTP_STARTUP for one in self.startups
        ]
        return over_http in kinds


@dataclass(frozen=True)
class Goal:
    """A figure of one row that must be reached, and one that is aimed at; `at_most`: smaller is better."""

    what: str
    streams: int | None
    prompt_tokens: int | None
    figure: str
    must: float
    aim: float
    at_most: bool = False

    def met(self, found: float) -> str:
        """ "aim", "must" or "no"."""
        reached = [found <= bound if self.at_most else found >= bound for bound in (self.aim, self.must)]
        return "aim" if reached[0] else "must" if reached[1] else "no"


@dataclass(frozen=True)
class Case:
    """One row to measure; each stream is asked for `max_tokens` tokens."""

    what: str
    streams: int
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Room:
    """What an engine has room for, in tokens: one stream's context, and the cache of all streams."""

    context_length: int
    cache_length: int


@dataclass(frozen=True)
class Measured:
    """The figures of a case on an engine with a context of that length, or why there are none."""

    case: Case
    context_length: int
    figures: Figures
    failed: str | None = None


# --- From arrival times to figures.


@dataclass(frozen=True)
class Timed:
    """One stream: when it was asked for, and (time, number of tokens) of each arrival.

    Seconds of one clock. The engine delivers one token at a time; a chunk over HTTP may carry several.
    """

    sent: float
    arrivals: list[tuple[float, int]]

    @property
    def first(self) -> float:
        return self.arrivals[0][0]

    @property
    def ttft_ms(self) -> float:
        return 1000 * (self.first - self.sent)

    @property
    def gaps_ms(self) -> list[float]:
        return [1000 * (late - early) for (early, _), (late, _) in pairwise(self.arrivals)]

    @property
    def last(self) -> float:
        return self.arrivals[-1][0]

    @property
    def tok_per_s(self) -> float:
        return sum(count for _, count in self.arrivals[1:]) / (self.last - self.first)

    def between(self, start: float, end: float) -> Timed:
        """The stream with only the arrivals from `start` to `end`."""
        return replace(self, arrivals=[arrival for arrival in self.arrivals if start <= arrival[0] <= end])


def decode_figures(streams: Sequence[Timed], prompt_tokens: int) -> Figures:
    """While all streams decode: from the last stream's first token to the first stream's last one."""
    start = max(stream.first for stream in streams)
    end = min(stream.last for stream in streams)
    steady = [stream.between(start, end) for stream in streams]
    if any(not stream.arrivals or stream.first == stream.last for stream in steady):
        raise BenchError("the streams hardly ran at the same time; more --new-tokens may help")
    gaps = [gap for stream in steady for gap in stream.gaps_ms]
    return dict.fromkeys(FIGURES) | {
        # a rate each, so that it does not matter whose token of a step is the last one counted
        "tok_per_s": sum(stream.tok_per_s for stream in steady),
        "ttft_ms": median(stream.ttft_ms for stream in streams),
        "gap_ms_p50": float(np.percentile(gaps, 50)),
        "gap_ms_p95": float(np.percentile(gaps, 95)),
        "gap_ms_p99": float(np.percentile(gaps, 99)),
    }


def prefill_figures(streams: Sequence[Timed], prompt_tokens: int) -> Figures:
    """From the first request to the moment the last stream has its first token."""
    seconds = max(stream.first for stream in streams) - min(stream.sent for stream in streams)
    rate = len(streams) * prompt_tokens / seconds
    return {**ttft_figures(streams, prompt_tokens), "tok_per_s": rate}


def ttft_figures(streams: Sequence[Timed], prompt_tokens: int) -> Figures:
    """The time to the first token alone."""
    return dict.fromkeys(FIGURES) | {"ttft_ms": median(stream.ttft_ms for stream in streams)}


def medians(rounds: Sequence[Figures]) -> Figures:
    """Each figure's median over the repeats; None where it has no meaning."""
    by_name = {name: [found[name] for found in rounds] for name in FIGURES}
    known = {name: [value for value in values if value is not None] for name, values in by_name.items()}
    return {name: median(values) if values else None for name, values in known.items()}


# --- What can be measured.


@dataclass(frozen=True)
class Kind:
    """How one of `--what` is measured: over HTTP or not, for how many tokens, and what is read from it.

    `max_tokens` None means new_tokens while all streams decode; `token_size` takes weights, case and prefill
    chunk and gives the bytes to read for each token.
    """

    over_http: bool
    max_tokens: int | None
    figures: Callable[[Sequence[Timed], int], Figures]
    token_size: Callable[[Weights, Case, int], float] | None


def _decode_token_size(weights: Weights, case: Case, _: int) -> float:
    """Bytes to read for each token of a decode step."""
    return weights.step_size(case.streams) / case.streams


def _prefill_token_size(weights: Weights, case: Case, chunk: int) -> float:
    """Bytes to read for each token of a prompt."""
    return weights.prompt_size(case.prompt_tokens, chunk) / case.prompt_tokens


KINDS = {
    "decode": Kind(False, None, decode_figures, _decode_token_size),
    "prefill": Kind(False, 1, prefill_figures, _prefill_token_size),
    "http_decode": Kind(True, None, decode_figures, _decode_token_size),
    "http_ttft": Kind(True, TTFT_TOKENS, ttft_figures, None),
}
STARTUP, HTTP_STARTUP = STARTUPS = ("startup", "http_startup")
WHAT = (*KINDS, *STARTUPS)
DEFAULT_WHAT = (*KINDS, STARTUP)

# What the GPU path was built to reach on one H200 with the 30B file in Q4_K_M.
GOALS = (
    Goal("decode", 1, 512, "tok_per_s", 700, 1000),
    Goal("http_decode", 1, 512, "engine_share", 0.95, 0.99),
    Goal("decode", 8, 512, "tok_per_s", 2000, 3000),
    Goal("decode", 32, 512, "tok_per_s", 5000, 6500),
    Goal("http_decode", 32, 512, "engine_share", 0.90, 0.97),
    Goal("decode", 64, 512, "tok_per_s", 7500, 11_000),
    Goal("http_decode", 64, 512, "engine_share", 0.85, 0.95),
    Goal("decode", 1, 32_768, "tok_per_s", 385, 520),
    Goal("prefill", 1, 2048, "tok_per_s", 20_000, 40_000),
    Goal("http_ttft", 1, 512, "ttft_ms", 40, 25, at_most=True),
    Goal("http_startup", None, None, "start_s", 30, 15, at_most=True),
)


def plan_cases(plan: Plan, chunk: int, *, over_http: bool) -> list[Case]:
    """The rows to measure on one side of the socket; `chunk` is the engine's prefill_chunk."""
    return [
        Case(
            row.what,
            row.streams,
            row.prompt_tokens,
            KINDS[row.what].max_tokens or _decode_tokens(plan, row, chunk),
        )
        for row in plan.rows
        if KINDS[row.what].over_http == over_http
    ]


def _decode_tokens(plan: Plan, row: Asked, chunk: int) -> int:
    # A decode step follows each chunk of the other prompts: the first stream is ahead by so many.
    return plan.new_tokens + (row.streams - 1) * -(-row.prompt_tokens // chunk)


Run = Callable[[Prompts, int], list[Timed]]


Dispatch = Callable[[], float | None]


def measure(
    cases: Sequence[Case],
    run: Run,
    room: Room,
    *,
    vocab_size: int,
    repeats: int,
    dispatch: Dispatch = lambda: None,
) -> list[Measured]:
    """Measure each case, and say on the terminal what was found.

    `dispatch` gives the median microseconds of the decode launches since it was called last.
    """
    found = []
    for case in tqdm(cases, desc="measuring", unit="row", disable=None):  # a bar on a terminal only
        try:
            figures = _measure(case, run, room, dispatch, vocab_size=vocab_size, repeats=repeats)
            found.append(Measured(case, room.context_length, figures))
        except (BenchError, RequestError, ServerError, ProtocolError) as error:
            found.append(Measured(case, room.context_length, dict.fromkeys(FIGURES), failed=str(error)))
        tqdm.write(_shown(found[-1]))
    return found


def _measure(
    case: Case, run: Run, room: Room, dispatch: Dispatch, *, vocab_size: int, repeats: int
) -> Figures:
    _check_room(case, room)
    run(random_prompts(case, "warm", vocab_size), min(WARM_TOKENS, case.max_tokens))
    dispatch()
    rounds = []
    for i in range(repeats):
        streams = run(random_prompts(case, i, vocab_size), case.max_tokens)
        figures = KINDS[case.what].figures(streams, case.prompt_tokens)
        rounds.append({**figures, "dispatch_us": dispatch()})
    return medians(rounds)


def _shown(found: Measured) -> str:
    known = [f"{name} {value:.1f}" for name, value in found.figures.items() if value is not None]
    case = found.case
    return f"{case.what}, {case.streams} x {case.prompt_tokens} tokens: {found.failed or ', '.join(known)}"


def random_prompts(case: Case, salt: object, vocab_size: int) -> Prompts:
    """A prompt of random ids for each stream; the same ones for the same case and `salt`."""
    draw = Random(f"{case} {salt}")
    return [draw.choices(range(vocab_size), k=case.prompt_tokens) for _ in range(case.streams)]


def _check_room(case: Case, room: Room) -> None:
    length = case.prompt_tokens + case.max_tokens
    if length > room.context_length:
        raise BenchError(
            f"{case.what} needs a context of {length} tokens, the engine has {room.context_length}"
        )
    if case.streams * length > room.cache_length:
        needed = f"{case.streams} streams of {length} tokens"
        raise BenchError(f"{needed} do not fit a cache of {room.cache_length}; set JAXMOE_CACHE_SIZE")


# --- The engine alone.


def engine_alone(file: GGUFFile, engine_config: EngineConfig, plan: Plan) -> tuple[list[Measured], Row, int]:
    """Measure what needs no socket, on an engine of this process; also the startup's row and the chunk."""
    config = ModelConfig.from_gguf(file)
    with MemoryWatch() as memory:
        engine, seconds = _load(file, config, engine_config)
    try:
        startup = _startup_row(engine.context_length, seconds, memory.peak)
        steps: Any = engine._steps
        chunk: int = steps.shapes.prefill_chunk
        cases = plan_cases(plan, chunk, over_http=False)
        room = Room(engine.context_length, engine.stats().total_pages * engine_config.page_length)
        with timed_launches(engine) as dispatch:
            found = measure(
                cases, engine_run(engine), room,
                vocab_size=config.vocab_size, repeats=plan.repeats, dispatch=dispatch,
            )  # fmt: skip
        if plan.profile is not None:
            take_profiles(found, engine_run(engine), plan.profile, vocab_size=config.vocab_size)
    finally:
        engine.stop()
    return found, startup, chunk


def take_profiles(found: Sequence[Measured], run: Run, folder: Path, *, vocab_size: int) -> None:
    """Run each decode row that was measured once more, under JAX's profiler."""
    cases = [one.case for one in found if one.case.what == "decode" and one.failed is None]
    for case in cases:
        directory = folder / f"decode-{case.streams}x{case.prompt_tokens}"
        with profile(directory):
            run(random_prompts(case, "profile", vocab_size), case.max_tokens)
        print(f"a trace of {case.streams} x {case.prompt_tokens} tokens lies in {directory}", flush=True)


def _load(file: GGUFFile, config: ModelConfig, engine_config: EngineConfig) -> tuple[Engine, Row]:
    """The engine, and seconds until the weights were on the device and from there to the last compilation."""
    started = perf_counter()
    # Imported here: bringing JAX up is part of the load, and only one process can have a GPU's memory.
    from jaxmoe.engine import load_engine

    ended: dict[str, float] = {}
    bars = PhaseBars(lambda phase: print(phase, flush=True))

    def note(phase: str, share: float) -> None:
        ended[phase] = perf_counter()
        bars(phase, share)

    engine = load_engine(
        file, config, engine_config, eos_ids=frozenset(), after_step=lambda: None, progress=note
    )
    seconds = {
        "load_s": ended["loading"] - started,
        "compile_s": ended["compiling"] - ended["loading"],
    }
    return engine, {name: round(value, 3) for name, value in seconds.items()}


@contextmanager
def timed_launches(engine: Engine) -> Iterator[Dispatch]:
    """Time each launch of a decode step where the engine's thread makes it; the engine must be idle."""
    steps: Any = engine._steps
    seconds: list[float] = []

    def decode(step: Decode) -> Pending:
        started = perf_counter()
        pending: Pending = launched(step)
        seconds.append(perf_counter() - started)
        return pending

    def dispatch() -> float | None:
        taken, seconds[:] = list(seconds), []
        return 1e6 * median(taken) if taken else None

    launched, steps.decode = steps.decode, decode
    try:
        yield dispatch
    finally:
        del steps.decode


def engine_run(engine: Engine) -> Run:
    """Streams run by the engine itself, each token timed in its callback."""

    def run(prompts: Prompts, max_tokens: int) -> list[Timed]:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        ended: SimpleQueue[tuple[FinishReason, str | None]] = SimpleQueue()
        streams = [_submit(engine, prompt, params, ended) for prompt in prompts]
        for reason, message in [ended.get() for _ in streams]:
            if reason != "length":
                raise BenchError(f"a stream ended by {reason!r}: {message}")
        return streams

    return run


def _submit(
    engine: Engine,
    prompt: list[int],
    params: SamplingParams,
    ended: SimpleQueue[tuple[FinishReason, str | None]],
) -> Timed:
    stream = Timed(perf_counter(), [])

    def on_token(_: int) -> bool:
        stream.arrivals.append((perf_counter(), 1))
        return True

    def on_finish(reason: FinishReason, message: str | None) -> None:
        ended.put((reason, message))

    engine.submit(Request(tuple(prompt), params, on_token, on_finish=on_finish))
    return stream


# --- Through HTTP.


def through_http(
    path: Path, engine_config: EngineConfig, plan: Plan, *, vocab_size: int
) -> tuple[list[Measured], list[Row]]:
    """Serve the file from a real hypercorn process and measure at the socket; also the row of its start."""
    starts = []
    if HTTP_STARTUP in plan.startups:
        with served(path, engine_config):
            pass  # now the file and the compiled steps are in their caches
    started = perf_counter()
    with served(path, engine_config) as url:
        start_s = round(perf_counter() - started, 2)
        client = Client.from_url(url)
        room = asyncio.run(_server_room(client, engine_config.page_length))
        if HTTP_STARTUP in plan.startups:
            starts = [_empty_row(HTTP_STARTUP, None, None, room.context_length) | {"start_s": start_s}]
            print(f"{HTTP_STARTUP}: start_s {start_s}", flush=True)
        cases = plan_cases(plan, engine_config.prefill_chunk or SMALL_CHUNK, over_http=True)
        run = http_run(Target(client))
        return measure(cases, run, room, vocab_size=vocab_size, repeats=plan.repeats), starts


@contextmanager
def served(path: Path, engine_config: EngineConfig) -> Iterator[str]:
    """The URL of a server of this file, with as many slots and as long a context."""
    settings = {"JAXMOE_SLOTS": str(engine_config.num_slots)}
    if engine_config.context_length is not None:
        settings["JAXMOE_CONTEXT_LENGTH"] = str(engine_config.context_length)
    with (
        tempfile.TemporaryDirectory() as folder,
        launch("server:app", path, log=Path(folder) / "server.log", environment=settings) as url,
    ):
        yield url


async def _server_room(client: Client, page_length: int) -> Room:
    card = (await client.get("/v1/models"))["data"][0]
    health = await client.get("/health")
    return Room(int(card["max_model_len"]), int(health["total_pages"]) * page_length)


def http_run(target: Target) -> Run:
    """Streams of a server, each chunk timed as its bytes arrive."""

    def run(prompts: Prompts, max_tokens: int) -> list[Timed]:
        asks = [
            target.ask(prompt, stream=True, to_limit=True, max_tokens=max_tokens, temperature=0)
            for prompt in prompts
        ]
        return [_timed(found) for found in record(target.client, asks)]

    return run


def _timed(record: StreamRecord) -> Timed:
    if record.finish_reasons != ["length"] or not record.token_chunks:
        raise BenchError(f"a stream of {record.completion_tokens} tokens ended by {record.finish_reasons}")
    arrivals = [(record.sent + chunk.at, len(chunk.token_ids)) for chunk in record.token_chunks]
    return Timed(record.sent, arrivals)


# --- The machine.


class MemoryWatch(Thread):
    """Watches this process's anonymous memory; `peak` in bytes, None where the system does not tell."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: int | None = None
        self._ended = Event()

    def __enter__(self) -> MemoryWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while (size := _anonymous_size()) is not None:
            self.peak = max(size, self.peak or 0)
            if self._ended.wait(0.01):
                return


def _anonymous_size() -> int | None:
    """Bytes of RssAnon."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else None


def _device_size_in_use() -> int:
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("bytes_in_use") or sum(array.nbytes for array in jax.live_arrays()))


# --- The document.


def _startup_row(context_length: int, seconds: Row, peak: int | None) -> Row:
    import jax

    beside = ", the device's arrays among it" if jax.default_backend() == "cpu" else ""
    return {
        **_empty_row(STARTUP, None, None, context_length),
        **seconds,
        "host_peak_bytes": peak,
        "host_peak_is": "the highest RssAnon" + beside,
        "device_bytes": _device_size_in_use(),
    }


def _empty_row(what: str, streams: int | None, prompt_tokens: int | None, context: int) -> Row:
    key = {"what": what, "streams": streams, "prompt_tokens": prompt_tokens, "context": context}
    return {**key, **dict.fromkeys((*FIGURES, *DERIVED))}


def measured_row(
    found: Measured, *, in_file: Weights, on_device: Weights, chunk: int, bandwidth: float
) -> Row:
    """A row of the document; `bandwidth` in bytes per second, `chunk` the engine's prefill_chunk."""
    case, rate = found.case, found.figures["tok_per_s"]
    row = _empty_row(case.what, case.streams, case.prompt_tokens, found.context_length)
    row |= found.figures
    token_size = KINDS[case.what].token_size
    if token_size is not None and rate is not None:
        read = rate * token_size(in_file, case, chunk)
        row["gb_per_s"], row["floor_share"] = read / 1e9, read / bandwidth
        row["device_gb_per_s"] = rate * token_size(on_device, case, chunk) / 1e9
    row = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}
    return row | ({} if found.failed is None else {"failed": found.failed})


def bench(path: Path, plan: Plan) -> Row:
    """Measure the plan on a model file; returns {env, results, goals}."""
    file = read_gguf(path)
    config = ModelConfig.from_gguf(file)
    engine_config = _engine_config(plan)
    if plan.profile is not None and not keep_command_buffers():
        print("this XLA has no flag that keeps command buffers while profiling", file=sys.stderr)
    found: list[Measured] = []
    startup: list[Row] = []
    chunk = engine_config.prefill_chunk or SMALL_CHUNK
    # HTTP first: once this process has brought JAX up, a GPU has no memory left for the server's.
    if plan.needs(over_http=True):
        found, startup = through_http(path, engine_config, plan, vocab_size=config.vocab_size)
    if plan.needs(over_http=False):
        alone, row, chunk = engine_alone(file, engine_config, plan)
        found += alone
        startup += [row] if STARTUP in plan.startups else []
        gc.collect()  # the copies below need the memory that the engine had
    in_file, on_device = (Weights.from_sizes(sizes(file), config) for sizes in (file_sizes, device_sizes))
    bandwidth = measure_bandwidth(COPY_SIZE)
    rows = [
        measured_row(one, in_file=in_file, on_device=on_device, chunk=chunk, bandwidth=bandwidth)
        for one in found
    ]
    add_shares(rows)
    rows = sorted(rows + startup, key=lambda row: WHAT.index(row["what"]))
    env = _env(path, file, config, engine_config, plan, bandwidth)
    return {"env": env, "results": rows, "goals": goal_rows(plan.goals, rows)}


def add_shares(rows: Sequence[Row]) -> None:
    """Fill in how much of the engine's rate came through HTTP, where both were measured."""
    engine = {_key(row): row["tok_per_s"] for row in rows if row["what"] == "decode"}
    for row in rows:
        rate = engine.get(_key(row))
        if row["what"] == "http_decode" and rate and row["tok_per_s"]:
            row["engine_share"] = round(row["tok_per_s"] / rate, 4)


def _key(row: Row) -> tuple[int | None, int | None]:
    return row["streams"], row["prompt_tokens"]


def goal_rows(goals: Sequence[Goal], rows: Sequence[Row]) -> list[Row]:
    """Each goal with what was found and which bound that meets; None where nothing was found."""
    by_key = {(row["what"], *_key(row)): row for row in rows}
    found = []
    for goal in goals:
        value = by_key.get((goal.what, goal.streams, goal.prompt_tokens), {}).get(goal.figure)
        found.append({**asdict(goal), "found": value, "met": None if value is None else goal.met(value)})
    return found


def _engine_config(plan: Plan) -> EngineConfig:
    """The engine's settings: the environment's, but as many slots as streams and the plan's context."""
    given = read_settings(os.environ).engine
    return replace(
        given,
        num_slots=plan.num_slots,
        context_length=plan.context or given.context_length,
        compilation_cache=given.compilation_cache and STARTUP not in plan.startups,
    )


def _env(
    path: Path, file: GGUFFile, config: ModelConfig, engine_config: EngineConfig, plan: Plan, bandwidth: float
) -> Row:
    import jax

    environment = read_environment()
    return {
        "machine": host_name(environment),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment,
        "device": jax.devices()[0].device_kind,
        "model": path.name,
        "size": {
            "file_bytes": sum(file_sizes(file).values()),
            "device_bytes": sum(device_sizes(file).values()),
        },
        "shape": asdict(config),
        "engine": asdict(engine_config),
        "copy_gb_per_s": round(bandwidth / 1e9, 3),
        "new_tokens": plan.new_tokens,
        "repeats": plan.repeats,
        "sampling": "greedy",
    }


COLUMNS = {
    "what": "what",
    "streams": "streams",
    "prompt_tokens": "prompt",
    "context": "context",
    "tok_per_s": "tok/s",
    "ttft_ms": "ttft ms",
    "gap_ms_p50": "gap p50",
    "gap_ms_p95": "gap p95",
    "gap_ms_p99": "gap p99",
    "dispatch_us": "launch us",
    "engine_share": "of engine",
    "start_s": "start s",
    "gb_per_s": "GB/s",
    "floor_share": "floor",
}


def table(document: Row) -> str:
    """The document for the eye: one line a row, the machine above it."""
    env = document["env"]
    lines = [f"{env['model']} on {env['machine']}, copies at {env['copy_gb_per_s']} GB/s"]
    cells = [list(COLUMNS.values())]
    cells += [[_cell(row[name]) for name in COLUMNS] for row in document["results"]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines += [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
    ]
    lines += [_goal_line(goal) for goal in document["goals"]]
    startup: Row = next((row for row in document["results"] if row["what"] == STARTUP), {})
    lines += [
        f"{name}: {startup[name]}" for name in startup if name not in COLUMNS and startup[name] is not None
    ]
    return "\n".join(lines)


def _goal_line(goal: Row) -> str:
    what = f"{goal['what']}, {goal['streams']} x {goal['prompt_tokens']}" if goal["streams"] else goal["what"]
    bounds = f"must {goal['must']:g}, aim {goal['aim']:g}"
    return f"{what}: {goal['figure']} {_cell(goal['found'])} ({bounds}): {goal['met'] or 'not measured'}"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and value < 1 else str(value)


# --- The command line.


def _numbers(least: int) -> Callable[[str], tuple[int, ...]]:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(dict.fromkeys(_number(least)(part) for part in text.split(",")))

    return numbers


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a number of {least} or more, got {text!r}")
        return int(text)

    return number


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in WHAT]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(WHAT)}")
    return names


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    summary = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=summary)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument(
        "--goals", action="store_true", help="the rows that have goals; no other choice counts"
    )
    parser.add_argument("--what", type=_names, default=DEFAULT_WHAT, help=",".join(WHAT))
    parser.add_argument("--streams", type=_numbers(1), default=(1, 4, 8), help="streams at once, 1,4,8")
    parser.add_argument("--prompt-tokens", type=_numbers(1), default=(128, 512), help="lengths, 128,512")
    parser.add_argument("--context", type=_number(1), help="the engine's context length in tokens")
    parser.add_argument("--new-tokens", type=_number(4), default=128, help="while all streams decode")
    parser.add_argument("--repeats", type=_number(1), default=3)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="for traces of the decode rows")
    asked = parser.parse_args(argv)
    if asked.profile is not None and not asked.goals and "decode" not in asked.what:
        parser.error("--profile traces the rows of decode: --what has none")
    return asked


def _plan(asked: argparse.Namespace) -> Plan:
    how = {name: getattr(asked, name) for name in ("context", "new_tokens", "repeats", "profile")}
    if asked.goals:
        placed = [(g.what, g.streams or 1, g.prompt_tokens or 1) for g in GOALS if g.what in KINDS]
        # every rate through HTTP beside the engine's, also where no goal is set
        placed += [("http_decode", streams, length) for what, streams, length in placed if what == "decode"]
        rows = tuple(
            Asked(*place) for place in dict.fromkeys(placed) if place[2] < LONG or place[0] == "decode"
        )
        return Plan(rows, (HTTP_STARTUP,), **how, goals=GOALS)
    rows = tuple(
        Asked(what, streams, length)
        for what in asked.what
        if what in KINDS
        for streams in asked.streams
        for length in asked.prompt_tokens
    )
    return Plan(rows, tuple(what for what in asked.what if what in STARTUPS), **how)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    asked = _arguments(argv)
    out: Path | None = asked.out
    try:
        document = bench(asked.model, _plan(asked))
    except (BenchError, LaunchError, ServerError, ProtocolError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(document))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any("failed" in row for row in document["results"]) else 0


if __name__ == "__main__":
    sys.exit(main())
