"""One run of one load on a server: warmed up, driven, and turned into the plain numbers that a record holds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lab import arrivals
from lab.client import Body, Client
from load import drive, measures, server, tables
from load.drive import Ran
from load.live import Live
from load.plan import Cell

Run = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """The server that is measured, and how it is asked. bodies(shape, number): so many requests of a shape, each a
    body or a conversation of several.
    """

    url: str
    path: str
    headers: dict[str, str]
    bodies: Callable[[Any, int], Sequence[Body | drive.Talk]]
    timeout_s: float
    retries: int
    seed: int
    seconds: float | None = None
    limits: dict[str, float] | None = None
    count: Callable[[str], int] | None = None

    def client(self) -> Client:
        return Client(self.url + self.path, self.headers, self.timeout_s, retries=self.retries)


def warm_up(target: Target, cell: Cell) -> None:
    """As many requests at once as will be, of the same shape, and nothing is kept of them. KeyboardInterrupt."""
    clients = cell.clients or 2
    shape = cell.recorded[0] if cell.recorded else cell
    if drive.closed(target.client(), target.bodies(shape, clients), clients).interrupted:
        raise KeyboardInterrupt


def run(target: Target, cell: Cell) -> Run:
    """The cell once. A run that was ended early is whole as far as it goes."""
    live = Live(cell.label, None if target.seconds else cell.requests)
    try:
        with server.Watched(target.url, target.headers) as seen:
            ran = driven(target, cell, live)
    except BaseException:
        live.close()
        raise
    requests = measures.measured(sorted(ran.traces, key=lambda one: one.due_s), ran.start_s, target.count)
    samples = [(moment - ran.start_s, flying) for moment, flying in ran.samples]
    window = measures.steady(requests, cell.clients)
    during = [one | {"at": one["at"] + seen.start_s - ran.start_s} for one in seen.during]
    both = seen.before and seen.after and "new_tokens" in seen.before
    grown = seen.after["new_tokens"] - seen.before["new_tokens"] if both else None
    laws = {"little": measures.little(requests, samples, window, during), "tokens": measures.tokens(requests, grown)}
    found = {
        "load": cell.load, "requests": requests, "window": window, "ended": ran.why,
        "figures": measures.figures(requests, window, target.limits) | {"requested_rate": cell.rate},
        "laws": laws, "client": {"cpu_s": ran.cpu_s, "wall_s": ran.end_s - ran.start_s},
        "server": seen.used, "metrics": {"before": seen.before, "during": during, "after": seen.after},
    }  # fmt: skip
    found["figures"]["mean_in_flight"] = found["laws"]["little"]["in_flight"]
    live.close(tables.line(found))
    return found


def driven(target: Target, cell: Cell, see: Callable[[drive.Drive], object]) -> Ran:
    if cell.clients:
        bodies = endless(target, cell) if target.seconds else target.bodies(cell, cell.requests)
        return drive.closed(target.client(), bodies, cell.clients, target.seconds, see=see)
    dues = dues_of(target, cell)
    lone = [target.bodies(one, 1)[0] for one in cell.recorded or ()]
    rising = cell.rate is None  # a ramp, or a recorded load, which may have one in it
    return drive.opened(target.client(), lone or target.bodies(cell, len(dues)), dues, rising=rising, see=see)


def dues_of(target: Target, cell: Cell) -> list[float]:
    if cell.recorded:
        return [one.at_s for one in cell.recorded]
    if cell.ramp:
        return arrivals.ramp(*cell.ramp, target.seed, kind=cell.arrival)
    if target.seconds:
        within = takewhile(lambda due: due < target.seconds, arrivals.moments(cell.arrival, cell.rate, target.seed))
        return list(within)
    return arrivals.schedule(cell.arrival, cell.requests, cell.rate, target.seed)


def endless(target: Target, cell: Cell) -> Iterator[Body | drive.Talk]:
    while True:
        yield from target.bodies(cell, cell.requests)
