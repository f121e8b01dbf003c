"""What every request passes before anything else looks at it: an id, a limit on its size and its patience, its books.

Pure ASGI: a middleware of Starlette's BaseHTTPMiddleware kind would hide from those behind it that a client has left
(Kludex/starlette#2094).
"""

import asyncio
import re
import secrets
from collections.abc import Callable, Collection
from typing import Any

import orjson

from service.errors import ApiError
from service.life import Life, server_timing
from service.observe import ENDPOINTS
from service.sending import ClientLeft, told

ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")  # W3C Trace Context
WITH_BODY = ("chat", "completions")  # whose bodies are read

Headers = dict[str, str]


class Guard:
    """Around the whole application. door(scope, headers, life): raises ApiError for those who cannot come in, whatever
    they ask; called again when a body has come that did not come along with its headers ("whole" in the state): who
    only promises one keeps nobody out. begun(life, headers): a look at it before anything else. ended(life): closes the
    books, once for every request, or refused(life) does.

    at_once() stands before it: a flood of refusals must not wait for those who are let in.
    """

    def __init__(
        self, app: Any, *, clock: Callable[[], float], door: Callable[[dict, Headers, Life], None],
        begun: Callable[[Life, Headers], None], ended: Callable[[Life], None], refused: Callable[[Life], None],
        max_body: int, body_timeout: float, cors_origin: str | None, kept: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.app, self.clock, self.door, self.begun = app, clock, door, begun
        self.ended, self.refused = ended, refused
        self.max_body, self.body_timeout, self.kept = max_body, body_timeout, kept
        # Refusals at the door too: without it a browser shows its user nothing of them.
        self.cors = {"access-control-allow-origin": cors_origin} if cors_origin else {}

    @property
    def always(self) -> Headers:
        return self.cors if self.kept() else self.cors | CLOSE

    def at_once(self, scope: dict) -> tuple[int, dict[str, str], bytes] | None:
        """For a request that has just begun: None to go on, or the whole answer (status, headers, body)."""
        headers = headers_of(scope)
        life = self.born(scope, headers)
        try:
            self.door(scope, headers, life)
            return None
        except ApiError as error:
            life.failed(error.outcome, error.code)
            life.status, body = error.status, orjson.dumps(error.body)
            try:
                given = {"content-type": "application/json", **error.all_headers}
                return error.status, given | own_headers(life, self.always, given), body
            finally:
                self.refused(life)

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = headers_of(scope)
        life: Life = scope["state"]["life"]
        reads = scope["method"] == "POST" and life.endpoint in WITH_BODY
        always = self.always if reads or scope["state"]["whole"] else self.always | CLOSE  # nobody reads that body
        sending = Sending(life, send, always)
        try:
            with life.part("receive", life.start_s):
                scope["state"]["body"] = await self.body(headers, receive, scope["state"]["whole"]) if reads else b""
            if reads and not scope["state"]["whole"]:
                scope["state"]["whole"] = True
                self.door(scope, headers, life)
            life.opened_s = self.clock()
            await self.app(scope, receive, sending)
        except ClientLeft:
            life.failed("cancelled", "client_left")
            life.status = 499
        except ApiError as error:  # after the start of an answer, its route tells it
            life.failed(error.outcome, error.code)
            await told(error)(scope, receive, sending)
        except asyncio.CancelledError:
            life.failed("cancelled", "server_stopped")
            raise
        except Exception:
            life.failed("engine_error", "internal_error")
            if not sending.started:
                await told(BROKEN)(scope, receive, sending)
            raise
        finally:
            self.ended(life)

    def born(self, scope: dict, headers: Headers) -> Life:
        life = Life(self.clock, f"req-{secrets.token_hex(12)}", self.clock())
        life.endpoint = ENDPOINTS.get(scope["path"], "page" if scope["path"].startswith("/page/") else "other")
        theirs = headers.get("x-request-id", "")
        life.facts |= {"method": scope["method"][:16], "route": life.endpoint}
        if ID.fullmatch(theirs):
            life.facts["client_request_id"] = theirs
        elif theirs:
            life.facts["client_request_id_dropped"] = True
        self.begun(life, headers)
        scope.setdefault("state", {})["life"] = life
        return life

    async def body(self, headers: Headers, receive: Any, whole: bool) -> bytes:
        """All of it, or an ApiError: too large, too slow, in a form that is not understood. whole: it has come, so who
        is not there any more has left while he waited for his turn: ClientLeft.
        """
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > self.max_body:
            raise self.too_large()
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "content_encoding", "Compressed bodies are not taken: send it as it is.", headers=CLOSE)
        found, more = bytearray(), True
        try:
            async with asyncio.timeout(self.body_timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        if whole:
                            raise ClientLeft
                        raise ApiError(400, "incomplete_body", "The connection ended before the body did.")
                    found += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(found) > self.max_body:
                        raise self.too_large()
        except TimeoutError as error:
            raise ApiError(
                408, "body_timeout", f"The body did not come within {self.body_timeout:g} s.", headers=CLOSE
            ) from error
        return bytes(found)

    def too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"The body is larger than {self.max_body:,} bytes.", headers=CLOSE)


CLOSE = {"connection": "close"}
BROKEN = ApiError(500, "internal_error", "Something is broken here; the log has it under this id.", retry=True)


class Sending:
    """send(), with what every answer carries, and a look at how long the reader makes us wait."""

    def __init__(self, life: Life, send: Any, always: Headers) -> None:
        self.life, self.send, self.always, self.started = life, send, always, False

    async def __call__(self, message: dict) -> None:
        life = self.life
        if message["type"] == "http.response.start":
            self.started, life.status = True, message["status"]
            given = {name.lower().decode("latin-1") for name, _ in message["headers"]}
            own = [(name.encode(), value.encode()) for name, value in own_headers(life, self.always, given).items()]
            message["headers"] = [*message["headers"], *own]
        before = life.clock()
        await self.send(message)
        life.blocked_s += life.clock() - before


def own_headers(life: Life, always: Headers, given: Collection[str]) -> Headers:
    """What every answer carries, unless it was given another."""
    mine = always | {"x-request-id": life.facts.get("client_request_id", life.id)}
    mine["server-timing"] = server_timing(life.split())
    return {name: value for name, value in mine.items() if name not in given}


def note_trace(life: Life, headers: Headers) -> None:
    """The id of the trace that a client's request belongs to, for the log line: where nothing is traced here, too."""
    found = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    if found and set(found[1]) != {"0"}:
        life.facts["trace_id"] = found[1]


def headers_of(scope: dict) -> Headers:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
