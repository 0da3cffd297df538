"""From a GGUF file to a Decoder: the one table of tensor names, and the copy onto the device."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from tqdm import tqdm

from jaxmoe.attention import Attention, rope_tables
from jaxmoe.config import ModelConfig
from jaxmoe.gguf import GGUFError, GGUFFile, GGUFTensor
from jaxmoe.layers import StackedWeight
from jaxmoe.model import Decoder, Embedding
from jaxmoe.moe import MoE
from jaxmoe.quants import Layout, QuantTensor, block_format, dequantise, device_size, empty, pack, pack_into

Progress = Callable[[float], None]

# 8 threads repack 1 GB/s on a machine of 16 cores, 16 threads half of that: they wait for the interpreter
_MAX_THREADS = 8

# role -> (tensor name after "blk.N.", shape by ModelConfig's letters)
_MATRICES = {
    "q": ("attn_q.weight", "ND"),
    "k": ("attn_k.weight", "KD"),
    "v": ("attn_v.weight", "KD"),
    "output": ("attn_output.weight", "DN"),
    "router": ("ffn_gate_inp.weight", "ED"),
    "gate": ("ffn_gate_exps.weight", "EFD"),
    "up": ("ffn_up_exps.weight", "EFD"),
    "down": ("ffn_down_exps.weight", "EDF"),
}
_NORMS = {
    "attn": ("attn_norm.weight", "D"),
    "moe": ("ffn_norm.weight", "D"),
    "q_norm": ("attn_q_norm.weight", "H"),
    "k_norm": ("attn_k_norm.weight", "H"),
}
_EMBEDDING, _OUTPUT, _FINAL_NORM = "token_embd.weight", "output.weight", "output_norm.weight"


def default_layout() -> Layout:
    """Input axis contiguous for a GPU's kernels, transposed for XLA on a CPU."""
    return "columns" if jax.default_backend() == "cpu" else "rows"


class _Tensors:
    """The tensors of one file, looked up by role and checked."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.file = file
        self.num_layers = config.num_layers
        # axis lengths by letter; N and K are heads times H, as the matrices have them
        self.lengths = {
            "N": config.num_heads * config.head_dim,
            "K": config.num_kv_heads * config.head_dim,
            "D": config.d_model,
            "H": config.head_dim,
            "E": config.num_experts,
            "F": config.expert_width,
            "V": config.vocab_size,
        }

    def get(self, name: str, letters: str) -> GGUFTensor:
        """The tensor, its shape and type checked; GGUFError names what is wrong."""
        if name not in self.file.tensors:
            raise GGUFError(self.file.path, None, f"the GGUF file has no tensor '{name}'")
        tensor = self.file.tensors[name]
        expected = tuple(self.lengths[letter] for letter in letters)
        if tensor.shape != expected:
            what = f"tensor '{name}' must have shape {expected} ({letters}), got {tensor.shape}"
            raise GGUFError(self.file.path, None, what)
        try:
            block_format(tensor.ggml_type)
        except ValueError as error:
            raise GGUFError(self.file.path, None, f"tensor '{name}': {error}") from None
        return tensor

    def layers(self, role: str) -> list[GGUFTensor]:
        """The tensor of every layer."""
        name, letters = (_MATRICES | _NORMS)[role]
        return [self.get(f"blk.{i}.{name}", letters) for i in range(self.num_layers)]

    def output(self) -> GGUFTensor | None:
        """The output matrix; None where the embedding serves as it."""
        return self.get(_OUTPUT, "VD") if _OUTPUT in self.file.tensors else None

    def all(self) -> list[GGUFTensor]:
        """Every tensor that the network reads; GGUFError names one of the file that it would not."""
        single = [self.get(_EMBEDDING, "VD"), self.get(_FINAL_NORM, "D"), self.output()]
        by_layer = [self.layers(role) for role in (*_MATRICES, *_NORMS)]
        read = [tensor for tensor in (*single, *chain(*by_layer)) if tensor is not None]
        unread = self.file.tensors.keys() - {tensor.name for tensor in read}
        if unread:
            what = f"tensor '{min(unread)}' is none that this network knows: it cannot be left out"
            raise GGUFError(self.file.path, None, what)
        return read


def device_weights_size(file: GGUFFile, config: ModelConfig) -> int:
    """Bytes that the file's tensors take on the device; GGUFError if one is missing or misshapen."""
    return sum(device_size(t.ggml_type, t.shape) for t in _Tensors(file, config).all())


