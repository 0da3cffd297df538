"""Train the demo model on one GPU, from conversations that are made up while it learns.

`python -m tools.train_demo --out FOLDER [--minutes M] [--resume FILE.gguf]`

Writes FOLDER/demo.gguf (Q8_0), FOLDER/checkpoint.gguf (BF16, every minute and at the end; --resume takes it,
or any file of this model), and FOLDER/training.json with what was done and what the model got right,
teacher-forced, on held-out conversations. --minutes counts from the start of the program to the last file;
the learning rate follows the clock: a short rise, then down to 0. A resumed training begins with another
rise, as the optimizer starts anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from jax import Array, lax
from tqdm import tqdm

from jaxmoe.config import ModelConfig
from tools.demo_corpus import SKILL_NAMES, corpus_digest, make_conversation, texts_of
from tools.demo_model import (
    WEIGHTS,
    Batch,
    Floats,
    Network,
    Routing,
    Trained,
    balance_loss,
    demo_config,
    initial_weights,
    read_trained,
    write_gguf,
)
from tools.demo_rows import (
    ANSWER,
    EARLIER,
    NOTHING,
    PROMPT,
    ROW_LENGTH,
    Renderer,
    RowPool,
    Rows,
    RowStream,
    make_rows,
)
from tools.demo_vocabulary import train_vocabulary
from tools.environment import host_name, read_environment
from tools.evidence import scrub

Record = dict[str, Any]

VOCAB_SIZE: Final = 2048
VOCAB_CONVERSATIONS: Final = 20_000
LEARNED: Final = {NOTHING: 0.0, PROMPT: 0.05, EARLIER: 1.0, ANSWER: 1.0}  # the loss's weight
BALANCE_WEIGHT: Final = 0.01
CHECKPOINT_SECONDS: Final = 60.0
POOL_ROWS: Final = 200_000
EVAL_SIZE: Final = 256  # conversations a skill
FINAL_SECONDS: Final = 25.0  # for the last evaluation and files


@dataclass(frozen=True)
class Plan:
    """How to train: `seconds` from `begun` (time.monotonic) to the last file, `warm_up` of them to rise."""

    begun: float
    seconds: float
    warm_up: float
    learning_rate: float
    batch: int
    steps_a_call: int

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun


# --- Steps


def make_optimizer(leaves: Sequence[Array]) -> optax.GradientTransformation:
    """Muon for matrices, AdamW for norms, embedding and router (Jordan et al., 2024).

    Its learning rate is 1: a step's own scales what it gives.
    """
    muon = optax.contrib.muon(
        1.0,
        weight_decay=0.05,
        consistent_rms=0.2,
        adam_b2=0.98,
        muon_weight_dimension_numbers=[_matrix_axes(leaf.shape) for leaf in leaves],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def _matrix_axes(shape: tuple[int, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """The axes of a stack of matrices; None for a router, whose few rows are better not made orthogonal."""
    if len(shape) < 3 or min(shape[-2:]) < 32:
        return None
    return optax.contrib.MuonDimensionNumbers(len(shape) - 1, len(shape) - 2)


def loss_of(network: Network, batch: Batch) -> tuple[Array, tuple[Array, Routing]]:
    """The weighted mean loss with the balance's, the mean loss of answers, and the routing."""
    logits, routing = network(batch)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(batch.tokens, -1, axis=1))
    weight = jnp.asarray([LEARNED[kind] for kind in sorted(LEARNED)], jnp.float32)[batch.kinds]
    answer = (batch.kinds == ANSWER).astype(jnp.float32)
    loss = jnp.sum(each * weight) / jnp.sum(weight)
    answers = jnp.sum(each * answer) / jnp.sum(answer)
    return loss + BALANCE_WEIGHT * balance_loss(routing), (answers, routing)


