"""Synthetic files: sound to the gguf package, well scaled, every tensor its own."""

from __future__ import annotations

import hashlib
from collections import Counter
from math import gcd, prod
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as T
from gguf.quants import dequantize

from jaxmoe.gguf import GGUFError, GGUFFile, GGUFTensor, read_gguf
from tools import synth_gguf
from tools.synth_gguf import (
    FILE_TYPES,
    PRESETS,
    TensorPlan,
    main,
    plan_tensors,
    pool_length,
    random_blocks,
    write_synthetic,
)
from tools.synth_vocab import make_vocabulary

NAMES_IN_A_LAYER = (
    *("attn_k", "attn_k_norm", "attn_norm", "attn_output", "attn_q", "attn_q_norm", "attn_v"),
    *("ffn_down_exps", "ffn_gate_exps", "ffn_gate_inp", "ffn_norm", "ffn_up_exps"),
)


def values(tensor: GGUFTensor) -> np.ndarray:
    rows = tensor.data.reshape(*tensor.shape[:-1], -1) if len(tensor.shape) > 1 else tensor.data
    return dequantize(rows, tensor.ggml_type).astype(np.float32).reshape(tensor.shape)


def rows_are_distinct(tensor: GGUFTensor) -> bool:
    rows = tensor.data.reshape(prod(tensor.shape[:-1]), -1)
    return len({row.tobytes() for row in rows}) == len(rows)


def plans(preset: str, quant: str) -> dict[str, TensorPlan]:
    sizes = PRESETS[preset]
    planned = plan_tensors(sizes, quant, vocab_size=sizes.vocab_size, tied=False)
    return {plan.name: plan for plan in planned}


@pytest.fixture(scope="module", params=FILE_TYPES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, GGUFFile]:
    path = tmp_path_factory.mktemp("synth") / "tiny.gguf"
    write_synthetic(path, "tiny", request.param)
    oracle = GGUFReader(path)
    file = read_gguf(path)
    assert [t.name for t in oracle.tensors] == list(file.tensors)
    return request.param, file


def test_every_type_is_well_scaled(tiny: tuple[str, GGUFFile]) -> None:
    quant, file = tiny
    for name, plan in plans("tiny", quant).items():
        found = values(file.tensors[name])
        assert np.isfinite(found).all()
        if plan.is_norm:
            assert plan.mean * 0.7 <= found.min() < found.max() <= plan.mean * 1.3, name
        elif name != "output.weight":
            assert found.std() == pytest.approx(plan.spread, rel=0.2), name
            assert abs(found.mean()) < 0.05 * plan.spread, name


def test_every_tensor_and_row_is_its_own(tiny: tuple[str, GGUFFile]) -> None:
    _, file = tiny
    digests = Counter(hashlib.sha256(t.data).hexdigest() for t in file.tensors.values())
    assert digests.most_common(1)[0][1] == 1
    for tensor in file.tensors.values():
        assert rows_are_distinct(tensor), tensor.name


def test_names_and_shapes_are_the_real_ones(tiny_gguf: Path) -> None:
    shapes = {name: t.shape for name, t in read_gguf(tiny_gguf).tensors.items()}
    assert [name for name in shapes if name.startswith("blk.1.")] == [
        f"blk.1.{name}.weight" for name in NAMES_IN_A_LAYER
    ]
    assert shapes["token_embd.weight"] == shapes["output.weight"] == (512, 256)
    assert shapes["blk.0.attn_q.weight"] == (256, 256)
    assert shapes["blk.0.attn_k.weight"] == shapes["blk.0.attn_v.weight"] == (128, 256)
    assert shapes["blk.0.attn_q_norm.weight"] == (64,)
    assert shapes["blk.0.ffn_gate_inp.weight"] == (8, 256)
    assert shapes["blk.0.ffn_down_exps.weight"] == (8, 256, 256)


