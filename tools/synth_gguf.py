"""Write a synthetic Qwen3-MoE GGUF file: real shapes and keys, random weights, a generated vocabulary.

`python -m tools.synth_gguf --preset tiny --quant Q4_K_M OUT.gguf`
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import isqrt, prod
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias
from zlib import crc32

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import dequantize, quantize
from tqdm import tqdm

from jaxmoe.gguf import Value, read_gguf
from tools.synth_vocab import CHAT_TEMPLATE, NORMAL, Vocabulary, is_text, make_vocabulary

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Key: TypeAlias = tuple[Any, GGUFValueType, GGUFValueType | None]


@dataclass(frozen=True)
class Preset:
    """The sizes of a network; `pooled` ones are too big to draw every weight (see `_Pools`)."""

    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    vocab_size: int
    context_length: int
    pooled: bool = False


PRESETS: Final = {
    "tiny": Preset(2, 256, 4, 2, 64, 8, 2, 256, 512, 1024),
    "mini": Preset(4, 512, 8, 4, 64, 16, 4, 256, 2048, 4096),
    "30b-8l": Preset(8, 2048, 32, 4, 128, 128, 8, 768, 151_936, 40_960, pooled=True),
    "30b": Preset(48, 2048, 32, 4, 128, 128, 8, 768, 151_936, 40_960, pooled=True),
}
FILE_TYPES: Final = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": LlamaFileType.MOSTLY_Q5_1,
    "Q2_K": LlamaFileType.MOSTLY_Q2_K,
    "Q3_K": LlamaFileType.MOSTLY_Q3_K_S,
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_S,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
    "Q5_K": LlamaFileType.MOSTLY_Q5_K_S,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
    "IQ4_NL": LlamaFileType.MOSTLY_IQ4_NL,
    "IQ4_XS": LlamaFileType.MOSTLY_IQ4_XS,
    "MXFP4": LlamaFileType.MOSTLY_MXFP4_MOE,
}
_ARCH: Final = "qwen3moe"
_EMBED_STD: Final = 1.0
_LOGIT_STD: Final = 3.0
_ROUTER_STD: Final = 1.5
_BRANCH_STD: Final = 2.0  # what attention, and what the experts, add to the residual over all layers
_QK_NORM: Final = 1.5  # sharp attention keeps greedy output from falling into a loop
_COMPLETION: Final = 30.0
_POOL_SIZE: Final = 16 << 20
_DRAWN_SIZE: Final = 2 << 20
_OUTPUT: Final = "output.weight"
_EMBEDDING: Final = "token_embd.weight"
_QUANTISABLE: Final = frozenset(
    GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
)


def write_synthetic(
    path: str | os.PathLike[str],
    preset: str,
    quant: str,
    seed: int = 0,
    vocab: str | os.PathLike[str] | None = None,
    *,
    values: Literal["random", "counting"] = "random",
    tied: bool = False,
    metadata: Mapping[str, Value] | None = None,
) -> None:
    """Write a synthetic file to `path`.

    `vocab` names a GGUF file whose tokenizer is copied. `values="counting"` (F32 only) gives element k
    of the file, counted over all tensors in file order, the value k. `tied` leaves the output matrix
    out. `metadata` adds keys or replaces them. Raises ValueError for an unknown preset or quant.
    """
    if preset not in PRESETS or quant not in FILE_TYPES:
        raise ValueError(f"there is no preset {preset!r} or no quant {quant!r}")
    if values == "counting" and (preset, quant) != ("tiny", "F32"):
        raise ValueError("only a tiny F32 file holds all counting numbers exactly")
    sizes = PRESETS[preset]
    vocabulary, keys = _generated_tokenizer(sizes) if vocab is None else _copied_tokenizer(Path(vocab))
    keys = _network_keys(sizes, preset, quant) | keys
    keys |= {name: _key(value) for name, value in (metadata or {}).items()}
    plans = list(plan_tensors(sizes, quant, vocab_size=len(vocabulary.tokens), tied=tied))
    weights = _Counting() if values == "counting" else (_Pools if sizes.pooled else _Drawn)(seed, vocabulary)
    _write_file(Path(path), keys, plans, weights.pack)


# Metadata


def _key(value: Value) -> Key:
    if isinstance(value, np.ndarray):
        return value.tolist(), GGUFValueType.ARRAY, _NUMPY_TYPES[value.dtype.name]
    if isinstance(value, list):
        return value, GGUFValueType.ARRAY, GGUFValueType.STRING
    return value, _SCALAR_TYPES[type(value)], None


_SCALAR_TYPES: Final[dict[type, GGUFValueType]] = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
_NUMPY_TYPES: Final = {t.name.lower(): t for t in GGUFValueType}


def _network_keys(sizes: Preset, preset: str, quant: str) -> dict[str, Key]:
    general: dict[str, Value] = {
        "general.type": "model",
        "general.name": f"Synthetic {preset}",
        "general.file_type": int(FILE_TYPES[quant]),
        "general.quantization_version": 2,
    }
    network: dict[str, Value] = {
        "block_count": sizes.num_layers,
        "context_length": sizes.context_length,
        "embedding_length": sizes.d_model,
        "feed_forward_length": 3 * sizes.d_model,
        "attention.head_count": sizes.num_heads,
        "attention.head_count_kv": sizes.num_kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        "expert_count": sizes.num_experts,
        "expert_used_count": sizes.experts_per_token,
        "expert_feed_forward_length": sizes.expert_width,
    }
    keys = general | {f"{_ARCH}.{name}": value for name, value in network.items()}
    return {name: _key(value) for name, value in keys.items()}


def _generated_tokenizer(sizes: Preset) -> tuple[Vocabulary, dict[str, Key]]:
    vocabulary = make_vocabulary(sizes.vocab_size)
    end_of_text, end_of_turn = (vocabulary.tokens.index(t) for t in ("<|endoftext|>", "<|im_end|>"))
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": list(vocabulary.tokens),
        "tokenizer.ggml.token_type": np.array(vocabulary.token_types, np.int32),
        "tokenizer.ggml.merges": list(vocabulary.merges),
        "tokenizer.ggml.eos_token_id": end_of_turn,
        "tokenizer.ggml.padding_token_id": end_of_text,
        "tokenizer.ggml.bos_token_id": end_of_text,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    return vocabulary, {name: _key(value) for name, value in keys.items()}


def _copied_tokenizer(path: Path) -> tuple[Vocabulary, dict[str, Key]]:
    file = read_gguf(path)
    tokens = file.get_array("tokenizer.ggml.tokens", of=str)
    types = file.get_array("tokenizer.ggml.token_type", of=int)
    keys = {name: _key(value) for name, value in file.metadata.items() if name.startswith("tokenizer.")}
    return Vocabulary(tuple(tokens), tuple(types.tolist()), ()), keys


# Tensors


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to write, its shape in numpy order.

    A matrix has mean 0 and the standard deviation `spread`; a norm lies within `mean` +- `spread`.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    spread: float
    mean: float = 0.0

    @property
    def is_norm(self) -> bool:
        return self.mean != 0

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def num_blocks(self) -> int:
        return prod(self.shape) // GGML_QUANT_SIZES[self.ggml_type][0]

    @property
    def size(self) -> int:
        return self.num_blocks * GGML_QUANT_SIZES[self.ggml_type][1]


def plan_tensors(sizes: Preset, quant: str, *, vocab_size: int, tied: bool) -> Iterator[TensorPlan]:
    """All tensors in the order of real files: the output, the embedding, then each layer's by name."""
    d_model = sizes.d_model
    embed_std = _LOGIT_STD / d_model**0.5 if tied else _EMBED_STD
    if not tied:
        output_type = tensor_type(quant, "output", 0, sizes.num_layers)
        yield TensorPlan(_OUTPUT, (vocab_size, d_model), output_type, _LOGIT_STD / d_model**0.5)
    yield _norm_plan("output_norm", d_model)
    embed_type = tensor_type(quant, "token_embd", 0, sizes.num_layers)
    yield TensorPlan(_EMBEDDING, (vocab_size, d_model), embed_type, embed_std)
    for layer in range(sizes.num_layers):
        yield from _plan_layer(sizes, quant, layer)


