"""Conversations with declared tools: which one to call, with which arguments, and what its result says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Final

from tools import demo_words as words
from tools.demo_items import (
    Check,
    Message,
    Split,
    a_key,
    a_name,
    a_text,
    a_value,
    a_word,
    belongs,
    draw,
    listed,
    one_of,
)

# tools for what the model does by itself
OWN_WORK: Final = ("calculate", "multiply", "divide", "translate", "random_number")
NO_TOOL: Final = "I have no tool for that."


@dataclass(frozen=True)
class Argument:
    """One parameter of a tool: its name, its JSON type, the values an enum allows, and what it is about."""

    name: str
    type: str
    choices: tuple[str, ...] = ()
    about: str = ""

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")

    def schema(self, rng: Random) -> Message:
        schema: Message = {"type": self.type}
        if rng.random() < 0.6:
            schema["description"] = rng.choice(("The {w}", "{w}", "The {w} to use", "the {w}")).format(
                w=self.words
            )
        if self.choices:
            schema["enum"] = list(self.choices)
        return schema

    def value(self, rng: Random, split: Split) -> Any:
        if self.choices:
            return rng.choice(self.choices)
        if self.type == "boolean":
            return rng.random() < 0.5
        if self.type in ("integer", "number") or self.about == "expression":
            return draw(lambda: self._reckoned(rng), lambda value: belongs("value", value, split))
        known = _VALUES.get(self.about)
        if known is not None and rng.random() < 0.65:
            return one_of(rng, split, known)
        if self.about in ("contact", "to", "name", "author", "artist") and rng.random() < 0.7:
            return a_name(rng, split)
        return a_text(rng, split)

    def _reckoned(self, rng: Random) -> int | float | str:
        """A number, or an expression of two."""
        if self.type == "integer":
            return rng.choice((rng.randint(0, 20), rng.randint(0, 100), rng.randint(100, 2000)))
        if self.type == "number":
            return rng.randint(0, 99) + rng.randint(1, 9) / 10
        return f"{rng.randint(0, 99)} {rng.choice('+-*/')} {rng.randint(1, 99)}"


# what well-known arguments hold
_VALUES: Final = {
    **dict.fromkeys(("city", "location", "origin", "destination"), words.CITIES),
    "dish": words.DISHES,
    "food": words.DISHES,
    "room": words.ROOMS,
    "time": words.TIMES,
    "path": words.PATHS,
    "folder": words.PATHS,
    "title": words.SONGS,
    "symbol": words.STOCKS,
    "currency": words.MONEY,
    "task": words.TASKS,
    "subject": words.TALKS,
    "query": words.TOPICS,
}


@dataclass(frozen=True)
class Tool:
    """A function, how people ask for it ("{name}" stands for an argument), and what its result may hold."""

    name: str
    description: str
    arguments: tuple[Argument, ...]
    requests: tuple[str, ...]
    results: tuple[str, ...] = ()
    purpose: str = ""  # the well-known one, by its first name

    @property
    def is_known(self) -> bool:
        return bool(self.purpose)

    def schema(self, rng: Random, required: Sequence[str]) -> Message:
        properties = {argument.name: argument.schema(rng) for argument in self.arguments}
        parameters: Message = {"type": "object", "properties": properties}
        # with an argument left out, only `required` says that this is right
        if len(required) < len(self.arguments) or rng.random() < 0.8:
            parameters["required"] = list(required)
        if rng.random() < 0.1:
            parameters["additionalProperties"] = False
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        if rng.random() < 0.06:
            del function["description"]
        return {"type": "function", "function": function}


def _natural_tool(
    name: str, description: str, arguments: Sequence[str], requests: Sequence[str], results: Sequence[str]
) -> Tool:
    """A tool of the words' table; an argument is "name" or "name:type" or "name:choice|choice"."""
    parsed = []
    for text in arguments:
        argument, _, kind = text.partition(":")
        choices = tuple(kind.split("|")) if "|" in kind else ()
        parsed.append(Argument(argument, "string" if choices or not kind else kind, choices, argument))
    return Tool(name, description, tuple(parsed), tuple(requests), tuple(results), name)


NATURAL: Final = tuple(_natural_tool(**one) for one in words.NATURAL_TOOLS)


_DESCRIBED: Final = (*("{d}", "{d}", "{d}.", "{l}", "Use this to {l}.", "{d} for the user", "Tool: {l}"),)


