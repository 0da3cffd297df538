"""From a GGUF file to a Decoder: the one table of tensor names, and the copy onto the device."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from jax import Array, lax

from jaxmoe.attention import Attention, rope_tables
from jaxmoe.config import ModelConfig
from jaxmoe.gguf import GGUFError, GGUFFile, GGUFTensor
from jaxmoe.kernels.packed import reads_swapped
from jaxmoe.layers import StackedWeight
from jaxmoe.model import Decoder, Embedding
from jaxmoe.moe import MoE
from jaxmoe.quants import (
    Layout,
    QuantTensor,
    block_format,
    dequantise,
    device_size,
    empty,
    pack,
    pack_into,
    read_rows,
    swap_chunks,
)

Progress = Callable[[float], None]

# 8 threads repack 1 GB/s on a machine of 16 cores, 16 threads half of that: they wait for the interpreter.
# As many copy pieces of the file to a GPU, one in each: what the host holds beside the mapped file, and the
# device beside the weights, stays near 8 pieces.
_MAX_THREADS = 8
_PIECE_SIZE = 16 << 20

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

# Roles that one kernel reads with one index: their layers are stacked by the types of all of them together.
# XLA's plain path reads each alone.
_LAUNCHES: dict[Layout, tuple[tuple[str, ...], ...]] = {
    "rows": (("q", "k", "v"), ("output",), ("router",), ("gate", "up"), ("down",)),
    "columns": tuple((role,) for role in _MATRICES),
}


def default_layout() -> Layout:
    """Input axis contiguous for a GPU's kernels, transposed for XLA on a CPU."""
    return "columns" if jax.default_backend() == "cpu" else "rows"


class _Tensors:
    """The tensors of one file by role, each looked up and checked once; GGUFError names what is wrong."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._file = file
        self._config = config
        self.embedding = self._get(_EMBEDDING, "VD")
        self.final_norm = self._get(_FINAL_NORM, "D")
        # None where the embedding serves as it
        self.output = self._get(_OUTPUT, "VD") if _OUTPUT in file.tensors else None
        self.layers = {
            role: [self._get(f"blk.{i}.{name}", letters) for i in range(config.num_layers)]
            for role, (name, letters) in (_MATRICES | _NORMS).items()
        }
        self._check_all_are_read()

    def __iter__(self) -> Iterator[GGUFTensor]:
        yield from (self.embedding, self.final_norm, *([] if self.output is None else [self.output]))
        yield from chain(*self.layers.values())

    def _get(self, name: str, letters: str) -> GGUFTensor:
        if name not in self._file.tensors:
            raise GGUFError(self._file.path, None, f"the GGUF file has no tensor '{name}'")
        tensor = self._file.tensors[name]
        expected = self._config.weight_shape(letters)
        if tensor.shape != expected:
            what = f"tensor '{name}' must have shape {expected} ({letters}), got {tensor.shape}"
            raise GGUFError(self._file.path, None, what)
        try:
            block_format(tensor.ggml_type)
        except ValueError as error:
            raise GGUFError(self._file.path, None, f"tensor '{name}': {error}") from None
        return tensor

    def _check_all_are_read(self) -> None:
        unread = self._file.tensors.keys() - {tensor.name for tensor in self}
        if unread:
            what = f"tensor '{min(unread)}' is none that this network knows: it cannot be left out"
            raise GGUFError(self._file.path, None, what)


def device_weights_size(file: GGUFFile, config: ModelConfig) -> int:
    """Bytes that the file's tensors take on the device; GGUFError if one is missing or misshapen."""
    return sum(device_size(t.ggml_type, t.shape) for t in _Tensors(file, config))


def load_model(
    file: GGUFFile,
    config: ModelConfig,
    *,
    context_length: int,
    layout: Layout | None = None,
    progress: Progress = lambda _: None,
) -> Decoder:
    """Build the Decoder, tensor by tensor; `progress` gets the share of bytes loaded, 0..1.

    Layout "columns" is packed on the host, "rows" on the device and, of experts, `swapped` for the kernels.
    Host memory beyond the page cache stays near the largest tensor of one layer. Raises GGUFError for a
    missing or misshapen tensor, naming it.
    """
    tensors = _Tensors(file, config)
    total = sum(tensor.size for tensor in tensors)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        loaded = 0

        def advance(size: int) -> None:
            nonlocal loaded
            loaded += size
            progress(loaded / total)

        chosen = layout or default_layout()
        loader = _LOADERS[chosen](chosen, threads, file.check_unchanged, advance)
        return _decoder(tensors, config, loader, context_length)