def _plan_layer(sizes: Preset, quant: str, layer: int) -> Iterator[TensorPlan]:
    d, e, f, h = sizes.d_model, sizes.num_experts, sizes.expert_width, sizes.head_dim
    n, k = sizes.num_heads * h, sizes.num_kv_heads * h
    branch = _BRANCH_STD / sizes.num_layers**0.5
    prefix = f"blk.{layer}"

    def matrix(name: str, shape: tuple[int, ...], scale: float = 1.0) -> TensorPlan:
        ggml_type = tensor_type(quant, name, layer, sizes.num_layers)
        return TensorPlan(f"{prefix}.{name}.weight", shape, ggml_type, scale / shape[-1] ** 0.5)

    yield matrix("attn_k", (k, d))
    yield _norm_plan(f"{prefix}.attn_k_norm", h, _QK_NORM)
    yield _norm_plan(f"{prefix}.attn_norm", d)
    yield matrix("attn_output", (d, n), branch)
    yield matrix("attn_q", (n, d))
    yield _norm_plan(f"{prefix}.attn_q_norm", h, _QK_NORM)
    yield matrix("attn_v", (k, d))
    yield matrix("ffn_down_exps", (e, d, f), branch)
    yield matrix("ffn_gate_exps", (e, f, d))
    yield TensorPlan(f"{prefix}.ffn_gate_inp.weight", (e, d), GGMLQuantizationType.F32, _ROUTER_STD / d**0.5)
    yield _norm_plan(f"{prefix}.ffn_norm", d)
    yield matrix("ffn_up_exps", (e, f, d))


