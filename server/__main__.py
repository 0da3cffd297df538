"""`python -m server [MODEL.gguf]`, which is `jaxmoe serve`: the app in an embedded hypercorn.

Ends with 0 after SIGTERM or SIGINT, 1 when the model cannot be loaded or the address not be bound, 2 for
a wrong command line.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from dataclasses import replace

from hypercorn.asyncio import serve
from hypercorn.config import Config

from server.access import is_loopback
from server.app import create_app
from server.lifetime import BACKLOG, KEEP_ALIVE_SECONDS
from server.settings import OPTIONS, SettingError, Settings, read_settings


def main(arguments: list[str] | None = None, prog: str = "python -m server") -> int:
    """Serve until told to stop; returns the exit status. `prog` is how the user calls it."""
    parser = _parser(prog)
    given = vars(parser.parse_args(arguments))
    environment = {**os.environ, **{name: text for name, text in given.items() if name.startswith("JAXMOE_")}}
    try:
        settings = read_settings(environment)
    except SettingError as error:
        parser.error(str(error))
    try:
        listening = _listen(given["host"], given["port"])
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        print(f"cannot listen on {given['host']}:{given['port']}: {reason}", file=sys.stderr)
        return 1
    if settings.api_key is None and not is_loopback(listening.getsockname()[0]):
        print(
            "anyone who reaches this port can use the model: JAXMOE_API_KEY asks for a key", file=sys.stderr
        )
    settings = replace(settings, url=_url(given["host"], listening))
    asyncio.run(serve(create_app(settings), _config(listening, settings)))
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serve a Qwen3-MoE GGUF file with an OpenAI-compatible API and a chat page at /.",
        argument_default=argparse.SUPPRESS,
    )
    model_help = "a GGUF file (or JAXMOE_MODEL); without one the embedded demo model is served"
    parser.add_argument("JAXMOE_MODEL", metavar="MODEL.gguf", nargs="?", help=model_help)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    for option in OPTIONS:
        if option.name in ("model", "api_key"):  # a key on a command line shows in the process list
            continue
        help_text = f"{option.expected} (or {option.variable})"
        parser.add_argument(option.flag, dest=option.variable, metavar="VALUE", help=help_text)
    return parser


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OverflowError as error:
        raise OSError(None, str(error)) from error


def _url(host: str, listening: socket.socket) -> str:
    """Where a browser on this machine finds the server."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{listening.getsockname()[1]}/"


def _config(listening: socket.socket, settings: Settings) -> Config:
    config = Config()
    # Bound before anything is loaded, so that a port in use is known at once.
    config.bind = [f"fd://{listening.detach()}"]
    config.backlog = BACKLOG
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    config.graceful_timeout = settings.grace_seconds + 1.0
    return config


if __name__ == "__main__":
    sys.exit(main())
