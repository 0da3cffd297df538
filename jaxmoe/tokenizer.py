"""Text to token ids and back: byte-level BPE from the file's vocabulary and merges. No JAX here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from gguf.constants import TokenType
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Encoder

from jaxmoe.gguf import GGUFError, GGUFFile
from jaxmoe.request import RequestError

# Source: the tokenizer.json that Qwen publishes with Qwen2, Qwen2.5 and Qwen3.
PRE_TOKENIZERS: Final = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
MODELS: Final = ("gpt2",)

_CONTROL: Final = (TokenType.CONTROL, TokenType.UNKNOWN)
_USER_DEFINED: Final = (TokenType.USER_DEFINED,)
# All of them go into one pattern, which a hostile file could make endless; Qwen's have about 30 to 300.
_MAX_SPECIAL: Final = 1 << 12
_END_TEXTS: Final = ("<|im_end|>", "<|endoftext|>")
_END_KEYS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
# Bytes that no UTF-8 text holds; a vocabulary may do without them.
_NEVER_IN_UTF8: Final = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
# The proper beginnings of a character, at the end of bytes. Source: Unicode 16.0, table 3-7.
_UNFINISHED: Final = re.compile(
    rb"(?:[\xc2-\xdf]|\xe0[\xa0-\xbf]?|[\xe1-\xec\xee\xef][\x80-\xbf]?|\xed[\x80-\x9f]?"
    rb"|\xf0(?:[\x90-\xbf][\x80-\xbf]?)?|[\xf1-\xf3][\x80-\xbf]{0,2}|\xf4(?:[\x80-\x8f][\x80-\xbf]?)?)\Z"
)


def _byte_alphabet() -> dict[int, int]:
    """Character to byte of GPT-2's printable byte alphabet (Radford et al., 2019: `bytes_to_unicode`)."""
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    rest = (byte for byte in range(256) if byte not in printable)
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(rest)}


_BYTE_OF: Final = _byte_alphabet()
# Latin-1 cannot encode U+FFFF, so that a character outside the alphabet shows.
_TO_LATIN_1: Final = dict.fromkeys(range(256), 0xFFFF) | _BYTE_OF


class Tokenizer:
    """The vocabulary of a file: `encode` and `decode`, the bytes of each id, the ids that end a text.

    `control_tokens` (types control and unknown) and `user_defined_tokens` map text to id. Source of the
    token types: ggml's `llama_token_type`. Raises ValueError for tokens and merges that contradict
    each other or cannot encode every text.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        token_types: Sequence[int],
        merges: Sequence[str],
        *,
        pre: str = "qwen2",
        eos_id: int | None = None,
        end_ids: Iterable[int] = (),
        bos_id: int | None = None,
        add_bos: bool = False,
    ) -> None:
        _check_types(tokens, token_types)
        self.vocab_size: Final = len(tokens)
        self.control_tokens: Final = _texts_of(tokens, token_types, kinds=_CONTROL)
        self.user_defined_tokens: Final = _texts_of(tokens, token_types, kinds=_USER_DEFINED)
        self.bos_id: Final = bos_id
        self.add_bos: Final = add_bos
        self.eos_id: Final = eos_id
        named = (self.control_tokens[text] for text in _END_TEXTS if text in self.control_tokens)
        self.eos_ids: Final = frozenset((*end_ids, *named, *(() if eos_id is None else (eos_id,))))
        self.silent_ids: Final = self.eos_ids | frozenset(self.control_tokens.values())
        self.whole_texts: Final[dict[int, str]] = {}
        self._bytes: Final = [_bytes_of(text, kind) for text, kind in zip(tokens, token_types, strict=True)]
        vocabulary = _plain_vocabulary(tokens, token_types)
        self._encoder: Final = _make_encoder(vocabulary, _split_merges(merges, vocabulary), pre)
        self._special_ids: Final = {
            False: self.user_defined_tokens,
            True: {**self.user_defined_tokens, **self.control_tokens},
        }
        self._splitters: Final = {key: _match_any(ids) for key, ids in self._special_ids.items()}

    @staticmethod
    def from_gguf(file: GGUFFile) -> Tokenizer:
        """Read `tokenizer.ggml.*`; a missing, foreign or contradictory key raises GGUFError."""
        _read_name(file, "model", MODELS)
        pre = _read_name(file, "pre", PRE_TOKENIZERS)
        tokens = file.get_array("tokenizer.ggml.tokens", of=str)
        token_types = file.get_array("tokenizer.ggml.token_type", of=int).tolist()
        merges = file.get_array("tokenizer.ggml.merges", of=str)
        ends = {key: _read_id(file, key, len(tokens)) for key in _END_KEYS}
        bos_id = _read_id(file, "bos_token_id", len(tokens))
        add_bos = file.get_bool("tokenizer.ggml.add_bos_token", default=False)
        if add_bos and bos_id is None:
            raise GGUFError(file.path, None, "the GGUF file has no 'tokenizer.ggml.bos_token_id' to add")
        try:
            return Tokenizer(
                tokens,
                token_types,
                merges,
                pre=pre,
                eos_id=ends["eos_token_id"],
                end_ids=[end for end in ends.values() if end is not None],
                bos_id=bos_id,
                add_bos=add_bos,
            )
        except ValueError as error:
            raise GGUFError(file.path, None, str(error)) from error

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """The ids of a text, nothing added (no BOS): user-defined tokens' texts become their ids always,
        control tokens' texts only with `parse_special`. The text is not normalised.

        Raises RequestError for a lone surrogate.
        """
        _check_unicode(text)
        special_ids = self._special_ids[parse_special]
        pieces = self._splitters[parse_special].split(text)
        # The batch call is the one that releases the GIL: a long prompt must not stall the streams.
        encodings = self._encoder.encode_batch_fast(pieces[::2], add_special_tokens=False)
        ids: list[int] = list(encodings[0].ids)
        for special, encoding in zip(pieces[1::2], encodings[1:], strict=True):
            ids.append(special_ids[special])
            ids += encoding.ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of all ids, control tokens' texts too; invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes an id stands for; b"" for unused ids and for ids that the file does not name."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """One id as text by itself; the bytes of an unfinished character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


