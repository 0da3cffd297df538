"""Bodies: every field checked, every error naming its field."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe import RequestError
from server.schema import MAX_BODY_SIZE, Body, parse_json, read_chat, read_completion

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
TEXT = {"prompt": "hello"}


def chat(**fields: Any) -> Body:
    return read_chat(json.dumps({**HELLO, **fields}).encode())


def completion(**fields: Any) -> Body:
    return read_completion(json.dumps({**TEXT, **fields}).encode())


def refused(raw: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read_chat(raw)
    return caught.value


# JSON.


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object, got a list"),
        (b"null", "must be a JSON object, got null"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b'{"messages": "\xc3"}', "not UTF-8: invalid continuation byte at byte 14"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b'{"temperature": 1e999}', "1e999"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
        (b"[" * 100_000, "nested deeper than 64"),
        (b'{"a":' * 100_000, "nested deeper than 64"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64"),
        (b'{"a":[' + b"1," * 524_289 + b"1]}", "more than 524288 values"),
        (b'{"a": "\\ud800"}', "a holds half of a surrogate pair"),
        (b'{"a": {"\\udc00": 1}}', "a holds half of a surrogate pair"),
        (b'{"\\ud800": 1}', "holds half of a surrogate pair"),
    ],
)
def test_what_is_no_sound_json_is_refused(raw: bytes, message: str) -> None:
    assert message in str(refused(raw))


def test_brackets_in_strings_are_no_depth() -> None:
    text = '[{"\\' * 100
    assert parse_json(json.dumps({"a": text}).encode()) == {"a": text}
    deepest = b'{"a":' + b"[" * 63 + b"]" * 63 + b"}"
    assert parse_json(deepest)


def test_whole_surrogate_pairs_are_characters() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude42"}') == {"a": "\U0001f642"}


@pytest.mark.parametrize("piece", [b"[", b"[],", b"[[],[", b'"\\\\",', b'"[",', b'{"a":', b"\\", b'"'])
def test_the_largest_body_is_judged_in_time(piece: bytes) -> None:
    raw = b'{"a":[' + piece * (MAX_BODY_SIZE // len(piece))
    started = time.perf_counter()
    assert refused(raw)
    assert time.perf_counter() - started < 5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from(
    [
        "messages",
        "prompt",
        "temperature",
        "top_k",
        "n",
        "stop",
        "seed",
        "logit_bias",
        "logprobs",
        "max_tokens",
        "stream_options",
        "chat_template_kwargs",
        "tools",
        "response_format",
    ]
)


@settings(deadline=None)
@given(st.dictionaries(field_names, json_values, max_size=6))
def test_any_object_gives_a_body_or_a_refusal(fields: dict[str, Any]) -> None:
    for read, needed in ((read_chat, HELLO), (read_completion, TEXT)):
        with contextlib.suppress(RequestError):
            body = read(json.dumps({**needed, **fields}).encode())
            assert isinstance(body.params({}).temperature, float)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_a_body_or_a_refusal(raw: bytes) -> None:
    assert refused(raw)


# Fields that are taken.


def test_a_body_as_it_is_given() -> None:
    body = chat(
        model="any",
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        frequency_penalty=-2,
        presence_penalty=2.0,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "007": 3},
        seed=-5,
        max_tokens=7,
        stop=["a", "b"],
        ignore_eos=True,
        n=8,
        logprobs=True,
        top_logprobs=20,
        stream=True,
        stream_options={"include_usage": True, "other": 1},
        return_token_ids=True,
        chat_template_kwargs={"enable_thinking": False},
        user="me",
        metadata={"a": "b"},
        no_such_field=1,
    )
    params = body.params({})
    assert params.logit_bias == {5: -100.0, 7: 3.0}
    assert (params.temperature, params.top_k, params.seed, params.max_tokens) == (0.0, -1, -5, 7)
    assert (params.stop, params.ignore_eos, params.logprobs) == (("a", "b"), True, 20)
    assert (body.n, body.stream, body.include_usage, body.return_token_ids) == (8, True, True, True)
    assert body.enable_thinking is False
    assert body.messages == HELLO["messages"]


def test_null_means_absent() -> None:
    names = (
        "temperature n stop seed max_tokens stream stream_options tools tool_choice response_format logprobs"
    )
    assert chat(**dict.fromkeys(names.split())) == chat()


def test_the_request_comes_before_the_defaults() -> None:
    params = chat(temperature=0.5).params({"temperature": 0.9, "top_k": 20})
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 20, 1.0)


def test_one_stop_string_may_stand_alone() -> None:
    assert chat(stop="x").params({}).stop == ("x",)


def test_max_completion_tokens_is_the_newer_name() -> None:
    body = chat(max_tokens=5, max_completion_tokens=6)
    assert body.params({}).max_tokens == 6
    error = body.renamed(RequestError("too many", param="max_tokens", code="c"))
    assert (error.param, error.code) == ("max_completion_tokens", "c")
    assert chat().renamed(RequestError("", param="prompt")).param == "messages"
    assert completion().renamed(RequestError("", param="prompt")).param == "prompt"


def test_messages_of_every_role() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = chat(
        messages=[
            {"role": "developer", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "odd": 1},
            {"role": "tool", "content": "d", "tool_call_id": "1"},
            {"role": "assistant", "reasoning_content": "e", "content": "f"},
        ]
    )
    assert body.messages == [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "d", "tool_call_id": "1"},
        {"role": "assistant", "reasoning_content": "e", "content": "f"},
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", "a"), ([1, 2], [1, 2]), (["a"], "a"), ([[1, 2]], [1, 2]), ([], []), ("", "")],
)
def test_a_prompt_is_text_or_ids(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompt == expected


def test_completion_logprobs_is_a_number() -> None:
    assert completion(logprobs=0).params({}).logprobs == 0
    assert completion().params({}).logprobs is None
    assert chat(logprobs=False, top_logprobs=0).params({}).logprobs is None


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"best_of": 1},
        {"echo": False},
        {"suffix": ""},
        {"modalities": ["text"]},
        {"add_generation_prompt": True},
    ],
)
def test_a_field_that_asks_for_nothing_passes(fields: dict[str, Any]) -> None:
    assert chat(**fields) == chat()


# Fields that are refused.

COMMON = [
    ({"temperature": "hot"}, "temperature", "must be a number, got a string"),
    ({"temperature": True}, "temperature", "must be a number, got a truth value"),
    ({"temperature": 2.01}, "temperature", "at most 2"),
    ({"temperature": -1}, "temperature", "at least 0"),
    ({"temperature": 10**400}, "temperature", "out of range"),
    ({"top_p": 0}, "top_p", "more than 0"),
    ({"top_p": 1.5}, "top_p", "at most 1"),
    ({"min_p": -0.1}, "min_p", "at least 0"),
    ({"top_k": 1.0}, "top_k", "must be an integer, got a number"),
    ({"top_k": -2}, "top_k", "-1, 0 or more"),
    ({"top_k": 2**63}, "top_k", "64-bit"),
    ({"frequency_penalty": 3}, "frequency_penalty", "at most 2"),
    ({"presence_penalty": -3}, "presence_penalty", "at least -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "more than 0"),
    ({"seed": 2**63}, "seed", "64-bit"),
    ({"seed": "1"}, "seed", "must be an integer"),
    ({"max_tokens": 0}, "max_tokens", "1 or more, got 0"),
    ({"max_tokens": True}, "max_tokens", "must be an integer, got a truth value"),
    ({"n": 0}, "n", "between 1 and 8"),
    ({"n": 9}, "n", "between 1 and 8"),
    ({"stop": 5}, "stop", "a string or a list"),
    ({"stop": ["a", 5]}, "stop[1]", "must be a string, got an integer"),
    ({"stop": ""}, "stop", "1 to 256"),
    ({"stop": "x" * 257}, "stop", "1 to 256"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"logit_bias": []}, "logit_bias", "must be an object"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"1_0": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"1": "a"}}, "logit_bias[1]", "must be a number"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "at most 100"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "at most 1024"),
    ({"ignore_eos": 1}, "ignore_eos", "must be true or false, got an integer"),
    ({"stream": "yes"}, "stream", "must be true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": 1}, "stream_options", "must be an object"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
        "must be true",
    ),
    ({"return_token_ids": 1}, "return_token_ids", "must be true or false"),
    ({"model": 5}, "model", "must be a string"),
    ({"echo": True}, "echo", "not supported"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"best_of": True}, "best_of", "not supported"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"stop_token_ids": [1]}, "stop_token_ids", "not supported"),
]
CHAT_ONLY = [
    ({"messages": None}, "messages", "is missing"),
    ({"messages": "hi"}, "messages", "must be a list"),
    ({"messages": []}, "messages", "1 to 2048 messages, got 0"),
    ({"messages": [{"role": "user", "content": ""}] * 2049}, "messages", "got 2049"),
    ({"messages": ["hi"]}, "messages[0]", "must be an object"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "must be a string, got null"),
    ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role", "must be one of"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a string or a list"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]", "must be an object"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "only text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages[0].content[0].text",
        "must be a string",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
        "a string of JSON",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls", "a list"),
    ({"logprobs": 5}, "logprobs", "must be true or false"),
    ({"top_logprobs": 5}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "1 or more"),
    ({"chat_template_kwargs": 1}, "chat_template_kwargs", "must be an object"),
    ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking", "true or"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "enable_thinking only"),
    ({"prompt": "hi"}, "prompt", "not a field of this endpoint"),
    ({"tools": [{}]}, "tools", "not supported"),
    ({"tool_choice": "auto"}, "tool_choice", "not supported"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"audio": {}}, "audio", "not supported"),
    ({"prediction": {}}, "prediction", "not supported"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
    ({"continue_final_message": True}, "continue_final_message", "not supported"),
]
COMPLETION_ONLY = [
    ({"prompt": None}, "prompt", "is missing"),
    ({"prompt": 5}, "prompt", "a string or a list"),
    ({"prompt": ["a", "b"]}, "prompt", "one prompt, got 2"),
    ({"prompt": [1, True]}, "prompt[1]", "must be a token id, got a truth value"),
    ({"prompt": [1, "a"]}, "prompt[1]", "must be a token id"),
    ({"prompt": [[["a"]]]}, "prompt[0][0]", "must be a token id, got a list"),
    ({"logprobs": True}, "logprobs", "must be an integer"),
    ({"logprobs": 21}, "logprobs", "between 0 and 20"),
    ({"messages": []}, "messages", "not a field of this endpoint"),
    ({"top_logprobs": 1}, "top_logprobs", "not a field"),
    ({"chat_template_kwargs": {}}, "chat_template_kwargs", "not a field"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "not a field"),
]
REFUSED = [
    *((chat, *case) for case in COMMON + CHAT_ONLY),
    *((completion, *case) for case in COMMON + COMPLETION_ONLY),
]


@pytest.mark.parametrize(("read", "fields", "param", "message"), REFUSED)
def test_a_wrong_field_is_named(read: Any, fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(**fields).params({})
    assert caught.value.param == param
    assert message in str(caught.value)
