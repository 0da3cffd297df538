"""Response bodies: what a generation's events look like to a client, streamed or whole.

Source of the shapes: OpenAI's API reference; `timings` is llama-server's, `token_ids` vLLM's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from jaxmoe import Event, Generation, Timings, TokenLogprobs
from server.errors import Failure, failure_of
from server.schema import Body

# OpenAI's stand-in for minus infinity, which JSON cannot hold.
LOWEST_LOGPROB: Final = -9999.0

# ASCII only: some clients split a stream at U+2028 or U+0085 too.
to_json: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_HOLE: Final = "\0"


class Vocabulary(Protocol):
    """What a token stands for."""

    def token_text(self, token_id: int) -> str:
        """Its text."""

    def token_bytes(self, token_id: int) -> bytes:
        """Its bytes."""


@dataclass
class Choice:
    """One choice as a whole."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, event: Event) -> None:
        """Append what one event brings."""
        self.text.append(event.text)
        self.token_ids += event.token_ids
        self.starts += event.starts
        self.logprobs += event.logprobs
        self.finish_reason = event.finish_reason


class Reply:
    """The response to one request: the part that is the same in every chunk, and what was counted.

    Subclasses say how an endpoint spells a choice.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self,
        body: Body,
        generation: Generation,
        vocabulary: Vocabulary,
        *,
        request_id: str,
        created: int,
        model: str,
    ) -> None:
        self._body = body
        self._generation = generation
        self._vocabulary = vocabulary
        self._request_id = request_id
        self._identity = {"id": f"{self.id_prefix}-{request_id}", "created": created, "model": model}
        self._chunk_start = to_json({**self._identity, "object": self.chunk_object})[:-1] + ',"choices":['
        self._text_frames: dict[int, tuple[str, str, str]] = {}
        self._num_unfinished = generation.num_choices
        self._num_tokens = 0

    def opening(self) -> list[str]:
        """The chunks before the first token."""
        return []

    def of(self, event: Event) -> list[str]:
        """The chunks of one event: its text, then its choice's end."""
        self._num_tokens += len(event.token_ids)
        if event.finish_reason is None:
            return [self._text_chunk(event)] if event.text else []
        check_event(event)
        last = self._last_chunk(event)
        return [self._text_chunk(event), last] if event.text else [last]

    def closing(self) -> list[str]:
        """The usage chunk, where one was asked for."""
        if not self._body.include_usage:
            return []
        return [self._chunk(None, usage=self._usage(self._num_tokens), timings=self._timings())]

    def failure(self, error: Exception) -> str:
        """The error object that ends a stream."""
        return to_json(failure_of(error, self._request_id).body)

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The response in one piece."""
        choices = [Choice() for _ in range(self._generation.num_choices)]
        for event in events:
            check_event(event)
            choices[event.index].add(event)
        return {
            **self._identity,
            "object": self.whole_object,
            "choices": [
                self._with_ids(self.whole_choice(index, choice), choice.token_ids)
                for index, choice in enumerate(choices)
            ],
            "usage": self._usage(sum(len(choice.token_ids) for choice in choices)),
            "timings": self._timings(),
        }

    def text_choice(self, event: Event) -> dict[str, Any]:
        """The choice of a chunk that carries text."""
        raise NotImplementedError

    def end_choice(self, event: Event) -> dict[str, Any]:
        """The choice of a finishing chunk."""
        raise NotImplementedError

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice in one piece."""
        raise NotImplementedError

    def _text_chunk(self, event: Event) -> str:
        if event.logprobs:
            return self._chunk(self._with_ids(self.text_choice(event), event.token_ids))
        before, between, after = self._text_frames.get(event.index) or self._text_frame(event.index)
        ids = f"[{','.join(map(str, event.token_ids))}]" if self._body.return_token_ids else ""
        return before + to_json(event.text) + between + ids + after

    def _text_frame(self, index: int) -> tuple[str, str, str]:
        """What is the same in all chunks of a choice: before the text, between text and ids, and after."""
        chunk = self._chunk(self._with_ids(self.text_choice(Event(_HOLE, (), index=index)), ()))
        before, _, rest = chunk.rpartition(to_json(_HOLE))
        between, _, after = rest.rpartition("[]") if self._body.return_token_ids else (rest, "", "")
        self._text_frames[index] = before, between, after
        return before, between, after

    def _last_chunk(self, event: Event) -> str:
        self._num_unfinished -= 1
        choice = self._with_ids(self.end_choice(event), event.token_ids)
        is_last = self._num_unfinished == 0 and not self._body.include_usage
        return self._chunk(choice, timings=self._timings()) if is_last else self._chunk(choice)

    def _chunk(self, choice: dict[str, Any] | None, **more: Any) -> str:
        end = "," + to_json(more)[1:] if more else "}"
        return f"{self._chunk_start}{to_json(choice) if choice else ''}]{end}"

    def _with_ids(self, choice: dict[str, Any], token_ids: Sequence[int]) -> dict[str, Any]:
        return {**choice, "token_ids": token_ids} if self._body.return_token_ids else choice

    def _usage(self, num_tokens: int) -> dict[str, Any]:
        timings = self._generation.timings
        return {
            "prompt_tokens": timings.prompt_length,
            "completion_tokens": num_tokens,
            "total_tokens": timings.prompt_length + num_tokens,
            "prompt_tokens_details": {"cached_tokens": timings.cached_length},
        }

    def _timings(self) -> dict[str, Any]:
        return timings_json(self._generation.timings)


