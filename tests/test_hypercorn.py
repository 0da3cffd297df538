"""The app in a real hypercorn process: what only sockets can show.

Most of it is over a stand-in for the device, the last part over the real steps.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import openai
import pytest

from tools.launch import launch

pytestmark = pytest.mark.e2e

TESTS = Path(__file__).parent
HELLO: Any = [{"role": "user", "content": "hello"}]
LONG = {"messages": HELLO, "max_tokens": 900, "ignore_eos": True, "stream": True}


class Process:
    """A server process of our own."""

    def __init__(self, command: list[str], port: int, **environment: str) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        paths = f"{TESTS.parent}{os.pathsep}{TESTS}"
        self.popen = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=TESTS,
            env={**os.environ, "PYTHONPATH": paths, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def health(self) -> dict[str, Any] | None:
        return health_at(self.url)

    def wait_for(self, **wanted: Any) -> dict[str, Any]:
        return self.wait(30, **wanted)

    def wait(self, seconds: float, **wanted: Any) -> dict[str, Any]:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            health = self.health()
            if health is not None and {**health, **wanted} == health:
                return health
            assert self.popen.poll() is None, self.popen.communicate()[0]
            time.sleep(0.01)
        raise AssertionError(f"waited for {wanted}, got {health}")

    def wait_idle(self) -> None:
        """Well before 900 tokens in steps of 20 ms would be made."""
        self.wait(12, running=0, waiting=0, free_pages=256)

    def end(self, seconds: float = 20) -> tuple[int, str]:
        """Exit status and output."""
        output = self.popen.communicate(timeout=seconds)[0]
        return self.popen.returncode, output


def health_at(url: str) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        with error:
            return dict(json.load(error))
    except OSError:
        return None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def started(command: list[str], *, port: int, **environment: str) -> Iterator[Process]:
    process = Process(command, port, **environment)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            os.killpg(process.popen.pid, signal.SIGKILL)
        process.popen.communicate()


@contextmanager
def hypercorn(model: Path, *options: str, **environment: str) -> Iterator[Process]:
    port = free_port()
    command = ["hypercorn", "-b", f"127.0.0.1:{port}", *options, "fake_server:app"]
    with started(command, port=port, FAKE_MODEL=str(model), **environment) as process:
        yield process


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[Process]:
    with hypercorn(tiny_gguf, FAKE_STEP_SECONDS="0.02") as process:
        process.wait_for(status="ok")
        yield process


def post(process: Process, body: dict[str, Any], *, receive_buffer: int | None = None) -> socket.socket:
    """A connection that has sent a chat request."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", process.port))
    raw = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    connection.sendall(head.encode() + raw)
    return connection


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    received = b""
    while wanted not in received:
        piece = connection.recv(65536)
        assert piece, received[-2000:]
        received += piece
    return received


# HTTP/1.1.


def test_tokens_arrive_one_by_one(server: Process) -> None:
    times = []
    with post(server, {**LONG, "max_tokens": 40}) as connection:
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(65536)
            times.append(time.perf_counter())
    assert len(times) > 20
    assert times[-1] - times[0] > 0.1


@pytest.mark.parametrize("moment", [None, 0.0, 0.02])
@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_leaves_frees_everything(server: Process, moment: float | None, half: bool) -> None:
    connections = [post(server, LONG) for _ in range(40)]
    if moment is None:
        read_until(connections[0], b"data: ")
    else:
        time.sleep(moment)
    for connection in connections:
        connection.shutdown(socket.SHUT_WR) if half else connection.close()
    server.wait_idle()
    for connection in connections:
        connection.close()


@pytest.fixture(scope="module")
def verbose_server(tiny_gguf: Path) -> Iterator[Process]:
    """Every chunk is so long that a client which reads nothing is noticed at once."""
    environment = {"FAKE_STEP_SECONDS": "0.025", "FAKE_WRITE_SECONDS": "2", "JAXMOE_MODEL_ID": "m" * 50_000}
    with hypercorn(tiny_gguf, **environment) as process:
        process.wait_for(status="ok")
        yield process


def test_a_client_that_reads_nothing_is_given_up(verbose_server: Process) -> None:
    connections = [post(verbose_server, {**LONG, "n": 4}, receive_buffer=2048) for _ in range(4)]
    verbose_server.wait_for(running=16)
    verbose_server.wait_idle()
    for connection in connections:
        connection.close()


# HTTP/2 with prior knowledge.


class Http2:
    """One HTTP/2 connection; `window` is what the client lets the server send."""

    def __init__(self, process: Process, window: int = 1 << 20) -> None:
        self.socket = socket.create_connection(("127.0.0.1", process.port), timeout=20)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.h2.initiate_connection()
        self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def post(self, body: dict[str, Any]) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":path", "/v1/chat/completions"),
            (":scheme", "http"),
            (":authority", "localhost"),
            ("content-type", "application/json"),
        ]
        self.h2.send_headers(stream_id, headers)
        self.h2.send_data(stream_id, json.dumps(body).encode(), end_stream=True)
        self.flush()
        return stream_id

    def events(self, *, acknowledge: bool = True) -> list[Any]:
        events = self.h2.receive_data(self.socket.recv(65536))
        for event in events:
            if isinstance(event, h2.events.DataReceived) and acknowledge:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        self.flush()
        return list(events)


