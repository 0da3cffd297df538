"""What load_engine decides before it allocates: memory, shapes, where compiled steps are kept."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import pytest

from jaxmoe.config import EngineConfig, ModelConfig
from jaxmoe.engine import plan_shapes, workspace_size
from jaxmoe.gguf import GGUFError, read_gguf
from jaxmoe.step import Shapes, Steps, use_compilation_cache
from jaxmoe.weights import device_weights_size
from tools.synth_gguf import write_synthetic

GIB = 1 << 30
# L2 K2 H64, float32: 2 x 2 x 64 x 2 x 64 x 4
PAGE_SIZE = 131_072


@pytest.fixture
def config(tiny_gguf: Path) -> ModelConfig:
    return ModelConfig.from_gguf(read_gguf(tiny_gguf))


def plan(config: ModelConfig, *, memory: int = 8 * GIB, on_cpu: bool = True, **settings: object) -> Shapes:
    engine_config = EngineConfig(**settings)  # type: ignore[arg-type]
    return plan_shapes(config, engine_config, weights_size=GIB, memory_size=memory, on_cpu=on_cpu)


def test_the_cache_is_never_larger_than_all_slots_can_fill(config: ModelConfig) -> None:
    shapes = plan(config, num_slots=4)
    assert (shapes.context_length, shapes.page_length, shapes.num_pages) == (1024, 64, 4 * 16)
    assert shapes.cache_dtype == "float32"
    assert plan(config, on_cpu=False).cache_dtype == "bfloat16"


def test_a_small_cache_shortens_the_context(config: ModelConfig) -> None:
    shapes = plan(config, cache_size=5 * PAGE_SIZE + 1)
    assert (shapes.num_pages, shapes.context_length) == (5, 5 * 64)
    assert plan(config, context_length=100).context_length == 100


def test_a_gpu_gives_the_cache_what_weights_and_steps_leave(config: ModelConfig) -> None:
    memory = GIB + workspace_size(config, EngineConfig()) + 7 * PAGE_SIZE // 2
    assert plan(config, memory=memory, on_cpu=False).num_pages == 7


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
