"""When requests arrive: schedules that are fixed before anything runs, in seconds from the start.

An open loop sends by such a schedule, whether or not the server keeps up, and counts latency from it. (A closed loop,
which sends when an answer came, slows down with the server, and so hides its queue.)
"""

import csv
import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

from config import UserError

KINDS = ("burst", "poisson", "constant")
LEAST_CV, MOST_CV = 0.01, 20.0  # below, the gaps are all but equal; above, all but a few of them are 0


@dataclass(frozen=True)
class Arrival:
    """How requests follow each other. cv: coefficient of variation of the gaps, their standard deviation / mean."""

    kind: str
    cv: float | None  # None for a burst, which has no gaps


def parse_arrival(text: str) -> Arrival:
    """What poisson, constant, burst or gamma:CV stands for. UserError."""
    if text in KINDS:
        return Arrival(text, {"burst": None, "poisson": 1.0, "constant": 0.0}[text])
    kind, colon, number = text.partition(":")
    if kind != "gamma" or not colon:
        raise UserError(f"Arrivals are poisson, constant, burst or gamma:CV, such as gamma:2.5, and not {text!r}.")
    try:
        cv = float(number)
    except ValueError as error:
        raise UserError(f"gamma takes a number after its colon, such as gamma:2.5, and not {number!r}.") from error
    if not LEAST_CV <= cv <= MOST_CV:
        raise UserError(
            f"gamma:CV takes a coefficient of variation from {LEAST_CV:g} to {MOST_CV:g}, and not {number}: use "
            "constant for equal gaps."
        )
    return Arrival(kind, cv)


def schedule(kind: str, requests: int, rate_per_s: float, seed: int) -> list[float]:
    """The moments at which the requests are due, the first of them at 0. UserError for a kind that is none.

    burst: all at once. constant: evenly spaced. poisson: independent users, so the gaps are exponential; seeded.
    gamma:CV: gaps of that coefficient of variation; above 1 requests come in clusters, and gamma:1 is poisson.
    """
    return list(islice(moments(kind, rate_per_s, seed), requests))


def moments(kind: str, rate_per_s: float, seed: int) -> Iterator[float]:
    """The moments of schedule(), without an end: for a run that ends by the clock."""
    arrival, chance, moment = parse_arrival(kind), random.Random(seed), 0.0
    if arrival.kind == "constant":
        yield from (i / rate_per_s for i in count())  # no sum of gaps: its rounding errors would grow
    while True:
        yield moment
        moment += gap(arrival, rate_per_s, chance)


def gap(arrival: Arrival, rate_per_s: float, chance: random.Random) -> float:
    """The time to the next request, 1 / rate_per_s in the mean."""
    if arrival.cv is None:
        return 0.0
    if arrival.cv == 1.0:  # gamma's special case; and schedules of earlier records stay what they were
        return chance.expovariate(rate_per_s)
    # A gamma distribution has the mean shape * scale and the coefficient of variation 1 / sqrt(shape).
    shape = arrival.cv**-2
    return chance.gammavariate(shape, 1 / (shape * rate_per_s))


def ramp(from_rate: float, to_rate: float, duration_s: float, seed: int, kind: str = "poisson") -> list[float]:
    """The moments of a load whose rate goes evenly from one value to another. UserError.

    Poisson, because the question of a ramp is where queues begin to grow: before evenly spaced requests a server keeps
    up until its last free moment is used, and then fails at once; before users who know nothing of each other its queue
    grows earlier. constant gives the even ramp, for comparison.
    Made exactly: moments of rate 1 are put where so many requests had to have come (time rescaling), not thinned.
    """
    rates = (from_rate, to_rate)
    if not (all(0 <= rate < math.inf for rate in rates) and any(rates) and 0 < duration_s < math.inf):
        raise UserError(
            "A ramp goes from one rate to another, neither below 0 and one above it, in a time above 0, and not from "
            f"{from_rate:g} to {to_rate:g} requests/s in {duration_s:g} s."
        )
    if parse_arrival(kind).kind == "burst":
        raise UserError("A burst has no rate that could rise: give a ramp poisson, constant or gamma:CV arrivals.")
    slope = (to_rate - from_rate) / duration_s
    total = (from_rate + to_rate) / 2 * duration_s  # requests in the mean
    steady = islice(moments(kind, 1.0, seed), 1, None)  # without the one at 0: none is due before the first gap

    def when(due: float) -> float:
        """Solves from_rate * t + slope * t**2 / 2 = due, in the form that does not cancel where slope is near 0."""
        return min(2 * due / (from_rate + math.sqrt(max(from_rate**2 + 2 * slope * due, 0.0))), duration_s)

    return [when(due) for due in takewhile(lambda due: due <= total, steady)]


