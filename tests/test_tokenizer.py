"""The tokenizer against a plain-Python byte-level BPE written here from the definition."""

from __future__ import annotations

import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from gguf.constants import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.gguf import GGUFError, GGUFFile, read_gguf
from jaxmoe.request import RequestError
from jaxmoe.tokenizer import TextStream, Tokenizer

REAL_VOCABULARY = Path(__file__).parents[2] / "shared" / "data" / "ggml-vocab-qwen2.gguf"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

TRICKY = [
    "",
    " ",
    "Hello world",
    "it's, I'LL, we'Re, they've 'tis 'd'x it'Sx '",
    "1234567 x86 3.14159 ٣٤ ½ Ⅷ",
    "a  b   c\t\td \t e    ",
    "line\nline\r\n\r\n  indented\n\n\n   \n  end \n",
    "def f(x):\n    return x  # no\n\n",
    "!!!??? ...\n\n--- =>\r\n(x)[y]{z} @user #tag \u00a0nbsp\u2003em\u3000",
    "你好，世界。日本語のテキスト 한국어",
    "🙂🏳️‍🌈👩‍👩‍👧 emoji🙂text 🙂 🙂",
    "e\u0301 cafe\u0301 \u00e9 ﬁ Ａ ǅ",
    "naïve Straße ΑΒΓ кириллица עברית العربية हिन्दी",
    "\u0000\u0001\x1c\x1f\x7f\x85\u2028\u2029\ufeff\ufffd\U0010ffff",
    "<|im_end|><think></think>[PAD7]<|",
]


# The reference: qwen2's pattern as a hand-written scanner, then merges by lowest rank, one at a time.

SPACE = frozenset(map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029)))
SPACE |= frozenset("\u202f\u205f\u3000")


def is_letter(char: str) -> bool:
    return unicodedata.category(char)[0] == "L"


def is_number(char: str) -> bool:
    return unicodedata.category(char)[0] == "N"


def is_other(char: str) -> bool:
    return char not in SPACE and not is_letter(char) and not is_number(char)


def run_end(text: str, start: int, test) -> int:
    while start < len(text) and test(text[start]):
        start += 1
    return start


def word_end(text: str, i: int) -> int:
    """Where the word that starts at i ends; the alternatives in the pattern's order."""
    for ending in ("s", "t", "re", "ve", "m", "ll", "d"):
        if text[i] == "'" and text[i + 1 : i + 1 + len(ending)].casefold() == ending:
            return i + 1 + len(ending)
    first = i if is_letter(text[i]) or is_number(text[i]) or text[i] in "\r\n" else i + 1
    if (end := run_end(text, first, is_letter)) > first:
        return end
    if is_number(text[i]):
        return i + 1
    first = i + 1 if text[i] == " " else i
    if (end := run_end(text, first, is_other)) > first:
        return run_end(text, end, lambda char: char in "\r\n")
    end = run_end(text, i, lambda char: char in SPACE)
    newlines = [at for at in range(i, end) if text[at] in "\r\n"]
    if newlines:
        return newlines[-1] + 1
    return end - 1 if end < len(text) and end - i > 1 else end


def split_words(text: str) -> list[str]:
    words, at = [], 0
    while at < len(text):
        end = word_end(text, at)
        words.append(text[at:end])
        at = end
    return words


@cache
def byte_chars() -> list[str]:
    """GPT-2's character of each byte."""
    chars: list[str] = []
    shifted = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            chars.append(chr(byte))
        else:
            chars.append(chr(256 + shifted))
            shifted += 1
    return chars


def to_alphabet(text: str) -> str:
    return "".join(byte_chars()[byte] for byte in text.encode())


def reference_encode(text: str, vocabulary: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    ids = []
    for word in split_words(text):
        parts = list(to_alphabet(word))
        while True:
            ranked = [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]
            if not ranked:
                break
            at = min(ranked)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [vocabulary[part] for part in parts]
    return ids


# A small vocabulary: every byte, the merges that spell some words, and one token of each other type.

WORDS = [
    "Hello",
    " world",
    " the",
    "ll",
    "'s",
    "'ll",
    "  ",
    "    ",
    "\n\n",
    "\r\n",
    "é",
    "你好",
    "🙂",
    "...",
    "12",
    "'Sx",
]


def small_merges() -> list[str]:
    merges: dict[str, None] = {}
    for word in map(to_alphabet, WORDS):
        for i in range(1, len(word)):
            merges[f"{word[:i]} {word[i]}"] = None
    return list(merges)


def small_file(**changes: object) -> GGUFFile:
    """A file with the small vocabulary; a change of None takes the key away."""
    plain = [*byte_chars(), *dict.fromkeys(merge.replace(" ", "") for merge in small_merges())]
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "<think>er", "[PAD7]", "<unk>"]
    kinds = [CONTROL, CONTROL, CONTROL, USER_DEFINED, USER_DEFINED, UNUSED, UNKNOWN]
    metadata = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": plain + special,
        "token_type": np.array([NORMAL] * len(plain) + kinds, np.int32),
        "merges": small_merges(),
        "eos_token_id": len(plain) + 1,
        **changes,
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}
    return GGUFFile(Path("small.gguf"), named, {})


