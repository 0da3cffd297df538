from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from fake_steps import EOS, VOCAB_SIZE, FakeSteps, expected_ids, scramble

from jaxmoe.engine import Engine
from jaxmoe.request import (
    Decode,
    EngineStats,
    EngineStopped,
    Prefill,
    QueueFull,
    Request,
    RequestError,
    SamplingParams,
    TokenLogprobs,
)

PATIENCE = 20.0  # seconds until a test gives up; no test waits that long when all is well


@dataclass
class Client:
    """One request and everything that the engine told it, in order."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    on_token: Callable[[Client, int], bool] = lambda client, token_id: True
    token_ids: list[int] = field(default_factory=list)
    heard: list[Any] = field(default_factory=list)
    finishes: list[tuple[str, str | None]] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    request_id: int = -1

    def request(self) -> Request:
        return Request(self.prompt_ids, self.params, self._on_token, self._on_logprobs, self._on_finish)

    def wait(self) -> tuple[str, str | None]:
        assert self.done.wait(PATIENCE), "no on_finish"
        return self.finishes[0]

    def _on_token(self, token_id: int) -> bool:
        assert not self.finishes, "a token after on_finish"
        assert threading.current_thread().name == "jaxmoe-engine"
        self.token_ids.append(token_id)
        self.heard.append(token_id)
        return self.on_token(self, token_id)

    def _on_logprobs(self, logprobs: TokenLogprobs) -> None:
        self.heard.append(logprobs)

    def _on_finish(self, reason: str, message: str | None) -> None:
        assert threading.current_thread().name == "jaxmoe-engine"
        self.finishes.append((reason, message))
        self.done.set()


class Bench:
    """An engine on fake steps; it starts when `start` or `wait_until_free` is called."""

    def __init__(
        self, steps: FakeSteps | None = None, *, prefill_chunk: int = 8, max_waiting: int = 16
    ) -> None:
        self.steps = steps or FakeSteps()
        self.num_after_steps = 0
        self._changed = threading.Condition()
        self.clients: list[Client] = []
        self.engine = Engine(
            self.steps,
            eos_ids=frozenset({EOS}),
            prefill_chunk=prefill_chunk,
            max_waiting=max_waiting,
            after_step=self._after_step,
        )
        self.after_step: Callable[[], None] = lambda: None

    def _after_step(self) -> None:
        with self._changed:
            self.num_after_steps += 1
            self._changed.notify_all()
        self.after_step()

    def submit(
        self,
        prompt_length: int = 4,
        *,
        on_token: Callable[[Client, int], bool] = lambda client, token_id: True,
        **params: Any,
    ) -> Client:
        first = len(self.clients) * 7
        prompt_ids = tuple((first + position) % EOS for position in range(prompt_length))
        client = Client(prompt_ids, SamplingParams(**{"seed": 0, **params}), on_token)
        self.clients.append(client)
        client.request_id = self.engine.submit(client.request())
        return client

    def start(self) -> None:
        self.engine.start()

    def cancel(self, client: Client) -> None:
        self.engine.cancel(client.request_id)

    def wait_until(self, condition: Callable[[EngineStats], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.engine.stats()), PATIENCE), (
                self.engine.stats()
            )

    def wait_until_free(self) -> None:
        total = self.steps.num_pages
        self.wait_until(lambda stats: stats == EngineStats(0, 0, total, total))

    def run(self) -> None:
        """Start, and see all requests finish once and leave nothing behind."""
        self.start()
        for client in self.clients:
            client.wait()
        self.wait_until_free()
        assert [len(client.finishes) for client in self.clients] == [1] * len(self.clients)

    def expected(self, client: Client, num: int) -> list[int]:
        return expected_ids(client.prompt_ids, num, seed=client.params.seed or 0, rule=self.steps.rule)

    def num_sampled(self) -> int:
        """How many tokens the device has sampled, wanted or not."""
        return sum(
            len(step.slots) if isinstance(step, Decode) else step.is_last for step in self.steps.launched
        )


@pytest.fixture
def benches() -> Iterator[list[Bench]]:
    made: list[Bench] = []
    yield made
    for bench in made:
        assert bench.engine.stop(PATIENCE)
        assert all(len(client.finishes) == 1 for client in bench.clients if client.request_id >= 0)


@pytest.fixture
def make(benches: list[Bench]) -> Callable[..., Bench]:
    def make_bench(**kwargs: Any) -> Bench:
        engine = {key: kwargs.pop(key) for key in ("prefill_chunk", "max_waiting") if key in kwargs}
        benches.append(Bench(FakeSteps(**kwargs), **engine))
        return benches[-1]

    return make_bench


Make = Callable[..., Bench]


def say(*answer: int) -> Callable[[Sequence[int], int], int]:
    """A rule for prompts of 4: the answer's ids one after the other, then zeros."""
    return lambda token_ids, seed: answer[len(token_ids) - 4] if len(token_ids) - 4 < len(answer) else 0


