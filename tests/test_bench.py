"""What the bench computes, by hand; and one short run of all of it on the tiny file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_steps import FakeSteps
from gguf.constants import GGML_QUANT_SIZES

from jaxmoe.engine import Engine
from tools import bench, roofline
from tools.bench import Asked, BenchError, Case, Measured, Plan, Room, Timed
from tools.roofline import Weights
from tools.synth_gguf import PRESETS, plan_tensors

KEYS = {
    "what", "streams", "prompt_tokens", "context", "tok_per_s", "ttft_ms", "gap_ms_p50", "gap_ms_p95",
    "gap_ms_p99", "gb_per_s", "device_gb_per_s", "floor_share", "dispatch_us", "engine_share", "start_s",
}  # fmt: skip
DECODE = KEYS - {"engine_share", "start_s"}
HTTP_DECODE = KEYS - {"dispatch_us", "start_s"}
PREFILL = DECODE - {"gap_ms_p50", "gap_ms_p95", "gap_ms_p99", "dispatch_us"}
TTFT = {"what", "streams", "prompt_tokens", "context", "ttft_ms"}
HTTP_STARTUP = {"what", "context", "start_s"}
STARTUP = {"what", "context", "load_s", "compile_s", "host_peak_bytes", "host_peak_is", "device_bytes"}
FILLED = {
    "decode": DECODE, "prefill": PREFILL, "http_decode": HTTP_DECODE, "http_ttft": TTFT, "startup": STARTUP,
    "http_startup": HTTP_STARTUP,
}  # fmt: skip
SMALL = {
    "token_embd.weight": 1000,
    "output.weight": 500,
    "blk.0.attn_q.weight": 30,
    "blk.0.ffn_gate_inp.weight": 4,
    "blk.0.ffn_gate_exps.weight": 300,
    "blk.0.ffn_down_exps.weight": 100,
}


def _weights(sizes: dict[str, int], vocab_size: int, num_experts: int, active: int) -> Weights:
    config: Any = SimpleNamespace(vocab_size=vocab_size, num_experts=num_experts, experts_per_token=active)
    return Weights.from_sizes(sizes, config)


def _stream(sent: float, *times: float) -> Timed:
    return Timed(sent, [(at, 1) for at in times])


def test_a_step_reads_the_experts_that_it_is_expected_to_meet() -> None:
    weights = _weights(SMALL, vocab_size=100, num_experts=4, active=1)
    # 34 whole, a quarter of 400, a row of 10, 500 of output
    assert weights.step_size(1) == 34 + 100 + 10 + 500
    # two tokens meet 1 - (3/4)^2 = 7/16 of the experts
    assert weights.step_size(2) == 34 + 175 + 20 + 500
    assert bench._decode_token_size(weights, Case("decode", 2, 9, 9), 512) == 729 / 2


def test_a_prompt_reads_the_weights_once_a_chunk_and_the_output_once() -> None:
    weights = _weights(SMALL, vocab_size=100, num_experts=4, active=1)
    assert weights.prompt_size(5, chunk=2) == 2 * (34 + 175 + 20) + (34 + 100 + 10) + 500


def test_a_tied_embedding_is_read_as_the_output() -> None:
    tied = {name: size for name, size in SMALL.items() if name != "output.weight"}
    assert _weights(tied, vocab_size=100, num_experts=4, active=1).step_size(1) == 34 + 100 + 10 + 1000


@pytest.mark.parametrize(
    ("streams", "tok_per_s"), [(1, 2241), (8, 4355), (16, 5677), (32, 8520), (64, 15220)]
)
def test_the_floors_of_the_real_model(streams: int, tok_per_s: float) -> None:
    """Qwen3-30B-A3B in Q4_K_M at 4.3 TB/s; the figures were worked out apart from this code."""
    sizes = PRESETS["30b"]
    tensors = plan_tensors(sizes, "Q4_K_M", vocab_size=sizes.vocab_size, tied=False)
    in_file = {}
    for tensor in tensors:
        count, size = GGML_QUANT_SIZES[tensor.ggml_type]
        in_file[tensor.name] = prod(tensor.shape) // count * size
    weights = _weights(in_file, sizes.vocab_size, sizes.num_experts, sizes.experts_per_token)
    case = Case("decode", streams, 1, 1)
    assert 4.3e12 / bench._decode_token_size(weights, case, 512) == pytest.approx(tok_per_s, rel=0.01)


def test_decode_counts_only_while_all_streams_run() -> None:
    early = _stream(0.0, 1.0, 1.5, 2.0, 2.1, 2.2, 2.3)
    late = _stream(0.5, 2.0, 2.1, 2.2, 2.3, 2.4, 3.4)
    figures = bench.decode_figures([early, late], 16)
    expected = {"tok_per_s": 20.0, "ttft_ms": 1250.0, "gap_ms_p50": 100.0, "gap_ms_p95": 100.0}
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_a_chunk_of_several_tokens_counts_as_several() -> None:
    stream = Timed(0.0, [(1.0, 1), (1.1, 1), (1.5, 3)])
    figures = bench.decode_figures([stream], 16)
    assert figures["tok_per_s"] == pytest.approx(8.0)
    assert [figures[f"gap_ms_p{share}"] for share in (50, 95, 99)] == pytest.approx([250.0, 385.0, 397.0])


def test_streams_that_did_not_run_together_have_no_rate() -> None:
    with pytest.raises(BenchError, match="same time"):
        bench.decode_figures([_stream(0, 1.0, 1.1), _stream(0, 2.0, 2.1)], 16)


def test_prefill_lasts_until_the_last_first_token() -> None:
    figures = bench.prefill_figures([_stream(1.0, 1.2), _stream(1.0, 1.5)], 100)
    assert figures["tok_per_s"] == pytest.approx(400.0)
    assert figures["ttft_ms"] == pytest.approx(350.0)
    assert figures["gap_ms_p50"] is None


def test_a_row_says_how_near_the_floor_it_is() -> None:
    figures = bench.medians([{**dict.fromkeys(bench.FIGURES), "tok_per_s": rate} for rate in (9.0, 1e6, 1e5)])
    weights = _weights(SMALL, vocab_size=100, num_experts=4, active=1)
    twice = _weights({name: 2 * size for name, size in SMALL.items()}, 100, num_experts=4, active=1)
    found = Measured(Case("decode", 1, 16, 8), 512, figures)
    row = bench.measured_row(found, in_file=weights, on_device=twice, chunk=512, bandwidth=644e6)
    assert row == dict.fromkeys(KEYS) | {
        "what": "decode",
        "streams": 1,
        "prompt_tokens": 16,
        "context": 512,
        "tok_per_s": 1e5,
        "gb_per_s": 0.0644,
        "device_gb_per_s": 0.1288,
        "floor_share": 0.1,
    }


def test_prompts_are_random_and_each_is_another() -> None:
    case = Case("decode", 3, 40, 8)
    prompts = bench.random_prompts(case, 0, 1000) + bench.random_prompts(case, 1, 1000)
    assert len({tuple(prompt) for prompt in prompts}) == 6
    assert all(len(prompt) == 40 and len(set(prompt)) > 20 for prompt in prompts)
    assert bench.random_prompts(case, 1, 1000) == prompts[3:]


def test_streams_that_start_early_get_as_many_more_tokens() -> None:
    rows = tuple(Asked(what, streams, 600) for what in ("decode", "http_ttft") for streams in (1, 3))
    plan = Plan(rows, (), context=None, new_tokens=64, repeats=1)
    alone = bench.plan_cases(plan, 512, over_http=False)
    assert alone == [Case("decode", 1, 600, 64), Case("decode", 3, 600, 68)]
    assert [case.what for case in bench.plan_cases(plan, 512, over_http=True)] == ["http_ttft"] * 2
    assert plan.num_slots == 3


def _plan_of(*options: str) -> Plan:
    return bench._plan(bench._arguments(["model.gguf", *options]))


@pytest.mark.parametrize(
    ("what", "on_engine", "over_http"),
    [
        ("decode", True, False),
        ("http_ttft", False, True),
        ("startup", True, False),
        ("http_startup", False, True),
    ],
)
def test_only_the_sides_that_are_asked_for(what: str, on_engine: bool, over_http: bool) -> None:
    plan = _plan_of(f"--what={what}")
    assert (plan.needs(over_http=False), plan.needs(over_http=True)) == (on_engine, over_http)


def test_every_goal_has_its_row() -> None:
    plan = _plan_of("--goals")
    asked = {(row.what, row.streams, row.prompt_tokens) for row in plan.rows} | {("http_startup", None, None)}
    assert {(goal.what, goal.streams, goal.prompt_tokens) for goal in plan.goals} <= asked
    rates = {place[1:] for place in asked if place[0] == "decode"}
    assert rates == {(1, 512), (8, 512), (32, 512), (64, 512), (1, 32_768)}
    assert {place[1:] for place in asked if place[0] == "http_decode"} == rates - {(1, 32_768)}
    assert (plan.startups, plan.num_slots, len(asked)) == (("http_startup",), 64, 12)


def test_a_share_of_the_engine_and_which_goals_are_met() -> None:
    def row(what: str, streams: int, rate: float) -> dict[str, Any]:
        return bench._empty_row(what, streams, 512, 1024) | {"tok_per_s": rate}

    rows = [
        row("decode", 1, 700),
        row("decode", 8, 1999),
        row("http_decode", 1, 679),
        row("http_decode", 8, 1),
    ]
    rows += [bench._empty_row("http_ttft", 1, 512, 1024) | {"ttft_ms": 25.0}, row("http_decode", 2, 5)]
    bench.add_shares(rows)
    assert [row["engine_share"] for row in rows] == [None, None, 0.97, 0.0005, None, None]
    found = {
        (goal["what"], goal["streams"]): goal["met"]
        for goal in bench.goal_rows(bench.GOALS, rows)
        if goal["prompt_tokens"] == 512
    }
    assert found["decode", 1] == "must"
    assert found["decode", 8] == "no"
    assert found["http_decode", 1] == "must"
    assert found["http_ttft", 1] == "aim"
    assert found["decode", 64] is None


@pytest.mark.parametrize(("value", "met"), [(15, "aim"), (15.1, "must"), (30, "must"), (30.1, "no")])
def test_a_goal_of_at_most(value: float, met: str) -> None:
    goal = next(goal for goal in bench.GOALS if goal.what == "http_startup")
    assert goal.met(value) == met


def test_launches_are_timed_in_the_engine() -> None:
    steps = FakeSteps(num_slots=2)
    engine = Engine(steps, eos_ids=frozenset(), prefill_chunk=8, max_waiting=4, after_step=lambda: None)
    engine.start()
    try:
        with bench.timed_launches(engine) as dispatch:
            bench.engine_run(engine)([[1, 2, 3]], 7)
            found = dispatch()
            assert found is not None
            assert 0 < found < 1e6
            assert dispatch() is None
        bench.engine_run(engine)([[1, 2, 3]], 7)
        assert dispatch() is None
    finally:
        engine.stop()


def test_the_engine_gives_each_stream_all_its_tokens_and_their_times() -> None:
    steps = FakeSteps(num_slots=2)
    engine = Engine(steps, eos_ids=frozenset(), prefill_chunk=8, max_waiting=4, after_step=lambda: None)
    engine.start()
    try:
        streams = bench.engine_run(engine)([[1, 2, 3], [4, 5, 6]], 7)
    finally:
        engine.stop()
    for stream in streams:
        times = [stream.sent, *(at for at, _ in stream.arrivals)]
        assert len(times) == 8
        assert times == sorted(times)


def test_a_case_without_room_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def run(prompts: list[list[int]], max_tokens: int) -> list[Timed]:
        return [_stream(0.0, 1.0) for _ in prompts]

    cases = [Case("prefill", 2, 90, 1), Case("prefill", 2, 60, 1), Case("prefill", 1, 60, 1)]
    found = bench.measure(cases, run, Room(80, 100), vocab_size=9, repeats=1)
    assert "needs a context of 91 tokens, the engine has 80" in (found[0].failed or "")
    assert "2 streams of 61 tokens do not fit a cache of 100" in (found[1].failed or "")
    assert found[2].failed is None
    assert found[2].figures["tok_per_s"] == 60
    assert "needs a context" in capsys.readouterr().out


def test_the_copy_is_one() -> None:
    assert roofline._host_copy(1 << 12)() == 1
    assert roofline._device_copy(1 << 12, 3)() == 3
    assert roofline.measure_bandwidth(1 << 16) > 0


def test_a_trace_is_of_one_more_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path | None, tuple[int, int]]] = []
    taking: Path | None = None

    @contextmanager
    def profile(directory: Path) -> Iterator[None]:
        nonlocal taking
        taking = directory
        yield
        taking = None

    def run(prompts: list[list[int]], max_tokens: int) -> list[Timed]:
        seen.append((taking, (len(prompts), max_tokens)))
        return []

    monkeypatch.setattr(bench, "profile", profile)
    cases = [
        Case("decode", 2, 9, 5),
        Case("prefill", 2, 9, 1),
        Case("decode", 3, 9, 7),
        Case("decode", 1, 8, 6),
    ]
    found = [Measured(case, 99, {}, failed="no room" if case.streams == 3 else None) for case in cases]
    bench.take_profiles(found, run, tmp_path, vocab_size=9)
    assert seen == [(tmp_path / "decode-2x9", (2, 5)), (tmp_path / "decode-1x8", (1, 6))]


@pytest.mark.parametrize(
    "wrong",
    ["--profile=out --what=prefill", "--what=decoding", "--streams=0", "--streams=1,x", "--new-tokens=2"],
)
def test_a_wrong_argument_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["model.gguf", *wrong.split()])
    assert stopped.value.code == 2
    assert wrong.split("=")[0] in capsys.readouterr().err


def test_a_missing_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(tmp_path / "none.gguf"), "--what=startup"]) == 1
    assert "none.gguf" in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.slow
def test_a_run_fills_every_row(
    tiny_q4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "COPY_SIZE", 1 << 20)
    monkeypatch.setenv("JAXMOE_PREFILL_CHUNK", "64")
    out = tmp_path / "deep" / "bench.json"
    what = f"--what={','.join(bench.WHAT)}"
    options = [
        what,
        "--streams=1,2",
        "--prompt-tokens=70",
        "--context=512",
        "--new-tokens=200",
        "--repeats=1",
    ]
    assert bench.main([str(tiny_q4), *options, f"--out={out}"]) == 0
    document = json.loads(out.read_text())
    rows = {(row["what"], row["streams"]): row for row in document["results"]}
    measured = [(what, streams) for what in bench.KINDS for streams in (1, 2)]
    assert list(rows) == [*measured, ("startup", None), ("http_startup", None)]
    for (what, _), row in rows.items():
        assert set(row) == KEYS | FILLED[what]
        assert {name for name, value in row.items() if value is not None} == FILLED[what]
        assert (row["context"], row["prompt_tokens"]) == (512, None if "startup" in what else 70)
    assert document["goals"] == []
    assert rows["decode", 2]["device_gb_per_s"] > rows["decode", 2]["gb_per_s"]
    assert rows["startup", None]["device_bytes"] >= document["env"]["size"]["device_bytes"]
    assert document["env"]["model"] == tiny_q4.name
    assert document["env"]["engine"]["prefill_chunk"] == 64
    assert document["env"]["shape"]["num_experts"] == 8
    assert str(tmp_path) not in out.read_text()
    assert str(tiny_q4.parent) not in out.read_text()
    assert "load_s: " in capsys.readouterr().out