def known_tool(rng: Random, split: Split) -> Tool:
    """A tool for a well-known purpose, under one of many names."""
    tool = rng.choice(NATURAL)
    name = draw(lambda: _other_tool_name(rng, tool.name), lambda name: _name_belongs(name, split))
    names: dict[str, str] = {}
    for argument in tool.arguments:
        names[argument.name] = draw(
            lambda about=argument.about: _other_argument_name(rng, about),  # type: ignore[misc]
            lambda new: new not in names.values() and belongs("key", new, split),
        )
    arguments = tuple(replace(argument, name=names[argument.name]) for argument in tool.arguments)
    shown = {old: "{" + new + "}" for old, new in names.items()}
    requests = tuple(form.format(**shown) for form in tool.requests)
    lower = tool.description[:1].lower() + tool.description[1:]
    description = rng.choice(_DESCRIBED).format(d=tool.description, l=lower)
    return replace(tool, name=name, description=description, arguments=arguments, requests=requests)


def _other_tool_name(rng: Random, name: str) -> str:
    verb, _, noun = name.partition("_")
    verb = rng.choice(words.VERBS_ALIKE.get(verb, [verb]))
    parts = [rng.choice(words.NOUNS_ALIKE.get(part, [part])) for part in noun.split("_") if part]
    chance = rng.random()
    if chance < 0.12:
        parts.append(rng.choice(("now", "tool", "api", "service", "function", "v2", "info", "for_user")))
    elif chance < 0.24:
        parts.insert(0, rng.choice(words.FIELD_KINDS))
    chance = rng.random()
    ordered = [verb, *parts]
    if noun and chance < 0.2:
        ordered = parts if chance < 0.1 else [*parts, verb]
    pieces = "_".join(ordered).split("_")
    if rng.random() < 0.15:
        return pieces[0] + "".join(piece.capitalize() for piece in pieces[1:])
    return "_".join(pieces)


def _other_argument_name(rng: Random, about: str) -> str:
    name = rng.choice(words.ARGUMENTS_ALIKE.get(about, [about]))
    chance = rng.random()
    if chance < 0.25:
        return f"{rng.choice(words.FIELD_KINDS)}_{name}"
    if chance < 0.3:
        return name.upper() if len(name) > 1 else f"{name}1"
    if chance < 0.35:
        return f"{name}_{rng.choice(('value', 'name', 'text', 'input', 'arg'))}"
    return name


def made_up_tool(rng: Random, split: Split) -> Tool:
    """A tool whose name is a verb and a thing, with arguments of any kind."""

    def make() -> tuple[str, str, str]:
        verb = rng.choice(words.TOOL_VERBS)
        thing = a_key(rng, split) if rng.random() < 0.5 else a_word(rng, split)
        return verb, thing, _tool_name(rng, verb, thing)

    verb, thing, name = draw(make, lambda made: _name_belongs(made[2], split))
    spoken = thing.replace("_", " ")
    arguments = _made_up_arguments(rng, split)
    description = rng.choice(
        (
            "{v} the {t}",
            "{v} a {t}",
            "{v} the {t}.",
            "{v} one {t} for the user.",
            "Use this to {l} a {t}.",
            "{v} {t}",
        )
    )
    mentions = _mentions(rng, arguments)
    openings = (
        *(
            "{v} the {t}",
            "{v} a {t}",
            "Please {l} the {t}",
            "Can you {l} the {t}",
            "I want to {l} the {t}",
            "{v} {t}",
        ),
        *(
            "Please {l} a {t}",
            "Could you {l} a {t}",
            "{v} my {t}",
            "Use {n}",
            "Call {n}",
            "I need you to {l} the {t}",
        ),
    )
    said = verb.replace("_", " ")
    names = {"v": said.capitalize(), "l": said, "t": spoken, "n": name}
    requests = tuple(
        f"{opening.format(**names)}{mention}" for opening in rng.sample(openings, 2) for mention in mentions
    )
    return Tool(name, description.format(**names), arguments, requests)


def _made_up_arguments(rng: Random, split: Split) -> tuple[Argument, ...]:
    arguments: dict[str, Argument] = {}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 2, 3, 3, 4))):
        name = a_key(rng, split)
        kind = rng.choice(
            ("string", "string", "string", "string", "integer", "integer", "number", "boolean", "enum")
        )
        if kind == "enum":
            arguments[name] = Argument(name, "string", tuple({a_word(rng, split): 0 for _ in range(3)}))
        else:
            arguments[name] = Argument(name, kind)
    return tuple(arguments.values())


def _name_belongs(name: str, split: Split) -> bool:
    """Whether a tool's name belongs to the split, however its parts are joined."""
    return belongs("tool", name.lower().replace("_", "").replace(".", ""), split)


