"""The README's plots: what they read, that they are safe to show, and that they show today's evidence."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tools import plots
from tools.plots import PLOTS, Bar, Row, digest, drawn_digest, read_rates, read_shown, read_step

EVIDENCE = plots.ROOT / plots.EVIDENCE
ENV: dict[str, Any] = {
    "machine": "CPU + GPU",
    "date": "2026-01-02T03:04:05+00:00",
    "jax": "0.1",
    "commit": "0123456789",
    "dirty": False,
    "model": "m.gguf",
    "shape": {"name": "Small"},
    "new_tokens": 8,
    "repeats": 3,
    "sampling": "greedy",
}


def decode(what: str, streams: int, rate: float | None, prompt: int = 512) -> dict[str, Any]:
    gaps = {"gap_ms_p50": 2.0, "gap_ms_p95": 3.0}
    return {"what": what, "streams": streams, "prompt_tokens": prompt, "tok_per_s": rate, **gaps}


BENCH = {
    "env": ENV,
    "results": [
        decode("decode", 8, 80.0),
        decode("decode", 1, 30.0),
        decode("decode", 2, None),
        decode("decode", 1, 9.0, prompt=32768),
        decode("http_decode", 1, 29.0) | {"gap_ms_p99": 4.0},
        decode("prefill", 1, 500.0),
    ],
}
STEP = {
    "title": "a decode step of 1 streams",
    "span_us": 200.0,
    "parts": [
        {"name": "sample", "calls": 1.0, "microseconds": 1.5, "floor_share": None},
        {"name": "gate_up", "calls": 48.0, "microseconds": 100.0, "floor_share": 0.25},
        {"name": "fusion_7", "calls": 1.0, "microseconds": 80.0, "floor_share": None},
        {"name": "copy", "calls": 2.0, "microseconds": 0.5, "floor_share": None},
    ],
}
TRACE = {
    **ENV,
    "copy_gb_per_s": 4000.4,
    "profiles": [{"title": "prefill of 9 tokens", "span_us": 1.0, "parts": []}, STEP],
}


def test_rates_are_of_the_usual_prompts_and_of_both_sides() -> None:
    rates = read_rates(BENCH, "b.json")
    assert rates.of("engine") == [
        Row("engine", 1, 30.0, ((50, 2.0), (95, 3.0))),
        Row("engine", 8, 80.0, ((50, 2.0), (95, 3.0))),
    ]
    assert rates.of("through HTTP") == [Row("through HTTP", 1, 29.0, ((50, 2.0), (95, 3.0), (99, 4.0)))]
    assert (rates.streams, rates.sides) == ([1, 8], ["engine", "through HTTP"])


def test_a_caption_says_where_when_and_what() -> None:
    assert read_rates(BENCH, "b.json").caption.splitlines() == [
        "Small (m.gguf), prompts of 512 tokens, greedy, 8 tokens a stream, medians of 3 runs",
        "CPU + GPU · jax 0.1 · 2026-01-02 · commit 0123456 · b.json",
    ]
    undated = {name: value for name, value in TRACE.items() if name != "date"} | {"dirty": True}
    assert read_step(undated, "t.json").caption.splitlines() == [
        "m.gguf, copies at 4,000 GB/s",
        "CPU + GPU · jax 0.1 · commit 0123456 with changes · t.json",
    ]


def test_a_step_is_its_parts_and_what_lies_between() -> None:
    step = read_step(TRACE, "t.json")
    assert (step.title, step.span) == ("a decode step of one stream", 200.0)
    assert step.bars == (
        Bar("gate_up × 48\nexperts, gate and up", 100.0, 25.0),
        Bar("fusion_7", 80.0),
        Bar("2 smaller parts", 2.0),
        Bar("between kernels", 18.0),
    )


def test_evidence_without_the_rows_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(plots.PlotError, match=r"b\.json has no row of decode"):
        read_rates({"env": ENV, "results": [decode("prefill", 1, 5.0)]}, "b.json")
    with pytest.raises(plots.PlotError, match=r"t\.json has no decode step"):
        read_step({**TRACE, "profiles": []}, "t.json")
    assert plots.main(["--evidence", str(tmp_path)]) == 1
    assert "contracts/evidence/h200/bench.json is not there" in capsys.readouterr().err


@pytest.mark.parametrize("name", PLOTS)
def test_the_plot_shows_the_evidence_that_is_here(name: str) -> None:
    drawn = drawn_digest((EVIDENCE / "plots" / name).read_text("utf-8"))
    assert drawn == digest(read_shown(PLOTS[name], EVIDENCE)), "new evidence: run python -m tools.plots"


def test_no_plot_is_left_over() -> None:
    assert {path.name for path in (EVIDENCE / "plots").iterdir()} == set(PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_a_drawing_is_the_same_each_time_and_fetches_nothing(name: str, tmp_path: Path) -> None:
    document = BENCH if PLOTS[name].read is read_rates else TRACE
    shown = PLOTS[name].read(document, "file.json")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        plots.draw(PLOTS[name], shown, tmp_path / folder / name)
    svg = (tmp_path / "a" / name).read_text("utf-8")
    assert svg == (tmp_path / "b" / name).read_text("utf-8")
    assert drawn_digest(svg) == digest(shown)
    tags = {node.tag.rpartition("}")[2] for node in ET.fromstring(svg).iter()}
    assert not tags & {"script", "image", "text", "foreignObject"}
    links = [
        value for node in ET.fromstring(svg).iter() for key, value in node.items() if key.endswith("href")
    ]
    assert links
    assert all(link.startswith("#") for link in links)
