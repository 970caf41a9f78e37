"""Errors in OpenAI's format, and how exceptions map to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import msgspec

from nanovllm.checks import InvalidValue
from nanovllm.prompts import PromptTooLong
from nanovllm.serving.async_engine import Draining, EngineDead, QueueFull, Unavailable

MAX_MESSAGE_CHARS = 500
TOO_LONG = "context_length_exceeded"  # OpenAI's code, which clients check
RETRY_AFTER_S = b"5"
DONE = b"data: [DONE]\n\n"  # the end of OpenAI's streams
TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 429: "rate_limit_error", 500: "server_error",
    503: "service_unavailable_error",
}  # fmt: skip


class ApiError(Exception):
    """An error response. param: the field of the request at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: list[tuple[bytes, bytes]] = []
        if status in (429, 503):
            self.headers.append((b"retry-after", RETRY_AFTER_S))
        if status == 401:
            self.headers.append((b"www-authenticate", b"Bearer"))

    def content(self) -> dict[str, Any]:
        """The JSON object sent to the client."""
        kind = TYPES.get(self.status, "invalid_request_error")
        fields = {
            "message": shortened(self.message), "type": kind, "param": self.param,
            "code": self.code,
        }  # fmt: skip
        return {"error": fields}

    def body(self) -> bytes:
        try:
            return msgspec.json.encode(self.content())
        except UnicodeEncodeError:  # half of a surrogate pair, from a URL or a header
            self.message = self.message.encode("ascii", "replace").decode()
            self.param = None
            return msgspec.json.encode(self.content())

    def events(self) -> bytes:
        """The last events of a response that has started."""
        return b"data: %b\n\n%b" % (self.body(), DONE)


def shortened(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]}…"


def refused(name: str, reason: str) -> ApiError:
    """The error for a field that is not supported or not allowed."""
    return ApiError(400, reason, param=name, code="unsupported_parameter")


def invalid(name: str, message: str, code: str = "invalid_value") -> ApiError:
    """The error for an invalid value of a field."""
    return ApiError(400, message, param=name, code=code)


def from_exception(
    error: Exception, names: Mapping[str, str] | None = None, hidden: str = "", model: str = ""
) -> ApiError:
    """The error that a client receives for an exception. Internal errors are sent without message.

    names: the endpoint's names for fields that the engine names differently. hidden: the model's
    path, which `model` replaces in messages if it has several parts.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, "the queue is full: try again later", code="rate_limit_exceeded")
    if isinstance(error, Draining):
        return ApiError(503, "the server is shutting down", code="draining")
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable")
    if isinstance(error, EngineDead):
        return ApiError(500, "the engine has failed", code="engine_dead")
    if isinstance(error, ValueError):
        message = str(error)
        if len(PurePath(hidden).parts) > 1:  # "." or a single word may be anywhere in a message
            message = message.replace(hidden, model)
        param = error.field if isinstance(error, InvalidValue) else None
        if param is not None and names is not None:
            param = names.get(param, param)
        code = TOO_LONG if isinstance(error, PromptTooLong) else "invalid_value"
        return ApiError(400, message, param=param, code=code)
    return ApiError(500, "internal server error", code="internal_error")
