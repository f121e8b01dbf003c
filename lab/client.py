"""A client of any OpenAI-compatible service, as light as can be: on the same machine it takes what the server lacks.

While requests run, only bytes and times are kept; what they mean is read when all is over.
"""

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any

import orjson

from lab.wire import Broken, Place, Wire, connected

Body = dict[str, Any]
RETRIED = (408, 409, 429)  # and everything from 500 on: what OpenAI's clients send again
SOONEST_S, LATEST_S = 0.5, 8.0  # of their own between two attempts
TEXTS = ("content", "text", "reasoning_content", "reasoning")  # a token that is thought out is computed like any other
LONGEST_WISH_S = 120.0  # of the server's: a longer one means not to come again
BUDGET, BUDGET_FLOOR = 0.1, 10  # retries may be a tenth of all requests, and ten


@dataclass
class Trace:
    """One request as its sender saw it. Times are readings of time.perf_counter.

    due_s: when it was to be sent; sent_s: when it was, the last time; end_s: when its last byte had come. pieces:
    (time, bytes) as they arrived. status: 0 where no answer came, with error saying why. attempts: how often it was
    sent. headers: of the answer, names in small letters.
    """

    due_s: float
    sent_s: float = 0.0
    end_s: float = 0.0
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None
    attempts: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def events(self) -> list[tuple[float, Body]]:
        """(when it was complete, its data) of every event; for an answer in one piece, that answer. ValueError."""
        found, rest = [], b""
        for moment, piece in self.pieces:
            *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
            found += [(moment, data) for one in whole if (data := data_of(one)) is not None]
        return found + ([(self.end_s, json.loads(rest))] if rest.lstrip().startswith(b"{") else [])

    @property
    def streamed(self) -> bool:
        return not b"".join(piece for _, piece in self.pieces[:1]).lstrip().startswith(b"{")

    @property
    def content(self) -> list[tuple[float, str]]:
        """(when, what) of every piece of text."""
        found = []
        for moment, data in self.events:
            for choice in data.get("choices") or ():
                said = choice.get("delta") or choice.get("message") or choice
                text = next((said[name] for name in TEXTS if said.get(name)), None)
                found += [(moment, text)] if text else []
        return found

    @property
    def complete(self) -> bool:
        """Whether the answer came to its end. A stream says so in its last event."""
        raw = b"".join(piece for _, piece in self.pieces).rstrip()
        return self.status == 200 and self.error is None and (not self.streamed or raw.endswith(b"data: [DONE]"))

    @property
    def usage(self) -> Body | None:
        return next((data["usage"] for _, data in reversed(self.events) if data.get("usage")), None)

    @property
    def ttft_s(self) -> float | None:
        """From due to the first text: a chunk that names the role only is no token."""
        return self.content[0][0] - self.due_s if self.content else None

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.due_s

    def wish_s(self) -> float | None:
        """When the server wants it to come again: in seconds, milliseconds or as a date; None: nothing of use."""
        for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
            with suppress(KeyError, ValueError):
                wish_s = float(self.headers[name]) * unit
                return wish_s if wish_s >= 0 else None
        with suppress(KeyError, ValueError):
            return max(parsedate_to_datetime(self.headers["retry-after"]).timestamp() - time.time(), 0.0)
        return None

    def again_after_s(self) -> float | None:
        """When the server, or failing that OpenAI's clients, would have it sent again: seconds; None: never."""
        if self.headers.get("x-should-retry") == "false" or self.error == INTERRUPTED:
            return None
        wanted = self.headers.get("x-should-retry") == "true"
        if not (wanted or self.error or self.status in RETRIED or self.status >= 500):
            return None
        wish_s = self.wish_s()
        if wish_s is not None:
            return wish_s if wish_s <= LONGEST_WISH_S else None
        return min(SOONEST_S * 2 ** (self.attempts - 1), LATEST_S) * random.uniform(0.75, 1.0)


INTERRUPTED = "interrupted"


