"""`jaxmoe inspect MODEL`: what a GGUF file is, and what of it fits into memory; only its header is read."""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from jaxmoe.chat import ChatTemplate
from jaxmoe.config import CACHE_DTYPES, EngineConfig, ModelConfig, read_architecture
from jaxmoe.display import parse_size, printable, size_text
from jaxmoe.gguf import GGUFFile, read_gguf
from jaxmoe.llm import read_sampling_defaults
from jaxmoe.quants import device_size
from jaxmoe.tokenizer import Tokenizer

# What XLA takes of a GPU's memory where XLA_PYTHON_CLIENT_MEM_FRACTION says nothing else.
_MEMORY_FRACTION: Final = "0.75"


class Room(NamedTuple):
    """What a device of `memory_size` usable bytes holds of a model beside its weights.

    `context_length` is the longest request's, `cache_length` that of all together, both in tokens and 0
    where the model does not fit, for the reason `why_not`; `kernels` says whether CUDA kernels run it there.
    """

    device: str
    memory_size: int
    kernels: bool
    context_length: int
    cache_length: int
    cache_dtype: str | None
    why_not: str | None


def main(arguments: list[str], prog: str = "jaxmoe inspect") -> int:
    """Print what is known of a file; returns the exit status."""
    asked = _parser(prog).parse_args(arguments)
    file = read_gguf(asked.model)
    found = describe(file, asked.memory)
    print(json.dumps(found, indent=2) if asked.json else "\n".join(_lines(found)))
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Say what a GGUF file is and what it needs.")
    parser.add_argument("model", metavar="MODEL.gguf", help="a GGUF file; of a split one the first part")
    memory_help = "as if there were a GPU with so much memory, such as 80GiB"
    parser.add_argument("--memory", type=parse_size, metavar="SIZE", help=memory_help)
    parser.add_argument("--json", action="store_true", help="the same as JSON; sizes in bytes")
    return parser


def describe(file: GGUFFile, gpu_memory_size: int | None = None) -> dict[str, Any]:
    """What `jaxmoe inspect --json` prints; lengths in tokens, sizes in bytes.

    The device is the one of this machine, or a GPU of `gpu_memory_size` bytes. Raises GGUFError for a file
    that cannot be served.
    """
    config = ModelConfig.from_gguf(file)
    ChatTemplate.from_gguf(file, Tokenizer.from_gguf(file))  # raises what serving would raise
    sampling = dict(read_sampling_defaults(file))
    # Only what follows needs JAX, which takes seconds to import; a look must not take the GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from jaxmoe.cache import KVCache
    from jaxmoe.step import unfit_for_kernels
    from jaxmoe.weights import device_weights_size

    weights_size = device_weights_size(file, config)
    return {
        "path": str(file.path),
        "num_parts": len(file.parts),
        "file_size": sum(len(part.mapping) for part in file.parts),
        "name": config.name,
        "architecture": read_architecture(file),
        "shape": _shape(config),
        "context_length": config.context_length,
        "chat_template": file.get_str("tokenizer.chat_template", default=None) is not None,
        "sampling_defaults": sampling,
        "tensors": list(_tensor_classes(file)),
        "device_weights_size": weights_size,
        "cache_size_a_token": {dtype: KVCache.page_size(config, 1, dtype) for dtype in CACHE_DTYPES},
        "unfit_for_kernels": unfit_for_kernels(config, None),
        "room": _room(config, weights_size, gpu_memory_size)._asdict(),
    }


def _shape(config: ModelConfig) -> dict[str, int]:
    letters = {
        "L": "num_layers",
        "D": "d_model",
        "N": "num_heads",
        "K": "num_kv_heads",
        "H": "head_dim",
        "E": "num_experts",
        "A": "experts_per_token",
        "F": "expert_width",
        "V": "vocab_size",
    }
    numbers = asdict(config)
    return {letter: numbers[name] for letter, name in letters.items()}