# How a generation ends


def test_max_tokens_ends_with_length_and_no_token_is_computed_in_vain(make: Make) -> None:
    bench = make()
    client = bench.submit(max_tokens=10)
    bench.run()
    assert client.finishes == [("length", None)]
    assert client.token_ids == bench.expected(client, 10)
    assert bench.num_sampled() == 10


def test_no_max_tokens_means_all_that_the_context_leaves(make: Make) -> None:
    bench = make(context_length=32)
    client = bench.submit(12)
    bench.run()
    assert len(client.token_ids) == 20


def test_an_end_token_is_delivered_and_stops(make: Make) -> None:
    bench = make(rule=say(5, 6, EOS))
    client = bench.submit(max_tokens=10)
    bench.run()
    assert client.token_ids == [5, 6, EOS]
    assert client.finishes == [("stop", None)]
    assert bench.num_sampled() == 4  # the one in flight was dropped


def test_an_end_token_on_the_last_position_is_stop(make: Make) -> None:
    bench = make(rule=say(5, 6, EOS))
    client = bench.submit(max_tokens=3)
    bench.run()
    assert client.finishes == [("stop", None)]


def test_ignore_eos_goes_on_to_length(make: Make) -> None:
    bench = make(rule=say(5, EOS, 6, EOS))
    client = bench.submit(max_tokens=4, ignore_eos=True)
    bench.run()
    assert client.token_ids == [5, EOS, 6, EOS]
    assert client.finishes == [("length", None)]


def test_on_token_returning_false_stops_and_drops_the_id_in_flight(make: Make) -> None:
    bench = make()
    client = bench.submit(max_tokens=50, on_token=lambda client, _: len(client.token_ids) < 3)
    bench.run()
    assert client.token_ids == bench.expected(client, 3)
    assert client.finishes == [("stop", None)]
    assert bench.num_sampled() == 4


def test_the_end_token_reaches_on_token_before_any_stop_check(make: Make) -> None:
    bench = make(rule=say(EOS))
    client = bench.submit(max_tokens=1, on_token=lambda client, _: False)
    bench.run()
    assert client.token_ids == [EOS]
    assert client.finishes == [("stop", None)]


def test_logprobs_come_just_before_their_token_and_only_when_asked_for(make: Make) -> None:
    bench = make()
    asked = bench.submit(max_tokens=2, logprobs=0)
    silent = bench.submit(max_tokens=2)
    bench.run()
    assert [type(heard) for heard in asked.heard] == [TokenLogprobs, int, TokenLogprobs, int]
    assert [logprobs.token_id for logprobs in asked.heard[::2]] == asked.heard[1::2]
    assert silent.heard == silent.token_ids


# Many at a time


def test_requests_beside_each_other_get_what_they_would_get_alone(make: Make) -> None:
    bench = make(num_slots=3)
    clients = [bench.submit(1 + 5 * i, max_tokens=4 + 3 * i) for i in range(8)]
    bench.run()
    for i, client in enumerate(clients):
        assert client.token_ids == bench.expected(client, 4 + 3 * i)
    assert max(len(step.slots) for step in bench.steps.launched if isinstance(step, Decode)) == 3


def test_preempted_requests_lose_and_repeat_nothing(make: Make) -> None:
    bench = make(num_slots=4, num_pages=9, page_length=4)
    clients = [bench.submit(5, max_tokens=20) for _ in range(4)]
    bench.run()
    for client in clients:
        assert client.token_ids == bench.expected(client, 20)
    again = [occupant for occupant in bench.steps.admitted if occupant.generated_ids]
    assert again, "nobody was preempted"
    assert all(len(occupant.prompt_ids) == 5 for occupant in bench.steps.admitted)


