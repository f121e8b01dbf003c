"""The circuit breaker on a running service whose engine fails on demand: when it opens, whom it lets through, when.

Real requests over sockets, a real engine on a model of next to nothing, faults put between the two.
"""

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import StringIO
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from benchmarks.claim import Claim, rounds
from benchmarks.serve_cost import running
from config import PromptConfig
from engine.engine import Engine
from lab import client
from lab.console import progress
from metrics import certified, ms, percentile
from serve import model_of
from service.assembly import assembled, on_passing_thread
from service.breaker import Breaker, State
from service.house import House
from service.settings import ServeConfig
from weights import tiny

TWICE = 2.0  # as long as before it stays open when a probe fails
CROWD, REFUSED, AFTER = 24, 100, 20  # requests as it half-opens, while it is open, and when it is closed again
LATE_S = 0.5  # the event loop's and the client's; an answer says its time in whole seconds
NEW = 4
HELD_S = 2.0  # in which CROWD requests are decided on; they take some 20 ms


class Faulty:
    """The engine's runner. broken: every request that is due a token fails instead. gate: closed, no step begins."""

    def __init__(self) -> None:
        self.inner: Any = None
        self.broken = False
        self.gate = threading.Event()
        self.gate.set()
        self.seen: set[int] = set()  # requests that were computed

    def run(self, slices: Sequence[Any]) -> list[Any]:
        self.seen |= {part.request.number for part in slices}
        if self.broken:
            return [RuntimeError("made to fail") if part.last else None for part in slices]
        return self.inner.run(slices)

    def forget(self, request: Any) -> None:
        self.inner.forget(request)


@dataclass
class Service:
    """A running one, its faults, and requests for it that are all different: equal ones would be quarantined."""

    house: House
    faulty: Faulty
    url: str
    numbers: Iterator[int] = field(default_factory=count)

    @property
    def breaker(self) -> Breaker:
        return self.house.serving.relief.engine

    def ask(self, requests: int, clients: int = 1) -> list[client.Trace]:
        bodies = [
            {"model": self.house.name, "prompt": f"{next(self.numbers)} of many", "max_tokens": NEW,
             "temperature": 0, "ignore_eos": True}
            for _ in range(requests)
        ]  # fmt: skip
        return client.closed_loop(self.url + "/v1/completions", bodies, clients)

    def until_open(self, most: int) -> list[client.Trace]:
        """One after the other, until one is refused because the circuit is open."""
        found = []
        while len(found) < most:
            found += self.ask(1)
            if code(found[-1]) == "circuit_open":
                break
        return found


@contextmanager
def served(folder: Path) -> Iterator[Service]:
    faulty = Faulty()
    settings = ServeConfig(model=str(tiny.checkpoint(folder, 256)), port=0, threads=1, kv_memory=0.02)

    def made() -> House:
        model = model_of(settings)
        return assembled(settings, replace(model, engine=lambda: with_faults(model.engine(), faulty)), log=StringIO())

    house = on_passing_thread(made)
    with running(house) as (url, _):
        yield Service(house, faulty, url)
        faulty.gate.set()


def with_faults(engine: Engine, faulty: Faulty) -> Engine:
    faulty.inner, engine.runner, step = engine.runner, faulty, engine.step

    def step_when_let() -> bool:
        faulty.gate.wait()  # before the step's own clock starts: a probe that is held is no slow one
        return step()

    engine.step = step_when_let
    return engine


def code(trace: client.Trace) -> str | None:
    """The error's, of an answer that is one."""
    if trace.status in (0, 200):
        return None
    return orjson.loads(b"".join(piece for _, piece in trace.pieces))["error"]["code"]


# ---- one failure from its beginning to its end


@dataclass(frozen=True)
class Episode:
    """failed: calls that failed until it opened. window: calls that it judges by. reached: of those sent while it was
    open. wishes_s: what they were told to wait, less what it was until then. refusals_s: how soon they were told.
    probes: of CROWD that came as it half-opened, those let through. healed: of AFTER, those served when it was closed.
    """

    failed: int
    window: int
    reached: int
    wishes_s: list[float]
    refusals_s: list[float]
    probes: int
    state: str
    healed: int


def episode(service: Service, good: int) -> Episode:
    """So many good calls, then an engine that fails in every one, until it is well again and a probe has seen that."""
    breaker, faulty = service.breaker, service.faulty
    breaker.force(None)  # nothing is known of earlier calls
    service.ask(good, clients=8)
    faulty.broken = True
    calls = service.until_open(most=2 * breaker.rules.window)
    until_s, before = breaker.until_s, set(faulty.seen)
    refused = service.ask(REFUSED, clients=4)
    reached = len(faulty.seen - before)
    wishes = [trace.wish_s() - (until_s - trace.end_s) for trace in refused if trace.wish_s() is not None]
    faulty.broken = False
    wait_until(until_s)
    probes = crowd(service)
    healed = service.ask(AFTER, clients=4)
    return Episode(
        sum(trace.status == 500 for trace in calls), breaker.rules.window, reached, wishes,
        [trace.e2e_s for trace in refused], sum(trace.complete for trace in probes), str(breaker.state),
        sum(trace.complete for trace in healed),
    )  # fmt: skip


