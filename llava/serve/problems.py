"""Errors of the server in OpenAI's form: an HTTP status and `{"error": {"message", "type", "param", "code"}}`.

Standard library only, so that reading a request needs no web framework.
"""

from __future__ import annotations

import json
from typing import Any

from llava.errors import LlavaError


class BusyError(LlavaError):
    """As many requests wait as are allowed to."""


class EngineError(LlavaError):
    """The model failed on a batch."""


class StoppedError(EngineError):
    """The engine has stopped, and answers nothing more."""


SHOWN = 100
"""Characters of a client's value that an error repeats."""

CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
KINDS = {429: "rate_limit_error"}
STATUSES = ((BusyError, 429), (StoppedError, 503), (EngineError, 500))
"""Of errors that are not the client's; the first kind that fits counts."""


class RequestError(LlavaError):
    """A request that cannot be answered.

    Args:
        message: what is wrong and what to do.
        param: the parameter.
        status: of HTTP.
        code: one word for programs; None: the usual one of the status.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def short(value: Any) -> str:
    """A value as an error repeats it, without what makes it long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= SHOWN else f"{value[:SHOWN]!r}..."
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}" if value else repr(value)
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def status_of(error: LlavaError) -> int:
    """HTTP status of an error."""
    if isinstance(error, RequestError):
        return error.status
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 400)


def problem(error: LlavaError) -> dict[str, Any]:
    """The body of an error's response."""
    return problem_of(status_of(error), str(error), getattr(error, "param", None), getattr(error, "code", None))


def problem_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of a response with this status."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    # A file name of this machine may have bytes that are no text.
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}
