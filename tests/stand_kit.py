"""A stand-in for a server: what conformance's probes are tried on. It gives the same bytes to whoever asks."""

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterable

from conformance.target import Target

Said = bytes | Iterable[bytes] | None  # at once, or piece by piece


class Stand:
    """A server that gives every request the same bytes. None: it says nothing. At most `most` connections, if given."""

    def __init__(self, answer: Said | Callable[[bytes], Said], most: int | None = None) -> None:
        self.answer, self.most, self.open = answer, most, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while self.most is None or self.most > 0:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.most = None if self.most is None else self.most - 1
            self.open.append(connection)
            threading.Thread(target=self.one, args=(connection,), daemon=True).start()
        self.socket.close()

    def one(self, connection: socket.socket) -> None:
        raw = b""
        try:
            while b"\r\n\r\n" not in raw and (piece := connection.recv(1 << 20)):
                raw += piece
            length = re.search(rb"(?i)content-length: (\d+)", raw)
            wanted = raw.find(b"\r\n\r\n") + 4 + int(length[1] if length else 0)
            while len(raw) < min(wanted, 1 << 24) and (piece := connection.recv(1 << 20)):
                raw += piece
            if (found := self.answer(raw) if callable(self.answer) else self.answer) is not None:
                for piece in [found] if isinstance(found, bytes) else found:
                    connection.sendall(piece)
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def target(self) -> Target:
        found = Target("stand-in", self.socket.getsockname(), "it", greedy="yes", context=40)
        found.slow = 0.02  # of a patience of 20 s
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may have closed by itself
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes who waits for a connection
        self.thread.join(10)
        self.socket.close()
        for connection in self.open:
            connection.close()


def http(status: int, body: bytes, *headers: str) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status} x", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""])
    return head.encode() + body


SAYS_YES = http(200, b'{"choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": 3}}')
REFUSES = http(400, b'{"error": {"message": "no"}}')
FAILS = http(500, b"Internal Server Error")
KNOWS_ITSELF = http(200, b'{"data": [{"id": "it"}], "choices": [{"message": {"content": "yes"}}]}')
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def strict(raw: bytes) -> bytes:
    """It refuses whatever is not the plain request after which a server is called well."""
    return REFUSES if b"POST" in raw and b"capital" not in raw else KNOWS_ITSELF
