"""What an overload does, before, during and after it, from the stamps of single requests.

A round: requests with due, ttft, e2e, end (seconds since the round began; None: not measured) and kind: served, or why
not. The pulse lies between begin_s and end_s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from scipy.special import bdtr, betaincinv

from metrics import percentile

Request = dict[str, Any]
Round = dict[str, Any]
SERVED = "served"
SETTLE_S = 5.0  # the opening of a round is nobody's steady state
WIDTH_S, EVERY_S = 3.0, 0.5  # a window that slides
STAYS_S = 2.0  # for so long all windows must be as they were before
TARGET_S = 10.0


@dataclass(frozen=True)
class Phase:
    """A part of every round. begin_s, end_s: of the part."""

    name: str
    begin_s: float
    end_s: float


def phases(record: dict[str, Any]) -> list[Phase]:
    begin_s, end_s, last_s = record["pulse_begin_s"], record["pulse_end_s"], record["round_s"]
    return [
        Phase("before", SETTLE_S, begin_s),
        Phase("overload", begin_s, end_s),
        Phase(f"{TARGET_S:g} s after", end_s, end_s + TARGET_S),
        Phase("later", end_s + TARGET_S, last_s),
    ]


def due_in(requests: Sequence[Request], begin_s: float, end_s: float) -> list[Request]:
    return [one for one in requests if begin_s <= one["due"] < end_s]


def served(requests: Sequence[Request]) -> list[Request]:
    return [one for one in requests if one["kind"] == SERVED]


def goodput(requests: Sequence[Request], phase: Phase) -> float:
    """Answers completed a second in this part, whenever they were due."""
    ended = [one for one in served(requests) if phase.begin_s <= one["end"] < phase.end_s]
    return len(ended) / (phase.end_s - phase.begin_s)


# ---- back to what it was


@dataclass(frozen=True)
class State:
    """A window's worst wait for a first token, and the share that was not served. None: nobody was served."""

    ttft_s: float | None
    refused: float

    def within(self, other: "State") -> bool:
        return self.ttft_s is not None and self.ttft_s <= (other.ttft_s or 0.0) and self.refused <= other.refused


def state(requests: Sequence[Request], begin_s: float) -> State | None:
    """Of those who were due in the window that begins then. None: nobody was."""
    there = due_in(requests, begin_s, begin_s + WIDTH_S)
    if not there:
        return None
    waits = [one["ttft"] for one in served(there)]
    return State(percentile(waits, 99) if waits else None, 1 - len(waits) / len(there))


def steps(begin_s: float, end_s: float) -> list[float]:
    return [begin_s + i * EVERY_S for i in range(int((end_s - begin_s - WIDTH_S) / EVERY_S) + 1)]


def usual(rounds: Sequence[Round], begin_s: float) -> State:
    """The worst that a window before the pulse was, in all rounds: what "as before" means."""
    found = [seen for one in rounds for start in steps(SETTLE_S, begin_s) if (seen := state(one["requests"], start))]
    return State(max((one.ttft_s for one in found if one.ttft_s is not None), default=None),
                 max((one.refused for one in found), default=0.0))  # fmt: skip


def recovery_s(requests: Sequence[Request], end_s: float, last_s: float, before: State) -> float:
    """From the end of the pulse to the first moment since when those who come are served as before; inf: never.

    As before: all windows that begin in the next STAYS_S are no worse than the worst one before the pulse.
    """
    starts = steps(end_s, last_s)
    good = {start: (seen := state(requests, start)) is None or seen.within(before) for start in starts}
    for start in starts:
        near = [good[other] for other in starts if start <= other <= start + STAYS_S]
        if len(near) > STAYS_S / EVERY_S and all(near):
            return start - end_s
    return inf


# ---- targets


def quantile_interval(samples: Sequence[float], p: float, confidence: float = 0.95) -> tuple[float, float] | None:
    """Order statistics that hold the true p-th percentile with this confidence. None: there are too few samples.

    How many samples lie below it is binomial (n, p), whatever their distribution (Conover, 3.2).
    """
    n, ordered, half, share = len(samples), sorted(samples), (1 - confidence) / 2, p / 100
    low = next((k for k in range(n) if bdtr(k, n, share) > half), None)
    high = next((k for k in range(n) if bdtr(k, n, share) >= 1 - half), None)
    if low is None or high is None or high + 1 > n or bdtr(n - 1, n, share) < 1 - half:
        return None
    return ordered[max(low - 1, 0)], ordered[min(high, n - 1)]


def availability_interval(failed: int, asked: int, confidence: float = 0.95) -> tuple[float, float]:
    """Of the share that is served (Clopper, Pearson, Biometrika 26, 1934)."""
    half = (1 - confidence) / 2
    low = float(betaincinv(asked - failed, failed + 1, half)) if failed < asked else 0.0
    high = float(betaincinv(asked - failed + 1, failed, 1 - half)) if failed else 1.0
    return low, high


def requests_needed(share: float, confidence: float = 0.95) -> int:
    """So many without a single failure show that at least this share is served."""
    n = 1
    while availability_interval(0, n, confidence)[0] < share:
        n = n + 1 if n < 100 else int(n * 1.01)
    return n
