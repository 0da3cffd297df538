"""The mixture of experts: a router, and SwiGLU experts that read each expert's weights once a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import experts as kernel_experts
from jaxmoe.kernels import matmul as kernel_matmul
from jaxmoe.kernels import packed
from jaxmoe.kernels import router as kernel_router
from jaxmoe.kernels import rows as kernel_rows
from jaxmoe.kernels.matmul import Groups as KernelGroups
from jaxmoe.kernels.matmul import Row
from jaxmoe.kernels.rounding import Rounded, rounded_values
from jaxmoe.kernels.router import Routed
from jaxmoe.layers import (
    ROW_TILE,
    StackedWeight,
    by_row_tiles,
    column_tile,
    dequantised_halves,
    matmul,
    num_outputs,
    padded_rows,
    rounded,
    tile_product,
    weight_tile,
)
from jaxmoe.quants import QuantTensor


@dataclass(frozen=True)
class Groups:
    """(row, expert) pairs sorted by expert, each expert's rows starting a new row tile.

    `rows` [P] names the token row at each place (M: none), `places` [M, A] where each pair went,
    `experts` [n] the experts that have rows, ascending, `first_tiles` and `num_tiles` [n] their row tiles,
    `num_experts` how many there are.
    """

    rows: Array
    places: Array
    experts: Array
    first_tiles: Array
    num_tiles: Array
    num_experts: Array


def route(logits: Array, experts_per_token: int) -> tuple[Array, Array]:
    """Softmax over all experts, the A largest, renormalised: logits [R, E] -> ids and weights [R, A]."""
    weights, ids = lax.top_k(jax.nn.softmax(logits, axis=-1), experts_per_token)
    total = weights[:, 0]
    for i in range(1, experts_per_token):
        total = total + weights[:, i]
    return ids.astype(jnp.int32), weights / total[:, None]


def group_by_expert(ids: Array, num_rows: Array, num_experts: int) -> Groups:
    """Sort the pairs of ids [M, A] by expert; rows past `num_rows` get no place."""
    num_all, per_token = ids.shape
    real = jnp.arange(num_all, dtype=jnp.int32) < num_rows
    flat = jnp.where(real[:, None], ids, jnp.int32(num_experts)).reshape(-1)
    counts = jnp.zeros(num_experts + 1, jnp.int32).at[flat].add(1)[:-1]
    tiles = (counts + (ROW_TILE - 1)) // ROW_TILE
    first_tiles = jnp.cumsum(tiles) - tiles
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sorted_ids = flat[order]
    first_pair = jnp.cumsum(counts) - counts
    clipped = jnp.minimum(sorted_ids, num_experts - 1)
    place = first_tiles[clipped] * ROW_TILE + jnp.arange(flat.size, dtype=jnp.int32) - first_pair[clipped]
    num_places = num_all * per_token + (ROW_TILE - 1) * min(num_experts, num_all * per_token)
    num_places += -num_places % ROW_TILE
    place = jnp.where(sorted_ids < num_experts, place, num_places)
    rows = jnp.full(num_places, num_all, jnp.int32).at[place].set(order // per_token, mode="drop")
    places = jnp.zeros(flat.size, jnp.int32).at[order].set(place).reshape(ids.shape)
    (present,) = jnp.nonzero(counts > 0, size=min(num_experts, flat.size), fill_value=0)
    present = present.astype(jnp.int32)
    num_present = jnp.sum(counts > 0, dtype=jnp.int32)
    return Groups(rows, places, present, first_tiles[present], tiles[present], num_present)


def grouped_matmul(
    take_rows: Callable[[Array], Array],
    weights: Sequence[tuple[QuantTensor, Array]],
    groups: Groups,
    combine: Callable[..., Array] = lambda y: y,
) -> Array:
    """Each group's rows times its expert's matrix of every weight, combined -> [P, N] float32.

    `take_rows(place)` gives the inputs [ROW_TILE, K] of the tile that starts at `place`; `weights` are
    (stack [L, E, ...], index in the stack); `combine` takes one product [ROW_TILE, width] for each.
    An expert's weights are dequantised once for all of its rows.
    """
    num_columns = num_outputs(weights[0][0])
    width = column_tile(num_columns)

    def expert(i: Array, out: Array) -> Array:
        def columns(j: Array, out: Array) -> Array:
            start = jnp.minimum(j * width, num_columns - width)
            tiles = [weight_tile(w, (index, groups.experts[i]), start, width) for w, index in weights]
            values = [dequantised_halves(tile) for tile in tiles]

            def rows(k: Array, out: Array) -> Array:
                place = (groups.first_tiles[i] + k) * ROW_TILE
                x = take_rows(place)
                products = [tile_product(x, value, tile) for value, tile in zip(values, tiles, strict=True)]
                return lax.dynamic_update_slice(out, combine(*products), (place, start))

            return lax.fori_loop(0, groups.num_tiles[i], rows, out)

        return lax.fori_loop(0, -(-num_columns // width), columns, out)

    out = jnp.zeros((groups.rows.shape[0], num_columns), jnp.float32)
    return lax.fori_loop(0, groups.num_experts, expert, out)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up (Shazeer, 2020)."""
    return jax.nn.silu(gate) * up


