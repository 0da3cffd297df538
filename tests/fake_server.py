"""The app over a stand-in for the device, for a hypercorn process of its own (see test_hypercorn.py)."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from jaxmoe import LLM
from server.app import create_app
from server.backend import Progress
from server.settings import Settings, read_settings


def load(settings: Settings, progress: Progress) -> LLM:
    """Load as slowly, and step as slowly, as the test says."""
    for i in range(10):
        progress("loading", i / 10)
        time.sleep(float(os.environ.get("FAKE_LOAD_SECONDS", "0")) / 10)
    if "FAKE_FAILURE" in os.environ:
        raise ValueError(os.environ["FAKE_FAILURE"])
    from fake_model import fake_llm  # it imports JAX, which takes seconds

    step_seconds = float(os.environ.get("FAKE_STEP_SECONDS", "0"))
    path = Path(os.environ["FAKE_MODEL"])
    return fake_llm(path, step_seconds=step_seconds, engine_config=settings.engine, num_slots=32)


_settings = read_settings(os.environ)
_write_seconds = float(os.environ.get("FAKE_WRITE_SECONDS", "30"))
app = create_app(replace(_settings, write_seconds=_write_seconds), load=load)
