"""A stand-in for the device: a paged cache of token ids, and a rule instead of a network.

The id after a sequence is a function of the whole sequence as it is read back through the page table,
so a page that is lost, shared or misplaced changes the ids.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxmoe.request import SampledToken, SamplingParams, TokenLogprobs
from jaxmoe.scheduler import Decode, Prefill

EOS = 99
VOCAB_SIZE = 100

Rule = Callable[[Sequence[int], int], int]


def scramble(token_ids: Sequence[int], seed: int) -> int:
    """An id below EOS that depends on every token before it and on the seed."""
    return zlib.crc32(repr((seed, list(token_ids))).encode()) % EOS


def expected_ids(prompt_ids: Sequence[int], num: int, *, seed: int = 0, rule: Rule = scramble) -> list[int]:
    """What a request must get, whatever runs beside it."""
    token_ids = list(prompt_ids)
    for _ in range(num):
        token_ids.append(rule(token_ids, seed))
    return token_ids[len(prompt_ids) :]


@dataclass
class Occupant:
    """What the device knows of the request in one slot."""

    params: SamplingParams
    prompt_ids: tuple[int, ...]
    generated_ids: list[int]
    seed: int
    length: int = 0  # tokens in the cache
    next_id: int = -1


class FakePending:
    def __init__(self, steps: FakeSteps, number: int, tokens: list[SampledToken]) -> None:
        self._steps = steps
        self._number = number
        self._tokens = tokens

    def read(self) -> list[SampledToken]:
        self._steps.log.append(("read", self._number))
        self._steps.on_read(self._number)
        return self._tokens


class FakeSteps:
    """Runs each step when it is launched; `on_launch(number)` and `on_read(number)` come first.

    Steps are numbered from 0; both hooks may block or raise.
    """

    def __init__(
        self,
        *,
        num_slots: int = 4,
        num_pages: int = 64,
        page_length: int = 4,
        context_length: int = 128,
        rule: Rule = scramble,
    ) -> None:
        self.num_slots = num_slots
        self.num_pages = num_pages
        self.page_length = page_length
        self.context_length = context_length
        self.vocab_size = VOCAB_SIZE
        self.rule = rule
        self.log: list[tuple[str, int]] = []
        self.launched: list[Prefill | Decode] = []
        self.admitted: list[Occupant] = []
        self.num_resets = 0
        self.on_launch: Callable[[int], None] = lambda number: None
        self.on_read: Callable[[int], None] = lambda number: None
        self._clear()

    def _clear(self) -> None:
        self._cache: list[list[int]] = [[-1] * self.page_length for _ in range(self.num_pages)]
        self._pages: list[list[int]] = [[] for _ in range(self.num_slots)]
        self._slots: list[Occupant | None] = [None] * self.num_slots

    def reset(self) -> None:
        self.num_resets += 1
        self._clear()

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int],
        generated_ids: Sequence[int],
        seed: int,
    ) -> None:
        occupant = Occupant(params, tuple(prompt_ids), list(generated_ids), seed)
        self.admitted.append(occupant)
        self._slots[slot] = occupant

    def prefill(self, step: Prefill) -> FakePending:
        number = self._launch(step)
        occupant = self._occupant(step.slot)
        assert step.token_ids
        assert step.start == occupant.length, "a chunk was skipped or came twice"
        whole = [*occupant.prompt_ids, *occupant.generated_ids]
        assert step.is_last == (step.start + len(step.token_ids) == len(whole))
        self._pages[step.slot] = list(step.pages)
        for token_id in step.token_ids:
            self._write(step.slot, token_id)
        if not step.is_last:
            return FakePending(self, number, [])
        assert self._read_back(step.slot) == whole
        return FakePending(self, number, [self._sample(step.slot)])

    def decode(self, step: Decode) -> FakePending:
        number = self._launch(step)
        assert step.slots
        assert list(step.slots) == sorted(set(step.slots))
        for slot, index, page in step.new_pages:
            assert slot in step.slots
            assert index == len(self._pages[slot])
            self._pages[slot].append(page)
        for slot in step.slots:
            self._write(slot, self._occupant(slot).next_id)
        return FakePending(self, number, [self._sample(slot) for slot in step.slots])

    def _launch(self, step: Prefill | Decode) -> int:
        number = len(self.launched)
        self.launched.append(step)
        self.log.append(("launch", number))
        self.on_launch(number)
        return number

    def _occupant(self, slot: int) -> Occupant:
        occupant = self._slots[slot]
        assert occupant is not None, "a step came before admit"
        return occupant

    def _write(self, slot: int, token_id: int) -> None:
        occupant = self._occupant(slot)
        index, offset = divmod(occupant.length, self.page_length)
        self._cache[self._pages[slot][index]][offset] = token_id
        occupant.length += 1

    def _read_back(self, slot: int) -> list[int]:
        rows = [token_id for page in self._pages[slot] for token_id in self._cache[page]]
        return rows[: self._occupant(slot).length]

    def _sample(self, slot: int) -> SampledToken:
        occupant = self._occupant(slot)
        token_id = self.rule(self._read_back(slot), occupant.seed)
        occupant.next_id = token_id
        wants = occupant.params.logprobs is not None
        logprobs = TokenLogprobs(token_id, -0.5, top=()) if wants else None
        return SampledToken(token_id, logprobs)
