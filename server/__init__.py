"""The OpenAI-compatible web server: `hypercorn server:app`, or `python -m server MODEL.gguf`.

Importing it reads no settings and loads nothing: both wait until the app is started.
"""

from __future__ import annotations

from server.app import create_app

__all__ = ["app", "create_app"]

app = create_app()
