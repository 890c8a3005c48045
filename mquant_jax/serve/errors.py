"""Errors in the format of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mquant_jax.errors import ImageError, PromptTooLong, QueueFull, UserError

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    429: "rate_limit_error", 500: "server_error", 503: "server_error",
}  # fmt: skip
_PARAM = re.compile(r"body: (\w+)")


class ApiError(Exception):
    """An error response.

    Attributes:
        status: HTTP status.
        message: what was found, what was expected and what to do.
        code: machine-readable code, or ``None``.
        param: the request's field, or ``None``.
        headers: additional response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def refusal(error: UserError) -> ApiError:
    """The response to a client for an error of the package."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), "queue_full", headers={"Retry-After": "1"})
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, ImageError):
        return ApiError(400, str(error), "invalid_image", "messages")
    found = _PARAM.match(str(error))
    return ApiError(400, str(error), param=found[1] if found else None)