# ---- a load that was recorded


@dataclass(frozen=True)
class Planned:
    """One request of a recorded load. at_s: seconds from the start of the run."""

    at_s: float
    prompt_tokens: int
    new_tokens: int


LATEST_S = 7 * 86_400.0  # a time of day, or since 1970, is no time since the start
MOST_TOKENS = 10_000_000


def replay(path: str | Path) -> list[Planned]:
    """The requests of a file with at, prompt_tokens and new_tokens: JSON lines, or CSV with these columns. UserError.

    Other fields and columns are left alone. Every error names the file and the line.
    """
    text = text_of(path)
    rows = json_rows if text.lstrip().startswith("{") else csv_rows
    found: list[Planned] = []
    for line, row in rows(path, text):
        one = planned(row, f"{path}, line {line}")
        if found and one.at_s < found[-1].at_s:
            raise UserError(
                f"{path}, line {line}: at goes back from {found[-1].at_s:g} to {one.at_s:g}: sort the lines by at."
            )
        found.append(one)
    if not found:
        raise UserError(f"{path} holds no requests: give one a line, with at, prompt_tokens and new_tokens.")
    return found


def text_of(path: str | Path) -> str:
    """A file of UTF-8 text. UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a file that can.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason}): save it as UTF-8.") from error


def json_rows(path: str | Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank. UserError."""
    for line, written in enumerate(text.split("\n"), 1):
        if not written.strip():
            continue
        try:
            row = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {line} is no JSON: write one object a line.") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line} is no JSON object: write one object a line.")
        yield line, row


def csv_rows(path: str | Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, cells by column) of every line that is not blank. UserError."""
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    try:
        missing = {"at", "prompt_tokens", "new_tokens"} - set(reader.fieldnames or ())
        if missing and text.strip():
            raise UserError(f"{path}, line 1 names no column {sorted(missing)[0]}: name at, prompt_tokens, new_tokens.")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is no CSV ({error}): write three numbers a line.") from error


def planned(row: dict[str, Any], where: str) -> Planned:
    at_s = number_in(row, "at", where)
    if not 0 <= at_s <= LATEST_S:
        raise UserError(f"{where}: at is {at_s:g}: give seconds from the start, from 0 to {LATEST_S:g}.")
    prompt, new = (number_in(row, name, where) for name in ("prompt_tokens", "new_tokens"))
    for name, tokens in (("prompt_tokens", prompt), ("new_tokens", new)):
        if not (1 <= tokens <= MOST_TOKENS and tokens == int(tokens)):
            raise UserError(f"{where}: {name} is {tokens:g}: give a whole number from 1 to {MOST_TOKENS}.")
    return Planned(at_s, int(prompt), int(new))


def number_in(row: dict[str, Any], name: str, where: str) -> float:
    value = row.get(name)
    if value is None or value == "":
        raise UserError(f"{where} has no {name}: give at, prompt_tokens and new_tokens.")
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {name} is {str(value)[:40]!r}, which is no number.") from error


class OpenLoop:
    """with OpenLoop(dues_s, send, then): sends request i at its moment, from a thread of its own, and waits for all.

    send(i) returns the future of its answer; then() is called when every future is settled. Leaving the block early, by
    Ctrl-C, cancels what still waits. sent_s and done_s are readings of the caller's own clock; start_s is moment 0.
    """

    def __init__(self, dues_s: Sequence[float], send: Callable[[int], Future], then: Callable[[], object]) -> None:
        self.dues_s, self.send, self.then = dues_s, send, then
        self.sent_s: list[float] = []
        self.done_s: list[float | None] = [None] * len(dues_s)
        self.futures: list[Future] = []
        self.error: Exception | None = None
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.loop, name="open loop")

    def __enter__(self) -> "OpenLoop":
        self.start_s = time.perf_counter() + 0.01  # by then the other side is ready
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop.set()
        for future in self.futures:
            future.cancel()  # does nothing to those that are answered
        self.thread.join()
        if self.error and kind is None:
            raise self.error

    def loop(self) -> None:
        try:
            self.send_all()
        except Exception as error:  # the other side closed, or its queue is full: the caller learns it in __exit__
            self.error = error
        for future in self.futures:
            with suppress(CancelledError):
                future.exception()  # waits until it is settled, whichever way
        self.then()

    def send_all(self) -> None:
        for i, due in enumerate(self.dues_s):
            if self.stop.wait(max(self.start_s + due - time.perf_counter(), 0)):
                break
            self.sent_s.append(time.perf_counter())
            self.futures.append(self.send(i))
            self.futures[i].add_done_callback(lambda _, i=i: self.done_s.__setitem__(i, time.perf_counter()))
