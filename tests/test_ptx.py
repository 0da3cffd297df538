"""The compiler of the kernels, without a GPU: what is compiled, kept, refused and handed to XLA."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jaxmoe import kernels
from jaxmoe.config import ModelConfig
from jaxmoe.kernels import experts, ptx

ROOT = Path(__file__).parents[1]
ARCHES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
TARGET = "__gpu$xla.gpu.ptx"
PTX_VERSIONS = [
    *("6.4", "6.5", "7.0", "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "7.7", "7.8"),
    *("8.0", "8.1", "8.2", "8.3", "8.4", "8.5", "8.6", "8.7", "8.8"),
]


def config_of(**sizes: int) -> ModelConfig:
    return ModelConfig(**sizes, norm_eps=1e-6, rope_base=1e6, rope_scaling=None, name="shapes")


QWEN3_30B = config_of(
    num_layers=48, d_model=2048, num_heads=32, num_kv_heads=4, head_dim=128, num_experts=128,
    experts_per_token=8, expert_width=768, vocab_size=151936, context_length=40960,
)  # fmt: skip
SMALL = config_of(
    num_layers=3, d_model=256, num_heads=4, num_kv_heads=2, head_dim=64, num_experts=16,
    experts_per_token=4, expert_width=256, vocab_size=1003, context_length=512,
)  # fmt: skip
Variant = tuple[str, str, dict[str, int | float | str], int]


Table = Callable[[ModelConfig], Iterator[Variant]]


def tables() -> dict[str, Table]:
    """The variants of its kernels that a model needs, by the module that launches them."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    modules = {name: importlib.import_module(f"jaxmoe.kernels.{name}") for name in names}
    found = {name: module.variants for name, module in modules.items() if hasattr(module, "variants")}
    return {"ptx": lambda _: iter([("trial.cu", "trial", {}, 0)]), **found}


TABLES = tables()


def variants(wrapper: str, config: ModelConfig) -> list[Variant]:
    return list(TABLES[wrapper](config))


def one_of_each_kernel(rows: Sequence[Variant]) -> list[Variant]:
    return list({(row[0], row[1]): row for row in rows}.values())


def compiled(variant: Variant, arch: str) -> str:
    """The PTX that a launch hands to the driver."""
    file, name, defines, shared_size = variant
    return ptx.only(ptx.compile_ptx(file, {**defines, "SHARED_SIZE": shared_size}, arch), name)


def assembler() -> str | None:
    """The wheel's ptxas, or the one on the PATH."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [str(path) for folder in folders for path in sorted(Path(folder).glob("*/bin/ptxas"))]
    return found[0] if found else shutil.which("ptxas")


@dataclass(frozen=True)
class Assembled:
    accepted: bool
    log: str


Assemble = Callable[[str, str], Assembled]


@pytest.fixture(scope="session")
def assemble(tmp_path_factory: pytest.TempPathFactory) -> Assemble:
    """Assembles PTX for an architecture by ptxas."""
    program = assembler()
    if program is None:
        pytest.skip("no ptxas: install jaxmoe[dev]")

    def run(text: str, arch: str) -> Assembled:
        folder = tmp_path_factory.mktemp("ptxas")
        (folder / "kernel.ptx").write_text(text, "utf-8")
        command = [program, "-v", f"-arch={arch}", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        return Assembled(done.returncode == 0, done.stdout + done.stderr)

    return run


@pytest.fixture(autouse=True, scope="session")
def _compiler() -> None:
    try:
        ptx._nvrtc()
    except ptx.KernelError as error:
        pytest.skip(f"no NVRTC: {error}")


def forget() -> None:
    """What a new process has not: everything that ptx keeps in memory."""
    for function in (
        ptx.unavailable,
        ptx._compiled,
        ptx._source,
        ptx._nvrtc,
        ptx._directory,
        ptx._device_arch,
    ):
        getattr(function, "cache_clear", lambda: None)()


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_cache))
    forget()
    yield
    monkeypatch.undo()
    forget()


@dataclass
class Compilations:
    """A compile cache of a test's own, and how often NVRTC was asked to fill it."""

    directory: Path
    files: list[str] = field(default_factory=list)

    def kept(self) -> list[Path]:
        return sorted(self.directory.iterdir())


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compilations:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    seen = Compilations(tmp_path / "jaxmoe" / "ptx")
    compile_with_nvrtc = ptx._compile

    def counted(file: str, *args: Any) -> str:
        seen.files.append(file)
        return compile_with_nvrtc(file, *args)

    monkeypatch.setattr(ptx, "_compile", counted)
    return seen


