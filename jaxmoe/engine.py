"""The thread that owns the device: inbox -> schedule -> step -> callbacks."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import jax
from jax.profiler import TraceAnnotation

from jaxmoe.cache import KVCache
from jaxmoe.config import MAX_PAGE_LENGTH, EngineConfig, ModelConfig
from jaxmoe.gguf import GGUFFile
from jaxmoe.kernels import attention as kernel_attention
from jaxmoe.kernels import ptx
from jaxmoe.layers import ROW_TILE
from jaxmoe.model import Decoder
from jaxmoe.request import (
    Decode,
    EngineStats,
    EngineStopped,
    FinishReason,
    Prefill,
    QueueFull,
    Request,
    RequestError,
    SampledToken,
    SamplingParams,
    Step,
)
from jaxmoe.scheduler import Scheduler, Stream
from jaxmoe.step import Shapes, Steps, use_compilation_cache, why_without_kernels
from jaxmoe.weights import device_weights_size, load_model

logger = logging.getLogger(__name__)


class Pending(Protocol):
    """A launched step; `read` waits until it has run and returns the token of each slot it sampled."""

    def read(self) -> list[SampledToken]: ...


class StepRunner(Protocol):
    """What the engine asks of the device: `jaxmoe.step.Steps`, or a stand-in without one.

    `admit` comes before the first prefill of a request in a slot; `prefill` and `decode` only launch, and the
    device runs what is launched in order. Reading a prefill that samples nothing waits for it and returns
    nothing: so the engine is never more than two chunks ahead of the device. `reset` makes a new, empty cache
    after a failed step.
    """

    num_slots: int
    num_pages: int
    page_length: int
    context_length: int
    vocab_size: int

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int],
        generated_ids: Sequence[int],
        seed: int,
    ) -> None: ...

    def prefill(self, step: Prefill) -> Pending: ...

    def decode(self, step: Decode) -> Pending: ...

    def reset(self) -> None: ...


class Engine:
    """Runs requests on the device, many at a time, on a thread of its own.

    Step n+1 is launched before the ids of step n are read. All callbacks of a request, and
    `after_step` once a step, are called on that thread; they must not block. A callback that raises
    ends its own request with "error"; a step that raises ends the requests that are running, and the
    waiting ones are served on an empty cache.
    """

    def __init__(
        self,
        steps: StepRunner,
        *,
        eos_ids: frozenset[int],
        prefill_chunk: int,
        max_waiting: int,
        after_step: Callable[[], None],
    ) -> None:
        self.num_slots = steps.num_slots
        self.vocab_size = steps.vocab_size
        # A request of this length has the whole cache, when need be, so none can be too long for it.
        self.context_length = min(steps.context_length, steps.num_pages * steps.page_length)
        self._steps = steps
        self._eos_ids = eos_ids
        self._max_waiting = max_waiting
        self._after_step = after_step
        self._scheduler = Scheduler(
            num_slots=steps.num_slots,
            num_pages=steps.num_pages,
            page_length=steps.page_length,
            prefill_chunk=prefill_chunk,
        )
        self._in_flight: tuple[Step, Pending] | None = None
        self._has_called_back = False
        self._thread = threading.Thread(target=self._run, name="jaxmoe-engine", daemon=True)
        # Below: shared with other threads, under this lock.
        self._inbox = threading.Condition()
        self._submitted: list[Stream] = []
        self._cancelled: list[int] = []
        self._stopping = False
        self._next_id = 0
        self._stats = EngineStats(0, 0, free_pages=steps.num_pages, total_pages=steps.num_pages)

    def start(self) -> None:
        """Start the thread; requests may have been submitted before."""
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> bool:
        """End what is left with "cancelled" and wait `timeout` seconds at most for the thread to end.

        Returns whether it has ended. The steps are not touched after that.
        """
        with self._inbox:
            is_first = not self._stopping
            self._stopping = True
            self._inbox.notify()
        if is_first and self._thread.ident is None:
            self._thread.start()  # on_finish is called on the engine's thread, always
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def has_stopped(self) -> bool:
        """Whether the engine takes no more requests: after `stop`, or a failure that it cannot mend.

        `after_step` is called once more after it has become true.
        """
        with self._inbox:
            return self._stopping

    def submit(self, request: Request) -> int:
        """Queue a request and return its id, for `cancel`.

        Raises RequestError, which names the field (code "context_length_exceeded" when prompt and
        max_tokens together are too long), QueueFull, and EngineStopped after `stop`.
        """
        max_tokens = self._check(request)
        seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
        with self._inbox:
            if self._stopping:
                raise EngineStopped("the engine has stopped")
            if self._is_full():
                raise QueueFull(self._max_waiting)
            stream = Stream(self._next_id, request, max_tokens=max_tokens, seed=seed)
            self._next_id += 1
            self._submitted.append(stream)
            self._inbox.notify()
        return stream.request_id

    def cancel(self, request_id: int) -> None:
        """End a request with "cancelled", wherever it is; does nothing when it has ended."""
        with self._inbox:
            self._cancelled.append(request_id)
            self._inbox.notify()

    def stats(self) -> EngineStats:
        """What the engine was busy with after the step read last."""
        with self._inbox:
            return replace(self._stats, waiting=self._stats.waiting + len(self._submitted))

    def _check(self, request: Request) -> int:
        """Return the request's max_tokens, resolved, or raise RequestError."""
        prompt_ids, params = request.prompt_ids, request.params
        if not prompt_ids:
            raise RequestError("the prompt is empty", param="prompt")
        self._check_ids("prompt", prompt_ids)
        self._check_ids("logit_bias", tuple(params.logit_bias))
        left = self.context_length - len(prompt_ids)
        if left < 1:
            raise self._too_long(f"the prompt has {len(prompt_ids)} and one more must fit", "prompt")
        if params.max_tokens is not None and params.max_tokens > left:
            total = len(prompt_ids) + params.max_tokens
            what = f"the prompt's {len(prompt_ids)} and max_tokens {params.max_tokens} make {total}"
            raise self._too_long(what, "max_tokens")
        return left if params.max_tokens is None else params.max_tokens

    def _check_ids(self, param: str, token_ids: Sequence[int]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            bad = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            what = f"{param}: token id {bad} is not between 0 and {self.vocab_size - 1}"
            raise RequestError(what, param=param)

    def _too_long(self, what: str, param: str) -> RequestError:
        message = f"the context holds {self.context_length} tokens; {what}"
        return RequestError(message, param=param, code="context_length_exceeded")

    def _is_full(self) -> bool:
        # Who will find a free slot at the next step does not count as waiting.
        num_waiting = self._stats.waiting + len(self._submitted)
        return num_waiting - (self.num_slots - self._stats.running) >= self._max_waiting

    def _run(self) -> None:
        reason: FinishReason = "error"
        message: str | None = "the engine has stopped after a failure"
        try:
            while self._take_inbox(wait=self._in_flight is None and self._scheduler.is_idle):
                self._advance()
            reason, message = "cancelled", None
        except Exception:
            logger.exception("the engine stops")
        finally:
            self._end_all(reason, message)

    def _take_inbox(self, *, wait: bool) -> bool:
        """Take what was submitted and cancelled since the last time; False when the engine is to stop."""
        with self._inbox:
            while wait and not (self._submitted or self._cancelled or self._stopping):
                self._inbox.wait()
            for submitted in self._submitted:
                self._scheduler.add(submitted)
            cancelled, self._submitted, self._cancelled = self._cancelled, [], []
            self._publish()
            is_stopping = self._stopping
        for request_id in cancelled:
            stream = self._scheduler.find(request_id)
            if stream is not None:
                self._finish(stream, "cancelled")
        return not is_stopping

    def _advance(self) -> None:
        """Launch the next step, then read the one before it and pass its tokens on."""
        flown, step = self._in_flight, self._scheduler.next_step()
        assert step or flown or self._scheduler.is_idle, "requests wait and nothing can be launched"
        try:
            self._in_flight = None if step is None else (step, self._launch(step))
            tokens = [] if flown is None else self._read(flown[1])
        except Exception:
            self._fail_running()
        else:
            if flown is not None:
                self._take_inbox(wait=False)  # who was cancelled during the step gets no token of it
                with TraceAnnotation("deliver"):
                    self._deliver(flown[0], tokens)
        self._publish()
        if flown is not None or self._has_called_back:
            self._call_after_step()

    def _launch(self, step: Step) -> Pending:
        if isinstance(step, Decode):
            with TraceAnnotation("launch decode", slots=len(step.slots)):
                return self._steps.decode(step)
        with TraceAnnotation("launch prefill", tokens=len(step.token_ids)):
            if step.start == 0:
                self._admit(step.slot)
            return self._steps.prefill(step)

    def _read(self, pending: Pending) -> list[SampledToken]:
        with TraceAnnotation("read"):
            return pending.read()

    def _admit(self, slot: int) -> None:
        stream = self._scheduler.stream_in(slot)
        self._steps.admit(
            slot,
            stream.request.params,
            prompt_ids=stream.request.prompt_ids,
            generated_ids=tuple(stream.generated_ids),
            seed=stream.seed,
        )

    def _deliver(self, step: Step, tokens: list[SampledToken]) -> None:
        """Pass on the tokens of a step that was read, but for the requests that have ended since."""
        for stream, token in zip(self._scheduler.sampled(step), tokens, strict=True):
            if stream.state != "ended":
                self._pass_on(stream, token)
        self._scheduler.retire(step)

    def _pass_on(self, stream: Stream, token: SampledToken) -> None:
        stream.generated_ids.append(token.token_id)
        request = stream.request
        self._has_called_back = True
        try:
            if token.logprobs is not None and request.params.logprobs is not None:
                request.on_logprobs(token.logprobs)
            goes_on = request.on_token(token.token_id)
        except Exception:
            logger.exception("a callback of request %d raised", stream.request_id)
            self._finish(stream, "error", "a callback of this request failed")
            return
        if not goes_on or self._is_end(stream, token.token_id):
            self._finish(stream, "stop")
        elif len(stream.generated_ids) == stream.max_tokens:
            self._finish(stream, "length")

    def _is_end(self, stream: Stream, token_id: int) -> bool:
        return token_id in self._eos_ids and not stream.request.params.ignore_eos

    def _finish(self, stream: Stream, reason: FinishReason, message: str | None = None) -> None:
        self._scheduler.end(stream)
        self._has_called_back = True
        try:
            stream.request.on_finish(reason, message)
        except Exception:
            logger.exception("on_finish of request %d raised", stream.request_id)

    def _fail_running(self) -> None:
        """After an exception of the device: no step in flight can be trusted, and neither can the cache."""
        running = self._scheduler.running()
        logger.exception("a step failed; %d running requests end with it", len(running))
        self._in_flight = None
        for stream in running:
            self._finish(stream, "error", "a step of the engine failed")
        self._scheduler.abandon_flight()
        self._steps.reset()

    def _end_all(self, reason: FinishReason, message: str | None) -> None:
        with self._inbox:
            self._stopping = True  # from here on nothing is submitted any more
        try:
            self._take_inbox(wait=False)
            for stream in self._scheduler.unfinished():
                self._finish(stream, reason, message)
            self._scheduler.abandon_flight()
            self._publish()
        finally:
            self._call_after_step()  # who watches has_stopped learns of it here

    def _call_after_step(self) -> None:
        self._has_called_back = False
        try:
            self._after_step()
        except Exception:
            logger.exception("after_step raised")

    def _publish(self) -> None:
        scheduler = self._scheduler
        stats = EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_pages=scheduler.num_free_pages,
            total_pages=self._stats.total_pages,
        )
        with self._inbox:
            self._stats = stats


