"""Measure startup, prefill, decode and time to first token: the engine alone, and through HTTP.

`python -m tools.bench MODEL.gguf [--what decode,prefill,http_decode,http_ttft,startup] [--streams 1,4,8]
[--prompt-tokens 128,512] [--context N] [--new-tokens N] [--repeats N] [--out FILE.json]`

Every figure is the median over the repeats. Prompts are random ids, others for each stream and each repeat; a
first round with few tokens warms up and is not counted. Sampling is greedy and goes on past end tokens. Other
settings of the engine come from the environment (JAXMOE_CACHE_SIZE ...), as they do for the server.

- decode, http_decode: tokens per second of all streams together, and milliseconds between a stream's tokens,
  while all streams decode; ttft_ms is from the same streams.
- prefill: prompt tokens per second until every stream has its first token; http_ttft: that time alone.
- startup: the load in this process, with JAX's own start in load_s; compile_s is without the persistent
  compilation cache, unless JAX_COMPILATION_CACHE_DIR names one; host_peak_bytes is the highest RssAnon, read
  every 10 ms (VmHWM would count the mapped file's pages, which are the page cache's); device_bytes is what
  the device says is in use, or the size of all live arrays where it does not say.
- gb_per_s: bytes of weights, as in the file, that the steps must read, per second; device_gb_per_s: the same
  weights in the device's format. KV cache and activations are left out. B tokens are expected to meet
  E * (1 - (1 - A/E)^B) experts a layer. floor_share is gb_per_s over the speed of a large copy (bytes read
  plus written, measured in the same run): 1 is the floor. Long prompts are bound by arithmetic, not by this.
- context is the longest context that the engine was built for, not what a stream had in its cache.

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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

from jaxmoe.config import EngineConfig, ModelConfig
from jaxmoe.gguf import GGUFFile, read_gguf
from jaxmoe.quants import device_size
from jaxmoe.request import FinishReason, Request, RequestError, SamplingParams
from server.settings import read_settings
from tools.client import Client, ProtocolError, ServerError, StreamRecord
from tools.environment import host_name, read_environment
from tools.launch import LaunchError, launch
from tools.target import Target

if TYPE_CHECKING:
    from jaxmoe.engine import Engine

Row = dict[str, Any]
Prompts = list[list[int]]
Figures = dict[str, float | None]

FIGURES = ("tok_per_s", "ttft_ms", "gap_ms_p50", "gap_ms_p95")
COPY_SIZE = 512 << 20  # bytes: more than any cache holds
COPIES = 10
WARM_TOKENS = 8
# The first token may be part of a character, whose text waits for the next ones.
TTFT_TOKENS = 8


class BenchError(Exception):
    """A row that cannot be measured; the message says what to change, or what went wrong."""


@dataclass(frozen=True)
class Plan:
    """What to measure: each of `what` for each number of streams and each length of prompt."""

    what: tuple[str, ...]
    streams: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    context: int | None
    new_tokens: int
    repeats: int


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


# --- The weights that a step reads.


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights, by how a step reads them.

    `whole`: attention, router and norms; `experts`: all experts of all layers; `output`: the output matrix;
    `embedding_row`: what one token looks up. `active_share` is A/E.
    """

    whole: float
    experts: float
    output: float
    embedding_row: float
    active_share: float

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, int], config: ModelConfig) -> Weights:
        """From the bytes of each tensor, by its name in the file."""
        embedding = sizes["token_embd.weight"]
        output = sizes.get("output.weight")
        experts = sum(size for name, size in sizes.items() if "_exps." in name)
        return cls(
            whole=sum(sizes.values()) - experts - embedding - (output or 0),
            experts=experts,
            output=embedding if output is None else output,
            embedding_row=embedding / config.vocab_size,
            active_share=config.experts_per_token / config.num_experts,
        )

    def step_size(self, num_tokens: int, *, samples: bool = True) -> float:
        """Bytes that one step over `num_tokens` tokens is expected to read, each weight once."""
        distinct = 1 - (1 - self.active_share) ** num_tokens
        read = self.whole + distinct * self.experts + num_tokens * self.embedding_row
        return read + self.output if samples else read

    def prompt_size(self, prompt_tokens: int, chunk: int) -> float:
        """Bytes that the prefill of one prompt reads, in chunks of `chunk` tokens."""
        starts = range(0, prompt_tokens, chunk)
        lengths = [min(chunk, prompt_tokens - start) for start in starts]
        return sum(self.step_size(length, samples=False) for length in lengths) + self.output

    def decode_token_size(self, case: Case, _: int) -> float:
        """Bytes to read for each token of a decode step."""
        return self.step_size(case.streams) / case.streams

    def prefill_token_size(self, case: Case, chunk: int) -> float:
        """Bytes to read for each token of a prompt."""
        return self.prompt_size(case.prompt_tokens, chunk) / case.prompt_tokens


def file_sizes(file: GGUFFile) -> dict[str, int]:
    """Bytes of each tensor in the file."""
    return {tensor.name: tensor.size for tensor in file.tensors.values()}


