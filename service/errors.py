"""What a client is told when something is wrong, in OpenAI's form, with what it should do next.

OpenAI's clients read the headers: they retry 408, 409, 429 and 5xx unless x-should-retry says otherwise, and wait as
long as retry-after-ms says. So every error here decides both, instead of leaving them to a client's taste.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

LONGEST = 1000  # characters of a message: a client's own text may be quoted in it


@dataclass
class ApiError(Exception):
    """status and code are for programs, message for people: what was wrong, what to do.

    param: the field it is about. retry: whether trying again can help; retry_after_s: not before. details: numbers
    behind the decision. outcome: how the request is counted.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    retry: bool = False
    retry_after_s: float | None = None
    details: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    outcome: str = "client_error"

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        error = {
            "message": self.message if len(self.message) <= LONGEST else self.message[: LONGEST - 1] + "…",
            "type": TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error | ({"details": dict(self.details)} if self.details else {})}

    @property
    def all_headers(self) -> dict[str, str]:
        found = {"x-should-retry": "true" if self.retry else "false", **self.headers}
        if self.retry_after_s is not None:
            found |= {
                "retry-after": str(max(round(self.retry_after_s + 0.5), 1)),  # whole seconds: not sooner than meant
                "retry-after-ms": str(max(ceil(self.retry_after_s * 1e3), 1)),
            }
        return found


TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """The request itself is wrong: sending it again cannot help."""
    return ApiError(400, code, message, param)


def too_long(prompt_tokens: int | str, new_tokens: int, context: int, param: str) -> ApiError:
    return invalid(
        f"The prompt has {prompt_tokens} tokens and {new_tokens} new ones are asked for, but the model's context is "
        f"{context}: shorten the prompt, or ask for less.",
        param,
        "context_length_exceeded",
    )