def _tool_name(rng: Random, verb: str, thing: str) -> str:
    chance = rng.random()
    if chance < 0.75:
        return f"{verb}_{thing}"
    if chance < 0.9:
        return verb + "".join(part.capitalize() for part in thing.split("_"))
    return f"{thing}_{verb}" if chance < 0.95 else f"{thing}.{verb}"


def _mentions(rng: Random, arguments: Sequence[Argument]) -> tuple[str, ...]:
    """How the arguments may be named after the request's opening."""
    if not arguments:
        return (".", ", please.", "")
    pairs = [(argument.words, "{" + argument.name + "}") for argument in arguments]
    return (
        " with " + listed([f"{name} {value}" for name, value in pairs]) + ".",
        ": " + ", ".join(f"{name} {value}" for name, value in pairs),
        ". " + " ".join(f"The {name} is {value}." for name, value in pairs),
        " with " + listed([f"the {name} {value}" for name, value in pairs]) + rng.choice((".", "?", "")),
        ", " + ", ".join(f"{name}: {value}" for name, value in pairs),
        " with " + ", ".join(f"{name} = {value}" for name, value in pairs) + ".",
    )


def a_tool(rng: Random, split: Split) -> Tool:
    return known_tool(rng, split) if rng.random() < 0.5 else made_up_tool(rng, split)


@dataclass(frozen=True)
class ToolScene:
    """The declared tools and the messages from the request on; `thought` and `check` are of the last."""

    tools: tuple[Message, ...]
    messages: tuple[Message, ...]
    thought: str
    check: Check
    results: tuple[str, ...] = ()


def unneeded_tools(rng: Random) -> tuple[Message, ...]:
    """Declared tools for what the model does not do by itself."""
    tools = draw(
        lambda: _tools(rng, "train"), lambda two: not any(t.purpose in OWN_WORK for t in (two[0], *two[1]))
    )
    return _shuffled_schemas(rng, tools[0], [a.name for a in tools[0].arguments], tools[1])


def call_scene(rng: Random, split: Split) -> ToolScene:
    """A request that one of the declared tools serves, or none does, or that lacks something."""
    chosen, others = _tools(rng, split)
    chance = rng.random()
    if chance < 0.08:
        return _no_tool(rng, split, [chosen, *others])
    if chance < 0.14 and chosen.arguments:
        return _missing(rng, chosen, others)
    given = chosen.arguments
    if not chosen.is_known:  # some are left out, never all
        given = tuple(argument for argument in given if rng.random() > 0.15) or given
    calls, request = [], ""
    for number in range(2 if chance > 0.93 and given else 1):
        values = {argument.name: argument.value(rng, split) for argument in given}
        calls.append((chosen.name, values))
        text = _request(rng, chosen, given, values)
        request += text if number == 0 else f" Then {text[:1].lower()}{text[1:]}"
    required = [argument.name for argument in given]
    schemas = _shuffled_schemas(rng, chosen, required, others)
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [_call(name, values) for name, values in calls],
    }
    messages = ({"role": "user", "content": request}, answer)
    thought = f"{chosen.name} does that."
    return ToolScene(schemas, messages, thought, Check("calls", calls), chosen.results)


def result_scene(rng: Random, split: Split) -> ToolScene:
    """A call as above, its result, and the answer that tells it."""
    scene = draw(
        lambda: call_scene(rng, split), lambda one: one.check.kind == "calls" and len(one.check.value) == 1
    )
    *request, call = scene.messages
    content, says, answer = _result(rng, split, scene.results)
    if rng.random() < 0.5:
        call = {**call, "reasoning_content": scene.thought}
    messages = (
        *request,
        call,
        {"role": "tool", "content": content},
        {"role": "assistant", "content": answer},
    )
    return ToolScene(
        scene.tools, messages, "The tool has answered. I tell what it says.", Check("says", says)
    )


def _tools(rng: Random, split: Split) -> tuple[Tool, list[Tool]]:
    """The tool that is meant, and others for other purposes."""
    tools: dict[str, Tool] = {}
    for _ in range(rng.choice((1, 1, 2, 2, 3, 3, 4))):
        tool = a_tool(rng, split)
        if tool.name not in {other.name for other in tools.values()}:
            tools.setdefault(tool.purpose or tool.name, tool)
    chosen, *others = tools.values()
    return chosen, others


def _shuffled_schemas(
    rng: Random, chosen: Tool, required: Sequence[str], others: Sequence[Tool]
) -> tuple[Message, ...]:
    schemas = [chosen.schema(rng, required)]
    schemas += [tool.schema(rng, [argument.name for argument in tool.arguments]) for tool in others]
    rng.shuffle(schemas)
    return tuple(schemas)


