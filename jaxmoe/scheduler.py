"""Waiting -> running -> finished: which request is in which slot, and what the next step is.

No arrays, no clock, no threads. Steps are planned before the step ahead of them has been read, so
every count here is of what was launched, and a slot with its pages is returned only when the last
step that carries it has been read.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Literal

from jaxmoe.pages import PageTable
from jaxmoe.request import Decode, Prefill, Request, Step


@dataclass(eq=False, slots=True)
class Stream:
    """One request on its way through the engine; requests are served in the order of their ids.

    The engine writes `generated_ids`, the ids that were read; all that follows it is the scheduler's.
    `num_launched` counts the tokens whose sampling was launched, read or not, `num_prefilled` the
    tokens of `prefill_ids` (prompt and what was generated before a preemption) that were launched,
    `in_flight` the steps that carry this request and have not been read, `room` the tokens that the
    pages of its slot hold.
    A "preempted" request waits for its steps in flight, then goes back to "waiting".
    """

    request_id: int
    request: Request
    max_tokens: int
    seed: int
    generated_ids: list[int] = field(default_factory=list)
    state: Literal["waiting", "running", "preempted", "ended"] = "waiting"
    slot: int | None = None
    prefill_ids: tuple[int, ...] = ()
    num_prefilled: int = 0
    num_launched: int = 0
    in_flight: int = 0
    room: int = 0

    @property
    def in_prefill(self) -> bool:
        return self.state == "running" and self.num_prefilled < len(self.prefill_ids)

    @property
    def can_decode(self) -> bool:
        is_whole = self.num_prefilled == len(self.prefill_ids)
        return self.state == "running" and is_whole and self.num_launched < self.max_tokens

    @property
    def is_leaving(self) -> bool:
        """Whether no further step will carry it before it gives its slot back."""
        return self.state != "running" or self.num_launched == self.max_tokens

    @property
    def cache_length(self) -> int:
        """The tokens in the cache once the next decode step has run."""
        return len(self.request.prompt_ids) + self.num_launched

    @property
    def final_cache_length(self) -> int:
        """The most tokens it can have in the cache: the last one sampled is never fed back."""
        return len(self.request.prompt_ids) + self.max_tokens - 1


class Scheduler:
    """Gives requests slots and pages, first come first served, and plans one step at a time.

    The pages of a prompt are allocated when it is admitted, those of its answer as it grows; when a
    stream finds no free page, the stream admitted last gives its own back and is computed again
    later. A prompt is prefilled in chunks of `prefill_chunk` tokens at most, and while others decode
    each chunk is followed by a decode step. Continuous batching: Yu et al., "Orca", 2022; recompute
    on preemption: Kwon et al., "PagedAttention", 2023.
    """

    def __init__(self, *, num_slots: int, num_pages: int, page_length: int, prefill_chunk: int) -> None:
        self._table = PageTable(num_slots=num_slots, num_pages=num_pages, page_length=page_length)
        self._slots: list[Stream | None] = [None] * num_slots
        self._held: list[Stream] = []  # who is in a slot, oldest first
        self._prefill_chunk = prefill_chunk
        self._waiting: list[Stream] = []
        self._streams: dict[int, Stream] = {}
        self._prefilled_last = False

    @property
    def num_running(self) -> int:
        """The number of slots in use."""
        return len(self._held)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_free_pages(self) -> int:
        return self._table.num_free

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._held

    def add(self, stream: Stream) -> None:
        """Queue a request, which must fit the cache when it runs alone."""
        assert self._table.num_pages_for(stream.final_cache_length) <= self._table.num_pages
        self._streams[stream.request_id] = stream
        insort(self._waiting, stream, key=_arrival)

    def find(self, request_id: int) -> Stream | None:
        """The request of that id, unless it has ended."""
        return self._streams.get(request_id)

    def stream_in(self, slot: int) -> Stream:
        """The request that holds the slot."""
        stream = self._slots[slot]
        assert stream is not None
        return stream

    def unfinished(self) -> list[Stream]:
        """All requests that have not ended, oldest first."""
        return sorted(self._streams.values(), key=_arrival)

    def running(self) -> list[Stream]:
        """The requests that hold a slot and have not ended, oldest first."""
        return [stream for stream in self._held if stream.state != "ended"]

    def next_step(self) -> Step | None:
        """Plan the next step, which the caller launches at once.

        None when there is nothing to launch before a step in flight has been read, or at all.
        """
        if self._prefilled_last:
            step = self._plan_decode() or self._plan_prefill()
        else:
            step = self._plan_prefill() or self._plan_decode()
        if step is not None:
            self._count_launch(step)
        return step

    def sampled(self, step: Step) -> list[Stream]:
        """The requests that the step in flight samples a token for, in its order, the ended ones too."""
        if isinstance(step, Prefill) and not step.is_last:
            return []
        return self._carried(step)

    def retire(self, step: Step) -> None:
        """Note that the step was read and its tokens recorded: slots that it was the last to need return."""
        for stream in self._carried(step):
            stream.in_flight -= 1
            if stream.state != "running":
                self._release_if_done(stream)

    def end(self, stream: Stream) -> None:
        """Finish or cancel a request wherever it is: no step planned from now on carries it."""
        if stream.state == "ended":
            return
        del self._streams[stream.request_id]
        if stream.state == "waiting":
            self._waiting.remove(stream)
        stream.state = "ended"
        self._release_if_done(stream)

    def abandon_flight(self) -> None:
        """Note that no step launched so far will be read: a step has failed."""
        for stream in tuple(self._held):
            stream.in_flight = 0
            self._release_if_done(stream)

    def _carried(self, step: Step) -> list[Stream]:
        slots = (step.slot,) if isinstance(step, Prefill) else step.slots
        return [self.stream_in(slot) for slot in slots]

    def _count_launch(self, step: Step) -> None:
        self._prefilled_last = isinstance(step, Prefill)
        num_sampled = isinstance(step, Decode) or step.is_last
        for stream in self._carried(step):
            stream.in_flight += 1
            stream.num_launched += num_sampled

    def _plan_prefill(self) -> Prefill | None:
        # One at a time: two half-done prompts would both come later than one after the other.
        stream = next((held for held in self._held if held.in_prefill), None) or self._admit()
        if stream is None:
            return None
        start = stream.num_prefilled
        chunk = stream.prefill_ids[start : start + self._prefill_chunk]
        stream.num_prefilled += len(chunk)
        slot = _slot_of(stream)
        is_last = stream.num_prefilled == len(stream.prefill_ids)
        return Prefill(slot, chunk, start=start, pages=self._table.pages(slot), is_last=is_last)

    def _admit(self) -> Stream | None:
        """Give the oldest waiting request a slot and pages, if there is room for it."""
        if not self._waiting or None not in self._slots or not self._has_room(self._waiting[0]):
            return None
        stream = self._waiting.pop(0)
        stream.state = "running"
        stream.slot = self._slots.index(None)
        stream.prefill_ids = (*stream.request.prompt_ids, *stream.generated_ids)
        self._slots[stream.slot] = stream
        insort(self._held, stream, key=_arrival)
        self._grow(stream, _admission_length(stream))
        return stream

    def _grow(self, stream: Stream, length: int) -> tuple[tuple[int, int], ...]:
        slot = _slot_of(stream)
        new = self._table.grow(slot, length)
        stream.room = self._table.num_owned(slot) * self._table.page_length
        return new

    def _has_room(self, stream: Stream) -> bool:
        # A page for each stream that will still grow: else the newcomer would be preempted at once
        # and its prefill lost. When none runs, every page is free, and add() saw that it fits.
        num_growing = sum(self._will_grow(other) for other in self._held)
        return self._table.num_pages_for(_admission_length(stream)) + num_growing <= self._table.num_free

    def _will_grow(self, stream: Stream) -> bool:
        if stream.is_leaving:
            return False
        return self._table.num_missing(_slot_of(stream), stream.final_cache_length) > 0

    def _plan_decode(self) -> Decode | None:
        slots: list[int] = []
        new_pages: list[tuple[int, int, int]] = []
        for stream in tuple(self._held):  # the oldest is the one that gets the last page
            if not stream.can_decode:
                continue
            slot = _slot_of(stream)
            if stream.cache_length > stream.room:
                if not self._make_room(stream):
                    continue
                new = self._grow(stream, stream.cache_length)
                new_pages += [(slot, index, page) for index, page in new]
            slots.append(slot)
        return Decode(tuple(sorted(slots)), tuple(new_pages)) if slots else None

    def _make_room(self, stream: Stream) -> bool:
        """See that the stream's next token has a page; False: it sits this step out."""
        while self._table.num_missing(_slot_of(stream), stream.cache_length) > self._table.num_free:
            if any(other.is_leaving for other in self._held):
                return False  # pages come back when a step in flight is read
            newest = self._held[-1]
            self._preempt(newest)
            if newest is stream:
                return False
        return True

    def _preempt(self, stream: Stream) -> None:
        stream.state = "preempted"
        self._release_if_done(stream)

    def _release_if_done(self, stream: Stream) -> None:
        if stream.slot is None or stream.in_flight or stream.state not in ("preempted", "ended"):
            return
        self._table.release(stream.slot)
        self._slots[stream.slot] = None
        self._held.remove(stream)
        stream.slot = None
        if stream.state == "preempted":
            self._requeue(stream)

    def _requeue(self, stream: Stream) -> None:
        # By id, which puts it in front: whoever waits without having run is younger.
        stream.state = "waiting"
        stream.num_prefilled = 0
        assert stream.num_launched == len(stream.generated_ids), "a token was read and not recorded"
        insort(self._waiting, stream, key=_arrival)


def _arrival(stream: Stream) -> int:
    return stream.request_id


def _slot_of(stream: Stream) -> int:
    assert stream.slot is not None
    return stream.slot


def _admission_length(stream: Stream) -> int:
    """The tokens that a request must have room for to be admitted: its own and one decode step's."""
    return min(len(stream.request.prompt_ids) + len(stream.generated_ids) + 1, stream.final_cache_length)
