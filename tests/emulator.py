"""Runs the CUDA kernels on a CPU: the same sources, compiled by g++ behind cuda_emulator.h.

Threads are fibers; blocks run one after another, or by turns where they wait for each other. It finds: wrong
results, deadlocks, accesses outside of an array, writes to an input, unaligned vector accesses, reads of
shared memory that nobody wrote (NaN), missing waits for asynchronous copies, phases with other arrivals or
bytes than they expect, results that depend on the order of threads or blocks. It cannot find: races that
neither order shows, and anything about speed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax import Array

from jaxmoe.kernels.ptx import define_options

HEADER = Path(__file__).with_name("cuda_emulator.h")
KERNELS = Path(__file__).parents[1] / "jaxmoe" / "kernels"
CHECKS = "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero"
COMPILE = (
    *(
        "g++",
        "-c",
        "-O2",
        "-g1",
        "-march=native",
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-gnu-unique",
    ),
    *("-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv", "-fno-ipa-reference", "-fno-exceptions"),
    *(CHECKS, "-fno-sanitize-recover=all", "-Wno-unknown-pragmas", "-Wno-attributes"),
)
ARCH = 900  # that is emulated; one below has neither bulk copies nor clusters
NUM_STACKS = 16 * 1024  # of threads that are under way together
STACKS_SIZE = NUM_STACKS * (128 * 1024 + 320)

_lock = threading.Lock()  # the fibers of all kernels share the stacks
_stacks = mmap.mmap(-1, STACKS_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
_libraries: dict[str, Library] = {}


class EmulatorError(RuntimeError):
    """A kernel that did what a GPU does not allow, or does not compile."""


class _Array(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p),
        ("result", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("same_as", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_int32 * 3),
        ("threads", ctypes.c_int32),
        ("shared_size", ctypes.c_int32),
        ("number", ctypes.c_int32),
        ("reversed", ctypes.c_int32),
        ("num_arrays", ctypes.c_int32),
        ("arrays", ctypes.POINTER(_Array)),
        ("stacks", ctypes.c_void_p),
        ("message", ctypes.c_void_p),
        ("message_size", ctypes.c_uint64),
        ("num_stacks", ctypes.c_uint64),
        ("code_address", ctypes.c_int64),
    )


class Library:
    """One compiled kernel and how often it was launched with which numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = ctypes.CDLL(str(path)).emulator_run
        self.num_launches: Counter[str] = Counter()


def unavailable() -> str | None:
    """Why this machine cannot run the emulator, or None."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "the emulator switches fibers in x86-64 assembly for Linux"
    return None if shutil.which("g++") else "the emulator needs g++"


def source_text(file: str, name: str, defines: Mapping[str, int | float | str]) -> str:
    """The C++ text of one kernel: the macros come after the emulator's header, whose names they may equal."""
    path = KERNELS / file
    text = path.read_text()
    text = re.sub(
        r"extern\s+__shared__([^;\[]*\[\s*\])\s*;", r'extern\1 __asm__("emulator_dynamic_shared");', text
    )
    bound = re.search(rf"KERNEL\(([^,]+),[^)]*\)\s*{name}\s*\(", text)
    macros = "\n".join("#define " + option[2:].replace("=", " ", 1) for option in define_options(defines))
    return f"""#define EMULATED {ARCH}
#include "cuda_emulator.h"
{macros}
#line 1 "{path.name}"
{text}
#line 1 "end of {path.name}"
extern "C" void emulated_kernel(void** parameters) {{ emulator::call({name}, parameters); }}
extern "C" const int emulated_num_parameters = emulator::num_parameters({name});
extern "C" const int emulated_max_threads = {bound[1] if bound else 0};
"""


def cache_directory() -> Path:
    """Where compiled kernels stay, for this user alone."""
    path = Path(tempfile.gettempdir()) / f"jaxmoe-emulated-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    assert path.stat().st_uid == os.getuid(), f"{path} belongs to someone else"
    return path


def compiled(text: str, folder: Path) -> Path:
    """The library of a kernel's text, compiled unless it is in the cache."""
    headers = "".join(path.read_text() for path in (HEADER, *sorted(KERNELS.glob("*.cuh"))))
    key = hashlib.sha256("\0".join((*COMPILE, text, headers)).encode()).hexdigest()[:32]
    library = cache_directory() / f"{key}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
        source, built = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.o"
        source.write_text(text)
        includes = ("-I", str(HEADER.parent), "-I", str(KERNELS), "-I", str(folder))
        run_compiler((*COMPILE, *includes, str(source), "-o", str(built)))
        linked = Path(scratch) / "kernel.so"
        run_compiler(("g++", "-shared", "-Wl,-z,defs", str(built), "-o", str(linked), "-lm"))
        linked.replace(library)
    return library


