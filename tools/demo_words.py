"""What the demo model's conversations are made of: the words, names, facts and phrases of demo_words.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_TABLES: Final[dict[str, Any]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))

# questions, and the answer to each
Answered = tuple[tuple[str, ...], str]


def _words(name: str) -> tuple[str, ...]:
    return tuple(_TABLES["words"][name].split())


def _phrases(name: str) -> tuple[str, ...]:
    return tuple(_TABLES["phrases"][name])


def _answered(name: str) -> tuple[Answered, ...]:
    return tuple((tuple(one["questions"]), one["answer"]) for one in _TABLES[name])


ONES: Final = _words("ones")
TENS: Final = ("", "", *_words("tens"))
ONSETS: Final = _words("onsets")
VOWELS: Final = _words("vowels")
CODAS: Final = ("", *_words("codas"))

NAMES: Final = _words("names")
WORDS: Final = _words("words")
COLOURS: Final = _words("colours")
THINGS: Final = _words("things")
CITIES: Final = _words("cities")
DAYS: Final = _words("days")
MONTHS: Final = _words("months")
FIELD_NOUNS: Final = _words("field_nouns")
FIELD_KINDS: Final = _words("field_kinds")
TOOL_VERBS: Final = _words("tool_verbs")
DISHES: Final = _words("dishes")
ROOMS: Final = _words("rooms")
STOCKS: Final = _words("stocks")

OPENINGS: Final = _phrases("openings")
CLOSINGS: Final = _phrases("closings")
TOPICS: Final = _phrases("topics")
TOPIC_REQUESTS: Final = _phrases("topic_requests")
UNKNOWN: Final[str] = _TABLES["phrases"]["unknown"]
UNKNOWN_QUESTIONS: Final = _phrases("unknown_questions")
SYSTEM_PROMPTS: Final = _phrases("system_prompts")
TIMES: Final = _phrases("times")
PATHS: Final = _phrases("paths")
SONGS: Final = _phrases("songs")
MONEY: Final = _phrases("money")
TASKS: Final = _phrases("tasks")
TALKS: Final = _phrases("talks")

FORMS: Final = {name: tuple(forms) for name, forms in _TABLES["forms"].items()}
IDENTITY: Final = _answered("identity")
SMALL_TALK: Final = _answered("small_talk")

NATURAL_TOOLS: Final[list[dict[str, Any]]] = _TABLES["tools"]
VERBS_ALIKE: Final[dict[str, list[str]]] = _TABLES["alike"]["verbs"]
NOUNS_ALIKE: Final[dict[str, list[str]]] = _TABLES["alike"]["nouns"]
ARGUMENTS_ALIKE: Final[dict[str, list[str]]] = _TABLES["alike"]["arguments"]


def _begun_otherwise(question: str) -> str:
    """A question with more ways to begin it."""
    for start, starts in _TABLES["beginnings"].items():
        if question.startswith(start):
            return str(starts) + question.removeprefix(start)
    return question


FACTS: Final = tuple(
    (tuple(map(_begun_otherwise, questions)), answer) for questions, answer in _answered("facts")
)

_LISTED: Final[dict[str, dict[str, str]]] = {
    name: relation["pairs"] for name, relation in _TABLES["relations"].items() if "pairs" in relation
}
CAPITALS: Final = _LISTED["capital"]
OPPOSITES: Final = _LISTED["opposite"]


def _shifted(names: tuple[str, ...], by: int) -> dict[str, str]:
    """Of each name in a circle the one that stands `by` places further."""
    return dict(zip(names, names[by:] + names[:by], strict=True))


def _products(*signs: str) -> dict[str, str]:
    return {f"{a}{sign}{b}": str(a * b) for a in range(11) for b in range(11) for sign in signs}


_LENGTHS: Final = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_WORKED_OUT: Final = {
    "country": {city: country for country, city in CAPITALS.items()},
    "next day": _shifted(DAYS, 1),
    "last day": _shifted(DAYS, -1),
    "next month": _shifted(MONTHS, 1),
    "last month": _shifted(MONTHS, -1),
    "month length": {month: str(length) for month, length in zip(MONTHS, _LENGTHS, strict=True)},
    "times": _products(" times "),
    "product": _products(" * ", "*", " x ", "x"),
}

# subjects and their objects, questions, answer; "{s}" stands for the subject, "{o}" for the object
RELATIONS: Final[dict[str, tuple[dict[str, str], tuple[str, ...], str]]] = {
    name: ({**_LISTED, **_WORKED_OUT}[name], tuple(relation["questions"]), relation["answer"])
    for name, relation in _TABLES["relations"].items()
}


@dataclass(frozen=True)
class Remembered:
    """How a thing is told of ({x}) and asked for; `never` is the answer where it was not told."""

    thing: str
    tellings: tuple[str, ...]
    reply: str
    questions: tuple[str, ...]
    answer: str
    never: str


def _remembered(thing: str, told: dict[str, Any]) -> Remembered:
    def about(form: str) -> str:
        return form.replace("{thing}", thing)

    return Remembered(
        thing,
        tellings=tuple(map(about, told["tellings"])),
        reply=about(told["reply"]),
        questions=tuple(map(about, told["questions"])),
        answer=about(told["answer"]),
        never=about(told["never"]),
    )


REMEMBERED: Final = (
    _remembered("name", _TABLES["remembered"]["name"]),
    *(
        _remembered(thing, _TABLES["remembered"]["thing"])
        for thing in _TABLES["remembered"]["thing"]["things"]
    ),
)

_ALL_WORDS: Final = {
    *(*WORDS, *COLOURS, *THINGS, *FIELD_NOUNS, *FIELD_KINDS, *OPPOSITES),
    *(*_words("animals"), *_words("fruits")),
}
LEXICON: Final = tuple(sorted(word for word in _ALL_WORDS if len(word) > 2))