class ChatReply(Reply):
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> list[str]:
        """One role chunk a choice."""
        delta = {"role": "assistant", "content": None}
        choices = [_chat_choice(index, delta) for index in range(self._generation.num_choices)]
        return [self._chunk(self._with_ids(choice, ())) for choice in choices]

    def text_choice(self, event: Event) -> dict[str, Any]:
        """A delta with content."""
        return _chat_choice(event.index, {"content": event.text}, self._logprobs(event.logprobs))

    def end_choice(self, event: Event) -> dict[str, Any]:
        """An empty delta."""
        logprobs = self._logprobs(event.logprobs)
        return _chat_choice(event.index, {}, logprobs, finish_reason=event.finish_reason)

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.text)},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not entries:
            return None
        spell = self._spell
        return {
            "content": [
                {
                    **spell(entry.token_id, entry.logprob),
                    "top_logprobs": [spell(token_id, logprob) for token_id, logprob in entry.top],
                }
                for entry in entries
            ]
        }

    def _spell(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._vocabulary.token_text(token_id),
            "logprob": _bounded(logprob),
            "bytes": list(self._vocabulary.token_bytes(token_id)),
        }


class CompletionReply(Reply):
    """POST /v1/completions."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def text_choice(self, event: Event) -> dict[str, Any]:
        """A piece of text."""
        logprobs = self._logprobs(event.logprobs, event.starts)
        return _completion_choice(event.index, event.text, logprobs)

    def end_choice(self, event: Event) -> dict[str, Any]:
        """No text, and the reason."""
        logprobs = self._logprobs(event.logprobs, event.starts)
        return _completion_choice(event.index, "", logprobs, event.finish_reason)

    def whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """All the text."""
        logprobs = self._logprobs(choice.logprobs, choice.starts)
        return _completion_choice(index, "".join(choice.text), logprobs, choice.finish_reason)

    def _logprobs(self, entries: Sequence[TokenLogprobs], starts: Sequence[int]) -> dict[str, Any] | None:
        if not entries:
            return None
        spell = self._vocabulary.token_text
        return {
            "tokens": [spell(entry.token_id) for entry in entries],
            "token_logprobs": [_bounded(entry.logprob) for entry in entries],
            # Reversed, so that of two tokens with one spelling the more likely one is kept.
            "top_logprobs": [
                {spell(token_id): _bounded(logprob) for token_id, logprob in reversed(entry.top)}
                for entry in entries
            ],
            "text_offset": list(starts),
        }


def check_event(event: Event) -> None:
    """Raise Failure for an event that ends its generation early."""
    if event.finish_reason == "cancelled":
        raise Failure(503, event.error or "the generation was cancelled", code="cancelled")
    if event.finish_reason == "error":
        raise RuntimeError(f"the generation failed: {event.error}")


def timings_json(timings: Timings) -> dict[str, Any]:
    """llama-server's `timings`: lengths in tokens, times in milliseconds, rates in tokens a second."""
    gaps = max(timings.predicted_length - 1, 0)
    return {
        "cache_n": timings.cached_length,
        "prompt_n": timings.prompt_length,
        "prompt_ms": round(timings.prompt_seconds * 1e3, 3),
        "prompt_per_second": _rate(timings.prompt_length, timings.prompt_seconds),
        "predicted_n": timings.predicted_length,
        "predicted_ms": round(timings.predicted_seconds * 1e3, 3),
        "predicted_per_second": _rate(gaps, timings.predicted_seconds),
    }


def _rate(length: int, seconds: float) -> float:
    return round(length / seconds, 3) if seconds > 0 else 0.0


def _bounded(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def _chat_choice(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _completion_choice(
    index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
