"""The demo model while it learns: the engine's network with trainable weights, and its GGUF file.

The parts are the engine's own plain functions; only what they leave to packed weights and to the paged cache
is written out here, for whole rows of tokens at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize
from jax import Array, lax

from jaxmoe.attention import rope_tables, rotate
from jaxmoe.config import ModelConfig
from jaxmoe.gguf import GGUFFile, read_gguf
from jaxmoe.kernels.rounding import round_rows, rounded_values
from jaxmoe.layers import rms_norm
from jaxmoe.moe import route, swiglu
from tools.demo_vocabulary import CHAT_TEMPLATE, vocabulary_of
from tools.synth_vocab import Vocabulary

Floats = npt.NDArray[np.float32]
MAX_POSITION: Final = 2048

# weight: its name in the file, and its axes, which are the file's with the layers before them
LAYER_WEIGHTS: Final = {
    "attn_norm": ("attn_norm", "LD"),
    "q": ("attn_q", "LND"),
    "k": ("attn_k", "LKD"),
    "v": ("attn_v", "LKD"),
    "q_norm": ("attn_q_norm", "LH"),
    "k_norm": ("attn_k_norm", "LH"),
    "attn_output": ("attn_output", "LDN"),
    "moe_norm": ("ffn_norm", "LD"),
    "router": ("ffn_gate_inp", "LED"),
    "gate": ("ffn_gate_exps", "LEFD"),
    "up": ("ffn_up_exps", "LEFD"),
    "down": ("ffn_down_exps", "LEDF"),
}
OTHER_WEIGHTS: Final = {"embedding": ("token_embd", "VD"), "final_norm": ("output_norm", "D")}
WEIGHTS: Final = {**LAYER_WEIGHTS, **OTHER_WEIGHTS}
_FULL_PRECISION: Final = ("attn_norm", "q_norm", "k_norm", "moe_norm", "router", "final_norm")


def demo_config(vocab_size: int, *, num_layers: int, num_experts: int) -> ModelConfig:
    """The demo model's shape; widths are multiples of 256, so that the CUDA kernels take it."""
    return ModelConfig(
        num_layers=num_layers,
        d_model=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        num_experts=num_experts,
        experts_per_token=2,
        expert_width=256,
        vocab_size=vocab_size,
        context_length=MAX_POSITION,
        norm_eps=1e-6,
        rope_base=1e4,
        rope_scaling=None,
        name="jaxmoe demo",
    )


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Floats]:
    """Norms of one, matrices that keep their inputs' variance; what ends a branch starts at zero."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name in WEIGHTS:
        shape = config.weight_shape(WEIGHTS[name][1])
        if name.endswith("norm"):
            weights[name] = np.ones(shape, np.float32)
        elif name in ("attn_output", "down"):
            weights[name] = np.zeros(shape, np.float32)
        else:
            spread = 0.02 if name == "embedding" else shape[-1] ** -0.5
            weights[name] = rng.standard_normal(shape, np.float32) * np.float32(spread)
    return weights


class Batch(NamedTuple):
    """Rows [B, T] on the device; the fields are those of tools.demo_rows.Rows."""

    tokens: Array
    positions: Array
    segments: Array
    kinds: Array


class Routing(NamedTuple):
    """Per layer and expert [L, E]: the share of all routes it got, and its mean probability."""

    shares: Array
    probabilities: Array


class Network(nnx.Module):
    """The decoder with its weights stacked over layers, as `WEIGHTS` lists them.

    `dtype` is what products take. With `rounding` the weights count as Q8_0 stores them and activations as
    the CUDA kernels round them, while gradients pass through (Bengio et al., 2013: the straight-through
    estimator).
    """

    embedding: nnx.Param[Array]
    final_norm: nnx.Param[Array]

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Floats],
        *,
        dtype: Any = jnp.bfloat16,
        rounding: bool = True,
    ) -> None:
        for name in WEIGHTS:
            setattr(self, name, nnx.Param(jnp.asarray(weights[name])))
        self.config = config
        self.dtype = dtype
        self.precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
        self.rounding = rounding

    def __call__(self, batch: Batch) -> tuple[Array, Routing]:
        """Logits [B, T, V] float32, and how the tokens were routed."""
        x = self._rounded(self.embedding[...])[batch.tokens]
        cos, sin = (jnp.asarray(table)[batch.positions] for table in rope_tables(self.config, MAX_POSITION))
        rope = cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])
        same = batch.segments[:, :, None] == batch.segments[:, None, :]
        seen = same & jnp.tri(batch.tokens.shape[1], dtype=jnp.bool)[None]

        def layer(x: Array, w: dict[str, Array]) -> tuple[Array, tuple[Array, Array]]:
            x = x + self._attend(rms_norm(x, w["attn_norm"], self.config.norm_eps), w, rope, seen)
            real = batch.segments > 0
            y, routing = self._mix_experts(rms_norm(x, w["moe_norm"], self.config.norm_eps), w, real)
            return x + y, routing

        x, routing = lax.scan(layer, x, {name: getattr(self, name)[...] for name in LAYER_WEIGHTS})
        x = rms_norm(x, self.final_norm[...], self.config.norm_eps)
        return self._product(x, self.embedding[...]), Routing(*routing)

    def _attend(self, x: Array, w: dict[str, Array], rope: tuple[Array, Array], seen: Array) -> Array:
        """Causal attention of x [B, T, D] within each conversation."""
        config = self.config
        q, k, v = (self._product(x, w[name]).reshape(*x.shape[:2], -1, config.head_dim) for name in "qkv")
        q, k = rms_norm(q, w["q_norm"], config.norm_eps), rms_norm(k, w["k_norm"], config.norm_eps)
        q, k = (rotate(y.reshape(-1, *y.shape[2:]), *rope).reshape(y.shape) for y in (q, k))
        q, k, v = (y.astype(self.dtype) for y in (q, k, v))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])
        return self._product(mixed.reshape(*x.shape[:2], -1).astype(jnp.float32), w["attn_output"])

    def _mix_experts(self, x: Array, w: dict[str, Array], real: Array) -> tuple[Array, tuple[Array, Array]]:
        """All experts of every token x [B, T, D], weighted by its routes: the others weigh nothing."""
        num_experts = self.config.num_experts
        logits = jnp.einsum("btd,ed->bte", x, w["router"], precision=lax.Precision.HIGHEST)
        ids, shares = route(logits.reshape(-1, num_experts), self.config.experts_per_token)
        routed = jax.nn.one_hot(ids, num_experts, dtype=jnp.float32)
        weights = jnp.sum(routed * shares[:, :, None], axis=1).reshape(logits.shape)
        gate, up = (self._product(x, w[name].reshape(-1, x.shape[-1])) for name in ("gate", "up"))
        hidden = self._rounded(swiglu(gate, up)).reshape(*logits.shape, -1) * weights[..., None]
        y = self._dot("btef,edf->btd", hidden, self._rounded(w["down"]))
        return y, routing_of(jax.nn.softmax(logits, axis=-1), routed, real)

    def _product(self, x: Array, w: Array) -> Array:
        """x [B, T, K] times w [N, K], both rounded."""
        return self._dot("btk,nk->btn", self._rounded(x), self._rounded(w))

    def _dot(self, form: str, x: Array, w: Array) -> Array:
        x, w = x.astype(self.dtype), w.astype(self.dtype)
        return jnp.einsum(form, x, w, preferred_element_type=jnp.float32, precision=self.precision)

    def _rounded(self, x: Array) -> Array:
        """Groups of 32 along the last axis as 8-bit codes and a scale."""
        if not self.rounding:
            return x
        values = rounded_values(round_rows(x.reshape(-1, x.shape[-1]))).reshape(x.shape)
        return x + lax.stop_gradient(values - x)


def routing_of(probabilities: Array, routed: Array, real: Array) -> tuple[Array, Array]:
    """Shares and mean probabilities [E] over real tokens; probabilities [B, T, E], routed [M, A, E]."""
    weight = real.reshape(-1, 1).astype(jnp.float32)
    total = jnp.sum(weight)
    shares = jnp.sum(routed * weight[:, None], axis=(0, 1)) / (total * routed.shape[1])
    return shares, jnp.sum(probabilities.reshape(weight.shape[0], -1) * weight, axis=0) / total


def balance_loss(routing: Routing) -> Array:
    """1 where every expert gets its even share (Fedus et al., 2021, with the mean over layers)."""
    num_experts = routing.shares.shape[-1]
    return num_experts * jnp.mean(jnp.sum(routing.shares * routing.probabilities, axis=-1))


# --- The file

_FILE_TYPES: Final = {
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "F32": LlamaFileType.ALL_F32,
}


def write_gguf(
    path: Path, config: ModelConfig, vocabulary: Vocabulary, weights: Mapping[str, Floats], file_type: str
) -> None:
    """Write a model's file; matrices become `file_type`, norms and router stay float32."""
    unfinished = path.with_name(path.name + ".part")
    writer = GGUFWriter(unfinished, "qwen3moe")
    _add_keys(writer, config, vocabulary, file_type)
    for name, array, is_exact in _file_tensors(config, weights):
        kind = GGMLQuantizationType.F32 if is_exact else GGMLQuantizationType[file_type]
        packed = quantize(array, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)