def trial(arch: str = "sm_90", **defines: int | float | str) -> str:
    return ptx.compile_ptx("trial.cu", {"SHARED_SIZE": 0, **defines}, arch)


def write_trial(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Have the package's trial.cu read as another source."""
    sources = {"trial.cu": source} | {name: ptx._source(name) for name in ptx._HEADERS}
    monkeypatch.setattr(ptx, "_source", sources.__getitem__)


# --- every kernel


@pytest.mark.parametrize("wrapper", TABLES)
def test_every_variant_compiles_and_none_spills(wrapper: str, assemble: Assemble) -> None:
    def check(variant: Variant) -> str | None:
        done = assemble(compiled(variant, "sm_90"), "sm_90")
        # of the kernel and of each function that it calls
        spills = set(re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.log))
        return None if done.accepted and spills == {("0", "0")} else f"{variant}: {done.log}"

    with ThreadPoolExecutor(2) as pool:
        assert not [wrong for wrong in pool.map(check, variants(wrapper, QWEN3_30B)) if wrong]


@pytest.mark.parametrize("wrapper", TABLES)
def test_every_variant_of_a_small_model_compiles(wrapper: str) -> None:
    rows = variants(wrapper, SMALL)
    assert rows
    for variant in rows:
        assert re.findall(r"\.entry (\w+)", compiled(variant, "sm_90")) == [variant[1]]