def run_compiler(command: Sequence[str]) -> None:
    """Run g++ and raise what it complains about."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise EmulatorError("\n".join(result.stderr.splitlines()[:40]))


def library_of(file: str, name: str, defines: Mapping[str, int | float | str]) -> Library:
    """The loaded library of a kernel with these macros."""
    text = source_text(file, name, defines)
    path = compiled(text, (KERNELS / file).parent)
    if path.name not in _libraries:
        _libraries[path.name] = Library(path)
    return _libraries[path.name]


def address_of(array: np.ndarray) -> int:
    """Where an array's bytes begin."""
    return int(array.__array_interface__["data"][0])


def run_once(
    library: Library,
    arrays: Sequence[np.ndarray],
    outputs: Sequence[jax.ShapeDtypeStruct],
    numbers: Mapping[str, object],
    aliases: Mapping[int, int],
) -> list[np.ndarray]:
    """One run of the whole grid."""
    results = [np.empty(output.shape, output.dtype) for output in outputs]
    shared_with = {result: array for array, result in aliases.items()}
    entries = [_Array(address_of(array), None, array.nbytes, -1, 0) for array in arrays]
    for i, result in enumerate(results):
        entries.append(_Array(None, address_of(result), result.nbytes, shared_with.get(i, -1), 0))
    message = ctypes.create_string_buffer(4096)
    stacks = ctypes.addressof(ctypes.c_char.from_buffer(_stacks))
    launch = _Launch(
        num_arrays=len(entries),
        arrays=(_Array * len(entries))(*entries),
        stacks=stacks,
        message=ctypes.addressof(message),
        message_size=len(message),
        num_stacks=NUM_STACKS,
        **numbers,
    )
    if not library.run(ctypes.byref(launch)):
        raise EmulatorError(message.value.decode() + source_line(library, launch.code_address))
    return results


def source_line(library: Library, offset: int) -> str:
    """Where in the source the instruction is that lies `offset` bytes from the start of .bss."""
    if not offset:
        return ""
    symbols = subprocess.run(("nm", str(library.path)), capture_output=True, text=True, check=False).stdout
    start = re.search(r"^([0-9a-f]+) . __bss_start$", symbols, re.M)
    if not start:
        return ""
    command = ("addr2line", "-Csi", "-e", str(library.path), hex(int(start[1], 16) + offset))
    places = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    return " at " + " in ".join(place for place in places if place)


def run_launch(
    library: Library,
    arrays: Sequence[np.ndarray],
    outputs: Sequence[jax.ShapeDtypeStruct],
    numbers: Mapping[str, object],
    aliases: Mapping[int, int],
) -> tuple[np.ndarray, ...]:
    """Run a kernel's first launch of a shape in both orders of threads and blocks; later they alternate."""
    for array, result in aliases.items():
        same = (arrays[array].shape, arrays[array].dtype) == (outputs[result].shape, outputs[result].dtype)
        assert same, f"input {array} and output {result} are to share memory, but differ in shape or dtype"
    arrays = [np.ascontiguousarray(array) for array in arrays]
    with _lock:
        count = library.num_launches[str(numbers)]
        results = run_once(library, arrays, outputs, {**numbers, "reversed": count % 2}, aliases)
        if count == 0:
            again = run_once(library, arrays, outputs, {**numbers, "reversed": 1}, aliases)
            for i, (one, other) in enumerate(zip(results, again, strict=True)):
                if one.tobytes() != other.tobytes():
                    raise EmulatorError(f"output {i} depends on the order of threads or blocks")
        library.num_launches[str(numbers)] += 1
    return tuple(results)


def emulated_launch(
    file: str,
    name: str,
    defines: Mapping[str, int | float | str],
    arrays: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, int, int],
    threads: int,
    shared_size: int = 0,
    number: int = 0,
    aliases: Mapping[int, int] | None = None,
) -> tuple[Array, ...]:
    """`jaxmoe.kernels.ptx.launch` on the CPU; raises EmulatorError for what a GPU would not forgive."""
    library = library_of(file, name, {**defines, "SHARED_SIZE": shared_size})
    numbers = {"grid": grid, "threads": threads, "shared_size": shared_size, "number": number}
    run = functools.partial(
        run_launch, library, outputs=outputs, numbers=numbers, aliases=dict(aliases or {})
    )
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return tuple(jax.pure_callback(lambda *a: run([np.asarray(x) for x in a]), tuple(outputs), *arrays))
    return tuple(jax.numpy.asarray(result) for result in run([np.asarray(array) for array in arrays]))
