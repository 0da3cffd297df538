"""What load_engine decides before it allocates: memory, shapes, where compiled steps are kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxmoe import engine
from jaxmoe.config import EngineConfig, ModelConfig
from jaxmoe.engine import load_engine, plan_shapes, prefill_chunk, workspace_size
from jaxmoe.gguf import GGUFError, read_gguf
from jaxmoe.kernels import ptx
from jaxmoe.step import Shapes, Steps, use_compilation_cache, why_without_kernels
from jaxmoe.weights import device_weights_size
from tools.synth_gguf import write_synthetic

GIB = 1 << 30
# L2 K2 H64, float32: 2 x 2 x 64 x 2 x 64 x 4
PAGE_SIZE = 131_072


@pytest.fixture
def config(tiny_gguf: Path) -> ModelConfig:
    return ModelConfig.from_gguf(read_gguf(tiny_gguf))


def plan(
    config: ModelConfig,
    *,
    memory: int = 8 * GIB,
    on_cpu: bool = True,
    kernels: bool = False,
    **settings: object,
) -> Shapes:
    engine_config = EngineConfig(**settings)  # type: ignore[arg-type]
    return plan_shapes(
        config, engine_config, weights_size=GIB, memory_size=memory, on_cpu=on_cpu, kernels=kernels
    )


def test_the_cache_is_never_larger_than_all_slots_can_fill(config: ModelConfig) -> None:
    shapes = plan(config, num_slots=4)
    assert (shapes.context_length, shapes.page_length, shapes.num_pages) == (1024, 64, 4 * 16)
    assert shapes.cache_dtype == "float32"
    assert plan(config, on_cpu=False).cache_dtype == "bfloat16"


def test_a_small_cache_shortens_the_context(config: ModelConfig) -> None:
    shapes = plan(config, cache_size=5 * PAGE_SIZE + 1)
    assert (shapes.num_pages, shapes.context_length) == (5, 5 * 64)
    assert plan(config, context_length=100).context_length == 100


@pytest.mark.parametrize("kernels", [False, True])
def test_a_gpu_gives_the_cache_what_weights_and_steps_leave(config: ModelConfig, kernels: bool) -> None:
    memory = GIB + workspace_size(config, EngineConfig(), kernels=kernels) + 7 * PAGE_SIZE // 2
    shapes = plan(config, memory=memory, on_cpu=False, kernels=kernels)
    assert (shapes.num_pages, shapes.kernels) == (7, kernels)


def test_kernels_leave_room_for_what_their_segments_of_attention_hand_on(config: ModelConfig) -> None:
    asked = EngineConfig(num_slots=4, context_length=1000, prefill_chunk=64)
    more = workspace_size(config, asked, kernels=True) - workspace_size(config, asked, kernels=False)
    # slots x segments of 128 x 4 heads of 64 numbers and 4 more (see attend_decode), in float32
    assert more == 4 * 8 * 4 * (64 + 4) * 4


def test_a_chunk_is_what_measured_best_unless_it_is_said(config: ModelConfig) -> None:
    sizes = {kernels: plan(config, kernels=kernels).prefill_chunk for kernels in (False, True)}
    assert sizes == {False: 512, True: 2048}
    assert plan(config, kernels=True, prefill_chunk=100).prefill_chunk == 100
    asked = EngineConfig(prefill_chunk=100)
    assert [prefill_chunk(asked, kernels=kernels) for kernels in (False, True)] == [100, 100]


def test_weights_that_do_not_fit_are_refused_with_both_sizes(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match=rf"the weights take {GIB} bytes .* the device has {GIB // 2},"):
        plan(config, memory=GIB // 2)


@pytest.mark.parametrize("cache_size", [PAGE_SIZE - 1, 7 * GIB])
def test_a_cache_that_does_not_fit_is_refused_by_name(config: ModelConfig, cache_size: int) -> None:
    with pytest.raises(ValueError, match=rf"cache_size must be between {PAGE_SIZE} .* got {cache_size}"):
        plan(config, cache_size=cache_size)


@pytest.mark.parametrize("page_length", [3, 100])
def test_a_page_must_divide_a_segment(page_length: int) -> None:
    with pytest.raises(ValueError, match=f"page_length must divide 256, got {page_length}"):
        EngineConfig(page_length=page_length)


def test_a_tensor_that_the_network_does_not_know_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_synthetic(path, "tiny", "F32")
    file = read_gguf(path)
    tensors = dict(file.tensors)
    tensors["rope_freqs.weight"] = tensors["output_norm.weight"]
    object.__setattr__(file, "tensors", tensors)
    with pytest.raises(GGUFError, match=r"'rope_freqs\.weight' is none that this network knows"):
        device_weights_size(file, ModelConfig.from_gguf(file))


def test_a_directory_that_cannot_be_made_costs_only_the_compilation_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        use_compilation_cache()
    assert "compiled steps are not kept" in caplog.text


def test_a_directory_that_others_may_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "jaxmoe" / "xla"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        use_compilation_cache()
    assert "others may write to it" in caplog.text


def test_a_reset_frees_the_old_state_before_it_makes_the_new(tiny_steps: Steps) -> None:
    old = jax.tree.leaves((tiny_steps._cache, tiny_steps._slots))
    tiny_steps.reset()
    assert all(array.is_deleted() for array in old)


def test_warming_is_told_from_its_start_to_its_end(tiny_steps: Steps) -> None:
    told: list[float] = []
    tiny_steps.warm(told.append)
    assert (told[0], told[-1]) == (0.0, 1.0)
    assert told == sorted(told)
    tiny_steps.reset()


def test_a_network_within_all_limits_runs_by_kernels(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptx, "unavailable", lambda: None)
    widest = replace(
        config, head_dim=128, num_heads=16, num_kv_heads=2, num_experts=256, experts_per_token=16
    )
    for allowed in (config, widest):
        assert [why_without_kernels(allowed, dtype) for dtype in (None, "bfloat16")] == [None, None]
    monkeypatch.setattr(ptx, "unavailable", lambda: "no GPU")
    assert why_without_kernels(config, "float32") == "no GPU"


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"d_model": 384}, r"widths \(384, 256, 256\) must be multiples of 256"),
        ({"expert_width": 128}, r"widths \(256, 128, 256\)"),
        ({"num_heads": 6}, r"widths \(256, 256, 384\)"),
        ({"head_dim": 256}, "64 or 128 numbers, not 256"),
        ({"head_dim": 32, "num_heads": 8}, "64 or 128 numbers, not 32"),
        ({"num_heads": 20}, "at most 8 heads may share keys, not 10"),
        ({"num_experts": 257}, "256 experts, not 257"),
        ({"experts_per_token": 17}, "16 experts, not 17"),
        ({}, "the cache must be bfloat16, not float32"),
    ],
)
def test_a_limit_of_the_kernels_is_named(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], reason: str
) -> None:
    monkeypatch.setattr(ptx, "unavailable", lambda: None)
    found = why_without_kernels(replace(config, **sizes), None if sizes else "float32")
    assert found is not None
    assert re.search(reason, found)


class FakeSteps:
    """Steps that only warm; `fail` may raise in place of it."""

    def __init__(self, model: object, config: ModelConfig, shapes: Shapes) -> None:
        self.shapes, self.vocab_size = shapes, config.vocab_size
        self.num_slots, self.num_pages = shapes.num_slots, shapes.num_pages
        self.page_length, self.context_length = shapes.page_length, shapes.context_length
        self.has_state = True
        made.append(self)

    def warm(self, progress: Callable[[float], None]) -> None:
        if self.shapes.kernels and fail:
            raise fail[0]
        progress(1.0)

    def free(self) -> None:
        self.has_state = False


made: list[FakeSteps] = []
fail: list[Exception] = []


@pytest.fixture
def load(
    tiny_gguf: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[[], list[str]]:
    """Runs load_engine on a device that has kernels; returns what was logged."""
    made.clear()
    fail.clear()
    monkeypatch.setattr(ptx, "unavailable", lambda: None)
    monkeypatch.setattr(ptx, "_device_arch", lambda: "sm_90")
    monkeypatch.setattr(engine, "Steps", FakeSteps)
    monkeypatch.setattr(engine, "load_model", lambda *_, **__: object())
    caplog.set_level(logging.INFO, "jaxmoe")

    def run() -> list[str]:
        asked = EngineConfig(compilation_cache=False)
        calls: dict[str, Any] = {"after_step": lambda: None, "progress": lambda *_: None}
        running = load_engine(read_gguf(tiny_gguf), config, asked, eos_ids=frozenset(), **calls)
        assert running.stop(20.0)
        return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]

    return run


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax says that it runs on an H100."""
    device = jax.devices()[0]

    class H100:
        compute_capability = "9.0"
        memory_stats = device.memory_stats

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [H100()])


