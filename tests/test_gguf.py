"""The GGUF reader against files crafted byte by byte, hostile ones included."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType as T
from gguf.constants import GGUFValueType as V
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmoe.config import ModelConfig
from jaxmoe.gguf import MAX_HEADER_SIZE, MAX_KEYS, MAX_STRINGS, MAX_TENSORS, GGUFError, GGUFFile, read_gguf

REAL_VOCABULARY = Path(__file__).parents[2] / "shared" / "data" / "ggml-vocab-qwen2.gguf"
SCALARS = {
    V.UINT8: ("<B", 200),
    V.INT8: ("<b", -100),
    V.UINT16: ("<H", 60_000),
    V.INT16: ("<h", -30_000),
    V.UINT32: ("<I", 4_000_000_000),
    V.INT32: ("<i", -2_000_000_000),
    V.FLOAT32: ("<f", 0.5),
    V.BOOL: ("<?", True),
    V.UINT64: ("<Q", 2**64 - 1),
    V.INT64: ("<q", -(2**63)),
    V.FLOAT64: ("<d", 0.1),
}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, value_type: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", value_type) + value


def text_key(name: str, text: str | bytes) -> bytes:
    return key(name, V.STRING, string(text))


def int_key(name: str, number: int) -> bytes:
    return key(name, V.UINT32, struct.pack("<I", number))


def array(item_type: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", item_type, count) + items


def tensor(name: str | bytes, dims: Sequence[int], ggml_type: int = T.F32, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + shape + struct.pack("<IQ", ggml_type, offset)


def header(num_tensors: int, num_keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def whole(
    keys: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data_size: int = 0, align: int = 32
) -> bytes:
    start = header(len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return start + bytes(-len(start) % align) + bytes(i % 251 for i in range(data_size))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_bytes(content: bytes, name: str = "file.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write_bytes


def refused(path: Path | str) -> GGUFError:
    with pytest.raises(GGUFError) as caught:
        read_gguf(path)
    return caught.value


GOOD = whole(
    [
        text_key("general.name", "Grüße 😀"),
        key("strings", V.ARRAY, array(V.STRING, 3, string("a") + string("") + string("世界"))),
        *(key(f"scalar.{t.name}", t, struct.pack(f, v)) for t, (f, v) in SCALARS.items()),
        *(
            key(f"array.{t.name}", V.ARRAY, array(t, 2, 2 * struct.pack(f, v)))
            for t, (f, v) in SCALARS.items()
        ),
        key("empty", V.ARRAY, array(V.FLOAT32, 0)),
    ],
    [
        tensor("first", [3, 2], T.F32, 0),
        tensor("second", [64, 5, 2, 1], T.Q8_0, 32),
        tensor("third", [7], T.I8, 736),
    ],
    data_size=743,
)


@pytest.mark.parametrize("version", [2, 3])
def test_good_file_gives_every_value_and_tensor(write: Callable[..., Path], version: int) -> None:
    file = read_gguf(write(GOOD[:4] + struct.pack("<I", version) + GOOD[8:]))
    assert file.metadata["general.name"] == "Grüße 😀"
    assert file.metadata["strings"] == ["a", "", "世界"]
    for value_type, (layout, value) in SCALARS.items():
        wanted = struct.unpack(layout, struct.pack(layout, value))[0]
        found: Any = file.metadata[f"scalar.{value_type.name}"]
        assert found == wanted
        assert type(found) is type(wanted)
        assert file.get_array(f"array.{value_type.name}").tolist() == [wanted, wanted]  # type: ignore[union-attr]
    assert len(file.get_array("empty")) == 0
    assert [(t.name, t.shape, t.ggml_type, t.size) for t in file.tensors.values()] == [
        ("first", (2, 3), T.F32, 24),
        ("second", (1, 2, 5, 64), T.Q8_0, 680),
        ("third", (7,), T.I8, 7),
    ]
    start = len(GOOD) - 743
    for name, begin in (("first", 0), ("second", 32), ("third", 736)):
        view = file.tensors[name].data
        assert view.tobytes() == GOOD[start + begin : start + begin + file.tensors[name].size]
        assert not view.flags.writeable


def test_every_cut_is_refused(write: Callable[..., Path]) -> None:
    for size in (*range(len(GOOD) - 743), *range(len(GOOD) - 743, len(GOOD), 53), len(GOOD) - 1):
        assert refused(write(GOOD[:size])).path.name == "file.gguf"


def test_a_larger_alignment_moves_the_tensors(write: Callable[..., Path]) -> None:
    tensors = [tensor("a", [1], T.F32, 0), tensor("b", [1], T.F32, 128)]
    file = read_gguf(write(whole([int_key("general.alignment", 128)], tensors, 132, align=128)))
    assert file.tensors["b"].data.tolist() == [128, 129, 130, 131]


HOSTILE = {
    "empty": (b"", "not a GGUF file"),
    "foreign": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "version 1": (header(0, 0, version=1), "GGUF version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "too many keys": (header(0, MAX_KEYS + 1), f"number of keys is {MAX_KEYS + 1}"),
    "too many tensors": (header(MAX_TENSORS + 1, 0), f"number of tensors is {MAX_TENSORS + 1}"),
    "long key": (header(0, 1) + struct.pack("<Q", 2**62) + b"k", "a key needs 4611686018427387904 bytes"),
    "wrapping key": (header(0, 1) + struct.pack("<Q", 2**64 - 8) + b"k", "the file has 1 left"),
    "long text": (header(0, 1) + key("k", V.STRING, struct.pack("<Q", 2**63)), "the value of 'k' needs"),
    "long array": (header(0, 1) + key("k", V.ARRAY, array(V.UINT8, 2**62)), "the value of 'k' needs"),
    "long strings": (header(0, 1) + key("k", V.ARRAY, array(V.STRING, 2**62)), "the value of 'k' needs"),
    "strings run out": (
        header(0, 1)
        + key("k", V.ARRAY, array(V.STRING, 2, string("abcdefgh") + struct.pack("<Q", 9) + b"x")),
        "needs 9 bytes, the file has 1 left",
    ),
    "array of arrays": (whole([key("k", V.ARRAY, array(V.ARRAY, 1, array(V.UINT8, 0)))]), "array of arrays"),
    "unknown value type": (whole([key("k", 13, bytes(8))]), "key 'k' has the unknown type 13"),
    "unknown item type": (whole([key("k", V.ARRAY, array(99, 0))]), "key 'k' has the unknown type 99"),
    "truth value 2": (whole([key("k", V.BOOL, b"\x02")]), "neither 0 nor 1"),
    "key twice": (whole([int_key("k", 1), int_key("k", 2)]), "key 'k' is there twice"),
    "key not UTF-8": (whole([key(b"\xff", V.BOOL, b"\x01")]), "a key is not UTF-8"),
    "text not UTF-8": (whole([text_key("k", b"ab\xc3")]), "the value of 'k' is not UTF-8"),
    "name not UTF-8": (whole([], [tensor(b"\xed\xa0\x80", [1])], 4), "a tensor's name is not UTF-8"),
    "name twice": (
        whole([], [tensor("t", [1]), tensor("t", [1], offset=32)], 36),
        "tensor 't' is there twice",
    ),
    "no dimension": (whole([], [tensor("t", [])], 4), "tensor 't' has 0 dimensions"),
    "five dimensions": (whole([], [tensor("t", [1] * 5)], 4), "tensor 't' has 5 dimensions"),
    "dimension 0": (whole([], [tensor("t", [4, 0])], 4), "impossible shape (0, 4)"),
    "product wraps": (whole([], [tensor("t", [2**32, 2**32])], 4), "impossible shape"),
    "product past the file": (whole([], [tensor("t", [2**31, 2**31])], 4), "the file at byte"),
    "unknown quantisation": (whole([], [tensor("t", [32], 99)], 4), "unknown quantisation type 99"),
    "removed quantisation": (whole([], [tensor("t", [32], 4)], 4), "unknown quantisation type 4"),
    "broken row": (whole([], [tensor("t", [48, 2], T.Q8_0)], 102), "not a multiple of Q8_0's 32"),
    "offset into the header": (whole([], [tensor("t", [1], offset=2**64 - 64)], 4), "has offset"),
    "misaligned": (whole([], [tensor("t", [1], offset=4)], 8), "has offset 4, not 0"),
    "overlapping": (
        whole([], [tensor("t", [16]), tensor("u", [16])], 128),
        "tensor 'u' has offset 0, not 64",
    ),
    "gap": (
        whole([], [tensor("t", [8]), tensor("u", [8], offset=64)], 96),
        "tensor 'u' has offset 64, not 32",
    ),
    "past the end": (whole([], [tensor("t", [8])], 31), "the file at byte"),
    "alignment 0": (whole([int_key("general.alignment", 0)]), "power of two"),
    "alignment 48": (whole([int_key("general.alignment", 48)]), "power of two"),
    "alignment true": (whole([key("general.alignment", V.BOOL, b"\x01")]), "power of two"),
    "alignment 2**31": (whole([int_key("general.alignment", 2**31)]), "power of two"),
    "alignment array": (
        whole([key("general.alignment", V.ARRAY, array(V.UINT8, 1, b"\x20"))]),
        "power of two",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_by_name(write: Callable[..., Path], case: str) -> None:
    content, message = HOSTILE[case]
    error = refused(write(content))
    assert message in error.what
    assert error.offset is not None
    assert 0 <= error.offset <= len(content)
    assert str(error) == f"{error.path}: at byte {error.offset}: {error.what}"


def test_offset_points_at_the_bad_byte(write: Callable[..., Path]) -> None:
    content = whole([text_key("k", b"ab\xff\xffz")])
    assert refused(write(content)).offset == content.index(b"\xff")


def test_error_survives_pickling(write: Callable[..., Path]) -> None:
    error = refused(write(b""))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_hostile_name_stays_short_in_the_message(write: Callable[..., Path]) -> None:
    error = refused(write(whole([], [tensor("x" * 10_000, [])])))
    assert len(error.what) < 200


def test_header_larger_than_the_cap_is_refused_unread(write: Callable[..., Path]) -> None:
    path = write(header(0, 1) + key("k", V.STRING, struct.pack("<Q", MAX_HEADER_SIZE)))
    os.truncate(path, 4 * MAX_HEADER_SIZE)
    assert "bytes a header may take" in refused(path).what


PEAK_SCRIPT = """
import resource, sys
from jaxmoe.gguf import read_gguf
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
file = read_gguf(sys.argv[1])
print(len(file.get_array("k")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_costliest_header_stays_near_100_mb(write: Callable[..., Path]) -> None:
    room = MAX_HEADER_SIZE // MAX_STRINGS - 9
    items = string("😀".ljust(room - 3)) * (MAX_STRINGS - 1)
    path = write(whole([key("k", V.ARRAY, array(V.STRING, MAX_STRINGS - 1, items))]))
    result = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, path], capture_output=True, text=True, check=True
    )
    count, peak_kib = map(int, result.stdout.split())
    assert count == MAX_STRINGS - 1
    assert peak_kib < 120_000