def test_a_request_may_use_the_whole_cache(make: Make) -> None:
    bench = make(num_pages=4, page_length=4, context_length=1000)
    assert bench.engine.context_length == 16
    client = bench.submit(9)
    bench.run()
    assert client.token_ids == bench.expected(client, 7)


def test_equal_seeds_give_equal_ids_whatever_the_neighbours(make: Make) -> None:
    bench = make(num_slots=2)
    client = bench.submit(max_tokens=6, seed=11)
    for seed in range(3):
        bench.submit(9, max_tokens=5, seed=seed)
    bench.run()
    assert client.token_ids == expected_ids(client.prompt_ids, 6, seed=11)


def test_without_a_seed_one_is_drawn_for_each_request_and_kept(make: Make) -> None:
    bench = make(num_slots=4, num_pages=9, page_length=4)
    clients = [bench.submit(5, max_tokens=20, seed=None) for _ in range(4)]
    bench.run()
    seeds = {occupant.prompt_ids: set() for occupant in bench.steps.admitted}
    for occupant in bench.steps.admitted:
        seeds[occupant.prompt_ids].add(occupant.seed)
    assert len(bench.steps.admitted) > 4, "nobody was preempted"
    assert [len(of_one) for of_one in seeds.values()] == [1] * 4
    assert len(set.union(*seeds.values())) == 4
    for client in clients:
        (seed,) = seeds[client.prompt_ids]
        assert client.token_ids == expected_ids(client.prompt_ids, 20, seed=seed)


# The loop


def test_each_step_is_launched_before_the_one_ahead_of_it_is_read(make: Make) -> None:
    bench = make()
    bench.submit(20, max_tokens=6)
    bench.run()
    num_steps = len(bench.steps.launched)
    assert num_steps == 3 + 5
    ahead = [entry for n in range(num_steps - 1) for entry in (("launch", n + 1), ("read", n))]
    assert bench.steps.log == [("launch", 0), *ahead, ("read", num_steps - 1)]


def test_after_step_is_called_once_a_step_after_its_tokens(make: Make) -> None:
    bench = make()
    client = bench.submit(max_tokens=5)
    seen: list[int] = []
    bench.after_step = lambda: seen.append(len(client.token_ids))
    bench.run()
    assert seen == [1, 2, 3, 4, 5]


def test_after_step_is_called_for_steps_without_tokens_too(make: Make) -> None:
    bench = make(rule=lambda token_ids, seed: EOS)
    bench.submit(20, max_tokens=9)
    calls: list[str] = []
    freed = threading.Event()

    def note_call() -> None:
        calls.append("after_step")
        if bench.engine.stats().running == 0:
            freed.set()

    bench.after_step = note_call
    bench.start()
    assert freed.wait(PATIENCE)
    assert len(bench.steps.launched) == 4  # three chunks, and a decode step that was dropped
    assert len(calls) == 4


def test_after_step_follows_a_finish_without_a_step(make: Make) -> None:
    bench = make(num_slots=1)
    client = bench.submit(max_tokens=5)
    bench.cancel(client)
    bench.run()
    assert bench.steps.launched == []
    assert bench.num_after_steps == 1


def test_a_request_joins_between_two_steps_of_another(make: Make) -> None:
    bench = make()
    bench.submit(max_tokens=20)
    late: list[Client] = []

    def join(number: int) -> None:
        if number == 5:
            late.append(bench.submit(3, max_tokens=2))

    bench.steps.on_launch = join
    bench.start()
    bench.clients[0].wait()
    assert late[0].token_ids == bench.expected(late[0], 2)
    assert isinstance(bench.steps.launched[6], Prefill)
    assert bench.steps.launched[7] == Decode((0, 1), ())


def test_an_engine_at_rest_wakes_up_for_a_request(make: Make) -> None:
    bench = make()
    bench.start()
    for _ in range(3):
        bench.submit(max_tokens=3).wait()
        bench.wait_until_free()


# Cancel


def test_a_request_cancelled_in_the_queue_never_touches_the_device(make: Make) -> None:
    bench = make(num_slots=1)
    first, second, third = (bench.submit(max_tokens=6) for _ in range(3))
    bench.steps.on_launch = lambda number: bench.cancel(second) if number == 2 else None
    bench.run()
    assert second.finishes == [("cancelled", None)]
    assert second.token_ids == []
    assert [occupant.prompt_ids for occupant in bench.steps.admitted] == [first.prompt_ids, third.prompt_ids]
    assert third.token_ids == bench.expected(third, 6)