def device_sizes(file: GGUFFile) -> dict[str, int]:
    """Bytes of each tensor in the device's format."""
    return {tensor.name: device_size(tensor.ggml_type, tensor.shape) for tensor in file.tensors.values()}


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
    return {
        # a rate each, so that it does not matter whose token of a step is the last one counted
        "tok_per_s": sum(stream.tok_per_s for stream in steady),
        "ttft_ms": median(stream.ttft_ms for stream in streams),
        "gap_ms_p50": float(np.percentile(gaps, 50)),
        "gap_ms_p95": float(np.percentile(gaps, 95)),
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


KINDS = {
    "decode": Kind(False, None, decode_figures, Weights.decode_token_size),
    "prefill": Kind(False, 1, prefill_figures, Weights.prefill_token_size),
    "http_decode": Kind(True, None, decode_figures, Weights.decode_token_size),
    "http_ttft": Kind(True, TTFT_TOKENS, ttft_figures, None),
}
STARTUP = "startup"
WHAT = (*KINDS, STARTUP)


def plan_cases(plan: Plan, chunk: int, *, over_http: bool) -> list[Case]:
    """The rows to measure on one side of the socket; `chunk` is the engine's prefill_chunk."""
    names = [name for name in plan.what if name in KINDS and KINDS[name].over_http == over_http]
    return [
        Case(name, streams, length, KINDS[name].max_tokens or _decode_tokens(plan, streams, length, chunk))
        for name in names
        for streams in plan.streams
        for length in plan.prompt_tokens
    ]


def _decode_tokens(plan: Plan, streams: int, prompt_tokens: int, chunk: int) -> int:
    # A decode step follows each chunk of the other prompts: the first stream is ahead by so many.
    return plan.new_tokens + (streams - 1) * -(-prompt_tokens // chunk)


Run = Callable[[Prompts, int], list[Timed]]


def measure(cases: Sequence[Case], run: Run, room: Room, *, vocab_size: int, repeats: int) -> list[Measured]:
    """Measure each case, and say on the terminal what was found."""
    found = []
    for case in cases:
        try:
            figures = _measure(case, run, room, vocab_size=vocab_size, repeats=repeats)
            found.append(Measured(case, room.context_length, figures))
        except (BenchError, RequestError, ServerError, ProtocolError) as error:
            found.append(Measured(case, room.context_length, dict.fromkeys(FIGURES), failed=str(error)))
        print(_shown(found[-1]), flush=True)
    return found


def _measure(case: Case, run: Run, room: Room, *, vocab_size: int, repeats: int) -> Figures:
    _check_room(case, room)
    run(random_prompts(case, "warm", vocab_size), min(WARM_TOKENS, case.max_tokens))
    rounds = []
    for i in range(repeats):
        streams = run(random_prompts(case, i, vocab_size), case.max_tokens)
        rounds.append(KINDS[case.what].figures(streams, case.prompt_tokens))
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


def engine_alone(file: GGUFFile, engine_config: EngineConfig, plan: Plan) -> tuple[list[Measured], Row]:
    """Load the model in this process and measure what needs no socket; also the row of the startup."""
    config = ModelConfig.from_gguf(file)
    with MemoryWatch() as memory:
        engine, seconds = _load(file, config, engine_config)
    try:
        startup = _startup_row(engine.context_length, seconds, memory.peak)
        cases = plan_cases(plan, engine_config.prefill_chunk, over_http=False)
        room = Room(engine.context_length, engine.stats().total_pages * engine_config.page_length)
        run = engine_run(engine)
        found = measure(cases, run, room, vocab_size=config.vocab_size, repeats=plan.repeats)
    finally:
        engine.stop()
    return found, startup


def _load(file: GGUFFile, config: ModelConfig, engine_config: EngineConfig) -> tuple[Engine, Row]:
    """The engine, and seconds until the weights were on the device and from there to the last compilation."""
    started = perf_counter()
    # Imported here: bringing JAX up is part of the load, and only one process can have a GPU's memory.
    from jaxmoe.engine import load_engine

    ended: dict[str, float] = {}

    def note(phase: str, _: float) -> None:
        ended[phase] = perf_counter()

    engine = load_engine(
        file, config, engine_config, eos_ids=frozenset(), after_step=lambda: None, progress=note
    )
    seconds = {
        "load_s": ended["loading"] - started,
        "compile_s": ended["compiling"] - ended["loading"],
    }
    return engine, {name: round(value, 3) for name, value in seconds.items()}


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


def through_http(path: Path, engine_config: EngineConfig, plan: Plan, *, vocab_size: int) -> list[Measured]:
    """Serve the file from a real hypercorn process and measure at the socket."""
    cases = plan_cases(plan, engine_config.prefill_chunk, over_http=True)
    settings = {"JAXMOE_SLOTS": str(engine_config.num_slots)}
    if engine_config.context_length is not None:
        settings["JAXMOE_CONTEXT_LENGTH"] = str(engine_config.context_length)
    with (
        tempfile.TemporaryDirectory() as folder,
        launch("server:app", path, log=Path(folder) / "server.log", environment=settings) as url,
    ):
        client = Client.from_url(url)
        room = asyncio.run(_server_room(client, engine_config.page_length))
        run = http_run(Target(client))
        return measure(cases, run, room, vocab_size=vocab_size, repeats=plan.repeats)


async def _server_room(client: Client, page_length: int) -> Room:
    card = (await client.get("/v1/models"))["data"][0]
    health = await client.get("/health")
    return Room(int(card["max_model_len"]), int(health["total_pages"]) * page_length)


def http_run(target: Target) -> Run:
    """Streams of a server, each chunk timed as its bytes arrive."""

    async def streams(prompts: Prompts, max_tokens: int) -> list[StreamRecord]:
        asks = [
            target.ask(prompt, stream=True, to_limit=True, max_tokens=max_tokens, temperature=0)
            for prompt in prompts
        ]
        return await asyncio.gather(*(target.client.stream(ask) for ask in asks))

    return lambda prompts, max_tokens: [_timed(found) for found in asyncio.run(streams(prompts, max_tokens))]


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


def measure_bandwidth(size: int) -> float:
    """Bytes per second, read plus written, of the fastest of a few large copies where the weights lie."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    copy = _host_copy(size) if on_cpu else _device_copy(size)
    copy()
    seconds = []
    for _ in range(COPIES):
        started = perf_counter()
        num_copies = copy()
        seconds.append((perf_counter() - started) / num_copies)
    return 2 * size / min(seconds)


def _host_copy(size: int) -> Callable[[], int]:
    """A copy by all cores; returns how many copies it made."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source = np.array_split(np.ones(size, np.uint8), threads)
    target = np.array_split(np.zeros(size, np.uint8), threads)

    def copy() -> int:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(np.copyto, target, source))
        return 1

    return copy


def _device_copy(size: int, num_copies: int = 20) -> Callable[[], int]:
    """Copies launched one after the other, so that the launch is hidden; returns how many."""
    import jax
    import jax.numpy as jnp

    source = jnp.zeros(size // 4, jnp.uint32)
    # XLA could leave a plain copy out
    add_one = jax.jit(lambda x: x + jnp.uint32(1))

    def copy() -> int:
        x = source
        for _ in range(num_copies):
            x = add_one(x)
        x.block_until_ready()
        return num_copies

    return copy


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
    return {**key, **dict.fromkeys((*FIGURES, "gb_per_s", "device_gb_per_s", "floor_share"))}


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
    """Measure the plan on a model file; returns {env, results}."""
    file = read_gguf(path)
    config = ModelConfig.from_gguf(file)
    engine_config = _engine_config(plan)
    found: list[Measured] = []
    startup: list[Row] = []
    # HTTP first: once this process has brought JAX up, a GPU has no memory left for the server's.
    if any(name.startswith("http_") for name in plan.what):
        found += through_http(path, engine_config, plan, vocab_size=config.vocab_size)
    if any(not name.startswith("http_") for name in plan.what):
        alone, row = engine_alone(file, engine_config, plan)
        found += alone
        startup = [row] if STARTUP in plan.what else []
        gc.collect()  # the copies below need the memory that the engine had
    in_file, on_device = (Weights.from_sizes(sizes(file), config) for sizes in (file_sizes, device_sizes))
    bandwidth = measure_bandwidth(COPY_SIZE)
    chunk = engine_config.prefill_chunk
    rows = [
        measured_row(one, in_file=in_file, on_device=on_device, chunk=chunk, bandwidth=bandwidth)
        for one in found
    ]
    rows = sorted(rows + startup, key=lambda row: WHAT.index(row["what"]))
    return {"env": _env(path, file, config, engine_config, plan, bandwidth), "results": rows}


def _engine_config(plan: Plan) -> EngineConfig:
    """The engine's settings: the environment's, but as many slots as streams and the plan's context."""
    given = read_settings(os.environ).engine
    return replace(
        given,
        num_slots=max(plan.streams),
        context_length=plan.context or given.context_length,
        compilation_cache=given.compilation_cache and STARTUP not in plan.what,
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
    startup: Row = next((row for row in document["results"] if row["what"] == STARTUP), {})
    lines += [
        f"{name}: {startup[name]}" for name in startup if name not in COLUMNS and startup[name] is not None
    ]
    return "\n".join(lines)


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
    parser.add_argument("--what", type=_names, default=WHAT, help=",".join(WHAT))
    parser.add_argument("--streams", type=_numbers(1), default=(1, 4, 8), help="streams at once, 1,4,8")
    parser.add_argument("--prompt-tokens", type=_numbers(1), default=(128, 512), help="lengths, 128,512")
    parser.add_argument("--context", type=_number(1), help="the engine's context length in tokens")
    parser.add_argument("--new-tokens", type=_number(4), default=64, help="while all streams decode")
    parser.add_argument("--repeats", type=_number(1), default=3)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = vars(_arguments(argv))
    path, out = arguments.pop("model"), arguments.pop("out")
    try:
        document = bench(path, Plan(**arguments))
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
