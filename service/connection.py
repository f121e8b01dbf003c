"""The limits of a connection that uvicorn lacks: on headers, on their time, and on readers that do not read.

Its own only limit is on idle connections. A client that sends its headers letter by letter, or stops reading in the
middle of a stream, would hold a connection for ever (encode/uvicorn#157, and the fault matrix in tests/).
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import ApiError
from service.guard import Guard

MOST_HEADER_BYTES = 32 << 10
MOST_HEADERS = 100
SEND_BUFFER = 64 << 10  # bytes that the kernel keeps for a slow reader: small, so that it is seen soon
REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class Connection(HttpToolsProtocol):
    """header_timeout, send_timeout: seconds. at_once: the guard's. Made by connection_class(), which names them."""

    header_timeout: float
    send_timeout: float
    at_once: Callable[[dict], tuple[int, dict[str, str], bytes] | None]

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.reading_body = False
        self.header_bytes = 0
        self.reader_timer: asyncio.TimerHandle | None = None
        self.header_timer: asyncio.TimerHandle | None = None
        self.to_start: tuple[Any, Any] | None = None  # the cycle whose turn it is, and the application
        self.in_feed = False  # the parser is at work: whether a body follows is not known yet
        self.answering: Any = None  # the cycle that runs; self.cycle is the latest one, which may wait behind it
        self.expect_headers()
        transport.set_write_buffer_limits(high=SEND_BUFFER)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.header_timer, self.reader_timer):
            if timer is not None:
                timer.cancel()
        self.pipeline.clear()
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
        """Whose turn it is, and who comes after those that are refused: in a loop, since a client may send hundreds."""
        while self.to_start is not None:
            (cycle, app), self.to_start = self.to_start, None
            cycle.scope["state"]["whole"] = not cycle.more_body
            refused = type(self).at_once(cycle.scope)
            if refused is None:
                self.start_task(cycle, app)
            else:
                self.in_feed = True
                self.send_refusal(cycle, *refused)
                self.in_feed = False

    def start_task(self, cycle: Any, app: Any) -> None:
        if not self.flow.write_paused:
            self.stop_reader_timer()
        if cycle.scope["http_version"] == "1.0":  # knows no chunks: its answer ends with the connection
            cycle.chunked_encoding, cycle.expected_content_length = False, Endless()
        super()._start_asgi_task(cycle, app)

    # ---- headers

    def expect_headers(self) -> None:
        if self.header_timer is None:
            self.header_timer = self.loop.call_later(self.header_timeout, self.headers_too_late)

    def headers_too_late(self) -> None:
        self.header_timer = None
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if not self.reading_body:
            self.expect_headers()
            self.header_bytes += len(data)
            if self.header_bytes > MOST_HEADER_BYTES and self.headers_left_open(data):
                return
        self.in_feed = True
        super().data_received(data)
        self.in_feed = False
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
        self.transport.write(STATUS_LINE[status] + lines.encode("latin-1", "replace") + b"\r\n" + body)
        cycle.response_started = cycle.response_complete = True
        if "connection" in headers:
            self.transport.close()
        self.on_response_complete()

    def headers_left_open(self, data: bytes) -> bool:
        """Whether so many bytes are headers only: a request may come whole, with its body, in one piece."""
        if b"\r\n\r\n" in data[:MOST_HEADER_BYTES]:
            return False
        self.refuse(431, "header_too_large", f"The headers are larger than {MOST_HEADER_BYTES:,} bytes.")
        return True

    def on_headers_complete(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None
        self.reading_body = True
        if len(self.headers) > MOST_HEADERS:
            self.refuse(431, "header_too_large", f"There are more than {MOST_HEADERS} headers.")
            return
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self.reading_body, self.header_bytes = False, 0
        if self.cycle is not None:  # else it was refused
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None:
            super().on_body(body)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        self.refuse(400, "invalid_http", "This is no HTTP/1.1 request that can be understood.")

    def refuse(self, status: int, code: str, message: str) -> None:
        """An answer before there is a request: OpenAI's error object all the same, and the end of the connection."""
        if self.transport.is_closing():
            return
        body = orjson.dumps(ApiError(status, code, message).body)
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, REASONS[status], len(body)) + body)
        self.transport.close()

    # ---- readers

    def pause_writing(self) -> None:
        super().pause_writing()
        self.start_reader_timer()

    def resume_writing(self) -> None:
        self.stop_reader_timer()
        super().resume_writing()

    def on_response_complete(self) -> None:
        """What is left to be sent may be too little for a pause; it must be read in time all the same."""
        self.start_reader_timer()
        super().on_response_complete()

    def start_reader_timer(self) -> None:
        if self.reader_timer is None and self.transport.get_write_buffer_size():
            self.reader_timer = self.loop.call_later(self.send_timeout, self.reader_too_slow)

    def stop_reader_timer(self) -> None:
        if self.reader_timer is not None:
            self.reader_timer.cancel()
            self.reader_timer = None

    def reader_too_slow(self) -> None:
        """abort(), since close() would wait for what nobody reads to be sent."""
        self.reader_timer = None
        if not self.transport.get_write_buffer_size():
            return
        if self.answering is not None:
            self.answering.scope["state"]["stalled"] = True
        self.transport.abort()


class Endless:
    """A body's length that nothing exceeds and that is never used up."""

    def __lt__(self, _sent: int) -> bool:
        return False

    def __sub__(self, _sent: int) -> "Endless":
        return self

    def __ne__(self, _nothing: object) -> bool:
        return False


def connection_class(guard: Guard, header_timeout: float, send_timeout: float) -> Any:
    """What uvicorn takes as its http protocol."""
    limits = {"header_timeout": header_timeout, "send_timeout": send_timeout, "at_once": guard.at_once}
    return type("LimitedConnection", (Connection,), limits)
