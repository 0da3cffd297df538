"""The command `jaxmoe`: its subcommands, and what ends one with a sentence and an exit status.

0 is success, 1 a failure, 2 a wrong command line, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Final, NamedTuple

from jaxmoe.display import printable


class Command(NamedTuple):
    """A subcommand: the module whose main(arguments, prog) runs it, and one line about it."""

    module: str
    summary: str


# `serve` is the one place where this package names the server's.
COMMANDS: Final[Mapping[str, Command]] = {
    "serve": Command("server.__main__", "serve a model: a chat page, and an OpenAI-compatible API"),
    "chat": Command("jaxmoe.terminal", "chat with a model here in the terminal"),
    "pull": Command("jaxmoe.pull", "download a GGUF file from the Hugging Face Hub"),
    "inspect": Command("jaxmoe.inspect_file", "say what a GGUF file is, and what of it fits into memory"),
}
_INTERRUPTED: Final = 130


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    given = _parser().parse_args(arguments)
    prog = f"jaxmoe {given.command}"
    _let_output_pass()
    try:
        _refuse_hub_names(given.command, given.arguments)
        run: Callable[[list[str], str], int] = import_module(COMMANDS[given.command].module).main
        return run(given.arguments, prog)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # who read our output has left; Python would complain once more when it closes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"{prog}: {printable(str(error))}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="jaxmoe",
        description="Run Qwen3-MoE models straight from their GGUF files.",
        epilog=f"commands:\n{listed}\n\njaxmoe COMMAND --help says more. Without a model, serve and chat\n"
        "take the small demo model that comes with the package.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="jaxmoe [-h] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"jaxmoe {_version()}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    rest = parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False
    return parser


def _version() -> str:
    try:
        return version("jaxmoe")
    except PackageNotFoundError:
        return "(a checkout, not installed)"


def _refuse_hub_names(command: str, arguments: list[str]) -> None:
    if command != "pull" and arguments and arguments[0].startswith("hf:"):
        raise ValueError(f"{arguments[0]} is no file: download it first, by jaxmoe pull {arguments[0]}")


def _let_output_pass() -> None:
    """Have a terminal or pipe that does not take all of Unicode show the rest as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
