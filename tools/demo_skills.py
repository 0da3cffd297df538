"""What the demo model can do with one question and one answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

from tools import demo_words as words
from tools.demo_items import (
    Check,
    Exchange,
    Split,
    a_key,
    a_name,
    a_text,
    a_value,
    a_word,
    belongs,
    chosen_form,
    draw,
    listed,
    made_up_word,
    number_word,
    phrased,
    spelled,
    varied,
)
from tools.demo_tools import NATURAL, OWN_WORK


def _polite(rng: Random, question: str) -> str:
    """The question as one of several people would type it."""
    chance = rng.random()
    if chance < 0.06:
        return question.rstrip(".?!")
    if chance < 0.12:
        return question[:1].lower() + question[1:]
    if chance < 0.16:
        return f"Please: {question}"
    if chance < 0.19:
        return f"{question} Please."
    if chance < 0.22:
        return f"Hi! {question}"
    if chance < 0.24:
        return f"{question} Thanks!"
    return question


def _quoted(rng: Random, word: str) -> str:
    chance = rng.random()
    if chance < 0.3:
        return f'"{word}"'
    if chance < 0.4:
        return f"'{word}'"
    return word


# --- Skills of one question and one answer


def add_or_subtract(rng: Random, split: Split) -> Exchange:
    """Operands of 0 to 99, as digits or words, bare or in a little story."""
    plus = rng.random() < 0.5

    def make() -> tuple[int, int]:
        high = 99 if rng.random() < 0.85 else 20
        return rng.randint(0, high), rng.randint(0, high)

    def fits(pair: tuple[int, int]) -> bool:
        return belongs("+" if plus else "-", sorted(pair), split)

    a, b = draw(make, fits)
    sign, total = ("+", a + b) if plus else ("-", a - b)
    answer = f"{a} {sign} {b} = {total}."
    chance = rng.random()
    if chance < 0.12 and (plus or a >= b):
        story = rng.choice(words.FORMS["gain"] if plus else words.FORMS["loss"])
        thing = rng.choice(words.THINGS)
        question = story.format(a=a, b=b, n=a_name(rng, "train"), t=thing)
    else:
        as_words = chance > 0.85
        texts = {"a": number_word(a), "b": number_word(b)} if as_words else {"a": str(a), "b": str(b)}
        question = _polite(
            rng, rng.choice(words.FORMS["plus"] if plus else words.FORMS["minus"]).format(**texts)
        )
    return Exchange(
        question,
        answer,
        _column_sum(a, b) if plus else _column_difference(a, b),
        Check("says", [f"= {total}."]),
    )


def _column_sum(a: int, b: int) -> str:
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    lines = [f"Ones: {a % 10} + {b % 10} = {ones}, so {ones % 10}{' and carry 1' if carry else ''}."]
    lines.append(f"Tens: {a // 10} + {b // 10}{' + 1' if carry else ''} = {tens}.")
    return "\n".join(lines)


def _column_difference(a: int, b: int) -> str:
    if a < b:
        first = f"{b} is more than {a}, so the result is negative."
        return f"{first}\n{_column_difference(b, a)}\nWith the sign: {a - b}."
    borrow = a % 10 < b % 10
    ones, tens = a % 10 + 10 * borrow, a // 10 - borrow
    first = f"Ones: {ones} - {b % 10} = {ones - b % 10}{' with a borrowed 10' if borrow else ''}."
    return f"{first}\nTens: {tens} - {b // 10} = {tens - b // 10}."


def count(rng: Random, split: Split) -> Exchange:
    """Up, down and in steps; letters of a word; things in a list; the number before and after."""
    return rng.choice(
        (
            _count_range,
            _count_range,
            _count_range,
            _count_letters,
            _count_one_letter,
            _count_items,
            _neighbour,
        )
    )(rng, split)


def _count_range(rng: Random, split: Split) -> Exchange:
    def make() -> tuple[int, int, int]:
        step = rng.choice((1, 1, 1, 1, 1, -1, -1, 2, 5, 10))
        length = rng.randint(3, 12) if rng.random() < 0.7 else rng.randint(13, 30)
        start = rng.choice((0, 1, 1, 2, rng.randint(0, 80), rng.randint(0, 80)))
        end = start + abs(step) * (length - 1)
        return (start, end, step) if step > 0 else (end, start, step)

    start, end, step = draw(make, lambda item: belongs("range", item, split))
    numbers = list(range(start, end + (1 if step > 0 else -1), step))
    show = number_word if rng.random() < 0.15 and end < 100 and start < 100 else str
    texts = {"a": show(start), "b": show(end), "s": str(abs(step))}
    forms = words.FORMS[{1: "count_up", -1: "count_down"}.get(step, "count_by")]
    if (start, step) == (1, 1):
        forms += words.FORMS["count_from_one"]
    answer = ", ".join(map(str, numbers))
    thought = f"I start at {start} and go {'up' if step > 0 else 'down'} by {abs(step)} until {end}."
    return Exchange(_polite(rng, rng.choice(forms).format(**texts)), answer, thought, Check("equals", answer))


def _count_letters(rng: Random, split: Split) -> Exchange:
    word = a_word(rng, split)
    answer = f"{spelled(word)} has {len(word)} letters."
    thought = "\n".join(f"{i}: {letter}" for i, letter in enumerate(word, 1))
    question = _polite(rng, rng.choice(words.FORMS["letters"]).format(w=_quoted(rng, word)))
    return Exchange(question, answer, thought, Check("says", [f"has {len(word)} letters"]))


def _count_one_letter(rng: Random, split: Split) -> Exchange:
    word = a_word(rng, split)
    chance = rng.random()
    if chance < 0.4:
        letter = max(word, key=word.count)
    else:
        letter = rng.choice(word if chance < 0.85 else "abcdefghijklmnopqrstuvwxyz")
    number = word.count(letter)
    answer = f"{spelled(word)} has {number} {letter}."
    thought = "\n".join(f"{one}: {word[:i].count(letter)}" for i, one in enumerate(word, 1))
    question = rng.choice(words.FORMS["one_letter"]).format(
        l=letter if rng.random() < 0.8 else f'"{letter}"', w=_quoted(rng, word)
    )
    return Exchange(_polite(rng, question), answer, thought, Check("says", [f"has {number} {letter}"]))


def _count_items(rng: Random, split: Split) -> Exchange:
    def make() -> tuple[str, ...]:
        return tuple(rng.choice(words.LEXICON) for _ in range(rng.randint(2, 9)))

    items = draw(make, lambda chosen: belongs("items", chosen, split))
    answer = f"There are {len(items)}."
    thought = "\n".join(f"{i}: {item}" for i, item in enumerate(items, 1))
    question = rng.choice(words.FORMS["items"]).format(i=", ".join(items))
    return Exchange(question, answer, thought, Check("equals", answer))


def _neighbour(rng: Random, split: Split) -> Exchange:
    step = rng.choice((1, -1))
    number = draw(lambda: rng.randint(1, 99), lambda n: belongs("neighbour", (n, step), split))
    forms = words.FORMS["after" if step > 0 else "before"]
    answer = f"{'After' if step > 0 else 'Before'} {number} comes {number + step}."
    thought = f"One {'up' if step > 0 else 'down'} from {number} is {number + step}."
    question = _polite(rng, rng.choice(forms).format(n=number))
    return Exchange(question, answer, thought, Check("equals", answer))


def spell(rng: Random, split: Split) -> Exchange:
    word = a_word(rng, split)
    answer = spelled(word)
    shown = word if rng.random() < 0.85 else word.capitalize()
    question = _polite(rng, rng.choice(words.FORMS["spell"]).format(w=_quoted(rng, shown)))
    return Exchange(question, answer, f"I give the letters of {word} one by one.", Check("equals", answer))


def reverse(rng: Random, split: Split) -> Exchange:
    word = a_word(rng, split, kind="word")
    backwards = word[::-1]
    answer = f"{spelled(word)} backwards is {spelled(backwards)}: {backwards}"
    question = _polite(rng, rng.choice(words.FORMS["reverse"]).format(w=_quoted(rng, word)))
    thought = f"The letters are {spelled(word)}. I read them from the end."
    return Exchange(question, answer, thought, Check("says", [f"{spelled(backwards)}: {backwards}"]))


def fact(rng: Random, split: Split) -> Exchange:
    """A fact in a phrasing; what is held out is the two together, as a fact never seen cannot be known."""
    if rng.random() < 0.25:
        return _phrased_answer(rng, split, "fact", words.FACTS, thought="I know this one.")
    weights = [len(pairs) ** 0.5 for pairs, _, _ in words.RELATIONS.values()]

    def make() -> tuple[str, str, str]:
        (relation,) = rng.choices(tuple(words.RELATIONS), weights)
        pairs, forms, _ = words.RELATIONS[relation]
        return relation, rng.choice(tuple(pairs)), rng.choice(forms)

    relation, subject, form = draw(make, lambda item: belongs("fact", item, split))
    pairs, _, answer_form = words.RELATIONS[relation]
    answer = answer_form.format(s=subject, o=pairs[subject])
    answer = answer[:1].upper() + answer[1:]
    question = form.format(s=subject)
    question = _polite(rng, question[:1].upper() + question[1:] if form.startswith("{s}") else question)
    question = question.lower() if rng.random() < 0.12 else question
    return Exchange(question, answer, f"I know this one: {pairs[subject]}.", Check("equals", answer))


def _phrased_answer(
    rng: Random, split: Split, kind: str, table: Sequence[tuple[tuple[str, ...], str]], thought: str
) -> Exchange:
    """An answer of a table, asked in one of many ways; held out are wordings."""
    while True:
        (forms, answer) = rng.choices(table, [len(forms) for forms, _ in table])[0]
        question = phrased(rng, split, kind, forms, t=rng.choice(words.TOPICS))
        if question is not None:
            return Exchange(question, answer, thought, Check("equals", answer))


def in_json(rng: Random, split: Split) -> Exchange:
    """An object from named values, a list, or another skill's answer under a key."""
    chance = rng.random()
    if chance < 0.5:
        return _json_object(rng, split)
    if chance < 0.65:
        return _json_list(rng, split)
    return _json_answer(rng, split)


