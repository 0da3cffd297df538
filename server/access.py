"""Who may ask: host names, origins and the API key. Nothing of the body has been read here."""

from __future__ import annotations

import hmac
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from quart import Request

from server.errors import Failure
from server.page import FILES
from server.settings import Settings

LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS: Final = frozenset({"/health", *FILES})


def check_access(request: Request, settings: Settings) -> None:
    """Raise Failure for a request that must not be served.

    A page of another site reaches a server on this machine by its own name (DNS rebinding) or with its
    own Origin: neither is served.
    """
    host = request.headers.get("Host", "")
    address = (request.scope.get("server") or ("",))[0]
    if is_loopback(address) and _host_name(f"//{host}") not in (*LOCAL_HOSTS, *settings.allowed_hosts):
        raise Failure(403, "this host name is not served here: see JAXMOE_ALLOWED_HOSTS")
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        raise Failure(403, "requests of other origins are not served")
    if settings.api_key is not None and request.path not in OPEN_PATHS:
        _check_key(request, settings.api_key)


def _check_key(request: Request, api_key: str) -> None:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")
    # Header values arrive as Latin-1, whatever their bytes mean.
    if not hmac.compare_digest(given.encode("latin-1"), api_key.encode()):
        raise Failure(401, "a valid API key is needed", code="invalid_api_key")


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches what listens on the address."""
    try:
        return ip_address(address).is_loopback
    except ValueError:  # a Unix socket
        return False
