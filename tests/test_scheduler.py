from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from fake_steps import FakeSteps, expected_ids
from hypothesis import event, given, settings
from hypothesis import strategies as st

from jaxmoe.request import Decode, Prefill, Request, SamplingParams, Step
from jaxmoe.scheduler import Scheduler, Stream


def make_scheduler(
    *, num_slots: int = 4, num_pages: int = 64, page_length: int = 4, prefill_chunk: int = 8
) -> Scheduler:
    return Scheduler(
        num_slots=num_slots, num_pages=num_pages, page_length=page_length, prefill_chunk=prefill_chunk
    )


def make_stream(request_id: int, prompt_length: int, max_tokens: int) -> Stream:
    prompt_ids = tuple((request_id * 31 + position) % 97 for position in range(prompt_length))
    request = Request(prompt_ids, SamplingParams(), on_token=lambda token_id: True)
    return Stream(request_id, request, max_tokens=max_tokens, seed=request_id)


def add(scheduler: Scheduler, request_id: int, prompt_length: int, max_tokens: int) -> Stream:
    stream = make_stream(request_id, prompt_length, max_tokens)
    scheduler.add(stream)
    return stream


def read(scheduler: Scheduler, step: Step, token_id: int = 7) -> None:
    """What the engine does with a step that it has read; a stream ends at its max_tokens."""
    for stream in scheduler.sampled(step):
        if stream.state != "ended":
            stream.generated_ids.append(token_id)
            if len(stream.generated_ids) == stream.max_tokens:
                scheduler.end(stream)
    scheduler.retire(step)


def plan_and_read(scheduler: Scheduler) -> Step | None:
    step = scheduler.next_step()
    if step is not None:
        read(scheduler, step)
    return step


def run_out(scheduler: Scheduler) -> list[Step]:
    """Read every step at once until nothing is left to do."""
    steps = []
    while step := plan_and_read(scheduler):
        steps.append(step)
    assert scheduler.is_idle
    return steps


def test_nothing_to_do_is_no_step() -> None:
    scheduler = make_scheduler()
    assert scheduler.next_step() is None
    assert scheduler.is_idle


def test_a_prompt_goes_in_chunks_and_the_last_one_samples() -> None:
    scheduler = make_scheduler(prefill_chunk=8)
    stream = add(scheduler, 0, 20, 2)
    steps = [scheduler.next_step() for _ in range(4)]
    prefills = [step for step in steps[:3] if isinstance(step, Prefill)]
    assert [(step.start, len(step.token_ids), step.is_last) for step in prefills] == [
        (0, 8, False),
        (8, 8, False),
        (16, 4, True),
    ]
    assert sum((step.token_ids for step in prefills), ()) == stream.request.prompt_ids
    assert all(len(step.pages) == 6 for step in prefills)  # the prompt and the next token
    assert steps[3] == Decode((0,), ())
    assert scheduler.next_step() is None  # both tokens are launched, none is read


def test_a_decode_step_follows_each_chunk_while_streams_run() -> None:
    scheduler = make_scheduler(prefill_chunk=4)
    add(scheduler, 0, 4, 20)
    assert isinstance(scheduler.next_step(), Prefill)
    assert isinstance(scheduler.next_step(), Decode)
    add(scheduler, 1, 12, 20)
    kinds = [type(scheduler.next_step()) for _ in range(6)]
    assert kinds == [Prefill, Decode, Prefill, Decode, Prefill, Decode]


def test_a_request_decodes_beside_the_others_from_the_step_after_its_prefill() -> None:
    scheduler = make_scheduler()
    for request_id in range(3):
        add(scheduler, request_id, 4, 10)
    decodes = [step.slots for step in (scheduler.next_step() for _ in range(6)) if isinstance(step, Decode)]
    assert decodes == [(0,), (0, 1), (0, 1, 2)]