@cache
def small() -> Tokenizer:
    return Tokenizer.from_gguf(small_file())


def small_tokens() -> list[str]:
    return list(small_file().get_array("tokenizer.ggml.tokens", of=str))


def small_reference(text: str) -> list[int]:
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(small_merges())}
    return reference_encode(text, {token: i for i, token in enumerate(small_tokens())}, ranks)


def id_of(text: str) -> int:
    return small_tokens().index(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("it's 12", ["it", "'s", " ", "1", "2"]),
        ("I'LL we'Re", ["I", "'LL", " we", "'Re"]),
        ("a  b", ["a", " ", " b"]),
        ("a \n\n b", ["a", " \n\n", " b"]),
        ("x  ", ["x", "  "]),
        ("(foo) --\n\ny", ["(foo", ")", " --\n\n", "y"]),
        ("\tTab\u00a0x", ["\tTab", "\u00a0x"]),
        ("你好，世界", ["你好", "，世界"]),
        ("\n  a", ["\n", " ", " a"]),
        ("x²y", ["x", "²", "y"]),
    ],
)
def test_the_reference_splits_as_the_pattern_reads(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize("text", [text for text in TRICKY if "<" not in text])
def test_ids_equal_the_reference(text: str) -> None:
    ids = small().encode(text, parse_special=False)
    assert ids == small_reference(text)
    assert small().decode(ids) == text


# Characters that every Unicode version since 14 puts into the same class; no lone surrogates.
TEXTS = st.text(
    st.one_of(
        st.sampled_from("aZsStTlLrReEvVdDmM'  \n\r\t12½é你🙂.!-ſ\u0301\u00a0\u3000\x1c\x85"),
        st.characters(exclude_categories=["Cs", "Cn"], max_codepoint=0x2FFFF),
    ),
    max_size=40,
)


# Hypothesis tries the strings of this file too, and "<think>" is a token of its own.
@settings(max_examples=300, deadline=None)
@given(TEXTS.filter(lambda text: "<" not in text))
def test_any_text_equals_the_reference_and_comes_back(text: str) -> None:
    ids = small().encode(text, parse_special=False)
    assert ids == small_reference(text)
    assert small().decode(ids) == text


def test_text_is_not_normalised() -> None:
    assert small().encode("e\u0301", parse_special=False) != small().encode("\u00e9", parse_special=False)


def test_control_tokens_are_parsed_only_when_asked() -> None:
    text = "a<|im_end|>b<unk>"
    plain = small().encode(text, parse_special=False)
    assert not set(plain) & {id_of("<|im_end|>"), id_of("<unk>")}
    assert plain == small_reference(text)
    parsed = small().encode(text, parse_special=True)
    assert parsed == [id_of("a"), id_of("<|im_end|>"), id_of("b"), id_of("<unk>")]


@pytest.mark.parametrize("parse_special", [False, True])
def test_user_defined_tokens_are_always_parsed_and_the_longest_wins(parse_special: bool) -> None:
    ids = small().encode("a<think><think>erb", parse_special=parse_special)
    assert ids == [id_of("a"), id_of("<think>"), id_of("<think>er"), id_of("b")]


def test_special_tokens_alone_need_no_text_around_them() -> None:
    assert small().encode("<|im_end|><think>", parse_special=True) == [id_of("<|im_end|>"), id_of("<think>")]
    assert small().encode("", parse_special=True) == []


def test_unused_tokens_are_never_produced() -> None:
    assert small().encode("[PAD7]", parse_special=True) == small_reference("[PAD7]")
    unused = [NORMAL] * 256 + [UNUSED]
    with pytest.raises(ValueError, match="merge 0 'a b' needs 'ab'"):
        Tokenizer([*byte_chars(), "ab"], unused, ["a b"])
    with pytest.raises(ValueError, match="no token for byte 0x00"):
        Tokenizer(byte_chars(), [UNUSED, *unused[:255]], [])


def small_types() -> list[int]:
    return small_file().get_array("tokenizer.ggml.token_type", of=int).tolist()


def test_bytes_of_each_kind_of_token() -> None:
    assert b"".join(small().token_bytes(i) for i in range(256)) == bytes(range(256))
    assert small().token_bytes(id_of(to_alphabet("你好"))) == "你好".encode()
    assert small().token_bytes(id_of("<|im_end|>")) == b"<|im_end|>"
    assert small().token_bytes(id_of("<think>")) == b"<think>"
    assert small().token_bytes(id_of("[PAD7]")) == b""


def test_ids_the_file_does_not_name_are_empty() -> None:
    size = small().vocab_size
    assert size == len(small_tokens())
    assert [small().token_bytes(i) for i in (-1, -size, size, 10**9)] == [b""] * 4
    assert small().decode([size, id_of("a"), -1]) == "a"


def test_special_texts_beyond_the_byte_alphabet_are_utf8() -> None:
    tokens = [*small_tokens(), "<｜é｜>", "a\u00adb"]
    file = small_file(tokens=tokens, token_type=np.append(small_types(), [CONTROL, NORMAL]))
    tokenizer = Tokenizer.from_gguf(file)
    assert tokenizer.token_bytes(len(tokens) - 2) == "<｜é｜>".encode()
    assert tokenizer.token_bytes(len(tokens) - 1) == b"a\xc2\xadb"
    assert tokenizer.encode("x<｜é｜>", parse_special=True) == [id_of("x"), len(tokens) - 2]


def test_token_text_replaces_half_a_character() -> None:
    assert small().token_text(0xE2) == "\ufffd"
    assert small().token_text(id_of(to_alphabet("é"))) == "é"


def test_end_ids_come_from_the_file_and_from_control_tokens() -> None:
    assert small().eos_id == id_of("<|im_end|>")
    assert small().eos_ids == {id_of("<|im_end|>"), id_of("<|endoftext|>")}
    file = small_file(
        eos_token_id=None, eot_token_id=3, eom_token_id=4, token_type=np.ones(len(small_tokens()))
    )
    with pytest.raises(GGUFError, match="must be an array of integers"):
        Tokenizer.from_gguf(file)
    kinds = np.ones(len(small_tokens()), np.int32)
    tokenizer = Tokenizer.from_gguf(
        small_file(eos_token_id=None, eot_token_id=3, eom_token_id=4, token_type=kinds)
    )
    assert tokenizer.eos_ids == {3, 4}
    assert tokenizer.eos_id is None


def test_no_bos_unless_the_file_has_one() -> None:
    assert (small().bos_id, small().add_bos) == (None, False)
    tokenizer = Tokenizer.from_gguf(small_file(bos_token_id=5, add_bos_token=True))
    assert (tokenizer.bos_id, tokenizer.add_bos) == (5, True)
    assert tokenizer.encode("a", parse_special=False) == [id_of("a")]


def test_a_repeated_merge_keeps_its_first_rank() -> None:
    merges = ["a b", "b a", "a b"]
    tokens = [*byte_chars(), "ab", "ba"]
    tokenizer = Tokenizer(tokens, [NORMAL] * len(tokens), merges)
    assert tokenizer.encode("aba", parse_special=False) == [256, ord("a")]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": "llama"}, r"'tokenizer.ggml.model' 'llama' is not supported; supported: gpt2"),
        ({"pre": "gpt-4o"}, r"'tokenizer.ggml.pre' 'gpt-4o' is not supported; supported: qwen2"),
        ({"pre": None}, "the GGUF file has no 'tokenizer.ggml.pre'"),
        ({"merges": None}, "the GGUF file has no 'tokenizer.ggml.merges'"),
        ({"token_type": None}, "the GGUF file has no 'tokenizer.ggml.token_type'"),
        ({"token_type": np.ones(3, np.int32)}, "but 3 token types"),
        ({"merges": ["a"]}, "merge 0 'a' is not two tokens"),
        ({"merges": ["l l", "a b c"]}, "merge 1 'a b c' is not two tokens"),
        ({"merges": [" a"]}, "merge 0 ' a' is not two tokens"),
        ({"merges": ["a b"]}, "merge 0 'a b' needs 'ab', which is no token of plain text"),
        ({"merges": ["a zz"]}, "merge 0 'a zz' needs 'zz'"),
        ({"merges": ["<|im_ end|>"]}, r"merge 0 '<\|im_ end\|>' needs '<\|im_'"),
        ({"eos_token_id": 10**6}, "'tokenizer.ggml.eos_token_id' must be between 0 and"),
        ({"add_bos_token": True}, "no 'tokenizer.ggml.bos_token_id' to add"),
    ],
)
def test_a_bad_file_is_refused_by_name(changes: dict[str, object], what: str) -> None:
    with pytest.raises(GGUFError, match=what):
        Tokenizer.from_gguf(small_file(**changes))


