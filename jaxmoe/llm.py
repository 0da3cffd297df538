"""Text in, text out: a model file's tokenizer and chat template around the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from queue import SimpleQueue
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from jaxmoe.chat import ChatTemplate
from jaxmoe.config import EngineConfig, ModelConfig
from jaxmoe.gguf import GGUFFile, read_gguf
from jaxmoe.request import (
    EngineStats,
    FinishReason,
    Request,
    RequestError,
    SamplingParams,
    TokenLogprobs,
)
from jaxmoe.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from jaxmoe.engine import Engine

logger = logging.getLogger(__name__)

Loop = asyncio.AbstractEventLoop

MAX_UNREAD_EVENTS: Final = 4096

_SAMPLING_KEYS: Final = (
    ("temperature", "general.sampling.temp"),
    ("top_k", "general.sampling.top_k"),
    ("top_p", "general.sampling.top_p"),
    ("min_p", "general.sampling.min_p"),
    ("repetition_penalty", "general.sampling.penalty_repeat"),
)


@dataclass(slots=True)
class Event:
    """Text that became complete, and the ids that carry it.

    Ids whose text is held (an unfinished character, a possible stop string) ride on the event that
    releases them. The last event of a choice has `finish_reason`, no text, and the ids that gave none,
    such as the end token. `starts` says for each id where its text begins, in characters from the start
    of the choice's text; `logprobs` is empty or has one entry an id; `index` is the choice's; `error`
    says why a generation was cancelled or failed. Not frozen, which makes it three times as quick to make.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    index: int = 0
    starts: tuple[int, ...] = ()


class StopMatcher:
    """Finds the first of several strings in text that comes in pieces.

    Source: Knuth, Morris and Pratt, "Fast pattern matching in strings", 1977.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._patterns = [(text, _border_lengths(text)) for text in stop]
        self._matched = [0] * len(stop)
        self._num_seen = 0

    @property
    def held(self) -> int:
        """Characters at the end of the text so far that a stop string may begin with."""
        return max(self._matched, default=0)

    def push(self, text: str) -> int | None:
        """Where a stop string begins that `text` completes, in characters from the start; None if none."""
        if not self._patterns:
            return None
        for character in text:
            self._num_seen += 1
            lengths = [self._advance(i, character) for i in range(len(self._patterns))]
            if longest := max(lengths):
                return self._num_seen - longest
        return None

    def _advance(self, i: int, character: str) -> int:
        """The length of pattern `i` if it is complete now, else 0."""
        pattern, borders = self._patterns[i]
        matched = self._matched[i]
        while matched and pattern[matched] != character:
            matched = borders[matched - 1]
        matched += pattern[matched] == character
        self._matched[i] = matched if matched < len(pattern) else borders[matched - 1]
        return matched if matched == len(pattern) else 0


def _border_lengths(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    lengths = [0] * len(pattern)
    matched = 0
    for i in range(1, len(pattern)):
        while matched and pattern[i] != pattern[matched]:
            matched = lengths[matched - 1]
        matched += pattern[i] == pattern[matched]
        lengths[i] = matched
    return lengths


class Transcript:
    """Turns one choice's ids into events; all of it runs on the engine's thread.

    Text is released in whole tokens, as soon as it is complete and cannot be part of a stop string.
    """

    def __init__(
        self,
        stream: TextStream,
        params: SamplingParams,
        *,
        end_ids: frozenset[int],
        emit: Callable[[Event], None],
        index: int = 0,
    ) -> None:
        self._stream = stream
        self._matcher = StopMatcher(params.stop)
        self._may_stop = bool(params.stop)
        self._end_ids = frozenset[int]() if params.ignore_eos else end_ids
        self._emit = emit
        self._index = index
        self._text = ""  # complete, not yet released
        self._released = 0  # characters
        self._pending: deque[tuple[int, int, TokenLogprobs | None]] = deque()  # id, start, logprobs
        self._logprobs: TokenLogprobs | None = None
        self.stopped = False

    def on_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Keep the log probabilities of the id that comes next."""
        self._logprobs = logprobs

    def on_token(self, token_id: int) -> bool:
        """Take one id; False once a stop string is complete."""
        if token_id in self._end_ids:
            self._add_text(self._stream.finish())
            self._add_id(token_id)
            return not self.stopped
        text = self._stream.push(token_id)
        if text and not (self._may_stop or self._pending):
            self._emit_alone(token_id, text)
            return True
        self._add_id(token_id)
        self._add_text(text)
        return not self.stopped

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """Release what is left and say why the choice ended; called once, last."""
        self._add_text(self._stream.finish())
        self._release(self._released + len(self._text))
        ids, starts, logprobs = self._take_ids(before=None)
        if self.stopped and reason == "length":
            reason = "stop"
        self._emit(Event("", ids, logprobs, reason, error, self._index, starts))

    def _emit_alone(self, token_id: int, text: str) -> None:
        """A short cut for a token with whole text of its own, as nearly all have."""
        start = self._released
        self._released = start + len(text)
        logprobs: tuple[TokenLogprobs, ...] = ()
        if self._logprobs is not None:
            logprobs, self._logprobs = (self._logprobs,), None
        self._emit(Event(text, (token_id,), logprobs, None, None, self._index, (start,)))

    def _add_id(self, token_id: int) -> None:
        self._pending.append((token_id, self._released + len(self._text), self._logprobs))
        self._logprobs = None

    def _add_text(self, text: str) -> None:
        if not text or self.stopped:
            return
        self._text += text
        cut = self._matcher.push(text)
        if cut is not None:
            self._text = self._text[: cut - self._released]
            self.stopped = True
            return
        end = self._released + len(self._text)
        if held := self._matcher.held:
            end = max(start for _, start, _ in self._pending if start <= end - held)
        self._release(end)

    def _release(self, end: int) -> None:
        text = self._text[: end - self._released]
        if not text:
            return
        self._text = self._text[len(text) :]
        self._released = end
        ids, starts, logprobs = self._take_ids(before=end)
        self._emit(Event(text, ids, logprobs, index=self._index, starts=starts))

    def _take_ids(
        self, *, before: int | None
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[TokenLogprobs, ...]]:
        taken = []
        while self._pending and (before is None or self._pending[0][1] < before):
            taken.append(self._pending.popleft())
        end = self._released
        return (
            tuple(token_id for token_id, _, _ in taken),
            tuple(min(start, end) for _, start, _ in taken),
            tuple(logprobs for _, _, logprobs in taken if logprobs is not None),
        )


