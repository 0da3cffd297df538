"""The demo model's byte-level BPE vocabulary, trained on its own corpus, and its chat template.

The template is written for this project and renders as the one of the Qwen3 model files does, so that a
client finds the same switches (`tools`, `enable_thinking`) and the same text around each message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from jaxmoe import tokenizer as engine_tokenizer
from jaxmoe.gguf import read_gguf
from tools.synth_vocab import CONTROL, NORMAL, USER_DEFINED, Vocabulary

CONTROL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_TOKENS: Final = (
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
_SPECIAL: Final = re.compile("|".join(map(re.escape, (*CONTROL_TOKENS, *USER_TOKENS))))
_PRE: Final = "qwen2"

CHAT_TEMPLATE: Final = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- system + '\n\n' if system is not none else '' }}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n' }}
    {%- for tool in tools %}
        {{- (tool | tojson) + '\n' }}
    {%- endfor %}
    {{- '</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif system is not none %}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}

{#- Thoughts are shown from the last question on; what came before it keeps its answers only. #}
{%- set last = namespace(question=messages | length - 1) %}
{%- for message in messages %}
    {%- set text = message.content %}
    {%- set wrapped = text.startswith('<tool_response>') and text.endswith('</tool_response>') %}
    {%- if message.role == 'user' and not wrapped %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}

{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set text = message.content %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in text %}
            {%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}
        {%- else %}
            {{- text }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- '' if loop.first and not text else '\n' }}
            {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.previtem is not defined or loop.previtem.role != 'tool' else '' }}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '' }}
{%- endif %}
"""


def train_vocabulary(texts: Iterable[str], size: int) -> Vocabulary:
    """A vocabulary of at most `size` tokens: bytes, the merges that shorten `texts` most, special tokens.

    Source: Sennrich et al., 2016; the pieces that merges stay in are Qwen2's, one digit each.
    """
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(engine_tokenizer.PRE_TOKENIZERS[_PRE]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(CONTROL_TOKENS) - len(USER_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    encoder.train_from_iterator(_plain_pieces(texts), trainer)
    trained = json.loads(encoder.to_str())["model"]
    plain = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    types = [NORMAL] * len(plain) + [CONTROL] * len(CONTROL_TOKENS) + [USER_DEFINED] * len(USER_TOKENS)
    merges = (" ".join(pair) for pair in trained["merges"])
    return Vocabulary((*plain, *CONTROL_TOKENS, *USER_TOKENS), tuple(types), tuple(merges))


def vocabulary_of(path: Path) -> Vocabulary:
    """The vocabulary of a model's file."""
    file = read_gguf(path)
    return Vocabulary(
        tuple(file.get_array("tokenizer.ggml.tokens", of=str)),
        tuple(file.get_array("tokenizer.ggml.token_type", of=int).tolist()),
        tuple(file.get_array("tokenizer.ggml.merges", of=str)),
    )


def tokenizer_of(vocabulary: Vocabulary) -> engine_tokenizer.Tokenizer:
    """The engine's own tokenizer with this vocabulary."""
    return engine_tokenizer.Tokenizer(
        vocabulary.tokens,
        vocabulary.token_types,
        vocabulary.merges,
        pre=_PRE,
        eos_id=vocabulary.tokens.index("<|im_end|>"),
    )


def _plain_pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from _SPECIAL.split(text)
