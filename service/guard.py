"""What every request passes before anything else looks at it: an id, a limit on its size and its patience, its books.

Pure ASGI: a middleware of Starlette's BaseHTTPMiddleware kind would hide from those behind it that a client has left
(Kludex/starlette#2094).
"""

import asyncio
import re
import secrets
from collections.abc import Callable
from typing import Any

import orjson

from service.errors import ApiError
from service.life import Life, server_timing

ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
WITH_BODY = {"POST", "PUT", "PATCH"}


class Guard:
    """Around the whole application. ended(life, scope): closes the books, once for every request."""

    def __init__(
        self, app: Any, *, clock: Callable[[], float], ended: Callable[[Life, dict], None], max_body: int, body_timeout: float
    ) -> None:
        self.app, self.clock, self.ended, self.max_body, self.body_timeout = app, clock, ended, max_body, body_timeout

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        theirs = headers.get("x-request-id", "")
        life = Life(self.clock, f"req-{secrets.token_hex(12)}", self.clock())
        life.facts["client_request_id"] = theirs if ID.fullmatch(theirs) else None
        life.facts["client_request_id_dropped"] = bool(theirs) and not ID.fullmatch(theirs)
        scope.setdefault("state", {})["life"] = life
        started = False

        async def sending(message: dict) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, life.status = True, message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", (life.facts["client_request_id"] or life.id).encode())]
                if not any(name == b"server-timing" for name, _ in message["headers"]):
                    message["headers"].append((b"server-timing", server_timing(life.split()).encode()))
            before = self.clock()
            await send(message)
            life.send_blocked_s += self.clock() - before

        try:
            scope["state"]["body"] = await self.body(scope, headers, receive)
            await self.app(scope, receive, sending)
        except ApiError as error:
            if started:
                raise
            life.outcome, life.error_code = error.outcome, error.code
            await refuse(error, sending)
        except asyncio.CancelledError:
            life.outcome = "cancelled"
            raise
        except Exception:
            life.outcome, life.error_code = "engine_error", "internal_error"
            if not started:
                await refuse(ApiError(500, "internal_error", "Something is broken here; it was written down.", retry=True), sending)
            raise
        finally:
            self.ended(life, scope)

    async def body(self, scope: dict, headers: dict[str, str], receive: Any) -> bytes:
        """All of it, or an ApiError: too large, too slow, in a form that is not understood."""
        if scope["method"] not in WITH_BODY:
            return b""
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.max_body:
            raise self.too_large()
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "content_encoding", "Compressed bodies are not taken: send it as it is.")
        found = bytearray()
        try:
            async with asyncio.timeout(self.body_timeout):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "incomplete_body", "The connection ended before the body did.")
                    found += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(found) > self.max_body:
                        raise self.too_large()
        except TimeoutError as error:
            raise ApiError(408, "body_timeout", f"The body did not come within {self.body_timeout:g} s.",
                           headers={"connection": "close"}) from error  # fmt: skip
        return bytes(found)

    def too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"The body is larger than {self.max_body:,} bytes.", headers={"connection": "close"})


async def refuse(error: ApiError, send: Any) -> None:
    body = orjson.dumps(error.body)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.all_headers}
    await send({
        "type": "http.response.start", "status": error.status,
        "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()],
    })  # fmt: skip
    await send({"type": "http.response.body", "body": body})