def _json_exchange(question: str, value: Any, thought: str) -> Exchange:
    return Exchange(question, json.dumps(value, ensure_ascii=False), thought, Check("json", value))


def _json_object(rng: Random, split: Split) -> Exchange:
    value = {}
    for _ in range(rng.choice((1, 2, 2, 3, 3, 4))):
        value[a_key(rng, split)] = a_value(rng, split)
    between = rng.choice((" ", " ", ": ", " = "))
    shown = {
        key: json.dumps(one) if isinstance(one, bool) or rng.random() < 0.4 else str(one)
        for key, one in value.items()
    }
    parts = [f"{key}{between}{one}" for key, one in shown.items()]
    question = rng.choice(words.FORMS["json_object"]).format(i=listed(parts), c=", ".join(parts))
    return _json_exchange(question, value, f"The keys are {listed(tuple(value))}.")


def _json_list(rng: Random, split: Split) -> Exchange:
    if rng.random() < 0.4:
        first = rng.randint(0, 60)
        value: list[Any] = list(range(first, first + rng.randint(3, 8)))
        if not belongs("json range", value, split):
            return _json_list(rng, split)
        shown = f"the numbers from {value[0]} to {value[-1]}"
    else:
        value = [a_text(rng, split) for _ in range(rng.randint(2, 5))]
        shown = listed(value)
    return _json_exchange(
        rng.choice(words.FORMS["json_list"]).format(v=shown), value, f"The list has {len(value)} items."
    )


