"""Request bodies: bytes to checked fields, or an error that names the field.

Source of the fields: OpenAI's API reference; min_p, top_k, repetition_penalty, ignore_eos,
return_token_ids and chat_template_kwargs are vLLM's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isinf
from types import MappingProxyType
from typing import Any, Final, NoReturn

from jaxmoe import MAX_TOP_LOGPROBS, RequestError, SamplingParams

MAX_BODY_SIZE: Final = 8 << 20
MAX_DEPTH: Final = 64
MAX_COMMAS: Final = 1 << 19
MAX_MESSAGES: Final = 2048
MAX_CHOICES: Final = 8

Check = Callable[[Any, str], Any]

_JSON_TYPES: Final = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a truth value",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


@dataclass(frozen=True)
class Body:
    """A checked request body.

    `prompt` is text or token ids, or else there are `messages`; `sampling` holds the given fields by
    SamplingParams' names; `names` maps those names to the client's own where they differ.
    """

    sampling: Mapping[str, Any]
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] = ""
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    enable_thinking: bool | None = None
    names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The sampling parameters: the request's before `defaults`."""
        return SamplingParams(**{**defaults, **self.sampling})

    def renamed(self, error: RequestError) -> RequestError:
        """The same error under the name that the client used for the field."""
        if error.param is None or error.param not in self.names:
            return error
        return RequestError(str(error), param=self.names[error.param], code=error.code)


def read_chat(raw: bytes) -> Body:
    """The body of POST /v1/chat/completions."""
    fields = _read_fields(raw, _CHAT_FIELDS, _CHAT_FOREIGN)
    if fields.get("top_logprobs") and not fields.get("logprobs"):
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    sampling = _sampling(fields)
    if fields.get("logprobs"):
        sampling["logprobs"] = fields.get("top_logprobs", 0)
    names = {"prompt": "messages"}
    if "max_completion_tokens" in fields:
        sampling["max_tokens"] = fields["max_completion_tokens"]
        names["max_tokens"] = "max_completion_tokens"
    thinking = fields.get("chat_template_kwargs", {}).get("enable_thinking")
    messages = _required(fields, "messages")
    return Body(sampling, messages, **_options(fields), enable_thinking=thinking, names=names)


def read_completion(raw: bytes) -> Body:
    """The body of POST /v1/completions."""
    fields = _read_fields(raw, _COMPLETION_FIELDS, _COMPLETION_FOREIGN)
    sampling = _sampling(fields)
    if "logprobs" in fields:
        sampling["logprobs"] = fields["logprobs"]
    return Body(sampling, prompt=_required(fields, "prompt"), **_options(fields))


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object from untrusted bytes: bounded depth, finite numbers, no repeated key, whole characters.

    Raises RequestError for anything else.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    _check_size(raw)
    fields = _decode(text)
    if not isinstance(fields, dict):
        raise RequestError(f"the body must be a JSON object, got {_JSON_TYPES[type(fields)]}")
    if "\\u" in text:
        _check_surrogates(fields)
    return fields


def _decode(text: str) -> object:
    try:
        return json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_repeats,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise RequestError(f"the body is not JSON: {error.msg} at {place}") from None
    except RequestError:
        raise
    except ValueError:  # Python's bound on the digits of an integer
        raise RequestError("the body holds an integer with too many digits") from None


def _check_size(raw: bytes) -> None:
    """Refuse what would exhaust the parser's stack, or keep it from letting any other thread run."""
    outside = b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    if outside.count(b",") > MAX_COMMAS:
        raise RequestError(f"the body holds more than {MAX_COMMAS} values")
    brackets = outside.translate(_TO_SQUARE, _NO_BRACKETS)
    depth = 0
    while b"[]" in brackets and depth < MAX_DEPTH:
        brackets, depth = brackets.replace(b"[]", b""), depth + 1
    if b"[]" in brackets or brackets.count(b"[") > MAX_DEPTH:
        raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels")


_TO_SQUARE: Final = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"the body holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise RequestError(f"the body holds {text[:40]}, which is out of range")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = counts.most_common(1)[0][0]
        raise RequestError(f"{repeated[:80]!r} is given twice", param=repeated[:80])
    return found