_CPU_CACHE_SIZE = 1 << 30
_FIXED_WORKSPACE_SIZE = 1 << 30
_PLAIN_CHUNK, _KERNELS_CHUNK = 512, 2048
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def load_engine(
    file: GGUFFile,
    config: ModelConfig,
    engine_config: EngineConfig,
    *,
    eos_ids: frozenset[int],
    after_step: Callable[[], None],
    progress: Callable[[str, float], None],
) -> Engine:
    """Load the weights, compile and warm every step, and start an engine on them.

    `progress` gets a phase, "loading" or "compiling", and the share of it that is done, 0..1. Raises
    GGUFError for a file that cannot be this model and ValueError where memory does not suffice, with
    both sizes in bytes.
    """
    if engine_config.compilation_cache:
        use_compilation_cache()
    without_kernels = why_without_kernels(config, engine_config.cache_dtype)
    shapes = plan_shapes(
        config,
        engine_config,
        weights_size=device_weights_size(file, config),
        memory_size=device_memory_size(),
        on_cpu=jax.default_backend() == "cpu",
        kernels=without_kernels is None,
    )
    model = load_model(
        file,
        config,
        context_length=shapes.context_length,
        progress=lambda share: progress("loading", share),
    )
    plain = replace(shapes, kernels=False, prefill_chunk=prefill_chunk(engine_config, kernels=False))
    steps, refused = _warm_steps(model, config, shapes, plain, lambda share: progress("compiling", share))
    _say_what_runs(without_kernels or refused)
    engine = Engine(
        steps,
        eos_ids=eos_ids,
        prefill_chunk=steps.shapes.prefill_chunk,
        max_waiting=engine_config.max_waiting,
        after_step=after_step,
    )
    engine.start()
    return engine