def test_more_strings_than_the_cap_are_refused(write: Callable[..., Path]) -> None:
    content = whole([key("k", V.ARRAY, array(V.STRING, MAX_STRINGS, bytes(8 * MAX_STRINGS)))])
    assert f"at most {MAX_STRINGS} are read" in refused(write(content)).what


def test_only_regular_files_are_opened(tmp_path: Path, write: Callable[..., Path]) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    assert "not a regular file" in refused(pipe).what
    assert "not a regular file" in refused(tmp_path).what
    assert "not a regular file" in refused("/dev/null").what
    assert "No such file" in refused(tmp_path / "absent.gguf").what
    assert "cannot be read" in refused("nul\0.gguf").what
    link = tmp_path / "link.gguf"
    link.symlink_to(write(GOOD))
    assert "first" in read_gguf(link).tensors


def test_a_pipe_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    refused(tmp_path / "pipe.gguf")


def test_a_pipe_put_in_the_files_place_does_not_block(
    tmp_path: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    regular = os.stat(write(GOOD))
    os.mkfifo(tmp_path / "pipe.gguf")
    with monkeypatch.context() as patch:
        patch.setattr("jaxmoe.gguf.os.stat", lambda _: regular)
        error = refused(tmp_path / "pipe.gguf")
    assert "not a regular file" in error.what


def test_a_file_cut_after_opening_is_noticed(write: Callable[..., Path]) -> None:
    path = write(GOOD)
    file = read_gguf(path)
    file.check_unchanged()
    os.truncate(path, len(GOOD) - 1)
    with pytest.raises(GGUFError, match="cut while it was open"):
        file.check_unchanged()


def test_opening_keeps_no_file_descriptor_after_an_error(write: Callable[..., Path]) -> None:
    path = write(GOOD[:-1])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        refused(path)
    assert len(os.listdir("/proc/self/fd")) == before


# Typed getters

KEYS = GGUFFile(
    Path("model.gguf"),
    {
        "int": 7,
        "float": 0.5,
        "nan": float("nan"),
        "str": "text",
        "bool": True,
        "strings": ["a"],
        "ints": np.array([1, 2], np.int32),
        "floats": np.array([1.5], np.float32),
    },
    {},
)


def test_getters_give_the_typed_value() -> None:
    assert KEYS.get_int("int", low=7, high=7) == 7
    assert KEYS.get_float("float") == 0.5
    assert isinstance(KEYS.get_float("int"), float)
    assert KEYS.get_str("str") == "text"
    assert KEYS.get_bool("bool") is True
    assert KEYS.get_array("strings", of=str) == ["a"]
    assert KEYS.get_array("ints", of=int).tolist() == [1, 2]
    assert KEYS.get_array("floats", of=float).tolist() == [1.5]


def test_getters_give_the_default_only_for_a_missing_key() -> None:
    assert KEYS.get_int("absent", default=None) is None
    assert KEYS.get_float("absent", default=3) == 3
    assert KEYS.get_str("absent", default="") == ""
    assert KEYS.get_bool("absent", default=False) is False
    assert KEYS.get_array("absent", of=str, default=None) is None
    with pytest.raises(GGUFError, match="'str' must be an integer"):
        KEYS.get_int("str", default=1)


@pytest.mark.parametrize(
    ("getter", "message"),
    [
        (lambda: KEYS.get_int("qwen3moe.expert_count"), "the GGUF file has no 'qwen3moe.expert_count'"),
        (lambda: KEYS.get_int("bool"), "'bool' must be an integer, got True"),
        (lambda: KEYS.get_int("float"), "'float' must be an integer, got 0.5"),
        (lambda: KEYS.get_int("int", low=8, high=9), "'int' must be between 8 and 9, got 7"),
        (lambda: KEYS.get_int("int", low=0, high=6), "'int' must be between 0 and 6, got 7"),
        (lambda: KEYS.get_float("nan"), "'nan' must be a number, got nan"),
        (lambda: KEYS.get_float("float", low=1, high=2), "'float' must be between 1 and 2, got 0.5"),
        (lambda: KEYS.get_str("strings"), "'strings' must be a string, got an array of 1"),
        (lambda: KEYS.get_bool("int"), "'int' must be a truth value, got 7"),
        (lambda: KEYS.get_array("int"), "'int' must be an array, got 7"),
        (lambda: KEYS.get_array("ints", of=str), "'ints' must be an array of strings"),
        (lambda: KEYS.get_array("floats", of=int), "'floats' must be an array of integers"),
        (lambda: KEYS.get_array("strings", of=float), "'strings' must be an array of numbers"),
    ],
)
def test_getters_name_the_key_they_refuse(getter: Callable[[], object], message: str) -> None:
    with pytest.raises(GGUFError) as caught:
        getter()
    assert message in caught.value.what
    assert str(caught.value) == f"model.gguf: {caught.value.what}"


# Split files


def split_keys(number: int, count: int, num_tensors: int) -> list[bytes]:
    return [
        key("split.no", V.UINT16, struct.pack("<H", number)),
        key("split.count", V.UINT16, struct.pack("<H", count)),
        key("split.tensors.count", V.INT32, struct.pack("<i", num_tensors)),
    ]


def write_split(folder: Path, *, count: int = 3, num_tensors: int = 2) -> Path:
    """Three parts; as llama.cpp can write them, the first has keys and no tensor."""
    parts = [
        whole([text_key("general.name", "split"), *split_keys(0, count, num_tensors)]),
        whole(split_keys(1, count, num_tensors), [tensor("a", [2])], 8),
        whole(split_keys(2, count, num_tensors), [tensor("b", [3])], 12),
    ]
    for i, part in enumerate(parts):
        (folder / f"m-{i + 1:05}-of-00003.gguf").write_bytes(part)
    return folder / "m-00001-of-00003.gguf"


def test_split_file_is_opened_by_its_first_part(tmp_path: Path) -> None:
    file = read_gguf(write_split(tmp_path))
    assert file.metadata["general.name"] == "split"
    assert {name: t.shape for name, t in file.tensors.items()} == {"a": (2,), "b": (3,)}
    assert file.tensors["b"].data.tolist() == list(range(12))
    os.truncate(tmp_path / "m-00003-of-00003.gguf", 40)
    with pytest.raises(GGUFError, match=r"m-00003-of-00003\.gguf"):
        file.check_unchanged()


def test_split_file_must_be_complete(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    second = tmp_path / "m-00002-of-00003.gguf"
    error = refused(second)
    assert "this is part 2 of 3: open 'm-00001-of-00003.gguf'" in error.what
    assert (
        "part 1 of 3 must be named NAME-00001-of-00003.gguf"
        in refused(first.rename(tmp_path / "m.gguf")).what
    )
    first = write_split(tmp_path)
    second.unlink()
    error = refused(first)
    assert error.path == second
    assert "cannot be read" in error.what


def test_split_parts_must_agree(tmp_path: Path) -> None:
    first = write_split(tmp_path, num_tensors=5)
    assert "the parts hold 2 tensors, not 5" in refused(first).what
    write_split(tmp_path)
    second, third = tmp_path / "m-00002-of-00003.gguf", tmp_path / "m-00003-of-00003.gguf"
    third.write_bytes(whole(split_keys(2, 3, 2), [tensor("a", [3])], 12))
    assert "tensor 'a' is in an earlier part too" in refused(first).what
    third.write_bytes(second.read_bytes())
    assert "'split.no' must be 2: got 1" in refused(first).what
    third.write_bytes(whole([], [tensor("b", [3])], 12))
    assert "'split.no' must be 2: it is missing" in refused(first).what
    third.write_bytes(whole(split_keys(2, 4, 2), [tensor("b", [3])], 12))
    assert "'split.count' must be 3: got 4" in refused(first).what


def test_split_parts_share_the_cap_on_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_split(tmp_path)  # 5 strings and twice 4
    monkeypatch.setattr("jaxmoe.gguf.MAX_STRINGS", 13)
    read_gguf(first)
    monkeypatch.setattr("jaxmoe.gguf.MAX_STRINGS", 12)
    error = refused(first)
    assert error.path.name == "m-00003-of-00003.gguf"
    assert "the strings to" in error.what


def test_a_hostile_part_count_is_refused(write: Callable[..., Path]) -> None:
    path = write(whole(split_keys(0, 65_535, 1)), "m-00001-of-65535.gguf")
    assert "'split.count' must be between 0 and 256" in refused(path).what


def test_a_split_of_one_part_may_have_any_name(write: Callable[..., Path]) -> None:
    file = read_gguf(write(whole(split_keys(0, 1, 1), [tensor("a", [2])], 8)))
    assert list(file.tensors) == ["a"]


# Against the gguf package's reader, real files and random bytes


def test_agrees_with_the_gguf_package(tiny_q4: Path) -> None:
    file, oracle = read_gguf(tiny_q4), GGUFReader(tiny_q4)
    fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for name, field in fields.items():
        found: Any = file.metadata[name]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents(), name
    assert list(file.tensors) == [t.name for t in oracle.tensors]
    for wanted in oracle.tensors:
        tensor_found = file.tensors[wanted.name]
        assert tensor_found.shape == tuple(int(n) for n in reversed(wanted.shape))
        assert tensor_found.ggml_type == wanted.tensor_type
        assert tensor_found.data.tobytes() == wanted.data.tobytes()


@pytest.mark.skipif(not REAL_VOCABULARY.exists(), reason="the real vocabulary is not here")
def test_real_vocabulary_is_read_fast(record_property: Callable[[str, object], None]) -> None:
    begin = perf_counter()
    file = read_gguf(REAL_VOCABULARY)
    seconds = perf_counter() - begin
    record_property("seconds", seconds)
    tokens = file.get_array("tokenizer.ggml.tokens", of=str)
    assert (len(tokens), len(file.get_array("tokenizer.ggml.merges", of=str))) == (151_936, 151_387)
    assert tokens[151_645] == "<|im_end|>"
    assert file.get_array("tokenizer.ggml.token_type", of=int)[151_645] == 3
    assert seconds < 5  # 0.1 s on a free core


def read_or_refuse(path: Path) -> None:
    begin = perf_counter()
    try:
        file = read_gguf(path)
        ModelConfig.from_gguf(file)
        assert sum(int(t.data[-1]) for t in file.tensors.values()) >= 0
    except GGUFError:
        pass
    assert perf_counter() - begin < 1


FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


@FUZZ
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_a_file_or_an_error(tmp_path: Path, content: bytes, with_magic: bool) -> None:
    path = tmp_path / "fuzz.gguf"
    path.write_bytes((b"GGUF\x03\0\0\0" if with_magic else b"") + content)
    read_or_refuse(path)


@FUZZ
@given(st.data())
def test_any_damage_gives_a_file_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(GOOD)
    interesting = st.sampled_from(
        [b"\xff" * 8, b"\0" * 8, b"\x7f", b"\x01", b"\xff", struct.pack("<Q", 2**62)]
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        patch = data.draw(interesting | st.binary(min_size=1, max_size=8))
        keep = data.draw(st.booleans())
        content[at : at + len(patch) * keep] = patch
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(content)
    read_or_refuse(path)
