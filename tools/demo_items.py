"""The pieces of the demo model's conversations, each of which belongs to training or is held out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Literal, TypeVar
from zlib import crc32

from tools import demo_words as words

Message = dict[str, Any]
Split = Literal["train", "held_out"]
Kind = Literal["equals", "says", "json", "calls"]
Item = TypeVar("Item")

HELD_OUT_SHARE: Final = 10  # one item in so many
LEAST_HELD_OUT_WORDS: Final = 4
_CHOICE: Final = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Check:
    """What makes an answer right.

    `equals`: the whole text; `says`: each of some strings; `json`: this value and nothing else; `calls`:
    these calls, each a name and its arguments.
    """

    kind: Kind
    value: Any


@dataclass(frozen=True)
class Exchange:
    """A question, the answer, the thought before it when thinking is on, and what makes an answer right."""

    question: str
    answer: str
    thought: str
    check: Check


def is_held_out(kind: str, item: object) -> bool:
    """Whether an item is kept from training."""
    return crc32(f"{kind}:{item}".encode()) % HELD_OUT_SHARE == 0


def belongs(kind: str, item: object, split: Split) -> bool:
    return is_held_out(kind, item) == (split == "held_out")


def wording(text: str) -> str:
    """The words of a text alone: what is left when case, signs and spaces do not count."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower().replace("'", "")))


def wording_belongs(kind: str, text: str, split: Split) -> bool:
    """Whether a phrasing may be used: it is held out by its words, and one of few words never is."""
    words_of = wording(text)
    if len(words_of.split()) < LEAST_HELD_OUT_WORDS:
        return split == "train"
    return belongs(kind, words_of, split)


def chosen_form(rng: Random, form: str) -> str:
    """A form with one of the parts of each "[part|part]"."""
    while "[" in form:
        form = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), form)
    return form


def varied(rng: Random, text: str) -> str:
    """A question as one of many people would type it: openings, closings, case, signs, slips."""
    whole = len(text.split()) > 2
    if whole and rng.random() < 0.25:
        opening = rng.choice(words.OPENINGS)
        text = (
            f"{opening} {text[:1].lower() + text[1:] if opening[-1] in ',:' and text[:2] != 'I ' else text}"
        )
    if whole and rng.random() < 0.15:
        stem, sign = (text[:-1], text[-1]) if text[-1] in ".?!" else (text, "")
        text = f"{stem}{rng.choice((', ', ' '))}{rng.choice(words.CLOSINGS)}{sign}"
    chance = rng.random()
    if chance < 0.12:
        text = text.lower()
    elif chance < 0.2:
        text = text[:1].lower() + text[1:]
    elif chance < 0.22:
        text = text.upper()
    chance = rng.random()
    if chance < 0.15:
        text = text.rstrip(".?!") or text
    elif chance < 0.18:
        text += text[-1] if text[-1] in "?!." else "!"
    elif chance < 0.21:
        text = text.replace("'", "").replace(",", "")
    return _with_slip(rng, text) if len(text) > 8 and rng.random() < 0.04 else text


def _with_slip(rng: Random, text: str) -> str:
    """Two letters that changed places, or one that is missing."""
    at = rng.randrange(1, len(text) - 2)
    if rng.random() < 0.5:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at + 1 :]


def phrased(rng: Random, split: Split, kind: str, forms: Sequence[str], **names: str) -> str | None:
    """One of the forms, varied; None where it belongs to the other split."""
    text = chosen_form(rng, rng.choice(forms)).format(**names)
    text = varied(rng, text)
    return text if wording_belongs(kind, text, split) else None


def draw(make: Callable[[], Item], fits: Callable[[Item], bool]) -> Item:
    """The first of `make`'s results that fits."""
    while True:
        item = make()
        if fits(item):
            return item


def number_word(number: int) -> str:
    """A number below 100 in words."""
    if number < len(words.ONES):
        return words.ONES[number]
    tens, ones = divmod(number, 10)
    return f"{words.TENS[tens]}-{words.ONES[ones]}" if ones else words.TENS[tens]


def made_up_word(rng: Random) -> str:
    """A word of one to three pronounceable syllables."""
    return "".join(
        rng.choice(words.ONSETS) + rng.choice(words.VOWELS) + rng.choice(words.CODAS)
        for _ in range(rng.choice((1, 2, 2, 3)))
    )[:12]


def a_word(rng: Random, split: Split, kind: str = "word") -> str:
    """A word to spell: a real one, a made-up one, or one put together."""

    def make() -> str:
        chance = rng.random()
        if split == "held_out" or chance < 0.45:
            return rng.choice(words.LEXICON)
        if chance < 0.7:
            return made_up_word(rng)
        if chance < 0.9:
            return (rng.choice(words.LEXICON)[: rng.randint(2, 8)] + rng.choice(words.LEXICON))[:12]
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8)))

    return draw(make, lambda word: len(word) > 2 and belongs(kind, word, split))


def one_of(rng: Random, split: Split, choices: Sequence[str]) -> str:
    """One of the choices that belong to the split, or another word where none does."""
    belonging = [choice for choice in choices if belongs("word", choice, split)]
    return rng.choice(belonging) if belonging else a_word(rng, split)


def a_name(rng: Random, split: Split) -> str:
    def make() -> str:
        return rng.choice(words.NAMES) if rng.random() < 0.7 else made_up_word(rng)[:8].capitalize()

    return draw(make, lambda name: belongs("name", name, split) and len(name) > 1)


def spelled(word: str) -> str:
    return "-".join(word.lower())


def listed(items: Sequence[object]) -> str:
    """a, b and c."""
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def a_key(rng: Random, split: Split) -> str:
    """The name of a field, in snake_case."""

    def make() -> str:
        second = rng.choice(words.FIELD_NOUNS) if rng.random() < 0.85 else made_up_word(rng)
        return second if rng.random() < 0.5 else f"{rng.choice(words.FIELD_KINDS)}_{second}"

    return draw(make, lambda key: belongs("key", key, split))


def a_value(rng: Random, split: Split) -> str | int | bool | float:
    chance = rng.random()
    if chance < 0.35:
        return rng.choice((rng.randint(0, 9), rng.randint(0, 99), rng.randint(100, 2050)))
    if chance < 0.4:
        return rng.random() < 0.5
    if chance < 0.45:
        return rng.randint(1, 99) + rng.randint(1, 9) / 10
    return a_text(rng, split)


def a_text(rng: Random, split: Split) -> str:
    """A name, a city, a colour, a word or two."""
    chance = rng.random()
    if chance < 0.3:
        return a_name(rng, split)
    if chance < 0.6:
        return one_of(rng, split, words.CITIES if chance < 0.5 else words.COLOURS)
    if chance < 0.85:
        return a_word(rng, split)
    return f"{a_word(rng, split)} {a_word(rng, split)}"
