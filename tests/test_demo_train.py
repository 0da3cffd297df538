"""A training of a few steps: the loss falls, files hold what was learned, and training goes on from one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import jax
import ml_dtypes
import numpy as np
import pytest

from tools.demo_corpus import SKILL_NAMES, make_conversation, texts_of
from tools.demo_model import demo_config, initial_weights, read_trained, write_gguf
from tools.demo_rows import ANSWER, NOTHING, Renderer, Rows, RowStream, make_rows
from tools.demo_vocabulary import train_vocabulary
from tools.train_demo import FINAL_SECONDS, Plan, Trainer, measure, rate_at, start, train, whole_answers

BATCH, STEPS_A_CALL, MAX_STEPS = 2, 4, 12
RATE = 4e-3


class OneShard:
    """Gives the same rows once."""

    def __init__(self, rows: Rows) -> None:
        self._rows = [rows]

    def take(self, least: int = 0) -> Iterator[Rows]:
        while self._rows:
            yield self._rows.pop()


@pytest.fixture(scope="module")
def first_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh model of one layer."""
    texts = (text for seed in range(100) for text in texts_of(make_conversation(seed, "train")))
    vocabulary = train_vocabulary(texts, 512)
    config = demo_config(len(vocabulary.tokens), num_layers=1, num_experts=2)
    path = tmp_path_factory.mktemp("demo") / "first.gguf"
    write_gguf(path, config, vocabulary, initial_weights(config, seed=0), "BF16")
    return path


def plan() -> Plan:
    """The whole rate at every step, however fast or slow the machine is."""
    return Plan(time.monotonic(), 1e9, 1e-9, RATE, BATCH, STEPS_A_CALL)


@pytest.fixture
def lenient() -> Iterator[None]:
    """Attention of jax.nn and optax promote by themselves."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("lenient")
def test_training_goes_on_from_a_file_lowers_the_loss_and_leaves_a_file(
    first_file: Path, tmp_path: Path
) -> None:
    begun = start(first_file, num_layers=4, num_experts=8)
    assert begun.config.num_layers == 1
    renderer = Renderer(begun.vocabulary)
    rows = make_rows(renderer, 0, "train", "spelling", size=24)
    trainer = Trainer(begun.config, begun.weights)
    for name, array in begun.weights.items():
        assert np.array_equal(trainer.weights[name], array), name
    record = train(trainer, cast(RowStream, OneShard(rows)), plan(), lambda: None, MAX_STEPS)
    losses = [line["loss"] for line in record["log"]]
    assert record["steps"] == MAX_STEPS
    assert [line["rate"] for line in record["log"]] == [RATE] * (MAX_STEPS // STEPS_A_CALL)
    assert losses[0] == pytest.approx(np.log(begun.config.vocab_size), rel=0.1)
    assert losses[-1] < losses[0] - 1
    write_gguf(tmp_path / "learned.gguf", begun.config, begun.vocabulary, trainer.weights, "BF16")
    learned = read_trained(tmp_path / "learned.gguf").weights
    assert not np.array_equal(learned["router"], begun.weights["router"])
    for name, array in trainer.weights.items():
        rounded = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(learned[name], array) or np.array_equal(learned[name], rounded), name
    held_out = measure(trainer, renderer, BATCH, 2)
    assert list(held_out["exact"]) == list(SKILL_NAMES)
    assert np.sum(held_out["expert_shares_of_even"]) == pytest.approx(2, abs=0.01)


def test_the_rate_rises_and_falls_with_the_clock() -> None:
    plan = Plan(0, 7 + 100 + FINAL_SECONDS, 10, 1, 1, 1)
    rates = [rate_at(plan, 7, since) for since in (0, 5, 10, 55, 100, 200)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 0.5, 0, 0], atol=1e-9)


def test_an_answer_counts_when_all_of_it_was_found() -> None:
    segments = np.array([[1, 1, 1, 2, 2, 2, 0]])
    kinds = np.array([[NOTHING, ANSWER, ANSWER, ANSWER, ANSWER, NOTHING, NOTHING]])
    rows = Rows(segments, segments, segments, kinds)
    found = np.array([[False, True, True, True, False, False, False]])
    assert whole_answers(rows, found) == [True, False]
