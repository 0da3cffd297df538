"""Choosing the next token by one kernel: each row's sampling and the advance of its slot.

The plain twin is jaxmoe/sampling.py, which comes later in the dependency order and is therefore handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import ptx
from jaxmoe.kernels.comparison import Comparison
from jaxmoe.request import MAX_TOP_LOGPROBS

_FILE: Final = "sampling.cu"
_THREADS: Final = 1024
# the fields of a SamplingRow, in the kernel's order
_FIELDS: Final = (
    "temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "top_k",
    "seed", "step", "bias", "counts", "in_prompt", "wants_logprobs", "has_bias",
)  # fmt: skip
_COUNTS: Final = 3 + _FIELDS.index("counts")
_STEP: Final = 3 + _FIELDS.index("step")


class Advanced(NamedTuple):
    """What `sample` gives: the slots' new state [slots], then what was sampled [B], top_* [B, 20].

    Rows past the count sampled nothing, and what stands there means nothing.
    """

    token_ids: Array
    positions: Array
    counts: Array
    step: Array
    sampled: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array


def sample(
    logits: Array,
    token_ids: Array,
    positions: Array,
    row: Mapping[str, Array],
    active: Array,
    count: Array,
) -> Advanced:
    """Sample an id for slots active[:count] from logits [B, V] float32 and advance those slots.

    `row` has the fields of a SamplingRow with a leading slot axis; `token_ids` and `positions` int32 [slots],
    `active` int32 [B], slots that differ, `count` int32 [] or [1]. The id is what is fed next, the position
    one more, the id's count and the step too, in place where the arrays are donated.
    """
    num_rows, vocab_size = logits.shape
    fields = [row[name] for name in _FIELDS]
    arrays = (logits, token_ids, positions, *fields, active, count.reshape(1))
    state = (token_ids, positions, row["counts"], row["step"])
    shape, top = (num_rows,), (num_rows, MAX_TOP_LOGPROBS)
    outputs = [
        *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in state),
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(top, jnp.int32),
        jax.ShapeDtypeStruct(top, jnp.float32),
        # room for the logits of rows with penalties
        jax.ShapeDtypeStruct(logits.shape, jnp.float32),
    ]
    *results, _ = ptx.launch(
        _FILE, "sample", _defines(vocab_size), arrays, outputs, grid=(num_rows, 1, 1), threads=_THREADS,
        aliases={1: 0, 2: 1, _COUNTS: 2, _STEP: 3},
    )  # fmt: skip
    return Advanced(*results)


def _defines(vocab_size: int) -> dict[str, int | float | str]:
    return {"V": vocab_size, "NUM_TOP": MAX_TOP_LOGPROBS}


def variants(config: ModelConfig) -> Iterator[tuple[str, str, dict[str, int | float | str], int]]:
    """What a model needs compiled: (file, kernel, macros, bytes of dynamic shared memory)."""
    yield _FILE, "sample", _defines(config.vocab_size), 0


class RowTwin(NamedTuple):
    """What a twin gives for one row."""

    token_id: Array
    logprob: Array
    top_ids: Array
    top_logprobs: Array


Twin = Callable[[Array, Mapping[str, Array]], RowTwin]


def advance_plainly(
    twin: Twin, logits: Array, token_ids: Array, positions: Array, row: Mapping[str, Array], active: Array
) -> Advanced:
    """What `sample` does when all rows are real, with twin(logits [V], one slot's fields) for each."""
    chosen = [
        twin(logits[i], {name: field[slot] for name, field in row.items()}) for i, slot in enumerate(active)
    ]
    sampled, logprobs, top_ids, top_logprobs = (jnp.stack(parts) for parts in zip(*chosen, strict=True))
    return Advanced(
        token_ids=token_ids.at[active].set(sampled),
        positions=positions.at[active].add(1),
        counts=row["counts"].at[active, sampled].add(1),
        step=row["step"].at[active].add(1),
        sampled=sampled,
        logprobs=logprobs,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )


_PLAIN: Final[Mapping[str, float]] = {
    "temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
    "repetition_penalty": 1.0, "top_k": 0, "wants_logprobs": 0, "has_bias": 0,
}  # fmt: skip
_ROWS: Final[Mapping[str, Mapping[str, float]]] = {
    "greedy": {},
    "greedy with logprobs": {"wants_logprobs": 1},
    "penalties": {
        "frequency_penalty": 0.5, "presence_penalty": 0.7, "repetition_penalty": 1.3, "has_bias": 1,
    },
    "temperature": {"temperature": 1.0},
    "flat": {"temperature": 2.0},
    "top_k": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "large top_k": {"temperature": 1.5, "top_k": 5000, "wants_logprobs": 1},
    "top_p": {"temperature": 0.9, "top_p": 0.95},
    "flat top_p": {"temperature": 2.0, "top_p": 0.99},
    "min_p": {"temperature": 1.2, "min_p": 0.05},
    "all of them": {
        "temperature": 1.1, "top_k": 300, "top_p": 0.9, "min_p": 0.01, "frequency_penalty": -0.2,
        "presence_penalty": 0.3, "repetition_penalty": 0.8, "has_bias": 1, "wants_logprobs": 1,
    },
}  # fmt: skip


def comparisons(config: ModelConfig, seed: int, twin: Twin) -> Iterator[Comparison]:
    """The kernel beside twin(logits [V], a SamplingRow's fields), each kind of row a slot of its own.

    Ids and the advanced state are equal; logprobs are close.
    """
    arrays = _random_arrays(config.vocab_size, np.random.default_rng(seed))

    def kernel(logits: Array, token_ids: Array, positions: Array, row: Any, active: Array) -> Advanced:
        return sample(logits, token_ids, positions, row, active, jnp.int32(active.shape[0]))

    def plain(*arrays: Any) -> Advanced:
        return advance_plainly(twin, *arrays)

    def part(function: Callable[..., Advanced], names: tuple[str, ...]) -> Callable[..., Any]:
        return lambda *arrays: tuple(getattr(function(*arrays), name) for name in names)

    ids = ("token_ids", "positions", "counts", "step", "sampled", "top_ids")
    yield Comparison("sampling: ids", part(kernel, ids), part(plain, ids), None, arrays, exact=True)
    # without logprobs' top those are zeros in both; with it all are finite
    numbers = ("logprobs", "top_logprobs")
    yield Comparison("sampling: logprobs", part(kernel, numbers), part(plain, numbers), None, arrays)


def _random_arrays(vocab_size: int, rng: np.random.Generator) -> tuple[Any, ...]:
    """Logits, token_ids, positions, fields and active: one row and one slot for each of _ROWS."""
    num = len(_ROWS)
    rows = [{**_PLAIN, **row} for row in _ROWS.values()]
    fields: dict[str, Any] = {name: np.array([row[name] for row in rows], np.float32) for name in _PLAIN}
    fields |= {name: fields[name].astype(np.bool_) for name in ("wants_logprobs", "has_bias")}
    fields["top_k"] = fields["top_k"].astype(np.int32)
    fields["seed"] = rng.integers(0, 1 << 32, (num, 2), np.uint32)
    fields["step"] = rng.integers(0, 1 << 20, num, np.int32)
    fields["bias"] = rng.normal(0, 3, (num, vocab_size)).astype(np.float32) * fields["has_bias"][:, None]
    fields["counts"] = rng.poisson(0.1, (num, vocab_size)).astype(np.int32)
    fields["in_prompt"] = rng.random((num, vocab_size)) < 0.2
    logits = rng.normal(0, 3, (num, vocab_size)).astype(np.float32)
    row = {name: jnp.asarray(field) for name, field in fields.items()}
    active = jnp.asarray(rng.permutation(num).astype(np.int32))
    zeros = jnp.zeros(num, jnp.int32)
    return jnp.asarray(logits), zeros, zeros + 5, row, active
