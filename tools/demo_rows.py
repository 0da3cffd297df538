"""Conversations as rows of token ids: several in a row, each with its own positions, by many processes."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult
from random import Random
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxmoe.chat import ChatTemplate
from tools.demo_corpus import Conversation, make_conversation
from tools.demo_items import Split
from tools.demo_vocabulary import CHAT_TEMPLATE, tokenizer_of
from tools.synth_vocab import Vocabulary

Codes = npt.NDArray[np.unsignedinteger[Any]]

ROW_LENGTH: Final = 1024
SHARD: Final = 4096  # conversations
NOTHING, PROMPT, EARLIER, ANSWER = 0, 1, 2, 3
_OPEN_ROWS: Final = 24
_SKIP_SHARE: Final = 0.25
_MAX_POSITION: Final = 2048


class Rows(NamedTuple):
    """Arrays [R, ROW_LENGTH]: `tokens`, `positions` in the conversation, its number in the row (0: none).

    `kinds` says what the next token is: NOTHING to learn, a part of the PROMPT, of an EARLIER answer, or of
    the ANSWER.
    """

    tokens: Codes
    positions: Codes
    segments: Codes
    kinds: Codes


@dataclass(frozen=True)
class Sample:
    """A rendered conversation: its tokens, and of each what the next one is, as in `Rows`."""

    tokens: list[int]
    kinds: list[int]


class Renderer:
    """Conversations to token ids, by the chat template that the model's file carries."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokenizer = tokenizer_of(vocabulary)
        self.template = ChatTemplate(CHAT_TEMPLATE, self.tokenizer)
        self._end = vocabulary.tokens.index("<|im_end|>")
        self._opening = self.tokenizer.encode("<|im_start|>assistant\n", parse_special=True)

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids that a client's request becomes."""
        tools = conversation.tools or None
        before = conversation.messages[:-1]
        return self.template.encode(before, tools=tools, enable_thinking=conversation.thinking)

    def sample(self, conversation: Conversation) -> Sample:
        """What a client would send, and what the model should answer."""
        prompt, tools = self.prompt(conversation), conversation.tools or None
        whole = self.template.encode(conversation.messages, tools=tools, add_generation_prompt=False)
        assert whole[: len(prompt)] == prompt, "the answer does not follow its prompt"
        length = len(whole) - whole[::-1].index(self._end)
        kinds = [PROMPT] * (len(prompt) - 1) + [ANSWER] * (length - len(prompt)) + [NOTHING]
        for start, end in self._earlier_answers(prompt):
            kinds[start:end] = [EARLIER] * (end - start)
            # a new turn may begin with a thought, which the template takes away later
            kinds[start - 1] = NOTHING
        return Sample(whole[:length], kinds)

    def _earlier_answers(self, prompt: list[int]) -> Iterator[tuple[int, int]]:
        """Where the answers of earlier turns are, but for their first token."""
        start, width = 0, len(self._opening)
        while self._opening[0] in prompt[start:]:
            start = prompt.index(self._opening[0], start)
            if prompt[start : start + width] == self._opening and self._end in prompt[start:]:
                yield start + width, prompt.index(self._end, start)
            start += 1


def pack(samples: Sequence[Sample], rng: Random) -> Rows:
    """Rows that hold every sample that fits, first fit; the others are left out.

    Some conversations get a gap in their positions, so that a row teaches distances beyond its own length
    (Zhu et al., "PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise Training", 2023).
    """
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        length = len(sample.tokens)
        first_open = max(0, len(rows) - _OPEN_ROWS)
        at = next((i for i in range(first_open, len(rows)) if room[i] >= length), None)
        if length > ROW_LENGTH:
            continue
        if at is None:
            at = len(rows)
            rows.append([])
            room.append(ROW_LENGTH)
        rows[at].append(sample)
        room[at] -= length
    packed = _no_rows(len(rows))
    for i, members in enumerate(rows):
        start = 0
        for number, sample in enumerate(members, 1):
            start = _place(packed, i, start, number, sample, rng)
    return packed


def _no_rows(number: int) -> Rows:
    """So many rows without anything in them."""
    shape = (number, ROW_LENGTH)
    return Rows(
        np.zeros(shape, np.uint16),
        np.zeros(shape, np.uint16),
        np.zeros(shape, np.uint8),
        np.zeros(shape, np.uint8),
    )


def _place(packed: Rows, row: int, start: int, number: int, sample: Sample, rng: Random) -> int:
    """Write a sample into a row; returns where the next one starts."""
    length = len(sample.tokens)
    end = start + length
    packed.tokens[row, start:end] = sample.tokens
    packed.kinds[row, start:end] = sample.kinds
    packed.segments[row, start:end] = number
    packed.positions[row, start:end] = np.arange(length)
    if rng.random() < _SKIP_SHARE:
        packed.positions[row, start + rng.randrange(length) : end] += rng.randint(0, _MAX_POSITION - length)
    return end


def make_rows(
    renderer: Renderer, shard: int, split: Split, skill: str | None = None, size: int = SHARD
) -> Rows:
    """The rows of one shard: `size` conversations, other ones for each shard."""
    samples = [renderer.sample(make_conversation(shard * SHARD + i, split, skill)) for i in range(size)]
    return pack(samples, Random(f"rows {shard}"))


class RowPool:
    """The newest rows, from which batches are drawn."""

    def __init__(self, capacity: int) -> None:
        self._rows = _no_rows(capacity)
        self._capacity = capacity
        self.num_seen = 0

    def add(self, rows: Rows) -> None:
        """Take rows in, over the oldest where the pool is full."""
        places = (self.num_seen + np.arange(len(rows.tokens))) % self._capacity
        for held, new in zip(self._rows, rows, strict=True):
            held[places] = new
        self.num_seen += len(rows.tokens)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Rows:
        """Rows [*shape, ROW_LENGTH], drawn evenly."""
        picked = rng.integers(0, min(self.num_seen, self._capacity), shape)
        return Rows(*(array[picked] for array in self._rows))


# --- Many processes

_renderer: Renderer


def _start_worker(vocabulary: Vocabulary) -> None:
    global _renderer
    _renderer = Renderer(vocabulary)


def _training_shard(shard: int) -> Rows:
    return make_rows(_renderer, shard, "train")


class RowStream:
    """The rows of training shards `first`, `first` + 1, ... in order, made ahead by worker processes."""

    def __init__(self, vocabulary: Vocabulary, num_workers: int, first: int = 0) -> None:
        # a fresh interpreter each: JAX's threads and a fork do not go together
        context = multiprocessing.get_context("spawn")
        self._pool = context.Pool(num_workers, _start_worker, (vocabulary,))
        self._next = first
        self._pending: deque[AsyncResult[Rows]] = deque()
        for _ in range(2 * num_workers):
            self._submit()

    def _submit(self) -> None:
        self._pending.append(self._pool.apply_async(_training_shard, (self._next,)))
        self._next += 1

    def take(self, least: int = 0) -> Iterator[Rows]:
        """Every shard that is ready; waits for the first `least`."""
        while least > 0 or self._pending[0].ready():
            least -= 1
            yield self._pending.popleft().get()
            self._submit()

    def close(self) -> None:
        """End the workers, whatever they do."""
        self._pool.terminate()
        self._pool.join()