def _tensor_classes(file: GGUFFile) -> Iterator[dict[str, Any]]:
    """For each class of tensors and each of its types, in the file's order: how many, and their bytes."""
    groups: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for tensor in file.tensors.values():
        # the last word but one names the class: what is before it counts the layer
        key = tensor.name.split(".")[-2], tensor.ggml_type.name
        groups[key].append((tensor.size, device_size(tensor.ggml_type, tensor.shape)))
    for (name, kind), sizes in groups.items():
        yield {
            "class": name,
            "type": kind,
            "num_tensors": len(sizes),
            "file_size": sum(size for size, _ in sizes),
            "device_size": sum(size for _, size in sizes),
        }


def _room(config: ModelConfig, weights_size: int, gpu_memory_size: int | None) -> Room:
    import jax

    from jaxmoe.engine import device_memory_size, plan_shapes
    from jaxmoe.step import unfit_for_kernels, why_without_kernels

    if gpu_memory_size is None:
        on_cpu, device = jax.default_backend() == "cpu", jax.devices()[0].device_kind
        memory_size, without_kernels = device_memory_size(), why_without_kernels(config, None)
    else:
        on_cpu, device = False, f"a GPU of {size_text(gpu_memory_size)}"
        fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _MEMORY_FRACTION))
        memory_size, without_kernels = int(gpu_memory_size * fraction), unfit_for_kernels(config, None)
    kernels = without_kernels is None
    try:
        shapes = plan_shapes(
            config,
            EngineConfig(),
            weights_size=weights_size,
            memory_size=memory_size,
            on_cpu=on_cpu,
            kernels=kernels,
        )
    except ValueError as error:
        return Room(device, memory_size, kernels, 0, 0, None, str(error))
    cache_length = shapes.num_pages * shapes.page_length
    return Room(device, memory_size, kernels, shapes.context_length, cache_length, shapes.cache_dtype, None)


# --- For people.


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield printable(found["name"])
    for title, text in _rows(found):
        first, *rest = text.splitlines() or [""]
        yield f"  {title:12}  {first}"
        yield from (f"  {'':12}  {line}" for line in rest)


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    shape, cache = found["shape"], found["cache_size_a_token"]
    parts = f" in {found['num_parts']} parts" if found["num_parts"] > 1 else ""
    yield "file", f"{printable(found['path'])}, {size_text(found['file_size'])}{parts}"
    yield "architecture", _shape_text(found["architecture"], shape)
    yield "context", f"{found['context_length']:,} tokens"
    yield (
        "vocabulary",
        f"{shape['V']:,} tokens (V), chat template: {'yes' if found['chat_template'] else 'no'}",
    )
    sampling = ", ".join(f"{name} {value:g}" for name, value in found["sampling_defaults"].items())
    yield "sampling", sampling or "the file recommends nothing"
    yield "tensors", "\n".join(_tensor_lines(found["tensors"]))
    yield "weights", f"{size_text(found['device_weights_size'])} on the device"
    yield "KV cache", ", ".join(f"{size:,} bytes a token in {dtype}" for dtype, size in cache.items())
    why_not = found["unfit_for_kernels"]
    yield "CUDA kernels", "can run it" if why_not is None else f"cannot run it: {why_not}"
    yield "room", _room_text(Room(**found["room"]))


def _shape_text(architecture: str, shape: dict[str, int]) -> str:
    return (
        f"{architecture}: {shape['L']} layers (L) of width {shape['D']} (D),\n"
        f"{shape['N']} query heads (N) and {shape['K']} kv heads (K) of {shape['H']} (H),\n"
        f"{shape['E']} experts (E) of width {shape['F']} (F), {shape['A']} a token (A)"
    )


def _tensor_lines(classes: list[dict[str, Any]]) -> Iterator[str]:
    width = max((len(one["class"]) for one in classes), default=0)
    for one in classes:
        size = size_text(one["file_size"])
        yield f"{one['class']:{width}}  {one['type']:7} x {one['num_tensors']:<4} {size:>10}"


def _room_text(room: Room) -> str:
    path = "CUDA kernels" if room.kernels else "XLA"
    device = f"{room.device}, {size_text(room.memory_size)} usable, by {path}"
    if room.why_not is not None:
        return f"{device}: it does not fit:\n{room.why_not}"
    return (
        f"{device}: a context of {room.context_length:,} tokens,\n"
        f"{room.cache_length:,} tokens of {room.cache_dtype} cache in all requests together"
    )
