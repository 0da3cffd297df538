"""Errors as clients see them: one table of statuses, one JSON shape.

Source of the shape: OpenAI's error object.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from werkzeug.exceptions import HTTPException

from jaxmoe import EngineStopped, RequestError

LOG: Final = logging.getLogger("server")

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_SENTENCES: Final = {
    404: "there is nothing at this path",
    405: "this path does not take this method",
    408: "the body did not arrive in time",
    413: "the body is too large",
}
_STATUS_OF_CODE: Final = {"queue_full": 429}


class Failure(Exception):
    """An answer other than success: status, message, and headers such as Retry-After."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def failure_of(error: Exception, request_id: str) -> Failure:
    """The answer to any error; one of ours is logged and shows the request's id only."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, RequestError):
        return _refusal(error)
    if isinstance(error, EngineStopped):
        return Failure(503, "the engine has stopped", code="not_ready")
    if isinstance(error, HTTPException) and error.code is not None and error.code < 500:
        headers = dict(error.get_headers())
        headers.pop("Content-Type", None)
        return Failure(error.code, _SENTENCES.get(error.code, error.name), headers=headers)
    LOG.error("request %s failed", request_id, exc_info=error)
    return Failure(500, f"internal error in request {request_id}")


def _refusal(error: RequestError) -> Failure:
    status = _STATUS_OF_CODE.get(error.code or "", 400)
    headers = {"Retry-After": "1"} if status == 429 else {}
    return Failure(status, str(error), param=error.param, code=error.code, headers=headers)
