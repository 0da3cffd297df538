"""The chat page's files, as the server gives them out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from asgi_client import Exchange
from quart import Quart

from server.app import create_app
from server.page import FILES, STATIC
from server.settings import Settings

ROOT = Path(__file__).parents[1]


def no_model(*_: object) -> Any:
    raise ValueError("there is none")


@pytest.fixture
async def app() -> AsyncIterator[Quart]:
    """An app that needs a key and is never started: the page has to be there before any model."""
    return create_app(Settings(api_key="secret", allowed_hosts=("proxy.example",)), load=no_model)


async def get(app: Quart, path: str, method: str = "GET", **headers: str) -> Exchange:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return await Exchange(app, method, path, headers=sent).end()


@pytest.mark.parametrize("path", FILES)
async def test_every_file_is_served_without_a_key_and_with_all_headers(app: Quart, path: str) -> None:
    answer = await get(app, path)
    name = path.removeprefix("/static/") if path != "/" else "index.html"
    assert (answer.status, answer.body) == (200, (STATIC / name).read_bytes())
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


async def test_content_types(app: Quart) -> None:
    found = {path: (await get(app, path)).headers["content-type"] for path in FILES}
    assert found["/"] == "text/html; charset=utf-8"
    assert found["/static/chat.css"] == "text/css; charset=utf-8"
    assert found["/static/chat.js"] == "text/javascript; charset=utf-8"
    assert found["/static/icon.svg"].startswith("image/svg+xml")


@pytest.mark.parametrize("path", ["/", "/static/chat.js"])
async def test_a_file_that_the_browser_has_is_not_sent_again(app: Quart, path: str) -> None:
    etag = (await get(app, path)).headers["etag"]
    assert re.fullmatch(r'"[0-9a-f]{32}"', etag)
    again = await get(app, path, if_none_match=etag)
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
    assert again.headers["cache-control"] == "no-cache"
    assert (await get(app, path, if_none_match='"another"')).status == 200
    assert (await get(app, path, if_none_match=f'"another", W/{etag}')).status == 304


async def test_different_files_have_different_etags(app: Quart) -> None:
    assert len({file.etag for file in FILES.values()}) == len(FILES)


@pytest.mark.parametrize("path", ["/", "/static/chat.css"])
async def test_methods(app: Quart, path: str) -> None:
    head = await get(app, path, "HEAD")
    assert head.status == 200
    assert int(head.headers["content-length"]) == len(FILES[path].content)
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        answer = await get(app, path, method)
        assert answer.status == 405, method
        assert set(answer.headers["allow"].replace(" ", "").split(",")) == {"GET", "HEAD"}
        assert answer.json["error"]["message"] == "this path does not take this method"


@pytest.mark.parametrize(
    "path", ["/static/", "/static/index.html", "/static/../page.py", "/static/%2e%2e/page.py", "/index.html"]
)
async def test_nothing_else_is_open(app: Quart, path: str) -> None:
    assert (await get(app, path)).status in (401, 404)
    with_key = await get(app, path, authorization="Bearer secret")
    assert with_key.status in (308, 404)
    assert b"def " not in with_key.body


@pytest.mark.parametrize(
    ("host", "status"), [("localhost", 200), ("proxy.example", 200), ("evil.example", 403)]
)
async def test_the_page_is_not_served_to_a_rebound_name(app: Quart, host: str, status: int) -> None:
    assert (await get(app, "/", host=host)).status == status
    assert (await get(app, "/static/chat.js", host=host)).status == status


async def test_the_page_is_not_served_to_another_origin(app: Quart) -> None:
    assert (await get(app, "/static/chat.js", origin="https://evil.example")).status == 403


def test_no_file_names_another_server() -> None:
    """Relative addresses only, so that the page also works below a path of a proxy."""
    named = re.compile(r"""(?:\b(?:src|href)=|\bfrom |\b(?:import|fetch|ask)\()["'`](?![#$])([^"'`]+)""")
    found = [
        (path.name, address)
        for path in STATIC.iterdir()
        for address in named.findall(path.read_text("utf-8"))
    ]
    assert len(found) > 10
    for name, address in found:
        assert re.match(r"(static/|\./|health$|v1/)", address), (name, address)


def test_nothing_turns_text_into_html() -> None:
    forbidden = (
        r"(inner|outer)HTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|Fragment\("
    )
    for path in STATIC.glob("*.js"):
        assert not re.search(forbidden, path.read_text("utf-8")), path.name
    page = (STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", page)


def test_the_wheel_holds_the_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["server"]
    packed = {path for pattern in patterns for path in (ROOT / "server").glob(pattern)}
    assert set(STATIC.iterdir()) <= packed
