"""One run of one gate: its requests, its verdict and the raw times it saw."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from tools.client import ProtocolError, Reply, ServerError, StreamRecord
from tools.contracts import Gate
from tools.target import Health, Prompt, Target

Verdict = Literal["passed", "failed", "not_run"]
SECONDS_A_GATE = 600.0


class GateFailed(Exception):
    """The server broke the gate: which `check` of it, and what was seen."""

    def __init__(self, check: str, evidence: str) -> None:
        super().__init__(evidence)
        self.check = check


class NotRun(Exception):
    """The gate could not be tried on this server; the message says why."""


@dataclass(frozen=True)
class Scale:
    """How much is measured: repeats of a timed stream, texts compared, disconnects under load."""

    repeats: int = 9
    texts: int = 4
    disconnects: int = 50


FULL = Scale()
RED = Scale(repeats=5, texts=2, disconnects=12)


@dataclass
class Samples:
    """Raw times of every whole stream of a trial, in milliseconds, and the most streams open at once."""

    prompt_tokens: list[int | None] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    gaps_ms: list[list[float]] = field(default_factory=list)
    concurrency: int = 0

    def add(self, record: StreamRecord) -> None:
        if record.token_chunks:
            self.prompt_tokens.append(record.prompt_tokens)
            self.ttft_ms.append(round(record.ttft_ms, 3))
            self.gaps_ms.append([round(gap, 3) for gap in record.gaps_ms])


@dataclass(frozen=True)
class Outcome:
    """A gate's verdict; `check` is the one that failed, "error" where the trial itself broke."""

    gate: Gate
    verdict: Verdict
    evidence: str
    samples: Samples
    seconds: float
    check: str | None = None


@dataclass
class Trial:
    """What a gate's function gets: the server, the gate's thresholds, the scale, and a place for samples."""

    target: Target
    gate: Gate
    scale: Scale
    samples: Samples = field(default_factory=Samples)
    _open: int = 0

    @property
    def limits(self) -> Mapping[str, Any]:
        return self.gate.thresholds

    def expect(self, holds: bool, check: str, evidence: str) -> None:
        """Fail the gate by `check` unless it `holds`."""
        assert check in self.gate.checks, check
        if not holds:
            raise GateFailed(check, evidence)

    async def stream(
        self, prompt: Prompt, *, record: StreamRecord | None = None, stop_after: int = 0, **fields: Any
    ) -> StreamRecord:
        """A whole stream, its times kept as samples (or its start only, with `stop_after` token chunks)."""
        self._open += 1
        self.samples.concurrency = max(self.samples.concurrency, self._open)
        try:
            asked = self.target.ask(prompt, stream=True, **fields)
            found = await self.target.client.stream(asked, record, stop_after)
        finally:
            self._open -= 1
        self.samples.add(found)
        return found

    async def complete(self, prompt: Prompt, **fields: Any) -> Reply:
        """A response in one piece."""
        return await self.target.client.complete(self.target.ask(prompt, stream=False, **fields))

    @asynccontextmanager
    async def crowd(self) -> AsyncIterator[Crowd]:
        """Streams that run beside each other; those still open at the end are disconnected."""
        crowd = Crowd(self)
        try:
            yield crowd
        finally:
            await crowd.disconnect()

    async def until(self, wanted: Callable[[Health], bool], bound_ms: float) -> tuple[float, Health]:
        """Poll /health until it is as `wanted` or asked after `bound_ms`: milliseconds, and what it said."""
        clock = asyncio.get_running_loop()
        started = clock.time()
        while True:
            asked = 1000 * (clock.time() - started)
            health = await self.target.health()
            if wanted(health) or asked > bound_ms:
                return 1000 * (clock.time() - started), health
            await asyncio.sleep(0.002)

    async def expect_idle(self, check: str, step_ms: float) -> str:
        """Fail unless the engine is idle within the gate's `steps` of `step_ms`, plus its allowance."""
        bound = self.limits["steps"] * step_ms + self.limits["allowance_ms"]
        waited, health = await self.until(lambda health: health.idle, bound)
        self.expect(health.idle, check, f"{bound:.0f} ms after the client had gone: {health}")
        return f"all free after {waited:.1f} ms (a step is {step_ms:.1f} ms)"


class Crowd:
    """Streams opened one after another and running at once."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self.records: list[StreamRecord] = []
        self.tasks: list[asyncio.Task[StreamRecord]] = []

    def open(self, prompt: Prompt, **fields: Any) -> asyncio.Task[StreamRecord]:
        record = StreamRecord()
        task = asyncio.create_task(self._trial.stream(prompt, record=record, **fields))
        self.records.append(record)
        self.tasks.append(task)
        return task

    async def finished(self) -> list[StreamRecord]:
        """All of them, to their ends."""
        return list(await asyncio.gather(*self.tasks))

    async def disconnect(self, task: asyncio.Task[StreamRecord] | None = None) -> None:
        """Close the connection of `task`, or of all, whatever state they are in."""
        leaving = self.tasks if task is None else [task]
        for one in leaving:
            one.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)

    @property
    def step_ms(self) -> float:
        """Milliseconds a token: the median over the streams that have begun."""
        begun = [record.step_ms for record in self.records if len(record.token_chunks) > 1]
        return median(begun) if begun else 0.0


Check = Callable[[Trial], Any]


async def run_gate(target: Target, gate: Gate, scale: Scale, check: Check) -> Outcome:
    """Try one gate. Whatever goes wrong is a verdict, never an exception."""
    clock = asyncio.get_running_loop()
    started = clock.time()
    trial = Trial(target, gate, scale)

    def outcome(verdict: Verdict, evidence: str, failed: str | None = None) -> Outcome:
        seconds = round(clock.time() - started, 3)
        return Outcome(gate, verdict, evidence, trial.samples, seconds, failed)

    missing = [f"{need} ({target.lacks[need]})" for need in gate.needs if need in target.lacks]
    if missing:
        return outcome("not_run", "the server lacks " + "; ".join(missing))
    try:
        async with asyncio.timeout(SECONDS_A_GATE):
            return outcome("passed", await check(trial))
    except GateFailed as error:
        return outcome("failed", str(error), error.check)
    except NotRun as error:
        return outcome("not_run", str(error))
    except (ServerError, ProtocolError, OSError, TimeoutError) as error:
        return outcome("failed", f"{type(error).__name__}: {error}", "error")
