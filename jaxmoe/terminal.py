"""`jaxmoe chat`: a conversation in the terminal, in this process."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from jaxmoe.config import EngineConfig
from jaxmoe.demo import demo_model
from jaxmoe.display import PhaseBars, parse_size, printable
from jaxmoe.llm import LLM, Event, Generation
from jaxmoe.request import EngineStopped, RequestError, SamplingParams

HELP: Final = """\
/new          forget the conversation
/system TEXT  give the model a system prompt; without a text, none
/think on     let a model think that can; /think off asks it not to
/exit         leave, as Ctrl-D does
/help         this list
Ctrl-C stops an answer; twice, or at an empty prompt, it leaves.
A message that begins with / goes after a space."""
_PROMPT: Final = "> "
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_THINK: Final = {"<think>": True, "</think>": False}
_SAMPLING: Final[Mapping[str, tuple[Callable[[str], float], str]]] = {
    "temperature": (float, "0 (always the likeliest token) to 2"),
    "top_p": (float, "up to 1"),
    "top_k": (int, "0 is off"),
    "min_p": (float, "from 0 to 1"),
    "seed": (int, "for the same answers again"),
    "max_tokens": (int, "the longest answer"),
}


class ChatError(ValueError):
    """An answer that could not be given, by no fault of the user's."""


def main(arguments: list[str], prog: str = "jaxmoe chat") -> int:
    """Chat until the user leaves; returns the exit status."""
    parser = _parser(prog)
    asked = parser.parse_args(arguments)
    sampling = {name: value for name in _SAMPLING if (value := getattr(asked, name)) is not None}
    try:
        SamplingParams(**sampling)
        engine = EngineConfig(num_slots=1, context_length=asked.context_length, cache_size=asked.cache_size)
    except ValueError as error:
        parser.error(str(error))
    with _leaving_at_once():
        llm = LLM(asked.model or os.environ.get("JAXMOE_MODEL") or demo_model(), engine, _bars())
    with llm:
        chat = Chat(llm, sampling, system=asked.system, thinking=False if asked.no_think else None)
        return chat.talk() if sys.stdin.isatty() and sys.stdout.isatty() else chat.read()


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Chat with a model in the terminal. Lines that are piped in are one turn each.",
        epilog="Sampling that is not given is what the file recommends.",
    )
    model_help = "a GGUF file (or JAXMOE_MODEL); without one the embedded demo model"
    parser.add_argument("model", metavar="MODEL.gguf", nargs="?", help=model_help)
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument("--no-think", action="store_true", help="ask a model that thinks not to")
    for name, (kind, text) in _SAMPLING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=text)
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens, at most the file's")
    size_help = "bytes of the KV cache, or a size such as 4GiB"
    parser.add_argument("--cache-size", type=parse_size, metavar="SIZE", help=size_help)
    return parser


def _bars() -> PhaseBars:
    return PhaseBars(lambda phase: print(phase, file=sys.stderr))


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """While a model loads, Ctrl-C ends the process: its threads inside XLA would hold up a clean end."""

    def leave(*_: object) -> NoReturn:
        print(file=sys.stderr, flush=True)
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Answer:
    """An answer on its way to the screen: thinking dimmed, or left out where nobody watches.

    `content` is what is not thinking.
    """

    def __init__(self, marks: Mapping[int, str], *, is_thinking: bool, is_terminal: bool) -> None:
        self.content = ""
        self._marks = marks
        self._is_thinking = is_thinking
        self._is_terminal = is_terminal
        self._is_dim = is_terminal and not os.environ.get("NO_COLOR")
        self._has_begun = False  # this part, thinking or content, has text
        self._newlines = ""  # held, as they may be the part's last

    def add(self, event: Event) -> None:
        """Show an event's text."""
        text = event.text
        for token_id in event.token_ids:
            mark = self._marks.get(token_id, "")
            if mark and mark in text:
                before, _, text = text.partition(mark)
                self._show(before)
                self._turn(_THINK[mark])
        self._show(text)
        sys.stdout.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._is_thinking:
            self._turn(False)
        print(flush=True)

    def _turn(self, is_thinking: bool) -> None:
        if self._is_thinking and self._has_begun and self._is_terminal:
            sys.stdout.write(f"{_PLAIN if self._is_dim else ''}\n\n")
        self._is_thinking, self._has_begun, self._newlines = is_thinking, False, ""

    def _show(self, text: str) -> None:
        if not self._is_thinking:
            self.content += text
        elif not self._is_terminal:
            return
        text = self._newlines + text if self._has_begun else text.lstrip("\n")
        shown = text.rstrip("\n")
        self._newlines = text[len(shown) :]
        if not shown:
            return
        if self._is_thinking and not self._has_begun and self._is_dim:
            sys.stdout.write(_DIM)
        self._has_begun = True
        sys.stdout.write(printable(shown))


