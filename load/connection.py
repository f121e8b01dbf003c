"""One connection of the golden server: takes requests, and writes each piece of an answer when it is its time."""

import asyncio
import json
import re
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from load.answers import Asked, Ending, Plan, error, reply
from load.script import MODEL

BURST = 256  # pieces in a write, before others get their turn
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CLOSING = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass
class Served:
    """What really became of a request. Moments are readings of time.perf_counter.

    arrival_s: its last byte was read. written_s, tokens: when each piece of text was handed to the socket, and what it
    holds. end_s: the answer's last byte was, or the connection ended. left: the client went away before that.
    """

    path: str
    arrival_s: float
    prompt_tokens: int
    status: int = 0
    written_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end_s: float | None = None
    left: bool = False


class House(Protocol):
    """What a connection asks of its server."""

    records: deque[Served]
    connections: set["Connection"]
    prompt_tokens: int
    new_tokens: int

    def plan(self, asked: Asked) -> Plan:
        """The answer to the next request."""

    def page(self, path: str) -> tuple[str, bytes, str] | None:
        """(status, body, content type) of what can be looked up."""


class Connection(asyncio.Protocol):
    """Takes one request after the other, and writes each answer's pieces when it is their time."""

    transport: asyncio.Transport

    def __init__(self, house: House) -> None:
        self.house = house
        self.buffer = b""
        self.read_s = 0.0
        self.plan: Plan | None = None  # of the answer that is being written
        self.step = 0
        self.record: Served | None = None
        self.timer: asyncio.Handle | None = None
        self.paused = False
        self.last = False  # the client wants no further answer

    # ---- what asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.house.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self.read_s = time.perf_counter()
        self.buffer += data
        self.take()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.plan is not None and self.timer is None and self.step < len(self.plan.steps):
            self.write_due()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.house.connections.discard(self)
        if self.timer is not None:
            self.timer.cancel()
        if self.record is not None and self.record.end_s is None:
            self.record.end_s, self.record.left = time.perf_counter(), True

    # ---- a request

    def take(self) -> None:
        """The next request in the buffer, once it is whole and its turn has come."""
        if self.plan is not None:
            return
        opening, found, rest = self.buffer.partition(b"\r\n\r\n")
        if self.buffer and not self.buffer[:1].isupper():  # no method of HTTP; the hello of TLS begins with byte 22
            self.refuse("400 Bad Request", "This port speaks HTTP.")
            return
        length = LENGTH.search(opening)
        size = int(length[1]) if length else 0
        if not found or len(rest) < size:
            return
        body, self.buffer = rest[:size], rest[size:]
        self.last = CLOSING.search(opening) is not None
        method, path = opening.split(b" ", 2)[:2]
        self.answer(method.decode(), path.partition(b"?")[0].decode("latin-1"), body)

    def answer(self, method: str, path: str, body: bytes) -> None:
        if method == "POST" and path in (CHAT, COMPLETIONS):
            try:
                asked = asked_of(path, json.loads(body))
            except (ValueError, TypeError, KeyError, AttributeError):
                self.refuse("400 Bad Request", "The body is no request of OpenAI's.")
                return
            self.begin(path, asked)
            return
        page = self.house.page(path) if method == "GET" else None
        if page is None:
            self.refuse("404 Not Found", f"{method} {path} is not known here.")
            return
        status, found, kind = page
        self.transport.write(reply(status, found, kind=kind))
        self.next()

    def refuse(self, status: str, message: str) -> None:
        self.transport.write(reply(status, error(message, "invalid_request"), "Connection: close\r\n"))
        self.transport.close()

    # ---- an answer

    def begin(self, path: str, asked: Asked) -> None:
        self.plan, self.step = self.house.plan(asked), 0
        self.record = Served(path, self.read_s, asked.prompt_tokens, self.plan.status)
        self.house.records.append(self.record)
        self.house.prompt_tokens += asked.prompt_tokens
        self.write_due()

    def write_due(self) -> None:
        """What is due by now, in one write; then a timer for what comes next."""
        self.timer = None
        if self.paused or self.transport.is_closing():
            return
        now_s = time.perf_counter()
        self.transport.write(b"".join(self.due(now_s)))
        if self.step == len(self.plan.steps):
            self.finish()
        elif not self.paused:
            loop = asyncio.get_running_loop()
            wait_s = self.record.arrival_s + self.plan.steps[self.step].at_s - time.perf_counter()
            self.timer = loop.call_at(loop.time() + wait_s, self.write_due)

    def due(self, now_s: float) -> Iterator[bytes]:
        for at_s, data, tokens in self.plan.steps[self.step : self.step + BURST]:
            if self.record.arrival_s + at_s > now_s:
                return
            self.step += 1
            if tokens:
                self.record.written_s.append(now_s)
                self.record.tokens.append(tokens)
                self.house.new_tokens += tokens
            yield data

    def finish(self) -> None:
        ending = self.plan.ending
        if ending is Ending.HANG:
            return
        self.record.end_s = time.perf_counter()
        if ending is Ending.NEXT:
            self.next()
        elif ending is Ending.CLOSE:
            self.transport.close()
        else:
            linger = struct.pack("ii", 1, 0)  # no time to linger: the peer gets a reset
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()

    def next(self) -> None:
        self.plan = None
        if self.last:
            self.transport.close()
        elif self.buffer:
            self.read_s = time.perf_counter()
            asyncio.get_running_loop().call_soon(self.take)


def asked_of(path: str, body: dict[str, Any]) -> Asked:
    """A word of the prompt is a token; so is each of the numbers, where it is given as tokens."""
    chat = path == CHAT
    prompt = [message.get("content") or "" for message in body["messages"]] if chat else body["prompt"]
    words = [prompt] if isinstance(prompt, str) else prompt
    size = sum(len(word.split()) if isinstance(word, str) else 1 for word in words)
    new = body.get("max_completion_tokens") or body.get("max_tokens") or 16
    stream = body.get("stream") is True
    usage = not stream or (body.get("stream_options") or {}).get("include_usage") is True
    return Asked(chat, stream, usage, str(body.get("model", MODEL)), size, int(new))
