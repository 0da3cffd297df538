"""A kernel beside its twins: what `python -m tools.device_check` runs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """A kernel, its twin that rounds activations alike, and the float twin that does not round them.

    All three are called with `arrays` and give pytrees of arrays of the same structure. `exact`: all bits
    are equal to the twin's; otherwise the relative L2 error is held to 1e-3 (twin) and 1.5 % (float
    twin; None where there is none).
    """

    name: str
    kernel: Callable[..., Any]
    twin: Callable[..., Any]
    float_twin: Callable[..., Any] | None
    arrays: tuple[Any, ...]
    exact: bool = False