@dataclass(frozen=True)
class Timings:
    """What a generation took: lengths in tokens, times in seconds.

    The prompt's time runs from submission to the first token, so it holds the time in the queue; the
    predicted tokens' time runs from the first token to the last.
    """

    cached_length: int
    prompt_length: int
    prompt_seconds: float
    predicted_length: int
    predicted_seconds: float


class _Bell:
    """Wakes the one task that waits for it, on its event loop.

    An asyncio.Event under asyncio.timeout does the same, but sets a timer for each wait, and so for each
    token; here one timer serves many waits, and is set again when it goes off too early for the wait then.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._until: float | None = None

    def ring(self) -> None:
        self._end_wait(True)

    async def wait(self, seconds: float | None) -> bool:
        """True when it rings, False when it has not in `seconds`."""
        self._waiting = self._loop.create_future()
        self._until = None if seconds is None else self._loop.time() + seconds
        self._set_timer()
        try:
            return await self._waiting
        finally:
            self._waiting = None

    def close(self) -> None:
        """Leave nothing behind on the event loop."""
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self) -> None:
        if self._until is None or (self._timer is not None and self._timer.when() <= self._until):
            return
        self.close()
        self._timer = self._loop.call_at(self._until, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._waiting is None or self._until is None:
            return
        if self._loop.time() < self._until:
            self._set_timer()
        else:
            self._end_wait(False)

    def _end_wait(self, rang: bool) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(rang)


class Generation:
    """The choices of one request and the one mailbox that their events arrive in.

    Made by LLM.submit. Events are put in on the engine's thread and taken out on the event loop.
    """

    def __init__(self, prompt_ids: tuple[int, ...], *, num_choices: int, engine: Engine, loop: Loop) -> None:
        self.prompt_ids = prompt_ids
        self.num_choices = num_choices
        self._engine = engine
        self._loop = loop
        self._request_ids: list[int] = []
        self._mailbox: deque[Event] = deque()
        self._bell = _Bell(loop)
        self._num_unfinished = num_choices
        self._cancelled: str | None = None
        self._submitted = time.perf_counter()
        self._first_token = self._last_token = self._submitted
        self._num_tokens = 0

    @property
    def finished(self) -> bool:
        """True once the last event of every choice was taken out."""
        return self._num_unfinished == 0

    @property
    def timings(self) -> Timings:
        """The times up to now, over all choices."""
        return Timings(
            cached_length=0,
            prompt_length=len(self.prompt_ids),
            prompt_seconds=self._first_token - self._submitted,
            predicted_length=self._num_tokens,
            predicted_seconds=self._last_token - self._first_token,
        )

    def cancel(self, reason: str = "cancelled") -> None:
        """End every choice within one step; safe from any thread, any number of times."""
        if self.finished:
            return
        if self._cancelled is None:
            self._cancelled = reason
        for request_id in tuple(self._request_ids):
            self._engine.cancel(request_id)

    async def next_events(self, seconds: float | None = None) -> list[Event]:
        """Every event that has arrived; waits for the first, and gives [] after `seconds` without any.

        Other tasks get a turn in any case.
        """
        assert not self.finished, "every event was taken out"
        if self._mailbox:
            await asyncio.sleep(0)
        while not self._mailbox:
            if not await self._bell.wait(seconds):
                return []
        events = [self._mailbox.popleft() for _ in range(len(self._mailbox))]
        for event in events:
            self._num_unfinished -= event.finish_reason is not None
        if self.finished:
            self._bell.close()
        return events

    def _put(self, event: Event) -> None:
        self._mailbox.append(event)
        if len(self._mailbox) > MAX_UNREAD_EVENTS and self._cancelled is None:
            self._cancelled = "the client reads too slowly"

    def _wake(self) -> None:
        self._bell.ring()

    def _count_token(self) -> bool:
        """Note the time of a sampled id; False for a cancelled generation, whose ids are dropped."""
        if self._cancelled is not None:
            return False
        self._last_token = time.perf_counter()
        if self._num_tokens == 0:
            self._first_token = self._last_token
        self._num_tokens += 1
        return True

    def _finish(self, transcript: Transcript, reason: FinishReason, error: str | None) -> None:
        if self._cancelled is not None:
            reason, error = "cancelled", self._cancelled
        transcript.finish(reason, error)


@dataclass(frozen=True)
class GenerateResult:
    """A finished generation: every sampled id, the end token too, and their text."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


