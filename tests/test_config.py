"""The network's configuration from metadata, and the engine's own."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from jaxmoe.config import EngineConfig, ModelConfig, RopeScaling
from jaxmoe.gguf import GGUFError, GGUFFile, read_gguf
from tools.synth_gguf import write_synthetic

NETWORK: dict[str, Any] = {
    "general.architecture": "qwen3moe",
    "general.name": "Qwen3 30B A3B",
    "qwen3moe.block_count": 48,
    "qwen3moe.context_length": 40_960,
    "qwen3moe.embedding_length": 2048,
    "qwen3moe.attention.head_count": 32,
    "qwen3moe.attention.head_count_kv": 4,
    "qwen3moe.attention.key_length": 128,
    "qwen3moe.attention.value_length": 128,
    "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen3moe.rope.freq_base": 1e6,
    "qwen3moe.expert_count": 128,
    "qwen3moe.expert_used_count": 8,
    "qwen3moe.expert_feed_forward_length": 768,
    "tokenizer.ggml.tokens": [str(i) for i in range(300)],
}
YARN: dict[str, Any] = {
    "qwen3moe.rope.scaling.type": "yarn",
    "qwen3moe.rope.scaling.factor": 4.0,
    "qwen3moe.rope.scaling.original_context_length": 32_768,
}
OPTIONAL = ("general.name", "qwen3moe.attention.value_length")


def read(*, without: str = "") -> ModelConfig:
    metadata = {name: value for name, value in NETWORK.items() if name != without}
    return ModelConfig.from_gguf(GGUFFile(Path("dir/model.gguf"), metadata, {}))


def read_with(changes: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_gguf(GGUFFile(Path("model.gguf"), NETWORK | changes, {}))


def test_every_field_comes_from_its_key() -> None:
    assert read() == ModelConfig(
        num_layers=48,
        d_model=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        experts_per_token=8,
        expert_width=768,
        vocab_size=300,
        context_length=40_960,
        norm_eps=1e-6,
        rope_base=1e6,
        rope_scaling=None,
        name="Qwen3 30B A3B",
    )


def test_an_unnamed_file_is_called_by_its_stem() -> None:
    assert read(without="general.name").name == "model"


@pytest.mark.parametrize("key", sorted(set(NETWORK) - set(OPTIONAL)))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(GGUFError) as caught:
        read(without=key)
    assert caught.value.what == f"the GGUF file has no '{key}'"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, 0) for key in NETWORK if key.startswith("qwen3moe") and isinstance(NETWORK[key], int)),
        *((key, 1 << 31) for key in NETWORK if key.startswith("qwen3moe") and isinstance(NETWORK[key], int)),
        *((key, "many") for key in NETWORK if key.startswith("qwen3moe")),
        ("qwen3moe.attention.head_count_kv", 5),
        ("qwen3moe.attention.head_count_kv", 64),
        ("qwen3moe.attention.key_length", 127),
        ("qwen3moe.attention.value_length", 64),
        ("qwen3moe.rope.dimension_count", 64),
        ("qwen3moe.expert_used_count", 129),
        ("qwen3moe.attention.layer_norm_rms_epsilon", 0.0),
        ("qwen3moe.attention.layer_norm_rms_epsilon", float("nan")),
        ("qwen3moe.rope.freq_base", float("inf")),
        ("qwen3moe.rope.freq_base", -1.0),
        ("qwen3moe.rope.scaling.type", "longrope"),
        ("qwen3moe.rope.scaling.factor", 4.0),
        ("tokenizer.ggml.tokens", []),
        ("tokenizer.ggml.tokens", 300),
        ("general.name", 7),
    ],
)
def test_an_absurd_value_is_named(key: str, value: Any) -> None:
    with pytest.raises(GGUFError) as caught:
        read_with({key: value})
    assert f"'{key}'" in caught.value.what


def test_a_foreign_architecture_is_refused_with_what_is_supported() -> None:
    with pytest.raises(GGUFError, match="architecture 'llama' is not supported; supported: qwen3moe"):
        read_with({"general.architecture": "llama"})


def test_yarn_has_ggml_defaults() -> None:
    assert read_with(YARN).rope_scaling == RopeScaling(4.0, 32_768, 32.0, 1.0, 1.0, 1.0)


def test_yarn_reads_its_optional_keys() -> None:
    given = {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 0.5, "yarn_attn_factor": 0.75}
    given = {f"qwen3moe.rope.scaling.{name}": value for name, value in given.items()}
    assert read_with(YARN | given).rope_scaling == RopeScaling(4.0, 32_768, 16.0, 2.0, 0.5, 0.75)


@pytest.mark.parametrize(
    "key", ["qwen3moe.rope.scaling.factor", "qwen3moe.rope.scaling.original_context_length"]
)
def test_yarn_needs_its_factor_and_length(key: str) -> None:
    keys = {name: value for name, value in YARN.items() if name != key}
    with pytest.raises(GGUFError, match=f"has no '{key}'"):
        read_with(keys)


def test_scaling_of_type_none_is_no_scaling() -> None:
    keys = {"qwen3moe.rope.scaling.type": "none", "qwen3moe.rope.scaling.factor": 4.0}
    assert read_with(keys).rope_scaling is None


def test_a_tiny_file_and_its_overridden_key(tmp_path: Path, tiny_gguf: Path) -> None:
    config = ModelConfig.from_gguf(read_gguf(tiny_gguf))
    assert (config.num_layers, config.d_model, config.vocab_size) == (2, 256, 512)
    write_synthetic(tmp_path / "t.gguf", "tiny", "F16", metadata={"qwen3moe.rope.freq_base": 1e7})
    config = ModelConfig.from_gguf(read_gguf(tmp_path / "t.gguf"))
    assert config.rope_base == 1e7


# EngineConfig


def test_engine_defaults() -> None:
    config = EngineConfig()
    assert (config.num_slots, config.page_length, config.prefill_chunk, config.max_waiting) == (
        8,
        64,
        None,
        256,
    )
    assert (config.context_length, config.cache_size, config.cache_dtype) == (None, None, None)
    assert config.compilation_cache
    with pytest.raises(FrozenInstanceError):
        config.num_slots = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("num_slots", "page_length", "prefill_chunk", "max_waiting")),
        *((name, 0) for name in ("context_length", "cache_size")),
        *((name, True) for name in ("num_slots", "context_length", "cache_size")),
        *((name, 1 << 60) for name in ("num_slots", "page_length", "context_length", "cache_size")),
        ("num_slots", 1.5),
        ("num_slots", None),
        ("cache_dtype", "float16"),
        ("cache_dtype", 32),
        ("compilation_cache", "no"),
    ],
)
def test_an_engine_field_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*, got {value!r}$"):
        EngineConfig(**{field: value})


def test_engine_fields_in_range() -> None:
    for dtype in ("float32", "bfloat16"):
        assert (
            EngineConfig(context_length=1, num_slots=1, cache_size=1, cache_dtype=dtype).cache_dtype == dtype
        )
