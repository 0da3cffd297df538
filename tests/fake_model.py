"""A real LLM, tokenizer and engine around the stand-in for the device: everything but the arithmetic."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fake_steps import FakeSteps, Rule

from jaxmoe.config import EngineConfig, ModelConfig
from jaxmoe.engine import Engine
from jaxmoe.gguf import GGUFFile
from jaxmoe.llm import LLM

NUM_PLAIN = 505  # the tiny vocabulary's ids from here on are special


def plain(token_ids: Sequence[int], seed: int) -> int:
    """An id of plain text, or of a part of a character, that depends on all before it."""
    return zlib.crc32(repr((seed, list(token_ids))).encode()) % NUM_PLAIN


def script(token_ids: Sequence[int], *, after: int) -> Rule:
    """These ids after a prompt of `after` tokens, then the last one for ever."""
    return lambda known, seed: token_ids[min(len(known) - after, len(token_ids) - 1)]


def fake_llm(
    path: Path,
    rule: Rule = plain,
    *,
    step_seconds: float = 0.0,
    engine_config: EngineConfig | None = None,
    num_slots: int = 4,
) -> LLM:
    """A loaded model whose engine runs on FakeSteps; `llm.steps` are these."""
    steps = FakeSteps(
        num_slots=num_slots,
        num_pages=256,
        page_length=16,
        context_length=1024,
        rule=rule,
    )
    if step_seconds:
        steps.on_read = lambda number: time.sleep(step_seconds)

    def load_engine(
        file: GGUFFile,
        config: ModelConfig,
        engine_config: EngineConfig,
        *,
        eos_ids: frozenset[int],
        after_step: Callable[[], None],
        progress: Callable[[str, float], None],
    ) -> Engine:
        progress("compiling", 0.5)
        steps.vocab_size = config.vocab_size
        engine = Engine(
            steps,
            eos_ids=eos_ids,
            prefill_chunk=engine_config.prefill_chunk or 512,
            max_waiting=engine_config.max_waiting,
            after_step=after_step,
        )
        engine.start()
        return engine

    with patch("jaxmoe.engine.load_engine", load_engine, create=True):
        llm: Any = LLM(path, engine_config)
    llm.steps = steps
    return llm