def _check_surrogates(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            shown = name.encode("ascii", "backslashreplace").decode()[:80]
            raise RequestError(f"{shown} holds half of a surrogate pair", param=shown) from None


def _wrong(name: str, expected: str, value: object) -> RequestError:
    return RequestError(f"{name} must be {expected}, got {_JSON_TYPES[type(value)]}", param=name)


def _of_type(kind: type, expected: str) -> Check:
    def check(value: Any, name: str) -> Any:
        if not isinstance(value, kind):
            raise _wrong(name, expected, value)
        return value

    return check


_string = _of_type(str, "a string")
_boolean = _of_type(bool, "true or false")
_list = _of_type(list, "a list")
_object = _of_type(dict, "an object")


def _integer(value: Any, name: str) -> int:
    if type(value) is not int:  # a bool is no integer here
        raise _wrong(name, "an integer", value)
    if not -(2**63) <= value < 2**63:
        raise RequestError(f"{name} must be a 64-bit integer", param=name)
    return value


def _integer_in(low: int, high: int) -> Check:
    def check(value: Any, name: str) -> int:
        number = _integer(value, name)
        if not low <= number <= high:
            raise RequestError(f"{name} must be between {low} and {high}, got {number}", param=name)
        return number

    return check


def _positive(value: Any, name: str) -> int:
    number = _integer(value, name)
    if number < 1:
        raise RequestError(f"{name} must be 1 or more, got {number}", param=name)
    return number


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float):
        raise _wrong(name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise RequestError(f"{name} is out of range", param=name) from None


def _stop(value: Any, name: str) -> tuple[str, ...]:
    if type(value) is str:
        return (value,)
    if type(value) is not list:
        raise _wrong(name, "a string or a list of strings", value)
    return tuple(_string(text, f"{name}[{i}]") for i, text in enumerate(value))


def _logit_bias(value: Any, name: str) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in _object(value, name).items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise RequestError(f"{name} has the key {key[:40]!r}, which is no token id", param=name)
        biases[int(key)] = _number(bias, f"{name}[{key}]")
    return biases


def _stream_options(value: Any, name: str) -> bool:
    include_usage = _object(value, name).get("include_usage")
    return False if include_usage is None else bool(_boolean(include_usage, f"{name}.include_usage"))


def _template_kwargs(value: Any, name: str) -> dict[str, bool]:
    switches = {}
    for key, switch in _object(value, name).items():
        if key != "enable_thinking":
            raise RequestError(
                f"{name} takes enable_thinking only, got {key[:80]!r}", param=f"{name}.{key[:80]}"
            )
        if switch is not None:
            switches[key] = _boolean(switch, f"{name}.{key}")
    return switches


def _prompt(value: Any, name: str) -> str | list[int]:
    """One prompt, which may stand alone in a list, as OpenAI's clients for many prompts send it."""
    if type(value) is list and value and type(value[0]) in (str, list):
        if len(value) > 1:
            raise RequestError(f"{name} must be one prompt, got {len(value)}", param=name)
        value, name = value[0], f"{name}[0]"
    if type(value) is str:
        return value
    if type(value) is not list:
        raise _wrong(name, "a string or a list of token ids", value)
    for i, token_id in enumerate(value):
        if type(token_id) is not int:
            raise _wrong(f"{name}[{i}]", "a token id", token_id)
    return value


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if not 1 <= len(_list(value, name)) <= MAX_MESSAGES:
        raise RequestError(f"{name} must hold 1 to {MAX_MESSAGES} messages, got {len(value)}", param=name)
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def _message(value: Any, name: str) -> dict[str, Any]:
    given = {key: part for key, part in _object(value, name).items() if part is not None}
    role = _string(given.get("role"), f"{name}.role")
    if role not in _ROLES:
        raise RequestError(f"{name}.role must be one of {', '.join(_ROLES)}", param=f"{name}.role")
    if "content" not in given and role != "assistant":
        raise RequestError(f"{name}.content is missing", param=f"{name}.content")
    checked = {
        key: check(given[key], f"{name}.{key}") for key, check in _MESSAGE_FIELDS.items() if key in given
    }
    return {**checked, "role": _ROLES[role]}


def _content(value: Any, name: str) -> str | list[dict[str, Any]]:
    if type(value) is str:
        return value
    if type(value) is not list:
        raise _wrong(name, "a string or a list of text parts", value)
    return [_text_part(part, f"{name}[{i}]") for i, part in enumerate(value)]


def _text_part(value: Any, name: str) -> dict[str, Any]:
    kind = _string(_object(value, name).get("type"), f"{name}.type")
    if kind != "text":
        raise RequestError(f"{name} is of type {kind[:40]!r}: only text is served", param=f"{name}.type")
    return {"type": kind, "text": _string(value.get("text"), f"{name}.text")}


def _tool_calls(value: Any, name: str) -> list[dict[str, Any]]:
    return [_tool_call(call, f"{name}[{i}]") for i, call in enumerate(_list(value, name))]


def _tool_call(value: Any, name: str) -> dict[str, Any]:
    function = _object(_object(value, name).get("function"), f"{name}.function")
    arguments = function.get("arguments")
    if type(arguments) not in (str, dict):
        raise _wrong(f"{name}.function.arguments", "a string of JSON or an object", arguments)
    called = _string(function.get("name"), f"{name}.function.name")
    return {"type": "function", "function": {"name": called, "arguments": arguments}}


_MESSAGE_FIELDS: Final[Mapping[str, Check]] = {
    "content": _content,
    "name": _string,
    "reasoning": _string,
    "reasoning_content": _string,
    "tool_calls": _tool_calls,
    "tool_call_id": _string,
}

_SAMPLING_FIELDS: Final[Mapping[str, Check]] = {
    "temperature": _number,
    "top_k": _integer,
    "top_p": _number,
    "min_p": _number,
    "frequency_penalty": _number,
    "presence_penalty": _number,
    "repetition_penalty": _number,
    "logit_bias": _logit_bias,
    "seed": _integer,
    "max_tokens": _positive,
    "stop": _stop,
    "ignore_eos": _boolean,
}
_OPTION_FIELDS: Final[Mapping[str, Check]] = {
    "model": _string,
    "n": _integer_in(1, MAX_CHOICES),
    "stream": _boolean,
    "stream_options": _stream_options,
    "return_token_ids": _boolean,
}
_CHAT_FIELDS: Final[Mapping[str, Check]] = {
    **_SAMPLING_FIELDS,
    **_OPTION_FIELDS,
    "messages": _messages,
    "max_completion_tokens": _positive,
    "logprobs": _boolean,
    "top_logprobs": _integer_in(0, MAX_TOP_LOGPROBS),
    "chat_template_kwargs": _template_kwargs,
}
_COMPLETION_FIELDS: Final[Mapping[str, Check]] = {
    **_SAMPLING_FIELDS,
    **_OPTION_FIELDS,
    "prompt": _prompt,
    "logprobs": _integer_in(0, MAX_TOP_LOGPROBS),
}
_CHAT_FOREIGN: Final = ("prompt",)
_COMPLETION_FOREIGN: Final = ("messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs")

# Fields that would change the result and are not served yet, with the values that ask for nothing.
_UNSERVED: Final[Mapping[str, tuple[Any, ...]]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "reasoning_effort": (),
    "verbosity": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_progress": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": ("",),
    "json_schema": ({},),
    "mirostat": (0,),
    "typical_p": (1, 1.0),
}


def _read_fields(raw: bytes, checks: Mapping[str, Check], foreign: tuple[str, ...]) -> dict[str, Any]:
    """The checked fields that are given: null counts as absent, unknown fields are ignored."""
    given = {name: value for name, value in parse_json(raw).items() if value is not None}
    for name, value in given.items():
        if name in _UNSERVED and not _is_one_of(value, _UNSERVED[name]):
            raise RequestError(f"{name} is not supported by this server", param=name)
        if name in foreign:
            raise RequestError(f"{name} is not a field of this endpoint", param=name)
    fields = {name: check(given[name], name) for name, check in checks.items() if name in given}
    if "stream_options" in fields and not fields.get("stream"):
        raise RequestError("stream_options needs stream: true", param="stream_options")
    return fields


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(type(value) is type(same) and value == same for same in neutral)


def _required(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise RequestError(f"{name} is missing", param=name)
    return fields[name]


def _sampling(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in _SAMPLING_FIELDS if name in fields}


def _options(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "n": fields.get("n", 1),
        "stream": fields.get("stream", False),
        "include_usage": fields.get("stream_options", False),
        "return_token_ids": fields.get("return_token_ids", False),
    }