def test_a_growing_stream_gets_one_page_at_each_page_boundary() -> None:
    scheduler = make_scheduler(page_length=4)
    add(scheduler, 0, 6, 8)
    first = plan_and_read(scheduler)
    assert isinstance(first, Prefill)
    assert len(first.pages) == 2
    new_pages = [step.new_pages for step in run_out(scheduler) if isinstance(step, Decode)]
    assert [len(pages) for pages in new_pages] == [0, 0, 1, 0, 0, 0, 1]
    assert [pages[0][:2] for pages in new_pages if pages] == [(0, 2), (0, 3)]


def test_tokens_in_flight_count_towards_max_tokens() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, 3, 3)
    steps = [scheduler.next_step() for _ in range(3)]
    assert None not in steps
    assert scheduler.next_step() is None
    assert scheduler.num_running == 1


def test_a_single_token_needs_no_decode_and_no_page_for_one() -> None:
    scheduler = make_scheduler(num_pages=2, page_length=4)
    add(scheduler, 0, 8, 1)
    assert [type(step) for step in run_out(scheduler)] == [Prefill]


def test_a_slot_returns_only_when_the_last_step_that_carries_it_was_read() -> None:
    scheduler = make_scheduler(num_slots=1)
    stream = add(scheduler, 0, 4, 10)
    add(scheduler, 1, 4, 10)
    prefill, decode = scheduler.next_step(), scheduler.next_step()
    assert prefill is not None
    assert decode is not None
    scheduler.end(stream)
    assert scheduler.next_step() is None
    scheduler.retire(prefill)
    assert scheduler.next_step() is None
    assert scheduler.num_free_pages < 64
    scheduler.retire(decode)
    assert scheduler.num_free_pages == 64
    assert isinstance(scheduler.next_step(), Prefill)


def test_requests_are_admitted_in_order_even_when_a_later_one_would_fit() -> None:
    scheduler = make_scheduler(num_pages=8, page_length=4)
    add(scheduler, 0, 20, 4)
    add(scheduler, 1, 20, 4)
    add(scheduler, 2, 4, 4)
    admitted = [step.start == 0 and step.slot for step in run_out(scheduler) if isinstance(step, Prefill)]
    assert scheduler.num_free_pages == 8
    assert [slot for slot in admitted if slot is not False] == [0, 0, 1]


def test_admission_leaves_a_page_for_each_stream_that_still_grows() -> None:
    scheduler = make_scheduler(num_pages=4, page_length=4)
    growing = add(scheduler, 0, 4, 9)  # holds 2 of the 3 pages that it will need
    late = add(scheduler, 1, 4, 5)  # would take the last 2
    for _ in range(8):
        plan_and_read(scheduler)
        assert (growing.state, late.state) == ("running", "waiting")
    run_out(scheduler)
    assert len(late.generated_ids) == 5


def test_an_ended_request_waits_for_nothing_and_is_not_carried() -> None:
    scheduler = make_scheduler()
    streams = [add(scheduler, request_id, 4, 10) for request_id in range(3)]
    for _ in range(6):
        plan_and_read(scheduler)
    scheduler.end(streams[1])
    assert scheduler.num_running == 2
    assert scheduler.next_step() == Decode((0, 2), ())
    assert scheduler.find(1) is None
    assert scheduler.unfinished() == [streams[0], streams[2]]


def test_a_request_that_ends_in_the_queue_or_between_chunks_is_gone() -> None:
    scheduler = make_scheduler(num_slots=1, prefill_chunk=2)
    first, second, third = (add(scheduler, request_id, 6, 3) for request_id in range(3))
    plan_and_read(scheduler)
    scheduler.end(second)
    scheduler.end(first)
    scheduler.end(first)
    assert scheduler.num_free_pages == 64
    run_out(scheduler)
    assert (first.generated_ids, second.generated_ids, len(third.generated_ids)) == ([], [], 3)