@dataclass
class Chat:
    """A conversation: what was said, and how it is to go on."""

    llm: LLM
    sampling: Mapping[str, Any]
    system: str | None = None
    thinking: bool | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def talk(self) -> int:
        """Ask a user at a terminal for messages until they leave."""
        model = printable(self.llm.model_id)
        print(f"{model}, {self.llm.context_length} tokens of context; /help lists the commands")
        while True:
            try:
                line = _read_line()
            except EOFError:
                print()
                return 0
            try:
                if not self._take(line):
                    return 0
            except (RequestError, ChatError) as error:
                print(printable(str(error)))

    def read(self) -> int:
        """Answer each line of stdin; raises ChatError where that is no text."""
        try:
            for line in sys.stdin:
                if not self._take(line.removesuffix("\n")):
                    break
        except UnicodeDecodeError as error:
            bad = error.object[error.start]
            raise ChatError(
                f"stdin must be {error.encoding} text, byte 0x{bad:02x}: {error.reason}"
            ) from error
        return 0

    def _take(self, line: str) -> bool:
        """Do what a line says; False to leave."""
        name, _, rest = line.partition(" ")
        if name in _COMMANDS:
            return _COMMANDS[name](self, rest.strip())
        if name.startswith("/"):
            raise RequestError(f"{name} is no command: /help lists them")
        if line.strip():
            self._ask(line.strip())
        return True

    def _ask(self, text: str) -> None:
        """Have a message answered; both are kept, unless there was no answer."""
        message = {"role": "user", "content": text}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompt_ids = self.llm.encode_chat([*system, *self.turns, message], enable_thinking=self.thinking)
        params = SamplingParams(**{**self.llm.sampling_defaults, **self.sampling})
        content = asyncio.run(self._answer(prompt_ids, params))
        if content.strip():
            self.turns += [message, {"role": "assistant", "content": content.strip()}]

    async def _answer(self, prompt_ids: list[int], params: SamplingParams) -> str:
        loop = asyncio.get_running_loop()
        try:
            generation = self.llm.submit(prompt_ids, params, loop=loop)
        except RequestError as error:
            raise _explained(error) from None
        except EngineStopped as error:
            raise ChatError(str(error)) from None
        interrupts = _Interrupts(generation)
        loop.add_signal_handler(signal.SIGINT, interrupts.add)
        answer, last = self._new_answer(prompt_ids), Event("", ())
        try:
            while not generation.finished:
                for last in await generation.next_events():
                    answer.add(last)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            generation.cancel()
            answer.end()
        if last.finish_reason == "error":
            raise ChatError(f"the generation failed: {last.error}")
        if interrupts.count > 1:
            raise KeyboardInterrupt
        if sys.stdout.isatty():
            self._say_how_it_went(generation, last)
        return answer.content

    def _new_answer(self, prompt_ids: list[int]) -> Answer:
        tokens = self.llm.tokenizer.user_defined_tokens
        marks = {tokens[text]: text for text in _THINK if text in tokens}
        # a template may open the thinking itself: "<think>\n" ends its prompt
        opened = [_THINK[marks[token_id]] for token_id in prompt_ids[-2:] if token_id in marks]
        return Answer(marks, is_thinking=opened[-1:] == [True], is_terminal=sys.stdout.isatty())

    def _say_how_it_went(self, generation: Generation, last: Event) -> None:
        times = generation.timings
        length, seconds = times.predicted_length, times.predicted_seconds
        parts = [
            f"{length} tokens",
            *([f"{(length - 1) / seconds:.1f} tokens/s"] if seconds > 0 else []),
            f"first after {times.prompt_seconds:.2f} s",
            f"{times.prompt_length + length} of {self.llm.context_length} of context",
            *{"cancelled": ["stopped"], "length": ["cut at the limit"]}.get(last.finish_reason or "", []),
        ]
        dim, plain = ("", "") if os.environ.get("NO_COLOR") else (_DIM, _PLAIN)
        print(f"{dim}{', '.join(parts)}{plain}\n")


class _Interrupts:
    """Ctrl-C during an answer: the first one stops it."""

    def __init__(self, generation: Generation) -> None:
        self.count = 0
        self._generation = generation

    def add(self) -> None:
        self.count += 1
        self._generation.cancel()


def _explained(error: RequestError) -> RequestError:
    if error.code != "context_length_exceeded" or error.param == "max_tokens":
        return error
    return RequestError(f"{error}; /new starts over", param=error.param, code=error.code)


def _read_line() -> str:
    """A line with readline's editing and history; Ctrl-C empties it, and leaves where it is empty."""
    try:
        import readline
    except ImportError:
        return input(_PROMPT)
    while True:
        try:
            return input(_PROMPT)
        except KeyboardInterrupt:
            if not readline.get_line_buffer():
                raise
            print()


def _help(_: Chat, __: str) -> bool:
    print(HELP)
    return True


def _new(chat: Chat, _: str) -> bool:
    chat.turns.clear()
    return True


def _system(chat: Chat, text: str) -> bool:
    chat.system = text or None
    return True


def _think(chat: Chat, text: str) -> bool:
    if text not in ("on", "off"):
        raise RequestError(f"/think takes on or off, got {text!r}")
    chat.thinking = text == "on"
    return True


def _exit(_: Chat, __: str) -> bool:
    return False


_COMMANDS: Final[Mapping[str, Callable[[Chat, str], bool]]] = {
    "/help": _help,
    "/new": _new,
    "/system": _system,
    "/think": _think,
    "/exit": _exit,
}
