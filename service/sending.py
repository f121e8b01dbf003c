"""Answers on their way to the client: as a stream of events, or whole; given up when the client has left.

A client that closes its connection, or only its sending half, is taken as gone: TCP cannot tell the two apart before
something is written, and what is computed for nobody costs the others. (Go's net/http reads an end of file so, too.)
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.responses import Response

from service.errors import ApiError

Result = TypeVar("Result")
EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
HEARTBEAT = b": still here\n\n"  # a comment, which clients pass over
END = b"data: [DONE]\n\n"


class ClientLeft(Exception):
    """Nobody waits for this answer any more."""


async def unless_left(receive: Any, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives; ClientLeft, and the work cancelled, when the connection ends before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event. https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def whole(data: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(data), status, headers, "application/json")


def told(error: ApiError) -> Response:
    """An error, as OpenAI's clients understand it."""
    return whole(error.body, error.status, error.all_headers)


class Events(Response):
    """A response of events, sent as they come. It begins with the first one: what fails before it is answered as any
    other request is, and a proxy may give it to another server; an error after it is an event, the last one. gone():
    called when the client has left meanwhile. ended(): always, as the last; events that nobody began to read have not
    run to their own end.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str], *, gone: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:  # fmt: skip
        self.events, self.gone, self.ended = events, gone, ended
        self.status_code, self.background = 200, None
        self.init_headers(EVENT_HEADERS | dict(headers))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await unless_left(receive, self.write(scope["state"], send))
            if scope["state"].get("left"):  # before the end: the rest was written to nobody
                raise ClientLeft
        except ClientLeft:
            self.gone()
        finally:
            self.ended()

    async def write(self, state: Mapping[str, Any], send: Any) -> None:
        begun, last = False, b""
        try:
            async for chunk in self.events:
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    begun = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ApiError as error:
            if not begun:
                raise
            state["life"].failed(error.outcome, error.code)
            last = event(error.body)
        finally:
            await self.events.aclose()  # at once, not when the garbage is collected
        await send({"type": "http.response.body", "body": last, "more_body": False})
