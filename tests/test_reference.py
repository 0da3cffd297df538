"""The float64 reference against what transformers computed on the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference import GOLDEN_VARIANTS, Network, greedy_of, logits_of, read_network, tensor_sha256

from tools.synth_gguf import write_synthetic

GOLDENS = np.load(Path(__file__).parent / "goldens" / "tiny_f32.npz")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Network]:
    folder = tmp_path_factory.mktemp("reference")
    networks: dict[str, Network] = {}

    def read(variant: str) -> Network:
        if variant not in networks:
            path = folder / f"{variant}.gguf"
            write_synthetic(path, "tiny", "F32", seed=0, **GOLDEN_VARIANTS[variant])
            assert tensor_sha256(path) == str(GOLDENS[f"{variant}/sha256"]), (
                "tools.synth_gguf writes other weights than when the goldens were recorded:"
                " run tests/record_goldens.py and commit what it writes"
            )
            networks[variant] = read_network(path)
        return networks[variant]

    return read


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("prompt", range(4))
@pytest.mark.parametrize("variant", GOLDEN_VARIANTS)
def test_last_logits_are_those_of_transformers(
    network: Callable[[str], Network], variant: str, prompt: int
) -> None:
    logits = logits_of(network(variant), GOLDENS[f"{variant}/prompt_{prompt}"])[-1]
    golden = GOLDENS[f"{variant}/logits_{prompt}"].astype(np.float64)
    assert cosine(logits, golden) > 0.99999
    np.testing.assert_allclose(logits, golden, rtol=0, atol=1e-5 * np.abs(golden).max())


@pytest.mark.parametrize("prompt", range(4))
@pytest.mark.parametrize("variant", GOLDEN_VARIANTS)
def test_greedy_ids_are_those_of_transformers(
    network: Callable[[str], Network], variant: str, prompt: int
) -> None:
    golden = GOLDENS[f"{variant}/greedy_{prompt}"].tolist()
    assert greedy_of(network(variant), GOLDENS[f"{variant}/prompt_{prompt}"], len(golden)) == golden


def test_an_earlier_position_does_not_see_later_tokens(network: Callable[[str], Network]) -> None:
    ids = GOLDENS["plain/prompt_2"]
    whole = logits_of(network("plain"), ids)
    np.testing.assert_allclose(whole[:9], logits_of(network("plain"), ids[:9]), rtol=1e-9, atol=1e-9)
