"""Choosing the next token on the device: one row at a time, so that a row never depends on its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmoe.request import MAX_TOP_LOGPROBS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRow:
    """One slot's sampling parameters and history; a batch has a leading slot axis.

    `temperature` to `repetition_penalty` are float32, `top_k` int32 (0: off), `seed` uint32[2], `step` int32
    (ids sampled so far), `bias` [V] float32, `counts` [V] int32 (how often each id was sampled), `in_prompt`
    [V] bool, `wants_logprobs` bool, `has_bias` bool (False: `bias` is all zeros and is not looked at).
    """

    temperature: Array
    top_p: Array
    min_p: Array
    frequency_penalty: Array
    presence_penalty: Array
    repetition_penalty: Array
    top_k: Array
    seed: Array
    step: Array
    bias: Array
    counts: Array
    in_prompt: Array
    wants_logprobs: Array
    has_bias: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """One sampled id (int32) with its logprob and the most likely ids and logprobs [20], where asked for."""

    token_id: Array
    logprob: Array
    top_ids: Array
    top_logprobs: Array

    @staticmethod
    def empty(num_rows: int) -> Sampled:
        """A batch of zeros, for rows to be written into."""
        shape = (num_rows, MAX_TOP_LOGPROBS)
        return Sampled(
            token_id=jnp.zeros(num_rows, jnp.int32),
            logprob=jnp.zeros(num_rows, jnp.float32),
            top_ids=jnp.zeros(shape, jnp.int32),
            top_logprobs=jnp.zeros(shape, jnp.float32),
        )


def sample(logits: Array, row: SamplingRow) -> Sampled:
    """Sample one id from logits [V] float32."""
    adjusted = penalised(logits, row)
    token_id = lax.cond(
        row.temperature > 0, draw, lambda logits, _: jnp.argmax(logits).astype(jnp.int32), adjusted, row
    )
    return lax.cond(row.wants_logprobs, _with_logprobs, _without_logprobs, logits, token_id)


def penalised(logits: Array, row: SamplingRow) -> Array:
    """logits [V] after the penalties (each distinct token once) and the bias.

    Repetition: over prompt and output (Keskar et al., 2019); frequency and presence: over the output
    (OpenAI's API reference).
    """
    sampled = row.counts > 0
    seen = sampled | row.in_prompt
    shrunk = jnp.where(logits > 0, logits / row.repetition_penalty, logits * row.repetition_penalty)
    logits = jnp.where(seen, shrunk, logits)
    logits = logits - row.frequency_penalty * row.counts.astype(jnp.float32)
    logits = logits - jnp.where(sampled, row.presence_penalty, jnp.float32(0))
    return logits + jnp.where(row.has_bias, row.bias, jnp.float32(0))


def draw(logits: Array, row: SamplingRow) -> Array:
    """A random id of logits [V] after temperature, top_k, top_p and min_p, by the Gumbel-max trick."""
    # from the largest down: a tiny temperature then makes -inf of the others, never inf of several
    scaled = (logits - jnp.max(logits)) / row.temperature
    scaled = lax.cond(row.top_k > 0, _keep_top_k, lambda x, _: x, scaled, row.top_k)
    nucleus = (row.top_p < 1) | (row.min_p > 0)
    scaled = lax.cond(nucleus, _keep_nucleus, lambda x, *_: x, scaled, row.top_p, row.min_p)
    key = jax.random.fold_in(jax.random.wrap_key_data(row.seed, impl="threefry2x32"), row.step)
    return jnp.argmax(scaled + jax.random.gumbel(key, scaled.shape, jnp.float32)).astype(jnp.int32)


def _keep_top_k(logits: Array, top_k: Array) -> Array:
    """-inf for what is below the top_k-th largest value."""
    order = _ordered_bits(logits)
    threshold = _largest(lambda bits: jnp.sum(order >= bits, dtype=jnp.int32) >= top_k)
    return jnp.where(order >= threshold, logits, -jnp.inf)


def _keep_nucleus(logits: Array, top_p: Array, min_p: Array) -> Array:
    """-inf outside the smallest set of top_p probability (Holtzman et al., 2020), or below min_p."""
    shares = jnp.exp(logits - jnp.max(logits))
    order = _ordered_bits(shares)
    wanted = top_p * jnp.sum(shares)
    threshold = _largest(lambda bits: jnp.sum(jnp.where(order >= bits, shares, jnp.float32(0))) >= wanted)
    nucleus = (order >= threshold) | (top_p >= 1)
    # the best is always kept: its share is exactly 1
    return jnp.where(nucleus & (shares >= min_p) | (shares >= 1), logits, -jnp.inf)


def _ordered_bits(x: Array) -> Array:
    """uint32 in the order of the float32 values."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> jnp.uint32(31) == jnp.uint32(1)
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Callable[[Array], Array]) -> Array:
    """The largest uint32 for which `holds`, which is true up to some threshold; found bit by bit."""

    def bit(i: Array, found: Array) -> Array:
        tried = found | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        return jnp.where(holds(tried), tried, found)

    return lax.fori_loop(0, 32, bit, jnp.uint32(0))


def _with_logprobs(logits: Array, token_id: Array) -> Sampled:
    logprobs = jax.nn.log_softmax(logits)
    count = min(MAX_TOP_LOGPROBS, logits.shape[0])
    best, ids = lax.top_k(logprobs, count)
    missing = MAX_TOP_LOGPROBS - count
    return Sampled(
        token_id=token_id,
        logprob=logprobs[token_id],
        top_ids=jnp.pad(ids.astype(jnp.int32), (0, missing)),
        top_logprobs=jnp.pad(best, (0, missing), constant_values=-jnp.inf),
    )


def _without_logprobs(_: Array, token_id: Array) -> Sampled:
    zeros = Sampled.empty(1)
    return Sampled(token_id, zeros.logprob[0], zeros.top_ids[0], zeros.top_logprobs[0])
