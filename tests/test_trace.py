"""The profile of a step, from made-up events, and once from the tiny file on whatever device there is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jaxmoe.config import ModelConfig
from jaxmoe.gguf import read_gguf
from tools import trace
from tools.roofline import cache_row_size, device_sizes, part_sizes
from tools.trace import Event, Part, decode_sizes, fused_sizes, prefill_sizes, self_times, sum_up

# A=1 of E=4 experts, two layers of one kind each
SIZES = {
    "token_embd.weight": 1000,
    "output.weight": 500,
    "blk.0.attn_q.weight": 30,
    "blk.0.attn_k.weight": 3,
    "blk.1.attn_v.weight": 2,
    "blk.0.attn_output.weight": 7,
    "blk.0.ffn_gate_inp.weight": 4,
    "blk.0.ffn_gate_exps.weight": 300,
    "blk.1.ffn_up_exps.weight": 100,
    "blk.0.ffn_down_exps.weight": 160,
}
CONFIG = ModelConfig(
    num_layers=2, d_model=8, num_heads=2, num_kv_heads=3, head_dim=5, num_experts=4, experts_per_token=1,
    expert_width=8, vocab_size=100, context_length=64, norm_eps=1e-6, rope_base=1e4, rope_scaling=None,
    name="small",
)  # fmt: skip


def test_time_inside_is_not_counted_twice() -> None:
    events = [
        Event("while", 0, 100),
        Event("body", 10, 30),
        Event("deep", 15, 5),
        Event("body", 60, 40),
        Event("after", 100, 7),
    ]
    assert sorted(self_times(events)) == [
        ("after", 7),
        ("body", 25),
        ("body", 40),
        ("deep", 5),
        ("while", 30),
    ]


def test_a_profile_is_of_one_step() -> None:
    lines = [
        [Event("qkv", 1000, 4000), Event("gate_up_8", 6000, 2000), Event("qkv", 9000, 6000)],
        [Event("gate_up", 2000, 3000), Event("loop_fusion", 8000, 1000)],
    ]
    found = sum_up("two steps", lines, 2, {"qkv": 10.0, "gate_up": 20.0, "down": 30.0})
    assert found.parts == (
        Part("qkv", calls=1, microseconds=5, size=10),
        Part("gate_up", calls=1, microseconds=2.5, size=20),
        Part("loop_fusion", calls=0.5, microseconds=0.5, size=None),
    )
    assert (found.span, found.busy) == (7, 8)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("down", "down"),
        ("down_64", "down"),
        ("attn_output", "attn_output"),
        ("attend_decode_2", "attend_decode"),
        ("downward", "downward"),
        ("loop_add_fusion", "loop_add_fusion"),
    ],
)
def test_a_kernel_belongs_to_the_part_it_is_named_after(name: str, part: str) -> None:
    assert trace.part_of(name, decode_sizes(CONFIG, SIZES, streams=1, context=1, itemsize=2)) == part


def test_what_a_decode_step_reads() -> None:
    found = decode_sizes(CONFIG, SIZES, streams=2, context=10.5, itemsize=2)
    read = {part: size for part, size in found.items() if size}
    # two tokens meet 1 - (3/4)^2 = 7/16 of the experts; a token's cache is 2 * 2 * 3 * 5 * 2 = 120 bytes
    assert read == {
        "qkv": 35,
        "attn_output": 7,
        "router": 4,
        "gate_up": 175,
        "down": 70,
        "lm_head": 500,
        "attend_decode": 2 * 10.5 * 120,
    }


def test_what_one_launch_of_all_layers_reads() -> None:
    sizes = decode_sizes(CONFIG, SIZES, streams=1, context=10, itemsize=2)
    assert fused_sizes(sizes, ["qkv", "down", "decode_rows"]) == sizes
    found = fused_sizes(sizes, ["decode_row_1", "lm_head"])
    # the dense products, a quarter of the experts, the cache
    assert found["decode_row"] == 35 + 7 + 4 + 560 / 4 + sizes["attend_decode"]
    assert not {"qkv", "attend_decode", "down"} & found.keys()
    assert found["lm_head"] == 500


def test_what_the_experts_in_one_launch_read() -> None:
    sizes = decode_sizes(CONFIG, SIZES, streams=2, context=1, itemsize=2)
    found = fused_sizes(sizes, ["qkv", "experts", "route_few", "experts_8"])
    assert found["experts"] == sizes["gate_up"] + sizes["down"] == 245
    assert found["qkv"] == sizes["qkv"]
    assert not {"gate_up", "down"} & found.keys()


def test_what_a_prefill_in_two_chunks_reads() -> None:
    found = prefill_sizes(CONFIG, SIZES, tokens=3, chunk=2, itemsize=2)
    assert found["qkv"] == 70
    assert found["gate_up"] == 400 * (7 / 16 + 1 / 4)
    assert found["lm_head"] == 500
    # the first chunk reads the keys of two tokens, the second those of three
    assert found["attend_prefill"] == 5 * 120


def test_the_parts_are_all_of_a_file_but_norms_and_embedding(tiny_q4: Path) -> None:
    file = read_gguf(tiny_q4)
    sizes = device_sizes(file)
    named = sum(size for name, size in sizes.items() if "norm" in name or name == "token_embd.weight")
    tied = 0 if "output.weight" in sizes else sizes["token_embd.weight"]
    # a chunk of so many tokens meets every expert
    found = part_sizes(sizes, ModelConfig.from_gguf(file), [100_000])
    assert sum(found.values()) == pytest.approx(sum(sizes.values()) - named + tied)
    assert cache_row_size(ModelConfig.from_gguf(file), 4) == 2 * 2 * 2 * 64 * 4


def test_the_share_of_the_floor() -> None:
    assert Part("qkv", 48, 100, 200e6).share(4e12) == pytest.approx(0.5)
    assert Part("sample", 1, 100, 0).share(4e12) is None
    assert Part("fusion", 1, 100).share(4e12) is None


def test_a_table_adds_up() -> None:
    parts = tuple(Part(f"op{i}", 2, 10.0, 1e6 if i == 0 else None) for i in range(42))
    lines = trace.table([trace.Profile("a step", parts, 425.0)], 1e12).splitlines()
    assert lines[0] == "a step: 425.0 us, copies at 1000 GB/s"
    assert lines[2].split() == ["op0", "2.0", "10.0", "5.00", "1.00", "0.10"]
    assert lines[3].split() == ["op1", "2.0", "10.0", "5.00", "-", "-"]
    assert lines[-2].split() == ["2", "others", "20.0"]
    assert lines[-1].split() == ["between", "5.0"]


@pytest.mark.slow
def test_the_tiny_file_is_traced(
    tiny_q4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trace, "keep_command_buffers", lambda: False)
    monkeypatch.setattr(trace, "COPY_SIZE", 1 << 20)
    monkeypatch.setattr(trace, "WARM_STEPS", 2)
    monkeypatch.setenv("JAXMOE_PREFILL_CHUNK", "64")
    flags = os.environ.get("XLA_FLAGS")
    options = ["--steps=3", "--prompt-tokens=70", "--streams=2", f"--out={tmp_path}"]
    assert trace.main([str(tiny_q4), *options]) == 0
    assert os.environ.get("XLA_FLAGS") == flags
    printed = capsys.readouterr()
    assert "prefill of 70 tokens: " in printed.out
    assert "a decode step of 2 streams: " in printed.out
    assert "no flag" in printed.err
    found = json.loads((tmp_path / "parts.json").read_text())
    assert found["date"].startswith("20")
    for one in found["profiles"]:
        times = [part["microseconds"] for part in one["parts"]]
        assert len(times) > 10
        assert min(times) >= 0
        assert one["span_us"] > 0
    # what runs once a layer and once a step
    calls = [part["calls"] for part in found["profiles"][1]["parts"]]
    assert {1.0, 2.0} <= set(calls)


def test_a_missing_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "keep_command_buffers", lambda: False)
    monkeypatch.setattr(trace, "COPY_SIZE", 1 << 12)
    assert trace.main([str(tmp_path / "none.gguf")]) == 1