def _ignore_progress(_: str, __: float) -> None:
    return None


class LLM:
    """A loaded model: text or ids in, text and ids out as they are sampled.

    The constructor loads and compiles in the caller's thread, which takes long; `progress(phase,
    fraction)` is told how far it is, and may raise to give up. Raises GGUFError for a file that cannot
    be served.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        engine_config: EngineConfig | None = None,
        progress: Callable[[str, float], None] = _ignore_progress,
    ) -> None:
        progress("loading", 0.0)
        file = read_gguf(path)
        self.config = ModelConfig.from_gguf(file)
        self.tokenizer = Tokenizer.from_gguf(file)
        self.sampling_defaults = read_sampling_defaults(file)
        self._template = ChatTemplate.from_gguf(file, self.tokenizer)
        self._fresh: dict[Generation, None] = {}
        self._on_stopped: Callable[[], None] | None = None
        self.model_id = self.config.name
        self.created = int(time.time())
        # Imported here: until a model is loaded nothing needs JAX, which takes seconds to import.
        from jaxmoe.engine import load_engine

        self._engine = load_engine(
            file,
            self.config,
            engine_config or EngineConfig(),
            eos_ids=self.tokenizer.eos_ids,
            after_step=self._after_step,
            progress=progress,
        )
        try:
            progress("ready", 1.0)
        except BaseException:
            self.close()  # else its thread would outlive an object that nobody has
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, seconds: float = 10.0) -> bool:
        """Stop the engine; what still runs ends as cancelled. False if `seconds` were not enough."""
        return self._engine.stop(seconds)

    def when_stopped(self, on_stopped: Callable[[], None]) -> None:
        """Have `on_stopped` called once the engine takes no more requests: on its thread, or here if now.

        It may be called more than once, and must not block.
        """
        self._on_stopped = on_stopped
        if self._engine.has_stopped:
            on_stopped()

    @property
    def context_length(self) -> int:
        """The most tokens that a prompt and its completion may have together."""
        return self._engine.context_length

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._engine.vocab_size

    def stats(self) -> EngineStats:
        """Requests running and waiting, cache pages free and in all."""
        return self._engine.stats()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        return self.tokenizer.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """A token's bytes as text, invalid UTF-8 replaced."""
        return self.tokenizer.token_text(token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt, control tokens in it parsed, the file's BOS before it if it has one."""
        ids = self.tokenizer.encode(text, parse_special=True)
        bos_id = self.tokenizer.bos_id if self.tokenizer.add_bos else None
        return ids if bos_id is None or ids[:1] == [bos_id] else [bos_id, *ids]

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
    ) -> list[int]:
        """Ids of a conversation in the file's own template, ready for the assistant's answer.

        `tools` are OpenAI's function tools; the model's calls come as text, in the template's own format.
        """
        switches = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        return self._template.encode(messages, tools=tools, **switches)

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, loop: Loop, n: int = 1
    ) -> Generation:
        """Queue `n` choices of one prompt; with a seed, choice i uses seed + i.

        Raises RequestError for a prompt or parameters that this model cannot honour, QueueFull when too
        many requests wait.
        """
        ids, params = tuple(prompt_ids), self._bounded(params)
        generation = Generation(ids, num_choices=n, engine=self._engine, loop=loop)
        try:
            for index in range(n):
                request = self._choice(generation, _with_seed(params, index), index)
                generation._request_ids.append(self._engine.submit(request))
        except BaseException:
            generation.cancel()
            raise
        return generation

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        on_token: Callable[[int], bool] | None = None,
    ) -> GenerateResult:
        """Generate and wait; `on_token`, on the engine's thread, sees each id and ends it with False.

        Without `params` the file's recommendations apply (`sampling_defaults`), as they do in the server.
        Raises RequestError as `submit` does, RuntimeError when the engine fails.
        """
        if params is None:
            params = SamplingParams(**self.sampling_defaults)  # type: ignore[arg-type]
        ids, params = tuple(prompt_ids), self._bounded(params)
        events: SimpleQueue[Event] = SimpleQueue()
        transcript = self._transcript(params, events.put)

        def take_token(token_id: int) -> bool:
            wanted = on_token is None or on_token(token_id)
            return transcript.on_token(token_id) and wanted

        request = Request(ids, params, take_token, transcript.on_logprobs, transcript.finish)
        request_id = self._engine.submit(request)
        try:
            return _collect(events)
        finally:
            self._engine.cancel(request_id)

    def _bounded(self, params: SamplingParams) -> SamplingParams:
        """The same parameters in the device's range: a top_k of the whole vocabulary or more is none."""
        return replace(params, top_k=0) if params.top_k >= self.vocab_size else params

    def _transcript(
        self, params: SamplingParams, emit: Callable[[Event], None], index: int = 0
    ) -> Transcript:
        stream = TextStream(self.tokenizer)
        return Transcript(stream, params, end_ids=self.tokenizer.eos_ids, emit=emit, index=index)

    def _choice(self, generation: Generation, params: SamplingParams, index: int) -> Request:
        def emit(event: Event) -> None:
            generation._put(event)
            self._fresh[generation] = None

        def take_token(token_id: int) -> bool:
            return generation._count_token() and transcript.on_token(token_id)

        def finish(reason: FinishReason, error: str | None) -> None:
            generation._finish(transcript, reason, error)

        transcript = self._transcript(params, emit, index)
        return Request(generation.prompt_ids, params, take_token, transcript.on_logprobs, finish)

    def _after_step(self) -> None:
        """Once a step, and last when the engine ends, on its thread."""
        self._wake_loops()
        if self._on_stopped is not None and self._engine.has_stopped:
            self._on_stopped()

    def _wake_loops(self) -> None:
        """One wake-up an event loop for all that is new."""
        if not self._fresh:
            return
        fresh = tuple(self._fresh)
        self._fresh.clear()
        for loop in {generation._loop for generation in fresh}:
            woken = [generation for generation in fresh if generation._loop is loop]
            try:
                loop.call_soon_threadsafe(_wake_all, woken)
            except RuntimeError:  # the loop is closed: nobody will read these
                for generation in woken:
                    generation.cancel()