def _file_tensors(config: ModelConfig, weights: Mapping[str, Floats]) -> Iterator[tuple[str, Floats, bool]]:
    """Name, values, and whether they keep float32."""
    for name, (stem, _) in OTHER_WEIGHTS.items():
        yield f"{stem}.weight", weights[name], name in _FULL_PRECISION
    for layer in range(config.num_layers):
        for name, (stem, _) in LAYER_WEIGHTS.items():
            yield f"blk.{layer}.{stem}.weight", weights[name][layer], name in _FULL_PRECISION


def _add_keys(writer: GGUFWriter, config: ModelConfig, vocabulary: Vocabulary, file_type: str) -> None:
    writer.add_type("model")
    writer.add_name(config.name)
    writer.add_description(
        "A small mixture of experts that shows what jaxmoe runs; trained on made-up conversations"
    )
    writer.add_file_type(_FILE_TYPES[file_type])
    writer.add_quantization_version(2)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.expert_width * config.experts_per_token)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_expert_feed_forward_length(config.expert_width)
    # a small model is at its best when it says what it finds likeliest
    writer.add_float32("general.sampling.temp", 0.0)
    end_of_text, end_of_turn = (vocabulary.tokens.index(t) for t in ("<|endoftext|>", "<|im_end|>"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.token_types))
    writer.add_token_merges(list(vocabulary.merges))
    writer.add_eos_token_id(end_of_turn)
    writer.add_pad_token_id(end_of_text)
    writer.add_bos_token_id(end_of_text)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


@dataclass(frozen=True)
class Trained:
    """What a model's file holds."""

    config: ModelConfig
    vocabulary: Vocabulary
    weights: dict[str, Floats]


def read_trained(path: Path) -> Trained:
    """Read a file that `write_gguf` wrote."""
    file = read_gguf(path)
    config = ModelConfig.from_gguf(file)
    vocabulary = vocabulary_of(path)
    weights = {name: _values(file, f"{stem}.weight") for name, (stem, _) in OTHER_WEIGHTS.items()}
    for name, (stem, _) in LAYER_WEIGHTS.items():
        layers = [_values(file, f"blk.{layer}.{stem}.weight") for layer in range(config.num_layers)]
        weights[name] = np.stack(layers)
    return Trained(config, vocabulary, weights)


def _values(file: GGUFFile, name: str) -> Floats:
    tensor = file.tensors[name]
    return np.asarray(dequantize(tensor.data, tensor.ggml_type), np.float32).reshape(tensor.shape)
