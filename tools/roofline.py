"""The floor: bytes that a step must read, and how fast the machine copies bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.gguf import GGUFFile
from jaxmoe.quants import device_size

COPY_SIZE = 512 << 20  # bytes: more than any cache holds
COPIES = 10


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights, by how a step reads them.

    `whole`: attention, router and norms; `experts`: all experts of all layers; `output`: the output matrix;
    `embedding_row`: what one token looks up. `active_share` is A/E.
    """

    whole: float
    experts: float
    output: float
    embedding_row: float
    active_share: float

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, int], config: ModelConfig) -> Weights:
        """From the bytes of each tensor, by its name in the file."""
        embedding = sizes["token_embd.weight"]
        output = sizes.get("output.weight")
        experts = sum(size for name, size in sizes.items() if "_exps." in name)
        return cls(
            whole=sum(sizes.values()) - experts - embedding - (output or 0),
            experts=experts,
            output=embedding if output is None else output,
            embedding_row=embedding / config.vocab_size,
            active_share=config.experts_per_token / config.num_experts,
        )

    def distinct(self, num_tokens: int) -> float:
        """The share of a layer's experts that so many tokens are expected to meet."""
        return 1 - (1 - self.active_share) ** num_tokens

    def step_size(self, num_tokens: int, *, samples: bool = True) -> float:
        """Bytes that one step over `num_tokens` tokens is expected to read, each weight once."""
        read = self.whole + self.distinct(num_tokens) * self.experts + num_tokens * self.embedding_row
        return read + self.output if samples else read

    def prompt_size(self, prompt_tokens: int, chunk: int) -> float:
        """Bytes that the prefill of one prompt reads, in chunks of `chunk` tokens."""
        starts = range(0, prompt_tokens, chunk)
        lengths = [min(chunk, prompt_tokens - start) for start in starts]
        return sum(self.step_size(length, samples=False) for length in lengths) + self.output


def file_sizes(file: GGUFFile) -> dict[str, int]:
    """Bytes of each tensor in the file."""
    return {tensor.name: tensor.size for tensor in file.tensors.values()}


def device_sizes(file: GGUFFile) -> dict[str, int]:
    """Bytes of each tensor in the device's format."""
    return {tensor.name: device_size(tensor.ggml_type, tensor.shape) for tensor in file.tensors.values()}


# --- The parts of a step.

# part -> the ends of its tensors' names; the experts' are read as far as they are met
_TENSORS = {
    "qkv": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "attn_output": ("attn_output.weight",),
    "router": ("ffn_gate_inp.weight",),
    "gate_up": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "down": ("ffn_down_exps.weight",),
}


def part_sizes(
    sizes: Mapping[str, int], config: ModelConfig, chunks: Sequence[int], *, samples: bool = True
) -> dict[str, float]:
    """Bytes of weights that each part reads in steps over so many tokens each; the output matrix once."""
    weights = Weights.from_sizes(sizes, config)
    found = {}
    for part, ends in _TENSORS.items():
        size = sum(size for name, size in sizes.items() if name.startswith("blk.") and name.endswith(ends))
        is_expert = ends[0].endswith("_exps.weight")
        found[part] = sum(size * (weights.distinct(count) if is_expert else 1.0) for count in chunks)
    return {**found, "lm_head": weights.output if samples else 0.0}


def cache_row_size(config: ModelConfig, itemsize: int) -> int:
    """Bytes of one token's keys and values over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


# --- The machine.


def measure_bandwidth(size: int) -> float:
    """Bytes per second, read plus written, of the fastest of a few large copies where the weights lie."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    copy = _host_copy(size) if on_cpu else _device_copy(size)
    copy()
    seconds = []
    for _ in range(COPIES):
        started = perf_counter()
        num_copies = copy()
        seconds.append((perf_counter() - started) / num_copies)
    return 2 * size / min(seconds)


def _host_copy(size: int) -> Callable[[], int]:
    """A copy by all cores; returns how many copies it made."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source = np.array_split(np.ones(size, np.uint8), threads)
    target = np.array_split(np.zeros(size, np.uint8), threads)

    def copy() -> int:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(np.copyto, target, source))
        return 1

    return copy


def _device_copy(size: int, num_copies: int = 20) -> Callable[[], int]:
    """Copies launched one after the other, so that the launch is hidden; returns how many."""
    import jax
    import jax.numpy as jnp

    source = jnp.zeros(size // 4, jnp.uint32)
    # XLA could leave a plain copy out
    add_one = jax.jit(lambda x: x + jnp.uint32(1))

    def copy() -> int:
        x = source
        for _ in range(num_copies):
            x = add_one(x)
        x.block_until_ready()
        return num_copies

    return copy