def _decoder(tensors: _Tensors, config: ModelConfig, loader: _Loader, context_length: int) -> Decoder:
    matrices: dict[str, StackedWeight] = {}
    for roles in _LAUNCHES[loader.layout]:
        matrices |= _stacked({role: tensors.layers[role] for role in roles}, loader.stack)
    norms = {role: loader.numbers(tensors.layers[role]) for role in _NORMS}
    cos, sin = map(jnp.asarray, rope_tables(config, context_length))
    output = tensors.output
    # an untied embedding is only looked up row by row
    embedding_layout: Layout = loader.layout if output is None else "rows"
    return Decoder(
        config,
        embedding=Embedding(loader.single(tensors.embedding, embedding_layout)),
        attention=Attention(config, matrices | norms, cos, sin),
        moe=MoE(config, matrices),
        norms=norms | {"final": loader.numbers([tensors.final_norm])[0]},
        output=None if output is None else loader.single(output, loader.layout),
    )


def _stacked(
    launch: dict[str, list[GGUFTensor]], stack: Callable[[list[GGUFTensor]], QuantTensor]
) -> dict[str, StackedWeight]:
    """The weights of a launch by role, all with the same places: one stack for each combination of types."""
    types = [tuple(t.ggml_type for t in layer) for layer in zip(*launch.values(), strict=True)]
    members = {kind: [i for i, found in enumerate(types) if found == kind] for kind in sorted(set(types))}
    which = {kind: i for i, kind in enumerate(members)}
    places = [(which[kind], members[kind].index(i)) for i, kind in enumerate(types)]
    return {
        role: StackedWeight([stack([tensors[i] for i in layers]) for layers in members.values()], places)
        for role, tensors in launch.items()
    }


@dataclass(frozen=True)
class _Loader(ABC):
    """Moves tensors onto the device, packed in `layout`."""

    layout: Layout
    threads: ThreadPoolExecutor
    check_unchanged: Callable[[], None]
    advance: Callable[[int], None]

    @abstractmethod
    def single(self, tensor: GGUFTensor, layout: Layout) -> QuantTensor:
        """One tensor on the device."""

    @abstractmethod
    def stack(self, tensors: list[GGUFTensor]) -> QuantTensor:
        """Tensors of one type and shape on the device, [len(tensors), ...]."""

    def numbers(self, tensors: list[GGUFTensor]) -> Array:
        """Small vectors of all layers, dequantised, [L, width] float32."""
        packed = [pack(t.ggml_type, t.data, (1, *t.shape), "rows") for t in tensors]
        self.advance(sum(tensor.size for tensor in tensors))
        return jnp.asarray(np.concatenate([dequantise(tensor) for tensor in packed]))


# --- Packed on the host, by numpy, which also transposes: for layout "columns".


