"""What a client is told when it cannot have what it asked for."""

from __future__ import annotations

import traceback
from typing import Any

from ee_tuning.errors import UserError, first_line

# OpenAI's names for kinds of mistakes, by status.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Refused(Exception):
    """A request that is answered with an error.

    status: of HTTP. param: the field that it is about. code: OpenAI's, for programs.
    retry: seconds after which another try makes sense.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status
        self.code, self.retry = code, retry

    def __reduce__(self) -> Any:
        """To pickle it."""
        return Refused, (self.message, self.param, self.status, self.code, self.retry)

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "error": {
                "message": sound(self.message),
                "type": TYPES.get(self.status, "server_error"),
                "param": None if self.param is None else sound(self.param),
                "code": self.code,
            }
        }


def sound(text: str) -> str:
    """`text` as it can be sent: without halves of characters, and not endless."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= 400 else text[:399] + "…"


def explained(error: Exception) -> Exception:
    """What a client is told of a mistake."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UserError):
        return Refused(str(error))
    return Refused(f"the request failed: {first_line(error)}", status=500)


def line_of(error: Exception) -> dict[str, Any]:
    """One for the log, with its traceback: empty for a mistake of the client's own."""
    if isinstance(error, (Refused, UserError)):
        return {}
    lines = traceback.format_exception(error)
    return {"event": "error", "error": first_line(error), "traceback": "".join(lines)}
