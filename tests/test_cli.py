"""The command `jaxmoe`: its subcommands in this process, and real ones under a pseudo-terminal."""

from __future__ import annotations

import builtins
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fake_model import fake_llm

import jaxmoe
from jaxmoe import cli, demo, display, terminal
from jaxmoe.display import PhaseBars, parse_size, printable, size_text
from jaxmoe.llm import Event
from jaxmoe.terminal import Answer
from tools.synth_gguf import write_synthetic

ROOT = Path(__file__).parents[1]
THINK, END_THINK, END = 508, 509, 507  # of the tiny vocabulary


# The command itself.


def test_the_installed_command_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"jaxmoe": "jaxmoe.cli:main"}


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(
        f"  {name} " in printed and command.summary in printed for name, command in cli.COMMANDS.items()
    )
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("jaxmoe ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: jaxmoe {name} ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["chat", "m.gguf", "--temperature", "3"], "temperature must be at least 0 and at most 2, got 3"),
        (["chat", "m.gguf", "--context-length", "0"], "context_length must be an integer between 1"),
        (["chat", "m.gguf", "--cache-size", "much"], "--cache-size: invalid parse_size value: 'much'"),
        (["serve", "m.gguf", "--slots", "none"], "JAXMOE_SLOTS='none'"),
        (["inspect"], "required: MODEL.gguf"),
        (["pull"], "required: hf:OWNER/REPO[:QUANT]"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chat", "inspect"])
def test_a_file_that_is_none_is_said_in_a_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "red\x1b[31m.gguf").write_bytes(b"GGML")
    assert cli.main([name, str(tmp_path / "red\x1b[31m.gguf")]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith(
        f"jaxmoe {name}: {tmp_path}/red\\x1b[31m.gguf: at byte 0: not a GGUF"
    )
    assert cli.main([name, "hf:owner/repo:Q8_0"]) == 1
    said = "hf:owner/repo:Q8_0 is no file: download it first, by jaxmoe pull hf:owner/repo:Q8_0"
    assert capsys.readouterr().err == f"jaxmoe {name}: {said}\n"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 1)])
def test_ctrl_c_and_a_reader_that_leaves_end_it_quietly(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr("jaxmoe.inspect_file.main", fail)
    stdout = os.dup(1)
    try:
        assert cli.main(["inspect", "m.gguf"]) == status
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    assert capfd.readouterr().err.strip() == ""


def test_the_demo_model_is_named_or_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "_FILE", tmp_path / "demo.gguf")
    with pytest.raises(
        FileNotFoundError, match=r"the embedded demo model is not there \(.*demo\.gguf\): name a"
    ):
        jaxmoe.demo_model()
    (tmp_path / "demo.gguf").touch()
    assert jaxmoe.demo_model() == tmp_path / "demo.gguf"


# What is displayed.


def test_control_characters_become_escapes() -> None:
    assert printable("a\tb\nc é 👩‍👧 好") == "a\tb\nc é 👩‍👧 好"
    assert printable("\x1b[2J\r\x00\x7f\x9b\u202e\u2066") == "\\x1b[2J\\x0d\\x00\\x7f\\x9b\\u202e\\u2066"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (18_556_686_000, "17.28 GiB"),
        (1 << 50, "1024 TiB"),
    ],
)
def test_sizes_are_written_with_a_unit(size: int, text: str) -> None:
    assert size_text(size) == text


def test_sizes_are_read() -> None:
    assert [parse_size(text) for text in ("0", "7", "2k", "80GiB")] == [0, 7, 2048, 80 << 30]
    for text in ("", "B", "GiB", "1e3", "4 apples"):
        with pytest.raises(ValueError, match=re.escape(f"got {text!r}")):
            parse_size(text)