def test_the_request_admitted_last_is_preempted_and_computed_again() -> None:
    scheduler = make_scheduler(num_slots=3, num_pages=6, page_length=4)
    streams = [add(scheduler, request_id, 4, 17) for request_id in range(2)]
    later = add(scheduler, 2, 1, 2)
    steps = run_out(scheduler)
    again = [step for step in steps if isinstance(step, Prefill) and len(step.token_ids) > 4]
    assert len(again) >= 1
    generated = len(again[0].token_ids) - 4
    assert again[0].token_ids == (*streams[1].request.prompt_ids, *[7] * generated)
    assert again[0].start == 0
    assert [len(stream.generated_ids) for stream in (*streams, later)] == [17, 17, 2]
    assert (scheduler.num_free_pages, scheduler.num_running) == (6, 0)


def test_a_preempted_request_keeps_the_token_in_flight_and_its_pages_until_then() -> None:
    scheduler = make_scheduler(num_slots=2, num_pages=4, page_length=4, prefill_chunk=4)
    old, new = add(scheduler, 0, 4, 12), add(scheduler, 1, 3, 12)
    in_flight = scheduler.next_step()
    while new.state != "preempted":
        assert in_flight is not None
        following = scheduler.next_step()
        if new.state != "preempted":
            read(scheduler, in_flight)
            in_flight = following
    assert following is None or new.slot not in getattr(following, "slots", ())
    num_generated, num_free = len(new.generated_ids), scheduler.num_free_pages
    assert in_flight is not None
    read(scheduler, in_flight)
    assert len(new.generated_ids) == num_generated + 1
    assert new.state == "waiting"
    assert scheduler.num_free_pages > num_free
    if following is not None:
        read(scheduler, following)
    run_out(scheduler)
    assert (len(old.generated_ids), len(new.generated_ids)) == (12, 12)


def test_preempted_requests_go_back_in_front_in_their_order() -> None:
    scheduler = make_scheduler(num_slots=4)
    streams = [add(scheduler, request_id, 4, 10) for request_id in range(3)]
    add(scheduler, 3, 4, 10)
    for _ in range(6):
        plan_and_read(scheduler)
    waiting_before = scheduler.num_waiting
    for stream in (streams[2], streams[1]):
        scheduler._preempt(stream)
    assert [stream.request_id for stream in scheduler._waiting][:2] == [1, 2]
    assert scheduler.num_waiting == waiting_before + 2


def test_a_failed_step_leaves_nothing_in_flight() -> None:
    scheduler = make_scheduler()
    first = add(scheduler, 0, 4, 10)
    add(scheduler, 1, 4, 10)
    assert isinstance(scheduler.next_step(), Prefill)
    assert isinstance(scheduler.next_step(), Decode)
    assert scheduler.running() == [first]
    scheduler.end(first)
    scheduler.abandon_flight()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_free_pages) == (0, 1, 64)
    run_out(scheduler)


def test_a_request_that_could_never_fit_is_our_own_mistake() -> None:
    scheduler = make_scheduler(num_pages=4, page_length=4)
    scheduler.add(make_stream(0, 10, 7))  # the last token is never fed: 16 tokens
    with pytest.raises(AssertionError):
        scheduler.add(make_stream(1, 10, 8))


def test_pages_and_scheduler_load_without_jax() -> None:
    code = "import sys, jaxmoe.pages, jaxmoe.scheduler; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@dataclass