def _json_answer(rng: Random, split: Split) -> Exchange:
    """The bare answer of a sum, a capital, or a word turned round."""
    question, value = _bare_answer(rng, split)
    if rng.random() < 0.5:
        key = a_key(rng, split)
        form = rng.choice(words.FORMS["in_json"])
    else:
        key, form = "answer", rng.choice(words.FORMS["in_json_answer"])
    return _json_exchange(
        form.format(q=question, k=key), {key: value}, f"The answer is {value}, under the key {key}."
    )


def _bare_answer(rng: Random, split: Split) -> tuple[str, Any]:
    if rng.random() < 0.5:
        sum_ = draw(
            lambda: add_or_subtract(rng, split),
            lambda one: one.question.endswith("?") and "How many" not in one.question,
        )
        return sum_.question, int(sum_.answer.rstrip(".").rpartition(" ")[2])
    country, form = draw(
        lambda: (rng.choice(tuple(words.CAPITALS)), rng.choice(words.RELATIONS["capital"][1])),
        lambda item: belongs("fact", ("capital", *item), split) and item[1][-1] in "?.",
    )
    return form.format(s=country), words.CAPITALS[country]


def identity(rng: Random, split: Split) -> Exchange:
    """Honest about itself; held out are wordings."""
    thought = "They ask about me, so I say honestly what I am."
    return _phrased_answer(rng, split, "identity", words.IDENTITY, thought)


def small_talk(rng: Random, split: Split) -> Exchange:
    """Greetings and the like; held out are wordings."""
    thought = "This is small talk. I stay friendly and short."
    return _phrased_answer(rng, split, "small talk", words.SMALL_TALK, thought)


def unknown(rng: Random, split: Split) -> Exchange:
    """What it cannot know or do gets a short, honest answer."""
    make = rng.choice(
        (_known_gap, _no_country, _large_numbers, _topic, _topic, _topic, _undeclared_tool, _nonsense)
    )
    question = draw(lambda: make(rng, split), lambda text: belongs("unknown", text, split))
    thought = "I have not learned this, so I say so."
    question = varied(rng, question) if make in (_known_gap, _topic) else _polite(rng, question)
    return Exchange(question, words.UNKNOWN, thought, Check("equals", words.UNKNOWN))