class MoE(nnx.Module):
    """Router and expert weights of all layers."""

    def __init__(self, config: ModelConfig, weights: dict[str, StackedWeight]) -> None:
        self.router = weights["router"]
        self.gate = weights["gate"]
        self.up = weights["up"]
        self.down = weights["down"]
        self.config = config

    def __call__(self, x: Array, num_rows: Array, layer: Array) -> Array:
        """x [M, D], already normed -> the weighted sum of each row's A experts [M, D]."""
        with jax.named_scope("router"):
            ids, weights = self._route(x, num_rows, layer)
            groups = group_by_expert(ids, num_rows, self.config.num_experts)
        with jax.named_scope("gate_up"):
            hidden = self._gate_up(x, groups, layer)
        with jax.named_scope("down"):
            y = self._down(hidden, groups, layer)
        with jax.named_scope("combine"):
            return _combine(y, groups.places, weights)

    def with_kernels(
        self, x: Array, norm: Array, next_norm: tuple[Array, int], count: Array, counters: Array, layer: int
    ) -> tuple[Array, Rounded | Row, Array]:
        """x [T, D] plus the experts of its norm by norm[layer]; the input that follows; the counters.

        norm [L, D]; `next_norm`: the norm [n, D] that follows, and its index; count int32 [1]: the real rows.
        """
        eps, row = self.config.norm_eps, Row(x, norm, layer, self.config.norm_eps)
        stacks = [weight.at(layer) for weight in (self.router, self.gate, self.up, self.down)]
        if not _has_kernels(*(stack for stack, _ in stacks)):
            x_hat = padded_rows(rounded_values(rounded(row, count)))
            x = x + self(x_hat, count[0], jnp.int32(layer))[: x.shape[0]]
            after = Row(x, *next_norm, eps)
            return x, after if x.shape[0] == 1 else rounded(after, count), counters
        (w, index), (gate, at), (up, _), (down, down_at) = stacks
        num_rows = x.shape[0]
        routed = kernel_router.route(
            x, norm, w.codes, count, counters, config=self.config, layer=layer, index=index,
            num_zeros=kernel_experts.num_progress(num_rows, self.config),
        )  # fmt: skip
        if num_rows == 1 and packed.has_row_kernels(gate, up, down):
            h = kernel_matmul.gate_up_of_row(row, gate, up, routed.ids, index=at)
            x = kernel_matmul.down_of_row(h, down, routed.ids, routed.weights, x, index=down_at)
            return x, Row(x, *next_norm, eps), routed.counters
        inputs = rounded(row, count) if routed.inputs is None else routed.inputs
        experts = (gate, up, down), (at, down_at)
        if kernel_experts.takes(num_rows):
            y = self._few_rows(inputs, routed, count, *experts)
        else:
            y = self._many_rows(inputs, routed, count, *experts)
        x, *following = kernel_rows.combine(
            x, y, routed.weights, next_norm[0], count, eps=eps, layer=next_norm[1]
        )
        return x, Rounded(*following), routed.counters

    def _few_rows(
        self,
        inputs: Rounded,
        routed: Routed,
        count: Array,
        weights: Sequence[QuantTensor],
        places: tuple[int, int],
    ) -> Array:
        """The experts' outputs [T*A, D] of each row's pairs."""
        progress = routed.zeros
        if progress is None:
            progress = jnp.zeros(kernel_experts.num_progress(inputs.codes.shape[0], self.config), jnp.int32)
        return kernel_experts.run(
            inputs, routed.ids, count, progress, weights,
            config=self.config, index=places[0], down_index=places[1],
        )[1]  # fmt: skip

    def _many_rows(
        self,
        inputs: Rounded,
        routed: Routed,
        count: Array,
        weights: Sequence[QuantTensor],
        places: tuple[int, int],
    ) -> Array:
        """The same by a launch for each product."""
        (gate, up, down), (num_rows, active) = weights, routed.ids.shape
        tile = kernel_matmul.tile_length(num_rows)
        lists = kernel_router.group(routed.ids, count, routed.counters, config=self.config, tile=tile)
        groups = KernelGroups(*lists[:3])
        hidden = kernel_matmul.gate_up(inputs, gate, up, groups, experts_per_token=active, index=places[0])
        return kernel_matmul.down(hidden, down, groups, num_rows=num_rows, index=places[1])

    def _route(self, x: Array, num_rows: Array, layer: Array) -> tuple[Array, Array]:
        logits = self.router.apply(lambda w, i: matmul(x, w, (i,), num_rows), layer)
        shape = (x.shape[0], self.config.experts_per_token)
        out = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        return by_row_tiles(lambda row: route(row, shape[1]), out, (logits,), num_rows)

    def _gate_up(self, x: Array, groups: Groups, layer: Array) -> Array:
        def gather(place: Array) -> Array:
            rows = lax.dynamic_slice_in_dim(groups.rows, place, ROW_TILE)
            return x.at[rows].get(mode="fill", fill_value=0)

        def with_gate(gate: QuantTensor, i: Array) -> Array:
            return self.up.apply(
                lambda up, j: grouped_matmul(gather, ((gate, i), (up, j)), groups, swiglu), layer
            )

        return self.gate.apply(with_gate, layer)

    def _down(self, hidden: Array, groups: Groups, layer: Array) -> Array:
        def tile(place: Array) -> Array:
            return lax.dynamic_slice_in_dim(hidden, place, ROW_TILE)

        return self.down.apply(lambda w, i: grouped_matmul(tile, ((w, i),), groups), layer)


def _has_kernels(router: QuantTensor, *experts: QuantTensor) -> bool:
    """Whether the kernels can read these formats."""
    return router.codes.dtype == jnp.float32 and all(map(packed.is_supported, experts))


def _combine(y: Array, places: Array, weights: Array) -> Array:
    """Sum over a row's experts, in the router's order: y [P, D], places and weights [M, A] -> [M, D]."""
    total = y.at[places[:, 0]].get(mode="clip") * weights[:, :1]
    for a in range(1, places.shape[1]):
        total = total + y.at[places[:, a]].get(mode="clip") * weights[:, a : a + 1]
    return total
