"""Records what transformers' Qwen3-MoE computes on the tiny synthetic file, as truth from another program.

Run it by hand when tools.synth_gguf changes what it writes, in an environment of its own with torch,
transformers and gguf, which no test needs:
    PYTHONPATH=. python tests/record_goldens.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from reference import GOLDEN_VARIANTS, Network, read_network, tensor_sha256
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tools.synth_gguf import write_synthetic

GOLDENS = Path(__file__).parent / "goldens" / "tiny_f32.npz"
PROMPT_LENGTHS = (1, 7, 33, 300)
NUM_GREEDY = 64
SMALLEST_LEAD = 2e-3

PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}


def rope_parameters(keys: dict[str, Any]) -> dict[str, Any]:
    parameters = {"rope_type": "default", "rope_theta": keys["rope.freq_base"]}
    if "rope.scaling.type" not in keys:
        return parameters
    return parameters | {
        "rope_type": keys["rope.scaling.type"],
        "factor": keys["rope.scaling.factor"],
        "original_max_position_embeddings": keys["rope.scaling.original_context_length"],
    }


def transformers_config(network: Network) -> Qwen3MoeConfig:
    keys = network.keys
    return Qwen3MoeConfig(
        vocab_size=network.weights["token_embd.weight"].shape[0],
        hidden_size=keys["embedding_length"],
        num_hidden_layers=keys["block_count"],
        num_attention_heads=keys["attention.head_count"],
        num_key_value_heads=keys["attention.head_count_kv"],
        head_dim=keys["attention.key_length"],
        rms_norm_eps=keys["attention.layer_norm_rms_epsilon"],
        max_position_embeddings=keys["context_length"],
        rope_parameters=rope_parameters(keys),
        moe_intermediate_size=keys["expert_feed_forward_length"],
        num_experts=keys["expert_count"],
        num_experts_per_tok=keys["expert_used_count"],
        norm_topk_prob=True,
        tie_word_embeddings="output.weight" not in network.weights,
        attn_implementation="eager",
    )


def state_dict(network: Network) -> dict[str, torch.Tensor]:
    weights = network.weights
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
        "lm_head.weight": weights.get("output.weight", weights["token_embd.weight"]),
    }
    for layer in range(network.keys["block_count"]):
        home = f"model.layers.{layer}"
        for name, theirs in PER_LAYER.items():
            state[f"{home}.{theirs}.weight"] = network.of_layer(layer, name)
        gate_up = [network.of_layer(layer, name) for name in ("ffn_gate_exps", "ffn_up_exps")]
        state[f"{home}.mlp.experts.gate_up_proj"] = np.concatenate(gate_up, axis=1)
        state[f"{home}.mlp.experts.down_proj"] = network.of_layer(layer, "ffn_down_exps")
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in state.items()}


def load(network: Network) -> Qwen3MoeForCausalLM:
    model = Qwen3MoeForCausalLM(transformers_config(network)).to(torch.float32).eval()
    model.load_state_dict(state_dict(network), strict=True)
    return model


def last_logits(model: Qwen3MoeForCausalLM, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1].numpy()


def greedy(model: Qwen3MoeForCausalLM, prompt: list[int]) -> tuple[list[int], float]:
    """The ids, and the smallest lead of a likeliest id over the next."""
    ids, lead = list(prompt), float("inf")
    for _ in range(NUM_GREEDY):
        logits = last_logits(model, ids)
        second, first = np.sort(logits)[-2:]
        lead = min(lead, float(first - second))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], lead


def telling_prompt(model: Qwen3MoeForCausalLM, length: int, vocab_size: int) -> tuple[list[int], list[int]]:
    """A random prompt and its greedy ids, which neither repeat one token nor hang on a rounding error."""
    for seed in range(100):
        prompt = np.random.default_rng([length, seed]).integers(0, vocab_size, length).tolist()
        ids, lead = greedy(model, prompt)
        if lead > SMALLEST_LEAD and len(set(ids)) >= NUM_GREEDY // 4:
            print(f"  {length} tokens, seed {seed}: {len(set(ids))} distinct ids, smallest lead {lead:.4f}")
            return prompt, ids
    raise RuntimeError(f"no prompt of {length} tokens has clear greedy ids")


def record(network: Network) -> dict[str, np.ndarray]:
    model = load(network)
    goldens = {}
    for i, length in enumerate(PROMPT_LENGTHS):
        prompt, ids = telling_prompt(model, length, network.weights["token_embd.weight"].shape[0])
        goldens[f"prompt_{i}"] = np.array(prompt, np.int32)
        goldens[f"greedy_{i}"] = np.array(ids, np.int32)
        goldens[f"logits_{i}"] = last_logits(model, prompt)
    return goldens


def main() -> None:
    goldens = {"versions": np.array(f"torch {torch.__version__}, transformers {transformers.__version__}")}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in GOLDEN_VARIANTS.items():
            path = Path(folder) / f"{name}.gguf"
            write_synthetic(path, "tiny", "F32", seed=0, **options)
            print(name)
            goldens[f"{name}/sha256"] = np.array(tensor_sha256(path))
            goldens |= {f"{name}/{key}": value for key, value in record(read_network(path)).items()}
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **goldens)
    print(f"{GOLDENS.name}: {GOLDENS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
