"""Qwen3-MoE in float64 NumPy, written from the architecture's definition; it shares no code with jaxmoe.

Sources: the Qwen3 Technical Report (2025) and the published architecture: a pre-norm decoder with RMSNorm,
grouped-query attention with a norm on each query and key head before NEOX-style RoPE, a router whose softmax
over all experts is cut to the top ones and renormalised, SwiGLU experts, a final norm, and an output matrix
that may be the embedding. YaRN: Peng et al. (2023), with ggml's parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Past = dict[int, tuple[Floats, Floats]]  # keys and values [T, kv heads, width] by layer

# what the goldens are recorded of: arguments of tools.synth_gguf.write_synthetic
GOLDEN_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "yarn": {
        "metadata": {
            "qwen3moe.rope.scaling.type": "yarn",
            "qwen3moe.rope.scaling.factor": 4.0,
            "qwen3moe.rope.scaling.original_context_length": 256,
        }
    },
}


@dataclass(frozen=True)
class Network:
    """All weights, [outputs, inputs] as in the file, and the file's scalar keys without `qwen3moe.`."""

    weights: dict[str, Floats]
    keys: dict[str, Any]

    def of_layer(self, layer: int, name: str) -> Floats:
        return self.weights[f"blk.{layer}.{name}.weight"]


def read_network(path: str | PathLike[str]) -> Network:
    """Reads and dequantises a whole file with the gguf package."""
    reader = GGUFReader(path)
    weights = {
        tensor.name: dequantize(tensor.data, tensor.tensor_type)
        .reshape(tuple(int(n) for n in reversed(tensor.shape)))
        .astype(np.float64)
        for tensor in reader.tensors
    }
    prefix = "qwen3moe."
    keys = {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }
    return Network(weights, keys)


