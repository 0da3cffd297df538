"""The small trained model that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_FILE: Final = Path(__file__).with_name("demo.gguf")


def demo_model() -> Path:
    """The GGUF file of the embedded demo model, which is served when no model is named.

    Raises FileNotFoundError where the package was built without it.
    """
    if not _FILE.is_file():
        raise FileNotFoundError(f"the embedded demo model is not there ({_FILE}): name a GGUF file instead")
    return _FILE
