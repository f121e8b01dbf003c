"""A client of any OpenAI-compatible service, as light as can be: on the same machine it takes what the server lacks.

While requests run, only bytes and times are kept; what they mean is read when all is over.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import aiohttp

Body = dict[str, Any]


@dataclass
class Trace:
    """One request as its sender saw it. Times are readings of time.perf_counter.

    due_s: when it was to be sent; sent_s: when it was; end_s: when its last byte had come. pieces: (time, bytes) as
    they arrived. status: 0 where no answer came, with error saying why.
    """

    due_s: float
    sent_s: float = 0.0
    end_s: float = 0.0
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None

    @cached_property
    def events(self) -> list[tuple[float, Body]]:
        """(when it was complete, its data) of every event; for an answer in one piece, that answer."""
        found, rest = [], b""
        for moment, piece in self.pieces:
            *whole, rest = (rest + piece).split(b"\n\n")
            found += [(moment, json.loads(one[6:])) for one in whole if one[:6] == b"data: " and one[6:] != b"[DONE]"]
        return found + ([(self.end_s, json.loads(rest))] if rest.startswith(b"{") else [])

    @property
    def content(self) -> list[tuple[float, str]]:
        """(when, what) of every piece of text."""
        found = []
        for moment, data in self.events:
            for choice in data.get("choices", []):
                text = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content")
                found += [(moment, text)] if text else []
        return found

    @property
    def complete(self) -> bool:
        """Whether the answer came to its end. A stream says so in its last event."""
        raw = b"".join(piece for _, piece in self.pieces)
        return self.status == 200 and self.error is None and (raw[:1] == b"{" or raw.endswith(b"data: [DONE]\n\n"))

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


async def ask(session: aiohttp.ClientSession, url: str, body: Body, due_s: float | None = None) -> Trace:
    """One request to its end, whatever that is."""
    trace = Trace(time.perf_counter() if due_s is None else due_s)
    trace.sent_s = time.perf_counter()
    try:
        async with session.post(url, json=body) as answer:
            trace.status = answer.status
            while piece := await answer.content.readany():
                trace.pieces.append((time.perf_counter(), piece))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        trace.error = f"{type(error).__name__}: {error}"
    trace.end_s = time.perf_counter()
    return trace


def session(seconds: float = 600.0) -> aiohttp.ClientSession:
    """For as many connections as there are requests."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(seconds))


def closed_loop(url: str, bodies: Sequence[Body], clients: int) -> list[Trace]:
    """So many clients, each sending the next request when its last one is answered; in the order of the bodies."""

    async def run() -> list[Trace]:
        left, traces = iter(enumerate(bodies)), {}

        async def client() -> None:
            for i, body in left:
                traces[i] = await ask(one, url, body)

        async with session() as one:
            await asyncio.gather(*(client() for _ in range(clients)))
        return [traces[i] for i in sorted(traces)]

    return asyncio.run(run())


def open_loop(url: str, bodies: Sequence[Body], arrivals_s: Sequence[float]) -> list[Trace]:
    """Each at its own time after the start, whatever has become of the others."""

    async def run() -> list[Trace]:
        start_s = time.perf_counter()

        async def client(body: Body, arrival_s: float) -> Trace:
            due_s = start_s + arrival_s
            await asyncio.sleep(max(due_s - time.perf_counter(), 0))
            return await ask(one, url, body, due_s)

        async with session() as one:
            return await asyncio.gather(*map(client, bodies, arrivals_s))

    return asyncio.run(run())