class TextStream:
    """Text from one generation's ids, each character as soon as it is whole and never before.

    Control and end tokens add nothing. The pushes and `finish` together equal the joined bytes decoded
    with errors="replace": a byte becomes U+FFFD once nothing that follows can make it valid.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held = b""

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is unfinished."""
        if not self._held and (text := self._tokenizer.whole_texts.get(token_id)) is not None:
            return text
        if token_id in self._tokenizer.silent_ids:
            return ""
        is_alone = not self._held
        held = self._held + self._tokenizer.token_bytes(token_id)
        # Python's own incremental decoder keeps half a surrogate, which can become nothing.
        unfinished = _UNFINISHED.search(held, max(0, len(held) - 3))
        end = unfinished.start() if unfinished else len(held)
        self._held = held[end:]
        text = held[:end].decode("utf-8", "replace")
        if is_alone and not self._held:
            self._tokenizer.whole_texts[token_id] = text
        return text

    def finish(self) -> str:
        """What is left: U+FFFD for an unfinished character, else ""."""
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")


def _read_name(file: GGUFFile, key: str, supported: Iterable[str]) -> str:
    name = file.get_str(f"tokenizer.ggml.{key}")
    if name in supported:
        return name
    what = f"'tokenizer.ggml.{key}' {name[:80]!r} is not supported; supported: {', '.join(supported)}"
    raise GGUFError(file.path, None, what)


def _read_id(file: GGUFFile, key: str, vocab_size: int) -> int | None:
    return file.get_int(f"tokenizer.ggml.{key}", low=0, high=vocab_size - 1, default=None)


def _check_types(tokens: Sequence[str], token_types: Sequence[int]) -> None:
    if len(tokens) != len(token_types):
        raise ValueError(f"there are {len(tokens)} tokens, but {len(token_types)} token types")
    unknown = set(token_types) - set(TokenType)
    if unknown:
        at = next(i for i, kind in enumerate(token_types) if kind in unknown)
        raise ValueError(f"token {at} has the unknown type {token_types[at]}")


def _texts_of(
    tokens: Sequence[str], token_types: Sequence[int], *, kinds: tuple[TokenType, ...]
) -> Mapping[str, int]:
    """Text to id of the tokens of some kinds; of two with one text the first counts, "" never."""
    found: dict[str, int] = {}
    for token_id, (text, kind) in enumerate(zip(tokens, token_types, strict=True)):
        if kind in kinds and text:
            found.setdefault(text, token_id)
    if len(found) > _MAX_SPECIAL:
        names = " or ".join(kind.name.lower() for kind in kinds)
        raise ValueError(f"{len(found)} tokens are of type {names}, at most {_MAX_SPECIAL} may be")
    return found


def _plain_vocabulary(tokens: Sequence[str], token_types: Sequence[int]) -> dict[str, int]:
    """What plain text may become: never a control token, never an unused one."""
    plain = (TokenType.NORMAL, TokenType.BYTE)
    vocabulary: dict[str, int] = {}
    for token_id, (text, kind) in enumerate(zip(tokens, token_types, strict=True)):
        if kind in plain and vocabulary.setdefault(text, token_id) != token_id:
            raise ValueError(f"tokens {vocabulary[text]} and {token_id} have the same text {_shown(text)}")
    # A file may name a token user-defined that its merges make as well.
    vocabulary = {**_texts_of(tokens, token_types, kinds=_USER_DEFINED), **vocabulary}
    for char, byte in _BYTE_OF.items():
        if byte not in _NEVER_IN_UTF8 and chr(char) not in vocabulary:
            raise ValueError(f"the vocabulary has no token for byte {byte:#04x}")
    return vocabulary


def _split_merges(merges: Sequence[str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs in rank order, each once, each of known tokens that make a known token."""
    pairs: dict[tuple[str, str], None] = {}
    for rank, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise ValueError(f"merge {rank} {_shown(merge)} {_merge_fault(left, space, right, vocabulary)}")
        pairs[left, right] = None
    return list(pairs)


def _merge_fault(left: str, space: str, right: str, vocabulary: Mapping[str, int]) -> str:
    if not (left and space and right) or " " in right:
        return "is not two tokens"
    missing = next(text for text in (left, right, left + right) if text not in vocabulary)
    return f"needs {_shown(missing)}, which is no token of plain text"


def _make_encoder(vocabulary: dict[str, int], pairs: list[tuple[str, str]], pre: str) -> Encoder:
    encoder = Encoder(models.BPE(vocab=vocabulary, merges=pairs))
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZERS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return encoder


def _match_any(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern whose `split` keeps each of the texts, the longest where two match at one place."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _bytes_of(text: str, kind: int) -> bytes:
    if kind in (TokenType.NORMAL, TokenType.BYTE):
        try:
            return text.translate(_TO_LATIN_1).encode("latin-1")
        except UnicodeEncodeError:  # not in GPT-2's alphabet: an added token that lost its type
            return text.encode()
    return b"" if kind == TokenType.UNUSED else text.encode()


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text has a lone surrogate at character {error.start}") from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