def load_model(
    file: GGUFFile,
    config: ModelConfig,
    *,
    context_length: int,
    layout: Layout | None = None,
    progress: Progress = lambda _: None,
    show_bar: bool = False,
) -> Decoder:
    """Build the Decoder, tensor by tensor; `progress` gets the share of bytes loaded, 0..1.

    Host memory beyond the page cache stays near the largest tensor of one layer. Raises GGUFError for a
    missing or misshapen tensor, naming it.
    """
    tensors = _Tensors(file, config)
    total = sum(tensor.size for tensor in tensors.all())
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not show_bar) as bar,
        ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads,
    ):
        loaded = 0

        def advance(size: int) -> None:
            nonlocal loaded
            loaded += size
            bar.update(size)
            progress(loaded / total)

        loader = _Loader(layout or default_layout(), threads, file.check_unchanged, advance)
        return _decoder(tensors, config, loader, context_length)


def _decoder(tensors: _Tensors, config: ModelConfig, loader: _Loader, context_length: int) -> Decoder:
    matrices = {role: loader.stacked(tensors.layers(role)) for role in _MATRICES}
    norms = {role: loader.numbers(tensors.layers(role)) for role in _NORMS}
    cos, sin = map(jnp.asarray, rope_tables(config, context_length))
    output = tensors.output()
    # an untied embedding is only looked up row by row
    embedding_layout: Layout = loader.layout if output is None else "rows"
    return Decoder(
        config,
        embedding=Embedding(loader.single(tensors.get(_EMBEDDING, "VD"), embedding_layout)),
        attention=Attention(config, matrices | norms, cos, sin),
        moe=MoE(config, matrices),
        norms=norms | {"final": loader.numbers([tensors.get(_FINAL_NORM, "D")])[0]},
        output=None if output is None else loader.single(output, loader.layout),
    )


@dataclass(frozen=True)
class _Loader:
    """Repacks tensors on the host and moves them onto the device."""

    layout: Layout
    threads: ThreadPoolExecutor
    check_unchanged: Callable[[], None]
    advance: Callable[[int], None]

    def repack(self, tensor: GGUFTensor, out: QuantTensor) -> None:
        """Write the tensor into the host arrays of `out`."""
        self.check_unchanged()
        *lead, num_rows, _ = tensor.shape
        pieces = prod(lead) if lead else -(-num_rows // _ROWS_A_TASK)
        list(self.threads.map(partial(_pack_piece, out, tensor), range(pieces)))
        self.advance(tensor.size)

    def single(self, tensor: GGUFTensor, layout: Layout) -> QuantTensor:
        """One tensor on the device."""
        host = empty(tensor.ggml_type, tensor.shape, layout)
        self.repack(tensor, host)
        return host.map(jnp.asarray)

    def stacked(self, tensors: list[GGUFTensor]) -> StackedWeight:
        """A weight of all layers, stacked per ggml type."""
        types = sorted({tensor.ggml_type for tensor in tensors})
        members = {kind: [t for t in tensors if t.ggml_type == kind] for kind in types}
        stacks = [self._stack(members[kind]) for kind in types]
        places = [(types.index(t.ggml_type), members[t.ggml_type].index(t)) for t in tensors]
        return StackedWeight(stacks, places)

    def _stack(self, tensors: list[GGUFTensor]) -> QuantTensor:
        # one layer's host arrays, used for every layer: the copy must be done before the next repack
        host = empty(tensors[0].ggml_type, tensors[0].shape, self.layout)
        stack = host.map(lambda a: jnp.zeros((len(tensors), *a.shape), a.dtype))
        for i, tensor in enumerate(tensors):
            self.repack(tensor, host)
            arrays = {
                name: _store(array, host.arrays[name], np.int32(i)) for name, array in stack.arrays.items()
            }
            stack = replace(stack, **jax.block_until_ready(arrays))
        return stack

    def numbers(self, tensors: list[GGUFTensor]) -> Array:
        """Small vectors of all layers, dequantised, [L, width] float32."""
        packed = [pack(t.ggml_type, t.data, (1, *t.shape), "rows") for t in tensors]
        self.advance(sum(tensor.size for tensor in tensors))
        return jnp.concatenate([jnp.asarray(dequantise(tensor)) for tensor in packed])


_ROWS_A_TASK = 1024


def _pack_piece(out: QuantTensor, tensor: GGUFTensor, i: int) -> None:
    """Repack expert `i`, or the i-th run of rows where the tensor is one matrix."""
    *lead, num_rows, num_inputs = tensor.shape
    if lead:
        size = tensor.size // prod(lead)
        index = tuple(int(n) for n in np.unravel_index(i, lead))
        raw = tensor.data[i * size : (i + 1) * size]
        pack_into(out, index, tensor.ggml_type, raw, (num_rows, num_inputs))
        return
    first = i * _ROWS_A_TASK
    count = min(_ROWS_A_TASK, num_rows - first)
    row_size = tensor.size // num_rows
    raw = tensor.data[first * row_size : (first + count) * row_size]
    pack_into(out, (), tensor.ggml_type, raw, (count, num_inputs), first_row=first)


@partial(jax.jit, donate_argnums=0)
def _store(stack: Array, layer: Array, index: Array) -> Array:
    return lax.dynamic_update_index_in_dim(stack, layer, index, 0)