def test_the_30b_plan_is_the_real_model() -> None:
    planned = plans("30b", "Q4_K_M")
    assert len(planned) == 579
    assert planned["blk.47.ffn_down_exps.weight"].shape == (128, 2048, 768)
    assert planned["blk.47.attn_output.weight"].shape == (2048, 4096)
    num_weights = sum(prod(plan.shape) for plan in planned.values())
    assert num_weights == 30_532_122_624
    six = {name for name, plan in planned.items() if plan.ggml_type == T.Q6_K}
    layers = sorted(int(name.split(".")[1]) for name in six if "attn_v" in name)
    assert layers == [*range(6), *range(8, 42, 3), *range(42, 48)]
    assert six == {
        "output.weight",
        *(f"blk.{i}.{name}.weight" for i in layers for name in ("attn_v", "ffn_down_exps")),
    }
    assert {p.ggml_type for p in planned.values() if p.name not in six and not p.is_norm} == {T.Q4_K, T.F32}
    assert planned["blk.0.ffn_gate_inp.weight"].ggml_type == T.F32


def test_a_tied_file_has_no_output_matrix(tmp_path: Path, tiny_gguf: Path) -> None:
    write_synthetic(tmp_path / "tied.gguf", "tiny", "F16", tied=True)
    tied, untied = (read_gguf(path).tensors for path in (tmp_path / "tied.gguf", tiny_gguf))
    assert set(untied) - set(tied) == {"output.weight"}
    assert values(tied["token_embd.weight"]).std() == pytest.approx(3 / 16, rel=0.05)


def test_a_seed_gives_the_same_file_again(tmp_path: Path, tiny_q4: Path) -> None:
    write_synthetic(tmp_path / "again.gguf", "tiny", "Q4_K_M")
    write_synthetic(tmp_path / "other.gguf", "tiny", "Q4_K_M", seed=1)
    assert (tmp_path / "again.gguf").read_bytes() == tiny_q4.read_bytes()
    assert (tmp_path / "other.gguf").read_bytes() != tiny_q4.read_bytes()


def test_counting_numbers_name_their_place(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "count.gguf", "tiny", "F32", values="counting")
    start = 0
    for tensor in read_gguf(tmp_path / "count.gguf").tensors.values():
        found = values(tensor).reshape(-1)
        assert found[0] == start
        assert found[-1] == start + len(found) - 1
        start += len(found)
    with pytest.raises(ValueError, match="counting"):
        write_synthetic(tmp_path / "no.gguf", "tiny", "F16", values="counting")


def test_pooled_tensors_differ_in_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        PRESETS, "pooled", synth_gguf.Preset(2, 512, 4, 2, 64, 8, 2, 256, 512, 64, pooled=True)
    )
    monkeypatch.setattr(synth_gguf, "_DRAWN_SIZE", 1 << 16)
    monkeypatch.setattr(synth_gguf, "_POOL_SIZE", 1 << 16)
    write_synthetic(tmp_path / "pooled.gguf", "pooled", "Q4_K_M")
    file = read_gguf(tmp_path / "pooled.gguf")
    for name, tensor in file.tensors.items():
        assert rows_are_distinct(tensor), name
    gate, up = (file.tensors[f"blk.0.ffn_{name}_exps.weight"] for name in ("gate", "up"))
    assert gate.data.tobytes() != up.data.tobytes()
    wanted = synth_gguf.plan_tensors(PRESETS["pooled"], "Q4_K_M", vocab_size=512, tied=False)
    for plan in wanted:
        if not plan.is_norm:
            assert values(file.tensors[plan.name]).std() == pytest.approx(plan.spread, rel=0.35), plan.name


@pytest.mark.parametrize("quant", FILE_TYPES)
def test_a_pool_is_long_enough_for_every_row_of_the_30b(quant: str) -> None:
    for plan in plans("30b", quant).values():
        if not plan.is_norm:
            length = pool_length(plan.ggml_type)
            blocks_per_row = plan.num_blocks // plan.num_rows
            assert plan.num_rows <= length // gcd(length, blocks_per_row), plan.name