def test_merges_cannot_make_a_control_token() -> None:
    tokens = [*byte_chars(), "ab"]
    with pytest.raises(ValueError, match="merge 0 'a b' needs 'ab'"):
        Tokenizer(tokens, [NORMAL] * 256 + [CONTROL], ["a b"])
    assert Tokenizer(tokens, [NORMAL] * 256 + [USER_DEFINED], ["a b"]).encode("ab", parse_special=False) == [
        256
    ]


def test_bad_vocabularies_are_refused() -> None:
    chars = byte_chars()
    with pytest.raises(ValueError, match="no token for byte 0x41"):
        Tokenizer([char for char in chars if char != "A"], [NORMAL] * 255, [])
    with pytest.raises(ValueError, match="tokens 65 and 256 have the same text 'A'"):
        Tokenizer([*chars, "A"], [NORMAL] * 257, [])
    with pytest.raises(ValueError, match="token 256 has the unknown type 9"):
        Tokenizer([*chars, "AB"], [NORMAL] * 256 + [9], [])
    with pytest.raises(ValueError, match="4097 tokens are of type user_defined, at most 4096 may be"):
        Tokenizer([*chars, *(f"<{i}>" for i in range(4097))], [NORMAL] * 256 + [USER_DEFINED] * 4097, [])
    utf8_only = [chars[byte] for byte in range(256) if byte not in (0xC0, 0xC1, *range(0xF5, 256))]
    assert Tokenizer(utf8_only, [NORMAL] * len(utf8_only), []).vocab_size == 243


