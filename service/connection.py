"""The limits of a connection that uvicorn lacks: on headers, on their time, and on readers that do not read.

Its own only limit is on idle connections. A client that sends its headers letter by letter, or stops reading in the
middle of a stream, would hold a connection for ever (encode/uvicorn#157, and the fault matrix in tests/).
"""

import asyncio
import re
import secrets
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.connections import MOST_LINGERING, Connections
from service.errors import ApiError
from service.guard import Guard

MOST_HEADER_BYTES = 32 << 10
MOST_HEADERS = 100
MOST_PIPELINED = 100  # requests of one connection that wait for the answer to one before: each holds some KiB
LINGER_S = 1.0  # for what is on its way, after an answer that did not wait for it
RAW_SHARE = 8  # bytes on the wire for each byte of a body: chunks of one byte need six
UPGRADE = re.compile(rb"\r\nupgrade(?=:)", re.IGNORECASE)
SEND_BUFFER = 64 << 10  # bytes that the kernel keeps for a slow reader: small, so that it is seen soon


class Connection(HttpToolsProtocol):
    """header_timeout, send_timeout: seconds. max_body: bytes. at_once: the guard's. all: the books of all connections.
    Made by connection_class().
    """

    header_timeout: float
    send_timeout: float
    max_body: int
    all: Connections
    let_in: deque[tuple["Connection", Any, Any]]  # of all connections: first who began in this turn of the event loop
    at_once: Callable[[dict], tuple[int, dict[str, str], bytes] | None]

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.reading_body = False
        self.deaf = False  # it has been answered for the last time: what still comes is read and thrown away
        self.header_bytes = self.body_bytes = 0  # as they come; of a body with its chunks' heads and trailers
        self.reader_timer: asyncio.TimerHandle | None = None
        self.header_timer: asyncio.TimerHandle | None = None
        self.to_start: tuple[Any, Any] | None = None  # the cycle whose turn it is, and the application
        self.lingers = False  # it was turned away, and may read why
        self.in_feed = False  # the parser is at work: whether a body follows is not known yet
        self.answering: Any = None  # the cycle that runs; self.cycle is the latest one, which may wait behind it
        super().connection_made(transport)  # from here on others can see it
        self.expect_headers()
        transport.set_write_buffer_limits(high=SEND_BUFFER)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if (full := self.all.come(self)) is not None:
            self.turn_away(full)

    def turn_away(self, why: ApiError) -> None:
        """Before it has said a word; who comes in a flood of such does not get the time to read why."""
        self.write_error(why)
        if self.all.lingering >= MOST_LINGERING:
            self.deaf = True
            self.transport.abort()
        else:
            self.all.lingering += 1
            self.lingers = True
            self.close_when_read()

    def send_away(self) -> None:
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.header_timer, self.reader_timer):
            if timer is not None:
                timer.cancel()
        self.all.leave(self)
        self.all.lingering -= self.lingers
        self.pipeline.clear()
        self.to_start = None
        if self.answering is not None and not self.answering.response_complete:
            self.answering.scope["state"]["left"] = True
            self.answering.disconnected = True
            self.answering.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self.answering, self.to_start = cycle, (cycle, app)
        if not self.in_feed:
            self.start()

    def start(self) -> None:
        """Whose turn it is, and who comes after those that are refused: in a loop, since a client may send hundreds.
        Nobody's, while what was answered before is not read.
        """
        while self.to_start is not None and not self.flow.write_paused:
            (cycle, app), self.to_start = self.to_start, None
            cycle.scope["state"]["whole"] = not cycle.more_body
            refused = type(self).at_once(cycle.scope)
            if refused is None:
                self.let_in.append((self, cycle, app))
                if len(self.let_in) == 1:
                    self.begin_first()
            else:
                self.in_feed = True
                self.send_refusal(cycle, *refused)
                self.in_feed = False

    def begin_first(self) -> None:
        """One in each turn of the loop; in between it reads what has arrived: of a burst, the refused are first."""
        connection, cycle, app = self.let_in[0]
        connection.start_task(cycle, app)
        self.loop.call_soon(self.next_turn)

    def next_turn(self) -> None:
        self.let_in.popleft()
        if self.let_in:
            self.begin_first()

    def start_task(self, cycle: Any, app: Any) -> None:
        if not self.flow.write_paused:
            self.stop_reader_timer()
        if cycle.scope["http_version"] == "1.0":  # knows no chunks: its answer ends with the connection
            cycle.chunked_encoding, cycle.expected_content_length = False, Endless()
        cycle.transport = Parting(self, cycle)
        super()._start_asgi_task(cycle, app)

    # ---- headers

    def expect_headers(self) -> None:
        if self.header_timer is None:
            self.header_timer = self.loop.call_later(self.header_timeout, self.headers_too_late)

    def headers_too_late(self) -> None:
        self.header_timer = None
        if self.busy:  # the beginning of a next request must not end the answer to this one
            self.expect_headers()
        else:
            self.transport.close()

    @property
    def busy(self) -> bool:
        return self.answering is not None and not self.answering.response_complete

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        self.all.works(self)
        if self.reading_body:
            self.body_bytes += len(data)
        else:
            self.expect_headers()
            self.header_bytes += len(data)
            data = without_upgrade(data)
        self.in_feed = True
        super().data_received(data)
        self.in_feed = False
        if not self.reading_body and self.header_bytes > MOST_HEADER_BYTES:
            self.refuse_headers()
        elif self.body_bytes > RAW_SHARE * self.max_body:
            self.refuse(413, "body_too_large", f"The body's chunks and trailers exceed {self.body_bytes:,} bytes.")
        else:
            self.start()

    def send_refusal(self, cycle: Any, status: int, headers: dict[str, str], body: bytes) -> None:
        """The answer of the guard's door, without a task of its own. The connection ends where a body is still to come:
        nobody will read it.
        """
        if self.transport.is_closing():
            return
        if cycle.more_body or not cycle.keep_alive:
            headers["connection"] = "close"
        headers["content-length"] = str(len(body))
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        told = b"" if cycle.scope["method"] == "HEAD" else body
        self.transport.write(STATUS_LINE[status] + lines.encode("latin-1", "replace") + b"\r\n" + told)
        cycle.response_started = cycle.response_complete = True
        if cycle.more_body or (self.deaf and "connection" in headers):
            self.close_when_read()
        elif "connection" in headers:
            self.transport.close()
        self.on_response_complete()

    def close_when_read(self) -> None:
        """A connection that is closed over unread bytes is reset, and the answer with it (RFC 9112, section 9.6)."""
        self.deaf = True
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def refuse_headers(self) -> None:
        self.refuse(431, "header_too_large", f"The headers are larger than {MOST_HEADER_BYTES:,} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not (self.reading_body or self.deaf):  # else a trailer, behind a body in chunks: nobody asked for it
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None
        if self.deaf:  # the rest of a piece
            return
        if len(self.pipeline) >= MOST_PIPELINED:  # those that came before are answered, and the last one says goodbye
            self.deaf, self.cycle.keep_alive = True, False
            return
        self.reading_body, self.body_bytes = True, 0
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MOST_HEADER_BYTES:
            self.refuse_headers()
            return
        if len(self.headers) > MOST_HEADERS:
            self.refuse(431, "header_too_large", f"There are more than {MOST_HEADERS} headers.")
            return
        if self.parser.should_upgrade() and self.parser.get_method() != b"GET":
            self.refuse(400, "invalid_http", "Nothing but HTTP/1.1 is spoken here: leave the Upgrade header out.")
            return
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self.reading_body, self.header_bytes = False, 0
        if self.cycle is not None and not self.deaf:  # else it was refused
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None and not self.deaf:
            super().on_body(body)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        self.refuse(400, "invalid_http", "This is no HTTP/1.1 request that can be understood.")

    def refuse(self, status: int, code: str, message: str) -> None:
        """An answer before there is a request: OpenAI's error object all the same, and the end of the connection."""
        if self.deaf or self.transport.is_closing():
            return
        self.deaf = True
        if self.busy and not self.answering.more_body:  # another request's answer is on its way: only that
            self.answering.keep_alive = False
            return
        self.write_error(ApiError(status, code, message))
        self.close_when_read()

    def write_error(self, error: ApiError) -> None:
        """As the last thing on this connection."""
        body = orjson.dumps(error.body)
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers |= error.all_headers | {"x-request-id": f"req-{secrets.token_hex(12)}"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[error.status] + lines.encode() + b"\r\n" + body)

    # ---- readers

    def pause_writing(self) -> None:
        super().pause_writing()
        self.start_reader_timer()

    def resume_writing(self) -> None:
        self.stop_reader_timer()
        super().resume_writing()
        self.start()

    def on_response_complete(self) -> None:
        """What is left to be sent may be too little for a pause; it must be read in time all the same."""
        self.start_reader_timer()
        super().on_response_complete()
        if not (self.busy or self.deaf or self.header_bytes or self.reading_body):
            self.all.rests(self)

    def start_reader_timer(self) -> None:
        if self.reader_timer is None and (unread := self.transport.get_write_buffer_size()):
            self.reader_timer = self.loop.call_later(self.send_timeout, self.reader_too_slow, unread)

    def stop_reader_timer(self) -> None:
        if self.reader_timer is not None:
            self.reader_timer.cancel()
            self.reader_timer = None

    def reader_too_slow(self, unread: int) -> None:
        """abort(), since close() would wait for what nobody reads to be sent. A long answer on a slow line may take
        longer, as long as it gets on: by what the kernel keeps, at least.
        """
        self.reader_timer = None
        if not (left := self.transport.get_write_buffer_size()):
            return
        if left <= unread - SEND_BUFFER:
            self.start_reader_timer()
            return
        if self.answering is not None:
            self.answering.scope["state"]["stalled"] = True
        self.transport.abort()


def without_upgrade(data: bytes) -> bytes:
    """The offer to go on in HTTP/2, which some clients make with every request (Java's, for one), under a name that
    means nothing: the parser would stop at it, and the body be lost.
    """
    if b"h2c" not in data:
        return data
    head, between, rest = data.partition(b"\r\n\r\n")
    return UPGRADE.sub(b"\r\nx-asked", head) + between + rest


class Parting:
    """The transport, for one answer: closed while its request's body is still coming, it waits until that is read."""

    def __init__(self, connection: Connection, cycle: Any) -> None:
        self.connection, self.cycle = connection, cycle

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection.transport, name)

    def close(self) -> None:
        if (self.cycle.more_body or self.connection.deaf) and not self.cycle.disconnected:
            self.connection.close_when_read()
        else:
            self.connection.transport.close()


class Endless:
    """A body's length that nothing exceeds and that is never used up."""

    def __lt__(self, _sent: int) -> bool:
        return False

    def __sub__(self, _sent: int) -> "Endless":
        return self

    def __ne__(self, _nothing: object) -> bool:
        return False


def connection_class(guard: Guard, all: Connections, header_timeout: float, send_timeout: float) -> Any:
    """What uvicorn takes as its http protocol."""
    limits = {
        "header_timeout": header_timeout, "send_timeout": send_timeout, "max_body": guard.max_body,
        "at_once": guard.at_once, "let_in": deque(), "all": all,
    }  # fmt: skip
    return type("LimitedConnection", (Connection,), limits)