def data_of(event: bytes) -> Body | None:
    """What an event carries; None for comments and for the word that ends a stream. ValueError: no JSON object."""
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    raw = b"\n".join(lines)
    if not raw or raw == b"[DONE]":
        return None
    found = json.loads(raw)
    if not isinstance(found, dict):
        raise ValueError("an event that is no JSON object")
    return found


class Client:
    """Sends requests to one address, on connections that it keeps. Used as `async with client:`.

    timeout_s: for a whole answer. retries: how often a refused or failed request is sent again, within a budget.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str] | None = None, timeout_s: float = 600.0, retries: int = 0
    ) -> None:
        self.place = Place.of(url, headers or {})
        self.timeout_s, self.retries = timeout_s, retries
        self.idle: list[Wire] = []
        self.asked = self.repeated = 0

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        for wire in self.idle:
            wire.transport.close()
        await asyncio.sleep(0)  # the loop closes their sockets in its next turn, if there is one

    async def ask(self, body: Body, due_s: float | None = None) -> Trace:
        """One request to its end, whatever that is."""
        trace = Trace(time.perf_counter() if due_s is None else due_s)
        self.asked += 1
        while True:
            await self.attempt(trace, body)
            wait_s = trace.again_after_s() if trace.attempts <= self.retries else None
            if wait_s is None or self.repeated >= BUDGET * self.asked + BUDGET_FLOOR:
                return trace
            self.repeated += 1
            await asyncio.sleep(wait_s)
            trace = Trace(trace.due_s, attempts=trace.attempts + 1)

    async def attempt(self, trace: Trace, body: Body) -> None:
        raw = self.place.request(orjson.dumps(body))
        wire: Wire | None = None
        trace.sent_s = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout_s):
                wire = self.kept()
                try:
                    if wire is not None:
                        await wire.ask(raw, trace)
                except Broken:
                    if trace.status:
                        raise
                    wire = None  # the server had closed a connection that was idle; or did it read the request before?
                    trace.attempts += 1
                if wire is None:
                    wire = await connected(self.place)
                    await wire.ask(raw, trace)
        except TimeoutError:
            trace.error = f"timeout: no whole answer within {self.timeout_s:g} s"
        except Broken as error:
            trace.error = str(error)
        except OSError as error:
            trace.error = f"connect: {error}"
        except asyncio.CancelledError:
            trace.error = INTERRUPTED
        trace.end_s = time.perf_counter() if trace.error or wire is None else wire.now_s
        if wire is not None and trace.error:
            wire.transport.abort()
        elif wire is not None:
            self.idle.append(wire)

    async def open(self, count: int) -> None:
        """Connections for the first requests, so that none waits for one. Whether anybody is there shows later."""
        wires = await asyncio.gather(*(connected(self.place) for _ in range(count)), return_exceptions=True)
        self.idle += [wire for wire in wires if isinstance(wire, Wire)]

    def kept(self) -> Wire | None:
        """An idle connection that still stands, the last one used first."""
        while self.idle:
            if not (wire := self.idle.pop()).lost:
                return wire
        return None


def closed_loop(url: str, bodies: Sequence[Body], clients: int) -> list[Trace]:
    """So many clients, each sending the next request when its last one is answered; in the order of the bodies."""

    async def run() -> list[Trace]:
        left, traces = iter(enumerate(bodies)), {}

        async def one(client: Client) -> None:
            for i, body in left:
                traces[i] = await client.ask(body)

        async with Client(url) as client:
            await asyncio.gather(*(one(client) for _ in range(clients)))
        return [traces[i] for i in sorted(traces)]

    return asyncio.run(run())


def open_loop(url: str, bodies: Sequence[Body], arrivals_s: Sequence[float]) -> list[Trace]:
    """Each at its own time after the start, whatever has become of the others."""

    async def run() -> list[Trace]:
        start_s = time.perf_counter()

        async def one(client: Client, body: Body, arrival_s: float) -> Trace:
            due_s = start_s + arrival_s
            await asyncio.sleep(max(due_s - time.perf_counter(), 0))
            return await client.ask(body, due_s)

        async with Client(url) as client:
            return await asyncio.gather(*(one(client, *pair) for pair in zip(bodies, arrivals_s, strict=True)))

    return asyncio.run(run())