class Machine:
    """The engine's loop in small: submits, plans one step ahead, reads, cancels, and checks everything."""

    steps: FakeSteps
    scheduler: Scheduler
    streams: list[Stream] = field(default_factory=list)
    in_flight: list[tuple[Step, list[int]]] = field(default_factory=list)

    def submit(self, prompt_length: int, max_tokens: int) -> None:
        self.streams.append(add(self.scheduler, len(self.streams), prompt_length, max_tokens))

    def launch(self) -> bool:
        step = self.scheduler.next_step()
        assert step or self.in_flight or self.scheduler.is_idle, "no step, nothing in flight, not idle"
        if step is not None:
            self.in_flight.append((step, self._run(step)))
        self.check_pages()
        return step is not None

    def _run(self, step: Step) -> list[int]:
        if isinstance(step, Decode):
            return [token.token_id for token in self.steps.decode(step).read()]
        if step.start == 0:
            stream = self.scheduler.stream_in(step.slot)
            self.steps.admit(
                step.slot,
                stream.request.params,
                prompt_ids=stream.request.prompt_ids,
                generated_ids=stream.generated_ids,
                seed=stream.seed,
            )
        pending = self.steps.prefill(step)
        assert pending is not None
        return [token.token_id for token in pending.read()]

    def read_one(self) -> None:
        step, token_ids = self.in_flight.pop(0)
        for stream, token_id in zip(self.scheduler.sampled(step), token_ids, strict=True):
            if stream.state != "ended":
                stream.generated_ids.append(token_id)
                if len(stream.generated_ids) == stream.max_tokens:
                    self.scheduler.end(stream)
        self.scheduler.retire(step)

    def check_pages(self) -> None:
        table = self.scheduler._table
        owned = [page for slot in range(self.steps.num_slots) for page in table.pages(slot)]
        assert len(owned) == len(set(owned)), "a page is owned twice"
        assert len(owned) + table.num_free == self.steps.num_pages, "a page is lost"
        assert len(self.scheduler.running()) + self.scheduler.num_waiting == len(self.scheduler.unfinished())


@dataclass(frozen=True)
class Arrival:
    """A request of the property test: when it joins and when it is cancelled, in turns of the loop."""

    joins_at: int
    prompt_length: int
    max_tokens: int
    cancelled_at: int | None


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        joins_at=st.integers(0, 9),
        prompt_length=st.integers(1, 14),
        max_tokens=st.integers(1, 14),
        cancelled_at=st.none() | st.none() | st.integers(0, 60),
    ),
    min_size=3,
    max_size=12,
)


def run_all(machine: Machine, arrivals: list[Arrival], *, lag: int) -> None:
    """Launch a step a turn, and read each when `lag` more have been launched."""
    for turn in range(5_000):
        for arrival in arrivals:
            if arrival.joins_at == turn:
                machine.submit(arrival.prompt_length, arrival.max_tokens)
        for stream, arrival in zip(machine.streams, arrivals, strict=False):
            if turn == arrival.cancelled_at:
                machine.scheduler.end(stream)
        has_launched = machine.launch()
        if machine.in_flight and (len(machine.in_flight) > lag or not has_launched):
            machine.read_one()
            machine.check_pages()
        elif turn > 9 and not has_launched:
            return
    raise AssertionError("it never ends")


@settings(max_examples=200, deadline=None)
@given(
    num_slots=st.integers(2, 5),
    page_length=st.integers(1, 5),
    spare_pages=st.integers(0, 3),
    prefill_chunk=st.integers(1, 8),
    lag=st.integers(0, 2),
    arrivals=ARRIVALS,
)
def test_nothing_is_lost_and_every_request_gets_its_tokens(
    num_slots: int,
    page_length: int,
    spare_pages: int,
    prefill_chunk: int,
    lag: int,
    arrivals: list[Arrival],
) -> None:
    num_pages = -(-27 // page_length) + spare_pages  # the longest request alone: 14 + 14 - 1 tokens
    sizes = {"num_slots": num_slots, "num_pages": num_pages, "page_length": page_length}
    machine = Machine(FakeSteps(**sizes), make_scheduler(**sizes, prefill_chunk=prefill_chunk))
    arrivals.sort(key=lambda arrival: arrival.joins_at)
    run_all(machine, arrivals, lag=lag)
    assert (machine.scheduler.num_running, machine.scheduler.num_waiting) == (0, 0)
    assert machine.scheduler.num_free_pages == num_pages
    for stream, arrival in zip(machine.streams, arrivals, strict=True):
        num = len(stream.generated_ids)
        right = expected_ids(stream.request.prompt_ids, num, seed=stream.seed)
        assert stream.generated_ids == right
        assert num == stream.max_tokens or arrival.cancelled_at is not None
    event(f"preempted: {len(machine.steps.admitted) > len(arrivals)}")