def _norm_plan(name: str, length: int, mean: float = 1.0) -> TensorPlan:
    return TensorPlan(f"{name}.weight", (length,), GGMLQuantizationType.F32, 0.3 * mean, mean)


def tensor_type(quant: str, name: str, layer: int, num_layers: int) -> GGMLQuantizationType:
    """The type of a matrix; for Q4_K_M the mixture that llama.cpp's quantisation writes for qwen3moe."""
    if quant != "Q4_K_M":
        return GGMLQuantizationType[quant]
    eighth = num_layers // 8
    more_bits = layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
    if name == "output" or (name in ("attn_v", "ffn_down_exps") and more_bits):
        return GGMLQuantizationType.Q6_K
    return GGMLQuantizationType.Q4_K


# Blocks of the types that the gguf package cannot quantise


@dataclass(frozen=True)
class _Layout:
    """Byte offsets of a block's float16 `d` and `dmin`; `balance` is the dmin/d of a zero mean."""

    d: int
    dmin: int | None = None
    balance: float = 0.0


_LAYOUTS: Final = {
    GGMLQuantizationType.Q2_K: _Layout(80, 82, 1.5),
    GGMLQuantizationType.Q3_K: _Layout(108),
    GGMLQuantizationType.Q4_K: _Layout(0, 2, 7.5),
    GGMLQuantizationType.Q5_K: _Layout(0, 2, 15.5),
    GGMLQuantizationType.Q6_K: _Layout(208),
    GGMLQuantizationType.IQ4_NL: _Layout(0),
    GGMLQuantizationType.IQ4_XS: _Layout(0),
}


def random_blocks(rng: np.random.Generator, ggml_type: GGMLQuantizationType, std: Floats) -> Bytes:
    """One block per entry of `std`, its values' standard deviation, as [num_blocks, block_size] bytes."""
    if ggml_type == GGMLQuantizationType.MXFP4:
        return _random_mxfp4(rng, std)
    layout = _LAYOUTS.get(ggml_type)
    if layout is None:
        values = rng.standard_normal((len(std), GGML_QUANT_SIZES[ggml_type][0]), np.float32)
        return _bytes(quantize(values * std[:, None], ggml_type))
    blocks = _random_codes(rng, ggml_type, len(std))
    _set_scales(rng, ggml_type, blocks)
    _set_factors(blocks, layout, np.ones(len(std), np.float32))
    d = std / dequantize(blocks[:4096], ggml_type).std() * rng.uniform(0.9, 1.1, len(std))
    if ggml_type in (GGMLQuantizationType.IQ4_NL, GGMLQuantizationType.IQ4_XS):
        d *= rng.choice([-1, 1], len(std))  # the code table's own mean is not zero
    _set_factors(blocks, layout, d)
    return blocks


