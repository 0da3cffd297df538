"""A small network for the tests of kernels."""

from __future__ import annotations

from dataclasses import replace

from jaxmoe.config import ModelConfig


def small_config(*, num_experts: int = 20, experts_per_token: int = 3, d_model: int = 512) -> ModelConfig:
    """Widths that the kernels take, and numbers of experts that fill no block."""
    return ModelConfig(
        num_layers=3,
        d_model=d_model,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_width=256,
        vocab_size=64,
        context_length=512,
        norm_eps=1e-5,
        rope_base=1e6,
        rope_scaling=None,
        name="small",
    )


def real_config() -> ModelConfig:
    """The shapes of Qwen3-30B-A3B, two layers."""
    config = small_config(num_experts=128, experts_per_token=8, d_model=2048)
    heads = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128}
    return replace(config, num_layers=2, vocab_size=151_936, expert_width=768, **heads)
