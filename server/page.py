"""The chat page: a few files that are read once, with the headers that keep it safe and up to date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Final

from quart import Quart, Response, request

STATIC: Final = Path(__file__).parent / "static"
CONTENT_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing but this server's own files, and no text that becomes HTML: what a model says runs nowhere.
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # A browser keeps them and asks each time whether they are still the same: an upgrade shows at once.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class StaticFile:
    """A file as it is served; `etag` is a digest of its bytes."""

    content: bytes
    content_type: str
    etag: str


def _read_files() -> Mapping[str, StaticFile]:
    files = {f"/static/{path.name}": _read_file(path) for path in sorted(STATIC.iterdir())}
    return MappingProxyType({"/": files.pop("/static/index.html"), **files})


def _read_file(path: Path) -> StaticFile:
    content = path.read_bytes()
    return StaticFile(content, CONTENT_TYPES[path.suffix], sha256(content).hexdigest()[:32])


FILES: Final = _read_files()


def add_page(app: Quart) -> None:
    """Serve each of FILES at its path, to GET and HEAD."""

    async def static_file() -> Response:
        return _answer(FILES[request.path])

    for path in FILES:
        app.add_url_rule(path, view_func=static_file, methods=["GET"], provide_automatic_options=False)


def _answer(file: StaticFile) -> Response:
    is_known = request.if_none_match.contains_weak(file.etag)  # a proxy that packs a file weakens its tag
    content = b"" if is_known else file.content
    response = Response(content, 304 if is_known else 200, HEADERS, content_type=file.content_type)
    response.set_etag(file.etag)
    return response
