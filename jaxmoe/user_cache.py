"""Directories of the user's own for what was compiled."""

from __future__ import annotations

import os
from pathlib import Path


def private_directory(name: str) -> Path:
    """`name` in jaxmoe's part of the user's cache (XDG_CACHE_HOME or ~/.cache), made if it is not there.

    Raises OSError where that cannot be done, RuntimeError where others may write to it or there is no home.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = root / "jaxmoe" / name
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RuntimeError(f"{directory} is another user's, or others may write to it")
    return directory
