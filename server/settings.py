"""What the operator says: one table for the environment's variables and the command line's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from jaxmoe import EngineConfig, SamplingParams, parse_size


class SettingError(ValueError):
    """A setting that cannot be used; the message names the variable, the value and what was expected."""


@dataclass(frozen=True)
class Settings:
    """The server's settings; without a `model` the embedded demo model is served.

    Times are in seconds, `write_size` in bytes. `url` is where a browser finds the server, if that is
    known. `ping_seconds` 0 sends no pings; `sampling` holds the operator's sampling defaults by
    SamplingParams' names; `write_size` and `write_seconds` bound what a client leaves unread, and for how
    long; `profile_dir` is where traces go, None takes none.
    """

    model: str | None = None
    model_id: str | None = None
    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    ping_seconds: float = 15.0
    grace_seconds: float = 5.0
    write_seconds: float = 30.0
    write_size: int = 1 << 18
    profile_dir: Path | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


def _text(value: str) -> str:
    return value


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in value.split(",") if name.strip())


def _seconds(value: str) -> float:
    seconds = float(value)
    if not (isfinite(seconds) and seconds >= 0):
        raise ValueError(value)
    return seconds


def _switch(value: str) -> bool:
    return {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}[value.lower()]


@dataclass(frozen=True)
class Option:
    """One setting: `group` is the part of Settings that `name` belongs to ("" is Settings itself)."""

    variable: str
    group: str
    name: str
    parse: Callable[[str], object]
    expected: str

    @property
    def flag(self) -> str:
        """The command line's spelling."""
        return "--" + self.variable.removeprefix("JAXMOE_").lower().replace("_", "-")


OPTIONS: Final = (
    Option("JAXMOE_MODEL", "", "model", _text, "the path of a GGUF file, by default the embedded demo model"),
    Option("JAXMOE_MODEL_ID", "", "model_id", _text, "the name that responses carry"),
    Option("JAXMOE_API_KEY", "", "api_key", _text, "the key that requests must bring"),
    Option("JAXMOE_ALLOWED_HOSTS", "", "allowed_hosts", _names, "host names, separated by commas"),
    Option("JAXMOE_PING_SECONDS", "", "ping_seconds", _seconds, "seconds of silence, 0 is off"),
    Option("JAXMOE_GRACE_SECONDS", "", "grace_seconds", _seconds, "seconds streams get at shutdown"),
    Option("JAXMOE_PROFILE_DIR", "", "profile_dir", Path, "a directory for POST /debug/profile, off without"),
    Option("JAXMOE_CONTEXT_LENGTH", "engine", "context_length", int, "a number of tokens"),
    Option("JAXMOE_SLOTS", "engine", "num_slots", int, "a number of requests that run together"),
    Option("JAXMOE_CACHE_SIZE", "engine", "cache_size", parse_size, "bytes, or a size such as 4GiB"),
    Option("JAXMOE_CACHE_DTYPE", "engine", "cache_dtype", _text, "float32 or bfloat16"),
    Option(
        "JAXMOE_PREFILL_CHUNK",
        "engine",
        "prefill_chunk",
        int,
        "a number of tokens (by default 2048 with CUDA kernels, 512 without)",
    ),
    Option("JAXMOE_PAGE_LENGTH", "engine", "page_length", int, "a number of tokens that divides 256"),
    Option("JAXMOE_MAX_WAITING", "engine", "max_waiting", int, "a number of requests"),
    Option("JAXMOE_COMPILATION_CACHE", "engine", "compilation_cache", _switch, "true or false"),
    Option("JAXMOE_TEMPERATURE", "sampling", "temperature", float, "a number from 0 to 2"),
    Option("JAXMOE_TOP_K", "sampling", "top_k", int, "an integer, 0 is off"),
    Option("JAXMOE_TOP_P", "sampling", "top_p", float, "a number up to 1"),
    Option("JAXMOE_MIN_P", "sampling", "min_p", float, "a number from 0 to 1"),
    Option("JAXMOE_REPETITION_PENALTY", "sampling", "repetition_penalty", float, "a number up to 2"),
)

_GROUPS: Final[Mapping[str, Callable[..., object]]] = {
    "": Settings,
    "engine": EngineConfig,
    "sampling": SamplingParams,
}


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Settings from variables; an empty one counts as absent, but an empty API key is refused.

    Raises SettingError for the first bad value.
    """
    if environment.get("JAXMOE_API_KEY") == "":
        raise SettingError("JAXMOE_API_KEY is empty: give a key, or unset it to serve without one")
    found: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for option in OPTIONS:
        if text := environment.get(option.variable):
            found[option.group][option.name] = _parse(option, text)
    engine, sampling = EngineConfig(**found["engine"]), MappingProxyType(found["sampling"])
    return Settings(**found[""], engine=engine, sampling=sampling)


def _parse(option: Option, text: str) -> object:
    try:
        value = option.parse(text)
    except (ValueError, KeyError, OverflowError):
        raise SettingError(f"{option.variable}={text!r}: expected {option.expected}") from None
    try:
        _GROUPS[option.group](**{option.name: value})
    except ValueError as error:
        raise SettingError(f"{option.variable}={text!r}: {error}") from None
    return value
