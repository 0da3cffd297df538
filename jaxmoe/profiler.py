"""JAX's profiler: a trace of what runs in this process, on the device and on the host."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

KEEP_COMMAND_BUFFERS: Final = "--xla_enable_command_buffers_during_profiling=true"
_TRIAL_SECONDS: Final = 120.0


@contextmanager
def profile(directory: Path) -> Iterator[None]:
    """Write a trace of what runs meanwhile, in every thread, below `directory`, which is made.

    *.xplane.pb is for xprof, *.trace.json.gz for Perfetto. Raises OSError where `directory` cannot be made,
    RuntimeError while another trace is taken: JAX has one profiler a process.
    """
    import jax

    directory.mkdir(parents=True, exist_ok=True)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow every Python function down
    # on a CPU the operations are host events of the second level
    options.host_tracer_level = 2 if jax.default_backend() == "cpu" else 1
    jax.profiler.start_trace(str(directory), profiler_options=options)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def keep_command_buffers() -> bool:
    """Have XLA launch steps as command buffers while a trace is taken too; False where it does not know how.

    It turns them off otherwise, and a trace shows each kernel launched by itself. Holds for a process that
    has not used JAX yet, and for those that it starts.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if KEEP_COMMAND_BUFFERS in flags:
        return True
    if not accepts(KEEP_COMMAND_BUFFERS):
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {KEEP_COMMAND_BUFFERS}".strip()
    return True


def accepts(flag: str) -> bool:
    """Whether this XLA knows a flag: an unknown one ends the process, so another process tries it."""
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.block_until_ready(jax.numpy.zeros(1))"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, check=False, timeout=_TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