def _warm_steps(
    model: Decoder, config: ModelConfig, shapes: Shapes, plain: Shapes, progress: Callable[[float], None]
) -> tuple[Steps, str | None]:
    """Warm steps of `shapes`; where a kernel cannot be built, steps of `plain`, and why."""
    steps = Steps(model, config, shapes)
    try:
        steps.warm(progress)
        return steps, None
    except Exception as error:
        refused = str(error) if isinstance(error, ptx.KernelError) else ptx.explain(error)
        if not shapes.kernels or refused is None:
            raise
    steps.free()  # two caches do not fit
    steps = Steps(model, config, plain)
    steps.warm(progress)
    return steps, refused


def _say_what_runs(without_kernels: str | None) -> None:
    """Log what the steps are made of; without kernels also why, which on a GPU is a warning."""
    if without_kernels is None:
        capability = str(getattr(jax.devices()[0], "compute_capability", ""))
        logger.info("steps: CUDA kernels (sm_%s)", capability.replace(".", ""))
    elif jax.default_backend() == "cpu":
        logger.info("steps: XLA (%s)", without_kernels)
    else:
        logger.warning("steps: XLA, at a fraction of the kernels' speed (%s)", without_kernels)


def plan_shapes(
    config: ModelConfig,
    engine_config: EngineConfig,
    *,
    weights_size: int,
    memory_size: int,
    on_cpu: bool,
    kernels: bool,
) -> Shapes:
    """Share the device's memory (sizes in bytes) between weights and cache.

    Without a cache size, the cache takes 1 GiB on a CPU, and on a GPU what weights and steps leave, but never
    more than all slots can fill. Raises ValueError, with the sizes, where something does not fit.
    """
    page_length = engine_config.page_length
    dtype = engine_config.cache_dtype or ("float32" if on_cpu else "bfloat16")
    page_size = KVCache.page_size(config, page_length, dtype)
    left = memory_size - weights_size - workspace_size(config, engine_config, kernels=kernels)
    if left < page_size:
        steps_size = memory_size - weights_size - left
        raise ValueError(
            f"the weights take {weights_size} bytes and the steps {steps_size}; the device has "
            f"{memory_size}, which leaves no room for a cache page of {page_size}"
        )
    cache_size = engine_config.cache_size or min(left, _CPU_CACHE_SIZE if on_cpu else left)
    if not page_size <= cache_size <= left:
        raise ValueError(
            f"cache_size must be between {page_size} (one page) and {left} (what weights and steps leave) "
            f"bytes, got {cache_size}"
        )
    context_length = min(config.context_length, engine_config.context_length or config.context_length)
    pages_a_slot = -(-context_length // page_length)
    num_pages = min(cache_size // page_size, engine_config.num_slots * pages_a_slot)
    return Shapes(
        num_slots=engine_config.num_slots,
        num_pages=num_pages,
        page_length=page_length,
        context_length=min(context_length, num_pages * page_length),
        prefill_chunk=prefill_chunk(engine_config, kernels=kernels),
        cache_dtype=dtype,
        kernels=kernels,
    )


def prefill_chunk(engine_config: EngineConfig, *, kernels: bool) -> int:
    """Tokens of a chunk, where the operator has not said: what measured best."""
    return engine_config.prefill_chunk or (_KERNELS_CHUNK if kernels else _PLAIN_CHUNK)


def workspace_size(config: ModelConfig, engine_config: EngineConfig, *, kernels: bool) -> int:
    """Bytes that steps need beside weights and cache: sampling state, a step's temporaries, RoPE tables."""
    sampling = engine_config.num_slots * config.vocab_size * 9
    # a step has as many rows as the bucket that all slots fit
    num_slots = 1 << (engine_config.num_slots - 1).bit_length()
    num_rows = max(prefill_chunk(engine_config, kernels=kernels), num_slots)
    pairs = num_rows * config.experts_per_token + ROW_TILE * config.num_experts
    heads = config.num_heads * config.head_dim
    rows = 4 * (pairs * (config.d_model + config.expert_width) + num_rows * 8 * (config.d_model + heads))
    logits = 8 * num_slots * config.vocab_size
    context_length = min(engine_config.context_length or config.context_length, config.context_length)
    rope = 4 * context_length * config.head_dim
    table_length = -(-context_length // MAX_PAGE_LENGTH) * MAX_PAGE_LENGTH
    # what each attention segment of each slot leaves for the last one to join
    segments = num_slots * table_length // kernel_attention.SEGMENT_LENGTH
    partials = 4 * segments * (heads + 4 * config.num_heads) if kernels else 0
    return _FIXED_WORKSPACE_SIZE + sampling + rows + logits + rope + partials


def device_memory_size() -> int:
    """Bytes of the device's memory that JAX may use; of the machine's or container's where that is a CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(_CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return machine
