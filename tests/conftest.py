"""Files that many tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.synth_gguf import write_synthetic


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
