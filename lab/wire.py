"""One connection of a client: HTTP/1.1 with the fewest steps between the socket and the stamp.

Every piece is stamped when the event loop hands it over, before anything is made of it. A library for requests puts
half a millisecond and more of its own between the two, which is as much as a measurement may be off in all.
"""

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol
from urllib.parse import urlsplit

import httptools

CONNECT_S = 10.0


class Broken(Exception):
    """The answer cannot come any more. Its text begins with the kind: disconnected, cut, malformed."""


class Receives(Protocol):
    """What an answer is written into."""

    status: int
    headers: Mapping[str, str]
    pieces: list[tuple[float, bytes]]


@dataclass(frozen=True)
class Place:
    """Where requests go, with the part of their heads that is always the same. ValueError: no http address."""

    host: str
    port: int
    tls: bool
    head: bytes

    @classmethod
    def of(cls, url: str, headers: Mapping[str, str]) -> "Place":
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is no http address")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        given = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json", **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, f"POST {path} HTTP/1.1\r\n{lines}".encode())

    def request(self, body: bytes) -> bytes:
        return b"%bContent-Length: %d\r\n\r\n%b" % (self.head, len(body), body)


@cache
def tls_context() -> ssl.SSLContext:
    """Made once: it reads all certificates of the system, which takes tens of milliseconds."""
    return ssl.create_default_context()


async def connected(place: Place) -> "Wire":
    """A new connection. OSError, ssl.SSLError among them, or TimeoutError as OSError."""
    context = tls_context() if place.tls else None
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_S):
            _, wire = await loop.create_connection(Wire, place.host, place.port, ssl=context)
    except TimeoutError as error:
        raise OSError(f"{place.host}:{place.port} did not answer within {CONNECT_S:g} s") from error
    return wire


class Wire(asyncio.Protocol):
    """One request after the other. lost: it is closed, from whichever side.

    asked, pieces: so many requests were written, and so many pieces of answers came, on all of them.
    """

    asked = pieces = 0

    def __init__(self) -> None:
        self.lost = False
        self.done: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    async def ask(self, raw: bytes, answer: Receives) -> None:
        """Send, and wait until the answer is whole. Broken."""
        if self.lost:
            raise Broken("disconnected: before the request was sent")
        self.answer, self.headers, self.whole = answer, {}, False
        self.parser = httptools.HttpResponseParser(self)
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(raw)
        Wire.asked += 1
        try:
            await self.done
        finally:
            self.done = None

    # ---- from the socket

    def data_received(self, data: bytes) -> None:
        self.now_s = time.perf_counter()
        if self.done is None:  # bytes that nobody asked for
            self.transport.abort()
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(f"malformed: no HTTP ({error})")
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self.done is None or self.done.done():
            return
        names = self.headers
        if self.answer.status and "content-length" not in names and "chunked" not in names.get("transfer-encoding", ""):
            self.done.set_result(None)  # the end of the connection is the end of such an answer
        else:
            self.fail(
                f"{'cut' if self.answer.status else 'disconnected'}: {error or 'the server closed the connection'}"
            )

    def fail(self, why: str) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(Broken(why))

    # ---- from the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.answer.status, self.answer.headers = self.parser.get_status_code(), self.headers

    def on_body(self, body: bytes) -> None:
        self.answer.pieces.append((self.now_s, body))
        Wire.pieces += 1

    def on_message_complete(self) -> None:
        if 100 <= self.answer.status < 200:  # an answer before the answer
            self.parser = httptools.HttpResponseParser(self)
            return
        if not self.parser.should_keep_alive():
            self.lost = True
            self.transport.close()
        if self.done is not None and not self.done.done():
            self.done.set_result(None)