def test_an_empty_special_token_matches_nothing() -> None:
    kinds = [NORMAL] * 256 + [USER_DEFINED, CONTROL, CONTROL]
    tokenizer = Tokenizer([*byte_chars(), "", "", "<x>"], kinds, [])
    assert tokenizer.encode("a<x>b", parse_special=True) == [ord("a"), 258, ord("b")]


def test_a_lone_surrogate_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 2"):
        small().encode("ab\ud800", parse_special=False)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text("abĠ<é ", max_size=3), st.sampled_from(list(TokenType))), max_size=6),
    st.lists(st.text("abĠ<é ", max_size=5), max_size=6),
)
def test_any_vocabulary_is_taken_or_refused(extra: list[tuple[str, int]], merges: list[str]) -> None:
    tokens = [*byte_chars(), *(text for text, _ in extra)]
    kinds = [NORMAL] * 256 + [kind for _, kind in extra]
    try:
        tokenizer = Tokenizer(tokens, kinds, merges)
    except ValueError:
        return
    text = "ab <é aé b<"
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


@pytest.mark.parametrize("char", [" ", "\n", "a", ".", "好", "1", "\u0301"])
def test_long_runs_are_encoded(char: str) -> None:
    text = char * 50_000 + "x"
    assert small().decode(small().encode(text, parse_special=True)) == text


# TextStream

PIECES = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=4),
        st.text(max_size=3).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.sampled_from([b"\xe2", b"\x82", b"\xac", b"\xf0\x9f", b"\x98\x80", b"\xed\xa0", b"\x80", b"\xff"]),
    ),
    max_size=12,
)
# Every beginning of a character that lacks its last byte or more.
BEGINNINGS = {
    chr(code).encode()[:length]
    for code in range(0x80, 0x110000, 64)
    if not 0xD800 <= code < 0xE000
    for length in range(1, len(chr(code).encode()))
} | {bytes([lead]) for lead in range(0xC2, 0xE0)}


def held_size(so_far: bytes) -> int:
    """Bytes at the end that may still become a character."""
    return max((n for n in (1, 2, 3) if so_far[-n:] in BEGINNINGS and len(so_far) >= n), default=0)


@settings(max_examples=500, deadline=None)
@given(PIECES)
def test_a_stream_is_exact_and_neither_early_nor_late(pieces: list[bytes]) -> None:
    ids = [list(piece) for piece in pieces]
    stream, text, so_far = TextStream(small()), "", b""
    for byte in (byte for piece in ids for byte in piece):
        text += stream.push(byte)
        so_far += bytes([byte])
        assert text == so_far[: len(so_far) - held_size(so_far)].decode("utf-8", "replace")
    text += stream.finish()
    assert text == so_far.decode("utf-8", "replace")


