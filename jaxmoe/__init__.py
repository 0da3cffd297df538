"""Runs Qwen3-MoE GGUF files as one jit-compiled JAX step.

The public names are loaded on first use, so that `import jaxmoe` costs nothing and loads no JAX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from jaxmoe.config import EngineConfig
    from jaxmoe.demo import demo_model
    from jaxmoe.display import PhaseBars, parse_size, printable
    from jaxmoe.llm import LLM, Event, GenerateResult, Generation, Timings
    from jaxmoe.profiler import keep_command_buffers, profile
    from jaxmoe.request import (
        MAX_TOP_LOGPROBS,
        EngineStats,
        EngineStopped,
        FinishReason,
        QueueFull,
        Request,
        RequestError,
        SamplingParams,
        TokenLogprobs,
    )

__all__ = [
    "LLM",
    "MAX_TOP_LOGPROBS",
    "EngineConfig",
    "EngineStats",
    "EngineStopped",
    "Event",
    "FinishReason",
    "GenerateResult",
    "Generation",
    "PhaseBars",
    "QueueFull",
    "Request",
    "RequestError",
    "SamplingParams",
    "Timings",
    "TokenLogprobs",
    "demo_model",
    "keep_command_buffers",
    "parse_size",
    "printable",
    "profile",
]

_HOMES: Final = {
    "EngineConfig": "config",
    "LLM": "llm",
    "Event": "llm",
    "GenerateResult": "llm",
    "Generation": "llm",
    "Timings": "llm",
    "MAX_TOP_LOGPROBS": "request",
    "EngineStats": "request",
    "EngineStopped": "request",
    "FinishReason": "request",
    "QueueFull": "request",
    "Request": "request",
    "RequestError": "request",
    "SamplingParams": "request",
    "TokenLogprobs": "request",
    "PhaseBars": "display",
    "demo_model": "demo",
    "keep_command_buffers": "profiler",
    "parse_size": "display",
    "printable": "display",
    "profile": "profiler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxmoe' has no attribute {name!r}")
    value = getattr(import_module(f"jaxmoe.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
