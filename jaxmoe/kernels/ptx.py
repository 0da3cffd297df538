"""CUDA kernels as XLA custom calls: NVRTC compiles a source to PTX, XLA launches it, the driver assembles it.

The name of the custom call is XLA's own and no public interface: only this file says it, and `unavailable`
tries it once. Sources are `jaxmoe/kernels/*.cu`; they include nothing but the headers beside them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from jax import Array

from jaxmoe.user_cache import private_directory

logger = logging.getLogger(__name__)

_TARGET: Final = "__gpu$xla.gpu.ptx"
_HEADERS: Final = ("common.cuh", "weights.cuh", "row.cuh", "choose.cuh", "attend.cuh", "rounding.cuh")
_OPTIONS: Final = ("--std=c++17", "-default-device", "--fmad=false")
# The architectures that are compiled for, and the oldest PTX version that can name each, has barriers of
# phases and, from 90 on, bulk copies; the kernels use nothing newer. NVRTC writes the version of its own
# release, which an older driver refuses. A GPU between two of them runs the PTX of the lower one. Source:
# NVIDIA, "PTX ISA", release notes.
_PTX_VERSIONS: Final = {80: "7.1", 89: "7.8", 90: "8.0", 100: "8.6", 120: "8.7"}
_OLDEST: Final = min(_PTX_VERSIONS)
_LARGE_SHARED: Final = 227 << 10
SMALL_SHARED: Final = 99 << 10
# Shared memory of a block by compute capability, in bytes; others have the small one. Source: NVIDIA, "CUDA
# C++ Programming Guide".
_SHARED_SIZES: Final = {
    **dict.fromkeys(("8.0", "8.7"), 163 << 10),
    **dict.fromkeys(("9.0", "10.0", "10.3"), _LARGE_SHARED),
}
_LINES_OF_LOG: Final = 12
_INSTALL: Final = "install jaxmoe[cuda12] or jaxmoe[cuda13]"
_TRIAL_NUMBER: Final = 7


class KernelError(RuntimeError):
    """A kernel that NVRTC does not compile or that needs more shared memory than there is, or no NVRTC."""


def launch(
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
    """Run kernel `name` of jaxmoe/kernels/`file`, compiled with macros `defines`, on the current device.

    The kernel's parameters are pointers: the input buffers, then the output ones. `aliases` {input: output}
    names the outputs that take an input's place. `shared_size` counts bytes of dynamic shared memory, which
    is macro SHARED_SIZE; the kernel reads `number` by launch_number<SHARED_SIZE>(). Raises KernelError.
    """
    text = compile_ptx(file, {**defines, "SHARED_SIZE": shared_size}, _device_arch())
    sizes = dict(zip(("grid_x", "grid_y", "grid_z", "block_x"), (*grid, threads), strict=True))
    sizes |= {"block_y": 1, "block_z": 1, "shared_mem_bytes": shared_size + number}
    attributes: dict[str, Any] = {key: np.int32(value) for key, value in sizes.items()}
    call = jax.ffi.ffi_call(_TARGET, tuple(outputs), input_output_aliases=dict(aliases or {}))
    return tuple(call(*arrays, name=name, kernel_type="ptx", kernel_data=only(text, name), **attributes))


@cache
def unavailable() -> str | None:
    """Why kernels cannot run on jax's default device, in one sentence, or None; found out once."""
    if jax.default_backend() != "gpu":
        return f"kernels need an NVIDIA GPU, and jax runs on {jax.default_backend()!r}"
    found = str(getattr(jax.devices()[0], "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d", found):
        return f"kernels need an NVIDIA GPU, not {jax.devices()[0].device_kind}"
    if _capability(found) < _OLDEST:
        return f"the GPU is of too old an architecture: sm_{_capability(found)}, kernels need sm_{_OLDEST}"
    try:
        return _trial()
    except KernelError as error:
        return str(error).splitlines()[0]
    except Exception as error:
        return explain(error) or f"this jax does not run kernels in PTX: {_first_line(error)}"


def _trial() -> str | None:
    """Run one small kernel, even while another function is traced."""
    with jax.ensure_compile_time_eval():
        numbers: Any = np.arange(32, dtype=np.int32)
        outputs = [jax.ShapeDtypeStruct((32,), np.dtype(np.int32))]
        (found,) = launch(
            "trial.cu", "trial", {}, [jax.numpy.asarray(numbers)], outputs,
            grid=(1, 1, 1), threads=32, number=_TRIAL_NUMBER,
        )  # fmt: skip
        if np.array_equal(np.asarray(found), numbers + _TRIAL_NUMBER):
            return None
    return "this jax runs kernels in PTX, but a small one gave a wrong result"


def shared_limit() -> int:
    """Bytes of shared memory that a block may have."""
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    return _SHARED_SIZES.get(capability, SMALL_SHARED)


def has_large_shared() -> bool:
    """Whether a block may have as much shared memory as any GPU gives."""
    return shared_limit() >= _LARGE_SHARED


def has_clusters() -> bool:
    """Whether blocks can be clusters: from sm_90 on, but for GPUs of little shared memory.

    What is compiled for decides too: NVRTC may be older than the GPU.
    """
    if not has_large_shared():
        return False
    return jax.default_backend() != "gpu" or int(_device_arch().removeprefix("sm_")) >= 90


def knows_multiprocessors() -> bool:
    """Whether the device says how many it has; without a GPU any number will do."""
    return jax.default_backend() != "gpu" or hasattr(jax.devices()[0], "core_count")


def num_multiprocessors() -> int:
    """How many the device has; 132 where there is no GPU."""
    return int(getattr(jax.devices()[0], "core_count", 132))


def explain(error: BaseException) -> str | None:
    """What to tell a user whose driver refuses the kernels' PTX, with both versions; None: other errors."""
    if not re.search(r"UNSUPPORTED_PTX_VERSION|unsupported toolchain|[Uu]nsupported \.version", str(error)):
        return None
    arch = _device_arch()
    needed = f"PTX {_ptx_version(arch)}, which {arch} needs"
    return f"the NVIDIA driver ({_driver_version()}) does not read {needed}: a newer driver does"


def _driver_version() -> str:
    try:
        from cuda.bindings import driver

        _, version = driver.cuDriverGetVersion()
        return f"of CUDA {version // 1000}.{version % 1000 // 10}"
    except Exception:
        return "of a version that cannot be found out"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@cache
def _device_arch() -> str:
    """The newest architecture, of those that NVRTC and the table know, whose PTX the device runs."""
    device = jax.devices()[0]
    capability = _capability(device.compute_capability)
    (supported,) = _checked(_nvrtc().nvrtcGetSupportedArchs())
    known = sorted(set(supported) & set(_PTX_VERSIONS))
    return f"sm_{known[bisect_right(known, capability) - 1]}"


def _capability(text: str) -> int:
    return int(text.replace(".", ""))


def _ptx_version(arch: str) -> str:
    version = _PTX_VERSIONS.get(int(arch.removeprefix("sm_")))
    if version is None:
        raise KernelError(f"kernels are not made for {arch}")
    return version


def compile_ptx(file: str, defines: Mapping[str, int | float | str], arch: str) -> str:
    """The PTX of jaxmoe/kernels/`file` with macros `defines` for an architecture such as "sm_90".

    Needs NVRTC, but no GPU and no driver. Kept in memory, and in a directory of the user's own. Raises
    KernelError with the first lines of NVRTC's log.
    """
    return _compiled(file, tuple(define_options(defines)), arch)


def define_options(defines: Mapping[str, int | float | str]) -> list[str]:
    """Macros as a compiler's options, sorted by name; a float becomes a float literal, never a double."""
    return [f"-D{name}={_literal(value)}" for name, value in sorted(defines.items())]


def _literal(value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{float(value)!r}f" if isinstance(value, float | np.floating) else str(int(value))


@cache
def _compiled(file: str, macros: tuple[str, ...], arch: str) -> str:
    source, headers, version = _source(file), [_source(name) for name in _HEADERS], _ptx_version(arch)
    options = (f"--gpu-architecture={arch.replace('sm', 'compute')}", *_OPTIONS, *macros)
    parts = (source, *headers, *options, repr(_nvrtc_version()), version)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    kept = _read(key)
    if kept is not None:
        return kept
    text = _with_version(_compile(file, source, headers, options), version)
    _write(key, text)
    return text


@cache
def _source(file: str) -> str:
    return (resources.files("jaxmoe.kernels") / file).read_text("utf-8")


def _compile(file: str, source: str, headers: Sequence[str], options: Sequence[str]) -> str:
    nvrtc = _nvrtc()
    (program,) = _checked(
        nvrtc.nvrtcCreateProgram(
            source.encode(),
            file.encode(),
            len(headers),
            [header.encode() for header in headers],
            [name.encode() for name in _HEADERS],
        )
    )
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelError(_complaint(file, options, program))
        (size,) = _checked(nvrtc.nvrtcGetPTXSize(program))
        text = bytearray(size)
        _checked(nvrtc.nvrtcGetPTX(program, text))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return text.rstrip(b"\0").decode()


def _complaint(file: str, options: Sequence[str], program: Any) -> str:
    nvrtc = _nvrtc()
    (size,) = _checked(nvrtc.nvrtcGetProgramLogSize(program))
    log = bytearray(size)
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    lines = [line for line in log.rstrip(b"\0").decode("utf-8", "replace").splitlines() if line.strip()]
    return "\n".join([f"{file} does not compile with {' '.join(options)}:", *lines[:_LINES_OF_LOG]])


@cache
def _nvrtc() -> Any:
    """NVIDIA's binding of NVRTC, with its library loaded."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:
        raise KernelError(f"kernels need NVRTC ({_first_line(error)}): {_INSTALL}") from error
    return nvrtc


def _nvrtc_version() -> tuple[int, int]:
    major, minor = _checked(_nvrtc().nvrtcVersion())
    return major, minor


def _checked(returned: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an NVRTC function gave, without its status."""
    status, *values = returned
    if status != _nvrtc().nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"NVRTC failed: {status.name}")
    return tuple(values)


def _with_version(text: str, version: str) -> str:
    """PTX of an older version: its own in the head, and without the hints that only newer ones know."""
    text, count = re.subn(r"(?m)^\.version .*$", f".version {version}", text, count=1)
    assert count == 1, "PTX without a version"
    return re.sub(r'(?m)^\s*\.pragma "used_bytes_mask.*$\n?', "", text)


@cache
def only(text: str, name: str) -> str:
    """PTX with no kernel but `name`: the driver assembles all that it is given, for every call."""
    names = re.findall(r"(?m)^\.visible \.entry (\w+)\(", text)
    if name not in names:
        raise KernelError(f"no kernel {name!r} in what was compiled, but {', '.join(names) or 'none'}")
    return re.sub(rf"(?ms)^\.visible \.entry (?!{re.escape(name)}\()\w+\(.*?^\}}$", "", text)


def _read(key: str) -> str | None:
    """What `_write` kept; None where there is nothing or it is not whole."""
    directory = _directory()
    if directory is None:
        return None
    try:
        digest, _, text = (directory / f"{key}.ptx").read_text("utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return text if digest == _digest(text) else None


def _write(key: str, text: str) -> None:
    """Keep a text under a name that appears only when all of it is written."""
    directory = _directory()
    if directory is None:
        return
    part = directory / f"{key}.{os.getpid()}.{threading.get_ident()}"
    try:
        part.write_text(f"{_digest(text)}\n{text}", "utf-8")
        part.replace(directory / f"{key}.ptx")
    except OSError as error:
        part.unlink(missing_ok=True)
        logger.warning("a compiled kernel is not kept: %s", error)


def _digest(text: str) -> str:
    return f"// sha256 {hashlib.sha256(text.encode()).hexdigest()}"


@cache
def _directory() -> Path | None:
    """A directory of the user's own for compiled kernels; None, with a warning, where that cannot be had."""
    try:
        return private_directory("ptx")
    except (OSError, RuntimeError) as error:
        logger.warning("compiled kernels are not kept: %s", error)
        return None