def test_http2_streams_and_ends(server: Process) -> None:
    connection, received, ended = Http2(server), b"", False
    connection.post({**LONG, "max_tokens": 30})
    while not ended:
        for event in connection.events():
            received += event.data if isinstance(event, h2.events.DataReceived) else b""
            ended = ended or isinstance(event, h2.events.StreamEnded)
    connection.socket.close()
    assert received.endswith(b"data: [DONE]\n\n")
    assert received.count(b'"content":') > 10


def test_http2_reset_frees_everything(server: Process) -> None:
    connection = Http2(server)
    streams = [connection.post(LONG) for _ in range(10)]
    while not any(isinstance(event, h2.events.DataReceived) for event in connection.events()):
        pass
    for stream_id in streams:
        connection.h2.reset_stream(stream_id)
    connection.flush()
    server.wait_idle()
    connection.socket.close()


def test_http2_closed_connection_frees_everything(server: Process) -> None:
    connection = Http2(server)
    for _ in range(10):
        connection.post(LONG)
    time.sleep(0.1)
    connection.socket.close()
    server.wait_idle()


def test_http2_client_that_takes_nothing_is_given_up(verbose_server: Process) -> None:
    connection = Http2(verbose_server, window=1000)
    for _ in range(4):
        connection.post({**LONG, "n": 4})
    verbose_server.wait_for(running=16)
    verbose_server.wait_idle()
    connection.socket.close()


# OpenAI's client.


@pytest.fixture
def client(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as connected:
        yield connected


def test_openai_client_streams_what_it_gets_whole(client: openai.OpenAI) -> None:
    asked: Any = {"model": "any", "messages": HELLO, "max_completion_tokens": 20, "seed": 3}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage
    assert whole.usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].logprobs
    assert len(whole.choices[0].logprobs.content or []) == whole.usage.completion_tokens
    completion = client.completions.create(model="any", prompt="hello", max_tokens=5, seed=1)
    assert completion.choices[0].text
    assert [model.id for model in client.models.list()] == ["Synthetic tiny"]
    assert client.models.retrieve("Synthetic tiny").owned_by == "jaxmoe"


def test_openai_client_knows_our_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="any", messages=[], stream=True)
    assert bad.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="any", prompt=[1] * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_openai_client_that_breaks_off_frees_everything(server: Process, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="any", messages=HELLO, max_tokens=900, stream=True)
    next(iter(stream))
    stream.close()
    server.wait_idle()


