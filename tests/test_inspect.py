"""`jaxmoe inspect`: what it says of a file, against the file itself and the server's own plan."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxmoe import cli, engine
from jaxmoe.config import EngineConfig, ModelConfig
from jaxmoe.engine import plan_shapes
from jaxmoe.gguf import GGUFFile, read_gguf
from jaxmoe.inspect_file import describe
from jaxmoe.weights import device_weights_size
from tools import synth_gguf
from tools.synth_gguf import write_synthetic

GIB = 1 << 30


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["inspect", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_header_is_told(tiny_q4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, str(tiny_q4))
    assert found["path"] == str(tiny_q4)
    assert (found["name"], found["architecture"]) == ("Synthetic tiny", "qwen3moe")
    assert found["shape"] == {"L": 2, "D": 256, "N": 4, "K": 2, "H": 64, "E": 8, "A": 2, "F": 256, "V": 512}
    assert (found["context_length"], found["chat_template"]) == (1024, True)
    assert found["file_size"] == tiny_q4.stat().st_size
    # keys and values of L2 K2 H64
    assert found["cache_size_a_token"] == {"float32": 2 * 2 * 2 * 64 * 4, "bfloat16": 2 * 2 * 2 * 64 * 2}


def test_tensors_add_up_by_class_and_type(tiny_q4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = read_gguf(tiny_q4)
    found = as_json(capsys, str(tiny_q4))
    classes = {(one["class"], one["type"]): one["num_tensors"] for one in found["tensors"]}
    assert classes["attn_q", "Q4_K"] == 2
    assert classes["attn_v", "Q6_K"] + classes.get(("attn_v", "Q4_K"), 0) == 2
    assert classes["token_embd", "Q4_K"] == classes["output", "Q6_K"] == 1
    assert sum(classes.values()) == len(file.tensors)
    assert sum(one["file_size"] for one in found["tensors"]) == sum(t.size for t in file.tensors.values())
    on_device = device_weights_size(file, ModelConfig.from_gguf(file))
    assert sum(one["device_size"] for one in found["tensors"]) == found["device_weights_size"] == on_device


def test_the_room_is_what_the_server_would_plan(
    tiny_q4: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    file = read_gguf(tiny_q4)
    config = ModelConfig.from_gguf(file)
    weights_size = device_weights_size(file, config)
    for options, memory, kernels in (([], 3 * GIB, False), (["--memory", "2GiB"], 3 * GIB // 2, True)):
        monkeypatch.setattr(engine, "device_memory_size", lambda: 3 * GIB)
        room = as_json(capsys, str(tiny_q4), *options)["room"]
        shapes = plan_shapes(
            config,
            EngineConfig(),
            weights_size=weights_size,
            memory_size=memory,
            on_cpu=not kernels,
            kernels=kernels,
        )
        assert (room["memory_size"], room["kernels"]) == (memory, kernels)
        assert room["cache_dtype"] == shapes.cache_dtype
        assert room["context_length"] == shapes.context_length
        assert room["cache_length"] == shapes.num_pages * shapes.page_length
        assert room["why_not"] is None


def test_a_file_without_room_is_said(tiny_q4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    room = as_json(capsys, str(tiny_q4), "--memory", "1GiB")["room"]
    assert (room["context_length"], room["cache_length"]) == (0, 0)
    assert "leaves no room for a cache page" in room["why_not"]
    assert cli.main(["inspect", str(tiny_q4), "--memory", "1GiB"]) == 0
    assert "a GPU of 1 GiB, 768 MiB usable, by CUDA kernels: it does not fit:" in capsys.readouterr().out


def test_people_get_the_same_in_words(tiny_q4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tiny_q4), "--memory", "80GiB"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "Synthetic tiny"
    for said in (
        "qwen3moe: 2 layers (L) of width 256 (D),",
        "512 tokens (V), chat template: yes",
        "the file recommends nothing",
        "2,048 bytes a token in float32, 1,024 bytes a token in bfloat16",
        "CUDA kernels  can run it",
        "a GPU of 80 GiB, 60 GiB usable, by CUDA kernels: a context of 1,024 tokens,",
    ):
        assert said in printed
    assert re.search(r"attn_q +Q4_K +x 2 +72 KiB\n", printed)


def test_recommendations_are_told(tiny_q4: Path) -> None:
    file = read_gguf(tiny_q4)
    metadata = {**file.metadata, "general.sampling.temp": 0.7, "general.sampling.top_k": 20}
    del metadata["tokenizer.chat_template"]
    found = describe(GGUFFile(file.path, metadata, file.tensors, file.parts))
    assert found["sampling_defaults"] == {"temperature": 0.7, "top_k": 20}
    assert not found["chat_template"]


def test_what_kernels_cannot_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(synth_gguf.PRESETS, "narrow", synth_gguf.Preset(1, 256, 8, 2, 32, 8, 2, 256, 512, 64))
    write_synthetic(tmp_path / "narrow.gguf", "narrow", "Q8_0")
    found = as_json(capsys, str(tmp_path / "narrow.gguf"))
    assert found["unfit_for_kernels"] == "a head must have 64 or 128 numbers, not 32"
    assert cli.main(["inspect", str(tmp_path / "narrow.gguf")]) == 0
    assert "CUDA kernels  cannot run it: a head must" in capsys.readouterr().out


def test_a_cut_file_is_said_in_a_sentence(
    tiny_q4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.gguf"
    shutil.copy(tiny_q4, cut)
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size - 1)
    assert cli.main(["inspect", str(cut)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"jaxmoe inspect: {cut}: at byte ")
    assert "ends at byte" in said
    assert said.count("\n") == 1


def test_bad_files_are_found_without_jax(tmp_path: Path) -> None:
    script = (
        "import sys; from jaxmoe.cli import main; status = main(['inspect', 'none.gguf']); "
        "sys.exit(status if 'jax' not in sys.modules else 9)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (
        1,
        "jaxmoe inspect: none.gguf: cannot be read: No such file or directory\n",
    )