def test_tokens_that_cut_characters_give_whole_ones() -> None:
    tokens = [*byte_chars(), *(to_alphabet("é🙂x")[i : i + 3] for i in (0, 3))]
    tokenizer = Tokenizer(tokens, [NORMAL] * 258, [])
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in (256, 257, ord("x"))] == ["é", "🙂", "x"]
    assert tokenizer.token_bytes(256) == b"\xc3\xa9\xf0"


def test_a_stream_is_silent_for_control_and_end_tokens() -> None:
    stream = TextStream(small())
    shown = [
        stream.push(id_of(text)) for text in ("a", "<|im_start|>", "<think>", "<|im_end|>", "[PAD7]", "b")
    ]
    assert shown == ["a", "", "<think>", "", "", "b"]
    plain_end = Tokenizer(byte_chars(), [NORMAL] * 256, [], eos_id=7, end_ids=[8])
    assert [TextStream(plain_end).push(i) for i in (7, 8, ord("c"))] == ["", "", "c"]


def test_what_a_token_gave_alone_is_not_what_it_gives_inside_a_character() -> None:
    tokenizer = Tokenizer(byte_chars(), [NORMAL] * 256, [])
    for _ in range(2):  # the second time from what was kept
        stream = TextStream(tokenizer)
        assert [stream.push(i) for i in (0xA9, ord("a"), 0xC3, 0xA9)] == ["\ufffd", "a", "", "é"]
        assert [stream.push(i) for i in (0xC3, ord("a"), 0xA9, ord("a"))] == ["", "\ufffda", "\ufffd", "a"]


def test_a_control_token_inside_a_character_changes_nothing() -> None:
    stream = TextStream(small())
    assert [stream.push(i) for i in (0xC3, id_of("<|im_start|>"), 0xA9)] == ["", "", "é"]


def test_invalid_bytes_are_replaced_at_once_and_unfinished_ones_at_the_end() -> None:
    stream = TextStream(small())
    assert stream.push(0xFF) == "\ufffd"
    assert stream.push(0xE2) == ""
    assert stream.push(ord("a")) == "\ufffda"
    assert (stream.push(0xF0), stream.push(0x9F)) == ("", "")
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


# The real vocabulary

real = pytest.mark.skipif(not REAL_VOCABULARY.exists(), reason="the real vocabulary is not here")


@cache
def real_file() -> GGUFFile:
    return read_gguf(REAL_VOCABULARY)


@cache
def real_tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(real_file())


@cache
def real_reference() -> tuple[dict[str, int], dict[tuple[str, ...], int]]:
    tokens = real_file().get_array("tokenizer.ggml.tokens", of=str)
    merges = real_file().get_array("tokenizer.ggml.merges", of=str)
    return {t: i for i, t in enumerate(tokens[:151643])}, {
        tuple(m.split(" ")): r for r, m in enumerate(merges)
    }


@real
def test_real_vocabulary_loads_fast() -> None:
    start = perf_counter()
    tokenizer = Tokenizer.from_gguf(real_file())
    assert perf_counter() - start < 5  # half a second on an idle machine
    assert tokenizer.vocab_size == 151_936
    assert tokenizer.eos_ids == {151643, 151645}


@real
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [9707, 1879]),
        ("Hello, world!", [9707, 11, 1879, 0]),
        ("1234", [16, 17, 18, 19]),
        ("<|im_start|>user\n", [151644, 872, 198]),
        ("<|im_start|>assistant\n", [151644, 77091, 198]),
        (
            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
            [2610, 525, 1207, 16948, 11, 3465, 553, 54364, 14817, 13, 1446, 525, 264, 10950, 17847, 13],
        ),
    ],
)
def test_known_qwen_ids(text: str, ids: list[int]) -> None:
    assert real_tokenizer().encode(text, parse_special=True) == ids


@real
@pytest.mark.parametrize("text", TRICKY)
def test_real_ids_equal_the_reference(text: str) -> None:
    ids = real_tokenizer().encode(text, parse_special=False)
    assert ids == reference_encode(text, *real_reference())
    assert real_tokenizer().decode(ids) == text


@real
@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_any_text_equals_the_reference_in_the_real_vocabulary(text: str) -> None:
    ids = real_tokenizer().encode(text, parse_special=False)
    assert ids == reference_encode(text, *real_reference())
    stream = TextStream(real_tokenizer())
    assert "".join(map(stream.push, ids)) + stream.finish() == text