def tensor_sha256(path: str | PathLike[str]) -> str:
    """One digest of the names and bytes of all tensors, in file order."""
    digest = hashlib.sha256()
    for tensor in GGUFReader(path).tensors:
        digest.update(tensor.name.encode())
        digest.update(np.ascontiguousarray(tensor.data).tobytes())
    return digest.hexdigest()


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def softmax(x: Floats) -> Floats:
    """Over the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def rope_frequencies(keys: dict[str, Any], width: int) -> tuple[Floats, float]:
    """Radians per position of each of the width/2 pairs, and what cosine and sine are multiplied by."""
    base = keys["rope.freq_base"]
    frequencies = base ** (-np.arange(0, width, 2) / width)
    if keys.get("rope.scaling.type") != "yarn":
        return frequencies, 1.0
    factor = keys["rope.scaling.factor"]
    original = keys["rope.scaling.original_context_length"]

    def pair_that_turns(times: float) -> float:
        # wavelength of pair i is 2 pi base^(2i/width); it turns `times` times over the original context
        return width * np.log(original / (times * 2 * np.pi)) / (2 * np.log(base))

    low = max(np.floor(pair_that_turns(keys.get("rope.scaling.yarn_beta_fast", 32.0))), 0)
    high = min(np.ceil(pair_that_turns(keys.get("rope.scaling.yarn_beta_slow", 1.0))), width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    kept = (1 - ramp) * keys.get("rope.scaling.yarn_ext_factor", 1.0)
    magnitude = 1 + 0.1 * np.log(factor)
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        magnitude *= keys.get(name, 1.0)
    return frequencies / factor * (1 - kept) + frequencies * kept, magnitude


def rotate(x: Floats, keys: dict[str, Any], start: int) -> Floats:
    """RoPE of [T, heads, width] at positions from `start` on, the pairs being (i, i + width/2)."""
    frequencies, magnitude = rope_frequencies(keys, x.shape[-1])
    angles = (start + np.arange(len(x)))[:, None, None] * frequencies
    cosine, sine = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)


def attention(network: Network, layer: int, x: Floats, past: Past) -> Floats:
    """Causal grouped-query attention of [T, D] to itself and to what is past, without the residual."""
    keys = network.keys
    length, width, eps = len(x), keys["attention.key_length"], keys["attention.layer_norm_rms_epsilon"]
    q, k, v = (
        (x @ network.of_layer(layer, name).T).reshape(length, -1, width)
        for name in ("attn_q", "attn_k", "attn_v")
    )
    start = len(past[layer][0]) if layer in past else 0
    q = rotate(rms_norm(q, network.of_layer(layer, "attn_q_norm"), eps), keys, start)
    k = rotate(rms_norm(k, network.of_layer(layer, "attn_k_norm"), eps), keys, start)
    if layer in past:
        k, v = np.concatenate((past[layer][0], k)), np.concatenate((past[layer][1], v))
    past[layer] = k, v
    heads_per_kv = keys["attention.head_count"] // keys["attention.head_count_kv"]
    future = np.arange(start + length) > start + np.arange(length)[:, None]
    out = np.empty_like(q)
    for head in range(keys["attention.head_count"]):
        kv_head = head // heads_per_kv
        scores = q[:, head] @ k[:, kv_head].T / np.sqrt(width)
        out[:, head] = softmax(np.where(future, -np.inf, scores)) @ v[:, kv_head]
    return out.reshape(length, -1) @ network.of_layer(layer, "attn_output").T


def experts(network: Network, layer: int, x: Floats) -> Floats:
    """The mixture of experts of [T, D], without the residual; on a tie the lower expert wins."""
    gate, up, down = (
        network.of_layer(layer, name) for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    )
    scores = softmax(x @ network.of_layer(layer, "ffn_gate_inp").T)
    chosen = np.argsort(-scores, axis=-1, kind="stable")[:, : network.keys["expert_used_count"]]
    out = np.zeros_like(x)
    for expert in np.unique(chosen):
        tokens = np.flatnonzero((chosen == expert).any(axis=-1))
        share = scores[tokens, expert] / np.take_along_axis(scores, chosen, axis=-1)[tokens].sum(axis=-1)
        gated = x[tokens] @ gate[expert].T
        hidden = gated / (1 + np.exp(-gated)) * (x[tokens] @ up[expert].T)
        out[tokens] += share[:, None] * (hidden @ down[expert].T)
    return out


def logits_of(network: Network, token_ids: Sequence[int], past: Past | None = None) -> Floats:
    """Logits [T, V] after each of the tokens; `past` has the keys and values of earlier ones, and grows."""
    past = {} if past is None else past
    weights, eps = network.weights, network.keys["attention.layer_norm_rms_epsilon"]
    x = weights["token_embd.weight"][np.asarray(token_ids)]
    for layer in range(network.keys["block_count"]):
        x = x + attention(network, layer, rms_norm(x, network.of_layer(layer, "attn_norm"), eps), past)
        x = x + experts(network, layer, rms_norm(x, network.of_layer(layer, "ffn_norm"), eps))
    x = rms_norm(x, weights["output_norm.weight"], eps)
    return x @ weights.get("output.weight", weights["token_embd.weight"]).T


def greedy_of(network: Network, prompt_ids: Sequence[int], n: int) -> list[int]:
    """The `n` likeliest ids in turn, end tokens included."""
    past: Past = {}
    new, ids = list(prompt_ids), []
    for _ in range(n):
        new = [int(logits_of(network, new, past)[-1].argmax())]
        ids += new
    return ids


def reference_logits(path: str | PathLike[str], token_ids: Sequence[int]) -> Floats:
    """Logits [T, V] of a GGUF file after each of the tokens."""
    return logits_of(read_network(path), token_ids)


def reference_greedy(path: str | PathLike[str], prompt_ids: Sequence[int], n: int) -> list[int]:
    """The `n` ids that greedy decoding of a GGUF file adds to the prompt."""
    return greedy_of(read_network(path), prompt_ids, n)