def test_phases_are_lines_where_nobody_watches_and_bars_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(said: list[str]) -> None:
        bars = PhaseBars(said.append)
        for phase, fraction in (("loading", 0.0), ("loading", 0.5), ("loading", 1.0), ("ready", 1.0)):
            bars(phase, fraction)

    said: list[str] = []
    report(said)
    assert said == ["loading", "ready"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(display.sys.stderr, "isatty", lambda: True)
    said.clear()
    report(said)
    assert said == []
    assert "loading: 100%" in capsys.readouterr().err


# Chatting, over a stand-in for the device.


class Model:
    """A model that gives scripted answers; `asked` are the messages and whether it was to think."""

    opening: list[int] = []  # noqa: RUF012 - ends every prompt
    on_read: Callable[[int], None] = staticmethod(lambda _: None)

    def __init__(self, path: Path, answers: list[str | list[int]]) -> None:
        self.asked: list[tuple[list[dict[str, str]], bool | None]] = []
        self.seeds: list[int] = []
        self._length = 0
        self._answers = answers
        self.llm = fake_llm(path, self._next_id)
        self.llm.steps.on_read = self.on_read  # type: ignore[attr-defined]
        self._encode_chat = self.llm.encode_chat
        self.llm.encode_chat = self._encode  # type: ignore[method-assign]

    def _encode(self, messages: list[dict[str, Any]], *, enable_thinking: bool | None = None) -> list[int]:
        self.asked.append((messages, enable_thinking))
        ids = self._encode_chat(messages, enable_thinking=enable_thinking) + self.opening
        self._length = len(ids)
        return ids

    def _next_id(self, known: Any, seed: int) -> int:
        answer = self._answers[len(self.asked) - 1]
        ids = self.llm.tokenizer.encode(answer, parse_special=False) if isinstance(answer, str) else answer
        return [*ids, END][min(len(known) - self._length, len(ids))]

    def ids(self, text: str) -> list[int]:
        return self.llm.tokenizer.encode(text, parse_special=False)


Chatting = Callable[..., tuple[int, Model]]


@pytest.fixture
def chatting(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Chatting:
    """Runs `jaxmoe chat` on lines of stdin and a model with these answers."""

    def chat(
        lines: str | io.StringIO | io.TextIOWrapper, answers: list[Any], *options: str
    ) -> tuple[int, Model]:
        model = Model(tiny_gguf, answers)
        monkeypatch.setattr(terminal, "LLM", lambda *_: model.llm)
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines) if isinstance(lines, str) else lines)
        return cli.main(["chat", str(tiny_gguf), *options]), model

    return chat


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_piped_lines_are_turns_of_one_conversation(
    chatting: Chatting, capsys: pytest.CaptureFixture[str]
) -> None:
    status, model = chatting("hello\n\n who is it?\n", ["one two", "three\n"])
    assert status == 0
    assert capsys.readouterr().out == "one two\nthree\n"
    assert model.asked == [
        ([user("hello")], None),
        ([user("hello"), assistant("one two"), user("who is it?")], None),
    ]


