"""Drives a small model as the engine does, with slots, pages and chunks of the test's choosing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxmoe.attention import Rows, query_tile
from jaxmoe.cache import KVCache
from jaxmoe.config import ModelConfig
from jaxmoe.gguf import read_gguf
from jaxmoe.model import Decoder
from jaxmoe.quants import Layout
from jaxmoe.request import Decode, Prefill, SampledToken, SamplingParams
from jaxmoe.step import Shapes, Steps
from jaxmoe.weights import load_model

CONTEXT_LENGTH = 1024
PAGE_LENGTH = 64
PREFILL_CHUNK = 320


def open_model(path: Path, layout: Layout | None = None) -> tuple[Decoder, ModelConfig]:
    file = read_gguf(path)
    config = ModelConfig.from_gguf(file)
    return load_model(file, config, context_length=CONTEXT_LENGTH, layout=layout), config


def open_steps(path: Path, *, prefill_chunk: int = PREFILL_CHUNK) -> Steps:
    """Steps of 16 slots, not warmed."""
    model, config = open_model(path)
    shapes = Shapes(
        num_slots=16,
        num_pages=64,
        page_length=PAGE_LENGTH,
        context_length=CONTEXT_LENGTH,
        prefill_chunk=prefill_chunk,
        cache_dtype="float32",
    )
    return Steps(model, config, shapes)


def one_slot_rows(
    positions: Array, count: Array, table: Array, *, tile: int, page_length: int, num_pages: int
) -> Rows:
    """Rows of one slot whose pages are `table`: a chunk of `count` tokens, in a bucket of any length."""
    index = jnp.arange(len(positions), dtype=jnp.int32)
    tile_rows = jnp.where(index < count, index, len(positions)).reshape(-1, tile)
    pages = table.at[positions // page_length].get(mode="clip")
    return Rows(
        num_rows=count,
        positions=positions,
        pages=jnp.where(index < count, pages, num_pages),
        offsets=positions % page_length,
        tile_rows=tile_rows,
        tile_tables=jnp.zeros(len(tile_rows), jnp.int32),
        num_tiles=(count + tile - 1) // tile,
        page_tables=table[None],
    )


class Forward:
    """Logits after every token of a sequence, which goes through the model in chunks of one bucket."""

    def __init__(self, model: Decoder, config: ModelConfig, bucket: int) -> None:
        graph, state = nnx.split(model)
        leaves, tree = jax.tree.flatten(state)
        num_pages = CONTEXT_LENGTH // PAGE_LENGTH
        table = np.arange(num_pages, dtype=np.int32)

        @jax.jit
        def run(
            leaves: list[Array], cache: KVCache, token_ids: Array, start: Array, count: Array
        ) -> tuple[Array, KVCache]:
            model = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
            positions = start + jnp.arange(bucket, dtype=jnp.int32)
            rows = one_slot_rows(
                positions, count, jnp.asarray(table),
                tile=query_tile(config), page_length=PAGE_LENGTH, num_pages=num_pages,
            )  # fmt: skip
            hidden, cache = model(token_ids, cache, rows)
            return model.logits(hidden, count), cache

        self.bucket = bucket
        self._run = partial(run, leaves)
        self._empty = partial(KVCache.empty, config, num_pages, PAGE_LENGTH, "float32")

    def __call__(self, token_ids: Sequence[int], chunks: Iterable[int] | None = None) -> np.ndarray:
        """[T, V]; without `chunks` (their lengths) in as few as there can be."""
        cache, out, start = self._empty(), [], 0
        for count in cut(len(token_ids), self.bucket) if chunks is None else chunks:
            padded = np.zeros(self.bucket, np.int32)
            padded[:count] = token_ids[start : start + count]
            logits, cache = self._run(cache, padded, np.int32(start), np.int32(count))
            out.append(np.asarray(logits)[:count])
            start += count
        assert start == len(token_ids)
        return np.concatenate(out)


def cut(length: int, size: int) -> list[int]:
    """`length` as as few pieces of at most `size` as there can be."""
    return [min(size, length - start) for start in range(0, length, size)]


class Player:
    """Plays requests on Steps by hand; `pages` are handed out in that order and go back to its end."""

    def __init__(self, steps: Steps, pages: Iterable[int] | None = None) -> None:
        steps.reset()
        self.steps = steps
        self.free = list(range(steps.num_pages) if pages is None else pages)
        self.pages: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def start(
        self,
        slot: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int = 0,
        generated_ids: Sequence[int] = (),
        chunks: Sequence[int] | None = None,
    ) -> SampledToken:
        """Admit a request, prefill its prompt and what it generated, and return the token sampled."""
        whole = (*prompt_ids, *generated_ids)
        self.steps.admit(slot, params, prompt_ids=prompt_ids, generated_ids=generated_ids, seed=seed)
        self.pages[slot] = [self.free.pop(0) for _ in range(-(-len(whole) // PAGE_LENGTH))]
        self.lengths[slot] = len(whole)
        tokens: list[SampledToken] = []
        start = 0
        for count in chunks or cut(len(whole), self.steps.shapes.prefill_chunk):
            assert not tokens, "only the last chunk samples"
            end = start + count
            step = Prefill(slot, whole[start:end], start, tuple(self.pages[slot]), end == len(whole))
            tokens = self.steps.prefill(step).read()
            start = end
        return tokens[0]

    def plan(self, *slots: int) -> Decode:
        """The next decode step of these slots, with the pages that they need for it."""
        new_pages = []
        for slot in slots:
            index, offset = divmod(self.lengths[slot], PAGE_LENGTH)
            if offset == 0:
                self.pages[slot].append(self.free.pop(0))
                new_pages.append((slot, index, self.pages[slot][-1]))
            self.lengths[slot] += 1
        return Decode(tuple(sorted(slots)), tuple(new_pages))

    def decode(self, *slots: int) -> dict[int, SampledToken]:
        tokens = self.steps.decode(self.plan(*slots)).read()
        return dict(zip(sorted(slots), tokens, strict=True))

    def stop(self, slot: int) -> None:
        self.free += self.pages.pop(slot)

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        num_tokens: int,
        *,
        slot: int = 0,
        **how: object,
    ) -> list[SampledToken]:
        """All tokens of a request that runs alone."""
        tokens = [self.start(slot, prompt_ids, params, **how)]  # type: ignore[arg-type]
        tokens += [self.decode(slot)[slot] for _ in range(num_tokens - 1)]
        self.stop(slot)
        return tokens


def ids_of(tokens: Iterable[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]
