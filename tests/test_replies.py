"""Chunks: the short way of writing one gives what the long way does."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from jaxmoe import Event, TokenLogprobs
from server.replies import ChatReply, CompletionReply, Reply

TEXTS = [
    *("x", '"', "\\", "\0", "[]", '"\0"', "\u2028é🙂", "\n\n", "\x7f\ud800"),
    '"},"logprobs":null,"finish_reason":null,"token_ids":[]}]}',
]


class FakeVocabulary:
    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def make_reply(reply_class: type[Reply], model: str, *, return_token_ids: bool) -> Reply:
    body: Any = SimpleNamespace(return_token_ids=return_token_ids, include_usage=False)
    generation: Any = SimpleNamespace(num_choices=2)
    return reply_class(body, generation, FakeVocabulary(), request_id="r", created=1, model=model)


@pytest.mark.parametrize("reply_class", [ChatReply, CompletionReply])
@pytest.mark.parametrize("return_token_ids", [True, False])
@pytest.mark.parametrize("model", ["m", "\0", "[]", '","choices":[]'])
def test_a_text_chunk_is_what_its_choice_says(
    reply_class: type[Reply], return_token_ids: bool, model: str
) -> None:
    reply = make_reply(reply_class, model, return_token_ids=return_token_ids)
    logprobs = (TokenLogprobs(65, -0.5, ((66, -1.0),)),)
    for text in TEXTS:
        for event in (
            Event(text, (7,), index=1),
            Event(text, (5, 70000), index=0),
            Event(text, (), index=1),
            Event(text, (65,), logprobs, starts=(3,)),
        ):
            ids = {"token_ids": list(event.token_ids)} if return_token_ids else {}
            (chunk,) = reply.of(event)
            assert json.loads(chunk) == {
                "id": f"{reply.id_prefix}-r",
                "created": 1,
                "model": model,
                "object": reply.chunk_object,
                "choices": [{**reply.text_choice(event), **ids}],
            }
            assert chunk.isascii()
            assert " " not in chunk.replace(json.dumps(text)[1:-1], "")