def test_commands_change_what_is_asked(chatting: Chatting, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "a\n/system Be short.\n/think off\nb\n/new\n/think on\n/system\nc\n/help\n/exit\nd\n"
    status, model = chatting(lines, ["1", "2", "3"], "--system", "Be long.", "--no-think")
    system = {"role": "system", "content": "Be long."}
    assert status == 0
    assert model.asked == [
        ([system, user("a")], False),
        ([{**system, "content": "Be short."}, user("a"), assistant("1"), user("b")], False),
        ([user("c")], True),
    ]
    assert capsys.readouterr().out == f"1\n2\n3\n{terminal.HELP}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [("/sing", "/sing is no command"), ("/think yes", "/think takes on or off, got 'yes'")],
)
def test_a_wrong_command_ends_a_script_with_1(
    line: str, message: str, chatting: Chatting, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chatting(f"{line}\nhello\n", [])[0] == 1
    assert message in capsys.readouterr().err


def test_a_pipe_that_is_no_text_ends_with_what_is_wrong(
    chatting: Chatting, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    status, model = chatting(lines, [])
    assert (status, model.asked) == (1, [])
    assert "stdin must be utf-8 text, byte 0xe9" in capsys.readouterr().err


def test_thinking_is_left_out_of_a_pipe_and_of_the_history(
    chatting: Chatting, capsys: pytest.CaptureFixture[str], tiny_gguf: Path
) -> None:
    ids = Model(tiny_gguf, []).ids
    answer = [THINK, *ids("\nlet me see\n"), END_THINK, *ids("\n\nyes")]
    _, model = chatting("a\nb\n", [answer, "no"])
    assert capsys.readouterr().out == "yes\nno\n"
    assert model.asked[1][0][1] == assistant("yes")


def test_a_text_that_spells_the_mark_is_no_thinking(
    chatting: Chatting, capsys: pytest.CaptureFixture[str], tiny_gguf: Path
) -> None:
    ids = Model(tiny_gguf, []).ids
    chatting("a\n", [[*ids("<th"), *ids("ink> </think>"[:4]), *ids("x")]])
    assert capsys.readouterr().out == "<think>x\n"


def test_a_prompt_may_open_the_thinking(
    chatting: Chatting, capsys: pytest.CaptureFixture[str], tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = Model(tiny_gguf, []).ids
    monkeypatch.setattr(Model, "opening", [THINK, *ids("\n")])
    chatting("a\n", [[*ids("hm\n"), END_THINK, *ids("\n\nyes")]])
    assert capsys.readouterr().out == "yes\n"


def test_a_step_that_fails_ends_a_script_with_a_sentence(
    chatting: Chatting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise ValueError("out of order")

    monkeypatch.setattr(Model, "on_read", staticmethod(fail))
    assert chatting("a\n", ["yes"])[0] == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "jaxmoe chat: the generation failed: a step of the engine failed"


def test_control_characters_of_the_model_are_escaped(
    chatting: Chatting, capsys: pytest.CaptureFixture[str]
) -> None:
    chatting("a\n", ["\x1b]0;mine\x07\x1b[31mred\r"])
    assert capsys.readouterr().out == "\\x1b]0;mine\\x07\\x1b[31mred\\x0d\n"


def test_a_conversation_that_is_too_long_is_said(
    chatting: Chatting, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chatting("hello " * 2000, ["no"])[0] == 1
    said = capsys.readouterr().err
    assert re.search(
        r"the context holds 1024 tokens; the prompt has \d+ and one more must fit; /new starts over", said
    )
    assert chatting("hello", ["no"], "--max-tokens", "2000")[0] == 1
    assert "/new" not in capsys.readouterr().err


@pytest.mark.parametrize("last", [EOFError(), "/exit"])
def test_a_terminal_goes_on_after_a_mistake_and_is_told_how_it_went(
    last: str | EOFError, chatting: Chatting, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = Model(tiny_gguf, []).ids
    typed: list[str | EOFError] = ["/sing", "hello", last]
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(builtins, "input", lambda _: give(typed.pop(0)))
    monkeypatch.delenv("NO_COLOR", raising=False)
    answer = [THINK, *ids("\nlet me see\n"), END_THINK, *ids("\n\nyes\n")]
    status, _ = chatting(Terminal(), [answer])
    assert (status, typed) == (0, [])
    assert shown.getvalue().startswith("Synthetic tiny, 1024 tokens of context; /help lists the commands\n")
    assert "/sing is no command" in shown.getvalue()
    assert "\n\x1b[2mlet me see\x1b[0m\n\nyes\n" in shown.getvalue()
    times = r"\x1b\[2m\d+ tokens, [\d.]+ tokens/s, first after [\d.]+ s, \d+ of 1024 of context\x1b\[0m\n\n"
    assert re.search(times, shown.getvalue())


def test_no_color_means_none(chatting: Chatting, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("NO_COLOR", "1")
    ids = Model(tiny_gguf, []).ids
    chatting("a\n", [[THINK, *ids("hm"), END_THINK, *ids("yes")]])
    assert shown.getvalue().startswith("hm\n\nyes\n")
    assert "\x1b" not in shown.getvalue()


class Terminal(io.StringIO):
    """Something that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def give(typed: str | EOFError) -> str:
    if isinstance(typed, EOFError):
        raise typed
    return typed


def test_a_mark_that_comes_with_other_text_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer({1: "<think>", 2: "</think>"}, is_thinking=True, is_terminal=False)
    answer.add(Event("a\ufffd</think>\n", (7, 2)))
    answer.add(Event("\nb\n", (8,)))
    answer.end()
    assert (answer.content, capsys.readouterr().out) == ("\n\nb\n", "b\n")


# Real processes.


class Typist:
    """A user at a pseudo-terminal that is the controlling one of a real `jaxmoe`."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self.seen = ""
        self._own, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        # the first terminal that a session's leader opens is the one whose Ctrl-C it gets
        start = (
            "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); "
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, "-m", "jaxmoe", *arguments],
            cwd=ROOT,
            env={**os.environ, "XDG_CACHE_HOME": str(home), "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def interrupt_prompt(self) -> None:
        """Press Ctrl-C as late as people do: Python's readline overlooks one before it waits for a key."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        for _ in range(5):
            while stat.read_text().rpartition(")")[2].split()[0] != "S":
                time.sleep(0.01)
            time.sleep(0.03)
        self.type("\x03")

    def wait_for(self, pattern: str, seconds: float = 150) -> str:
        """What came up to the end of the pattern's first match, which is then done with."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < end, f"waited for {pattern!r}, got {self.seen[-2000:]!r}"
            self.read()
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def read(self) -> None:
        if select.select([self._own], [], [], 0.1)[0]:
            try:
                self.seen += os.read(self._own, 65536).decode("utf-8", "replace")
            except OSError:  # the other side is closed
                raise AssertionError(f"it ended with {self.process.wait()}: {self.seen[-2000:]!r}") from None

    def end(self) -> int:
        status = self.process.wait(30)
        with suppress(OSError):  # the other side is closed
            while True:
                self.seen += os.read(self._own, 65536).decode("utf-8", "replace")
        os.close(self._own)
        return status


@contextmanager
def typist(*arguments: str, home: Path) -> Iterator[Typist]:
    user = Typist(*arguments, home=home)
    try:
        yield user
    finally:
        if user.process.poll() is None:
            user.process.kill()
            user.end()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of compiled steps for these tests alone."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def long_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset with a context that takes longer to fill than it takes to press a key."""
    path = tmp_path_factory.mktemp("gguf") / "long.gguf"
    write_synthetic(path, "tiny", "F32", metadata={"qwen3moe.context_length": 16384})
    return path


@pytest.mark.e2e
def test_ctrl_c_stops_the_answer_and_then_the_program(long_gguf: Path, home: Path) -> None:
    with typist("chat", str(long_gguf), "--temperature", "0", home=home) as user:
        started = user.wait_for(r"16384 tokens of context; /help")
        assert "loading: 100%" in started
        assert "compiling: 100%" in started
        user.wait_for("> ")
        user.type("hello\r")
        user.wait_for(r"hello\r\n\S*[^\x1b]{40}")
        user.type("\x03")
        user.wait_for(r"\d+ tokens, .*, stopped")
        user.wait_for("> ")
        user.type("half a line")
        user.wait_for("line")
        user.interrupt_prompt()
        user.wait_for("> ")
        user.type("\x1b[A")  # the last line again
        user.wait_for("hello")
        user.type("\r")
        user.wait_for(r"\r\n\S*[^\x1b]{40}")
        user.type("\x03")
        user.wait_for("stopped")
        user.wait_for("> ")
        user.interrupt_prompt()
        assert user.end() == 130
        assert "Traceback" not in user.seen


@pytest.mark.e2e
def test_ctrl_c_ends_a_load(tiny_gguf: Path, home: Path) -> None:
    with typist("chat", str(tiny_gguf), home=home) as user:
        user.wait_for("loading")
        user.type("\x03")
        assert user.end() == 130


@pytest.mark.e2e
def test_serve_says_where_the_page_is(long_gguf: Path, home: Path) -> None:
    command = [sys.executable, "-m", "jaxmoe", "serve", str(long_gguf), "--port", "0", "--slots", "1"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(home)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "serving" in line:
                    break
            found = re.search(r"serving Synthetic tiny: chat at (http://127\.0\.0\.1:\d+/)$", lines[-1])
            assert found, lines
            with urllib.request.urlopen(f"{found[1]}health") as response:
                assert response.status == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert any("loading" in line for line in lines), lines