def test_a_request_cancelled_between_prefill_chunks_does_no_further_work(make: Make) -> None:
    bench = make(prefill_chunk=4)
    client = bench.submit(40, max_tokens=6)
    bench.steps.on_launch = lambda number: bench.cancel(client) if number == 2 else None
    bench.run()
    assert client.finishes == [("cancelled", None)]
    assert len(bench.steps.launched) == 3


def test_a_request_cancelled_in_decode_gets_nothing_of_the_steps_in_flight(make: Make) -> None:
    bench = make()
    client, other = bench.submit(max_tokens=30), bench.submit(max_tokens=30)
    bench.steps.on_launch = lambda number: bench.cancel(client) if number == 7 else None
    bench.run()
    assert client.finishes == [("cancelled", None)]
    num_before = sum(0 in step.slots for step in bench.steps.launched[:6] if isinstance(step, Decode))
    assert client.token_ids == bench.expected(client, 1 + num_before)
    after = [step for step in bench.steps.launched[8:] if isinstance(step, Decode)]
    assert after
    assert not any(0 in step.slots for step in after)
    assert other.token_ids == bench.expected(other, 30)


def test_a_cancel_that_comes_while_a_step_is_read_drops_its_token(make: Make) -> None:
    bench = make()
    client = bench.submit(max_tokens=30)
    bench.steps.on_read = lambda number: bench.cancel(client) if number == 4 else None
    bench.run()
    assert client.token_ids == bench.expected(client, 4)
    assert client.finishes == [("cancelled", None)]


def test_cancel_twice_late_or_of_nobody_is_nothing(make: Make) -> None:
    bench = make()
    client, other = bench.submit(max_tokens=4), bench.submit(max_tokens=8)
    bench.cancel(client)
    bench.cancel(client)
    bench.engine.cancel(12345)
    bench.run()
    bench.cancel(client)
    bench.cancel(other)
    bench.submit(max_tokens=2).wait()
    assert client.finishes == [("cancelled", None)]
    assert other.finishes == [("length", None)]


def test_a_request_may_cancel_itself_from_its_callback(make: Make) -> None:
    bench = make()

    def cancel_at_three(client: Client, _: int) -> bool:
        if len(client.token_ids) == 3:
            bench.cancel(client)
        return True

    client = bench.submit(max_tokens=30, on_token=cancel_at_three)
    bench.run()
    assert client.token_ids == bench.expected(client, 3)
    assert client.finishes == [("cancelled", None)]


def test_50_random_cancels_under_8_streams_leave_everything_free(make: Make) -> None:
    chance = random.Random(50)
    bench = make(num_slots=8, num_pages=40, page_length=4, prefill_chunk=4, max_waiting=100)
    left = [bench.submit(chance.randrange(1, 30), max_tokens=12) for _ in range(80)]
    cancelled: list[Client] = []

    def cancel_one(_: int) -> None:
        left[:] = [client for client in left if not client.finishes]
        if left and len(cancelled) < 50 and chance.random() < 0.4:
            cancelled.append(left.pop(chance.randrange(min(len(left), 16))))  # half of these run
            bench.cancel(cancelled[-1])

    bench.steps.on_launch = cancel_one
    bench.run()
    assert len(cancelled) == 50
    assert {len(client.token_ids) > 0 for client in cancelled} == {True, False}
    for client in bench.clients:
        num = len(client.token_ids)
        assert client.token_ids == bench.expected(client, num)
        reason = "cancelled" if client in cancelled else "length"
        assert client.finishes == [(reason, None)]
        assert num < 12 if reason == "cancelled" else num == 12


def test_clients_on_other_threads_disconnect_at_any_moment(make: Make) -> None:
    bench = make(num_slots=8, num_pages=40, page_length=4, prefill_chunk=4, max_waiting=64)
    bench.start()

    def use(number: int) -> None:
        chance = random.Random(number)
        for _ in range(7):
            reached = threading.Event()
            last = chance.randrange(1, 9)
            params = SamplingParams(seed=0, max_tokens=12)

            def on_token(
                client: Client, _: int, last: int = last, reached: threading.Event = reached
            ) -> bool:
                if len(client.token_ids) == last:
                    reached.set()
                return True

            client = Client(tuple(range(1 + number)), params, on_token)
            client.request_id = bench.engine.submit(client.request())
            bench.clients.append(client)
            assert reached.wait(PATIENCE)
            bench.cancel(client)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for client in bench.clients:
        assert client.wait() in [("cancelled", None), ("length", None)]
        assert client.token_ids == bench.expected(client, len(client.token_ids))
    assert len(bench.clients) == 56
    bench.wait_until_free()