async def test_twenty_streams_at_once(server: Process) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def ask(seed: int) -> list[tuple[float, str]]:
            stream = await client.chat.completions.create(
                model="any",
                messages=HELLO,
                max_tokens=30,
                seed=seed,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            return [(time.perf_counter(), c.choices[0].delta.content or "") async for c in stream]

        together = await asyncio.gather(*(ask(seed) for seed in range(20)))
        alone = await ask(7)
    texts = ["".join(text for _, text in events) for events in together]
    assert "".join(text for _, text in alone) == texts[7]
    assert len(set(texts)) == 20
    last_start = max(events[0][0] for events in together)
    first_end = min(events[-1][0] for events in together)
    assert last_start < first_end, "the streams ran one after the other"


# How the process ends.


@pytest.mark.parametrize("options", [(), ("-w", "0")])
def test_sigterm_ends_streams_after_a_grace_period(tiny_gguf: Path, options: tuple[str, ...]) -> None:
    environment = {"FAKE_STEP_SECONDS": "0.02", "JAXMOE_GRACE_SECONDS": "0.3"}
    with hypercorn(tiny_gguf, *options, **environment) as process:
        process.wait_for(status="ok")
        with post(process, LONG) as connection:
            read_until(connection, b"content")
            os.kill(process.popen.pid, signal.SIGTERM)
            tail = read_until(connection, b"[DONE]")
        assert b"the server is shutting down" in tail
        assert process.end()[0] == 0


def test_a_group_sigterm_is_graceful_too(tiny_gguf: Path) -> None:
    with hypercorn(tiny_gguf, FAKE_STEP_SECONDS="0.02", JAXMOE_GRACE_SECONDS="0.3") as process:
        process.wait_for(status="ok")
        with post(process, LONG) as connection:
            read_until(connection, b"content")
            os.killpg(process.popen.pid, signal.SIGTERM)
            assert b"the server is shutting down" in read_until(connection, b"[DONE]")
        assert process.end()[0] == 0


def test_a_worker_does_not_outlive_its_parent(tiny_gguf: Path) -> None:
    with hypercorn(tiny_gguf) as process:
        process.wait_for(status="ok")
        process.popen.kill()
        process.end()  # the worker holds the pipe until it ends
        assert process.health() is None


@pytest.mark.parametrize(("options", "status"), [((), 0), (("-w", "0"), 1)])
def test_a_failed_load_ends_the_process(tiny_gguf: Path, options: tuple[str, ...], status: int) -> None:
    with hypercorn(tiny_gguf, *options, FAKE_FAILURE="no such model") as process:
        process.wait_for(status="error", error="no such model")
        with socket.create_connection(("127.0.0.1", process.port)):  # which must not disturb the end
            ended, output = process.end()
    assert ended == status, "hypercorn with a worker process ends with 0, whatever the worker does"
    assert "the server failed: no such model" in output
    assert "Traceback" not in output


def test_two_workers_are_refused(tiny_gguf: Path) -> None:
    with hypercorn(tiny_gguf, "-w", "2") as process:
        assert "run one worker" in process.end()[1]


def test_sigterm_while_loading_ends_at_once(tiny_gguf: Path) -> None:
    with hypercorn(tiny_gguf, FAKE_LOAD_SECONDS="10") as process:
        process.wait_for(phase="loading")
        process.popen.terminate()
        status, output = process.end()
    assert status == 0
    assert "Traceback" not in output
    assert "ending while" not in output, "loading was not given up, but broken off"


def test_python_m_server_says_what_is_wrong(tmp_path: Path, tiny_gguf: Path) -> None:
    port = free_port()
    with started(["server", str(tmp_path / "none\x1b[31m.gguf"), "--port", str(port)], port=port) as process:
        status, output = process.end()
    assert status == 1
    assert "none\\x1b[31m.gguf" in output, "a name does not act on the terminal"
    assert "Traceback" not in output
    with (
        socket.create_server(("127.0.0.1", port)),
        started(["server", str(tiny_gguf), "--port", str(port)], port=port) as process,
    ):
        status, output = process.end()
    assert (status, output.strip()) == (1, f"cannot listen on 127.0.0.1:{port}: Address already in use")


@pytest.mark.parametrize(
    ("host", "key", "warns"), [("0.0.0.0", None, True), ("0.0.0.0", "k", False), ("127.0.0.1", None, False)]
)
def test_an_open_port_without_a_key_is_warned_of(
    host: str, key: str | None, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAXMOE_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("JAXMOE_API_KEY", key)
    port, missing = free_port(), str(tmp_path / "none.gguf")
    with started(["server", missing, "--host", host, "--port", str(port)], port=port) as process:
        _, output = process.end()
    assert ("JAXMOE_API_KEY asks for a key" in output) == warns


# The real steps.


@pytest.fixture(scope="module")
def real_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real") / "server.log"


@pytest.fixture(scope="module")
def real_url(tiny_gguf: Path, real_log: Path) -> Iterator[str]:
    environment = {
        "JAXMOE_SLOTS": "20",
        "JAXMOE_PREFILL_CHUNK": "64",
        "JAXMOE_COMPILATION_CACHE": "off",  # the user's own is no place for a test
    }
    with launch("server:app", tiny_gguf, log=real_log, seconds=120, environment=environment) as url:
        yield url


def is_idle(health: dict[str, Any] | None) -> bool:
    idle = {"running": 0, "waiting": 0}
    return health is not None and {**health, **idle, "free_pages": health["total_pages"]} == health


def test_the_log_says_once_what_runs_the_steps(real_url: str, real_log: Path) -> None:
    (line,) = (line for line in real_log.read_text().splitlines() if "steps" in line)
    assert re.search(r"\] (INFO|WARNING) steps: (CUDA kernels \(sm_\d+\)|XLA.* \(.*GPU.*\))$", line)


def test_real_steps_stream_what_they_give_whole(real_url: str) -> None:
    with openai.OpenAI(base_url=f"{real_url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": "any", "messages": HELLO, "max_tokens": 40, "seed": 3}
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_client_that_leaves_frees_the_real_steps(real_url: str) -> None:
    with openai.OpenAI(base_url=f"{real_url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": "any", "messages": HELLO, "max_tokens": 900, "seed": 3, "n": 8}
        stream = client.chat.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
        times = [time.perf_counter() for _, _ in zip(range(240), stream, strict=False)]
        stream.close()
    seconds_a_token = (times[-1] - times[80]) / (160 / 8)
    # Where nobody notices, 600 of the 900 are still to come by then.
    end = time.perf_counter() + 300 * seconds_a_token
    while not is_idle(health := health_at(real_url)):
        assert time.perf_counter() < end, health
        time.sleep(0.01)


async def test_twenty_real_streams_get_what_they_get_alone(real_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{real_url}/v1", api_key="none", max_retries=0) as client:

        async def ask(seed: int) -> str:
            asked: Any = {"model": "any", "max_tokens": 40, "seed": seed}
            messages: Any = [{"role": "user", "content": f"number {seed} " * (seed + 1)}]
            stream = await client.chat.completions.create(**asked, messages=messages, stream=True)
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason in ("stop", "length")
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        together = await asyncio.gather(*(ask(seed) for seed in range(20)))
        assert len(set(together)) == 20
        assert together == [await ask(seed) for seed in range(20)]
