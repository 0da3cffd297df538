"""Token streams played on compiled steps by hand: slots, pages and chunks of the caller's choosing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxmoe.config import EngineConfig, ModelConfig
from jaxmoe.gguf import read_gguf
from jaxmoe.request import Decode, Prefill, SamplingParams

if TYPE_CHECKING:
    from jaxmoe.model import Decoder
    from jaxmoe.step import Steps

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def random_ids(length: int, vocab_size: int, seed: Sequence[int]) -> tuple[int, ...]:
    """`length` ids, the same ones for the same seed."""
    return tuple(np.random.default_rng(seed).integers(0, vocab_size, length).tolist())


def open_model(path: Path, context_length: int) -> tuple[Decoder, ModelConfig]:
    """The decoder of a file, for contexts of that many tokens."""
    from jaxmoe.weights import load_model

    file = read_gguf(path)
    config = ModelConfig.from_gguf(file)
    return load_model(file, config, context_length=context_length), config


def make_steps(model: Decoder, config: ModelConfig, engine_config: EngineConfig, *, num_pages: int) -> Steps:
    """Steps of the model with a cache of `num_pages` pages; nothing is compiled yet."""
    import jax

    from jaxmoe.engine import prefill_chunk
    from jaxmoe.step import Shapes, Steps, why_without_kernels

    dtype = engine_config.cache_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    kernels = why_without_kernels(config, engine_config.cache_dtype) is None
    shapes = Shapes(
        num_slots=engine_config.num_slots,
        num_pages=num_pages,
        page_length=engine_config.page_length,
        context_length=engine_config.context_length or config.context_length,
        prefill_chunk=prefill_chunk(engine_config, kernels=kernels),
        cache_dtype=dtype,
        kernels=kernels,
    )
    return Steps(model, config, shapes)


class Player:
    """Greedy streams in the slots of `steps`, which it resets first."""

    def __init__(self, steps: Steps) -> None:
        steps.reset()
        self.steps = steps
        self._free = list(range(steps.num_pages))
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def start(self, slot: int, prompt_ids: Sequence[int]) -> int:
        """Prefill a prompt in the steps' own chunks; returns the first id."""
        chunk, length = self.steps.shapes.prefill_chunk, len(prompt_ids)
        self.steps.admit(slot, GREEDY, prompt_ids=prompt_ids, generated_ids=(), seed=0)
        self._pages[slot] = [self._free.pop(0) for _ in range(-(-length // self.steps.page_length))]
        self._lengths[slot] = length
        pages = tuple(self._pages[slot])
        for start in range(0, length, chunk):
            piece = tuple(prompt_ids[start : start + chunk])
            pending = self.steps.prefill(Prefill(slot, piece, start, pages, start + chunk >= length))
        return pending.read()[0].token_id

    def plan(self, slots: Sequence[int]) -> Decode:
        """The next decode step of these slots, with the pages that they need for it."""
        new_pages = []
        for slot in slots:
            index, offset = divmod(self._lengths[slot], self.steps.page_length)
            if offset == 0:
                self._pages[slot].append(self._free.pop(0))
                new_pages.append((slot, index, self._pages[slot][-1]))
            self._lengths[slot] += 1
        return Decode(tuple(sorted(slots)), tuple(new_pages))

    def decode(self, slots: Sequence[int], count: int) -> dict[int, list[int]]:
        """`count` more ids of each slot; every step is launched before the one ahead of it is read."""
        found: dict[int, list[int]] = {slot: [] for slot in slots}
        flown = None
        for _ in range(count):
            launched = self.steps.decode(self.plan(slots))
            if flown is not None:
                self._take(found, flown)
            flown = launched
        if flown is not None:
            self._take(found, flown)
        return found

    def _take(self, found: dict[int, list[int]], pending: object) -> None:
        tokens = pending.read()  # type: ignore[attr-defined]
        for slot, token in zip(sorted(found), tokens, strict=True):
            found[slot].append(token.token_id)

    def generate(self, prompts: Mapping[int, Sequence[int]], count: int) -> dict[int, list[int]]:
        """`count` ids of each slot's prompt, all slots decoding together."""
        first = {slot: self.start(slot, prompt) for slot, prompt in prompts.items()}
        rest = self.decode(sorted(prompts), count - 1)
        return {slot: [first[slot], *rest[slot]] for slot in prompts}

    def page_digest(self, slot: int, length: int | None = None) -> str:
        """sha256 of the slot's keys and values of all layers, of its first `length` tokens (all if None)."""
        length = self._lengths[slot] if length is None else length
        pages = np.asarray(self._pages[slot][: -(-length // self.steps.page_length)], np.int32)
        cache = self.steps._cache
        digest = hashlib.sha256()
        for array in (cache.keys, cache.values):
            for layer in range(array.shape[0]):
                rows = np.asarray(array[layer, pages])
                digest.update(rows.reshape(-1, *rows.shape[2:])[:length].tobytes())
        return digest.hexdigest()

    def stop(self, slot: int) -> None:
        """Give the slot's pages back."""
        self._free += self._pages.pop(slot)
