"""Token ids to text by the model file's own vocabulary, independent of the server that is measured.

The file is read with the `gguf` package and the bytes are decoded by Python's codecs, so that nothing
here is shared with the tokenizer under test.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # gguf.TokenType
SILENT = (UNKNOWN, CONTROL, UNUSED)
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of each token, and the id that ends a text.

    Control, unknown and unused tokens have no bytes, nor has an id that the file names as an end.
    """

    pieces: tuple[bytes, ...]
    end_token_id: int | None

    @classmethod
    def from_gguf(cls, path: Path) -> Vocabulary:
        """Read `tokenizer.ggml.tokens` and `token_type` (byte-level BPE). Raises KeyError for neither."""
        from gguf import GGUFReader

        fields = GGUFReader(path).fields
        tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
        types: list[int] = fields["tokenizer.ggml.token_type"].contents()
        named = (fields.get(f"tokenizer.ggml.{key}") for key in END_KEYS)
        ends = [None if field is None else int(field.contents()) for field in named]
        to_byte = {character: byte for byte, character in enumerate(_byte_characters())}
        pieces = [_piece(token, kind, to_byte) for token, kind in zip(tokens, types, strict=True)]
        for end in ends:
            if end is not None:
                pieces[end] = b""
        return cls(tuple(pieces), ends[0])

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of the ids; what is not UTF-8 becomes U+FFFD."""
        return b"".join(self.pieces[token_id] for token_id in token_ids).decode(errors="replace")

    def held_rightly(self, groups: Iterable[Sequence[int]]) -> bool:
        """Whether in each group of ids only the last one completed a character.

        A chunk that carries several ids is right only where all but its last left a character unfinished.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for group in groups:
            texts = [decoder.decode(self.pieces[token_id]) for token_id in group]
            if any(texts[:-1]):
                return False
        return True

    def ids_where(self, wanted: Callable[[str], bool], most: int) -> list[int]:
        """The first `most` ids whose bytes are whole characters that satisfy `wanted`."""
        found = (i for i, piece in enumerate(self.pieces) if _is_whole(piece) and wanted(piece.decode()))
        return [token_id for token_id, _ in zip(found, range(most), strict=False)]

    def byte_ids(self, text: str) -> list[int]:
        """The ids of single-byte tokens that spell `text`; [] where the vocabulary lacks one."""
        where = {piece: i for i, piece in enumerate(self.pieces) if len(piece) == 1}
        ids = [where.get(bytes([byte])) for byte in text.encode()]
        return [i for i in ids if i is not None] if None not in ids else []


def _is_whole(piece: bytes) -> bool:
    try:
        return bool(piece.decode())
    except UnicodeDecodeError:
        return False


def _piece(token: str, kind: int, to_byte: dict[str, int]) -> bytes:
    if kind in SILENT:
        return b""
    if kind != USER_DEFINED and all(character in to_byte for character in token):
        return bytes(to_byte[character] for character in token)
    return token.encode()


def _byte_characters() -> Iterator[str]:
    """The character that stands for each byte in GPT-2's vocabulary files, bytes 0 to 255 in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = 0
    for byte in range(256):
        yield chr(byte if byte in printable else 0x100 + shifted)
        shifted += byte not in printable
