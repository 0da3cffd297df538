"""The demo model's template renders as Qwen3's does, and its vocabulary gives back every text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe import demo_model
from jaxmoe.chat import ChatTemplate
from jaxmoe.tokenizer import Tokenizer
from tools.demo_corpus import make_conversation, texts_of
from tools.demo_vocabulary import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    USER_TOKENS,
    tokenizer_of,
    train_vocabulary,
    vocabulary_of,
)

GOLDENS = Path(__file__).parent / "goldens" / "qwen3_prompts.json"


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return tokenizer_of(vocabulary_of(demo_model()))


def test_prompts_are_those_of_qwen3s_template(shipped: Tokenizer) -> None:
    template = ChatTemplate(CHAT_TEMPLATE, shipped)
    goldens = json.loads(GOLDENS.read_text("utf-8"))
    assert len(goldens) > 50
    for one in goldens:
        assert template.render(one["messages"], **one["switches"]) == one["prompt"], one["switches"]


def test_texts_of_the_corpus_come_back_and_are_short(shipped: Tokenizer) -> None:
    texts = [text for seed in range(100) for text in texts_of(make_conversation(seed, "train")) if text]
    ids = [shipped.encode(text, parse_special=False) for text in texts]
    assert [shipped.decode(one) for one in ids] == texts
    assert sum(map(len, ids)) < 0.5 * sum(map(len, texts))


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_comes_back(shipped: Tokenizer, text: str) -> None:
    assert shipped.decode(shipped.encode(text, parse_special=False)) == text


def test_a_trained_vocabulary_has_bytes_merges_and_the_special_tokens() -> None:
    vocabulary = train_vocabulary(["the cat and the hat<|im_end|><|im_end|>17"] * 3, 300)
    special = len(CONTROL_TOKENS) + len(USER_TOKENS)
    assert len(vocabulary.tokens) == 256 + len(vocabulary.merges) + special <= 300
    assert vocabulary.tokens[-special:] == (*CONTROL_TOKENS, *USER_TOKENS)
    tokenizer = tokenizer_of(vocabulary)
    assert len(tokenizer.encode("the", parse_special=False)) == 1
    assert len(tokenizer.encode("17", parse_special=False)) == 2  # a digit is never merged
    assert not [merge for merge in vocabulary.merges if "<|" in merge or "|>" in merge]
    ids = [vocabulary.tokens.index(token) for token in ("<|im_start|>", "<think>")]
    assert tokenizer.encode("<|im_start|><think>", parse_special=True) == ids