def _bytes(array: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array).view(np.uint8)


def _random_codes(rng: np.random.Generator, ggml_type: GGMLQuantizationType, num_blocks: int) -> Bytes:
    return rng.integers(0, 256, (num_blocks, GGML_QUANT_SIZES[ggml_type][1]), np.uint8)


def _set_factors(blocks: Bytes, layout: _Layout, d: npt.NDArray[np.floating[Any]]) -> None:
    halves = d.astype(np.float16)
    blocks[:, layout.d : layout.d + 2] = halves[:, None].view(np.uint8)
    if layout.dmin is not None:
        dmin = (halves * np.float16(layout.balance))[:, None]
        blocks[:, layout.dmin : layout.dmin + 2] = dmin.view(np.uint8)


def _set_scales(rng: np.random.Generator, ggml_type: GGMLQuantizationType, blocks: Bytes) -> None:
    """Scales that are random but never tiny, with mins near them where the type has mins."""
    if ggml_type == GGMLQuantizationType.Q2_K:
        scales = rng.integers(4, 15, (len(blocks), 16), np.uint8)
        mins = scales + rng.integers(0, 3, scales.shape, np.uint8) - 1
        blocks[:, :16] = scales | mins << 4
    if ggml_type in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K):
        scales = rng.integers(16, 60, (len(blocks), 8), np.uint8)
        mins = scales + rng.integers(0, 9, scales.shape, np.uint8) - 4
        blocks[:, 4:8] = scales[:, :4] | scales[:, 4:] >> 4 << 6
        blocks[:, 8:12] = mins[:, :4] | mins[:, 4:] >> 4 << 6
        blocks[:, 12:16] = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4


def _random_mxfp4(rng: np.random.Generator, std: Floats) -> Bytes:
    blocks = _random_codes(rng, GGMLQuantizationType.MXFP4, len(std))
    blocks[:, 0] = 127
    unit = dequantize(blocks[:4096], GGMLQuantizationType.MXFP4).std()
    exponents = np.log2(std / unit)
    floors = np.floor(exponents)
    # The scale is a power of two: take the one above just often enough to meet the variance.
    above = rng.random(len(std)) < (4.0 ** (exponents - floors) - 1) / 3
    blocks[:, 0] = 127 + floors + above
    return blocks


# Weights: one object gives each tensor's bytes


class _Counting:
    """Element k of the file is k; float32 holds every whole number up to 2**24."""

    def __init__(self) -> None:
        self.start = 0

    def pack(self, plan: TensorPlan) -> Bytes:
        numbers = np.arange(self.start, self.start + plan.num_blocks, dtype=np.float32)
        self.start += plan.num_blocks
        return _bytes(numbers)