class Trainer:
    """The weights, the optimizer's state, and the two compiled functions that use them."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Floats]) -> None:
        graph, state = nnx.split(Network(config, weights))
        self._leaves, tree = jax.tree.flatten(state)
        optimizer = make_optimizer(self._leaves)
        self._state = jax.jit(optimizer.init)(self._leaves)
        self.config = config

        def network(leaves: list[Array]) -> Network:
            return nnx.merge(graph, jax.tree.unflatten(tree, leaves))

        def step(
            carry: tuple[list[Array], Any], given: tuple[Batch, Array]
        ) -> tuple[tuple[list[Array], Any], Any]:
            leaves, state = carry
            batch, rate = given

            def loss(leaves: list[Array]) -> tuple[Array, tuple[Array, Routing]]:
                return loss_of(network(leaves), _widened(batch))

            (_, found), slopes = jax.value_and_grad(loss, has_aux=True)(leaves)
            updates, state = optimizer.update(slopes, state, leaves)
            leaves = [leaf + rate * update for leaf, update in zip(leaves, updates, strict=True)]
            return (leaves, state), found

        def train(leaves: list[Array], state: Any, batches: Batch, rates: Array) -> Any:
            (leaves, state), found = lax.scan(step, (leaves, state), (batches, rates))
            return leaves, state, jax.tree.map(lambda x: jnp.mean(x, axis=0), found)

        def right(leaves: list[Array], batch: Batch) -> tuple[Array, Array]:
            wide = _widened(batch)
            logits, routing = network(leaves)(wide)
            return jnp.argmax(logits, axis=-1) == jnp.roll(wide.tokens, -1, axis=1), routing.shares

        self._graph, self._tree = graph, tree
        self._train = jax.jit(train, donate_argnums=(0, 1))
        self._right = jax.jit(right)

    def train(self, rows: Rows, rates: np.ndarray) -> tuple[Array, Routing]:
        """One step for each of `rates`; the mean loss of answers and the routing, not waited for."""
        self._leaves, self._state, found = self._train(self._leaves, self._state, _batch(rows), rates)
        return found

    def right(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Which next tokens it finds likeliest are the right ones [R, T], and expert shares [L, E]."""
        found, shares = self._right(self._leaves, _batch(rows))
        return np.asarray(found), np.asarray(shares)

    @property
    def weights(self) -> dict[str, Floats]:
        """All weights, on the host."""
        network = nnx.merge(self._graph, jax.tree.unflatten(self._tree, self._leaves))
        return {name: np.asarray(getattr(network, name)[...], np.float32) for name in WEIGHTS}


def _batch(rows: Rows) -> Batch:
    return Batch(*map(jnp.asarray, rows))


def _widened(batch: Batch) -> Batch:
    """Indices as int32: the rows travel in the smallest types that hold them."""
    return Batch(*(array.astype(jnp.int32) for array in batch))


# --- Training


def rate_at(plan: Plan, first: float, since_first: float) -> float:
    """The learning rate so many seconds after the first step: up in a line, then down as a cosine to 0.

    `first`: seconds from `plan.begun` to the first step.
    """
    rising = min(1.0, since_first / plan.warm_up)
    whole = max(plan.seconds - FINAL_SECONDS - first, 1.0)
    done = min(max((since_first - plan.warm_up) / max(whole - plan.warm_up, 1.0), 0.0), 1.0)
    return plan.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * done))


def train(
    trainer: Trainer, stream: RowStream, plan: Plan, save: Callable[[], None], max_steps: int | None
) -> Record:
    """Steps until the time is over; a checkpoint every minute."""
    pool, rng = RowPool(POOL_ROWS), np.random.default_rng(0)
    shape, log = (plan.steps_a_call, plan.batch), list[Record]()
    for rows in stream.take(least=1):
        pool.add(rows)
    # compiles, and fills the optimizer's averages at rate 0
    found = trainer.train(pool.draw(rng, shape), np.zeros(plan.steps_a_call, np.float32))
    jax.block_until_ready(found)
    begun = saved = time.monotonic()
    num_steps = 0
    with tqdm(total=round(plan.seconds), unit="s", desc="training", mininterval=2) as bar:
        while plan.elapsed < plan.seconds - FINAL_SECONDS and (max_steps is None or num_steps < max_steps):
            for rows in stream.take():
                pool.add(rows)
            rows = pool.draw(rng, shape)
            rate = rate_at(plan, begun - plan.begun, time.monotonic() - begun)
            # the call before this one is read while this one runs: the device never waits for the host
            earlier, found = found, trainer.train(rows, np.full(plan.steps_a_call, rate, np.float32))
            log.append(_line(earlier, num_steps, rate, time.monotonic() - begun))
            num_steps += plan.steps_a_call
            bar.set_postfix(steps=num_steps, loss=f"{log[-1]['loss']:.4f}", rows=pool.num_seen)
            bar.update(min(round(plan.elapsed), round(plan.seconds)) - int(bar.n))
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
                saved = time.monotonic()
    return {
        "steps": num_steps,
        "rows_made": pool.num_seen,
        "seconds_of_steps": round(time.monotonic() - begun, 1),
        "log": log,
    }


