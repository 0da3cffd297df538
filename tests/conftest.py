"""Files that many tests read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from reference import Network, read_network

from tools.synth_gguf import write_synthetic

if TYPE_CHECKING:
    from jaxmoe.model import Decoder
    from jaxmoe.step import Steps

# JAX reads these when it is first imported, here and in the servers that tests start
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset in F32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-F32.gguf"
    write_synthetic(path, "tiny", "F32")
    return path


@pytest.fixture(scope="session")
def tiny_q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset in Q4_K_M."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-Q4_K_M.gguf"
    write_synthetic(path, "tiny", "Q4_K_M")
    return path


@pytest.fixture(scope="session")
def tiny_network(tiny_gguf: Path) -> Network:
    """The reference's form of `tiny_gguf`."""
    return read_network(tiny_gguf)


@pytest.fixture(scope="session")
def tiny_model(tiny_gguf: Path) -> Decoder:
    """The decoder of `tiny_gguf`, in this backend's layout."""
    from on_device import open_model

    return open_model(tiny_gguf)[0]


@pytest.fixture(scope="session")
def tiny_steps(tiny_gguf: Path) -> Steps:
    """Warm steps of `tiny_gguf` with 16 slots; who uses them resets them first."""
    from on_device import open_steps

    steps = open_steps(tiny_gguf)
    steps.warm()
    return steps


@pytest.fixture(scope="session")
def tiny_q4_steps(tiny_q4: Path) -> Steps:
    """Steps of `tiny_q4` with 16 slots and small chunks; who uses them resets them first."""
    from on_device import open_steps

    return open_steps(tiny_q4, prefill_chunk=64)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on the CPU, compiled by g++."""
    import emulator

    from jaxmoe.kernels import ptx

    why = emulator.unavailable()
    if why is not None:
        pytest.skip(why)
    monkeypatch.setattr(ptx, "launch", emulator.emulated_launch)
    monkeypatch.setattr(ptx, "unavailable", lambda: None)
    # few blocks, with some work each
    monkeypatch.setattr(ptx, "num_multiprocessors", lambda: 6)


@pytest.fixture
def use_older(emulated: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, a GPU below 9.0 is emulated: without bulk copies and clusters."""
    import emulator

    from jaxmoe.kernels import ptx

    def use() -> None:
        monkeypatch.setattr(emulator, "ARCH", 800)
        monkeypatch.setattr(ptx, "has_clusters", lambda: False)

    return use


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what compiles kernels: the interpreter's version makes no difference there."""
    for item in items:
        if "emulated" in getattr(item, "fixturenames", ()) or item.path.stem == "test_ptx":
            item.add_marker(pytest.mark.kernels)
