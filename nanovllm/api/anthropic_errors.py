"""Errors in Anthropic's format."""

from __future__ import annotations

import re
from typing import Any

from nanovllm.api.errors import TOO_LONG, ApiError, shortened

TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error",
    503: "overloaded_error",
}  # fmt: skip
# chat fields that have other names in this API
OWN_NAMES = {
    "stop": "stop_sequences", "response_format": "output_config.format",
    "chat_template_kwargs": "thinking",
}  # fmt: skip
OF_TOOL = re.compile(r"(tools\[\d+\])\.function(?:\.(\w+))?")


class AnthropicError(ApiError):
    """An error of an Anthropic endpoint."""

    def __init__(self, error: ApiError, request_id: str) -> None:
        super().__init__(error.status, error.message, param=error.param, code=error.code)
        self.headers = error.headers
        self._request_id = request_id

    def content(self) -> dict[str, Any]:
        message = shortened(self.message)
        if self.param is not None:
            message = message.replace(self.param, own_name(self.param), 1)
        if self.code == TOO_LONG:  # clients match this prefix
            message = f"prompt is too long: {message}"
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"type": kind, "message": message}
        return {"type": "error", "error": error, "request_id": self._request_id}

    def events(self) -> bytes:
        return b"event: error\ndata: %b\n\n" % self.body()


def own_name(field: str) -> str:
    """Anthropic's name for a field of chat."""
    if in_tool := OF_TOOL.fullmatch(field):
        tool, inner = in_tool.groups()
        return tool if inner is None else f"{tool}.{inner.replace('parameters', 'input_schema')}"
    return OWN_NAMES.get(field, field)
