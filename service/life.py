"""The life of one request: when each thing happened, how it ended, and the parts that its time adds up to."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from engine.request import Request, Timeline


class Tracing(Protocol):
    """What tells others of every life as it goes by (tracing.py, where that is wanted)."""

    def begin(self, life: "Life", headers: Mapping[str, str]) -> None: ...

    def end(self, life: "Life", parts: Mapping[str, float]) -> None: ...

    def stop(self) -> None: ...


@dataclass(eq=False)
class Life:
    """clock: the engine's, so that both speak of the same moments.

    parts: seconds of what the service does itself. outcome: how it is counted. facts: for the log line.
    """

    clock: Callable[[], float]
    id: str
    start_s: float = 0.0
    opened_s: float = 0.0  # when its body was there
    ended_s: float | None = None  # when its answer was complete, where its books are closed later than that
    parsed_s: float | None = None  # when it was understood: from there on it wants to be admitted
    admitted_s: float = 0.0
    at_door: bool = False  # a place is kept for it until it asks for a ticket
    endpoint: str = "other"
    parts: dict[str, float] = field(default_factory=dict)
    blocked_s: float = 0.0  # waiting for the reader
    outcome: str = "ok"
    error_code: str | None = None
    status: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)  # the engine's, one for each answer
    span: Any = None  # what tracing.py keeps with it, where that is wanted

    @contextlib.contextmanager
    def part(self, name: str, since_s: float | None = None) -> Iterator[None]:
        """A part with clock readings of its own, at its beginning (or before, at since_s) and at its end."""
        begin = self.clock() if since_s is None else since_s
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + self.clock() - begin

    def routed(self) -> None:
        """The route's own code begins: the way there from the guard, which set opened_s, is a part too."""
        self.parts["route"] = self.clock() - self.opened_s

    def failed(self, outcome: str, code: str) -> None:
        self.outcome, self.error_code = outcome, code

    @property
    def last(self) -> Request | None:
        """Of several answers the one that ended last: its times and the service's make up the whole."""
        return max(self.requests, key=lambda one: one.timeline.finished or float("inf"), default=None)

    def split(self) -> dict[str, float]:
        """Seconds of each part until now, and of the whole ("total"), which has clock readings of its own.

        receive, route, parse, admit, tokenize: the service. queue: waiting for the first step. prefill and decode: in
        steps, up to the first token and after it. between: in the engine, but between two steps. deliver: from the last
        token until now. What the total has more than the parts is unexplained; it is told too.
        """
        now = self.clock() if self.ended_s is None else self.ended_s
        found = dict(self.parts)
        if self.last is not None:
            found |= engine_parts(self.last.timeline, now)
        total = now - self.start_s
        return found | {"unexplained": total - sum(found.values()), "total": total}


def engine_parts(line: Timeline, now: float) -> dict[str, float]:
    end = now if line.finished is None else line.finished
    if line.admitted is None:
        return {"queue": end - line.arrived, "deliver": now - end}
    steps = line.slices
    first = line.tokens[0] if line.tokens else end
    edges = [(line.admitted, line.admitted), *((start, stop) for start, stop, *_ in steps)]
    return {
        "queue": line.admitted - line.arrived,
        "prefill": sum(stop - start for start, stop, *_ in steps if stop <= first),
        "decode": sum(stop - start for start, stop, *_ in steps if stop > first),
        "between": sum(start - before for (_, before), (start, _) in pairwise(edges)) + max(end - edges[-1][1], 0.0),
        "deliver": now - end,
    }


def server_timing(parts: Mapping[str, float]) -> str:
    """The header of that name: milliseconds. https://www.w3.org/TR/server-timing/"""
    return ", ".join(f"{name};dur={seconds * 1e3:.3f}" for name, seconds in parts.items())
