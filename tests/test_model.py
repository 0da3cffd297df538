"""The whole network against transformers (goldens) and against float64 NumPy (reference.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from on_device import CONTEXT_LENGTH, Forward, Player, cut, ids_of, open_model
from reference import GOLDEN_VARIANTS, Network, logits_of, read_network

from jaxmoe.config import ModelConfig
from jaxmoe.gguf import read_gguf
from jaxmoe.model import Decoder, Embedding
from jaxmoe.quants import Layout, pack
from jaxmoe.request import SamplingParams
from jaxmoe.step import Steps
from jaxmoe.weights import load_model
from tools.synth_gguf import write_synthetic

GOLDENS = np.load(Path(__file__).parent / "goldens" / "tiny_f32.npz")
LAYOUTS: tuple[Layout, ...] = ("rows", "columns")
NUM_PROMPTS = 4
LONGEST = 384
GREEDY = SamplingParams(temperature=0.0)


def golden(name: str) -> list[int]:
    ids: list[int] = GOLDENS[name].tolist()
    return ids


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def assert_close(logits: np.ndarray, truth: np.ndarray, *, bound: float = 2e-5) -> None:
    """Rows [T, V]: cosine over 0.99999, and no logit far off."""
    assert logits.shape == truth.shape
    assert min(cosine(a, b) for a, b in zip(logits, truth, strict=True)) > 0.99999
    np.testing.assert_allclose(logits, truth, rtol=0, atol=bound * np.abs(truth).max())


@pytest.fixture(scope="module")
def forward(tiny_model: Decoder) -> Forward:
    return Forward(tiny_model, tiny_model.config, LONGEST)


@pytest.mark.parametrize("variant", GOLDEN_VARIANTS)
def test_logits_and_greedy_ids_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_synthetic(path, "tiny", "F32", **GOLDEN_VARIANTS[variant])
    forward = Forward(*open_model(path), LONGEST)
    for i in range(NUM_PROMPTS):
        prompt, greedy = golden(f"{variant}/prompt_{i}"), golden(f"{variant}/greedy_{i}")
        assert len(greedy) == 64
        # each id is the likeliest after the ones before it: so greedy decoding gives them all
        logits = forward([*prompt, *greedy[:-1]])[len(prompt) - 1 :]
        assert logits.argmax(axis=-1).tolist() == greedy
        assert_close(logits[:1], GOLDENS[f"{variant}/logits_{i}"][None])


@pytest.mark.parametrize("i", range(NUM_PROMPTS))
def test_the_steps_give_the_greedy_ids_of_transformers(tiny_steps: Steps, i: int) -> None:
    greedy = golden(f"plain/greedy_{i}")
    assert ids_of(Player(tiny_steps).generate(golden(f"plain/prompt_{i}"), GREEDY, 64)) == greedy


def test_logits_of_every_position_are_the_reference_s(forward: Forward, tiny_network: Network) -> None:
    ids = random_ids(LONGEST)
    assert_close(forward(ids), logits_of(tiny_network, ids))


@pytest.mark.parametrize("chunks", [cut(LONGEST, 64), [1, 7, 56, 191, 2, 127], [1] * LONGEST])
def test_chunks_do_not_change_a_bit_of_the_logits(forward: Forward, chunks: list[int]) -> None:
    ids = random_ids(LONGEST)
    np.testing.assert_array_equal(forward(ids, chunks), forward(ids))


def test_an_earlier_position_does_not_see_later_tokens(forward: Forward) -> None:
    ids = random_ids(300)
    np.testing.assert_array_equal(forward(ids[:9]), forward(ids)[:9])


def test_a_mixed_packed_file_gives_the_logits_and_greedy_ids_of_the_reference(
    tiny_q4: Path, tiny_q4_steps: Steps
) -> None:
    network = read_network(tiny_q4)
    prompt = random_ids(100)
    ids = ids_of(Player(tiny_q4_steps).generate(prompt, GREEDY, 64))
    whole = [*prompt, *ids]
    truth = logits_of(network, whole)
    assert clear_winners(truth[len(prompt) - 1 : -1]) == ids
    assert_close(Forward(*open_model(tiny_q4), 192)(whole), truth)


def test_every_matrix_may_be_of_another_type_in_each_layer(tmp_path: Path) -> None:
    files, networks = [], []
    for quant in ("Q4_K", "Q8_0"):
        write_synthetic(tmp_path / f"{quant}.gguf", "tiny", quant)
        files.append(read_gguf(tmp_path / f"{quant}.gguf"))
        networks.append(read_network(tmp_path / f"{quant}.gguf"))

    def source(name: str) -> int:
        # the down and up experts the other way round than the rest
        return name.startswith("blk.0") ^ ("ffn_up" in name or "ffn_down" in name)

    file = replace(files[0], tensors={name: files[source(name)].tensors[name] for name in files[0].tensors})
    weights = {name: networks[source(name)].weights[name] for name in networks[0].weights}
    config, ids = ModelConfig.from_gguf(file), random_ids(20)
    model = load_model(file, config, context_length=CONTEXT_LENGTH, layout="rows")
    assert len(model.moe.gate.stacks) == len(model.moe.up.stacks) == len(model.attention.q.stacks) == 2
    assert_close(Forward(model, config, 64)(ids), logits_of(Network(weights, networks[0].keys), ids))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_the_embedding_of_an_id_is_its_row_of_the_file(tmp_path: Path, layout: Layout, quant: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_synthetic(path, "tiny", quant)
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(512, 256)
    packed = pack(tensor.tensor_type, tensor.data.reshape(-1).view(np.uint8), (512, 256), layout)
    ids = np.array([0, 511, 3, 3, 64, 257], np.int32)
    np.testing.assert_array_equal(Embedding(packed.map(jnp.asarray))(jnp.asarray(ids)), rows[ids])


def test_prompt_and_answer_may_fill_the_context(tiny_steps: Steps, tiny_network: Network) -> None:
    prompt = random_ids(1000)
    ids = ids_of(Player(tiny_steps).generate(prompt, GREEDY, 25))
    assert clear_winners(logits_of(tiny_network, [*prompt, *ids[:-1]])[999:]) == ids


def random_ids(length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(length).integers(0, 512, length).tolist()
    return ids


def clear_winners(logits: np.ndarray) -> list[int]:
    """The likeliest ids, which must lead by more than rounding."""
    second, first = np.sort(logits, axis=-1)[:, -2:].T
    assert (first - second).min() > 1e-4
    ids: list[int] = logits.argmax(axis=-1).tolist()
    return ids