def test_the_log_says_that_kernels_run(
    load: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch)
    assert load() == ["INFO steps: CUDA kernels (sm_90)"]
    assert [(steps.shapes.kernels, steps.shapes.prefill_chunk) for steps in made] == [(True, 2048)]


@pytest.mark.parametrize(
    ("backend", "line"),
    [
        ("cpu", "INFO steps: XLA (no GPU)"),
        ("gpu", "WARNING steps: XLA, at a fraction of the kernels' speed (no GPU)"),
    ],
)
def test_the_log_says_once_why_no_kernels_run(
    load: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, backend: str, line: str
) -> None:
    monkeypatch.setattr(ptx, "unavailable", lambda: "no GPU")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert load() == [line]
    assert [(steps.shapes.kernels, steps.shapes.prefill_chunk) for steps in made] == [(False, 512)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ptx.KernelError("rows.cu does not compile"), "rows.cu does not compile"),
        (RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: ..."), "does not read PTX 8.0, which sm_90 needs"),
    ],
)
def test_a_kernel_that_cannot_be_built_leaves_the_plain_path(
    load: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    on_gpu(monkeypatch)
    fail.append(error)
    (line,) = load()
    assert line.startswith("WARNING steps: XLA, ")
    assert reason in line
    kernels, plain = made
    assert (kernels.has_state, plain.has_state) == (False, True)
    assert plain.shapes == replace(kernels.shapes, kernels=False, prefill_chunk=512)


def test_other_failures_of_the_warm_up_are_no_matter_of_the_kernels(
    load: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail.append(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        load()
    assert len(made) == 1