def test_experts_of_more_rows_are_assembled_too(assemble: Assemble, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs of little shared memory: the tiles come from `group`."""
    monkeypatch.setattr(ptx, "shared_limit", lambda: ptx.SMALL_SHARED)
    assert experts.takes(100)
    monkeypatch.setattr(experts, "_VARIANTS", (100,))
    rows = list(experts.variants(SMALL))
    assert rows
    for file, name, defines, size in rows:
        assert "LISTED" in defines
        done = assemble(compiled((file, name, defines, size), "sm_89"), "sm_89")
        assert done.accepted, done.log


@pytest.mark.parametrize("arch", [arch for arch in ARCHES if arch != "sm_90"])
@pytest.mark.parametrize("wrapper", TABLES)
def test_each_kernel_is_assembled_for_each_architecture(
    wrapper: str, arch: str, assemble: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptx, "has_clusters", lambda: arch not in ("sm_80", "sm_89"))
    for variant in one_of_each_kernel(variants(wrapper, QWEN3_30B)):
        done = assemble(compiled(variant, arch), arch)
        assert done.accepted, f"{variant}: {done.log}"


@pytest.mark.parametrize(
    ("blocks", "kilobytes", "arch", "down"),
    [
        (132, 227, "sm_90", ["Q4_K", "Q4_K and Q6_K"]),
        (132, 163, "sm_80", ["Q4_K"]),
        (114, 227, "sm_90", ["Q4_K"]),
        (108, 227, "sm_90", ["Q4_K"]),
        *((blocks, 163, "sm_80", []) for blocks in (114, 108)),
        *((blocks, 99, "sm_89", []) for blocks in (132, 114, 108)),
    ],
)
def test_all_layers_in_one_launch_fit_a_gpu_or_are_refused(
    blocks: int,
    kilobytes: int,
    arch: str,
    down: list[str],
    assemble: Assemble,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ptx, "num_multiprocessors", lambda: blocks)
    monkeypatch.setattr(ptx, "shared_limit", lambda: kilobytes << 10)
    rows = variants("decode_row", QWEN3_30B)
    one_format = [row[2]["FORMAT_3"] == row[2]["FORMAT_7"] for row in rows]
    assert ["Q4_K" if one else "Q4_K and Q6_K" for one in one_format] == down
    for row in rows:
        done = assemble(compiled(row, arch), arch)
        assert done.accepted, f"{row}: {done.log}"
        (static,) = re.findall(r"(\d+) bytes smem", done.log)
        assert int(static) + row[3] <= kilobytes << 10


def test_every_source_is_in_a_table() -> None:
    sources = {path.name for path in Path(kernels.__path__[0]).glob("*.cu")}
    assert sources == {file for wrapper in TABLES for file, *_ in variants(wrapper, QWEN3_30B)}


# --- the PTX


def test_the_table_of_architectures_is_the_tested_one() -> None:
    assert tuple(f"sm_{number}" for number in ptx._PTX_VERSIONS) == ARCHES


@pytest.mark.parametrize("arch", ARCHES)
def test_the_ptx_version_is_the_lowest_that_does(
    arch: str, assemble: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trial(
        monkeypatch,
        '#include "common.cuh"\nKERNEL(32, 1) trial(int4* x) {'
        "__shared__ int4 a; __shared__ u64 b; copy_bulk(&a, x, 16, &b); wait_phase(&b, 0); x[1] = a; }",
    )
    text = trial(arch)
    assert ("nanosleep" in text) == (arch in ("sm_80", "sm_89"))  # others sleep while they look
    assert assemble(text, arch).accepted
    (version,) = re.findall(r"(?m)^\.version (.*)$", text)
    lower = PTX_VERSIONS[PTX_VERSIONS.index(version) - 1]
    log = assemble(ptx._with_version(text, lower), arch).log
    assert "does not support .target" in log or re.search(r"requires PTX ISA .version (7.1|8.0)", log)


def test_hints_of_newer_versions_are_left_out(assemble: Assemble) -> None:
    hint = '\t.pragma "used_bytes_mask 4095";\n'
    version = f".version {ptx._ptx_version('sm_90')}\n"
    text = trial("sm_90").replace("\tret;", f"{hint}\tret;", 1)
    assert "used_bytes_mask" in assemble(text, "sm_90").log
    older = ptx._with_version(text, ptx._ptx_version("sm_90"))
    assert version in older
    assert assemble(older, "sm_90").accepted


def test_only_the_named_kernel_is_left(monkeypatch: pytest.MonkeyPatch, assemble: Assemble) -> None:
    source = (
        '#include "common.cuh"\nKERNEL(32, 1) NAME(int* out) { __shared__ int a[32]; out[0] = a[out[1]]; }\n'
    )
    three = source.replace("NAME", "one") + source.replace("NAME", "one_more") + source.replace("NAME", "two")
    write_trial(monkeypatch, three)
    whole = trial()
    assert re.findall(r"\.entry (\w+)", whole) == ["one", "one_more", "two"]
    for name in ("one", "one_more", "two"):
        text = ptx.only(whole, name)
        assert re.findall(r"\.entry (\w+)", text) == [name]
        assert assemble(text, "sm_90").accepted
    with pytest.raises(
        ptx.KernelError, match="no kernel 'three' in what was compiled, but one, one_more, two"
    ):
        ptx.only(whole, "three")


def test_floats_are_float_literals_and_text_is_itself() -> None:
    defines: dict[str, Any] = {
        "NAME": "dense",
        "EPS": 1e-6,
        "ONE": np.float32(1),
        "K": np.int32(7),
        "F": True,
    }
    assert ptx.define_options(defines) == ["-DEPS=1e-06f", "-DF=1", "-DK=7", "-DNAME=dense", "-DONE=1.0f"]


@pytest.mark.parametrize("arch", ["sm_75", "sm_91"])
def test_an_architecture_without_kernels_is_refused(arch: str) -> None:
    with pytest.raises(ptx.KernelError, match=f"^kernels are not made for {arch}$"):
        trial(arch)


def test_a_source_that_does_not_compile_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "\n".join(f"int wrong_{i} = nothing_{i};" for i in range(40))
    write_trial(monkeypatch, lines)
    with pytest.raises(ptx.KernelError) as caught:
        trial(K=5)
    first, *log = str(caught.value).splitlines()
    assert first.startswith("trial.cu does not compile with --gpu-architecture=compute_90 ")
    assert first.endswith("-DK=5 -DSHARED_SIZE=0:")
    assert 'trial.cu(1): error: identifier "nothing_0" is undefined' in log[0]
    assert len(log) == ptx._LINES_OF_LOG


# --- what is kept


def test_a_kernel_is_compiled_once_and_then_read(compilations: Compilations) -> None:
    first = trial()
    assert trial() is first
    forget()
    assert trial() == first
    assert compilations.files == ["trial.cu"]


def test_what_is_kept_is_for_one_source_header_macros_and_architecture(
    compilations: Compilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {name: ptx._source(name) for name in ("trial.cu", *ptx._HEADERS)}
    trial()
    trial(K=1)
    trial("sm_80")
    for name in sources:
        changed = {**sources, name: sources[name] + "// changed\n"}
        forget()
        monkeypatch.setattr(ptx, "_source", changed.__getitem__)
        trial()
    monkeypatch.setattr(ptx, "_source", sources.__getitem__)
    forget()
    monkeypatch.setattr(ptx, "_nvrtc_version", lambda: (99, 0))
    trial()
    assert len(compilations.files) == len(compilations.kept()) == 3 + len(sources) + 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: whole.replace(b"ret;", b"bar;"),
        lambda whole: whole.replace(b"ret;", b"\xff\xff\xff;"),
    ],
    ids=["half", "empty", "changed", "no text"],
)
def test_a_damaged_file_is_not_trusted(compilations: Compilations, damage: Callable[[bytes], bytes]) -> None:
    whole = trial()
    (kept,) = compilations.kept()
    good = kept.read_bytes()
    kept.write_bytes(damage(good))
    assert kept.read_bytes() != good
    forget()
    assert trial() == whole
    assert len(compilations.files) == 2
    assert kept.read_bytes() == good


def test_a_file_that_cannot_be_written_leaves_nothing(
    compilations: Compilations, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert ".entry trial" in trial()
    assert compilations.kept() == []
    assert "a compiled kernel is not kept" in caplog.text


def test_a_directory_that_others_may_write_to_is_not_used(
    compilations: Compilations, caplog: pytest.LogCaptureFixture
) -> None:
    compilations.directory.mkdir(parents=True)
    compilations.directory.chmod(0o777)
    assert ".entry trial" in trial()
    assert compilations.kept() == []
    assert "compiled kernels are not kept" in caplog.text


def test_the_directory_is_the_users_own(compilations: Compilations) -> None:
    trial()
    assert compilations.directory.stat().st_mode & 0o777 == 0o700


# --- the launch


def shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, np.dtype(dtype))


def test_a_launch_becomes_one_custom_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def fake(*args: Any) -> str:
        asked.append(args)
        return ".visible .entry dense()\n{\n}\n"

    def call(x: Array, counters: Array) -> tuple[Array, ...]:
        return ptx.launch(
            "matmul_row.cu", "dense", {"K": 5}, [x, counters], [shape(np.float32, 8), shape(np.int32, 3)],
            grid=(2, 3, 4), threads=96, shared_size=64, number=5, aliases={1: 1},
        )  # fmt: skip

    monkeypatch.setattr(ptx, "_device_arch", lambda: "sm_90")
    monkeypatch.setattr(ptx, "compile_ptx", fake)
    text = jax.jit(call).lower(jnp.zeros(4), jnp.zeros(3, jnp.int32)).as_text()
    assert asked == [("matmul_row.cu", {"K": 5, "SHARED_SIZE": 64}, "sm_90")]
    (line,) = [line for line in text.splitlines() if TARGET in line]
    attributes = re.search(r"mhlo\.backend_config = \{(.*?)\}, operand_layouts", line)
    assert attributes is not None
    assert attributes[1] == (
        "block_x = 96 : i32, block_y = 1 : i32, block_z = 1 : i32, "
        "grid_x = 2 : i32, grid_y = 3 : i32, grid_z = 4 : i32, "
        r'kernel_data = ".visible .entry dense()\0A{\0A}\0A", kernel_type = "ptx", name = "dense", '
        "shared_mem_bytes = 69 : i32"
    )
    assert "output_tuple_indices = [1], operand_index = 1" in line
    assert line.endswith(": (tensor<4xf32>, tensor<3xi32>) -> (tensor<8xf32>, tensor<3xi32>)")


def test_many_launches_compile_once(compilations: Compilations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx, "_device_arch", lambda: "sm_90")

    def chain(x: Array) -> Array:
        for layer in range(400):
            (x,) = ptx.launch(
                "trial.cu", "trial", {}, [x], [shape(np.int32, 32)], grid=(1, 1, 1), threads=32, number=layer
            )
        return x

    text = jax.jit(chain).lower(jnp.zeros(32, jnp.int32)).as_text()
    assert text.count(f"custom_call @{TARGET}") == 400
    assert compilations.files == ["trial.cu"]


# --- whether kernels can run


@dataclass(frozen=True)
class FakeDevice:
    compute_capability: str
    device_kind: str = "NVIDIA H200"


def pretend(monkeypatch: pytest.MonkeyPatch, capability: str, backend: str = "gpu") -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [FakeDevice(capability)])


def fake_launch(error: Exception | None = None, wrong: int = 0) -> Callable[..., tuple[Array, ...]]:
    def launch(file: str, name: str, defines: Any, arrays: Any, outputs: Any, **numbers: Any) -> Any:
        if error:
            raise error
        return (arrays[0] + jnp.int32(numbers["number"] + wrong),)

    return launch


def test_the_cpu_runs_no_kernels() -> None:
    assert ptx.unavailable() == "kernels need an NVIDIA GPU, and jax runs on 'cpu'"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("7.5", "the GPU is of too old an architecture: sm_75, kernels need sm_80"),
        ("gfx90a", "kernels need an NVIDIA GPU, not NVIDIA H200"),
        ("8.0", None),
        ("12.1", None),
    ],
)
def test_the_gpu_must_be_new_enough(
    monkeypatch: pytest.MonkeyPatch, capability: str, reason: str | None
) -> None:
    pretend(monkeypatch, capability)
    monkeypatch.setattr(ptx, "launch", fake_launch())
    assert ptx.unavailable() == reason


def test_a_plugin_without_the_custom_call_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # the CPU backend has no such call: its error is a real one
    pretend(monkeypatch, "9.0")
    reason = ptx.unavailable()
    assert reason is not None
    assert reason.startswith("this jax does not run kernels in PTX: NOT_FOUND: ")
    assert TARGET in reason


def test_only_the_first_line_of_an_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "9.0")
    monkeypatch.setattr(ptx, "launch", fake_launch(RuntimeError("INTERNAL: one\ntwo")))
    assert ptx.unavailable() == "this jax does not run kernels in PTX: INTERNAL: one"


def test_a_wrong_result_of_the_trial_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "9.0")
    monkeypatch.setattr(ptx, "launch", fake_launch(wrong=1))
    assert ptx.unavailable() == "this jax runs kernels in PTX, but a small one gave a wrong result"


def test_the_trial_runs_inside_a_trace_too_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "9.0")
    launches: list[str] = []

    def counted(file: str, *args: Any, **numbers: Any) -> Any:
        launches.append(file)
        return fake_launch()(file, *args, **numbers)

    def traced(x: Array) -> Array:
        return x + (0 if ptx.unavailable() is None else 1)

    monkeypatch.setattr(ptx, "launch", counted)
    jax.jit(traced).lower(jnp.zeros(2))
    assert ptx.unavailable() is None
    assert launches == ["trial.cu"]


def test_without_nvrtc_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "9.0")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    reason = ptx.unavailable()
    assert reason is not None
    assert reason.startswith("kernels need NVRTC (")
    assert reason.endswith("): install jaxmoe[cuda12] or jaxmoe[cuda13]")


@pytest.mark.parametrize(
    "log",
    [
        "INTERNAL: CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the provided PTX was compiled by another toolchain",
        "INTERNAL: the provided PTX was compiled with an unsupported toolchain.",
        "ptxas application ptx input, line 9; fatal   : Unsupported .version 8.7; current version is '8.4'",
    ],
)
def test_a_driver_too_old_for_the_ptx_is_named(monkeypatch: pytest.MonkeyPatch, log: str) -> None:
    pretend(monkeypatch, "12.0")
    monkeypatch.setattr(ptx, "_driver_version", lambda: "of CUDA 12.4")
    reason = "the NVIDIA driver (of CUDA 12.4) does not read PTX 8.7, which sm_120 needs: a newer driver does"
    assert ptx.explain(RuntimeError(log)) == reason
    monkeypatch.setattr(ptx, "launch", fake_launch(RuntimeError(log)))
    assert ptx.unavailable() == reason


def test_other_errors_are_not_explained() -> None:
    assert ptx.explain(RuntimeError("RESOURCE_EXHAUSTED: out of memory")) is None


@pytest.mark.parametrize(("number", "text"), [(12040, "of CUDA 12.4"), (13000, "of CUDA 13.0")])
def test_the_drivers_version_is_read(monkeypatch: pytest.MonkeyPatch, number: int, text: str) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (0, number))
    assert ptx._driver_version() == text


def test_a_machine_without_a_driver_has_no_version() -> None:
    assert ptx._driver_version().startswith("of ")


def blocks_of_clusters() -> set[int]:
    """How many blocks the clusters of dense products of few rows have."""
    found = [defines for _, _, defines, _ in variants("matmul", QWEN3_30B) if "PEERS" in defines]
    return {int(defines["K_PARTS"]) * int(defines["PEERS"]) for defines in found}


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ("8.0", "sm_80"),
        ("8.6", "sm_80"),
        ("8.9", "sm_89"),
        ("9.0", "sm_90"),
        ("10.3", "sm_100"),
        ("12.1", "sm_120"),
    ],
)
def test_a_device_gets_the_newest_ptx_that_it_runs(
    monkeypatch: pytest.MonkeyPatch, capability: str, arch: str
) -> None:
    pretend(monkeypatch, capability)
    assert ptx._device_arch() == arch
    assert blocks_of_clusters() == ({2} if arch in ("sm_90", "sm_100") else {1})


@pytest.mark.parametrize(
    ("capability", "known", "arch"), [("12.0", [80, 86, 89, 90], "sm_90"), ("9.0", [80, 86, 89], "sm_89")]
)
def test_an_older_nvrtc_compiles_for_what_it_knows(
    monkeypatch: pytest.MonkeyPatch, capability: str, known: list[int], arch: str
) -> None:
    pretend(monkeypatch, capability)
    nvrtc = ptx._nvrtc()
    answer = (nvrtc.nvrtcResult.NVRTC_SUCCESS, known)
    monkeypatch.setattr(nvrtc, "nvrtcGetSupportedArchs", lambda: answer)
    assert ptx._device_arch() == arch
    assert blocks_of_clusters() == {1}


# --- what is installed


def test_the_package_takes_all_kernel_files_along() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    # tools run from the checkout
    folders = [path.parent for top in ("jaxmoe", "server") for path in (ROOT / top).rglob("__init__.py")]
    assert set(settings["packages"]) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    patterns = settings["package-data"]["jaxmoe.kernels"]
    others = [path for path in Path(kernels.__path__[0]).iterdir() if path.is_file() and path.suffix != ".py"]
    assert others
    assert not [path.name for path in others if not any(fnmatch(path.name, pattern) for pattern in patterns)]
