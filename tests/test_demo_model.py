"""The network that learns computes what the engine computes; its files are read as they were written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES
from on_device import Forward, open_model

from jaxmoe import demo_model
from jaxmoe.config import ModelConfig
from tools.demo_model import (
    Batch,
    Floats,
    Network,
    Routing,
    balance_loss,
    demo_config,
    initial_weights,
    read_trained,
    routing_of,
    write_gguf,
)
from tools.demo_vocabulary import CHAT_TEMPLATE, train_vocabulary, vocabulary_of
from tools.synth_vocab import Vocabulary

LENGTHS = (40, 24)
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train_vocabulary(["the quick brown fox jumps over the lazy dog"] * 3, 288)


@pytest.fixture(scope="module")
def drawn(vocabulary: Vocabulary) -> tuple[ModelConfig, dict[str, Floats]]:
    """A small model none of whose weights is zero or one."""
    config = demo_config(len(vocabulary.tokens), num_layers=2, num_experts=4)
    weights, rng = initial_weights(config, seed=1), np.random.default_rng(2)
    for name, array in weights.items():
        spread = 0.5 if name.endswith("norm") else 1.0 if name == "embedding" else array.shape[-1] ** -0.5
        weights[name] = (array + spread * rng.standard_normal(array.shape)).astype(np.float32)
    return config, weights


def as_stored(config: ModelConfig) -> ModelConfig:
    """Its numbers as a file's float32 hold them."""
    return replace(config, norm_eps=float(np.float32(config.norm_eps)))


def rows_of(rng: np.random.Generator, vocab_size: int) -> Batch:
    """One row that holds two conversations."""
    length = sum(LENGTHS)
    tokens = rng.integers(0, vocab_size, (1, length), np.int32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in LENGTHS])[None]
    segments = np.repeat(np.arange(1, 3, dtype=np.int32), LENGTHS)[None]
    return Batch(*map(jnp.asarray, (tokens, positions, segments, np.zeros_like(tokens))))


def test_logits_are_the_engines(
    tmp_path: Path, vocabulary: Vocabulary, drawn: tuple[ModelConfig, dict[str, Floats]]
) -> None:
    config, weights = drawn
    batch = rows_of(np.random.default_rng(3), config.vocab_size)
    logits, _ = Network(config, weights, dtype=jnp.float32, rounding=False)(batch)
    path = tmp_path / "model.gguf"
    write_gguf(path, config, vocabulary, weights, "F32")
    forward = Forward(*open_model(path), bucket=64)
    tokens = np.asarray(batch.tokens)[0]
    expected = np.concatenate([forward(tokens[: LENGTHS[0]]), forward(tokens[LENGTHS[0] :])])
    error = np.abs(np.asarray(logits)[0] - expected[:, : config.vocab_size]).max()
    assert error < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(("file_type", "error"), [("F32", 0.0), ("BF16", 2**-8), ("Q8_0", 2**-7)])
def test_a_file_is_read_as_it_was_written(
    tmp_path: Path,
    vocabulary: Vocabulary,
    drawn: tuple[ModelConfig, dict[str, Floats]],
    file_type: str,
    error: float,
) -> None:
    config, weights = drawn
    path = tmp_path / "model.gguf"
    write_gguf(path, config, vocabulary, weights, file_type)
    read = read_trained(path)
    assert (as_stored(config), vocabulary) == (read.config, read.vocabulary)
    assert set(read.weights) == set(weights)
    for name, array in weights.items():
        exact = name.endswith("norm") or name == "router"
        limit = 0.0 if exact else error * np.abs(array).max()
        assert np.abs(read.weights[name] - array).max() <= limit, name
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_padding_is_not_counted() -> None:
    probabilities = jnp.array([[[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
    routed = jnp.array([[[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 0]]], jnp.float32)
    shares, means = routing_of(probabilities, routed, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(shares, [0.5, 0.5, 0])
    np.testing.assert_allclose(means, [0.5, 0.375, 0.125])


def test_an_even_router_is_balanced() -> None:
    even = jnp.full((2, 4), 0.25)
    lopsided = jnp.array([[0.7, 0.1, 0.1, 0.1]] * 2)
    assert balance_loss(Routing(even, even)) == pytest.approx(1.0)
    assert balance_loss(Routing(lopsided, lopsided)) > 2


# --- The file that ships


def test_files_have_the_standard_tensors(
    tmp_path: Path, vocabulary: Vocabulary, drawn: tuple[ModelConfig, dict[str, Floats]]
) -> None:
    """Read by the gguf package, with the names that it lists for this architecture."""
    config, weights = drawn
    write_gguf(tmp_path / "model.gguf", config, vocabulary, weights, "Q8_0")
    for path, num_layers in ((tmp_path / "model.gguf", config.num_layers), (demo_model(), 4)):
        reader = GGUFReader(path)
        assert reader.fields["general.architecture"].contents() == "qwen3moe"
        assert reader.fields["qwen3moe.block_count"].contents() == num_layers
        (arch,) = (arch for arch in MODEL_ARCH if arch.name == "QWEN3MOE")
        standard = {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[arch]}
        known = {f"{name.format(bid=layer)}.weight" for name in standard for layer in range(num_layers)}
        assert {tensor.name for tensor in reader.tensors} <= known
        assert len(reader.tensors) == 2 + 12 * num_layers
        assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "Q8_0"}


def test_the_shipped_file_is_small() -> None:
    assert demo_model().stat().st_size <= 8 * 2**20


def test_the_shipped_file_is_of_the_trained_shape() -> None:
    reader = GGUFReader(demo_model())
    trained = read_trained(demo_model())
    shape = demo_config(len(trained.vocabulary.tokens), num_layers=4, num_experts=8)
    assert trained.config == as_stored(shape)
    assert reader.fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE
    assert tuple(reader.fields["tokenizer.ggml.tokens"].contents()) == vocabulary_of(demo_model()).tokens
    assert all(np.isfinite(array).all() for array in trained.weights.values())
