"""Traces: of a running server with a real engine, and who may take one when."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from asgi_client import Exchange, health_when, until
from fake_model import fake_llm
from quart import Quart

from jaxmoe import LLM, EngineConfig, profiler
from server import backend
from server import profiler as server_profiler
from server.app import create_app
from server.settings import Settings

PROFILE, CHAT = "/debug/profile", "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 900, "ignore_eos": True}


async def post(app: Quart, path: str, **headers: str) -> Exchange:
    return await Exchange(app, "POST", path, headers=headers).end()


def app_of(llm: LLM, settings: Settings) -> Quart:
    return create_app(settings, load=lambda settings, progress: llm)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories of traces that have begun, and once more each that has ended; JAX's profiler stays off."""
    seen: list[Path] = []

    @contextmanager
    def profile(directory: Path) -> Iterator[None]:
        seen.append(directory)
        yield
        seen.append(directory)

    monkeypatch.setattr(server_profiler, "profile", profile)
    return seen


@pytest.mark.slow
async def test_a_running_server_is_traced(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_profiler, "MIN_SECONDS", 0.1)  # a CPU writes as many events a second as a GPU
    llm = LLM(tiny_gguf, EngineConfig(num_slots=1, context_length=1024, prefill_chunk=64))
    app = app_of(llm, Settings(profile_dir=tmp_path / "deep" / "traces"))
    async with app.test_app():
        await health_when(app, lambda health: health["status"] == "ok")
        stream = await Exchange(app, "POST", CHAT, {**LONG, "stream": True}).first_write()
        num_writes = len(stream.writes)
        taken = await post(app, PROFILE + "?seconds=0.2")
        assert len(stream.writes) > num_writes, "requests go on meanwhile"
        stream.leave()
        await stream.end()
    assert taken.status == 200, taken.json
    directory = Path(taken.json["directory"])
    assert directory.parent == tmp_path / "deep" / "traces"
    files = [directory / name for name in taken.json["files"]]
    assert {"".join(path.suffixes[-2:]) for path in files} == {".xplane.pb", ".json.gz"}
    assert all(path.stat().st_size > 1000 for path in files)
    assert taken.json["seconds"] >= 0.2
    assert str(directory) in taken.json["how_to_open"]
    with gzip.open(next(path for path in files if path.suffix == ".gz")) as written:
        names = {event.get("name", "") for event in json.load(written)["traceEvents"]}
    assert {"launch decode", "read", "deliver"} <= names
    assert any("fusion" in name for name in names), "operations of XLA's"


async def test_one_at_a_time_and_a_client_that_leaves_ends_it(
    tiny_gguf: Path, tmp_path: Path, traced: list[Path]
) -> None:
    app = app_of(fake_llm(tiny_gguf), Settings(profile_dir=tmp_path))
    async with app.test_app():
        await health_when(app, lambda health: health["status"] == "ok")
        first = Exchange(app, "POST", PROFILE + "?seconds=20")
        await until(lambda: len(traced) == 1)
        second = await post(app, PROFILE)
        assert (second.status, second.json["error"]["code"]) == (409, "profile_running")
        first.leave()
        await until(lambda: len(traced) == 2)
        await asyncio.wait([first.task])
        again = await post(app, PROFILE + "?seconds=1")
    assert again.status == 200
    assert traced[0] == traced[1] != traced[2]
    assert {path.parent for path in traced} == {tmp_path}


@pytest.mark.parametrize("seconds", ["0", "60.5", "-1", "nan", "inf", "ten", ""])
async def test_bad_seconds_are_named(tiny_gguf: Path, tmp_path: Path, seconds: str) -> None:
    app = app_of(fake_llm(tiny_gguf), Settings(profile_dir=tmp_path))
    async with app.test_app():
        await health_when(app, lambda health: health["status"] == "ok")
        answer = await post(app, f"{PROFILE}?seconds={seconds}")
    assert (answer.status, answer.json["error"]["param"]) == (400, "seconds")
    assert f"from 1 to 60, got {seconds!r}" in answer.json["error"]["message"]


async def test_it_is_off_unless_the_operator_names_a_directory(tiny_gguf: Path, traced: list[Path]) -> None:
    app = app_of(fake_llm(tiny_gguf), Settings())
    async with app.test_app():
        await health_when(app, lambda health: health["status"] == "ok")
        assert (await post(app, PROFILE)).status == 404
        assert (await Exchange(app, "GET", PROFILE).end()).status == 405
    assert traced == []


async def test_it_needs_the_key_and_a_directory_that_can_be_made(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    app = app_of(fake_llm(tiny_gguf), Settings(profile_dir=tmp_path / "file", api_key="k"))
    async with app.test_app():
        await health_when(app, lambda health: health["status"] == "ok")
        assert (await post(app, PROFILE)).status == 401
        answer = await post(app, PROFILE, authorization="Bearer k")
    assert answer.status == 500
    assert answer.json["error"]["message"] == "the trace cannot be written: Not a directory"


@pytest.mark.parametrize(
    ("known", "kept"), [(True, f"--a=1 {profiler.KEEP_COMMAND_BUFFERS}"), (False, "--a=1")]
)
def test_command_buffers_are_kept_where_xla_can(
    monkeypatch: pytest.MonkeyPatch, known: bool, kept: str
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    monkeypatch.setattr(profiler, "accepts", lambda flag: known)
    assert [profiler.keep_command_buffers() for _ in range(2)] == [known, known]
    assert os.environ["XLA_FLAGS"] == kept


@pytest.mark.slow
def test_an_unknown_flag_is_not_set() -> None:
    assert not profiler.accepts("--xla_no_such_flag=true")
    assert profiler.accepts("")


@pytest.mark.parametrize("directory", [None, Path("traces")])
def test_only_an_operator_who_traces_keeps_command_buffers(
    monkeypatch: pytest.MonkeyPatch, directory: Path | None
) -> None:
    asked: list[None] = []
    monkeypatch.setattr(backend, "keep_command_buffers", lambda: asked.append(None))
    with pytest.raises(ValueError, match=r"none\.gguf"):
        backend.load_llm(Settings(model="none.gguf", profile_dir=directory), lambda phase, share: None)
    assert len(asked) == (directory is not None)