# Failures


def fail_at(number: int) -> Callable[[int], None]:
    def hook(seen: int) -> None:
        if seen == number:
            raise RuntimeError("out of device memory")

    return hook


@pytest.mark.parametrize("where", ["on_launch", "on_read"])
@pytest.mark.parametrize(("number", "num_failed"), [(0, 1), (6, 2)])
def test_a_failed_step_ends_those_that_run_and_serves_those_that_wait(
    make: Make, caplog: pytest.LogCaptureFixture, where: str, number: int, num_failed: int
) -> None:
    bench = make(num_slots=2, prefill_chunk=4)
    clients = [bench.submit(5, max_tokens=8) for _ in range(4)]
    setattr(bench.steps, where, fail_at(number))
    bench.run()
    failed = [client for client in clients if client.finishes[0][0] == "error"]
    assert failed == clients[:num_failed]
    assert bench.steps.num_resets == 1
    for client in clients:
        if client in failed:
            assert client.finishes == [("error", "a step of the engine failed")]
            assert client.token_ids == bench.expected(client, len(client.token_ids))
        else:
            assert client.token_ids == bench.expected(client, 8)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "out of device memory" in caplog.text
    assert "prompt" not in record.getMessage()


def test_a_failing_admit_is_a_failed_step(make: Make) -> None:
    bench = make()
    client = bench.submit(max_tokens=8)
    admit = bench.steps.admit

    def fail_once(*args: Any, **kwargs: Any) -> None:
        bench.steps.admit = admit  # type: ignore[method-assign]
        raise RuntimeError("no")

    bench.steps.admit = fail_once  # type: ignore[method-assign]
    other = bench.submit(max_tokens=8)
    bench.run()
    assert client.finishes[0][0] == "error"
    assert other.token_ids == bench.expected(other, 8)


def test_an_engine_that_cannot_be_reset_ends_everyone_and_says_so(make: Make) -> None:
    bench = make(num_slots=1)
    bench.submit(max_tokens=8)
    bench.submit(max_tokens=8)
    bench.steps.on_launch = fail_at(3)

    def fail() -> None:
        raise RuntimeError("the device is gone")

    bench.steps.reset = fail  # type: ignore[method-assign]
    bench.run()
    assert [client.finishes[0][0] for client in bench.clients] == ["error", "error"]
    with pytest.raises(EngineStopped):
        bench.engine.submit(Client((1,), SamplingParams()).request())


