"""Where a measurement was taken: CPU, GPU, driver, JAX and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Environment = dict[str, str | bool | None]


def read_environment() -> Environment:
    """{cpu, gpu, driver, jax, commit, dirty}; None where there is no such thing. No path is in it.

    A tree that was exported from git is told its commit by the variable JAXMOE_COMMIT.
    """
    gpu, driver = _gpu()
    exported = os.environ.get("JAXMOE_COMMIT")
    status = "" if exported else _output("git", "status", "--porcelain")
    return {
        "cpu": _cpu(),
        "gpu": gpu,
        "driver": driver,
        "jax": _version("jax"),
        "commit": exported or _output("git", "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def host_name(environment: Environment) -> str:
    """The machine by what it computes with: the CPU's name, and the GPU's where there is one."""
    return " + ".join(str(environment[part]) for part in ("cpu", "gpu") if environment[part])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({len(names) or 1} threads)"


def _gpu() -> tuple[str | None, str | None]:
    listing = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if not listing:
        return None, None
    name, _, driver = listing.splitlines()[0].partition(",")
    return name.strip(), driver.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, "" when it prints nothing, None when it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
