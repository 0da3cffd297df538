"""What people read and write on a terminal: sizes, progress, and text that cannot act on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final, NoReturn

from tqdm import tqdm

_UNITS: Final = "KMGT"  # powers of 1024
# C0 but for tab and newline, DEL and C1; line separators; what turns the direction of writing around
_UNPRINTABLE: Final = (
    *(code for code in range(0x20) if chr(code) not in "\t\n"),
    *range(0x7F, 0xA0),
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
)
_ESCAPES: Final = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _UNPRINTABLE}


def printable(text: str) -> str:
    """The text with its control characters, but for tab and newline, as escapes such as \\x1b."""
    return text.translate(_ESCAPES)


def parse_size(text: str) -> int:
    """Bytes of "1024", "512M", "4GB" or "80GiB", all in powers of 1024.

    Raises ValueError for anything else.
    """
    digits = text.upper().removesuffix("B").removesuffix("I")
    unit = _UNITS.find(digits[-1:]) + 1 if digits else 0
    try:
        return int(digits[:-1] if unit else digits) << 10 * unit
    except ValueError:
        raise ValueError(f"expected bytes, or a size such as 4GiB, got {text!r}") from None


def size_text(size: int) -> str:
    """A size in bytes with its unit, to four digits: "17.28 GiB"."""
    power = min(max(0, size.bit_length() - 1) // 10, len(_UNITS))
    return f"{size / 1024**power:.4g} {_UNITS[power - 1]}iB" if power else f"{size} bytes"


class PhaseBars:
    """A bar on stderr for each phase of a load where that is a terminal, elsewhere `say(phase)` once.

    Called as LLM's `progress(phase, fraction)`, fraction 0..1; a phase that is whole keeps its line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._phase: str | None = None
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, phase: str, fraction: float) -> None:
        """Show that `fraction` of `phase` is done."""
        is_terminal = sys.stderr.isatty()
        if phase != self._phase:
            self.close()
            self._phase = phase
            if not is_terminal:
                self._say(phase)
        if is_terminal and self._bar is None and fraction < 1:
            self._bar = tqdm(total=1.0, desc=phase, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}")
        if self._bar is not None:
            self._bar.update(fraction - self._bar.n)
        if fraction >= 1:
            self.close()

    def close(self) -> None:
        """End the line of a bar that is not whole."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