def crowd(service: Service) -> list[client.Trace]:
    """CROWD at once, while the engine is held: no probe has ended before all who came with it have been decided on."""
    service.faulty.gate.clear()
    letting = threading.Timer(HELD_S, service.faulty.gate.set)
    letting.start()
    found = service.ask(CROWD, clients=CROWD)
    letting.join()
    return found


def wait_until(moment_s: float) -> None:
    time.sleep(max(moment_s - time.perf_counter(), 0.0) + 0.05)


def reopened(service: Service) -> tuple[float, float]:
    """Seconds that it stays open: the first time, and after a probe that failed."""
    breaker, faulty = service.breaker, service.faulty
    breaker.force(None)
    faulty.broken = True
    service.until_open(most=2 * breaker.rules.window)
    first_s = breaker.open_s
    wait_until(breaker.until_s)
    service.ask(1)  # a probe, which fails
    asked_s = time.perf_counter()
    again_s = breaker.until_s - asked_s if breaker.state is State.OPEN else 0.0
    faulty.broken = False
    return first_s, again_s


# ---- claims


def claims(config: PromptConfig) -> list[Claim]:
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch, served(Path(scratch) / "tiny") as service:
        number = rounds(config, 6)
        fresh = [episode(service, good=0) for _ in progress(range(number), number, "breaker, fresh")]
        known = [episode(service, good=service.breaker.rules.window) for _ in progress(range(2), 2, "breaker, known")]
        return [*opens(fresh, known), *refuses([*fresh, *known]), *recovers(service, [*fresh, *known]),
                stays_open(*reopened(service), TWICE)]  # fmt: skip


def opens(fresh: Sequence[Episode], known: Sequence[Episode]) -> list[Claim]:
    window, found = fresh[0].window, []
    for what, some in (("nothing known before", fresh), ("after a window of good ones", known)):
        calls = sorted({one.failed for one in some})
        within = all(0 < number <= window for number in calls)
        found.append(Claim(f"failing calls until the breaker opens, {what}", f"within one window of {window}",
                           f"{calls} calls (n={len(some)})", within))  # fmt: skip
    return found


def refuses(found: Sequence[Episode]) -> list[Claim]:
    waits = [wait for one in found for wait in one.refusals_s]
    off = max((abs(wish) for one in found for wish in one.wishes_s), default=None)
    told = len([wish for one in found for wish in one.wishes_s])
    few = "" if certified(len(waits), 99) else ", too few to certify"
    soon = percentile(waits, 99) < 0.05 if certified(len(waits), 99) else None
    how_soon = f"p50 {ms(median(waits))} ms, p99 {ms(percentile(waits, 99))} ms of {len(waits)}{few}"
    return [
        Claim("requests that reach the engine while it is open", "none",
              f"{sum(one.reached for one in found)} of {len(waits)}", not any(one.reached for one in found)),
        Claim("a refusal while it is open", "p99 < 50 ms", how_soon, soon),
        Claim("the time that a refusal names, against that of the next probe", f"within {LATE_S:g} s, told to all",
              "told to nobody" if off is None else f"at most {off:.2f} s off, told to {told} of {len(waits)}",
              off is not None and off < LATE_S and told == len(waits)),
    ]  # fmt: skip


def recovers(service: Service, found: Sequence[Episode]) -> list[Claim]:
    wanted = service.breaker.rules.probes
    probes, healed = sorted({one.probes for one in found}), sorted({one.healed for one in found})
    return [
        Claim(f"requests let through of {CROWD} that come as it half-opens", f"exactly {wanted}",
              f"{probes} (n={len(found)})", probes == [wanted]),
        Claim("then, with an engine that is well", "closed, and everybody is served",
              f"{', '.join(sorted({one.state for one in found}))}; {healed} of {AFTER} served (n={len(found)})",
              healed == [AFTER] and all(one.state == "closed" for one in found)),
    ]  # fmt: skip


def stays_open(first_s: float, again_s: float, times: float) -> Claim:
    ratio = again_s / first_s
    return Claim("after a probe that failed it stays open", f"{times:g} times as long",
                 f"{again_s:.1f} s after {first_s:.1f} s", abs(ratio - times) < 0.1 * times)  # fmt: skip