def _request(rng: Random, tool: Tool, given: Sequence[Argument], values: Message) -> str:
    if tool.is_known or len(given) == len(tool.arguments):
        form = rng.choice(tool.requests)
    else:  # some arguments are left out: the same opening, with the others
        opening = rng.choice((f"Use {tool.name}", f"Call {tool.name}", f"Please use {tool.name}"))
        form = opening + rng.choice(_mentions(rng, given))
    return form.format(**{name: _shown(value) for name, value in values.items()})


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _call(name: str, arguments: Message) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# purposes near enough that one tool may stand in for another
_ALIKE: Final = (
    {"get_weather", "get_temperature", "get_forecast"},
    {"get_time", "current_date", "set_alarm", "set_timer"},
    {"send_email", "send_message", "call_contact", "add_note", "translate"},
    {"play_song", "play_music", "set_volume"},
    {"turn_on_light", "turn_off_light", "set_light", "set_thermostat"},
    {"find_recipe", "find_restaurant", "order_food", "book_table"},
    {"get_route", "get_distance", "book_flight", "book_hotel"},
    {"calculate", "multiply", "divide", "convert_currency", "get_stock_price", "random_number", "roll_dice"},
    {"add_task", "create_event", "get_events", "add_note", "set_alarm"},
    {"read_file", "delete_file", "list_files"},
    {"search_books", "search_web", "get_user", "track_package"},
)


def _no_tool(rng: Random, split: Split, declared: Sequence[Tool]) -> ToolScene:
    """A request for what no declared tool is near to."""
    declared = [tool for tool in declared if tool.purpose != "search_web"] or [made_up_tool(rng, split)]
    taken = {tool.purpose for tool in declared if tool.is_known}
    near = taken.union(*(group for group in _ALIKE if group & taken))
    wanted = draw(lambda: a_tool(rng, split), lambda tool: tool.purpose not in {*near, *OWN_WORK})
    values = {argument.name: argument.value(rng, split) for argument in wanted.arguments}
    request = _request(rng, wanted, wanted.arguments, values)
    if rng.random() < 0.3:
        request = rng.choice(words.TOPIC_REQUESTS).format(t=rng.choice(words.TOPICS))
    if wanted.name in request:
        return call_scene(rng, split)
    schemas = tuple(tool.schema(rng, [argument.name for argument in tool.arguments]) for tool in declared)
    messages = ({"role": "user", "content": request}, {"role": "assistant", "content": NO_TOOL})
    return ToolScene(schemas, messages, "None of my tools does that.", Check("equals", NO_TOOL))


def _missing(rng: Random, tool: Tool, others: Sequence[Tool]) -> ToolScene:
    """A request without the arguments: the answer asks for them."""
    request = rng.choice(
        (f"Use {tool.name}.", f"Call {tool.name}.", f"Please use {tool.name}.", f"{tool.name}")
    )
    names = [argument.name for argument in tool.arguments]
    answer = f"Please tell me the {listed([argument.words for argument in tool.arguments])}."
    messages = ({"role": "user", "content": request}, {"role": "assistant", "content": answer})
    schemas = _shuffled_schemas(rng, tool, names, others)
    for schema in schemas:
        schema["function"]["parameters"].setdefault(
            "required", list(schema["function"]["parameters"]["properties"])
        )
    return ToolScene(schemas, messages, f"{tool.name} needs {listed(names)}.", Check("equals", answer))


def _result(rng: Random, split: Split, known: Sequence[str]) -> tuple[str, list[str], str]:
    """What a tool gave back, the values that an answer must tell, and the answer."""
    chance = rng.random()
    if chance < 0.1:
        what = a_text(rng, split)
        problem = f"{what} {rng.choice(('not found', 'is not available', 'timed out', 'is not allowed'))}"
        return json.dumps({"error": problem}), [problem], f"That did not work: {problem}."
    if chance < 0.25:
        text = _shown(a_value(rng, split))
        return text, [text], f"The result is {text}."
    number = rng.randint(1, 3)
    keys = known if known and rng.random() < 0.7 else [a_key(rng, split) for _ in range(number)]
    result = {key: a_value(rng, split) for key in keys}
    told = [f"the {key.replace('_', ' ')} is {_shown(value)}" for key, value in result.items()]
    answer = listed(told)
    return (
        json.dumps(result, ensure_ascii=False),
        [_shown(value) for value in result.values()],
        f"{answer[:1].upper()}{answer[1:]}.",
    )