def _wake_all(generations: list[Generation]) -> None:
    for generation in generations:
        generation._wake()


def _collect(events: SimpleQueue[Event]) -> GenerateResult:
    taken = list(_until_finished(events))
    reason = taken[-1].finish_reason
    if reason == "error" or reason is None:
        raise RuntimeError(f"the generation failed: {taken[-1].error}")
    ids = tuple(token_id for event in taken for token_id in event.token_ids)
    return GenerateResult(ids, "".join(event.text for event in taken), reason)


def _until_finished(events: SimpleQueue[Event]) -> Iterator[Event]:
    while True:
        event = events.get()
        yield event
        if event.finish_reason is not None:
            return


def _with_seed(params: SamplingParams, index: int) -> SamplingParams:
    if params.seed is None or index == 0:
        return params
    return replace(params, seed=(params.seed + index + 2**63) % 2**64 - 2**63)


def read_sampling_defaults(file: GGUFFile) -> Mapping[str, float]:
    """The sampling parameters that the file recommends, by SamplingParams' names, but for unusable ones."""
    found: dict[str, float] = {}
    for name, key in _SAMPLING_KEYS:
        if key not in file.metadata:
            continue
        try:
            found[name] = _read_sampling_default(file, name, key)
        except ValueError as error:
            logger.warning("the recommendation '%s' is skipped: %s", key, error)
    return MappingProxyType(found)


def _read_sampling_default(file: GGUFFile, name: str, key: str) -> float:
    value = file.get_float(key)
    if name == "top_k":
        if not value.is_integer():
            raise RequestError(f"top_k must be an integer, got {value:g}", param=name)
        value = int(value)
    SamplingParams(**{name: value})  # type: ignore[arg-type]
    return value