def _line(found: tuple[Array, Routing], num_steps: int, rate: float, seconds: float) -> Record:
    loss, routing = found
    shares = np.asarray(routing.shares) * routing.shares.shape[-1]
    return {
        "steps": num_steps,
        "seconds": round(seconds, 1),
        "loss": round(float(loss), 5),
        "rate": round(rate, 6),
        "least_share": round(float(shares.min()), 3),
        "most_share": round(float(shares.max()), 3),
    }


# --- Held-out conversations, teacher-forced


def measure(trainer: Trainer, renderer: Renderer, batch: int, size: int) -> Record:
    """Of each skill's held-out conversations, the share whose every answer token is the likeliest one."""
    skills, shares = {}, []
    for skill in tqdm(SKILL_NAMES, desc="held out", unit="skill"):
        rows = make_rows(renderer, 0, "held_out", skill, size)
        right = []
        for start in range(0, len(rows.tokens), batch):
            part = Rows(*(_padded(array[start : start + batch], batch) for array in rows))
            found, one = trainer.right(part)
            shares.append(one)
            right += whole_answers(part, found)
        skills[skill] = round(sum(right) / len(right), 4)
    even = np.mean(shares, axis=0) * trainer.config.num_experts
    return {"exact": skills, "expert_shares_of_even": np.round(even.astype(float), 3).tolist()}


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    return np.pad(array, ((0, length - len(array)), (0, 0)))


def whole_answers(rows: Rows, found: np.ndarray) -> list[bool]:
    """For each conversation, whether all of its answer was found."""
    wrong = (rows.kinds == ANSWER) & ~found
    return [
        not np.any(wrong[row] & (rows.segments[row] == segment))
        for row in range(len(found))
        for segment in range(1, int(rows.segments[row].max()) + 1)
    ]


# --- The command


def start(resume: Path | None, num_layers: int, num_experts: int) -> Trained:
    """The weights to begin with, and their vocabulary: a file's, or fresh ones."""
    if resume is not None:
        return read_trained(resume)
    texts = (
        text
        for seed in range(VOCAB_CONVERSATIONS)
        for text in texts_of(make_conversation(-1 - seed, "train"))
    )
    vocabulary = train_vocabulary(texts, VOCAB_SIZE)
    config = demo_config(len(vocabulary.tokens), num_layers=num_layers, num_experts=num_experts)
    return Trained(config, vocabulary, initial_weights(config, seed=0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says."""
    begun = time.monotonic()
    options = _parser().parse_args(arguments)
    plan = Plan(
        begun,
        60 * options.minutes,
        options.warm_up,
        options.learning_rate,
        options.batch,
        options.steps_a_call,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    trained = start(options.resume, options.layers, options.experts)
    stream = RowStream(trained.vocabulary, options.workers, options.first_shard)
    try:
        trainer = Trainer(trained.config, trained.weights)

        def save(name: str = "checkpoint.gguf", file_type: str = "BF16") -> None:
            write_gguf(options.out / name, trained.config, trained.vocabulary, trainer.weights, file_type)

        record = train(trainer, stream, plan, save, options.max_steps)
    finally:
        stream.close()
    save()
    save("demo.gguf", "Q8_0")
    record["held_out"] = measure(trainer, Renderer(trained.vocabulary), plan.batch, options.eval_size)
    environment = read_environment()
    heading = {
        "command": " ".join(
            ("python -m tools.train_demo", *(sys.argv[1:] if arguments is None else arguments))
        ),
        "machine": host_name(environment),
        "env": environment,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "minutes": round(plan.elapsed / 60, 2),
        "tokens": record["steps"] * plan.batch * ROW_LENGTH,
        "corpus_sha256": corpus_digest(),
        "model": asdict(trained.config),
    }
    (options.out / "training.json").write_text(scrub(json.dumps(heading | record, indent=1)) + "\n")
    for skill, rate in record["held_out"]["exact"].items():
        print(f"{skill:14} {rate:.4f}")
    for layer, shares in enumerate(record["held_out"]["expert_shares_of_even"]):
        print(f"layer {layer}: experts {shares}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_demo", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--resume", type=Path, metavar="FILE.gguf")
    parser.add_argument("--first-shard", type=int, default=0, help="where in the conversations to begin")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--warm-up", type=float, default=8.0, metavar="SECONDS")
    parser.add_argument("--batch", type=int, default=32, metavar="ROWS")
    parser.add_argument("--steps-a-call", type=int, default=50)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--eval-size", type=int, default=EVAL_SIZE, metavar="CONVERSATIONS")
    return parser


if __name__ == "__main__":
    sys.exit(main())
