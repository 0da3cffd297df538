"""A bounded reader of GGUF files: metadata and named, still-packed tensors.

Any bytes give a file or a GGUFError. Source of the format: the GGUF specification of the ggml
project (docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf, isfinite, prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

Numbers: TypeAlias = npt.NDArray[Any]
Value: TypeAlias = bool | int | float | str | list[str] | Numbers
T = TypeVar("T")

# Qwen's vocabulary takes 6 MB and 303,323 strings; these bounds keep a hostile header near 100 MB.
MAX_HEADER_SIZE: Final = 16 << 20
MAX_STRINGS: Final = 1 << 19
MAX_KEYS: Final = 1 << 12
MAX_TENSORS: Final = 1 << 15
MAX_PARTS: Final = 1 << 8

_VERSIONS: Final = (2, 3)
_ALIGNMENTS: Final = tuple(1 << i for i in range(21))
_REQUIRED: Final = object()
_PART_NAME: Final = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_SCALARS: Final = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


class GGUFError(ValueError):
    """A file that is no GGUF file, or not the one we need: `path`, `offset` (None: no place) and `what`."""

    def __init__(self, path: Path | str, offset: int | None, what: str) -> None:
        place = "" if offset is None else f"at byte {offset}: "
        super().__init__(f"{path}: {place}{what}")
        self.path = Path(path)
        self.offset = offset
        self.what = what

    def __reduce__(self) -> tuple[type[GGUFError], tuple[Path, int | None, str]]:
        return type(self), (self.path, self.offset, self.what)


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """One tensor as it lies in the file, still packed.

    `shape` is in numpy order (slowest axis first, the reverse of GGUF's); `data` is a flat, read-only
    uint8 view of the mapped file; `size` is its length in bytes.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    data: npt.NDArray[np.uint8]
    size: int


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """A GGUF file, or all parts of a split one: `metadata` by key and `tensors` by name, in file order.

    Numeric arrays are numpy arrays, string arrays lists of str. The getters raise GGUFError for a
    missing key (unless `default` is given), a wrong type or a value out of range.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]
    parts: tuple[_Part, ...] = field(default=(), repr=False)

    def check_unchanged(self) -> None:
        """Raise GGUFError for a part that was cut since: reading its view would kill the process."""
        for part in self.parts:
            if part.mapping.size() < len(part.mapping):
                raise GGUFError(part.path, part.mapping.size(), "the file was cut while it was open")

    @overload
    def get_int(self, key: str, *, low: int = ..., high: int = ...) -> int: ...
    @overload
    def get_int(self, key: str, *, low: int = ..., high: int = ..., default: T) -> int | T: ...
    def get_int(
        self, key: str, *, low: int = -(1 << 63), high: int = (1 << 64) - 1, default: object = _REQUIRED
    ) -> object:
        """An integer in low..high."""
        return self._get(key, "an integer", _is_int, low, high, default)

    @overload
    def get_float(self, key: str, *, low: float = ..., high: float = ...) -> float: ...
    @overload
    def get_float(self, key: str, *, low: float = ..., high: float = ..., default: T) -> float | T: ...
    def get_float(
        self, key: str, *, low: float = -inf, high: float = inf, default: object = _REQUIRED
    ) -> object:
        """A finite number in low..high; an integer is taken too."""
        value = self._get(key, "a number", _is_number, low, high, default)
        return float(value) if isinstance(value, int) and key in self.metadata else value

    @overload
    def get_str(self, key: str) -> str: ...
    @overload
    def get_str(self, key: str, *, default: T) -> str | T: ...
    def get_str(self, key: str, *, default: object = _REQUIRED) -> object:
        """A string."""
        return self._get(key, "a string", _is_str, None, None, default)

    @overload
    def get_bool(self, key: str) -> bool: ...
    @overload
    def get_bool(self, key: str, *, default: T) -> bool | T: ...
    def get_bool(self, key: str, *, default: object = _REQUIRED) -> object:
        """A truth value."""
        return self._get(key, "a truth value", _is_bool, None, None, default)

    @overload
    def get_array(self, key: str) -> list[str] | Numbers: ...
    @overload
    def get_array(self, key: str, *, of: type[str]) -> list[str]: ...
    @overload
    def get_array(self, key: str, *, of: type[str], default: T) -> list[str] | T: ...
    @overload
    def get_array(self, key: str, *, of: type[float]) -> Numbers: ...
    @overload
    def get_array(self, key: str, *, of: type[float], default: T) -> Numbers | T: ...
    @overload
    def get_array(self, key: str, *, default: T) -> list[str] | Numbers | T: ...
    def get_array(
        self, key: str, *, of: type[str] | type[float] | None = None, default: object = _REQUIRED
    ) -> object:
        """An array: `of=str` wants strings, `of=int` integers, `of=float` any numbers, None takes all."""
        wanted, check = _ARRAY_KINDS[of]
        return self._get(key, wanted, check, None, None, default)

    def _get(
        self,
        key: str,
        wanted: str,
        check: Callable[[object], bool],
        low: float | None,
        high: float | None,
        default: object,
    ) -> object:
        if key not in self.metadata:
            if default is _REQUIRED:
                raise GGUFError(self.path, None, f"the GGUF file has no '{key}'")
            return default
        value: Any = self.metadata[key]
        if not check(value):
            raise GGUFError(self.path, None, f"'{key}' must be {wanted}, got {_shown(value)}")
        if low is not None and high is not None and not low <= value <= high:
            raise GGUFError(self.path, None, f"'{key}' must be between {low} and {high}, got {value}")
        return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and isfinite(value))


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_strings(value: object) -> bool:
    return isinstance(value, list)


def _is_integers(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "iu"


def _is_numbers(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "iuf"


def _is_array(value: object) -> bool:
    return isinstance(value, list | np.ndarray)


_ARRAY_KINDS: Final[dict[type | None, tuple[str, Callable[[object], bool]]]] = {
    None: ("an array", _is_array),
    str: ("an array of strings", _is_strings),
    int: ("an array of integers", _is_integers),
    float: ("an array of numbers", _is_numbers),
}


def _shown(value: object) -> str:
    """A short form for messages, whatever a hostile file holds."""
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file; a split one by its first part, whose siblings are opened too.

    Raises GGUFError for anything that is not a sound GGUF file of regular, complete parts.
    """
    first = _read_part(Path(path), MAX_STRINGS)
    parts = (first, *_read_siblings(first))
    tensors: dict[str, GGUFTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise GGUFError(part.path, None, f"tensor {_shown(name)} is in an earlier part too")
            tensors[name] = tensor
    _check_tensor_count(first, len(tensors), split=len(parts) > 1)
    return GGUFFile(first.path, MappingProxyType(first.metadata), MappingProxyType(tensors), parts)


@dataclass(frozen=True, eq=False)
class _Part:
    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GGUFTensor]
    num_strings: int
    mapping: mmap.mmap

    def get_int(self, key: str, *, high: int, default: int) -> int:
        file = GGUFFile(self.path, self.metadata, self.tensors)
        return file.get_int(key, low=0, high=high, default=default)


def _read_siblings(first: _Part) -> Iterator[_Part]:
    count = first.get_int("split.count", high=MAX_PARTS, default=1)
    if count <= 1:
        return
    number = first.get_int("split.no", high=count - 1, default=0)
    match = _PART_NAME.fullmatch(first.path.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != number + 1:
        wanted = f"NAME-{number + 1:05}-of-{count:05}.gguf"
        raise GGUFError(first.path, None, f"part {number + 1} of {count} must be named {wanted}")
    names = [f"{match['prefix']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    if number != 0:
        raise GGUFError(first.path, None, f"this is part {number + 1} of {count}: open {names[0]!r}")
    num_strings = first.num_strings
    for i, name in enumerate(names[1:], start=1):
        part = _read_part(first.path.with_name(name), MAX_STRINGS - num_strings)
        num_strings += part.num_strings
        _check_sibling(part, i, count)
        yield part


def _check_sibling(part: _Part, number: int, count: int) -> None:
    for key, wanted in (("split.no", number), ("split.count", count)):
        found = part.get_int(key, high=1 << 32, default=-1)
        if found != wanted:
            shown = "it is missing" if found < 0 else f"got {found}"
            raise GGUFError(part.path, None, f"'{key}' must be {wanted}: {shown}")


def _check_tensor_count(first: _Part, num_tensors: int, *, split: bool) -> None:
    if not split:
        return
    wanted = first.get_int("split.tensors.count", high=MAX_TENSORS, default=num_tensors)
    if num_tensors != wanted:
        raise GGUFError(first.path, None, f"the parts hold {num_tensors} tensors, not {wanted}")


def _read_part(path: Path, max_strings: int) -> _Part:
    with _open_regular(path) as (fd, size):
        header = _Header(path, _read_start(fd, min(size, MAX_HEADER_SIZE)), size, max_strings)
        metadata, infos, start = _parse_header(header)
        mapping = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
    view = np.frombuffer(mapping, np.uint8)
    tensors = {info.name: info.at(view, start) for info in infos}
    return _Part(path, metadata, tensors, header.num_strings, mapping)


@contextmanager
def _open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """A file descriptor and the size in bytes; the operating system's errors become GGUFError."""
    fd = -1
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise GGUFError(path, None, "not a regular file")
        # Without O_NONBLOCK a pipe that was put in the file's place since would block for ever.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(path, None, "not a regular file")
        yield fd, status.st_size
    except GGUFError:
        raise
    except OSError as error:
        raise GGUFError(path, None, f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path, or a file cut before it was mapped
        raise GGUFError(path, None, f"cannot be read: {error}") from error
    finally:
        if fd >= 0:
            os.close(fd)


def _read_start(fd: int, size: int) -> bytes:
    pieces = []
    while size > 0 and (piece := os.read(fd, size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


class _Header:
    """A cursor over a file's first bytes; every length is checked before it is used."""

    def __init__(self, path: Path, start: bytes, file_size: int, max_strings: int) -> None:
        self.path = path
        self.bytes = start
        self.file_size = file_size
        self.at = 0
        self.num_strings = 0
        self.max_strings = max_strings

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        raise GGUFError(self.path, self.at if at is None else at, what)

    def check(self, size: int, what: str) -> None:
        """Raise unless `size` more bytes are there."""
        if self.at + size <= len(self.bytes):
            return
        if self.at + size <= self.file_size:
            self.fail(f"{what} goes past the {MAX_HEADER_SIZE} bytes a header may take")
        self.fail(f"{what} needs {size} bytes, the file has {self.file_size - self.at} left")

    def take(self, size: int, what: str) -> bytes:
        self.check(size, what)
        self.at += size
        return self.bytes[self.at - size : self.at]

    def integer(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def count(self, what: str, high: int) -> int:
        count = self.integer(8, what)
        if count > high:
            self.fail(f"{what} is {count}, at most {high} are read", self.at - 8)
        return count

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        self.check(8 * count, what)
        self.num_strings += count
        if self.num_strings > self.max_strings:
            self.fail(f"{what} brings the strings to {self.num_strings}, at most {MAX_STRINGS} are read")
        found: list[str] = []
        # One tight loop: this runs 300,000 times for a real vocabulary.
        source, limit, at, length_at = self.bytes, len(self.bytes), self.at, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = at + 8
                if start > limit:
                    break
                end = start + length_at(source, at)[0]
                if end > limit:
                    break
                found.append(str(source[start:end], "utf-8"))
                at = end
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}", at + 8 + error.start)
        self.at = at
        if len(found) < count:
            self.check(self.integer(8, what), what)
        return found


def _parse_header(header: _Header) -> tuple[dict[str, Value], list[_TensorInfo], int]:
    """Metadata, tensor infos and the byte at which tensor data starts."""
    _parse_magic(header)
    num_tensors = header.count("the number of tensors", MAX_TENSORS)
    num_keys = header.count("the number of keys", MAX_KEYS)
    metadata = _parse_metadata(header, num_keys)
    alignment = _read_alignment(header, metadata)
    infos = _parse_tensor_infos(header, num_tensors, alignment)
    start = _padded(header.at, alignment)
    for info in infos:
        if start + info.offset + info.size > header.file_size:
            header.fail(
                f"tensor {_shown(info.name)} ends at byte {start + info.offset + info.size}, "
                f"the file at byte {header.file_size}",
                info.place,
            )
    return metadata, infos, start


def _parse_magic(header: _Header) -> None:
    if header.bytes[:4] != b"GGUF":
        header.fail("not a GGUF file: it does not start with 'GGUF'")
    header.at = 4
    version = header.integer(4, "the version")
    if version in _VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
        header.fail("a big-endian GGUF file is not supported", 4)
    header.fail(f"GGUF version {version} is not supported, versions 2 and 3 are", 4)


def _parse_metadata(header: _Header, num_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(num_keys):
        place = header.at
        key = header.string("a key")
        if key in metadata:
            header.fail(f"key {_shown(key)} is there twice", place)
        metadata[key] = _parse_value(header, _value_type(header, key), key)
    return metadata


def _value_type(header: _Header, key: str) -> GGUFValueType:
    number = header.integer(4, f"the type of key {_shown(key)}")
    try:
        return GGUFValueType(number)
    except ValueError:
        header.fail(f"key {_shown(key)} has the unknown type {number}", header.at - 4)


def _parse_value(header: _Header, value_type: GGUFValueType, key: str) -> Value:
    if value_type == GGUFValueType.STRING:
        return header.string(f"the value of {_shown(key)}")
    if value_type == GGUFValueType.ARRAY:
        return _parse_array(header, key)
    value: Value = _parse_numbers(header, value_type, 1, key)[0].item()
    return value


def _parse_array(header: _Header, key: str) -> Value:
    item_type = _value_type(header, key)
    if item_type == GGUFValueType.ARRAY:
        header.fail(f"key {_shown(key)} is an array of arrays", header.at - 4)
    count = header.integer(8, f"the length of {_shown(key)}")
    if item_type == GGUFValueType.STRING:
        return header.strings(count, f"the value of {_shown(key)}")
    return _parse_numbers(header, item_type, count, key)


def _parse_numbers(header: _Header, item_type: GGUFValueType, count: int, key: str) -> Numbers:
    dtype = np.dtype(_SCALARS[item_type])
    place = header.at
    taken = header.take(count * dtype.itemsize, f"the value of {_shown(key)}")
    numbers: Numbers = np.frombuffer(taken, dtype)
    if item_type != GGUFValueType.BOOL:
        return numbers
    if np.any(numbers > 1):
        header.fail(f"a truth value of {_shown(key)} is neither 0 nor 1", place)
    return numbers.view(np.bool_)


def _read_alignment(header: _Header, metadata: Mapping[str, Value]) -> int:
    alignment: Any = metadata.get("general.alignment", 32)
    if not _is_int(alignment) or alignment not in _ALIGNMENTS:
        header.fail(f"'general.alignment' must be a power of two up to 2**20, got {_shown(alignment)}")
    return int(alignment)


@dataclass(frozen=True)
class _TensorInfo:
    place: int
    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int
    size: int

    def at(self, view: npt.NDArray[np.uint8], start: int) -> GGUFTensor:
        begin = start + self.offset
        return GGUFTensor(self.name, self.shape, self.ggml_type, view[begin : begin + self.size], self.size)


def _parse_tensor_infos(header: _Header, num_tensors: int, alignment: int) -> list[_TensorInfo]:
    infos: dict[str, _TensorInfo] = {}
    total = 0
    for _ in range(num_tensors):
        info = _parse_tensor_info(header)
        if info.name in infos:
            header.fail(f"tensor {_shown(info.name)} is there twice", info.place)
        if info.offset != total:
            header.fail(f"tensor {_shown(info.name)} has offset {info.offset}, not {total}", header.at - 8)
        infos[info.name] = info
        total = _padded(total + info.size, alignment)
    return list(infos.values())


def _parse_tensor_info(header: _Header) -> _TensorInfo:
    place = header.at
    name = header.string("a tensor's name")
    what = f"tensor {_shown(name)}"
    num_dims = header.integer(4, what)
    if not 1 <= num_dims <= 4:
        header.fail(f"{what} has {num_dims} dimensions, not 1 to 4", header.at - 4)
    shape = tuple(header.integer(8, what) for _ in range(num_dims))[::-1]
    ggml_type = _tensor_type(header, what)
    size = _packed_size(header, what, shape, ggml_type)
    return _TensorInfo(place, name, shape, ggml_type, header.integer(8, what), size)


def _tensor_type(header: _Header, what: str) -> GGMLQuantizationType:
    number = header.integer(4, what)
    try:
        ggml_type = GGMLQuantizationType(number)
    except ValueError:
        header.fail(f"{what} has the unknown quantisation type {number}", header.at - 4)
    return ggml_type


def _packed_size(header: _Header, what: str, shape: tuple[int, ...], ggml_type: GGMLQuantizationType) -> int:
    if min(shape) < 1 or prod(shape) >= 1 << 63:
        header.fail(f"{what} has the impossible shape {shape}")
    block_length, block_size = GGML_QUANT_SIZES[ggml_type]
    if shape[-1] % block_length:
        header.fail(f"{what} has rows of {shape[-1]}, not a multiple of {ggml_type.name}'s {block_length}")
    return prod(shape) // block_length * block_size


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