class _Drawn:
    """Every weight is drawn, from a generator of the tensor's own; the output rows suit the vocabulary."""

    def __init__(self, seed: int, vocabulary: Vocabulary) -> None:
        self.seed = seed
        self.vocabulary = vocabulary

    def pack(self, plan: TensorPlan) -> Bytes:
        if plan.is_norm:
            return _draw_norm(self._rng(plan), plan)
        is_output = plan.name == _OUTPUT
        row_std = np.full(plan.num_rows, plan.spread, np.float32)
        if is_output:
            row_std *= _token_scales(self.vocabulary, planted=plan.ggml_type in _QUANTISABLE)
        if plan.ggml_type not in _QUANTISABLE:
            block_std = np.repeat(row_std, plan.num_blocks // plan.num_rows)
            return random_blocks(self._rng(plan), plan.ggml_type, block_std).reshape(-1)
        values = self._rng(plan).standard_normal((plan.num_rows, plan.shape[-1]), np.float32)
        values *= row_std[:, None]
        if is_output:
            self._plant_completions(values)
        return _bytes(quantize(values, plan.ggml_type)).reshape(-1)

    def _rng(self, plan: TensorPlan) -> np.random.Generator:
        return np.random.default_rng([self.seed, crc32(plan.name.encode())])

    def _plant_completions(self, output: Floats) -> None:
        """Make the second half of a split character follow the first, so that text stays UTF-8."""
        embedding = TensorPlan(_EMBEDDING, output.shape, GGMLQuantizationType.F32, _EMBED_STD)
        rows = self.pack(embedding).view(np.float32).reshape(output.shape)
        for first, last in self.vocabulary.completions:
            output[last] += _COMPLETION / output.shape[1] * rows[first]


class _Pools:
    """Big tensors read one pool of random blocks per (type, spread), each from an offset of its own.

    A pool's number of blocks is prime and larger than any tensor's number of rows: no two rows of a
    tensor are the same. The small tensors are drawn.
    """

    def __init__(self, seed: int, vocabulary: Vocabulary) -> None:
        self.seed = seed
        self.drawn = _Drawn(seed, vocabulary)
        self.pools: dict[tuple[GGMLQuantizationType, float], Bytes] = {}

    def pack(self, plan: TensorPlan) -> Bytes:
        if plan.size <= _DRAWN_SIZE:
            return self.drawn.pack(plan)
        key = (plan.ggml_type, plan.spread)
        if key not in self.pools:
            self.pools[key] = _make_pool(np.random.default_rng([self.seed, len(self.pools)]), *key)
        pool = self.pools[key]
        start = np.random.default_rng([self.seed, crc32(plan.name.encode())]).integers(len(pool))
        return _read_round(pool.reshape(-1), int(start) * pool.shape[1], plan.size)


def _draw_norm(rng: np.random.Generator, plan: TensorPlan) -> Bytes:
    low, high = plan.mean - plan.spread, plan.mean + plan.spread
    return _bytes(rng.uniform(low, high, plan.shape).astype(np.float32))


def _token_scales(vocabulary: Vocabulary, *, planted: bool) -> Floats:
    """Large for tokens that are readable text, small for the rest, so that greedy output is text."""
    scales = np.full(len(vocabulary.tokens), 0.3, np.float32)
    for i, (token, token_type) in enumerate(zip(vocabulary.tokens, vocabulary.token_types, strict=True)):
        if token_type == NORMAL and len(token) > 1 and is_text(token):
            scales[i] = 1.0
    if planted:
        scales[[first for first, _ in vocabulary.completions]] = 1.3
    return scales


def _make_pool(rng: np.random.Generator, ggml_type: GGMLQuantizationType, spread: float) -> Bytes:
    return random_blocks(rng, ggml_type, np.full(pool_length(ggml_type), spread, np.float32))


def pool_length(ggml_type: GGMLQuantizationType) -> int:
    """The number of blocks of a pool, a prime."""
    shortest = max(_POOL_SIZE // GGML_QUANT_SIZES[ggml_type][1], 300_000)
    return next(n for n in count(shortest) if _is_prime(n))


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, isqrt(number) + 1))


def _read_round(pool: Bytes, start: int, size: int) -> Bytes:
    """`size` bytes from `start` on, beginning again at the pool's end."""
    taken = np.empty(size, np.uint8)
    at = 0
    while at < size:
        piece = pool[start : start + size - at]
        taken[at : at + len(piece)] = piece
        at, start = at + len(piece), 0
    return taken


# The file


def _write_file(
    path: Path, keys: Mapping[str, Key], plans: Sequence[TensorPlan], pack: Callable[[TensorPlan], Bytes]
) -> None:
    """Stream the file to disk; it gets its name only when it is whole."""
    unfinished = path.with_name(path.name + ".part")
    writer = GGUFWriter(unfinished, _ARCH)
    for name, (value, value_type, item_type) in keys.items():
        writer.add_key_value(name, value, value_type, item_type)
    for plan in plans:
        writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), plan.size, plan.ggml_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for plan in tqdm(plans, unit="tensor", disable=None):
            writer.write_tensor_data(pack(plan))
        writer.close()
        unfinished.replace(path)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.synth_gguf", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("out", metavar="OUT.gguf", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--quant", choices=FILE_TYPES, default="F32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", metavar="FILE.gguf", type=Path, help="copy this file's tokenizer")
    options = parser.parse_args(arguments)
    try:
        write_synthetic(options.out, options.preset, options.quant, options.seed, options.vocab)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
