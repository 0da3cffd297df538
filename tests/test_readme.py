"""The README's commands, executed as they stand there, in a fresh copy of the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
URL = "http://127.0.0.1:8000"
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "out")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and why it is not run here, if so."""

    language: str
    text: str
    not_run: str | None


def blocks(text: str) -> list[Block]:
    """The sh and python blocks of a README; a comment `<!-- not run: why -->` before one says so."""
    found = re.findall(r"(?ms)^(?:<!-- not run: ([^>]*?) -->\n)?```(sh|python)\n(.*?)^```$", text)
    return [Block(language, code, reason or None) for reason, language, code in found]


BLOCKS = blocks((ROOT / "README.md").read_text("utf-8"))
SHELL = [block.text.strip() for block in BLOCKS if block.language == "sh"]


def block_with(*words: str) -> str:
    """The one block that is run and has all these words."""
    found = [
        block.text for block in BLOCKS if not block.not_run and all(word in block.text for word in words)
    ]
    assert len(found) == 1, f"{len(found)} blocks have {words}"
    return found[0]


def test_a_block_is_found_with_its_reason() -> None:
    text = "```sh\none\n```\n\n<!-- not run: no GPU -->\n```python\ntwo\nthree\n```\n"
    assert blocks(text) == [Block("sh", "one\n", None), Block("python", "two\nthree\n", "no GPU")]


def test_only_what_needs_a_gpu_a_model_or_a_hub_is_left_out() -> None:
    assert {block.not_run for block in BLOCKS} <= {None, "a GPU", "a large file", "the hub"}


def test_the_test_command_is_what_ci_runs() -> None:
    command = block_with("tools.check")
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    for part in ("-m venv", "bin/activate", "pip install", "-e '.[dev]'", "python -m tools.check"):
        assert part in command
        assert part in ci


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without what is built, kept or hidden."""
    place = tmp_path_factory.mktemp("readme") / "jaxmoe"
    shutil.copytree(ROOT, place, ignore=LEFT_OUT)
    return place


def environment(checkout: Path) -> dict[str, str]:
    """What a user's shell has: none of this process's own Python."""
    own = str(Path(sys.executable).parent)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAXMOE_", "PYTHON"))}
    paths = [path for path in kept["PATH"].split(os.pathsep) if path != own]
    base = str(Path(sys.base_prefix) / "bin")
    compiled = str(checkout.parent / "compiled")  # nothing kept from an earlier start
    return {**kept, "PATH": os.pathsep.join([base, *paths]), "JAX_COMPILATION_CACHE_DIR": compiled}


@contextmanager
def running(command: str, checkout: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a shell, ended with all that it started."""
    with open(checkout.parent / "log", "w") as log:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=checkout, env=environment(checkout), stdout=log,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # what has ended by itself says why
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def is_up() -> bool:
    try:
        with urllib.request.urlopen(f"{URL}/health", timeout=5):
            return True
    except (OSError, urllib.error.HTTPError):
        return False


@pytest.fixture(scope="module")
def served(checkout: Path) -> Iterator[Path]:
    """The checkout whose first command is running and whose server is up."""
    assert not is_up(), f"something else answers at {URL}"
    with running(SHELL[0], checkout) as process:
        end = time.monotonic() + 240
        while not is_up():
            log = (checkout.parent / "log").read_text()
            assert process.poll() is None, log
            assert time.monotonic() < end, log
            time.sleep(0.2)
        yield checkout


def shell(command: str, checkout: Path) -> str:
    """What a command prints in a shell of its own, as a second terminal would."""
    done = subprocess.run(
        ["bash", "-c", f". .venv/bin/activate && {command}"], cwd=checkout, env=environment(checkout),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_is_there(served: Path) -> None:
    with urllib.request.urlopen(URL) as response:
        assert b"<title>jaxmoe</title>" in response.read()


def test_the_stream_brings_the_answer_token_by_token(served: Path) -> None:
    lines = shell(block_with("curl -N"), served).splitlines()
    assert lines[-2] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    pieces = [choice["delta"].get("content") for event in events for choice in event["choices"]]
    said = [piece for piece in pieces if piece]
    assert len(said) > 1
    assert "42" in "".join(said)


def test_the_openai_client_works(served: Path) -> None:
    # with the test's own interpreter: the server's environment has no client
    done = subprocess.run(
        [sys.executable, "-c", block_with("from openai")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout


def test_the_engine_works_without_a_server(served: Path) -> None:
    script = served.parent / "engine.py"
    script.write_text(block_with("from jaxmoe import LLM"))
    assert "42" in shell(f"python {script}", served)


def test_every_other_command_runs(served: Path) -> None:
    elsewhere = ("curl", "tools.check")
    rest = [block for block in BLOCKS[1:] if block.language == "sh" and not block.not_run]
    rest = [block for block in rest if not any(word in block.text for word in elsewhere)]
    assert rest
    for block in rest:
        assert "42" in shell(block.text, served), "each of them asks for a sum"