def test_a_callback_that_raises_ends_its_own_request_only(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def raise_at_two(client: Client, _: int) -> bool:
        if len(client.token_ids) == 2:
            raise ValueError("a mistake of the caller")
        return True

    bench = make()
    client, other = bench.submit(max_tokens=9, on_token=raise_at_two), bench.submit(max_tokens=9)
    bench.run()
    assert client.finishes == [("error", "a callback of this request failed")]
    assert len(client.token_ids) == 2
    assert other.token_ids == bench.expected(other, 9)
    assert "a mistake of the caller" in caplog.text


def test_on_finish_and_after_step_may_raise_without_harm(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make()

    def fail(*_: object) -> None:
        raise ValueError("a mistake of the caller")

    bench.engine.submit(Request((1,), SamplingParams(max_tokens=2), lambda _: True, on_finish=fail))
    bench.after_step = fail
    client = bench.submit(max_tokens=9)
    bench.run()
    assert client.token_ids == bench.expected(client, 9)
    assert "on_finish of request 0 raised" in caplog.text
    assert "after_step raised" in caplog.text


# Start and stop


def test_stop_cancels_what_is_left_and_says_when_the_device_holds_the_thread(make: Make) -> None:
    bench = make(num_slots=1)
    clients = [bench.submit(20, max_tokens=60) for _ in range(3)]
    held, released = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        if number == 8:
            held.set()
            assert released.wait(PATIENCE)

    bench.steps.on_read = hold
    bench.start()
    assert held.wait(PATIENCE)
    assert not bench.engine.stop(0.01)
    with pytest.raises(EngineStopped):
        bench.engine.submit(Client((1,), SamplingParams()).request())
    released.set()
    assert bench.engine.stop(PATIENCE)
    assert bench.engine.stop(PATIENCE)
    assert [client.finishes for client in clients] == [[("cancelled", None)]] * 3
    assert clients[0].token_ids == bench.expected(clients[0], len(clients[0].token_ids))
    assert bench.engine.stats() == EngineStats(0, 0, 64, 64)


def test_an_engine_that_was_never_started_still_finishes_its_requests(make: Make) -> None:
    bench = make()
    client = bench.submit(max_tokens=3)
    assert bench.engine.stop(PATIENCE)
    assert client.finishes == [("cancelled", None)]
    assert bench.steps.launched == []
    assert bench.num_after_steps == 1


# What submit takes


@pytest.mark.parametrize(
    ("prompt_ids", "params", "param", "message"),
    [
        ((), {}, "prompt", "the prompt is empty"),
        ((1, VOCAB_SIZE), {}, "prompt", "token id 100 is not between 0 and 99"),
        ((-1, 1), {}, "prompt", "token id -1 is not between 0 and 99"),
        ((1,), {"logit_bias": {5: 1.0, VOCAB_SIZE: 1.0}}, "logit_bias", "token id 100"),
    ],
)
def test_a_request_out_of_range_is_refused(
    make: Make, prompt_ids: tuple[int, ...], params: dict[str, Any], param: str, message: str
) -> None:
    bench = make()
    with pytest.raises(RequestError, match=message) as caught:
        bench.engine.submit(Client(prompt_ids, SamplingParams(**params)).request())
    assert (caught.value.param, caught.value.code) == (param, None)
    assert bench.engine.stats().waiting == 0


@pytest.mark.parametrize(
    ("prompt_length", "max_tokens", "param", "numbers"),
    [
        (32, None, "prompt", ("32", "32")),
        (40, 5, "prompt", ("32", "40")),
        (30, 3, "max_tokens", ("32", "33")),
    ],
)
def test_a_request_longer_than_the_context_is_refused_with_both_numbers(
    make: Make, prompt_length: int, max_tokens: int | None, param: str, numbers: tuple[str, str]
) -> None:
    bench = make(context_length=32)
    with pytest.raises(RequestError) as caught:
        bench.engine.submit(Client((1,) * prompt_length, SamplingParams(max_tokens=max_tokens)).request())
    assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")
    assert all(number in str(caught.value) for number in numbers)


def test_a_request_that_just_fits_is_taken(make: Make) -> None:
    bench = make(context_length=32)
    bench.submit(31, max_tokens=1)
    bench.submit(1, max_tokens=31)
    bench.run()
    assert [len(client.token_ids) for client in bench.clients] == [1, 31]


def test_a_full_queue_refuses_and_takes_again_later(make: Make) -> None:
    bench = make(num_slots=1, max_waiting=2)
    for _ in range(3):  # one for the slot, two that wait
        bench.submit(max_tokens=4)
    with pytest.raises(QueueFull, match="2 requests are waiting") as caught:
        bench.engine.submit(Client((1,), SamplingParams()).request())
    assert caught.value.code == "queue_full"
    bench.run()
    bench.submit(max_tokens=4).wait()


def test_stats_count_slots_queue_and_pages_in_one_moment(make: Make) -> None:
    bench = make(num_slots=2, num_pages=10, page_length=4)
    for _ in range(5):
        bench.submit(6, max_tokens=8)
    assert bench.engine.stats() == EngineStats(running=0, waiting=5, free_pages=10, total_pages=10)
    seen: list[EngineStats] = []
    bench.after_step = lambda: seen.append(bench.engine.stats())
    bench.steps.on_launch = lambda number: seen.append(bench.engine.stats())
    bench.run()
    assert seen[0].running + seen[0].waiting == 5
    assert EngineStats(running=2, waiting=3, free_pages=6, total_pages=10) in seen
    assert all(stats.free_pages <= 10 - 2 * stats.running for stats in seen)
    unfinished = [stats.running + stats.waiting for stats in seen]
    assert unfinished == sorted(unfinished, reverse=True)


def test_the_rule_of_the_fake_depends_on_every_token_and_the_seed() -> None:
    assert scramble([1, 2, 3], 0) != scramble([1, 2, 4], 0)
    assert scramble([1, 2, 3], 0) != scramble([9, 2, 3], 0)
    assert scramble([1, 2, 3], 0) != scramble([1, 2, 3], 1)