class _HostLoader(_Loader):
    def single(self, tensor: GGUFTensor, layout: Layout) -> QuantTensor:
        host = empty(tensor.ggml_type, tensor.shape, layout)
        self._repack(tensor, host)
        return host.map(jnp.asarray)

    def stack(self, tensors: list[GGUFTensor]) -> QuantTensor:
        # one layer's host arrays, used for every layer: the copy must be done before the next repack
        host = empty(tensors[0].ggml_type, tensors[0].shape, self.layout)
        stack = host.map(lambda a: jnp.zeros((len(tensors), *a.shape), a.dtype))
        for i, tensor in enumerate(tensors):
            self._repack(tensor, host)
            arrays = {
                name: _store(array, host.arrays[name], np.int32(i)) for name, array in stack.arrays.items()
            }
            stack = replace(stack, **jax.block_until_ready(arrays))
        return stack

    def _repack(self, tensor: GGUFTensor, out: QuantTensor) -> None:
        self.check_unchanged()
        *lead, num_rows, _ = tensor.shape
        pieces = prod(lead) if lead else -(-num_rows // _ROWS_A_TASK)
        list(self.threads.map(partial(_pack_piece, out, tensor), range(pieces)))
        self.advance(tensor.size)


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


# --- Packed on the device, for layout "rows": the file's bytes go up as they are.


@dataclass(frozen=True)
class _Piece:
    """Packed rows [rows, bytes], their place among a stack's rows, and how many bytes no piece had before."""

    raw: np.ndarray
    first_row: int
    new_size: int


class _DeviceLoader(_Loader):
    def single(self, tensor: GGUFTensor, layout: Layout) -> QuantTensor:
        return self._filled(tensor.shape, [tensor])

    def stack(self, tensors: list[GGUFTensor]) -> QuantTensor:
        return self._filled((len(tensors), *tensors[0].shape), tensors)

    def _filled(self, shape: tuple[int, ...], tensors: Sequence[GGUFTensor]) -> QuantTensor:
        ggml_type = tensors[0].ggml_type
        outline = empty(ggml_type, shape, "rows", jax.ShapeDtypeStruct)
        swapped = reads_swapped(outline)
        arrays = _zeros(ggml_type, shape)
        for raw, piece in self._uploaded(_pieces(tensors)):
            arrays = _store_rows(ggml_type, swapped, arrays, raw, np.int32(piece.first_row))
            self.advance(piece.new_size)
        return replace(outline, swapped=swapped, **jax.block_until_ready(arrays))

    def _uploaded(self, pieces: Iterable[_Piece]) -> Iterator[tuple[Array, _Piece]]:
        """Each piece on the device, in order, _MAX_THREADS under way at most."""
        waiting: deque[tuple[Future[Array], _Piece]] = deque()
        for piece in pieces:
            if len(waiting) == _MAX_THREADS:
                future, first = waiting.popleft()
                yield future.result(), first
            waiting.append((self.threads.submit(self._upload, piece.raw), piece))
        for future, piece in waiting:
            yield future.result(), piece

    def _upload(self, raw: np.ndarray) -> Array:
        self.check_unchanged()
        # on a CPU this may be the mapped file itself: it is read, and never donated
        return jax.block_until_ready(jax.device_put(raw))


def _pieces(tensors: Sequence[GGUFTensor]) -> Iterator[_Piece]:
    """The rows of all tensors, one after the other; all pieces are equally long, so that one program serves.

    The last piece of a tensor is moved back so that it fits: it repeats rows of the one before.
    """
    num_rows = prod(tensors[0].shape[:-1])
    count = -(-num_rows // -(-tensors[0].size // _PIECE_SIZE))
    for i, tensor in enumerate(tensors):
        raw = tensor.data.reshape(num_rows, -1)
        for start in range(0, num_rows, count):
            first = min(start, num_rows - count)
            new_size = min(count, num_rows - start) * raw.shape[1]
            yield _Piece(raw[first : first + count], i * num_rows + first, new_size)


@partial(jax.jit, static_argnums=(0, 1))
def _zeros(ggml_type: GGMLType, shape: tuple[int, ...]) -> dict[str, Array]:
    return empty(ggml_type, shape, "rows", jnp.zeros).arrays


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _store_rows(
    ggml_type: GGMLType, swapped: bool, arrays: dict[str, Array], raw: Array, first_row: Array
) -> dict[str, Array]:
    """Packed rows [rows, bytes] in their place of a stack's arrays [..., N, K], in place."""
    rows = read_rows(ggml_type, raw, jnp)
    if swapped:  # matrices have a multiple of 8 rows
        rows["codes"] = swap_chunks(rows["codes"], first_row, jnp)
    return {name: _store_flat(array, rows[name], first_row) for name, array in arrays.items()}


def _store_flat(array: Array, rows: Array, first_row: Array) -> Array:
    flat = array.reshape(-1, array.shape[-1])
    return lax.dynamic_update_slice(flat, rows, (first_row, jnp.int32(0))).reshape(array.shape)


_LOADERS: dict[Layout, type[_HostLoader | _DeviceLoader]] = {"columns": _HostLoader, "rows": _DeviceLoader}
