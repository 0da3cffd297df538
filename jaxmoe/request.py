"""The words the host speaks: requests, sampling parameters and what comes back. No JAX here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from types import MappingProxyType
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256


class RequestError(ValueError):
    """A request that cannot be honoured.

    `param` names the field, `code` is OpenAI's machine-readable code where it has one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFull(RequestError):
    """As many requests wait as the engine lets wait: the same request may be sent again later."""

    def __init__(self, max_waiting: int) -> None:
        super().__init__(f"the queue is full: {max_waiting} requests are waiting", code="queue_full")


class EngineStopped(RuntimeError):
    """A request came after the engine had stopped; no fault of the request."""


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen (field names and ranges: OpenAI's and vLLM's API references).

    `temperature` 0 is greedy; `top_k` 0 or -1 is off; `logprobs` is the number of alternatives to
    report per token (None: no logprobs at all, 0: only the sampled token's); `max_tokens` None means
    all that the context leaves.
    Raises RequestError, naming the field, for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, low, high, low_open in _FLOAT_RANGES:
            _check_range(name, getattr(self, name), low, high, low_open)
        if self.top_k < -1:
            raise RequestError(f"top_k must be -1, 0 or more, got {self.top_k}", param="top_k")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RequestError(f"seed must be a 64-bit integer, got {self.seed}", param="seed")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise RequestError(
                f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}, got {self.logprobs}",
                param="top_logprobs",
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens must be 1 or more, got {self.max_tokens}", param="max_tokens")
        self._check_stop()
        self._check_logit_bias()

    def _check_stop(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", param="stop"
            )
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise RequestError(
                    f"a stop string must have 1 to {MAX_STOP_LENGTH} characters, got {len(text)}",
                    param="stop",
                )

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens, got {len(self.logit_bias)}",
                param="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0, False, param="logit_bias")


_FLOAT_RANGES = (
    ("temperature", 0.0, 2.0, False),
    ("top_p", 0.0, 1.0, True),
    ("min_p", 0.0, 1.0, False),
    ("frequency_penalty", -2.0, 2.0, False),
    ("presence_penalty", -2.0, 2.0, False),
    ("repetition_penalty", 0.0, 2.0, True),
)


def _check_range(
    name: str, value: float, low: float, high: float, low_open: bool, *, param: str | None = None
) -> None:
    inside = isfinite(value) and (low < value if low_open else low <= value) and value <= high
    if not inside:
        lower = f"more than {low:g}" if low_open else f"at least {low:g}"
        raise RequestError(f"{name} must be {lower} and at most {high:g}, got {value:g}", param=param or name)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities (natural log, before temperature and filters) of one sampled token.

    `top` holds (token id, logprob) of the most likely tokens, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SampledToken:
    """One id that a step sampled for one slot; `logprobs` is None where they were not asked for."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class EngineStats:
    """What the engine was busy with at one moment.

    `running` counts the slots in use, `waiting` the requests without one; a page is free when no
    slot owns it.
    """

    running: int
    waiting: int
    free_pages: int
    total_pages: int


@dataclass(frozen=True)
class Prefill:
    """Put one chunk of a slot's tokens into the cache.

    `start` is the position of the chunk's first token, `pages` are all page ids of the slot, in
    order. With `is_last` the step also samples the slot's next token.
    """

    slot: int
    token_ids: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    is_last: bool


@dataclass(frozen=True)
class Decode:
    """Feed each slot (ascending) the token it sampled last, and sample its next one.

    `new_pages` are (slot, index in the slot's page table, page id), of these slots only.
    """

    slots: tuple[int, ...]
    new_pages: tuple[tuple[int, int, int], ...]


Step = Prefill | Decode


def _ignore_logprobs(_: TokenLogprobs) -> None:
    return None


def _ignore_finish(_: FinishReason, __: str | None) -> None:
    return None


@dataclass(frozen=True, eq=False)
class Request:
    """One generation as the engine sees it: token ids in, token ids out.

    `on_token(token_id)` is called on the engine's thread for each sampled id, the end token too;
    returning False ends the request. `on_logprobs` is called just before it when
    `params.logprobs` is set. `on_finish(reason, message)` is called exactly once, last; `message`
    says what went wrong when the reason is "error".
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    on_token: Callable[[int], bool]
    on_logprobs: Callable[[TokenLogprobs], None] = _ignore_logprobs
    on_finish: Callable[[FinishReason, str | None], None] = _ignore_finish
