"""Loading: each weight at its place, exactly; each missing or misshapen tensor named."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as GGMLType
from jax import Array

from jaxmoe import weights
from jaxmoe.config import ModelConfig
from jaxmoe.gguf import GGUFError, GGUFFile, GGUFTensor, Value, read_gguf
from jaxmoe.layers import StackedWeight
from jaxmoe.model import Decoder
from jaxmoe.quants import Layout, QuantTensor, dequantise, device_size, empty, pack, packed_size
from jaxmoe.weights import device_weights_size, load_model
from tools.synth_gguf import write_synthetic

LAYOUTS: tuple[Layout, ...] = ("rows", "columns")

# the tiny network: D = F = 256, N x H = 256, K x H = 128, E = 8, V = 512, two layers
BLOCK: dict[str, tuple[int, ...]] = {
    "attn_k": (128, 256),
    "attn_k_norm": (64,),
    "attn_norm": (256,),
    "attn_output": (256, 256),
    "attn_q": (256, 256),
    "attn_q_norm": (64,),
    "attn_v": (128, 256),
    "ffn_down_exps": (8, 256, 256),
    "ffn_gate_exps": (8, 256, 256),
    "ffn_gate_inp": (8, 256),
    "ffn_norm": (256,),
    "ffn_up_exps": (8, 256, 256),
}


def load(file: GGUFFile, layout: Layout | None = None) -> Decoder:
    return load_model(file, ModelConfig.from_gguf(file), context_length=1024, layout=layout)


def counted(tied: bool) -> dict[str, np.ndarray]:
    """What a file of counting numbers has in it: element k is k, in file order."""
    shapes: dict[str, tuple[int, ...]] = {} if tied else {"output": (512, 256)}
    shapes |= {"output_norm": (256,), "token_embd": (512, 256)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()}
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    return {
        name: np.arange(end - np.prod(shape), end, dtype=np.float32).reshape(shape)
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }


def by_layer(weight: StackedWeight, num_layers: int = 2) -> list[np.ndarray]:
    """[..., outputs, inputs] of each layer, whatever the layout."""

    @jax.jit
    def pick(layer: Array) -> Array:
        return weight.apply(lambda stack, i: as_rows(stack.map(lambda a: a[i])), layer)

    return [np.asarray(pick(jnp.int32(i))) for i in range(num_layers)]


def as_rows(tensor: QuantTensor) -> Array:
    values = dequantise(tensor, jnp)
    return values if tensor.layout == "rows" else jnp.swapaxes(values, -1, -2)


def matrices(model: Decoder) -> dict[str, StackedWeight]:
    attention = {"q": model.attention.q, "k": model.attention.k, "v": model.attention.v}
    experts = {"gate": model.moe.gate, "up": model.moe.up, "down": model.moe.down}
    return {
        **{f"attn_{name}": weight for name, weight in attention.items()},
        **{f"ffn_{name}_exps": weight for name, weight in experts.items()},
        "attn_output": model.attention.output,
        "ffn_gate_inp": model.moe.router,
    }


def norms(model: Decoder) -> dict[str, np.ndarray]:
    modules = {
        "attn_norm": model.attn_norm, "ffn_norm": model.moe_norm,
        "attn_q_norm": model.attention.q_norm, "attn_k_norm": model.attention.k_norm,
    }  # fmt: skip
    return {name: np.asarray(module.weight[...]) for name, module in modules.items()}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def counting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GGUFFile, bool]:
    path = tmp_path_factory.mktemp("counting") / "counting.gguf"
    write_synthetic(path, "tiny", "F32", values="counting", tied=request.param)
    return read_gguf(path), request.param


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_counting_number_lies_at_its_place(counting: tuple[GGUFFile, bool], layout: Layout) -> None:
    file, tied = counting
    model, expected = load(file, layout), counted(tied)
    for name, weight in matrices(model).items():
        for i, values in enumerate(by_layer(weight)):
            np.testing.assert_array_equal(values, expected[f"blk.{i}.{name}"], err_msg=name)
    for name, stacked in norms(model).items():
        np.testing.assert_array_equal(stacked, [expected[f"blk.{i}.{name}"] for i in range(2)], err_msg=name)
    np.testing.assert_array_equal(model.final_norm[...], expected["output_norm"])
    np.testing.assert_array_equal(as_rows(model.embedding.weight.tensor), expected["token_embd"])
    assert (model.output is None) == tied
    if model.output is not None:
        np.testing.assert_array_equal(as_rows(model.output.tensor), expected["output"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_puts_the_input_axis_where_its_name_says(
    counting: tuple[GGUFFile, bool], layout: Layout
) -> None:
    (stack,) = load(counting[0], layout).moe.gate.stacks
    codes = np.asarray(stack.tensor.codes)
    start = counted(counting[1])["blk.1.ffn_gate_exps"][0, 0, 0]
    value = start + 5 * 256 * 256 + 3 * 256 + 2  # layer 1, expert 5, output 3, input 2
    assert codes[(1, 5, 3, 2) if layout == "rows" else (1, 5, 2, 3)] == value


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("swapped", [False, True])
def test_layers_of_different_types_are_each_exact(tiny_q4: Path, layout: Layout, swapped: bool) -> None:
    file = read_gguf(tiny_q4)
    if swapped:  # the wider type first
        tensors = dict(file.tensors)
        for name in BLOCK:
            first, second = (f"blk.{i}.{name}.weight" for i in range(2))
            tensors[first], tensors[second] = file.tensors[second], file.tensors[first]
        file = replace(file, tensors=tensors)
    model = load(file, layout)
    mixed = {name for name, weight in matrices(model).items() if len(weight.stacks) == 2}
    # rows: q, k and v are read by one kernel with one index
    with_v = {"attn_q", "attn_k"} if layout == "rows" else set()
    assert mixed == {"attn_v", "ffn_down_exps"} | with_v
    for name, weight in matrices(model).items():
        for i, values in enumerate(by_layer(weight)):
            expected = dequantised(file.tensors[f"blk.{i}.{name}.weight"])
            np.testing.assert_array_equal(values, expected, err_msg=f"{name} {i}")
    np.testing.assert_array_equal(
        as_rows(model.embedding.weight.tensor), dequantised(file.tensors["token_embd.weight"])
    )


@pytest.fixture(scope="module")
def mini_q4(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    """Four layers; attn_v and ffn_down_exps have two types, one pair of layers after the other."""
    path = tmp_path_factory.mktemp("mini") / "mini.gguf"
    write_synthetic(path, "mini", "Q4_K_M")
    return read_gguf(path)


def with_types(file: GGUFFile, role: str, order: tuple[int, ...]) -> GGUFFile:
    names = [f"blk.{i}.{role}.weight" for i in range(4)]
    moved = dict(zip(names, (file.tensors[names[i]] for i in order), strict=True))
    return replace(file, tensors={**file.tensors, **moved})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_whose_types_alternate_find_theirs(mini_q4: GGUFFile, layout: Layout) -> None:
    file = with_types(mini_q4, "attn_v", (2, 1, 3, 0))
    shuffled = [file.tensors[f"blk.{i}.attn_v.weight"] for i in range(4)]
    assert [tensor.ggml_type for tensor in shuffled] == [GGMLType.Q6_K, GGMLType.Q4_K] * 2
    for tensor, values in zip(shuffled, by_layer(load(file, layout).attention.v, 4), strict=True):
        np.testing.assert_array_equal(values, dequantised(tensor))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_one_launch_have_the_same_places(mini_q4: GGUFFile, layout: Layout) -> None:
    # types of v by layer: Q6_K, Q4_K, Q6_K, Q4_K; of k: two of the file's own, then two of v's
    file = with_types(mini_q4, "attn_v", (2, 1, 3, 0))
    tensors = dict(file.tensors)
    for i in (1, 2):
        name = f"blk.{i}.attn_k.weight"
        tensors[name] = replace(file.tensors["blk.0.attn_v.weight"], name=name)
    file = replace(file, tensors=tensors)
    kinds = {t.name: t.ggml_type for t in tensors.values()}
    q4, q6 = GGMLType.Q4_K, GGMLType.Q6_K
    k, v = ([tensors[f"blk.{i}.attn_{name}.weight"].ggml_type for i in range(4)] for name in "kv")
    assert (k, v) == ([q4, q6, q6, q4], [q6, q4, q6, q4])
    assert len({kinds[f"blk.{i}.attn_q.weight"] for i in range(4)}) == 1
    found = {name: weight.places for name, weight in matrices(load(file, layout)).items()}
    if layout == "columns":
        assert found["attn_q"] == ((0, 0), (0, 1), (0, 2), (0, 3))
        assert found["attn_k"] == ((0, 0), (1, 0), (1, 1), (0, 1))
        assert found["attn_v"] == ((1, 0), (0, 0), (1, 1), (0, 1))
    else:
        assert found["attn_q"] == found["attn_k"] == found["attn_v"] == ((1, 0), (2, 0), (3, 0), (0, 0))
        assert found["ffn_gate_exps"] == found["ffn_up_exps"]
        assert found["attn_output"] == ((0, 0), (0, 1), (0, 2), (0, 3))


# --- Packing on the device, in pieces.


@pytest.mark.parametrize("piece_size", [20_000, 300_000])
def test_pieces_of_any_size_fill_every_row(
    mini_q4: GGUFFile, monkeypatch: pytest.MonkeyPatch, piece_size: int
) -> None:
    monkeypatch.setattr(weights, "_PIECE_SIZE", piece_size)
    shares: list[float] = []
    config = ModelConfig.from_gguf(mini_q4)
    model = load_model(mini_q4, config, context_length=16, layout="rows", progress=shares.append)
    assert all(a < b for a, b in pairwise(shares))
    assert shares[-1] == pytest.approx(1)
    for name in ("attn_q", "attn_v", "ffn_gate_exps", "ffn_down_exps", "ffn_gate_inp"):
        for i, values in enumerate(by_layer(matrices(model)[name], 4)):
            expected = dequantised(mini_q4.tensors[f"blk.{i}.{name}.weight"])
            np.testing.assert_array_equal(values, expected, err_msg=f"{name} {i}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("piece_size", [20_000, 16 << 20])
def test_experts_of_codes_lie_swapped_where_kernels_read_them(
    mini_q4: GGUFFile, monkeypatch: pytest.MonkeyPatch, layout: Layout, piece_size: int
) -> None:
    monkeypatch.setattr(weights, "_PIECE_SIZE", piece_size)  # small ones begin at any row
    for name, weight in matrices(load(mini_q4, layout)).items():
        is_experts = name.endswith("_exps")
        for i, (which, index) in enumerate(weight.places):
            stack, tensor = weight.stacks[which].tensor, mini_q4.tensors[f"blk.{i}.{name}.weight"]
            plain = pack(tensor.ggml_type, tensor.data, tensor.shape, layout)
            assert stack.swapped == (is_experts and layout == "rows")
            expected, found = (np.asarray(a).view(np.uint8) for a in (plain.codes, stack.codes[index]))
            if stack.swapped:
                chunks = expected.reshape(-1, 8, expected.shape[-1] // 128, 8, 16)
                in_place = [chunks[:, r, :, [c ^ r for c in range(8)]] for r in range(8)]
                expected = np.stack(in_place).transpose(2, 0, 3, 1, 4).reshape(expected.shape)
            np.testing.assert_array_equal(found, expected, err_msg=f"{name} {i}")


def test_experts_of_floats_lie_plain(tmp_path: Path) -> None:
    for quant in ("F16", "F32"):
        write_synthetic(tmp_path / f"{quant}.gguf", "tiny", quant)
        model = load(read_gguf(tmp_path / f"{quant}.gguf"), "rows")
        assert not any(stack.tensor.swapped for w in matrices(model).values() for stack in w.stacks)


def test_pieces_are_equally_long_and_the_last_is_moved_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PIECE_SIZE", 40)
    rows = np.arange(100, dtype=np.uint8)
    tensor = GGUFTensor("x", (5, 2, 5), GGMLType.F16, rows, 100)  # 10 rows of 10 bytes: 3 pieces of 4 rows
    pieces = list(weights._pieces([tensor, tensor]))
    assert [(p.first_row, len(p.raw), p.new_size) for p in pieces] == [
        (0, 4, 40), (4, 4, 40), (6, 4, 20), (10, 4, 40), (14, 4, 40), (16, 4, 20)
    ]  # fmt: skip
    np.testing.assert_array_equal(pieces[2].raw.reshape(-1), rows[60:])


def test_only_a_few_pieces_are_under_way(tiny_gguf: Path) -> None:
    drawn = 0

    def pieces() -> Iterator[weights._Piece]:
        nonlocal drawn
        for drawn in range(1, 31):
            yield weights._Piece(np.full((2, 4), drawn, np.uint8), drawn, 8)

    with ThreadPoolExecutor(4) as threads:
        loader = weights._DeviceLoader("rows", threads, read_gguf(tiny_gguf).check_unchanged, lambda _: None)
        for i, (raw, piece) in enumerate(loader._uploaded(pieces())):
            assert drawn <= i + 1 + weights._MAX_THREADS
            assert piece.first_row == i + 1
            np.testing.assert_array_equal(raw, i + 1)
    assert i == 29


@pytest.mark.parametrize(
    ("ggml_type", "swapped"),
    [(GGMLType.Q4_K, False), (GGMLType.Q4_K, True), (GGMLType.Q6_K, True), (GGMLType.F32, False)],
)
def test_a_piece_is_packed_in_place(ggml_type: GGMLType, swapped: bool) -> None:
    shape = (3, 8, 64, 256)
    arrays = empty(ggml_type, shape, "rows", jax.ShapeDtypeStruct).arrays
    raw = jax.ShapeDtypeStruct((100, packed_size(ggml_type, (256,))), np.uint8)
    row = jax.ShapeDtypeStruct((), np.int32)
    memory = weights._store_rows.lower(ggml_type, swapped, arrays, raw, row).compile().memory_analysis()
    size = device_size(ggml_type, shape)
    assert memory.alias_size_in_bytes == size
    assert memory.output_size_in_bytes <= size + 64
    assert memory.temp_size_in_bytes <= 2 * raw.size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_was_cut_since_ends_the_loading(tmp_path: Path, layout: Layout) -> None:
    path = tmp_path / "tiny.gguf"
    write_synthetic(path, "tiny", "Q4_K_M")
    file = read_gguf(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(GGUFError, match="cut while it was open"):
        load(file, layout)


def dequantised(tensor: GGUFTensor) -> np.ndarray:
    by_row = tensor.data.reshape(*tensor.shape[:-1], -1)
    return gguf.quants.dequantize(by_row, tensor.ggml_type).reshape(tensor.shape)


def without(file: GGUFFile, name: str) -> GGUFFile:
    return replace(file, tensors={n: t for n, t in file.tensors.items() if n != name})


def changed(file: GGUFFile, name: str, **changes: object) -> GGUFFile:
    tensor = replace(file.tensors[name], **changes)  # type: ignore[arg-type]
    return replace(file, tensors={**file.tensors, name: tensor})


NEEDED = [
    "token_embd.weight",
    "output_norm.weight",
    *(f"blk.{i % 2}.{name}.weight" for i, name in enumerate(BLOCK)),
]


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_tensor_is_named(tiny_gguf: Path, name: str) -> None:
    with pytest.raises(GGUFError, match=f"no tensor '{re.escape(name)}'"):
        load(without(read_gguf(tiny_gguf), name))


@pytest.mark.parametrize("name", [*NEEDED, "output.weight"])
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tiny_gguf: Path, name: str) -> None:
    file = read_gguf(tiny_gguf)
    shape = file.tensors[name].shape
    wrong = (*shape[:-1], shape[-1] // 2)
    with pytest.raises(GGUFError) as caught:
        load(changed(file, name, shape=wrong))
    assert all(part in str(caught.value) for part in (f"'{name}'", str(shape), str(wrong)))


@pytest.mark.parametrize("name", ["blk.1.attn_k.weight", "output.weight"])
def test_a_transposed_tensor_is_refused(tiny_gguf: Path, name: str) -> None:
    file = read_gguf(tiny_gguf)
    with pytest.raises(GGUFError, match=f"'{re.escape(name)}' must have shape"):
        load(changed(file, name, shape=file.tensors[name].shape[::-1]))


def test_a_tensor_of_an_unknown_type_is_named_with_its_type(tiny_gguf: Path) -> None:
    file = changed(read_gguf(tiny_gguf), "blk.1.attn_v.weight", ggml_type=GGMLType.IQ1_S)
    with pytest.raises(GGUFError, match=r"'blk\.1\.attn_v\.weight'.*IQ1_S.*supported are"):
        load(file)
    with pytest.raises(GGUFError, match=r"'blk\.1\.attn_v\.weight'"):
        device_weights_size(file, ModelConfig.from_gguf(file))


@pytest.mark.parametrize("quant", ["F32", "Q4_K_M", "Q4_0"])
def test_the_size_on_the_device_is_known_before_loading(tmp_path: Path, quant: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_synthetic(path, "tiny", quant)
    file = read_gguf(path)
    model = load(file)
    tables = model.attention.cos[...].nbytes + model.attention.sin[...].nbytes
    held = sum(array.nbytes for array in jax.tree.leaves(nnx.state(model))) - tables
    assert device_weights_size(file, ModelConfig.from_gguf(file)) == held
    assert held <= 1.12 * sum(tensor.size for tensor in file.tensors.values())


def test_progress_grows_to_one(tiny_gguf: Path) -> None:
    shares: list[float] = []
    file = read_gguf(tiny_gguf)
    load_model(file, ModelConfig.from_gguf(file), context_length=16, progress=shares.append)
    assert all(a < b for a, b in pairwise(shares))
    assert 0 < shares[0] < 1
    assert shares[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope.freq_base", 1.0), ("rope.scaling.yarn_beta_fast", 0.0), ("rope.scaling.yarn_beta_slow", 0.0)],
)
def test_a_rope_that_would_divide_by_zero_is_refused_by_name(tmp_path: Path, key: str, value: float) -> None:
    keys: dict[str, Value] = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    keys |= {"rope.scaling.original_context_length": 256, key: value}
    path = tmp_path / "tiny.gguf"
    write_synthetic(path, "tiny", "F16", metadata={f"qwen3moe.{name}": given for name, given in keys.items()})
    with pytest.raises(GGUFError, match=re.escape(key)):
        load(read_gguf(path))