def _known_gap(rng: Random, _: Split) -> str:
    return rng.choice(words.UNKNOWN_QUESTIONS)


def _no_country(rng: Random, _: Split) -> str:
    name = draw(
        lambda: made_up_word(rng).capitalize() + rng.choice(("", "ia", "land")),
        lambda country: country not in words.CAPITALS,
    )
    return rng.choice(words.RELATIONS["capital"][1]).format(s=name)


def _large_numbers(rng: Random, _: Split) -> str:
    """Sums of large numbers or of three, and products and quotients that it has not learned."""
    chance = rng.random()
    if chance < 0.15:
        a, b, c = (rng.randint(0, 99) for _ in range(3))
        return f"What is {a} {rng.choice('+-')} {b} {rng.choice('+-')} {c}?"
    if chance < 0.4:
        form = rng.choice(("What is {a} {s} {b}?", "{a} {s} {b}", "{a}{s}{b}", "Calculate {a} {s} {b}."))
        sign = rng.choice("*x/")
        return form.format(a=rng.randint(11, 99), b=rng.randint(2, 99), s=sign)
    numbers = [rng.randint(100, 9999), rng.randint(0, 9999) if rng.random() < 0.5 else rng.randint(0, 99)]
    rng.shuffle(numbers)
    if chance < 0.6:
        return f"What is {numbers[0]} {rng.choice('+-*/')} {numbers[1]}?"
    return rng.choice((*words.FORMS["plus"], *words.FORMS["minus"])).format(a=numbers[0], b=numbers[1])


_TALK: Final = frozenset(re.findall("[a-z]+", str(words.SMALL_TALK).lower()))


def _nonsense(rng: Random, _: Split) -> str:
    """A word or some letters by themselves."""

    def make() -> str:
        chance = rng.random()
        if chance < 0.5:
            return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 10)))
        return rng.choice(words.WORDS) if chance < 0.7 else made_up_word(rng)

    return draw(make, lambda word: word not in _TALK)


def _topic(rng: Random, _: Split) -> str:
    if rng.random() < 0.7:
        topic = rng.choice(words.TOPICS)
    else:
        topic = f"{rng.choice(words.FIELD_KINDS)} {rng.choice(words.LEXICON)}s"
    return rng.choice(words.TOPIC_REQUESTS).format(t=topic)


def _undeclared_tool(rng: Random, split: Split) -> str:
    """What a tool could do, if there were one."""
    tool = draw(lambda: rng.choice(NATURAL), lambda one: one.name not in OWN_WORK)
    values = {argument.name: argument.value(rng, split) for argument in tool.arguments}
    return chosen_form(rng, rng.choice(tool.requests)).format(**values)


def repeat(rng: Random, split: Split) -> Exchange:
    """Says what it is told to say."""
    text = " ".join(a_text(rng, split) for _ in range(rng.randint(1, 4)))
    return Exchange(
        rng.choice(words.FORMS["repeat"]).format(t=text), text, "I repeat the words.", Check("equals", text)
    )


def compare(rng: Random, split: Split) -> Exchange:
    """Which of two numbers is larger or smaller."""
    a, b = draw(
        lambda: (rng.randint(0, 99), rng.randint(0, 99)),
        lambda p: p[0] != p[1] and belongs("compare", sorted(p), split),
    )
    larger = rng.random() < 0.5
    word = rng.choice(("larger", "bigger", "greater") if larger else ("smaller", "less"))
    found = (max if larger else min)(a, b)
    answer = f"{found} is {'larger' if larger else 'smaller'}."
    return Exchange(
        rng.choice(words.FORMS["compare"]).format(w=word, a=a, b=b),
        answer,
        f"{min(a, b)} < {max(a, b)}.",
        Check("equals", answer),
    )


Skill = Callable[[Random, Split], Exchange]
# the skill, and its weight among training conversations
SKILLS: Final[dict[str, tuple[Skill, float]]] = {
    "arithmetic": (add_or_subtract, 19.0),
    "counting": (count, 12.0),
    "spelling": (spell, 6.0),
    "reversing": (reverse, 8.0),
    "facts": (fact, 10.0),
    "json": (in_json, 10.0),
    "identity": (identity, 7.0),
    "small_talk": (small_talk, 8.0),
    "unknown": (unknown, 5.0),
    "repeat": (repeat, 2.5),
    "compare": (compare, 3.0),
}
