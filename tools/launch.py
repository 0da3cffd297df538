"""A real hypercorn process with the server in it, for tools that measure from outside."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.environment import ROOT

HOST = "127.0.0.1"
STOP_SECONDS = 15.0


class LaunchError(Exception):
    """The server did not come up; the message ends with the last lines it wrote."""


@contextmanager
def launch(
    app: str, model: Path, *, log: Path, seconds: float = 1800.0, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Serve `model` with `hypercorn APP` on a free port, and yield the URL once /health says ok.

    What the server writes goes to the file `log`. Raises LaunchError when it ends or is not ready in time.
    """
    port = _free_port()
    settings = {"JAXMOE_MODEL": str(model.absolute()), "PYTHONPATH": _python_path(), **(environment or {})}
    inherited = {name: value for name, value in os.environ.items() if name != "JAXMOE_API_KEY"}
    command = [sys.executable, "-m", "hypercorn", app, "--bind", f"{HOST}:{port}"]
    with (
        log.open("wb") as written,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**inherited, **settings},
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as server,
    ):
        try:
            _wait_until_ready(server, port, log, seconds)
            yield f"http://{HOST}:{port}"
        finally:
            _stop(server)


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path, seconds: float) -> None:
    until = time.monotonic() + seconds
    while (health := _health(port)).get("status") != "ok":
        if health.get("status") == "error":
            raise LaunchError(f"the server failed: {health.get('error')}")
        if server.poll() is not None:
            raise LaunchError(f"the server ended with {server.returncode}: {_tail(log)}")
        if time.monotonic() > until:
            raise LaunchError(f"the server was not ready after {seconds:.0f} s: {_tail(log)}")
        time.sleep(0.1)


def _health(port: int) -> dict[str, object]:
    """The body of /health; {} while nobody answers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", "/health")
        found = json.loads(connection.getresponse().read())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, http.client.HTTPException):
        return {}
    finally:
        connection.close()


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-12:])


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then make the whole session end: hypercorn's worker outlives a killed parent."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