@pytest.mark.parametrize("ggml_type", [t for t in T if t.name in FILE_TYPES])
def test_blocks_have_the_asked_spread(ggml_type: T) -> None:
    rng = np.random.default_rng(7)
    for spread in (1.0, 0.0156):
        num_blocks = 2_000_000 // max(32, GGML_QUANT_SIZES[ggml_type][0]) // 32
        blocks = random_blocks(rng, ggml_type, np.full(num_blocks, spread, np.float32))
        found = dequantize(blocks, ggml_type).astype(np.float64)
        assert found.std() == pytest.approx(spread, rel=0.1)
        assert abs(found.mean()) < 0.06 * spread


# Vocabulary


@pytest.mark.parametrize("size", [512, 2048, 151_936])
def test_vocabulary_is_whole(size: int) -> None:
    vocabulary = make_vocabulary(size)
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    assert len(ids) == len(vocabulary.tokens) == len(vocabulary.token_types) == size
    known = set(vocabulary.tokens[:256])
    for i, merge in enumerate(vocabulary.merges):
        left, right = merge.split(" ")
        assert left in known
        assert right in known
        assert ids[left + right] == 256 + i
        known.add(left + right)
    types = {token: vocabulary.token_types[ids[token]] for token in ("<|im_end|>", "<think>", "Ġthe")}
    assert types == {"<|im_end|>": 3, "<think>": 4, "Ġthe": 1}
    first = 256 + len(vocabulary.merges)
    assert vocabulary.tokens[first : first + 3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert first == 151_643 or size != 151_936


def test_some_characters_need_two_tokens() -> None:
    vocabulary = make_vocabulary(512)
    halves = {(vocabulary.tokens[a], vocabulary.tokens[b]) for a, b in vocabulary.completions}
    assert ("ðŁĺ", "Ģ") in halves  # the grinning face, F0 9F 98 + 80
    assert len(halves) >= 3


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="needs more than 263 tokens, got 263"):
        make_vocabulary(263)


def test_tokenizer_is_copied_from_a_file(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "vocab.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(300)])
    writer.add_token_types([1] * 299 + [3])
    writer.add_eos_token_id(299)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    write_synthetic(tmp_path / "copy.gguf", "tiny", "Q4_0", vocab=tmp_path / "vocab.gguf")
    source, copy = read_gguf(tmp_path / "vocab.gguf"), read_gguf(tmp_path / "copy.gguf")
    names = [name for name in source.metadata if name.startswith("tokenizer.")]
    assert [name for name in copy.metadata if name.startswith("tokenizer.")] == names
    for name in names:
        assert np.array_equal(copy.metadata[name], source.metadata[name]), name  # type: ignore[arg-type]
    assert copy.tensors["token_embd.weight"].shape == copy.tensors["output.weight"].shape == (300, 256)


# The command


def test_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    assert main(["--preset", "tiny", "--quant", "Q8_0", "--seed", "3", str(out)]) == 0
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    assert read_gguf(out).get_str("general.architecture") == "qwen3moe"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--vocab", str(tmp_path / "absent.gguf"), str(tmp_path / "out.gguf")]) == 1
    assert "absent.gguf: cannot be read" in capsys.readouterr().err
    assert main([str(tmp_path / "absent" / "out.gguf")]) == 1
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--quant", "Q9", str(tmp_path / "out.gguf")])
    with pytest.raises(ValueError, match="'huge'"):
        write_synthetic(tmp_path / "out.gguf", "huge", "F32")
    with pytest.raises(GGUFError):
        write_synthetic(tmp_path / "out.gguf", "tiny", "F32", vocab=tmp_path / "absent.gguf")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(synth_gguf.GGUFWriter, "write_tensor_data", fail)
    assert main([str(tmp_path / "out.gguf")]) == 1
    assert list(tmp_path.iterdir()) == []
