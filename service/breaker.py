"""A circuit breaker: when most of what is asked of somebody fails, nobody is sent there for a while.

Closed lets everybody through and watches how the last calls ended. Open lets nobody through, and says when it will try
again. Half-open lets exactly so many through as probes: when they all go well it closes, when one fails it opens again,
for twice as long (Nygard, Release It!, 2007, chapter 5; the settings are those of resilience4j, scaled down).

Plain Python and a clock that is handed in, which must be a monotonic one: no wall clock that is set back can keep a
breaker open. A lock of its own, so that probes are counted right from any thread.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from statistics import median_low

BETWEEN_S = 1.0  # when to come again while all probes are on their way


class State(StrEnum):
    """The last two are somebody's decision and stay until that is taken back."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    DISABLED = "disabled"
    FORCED_OPEN = "forced_open"


@dataclass(frozen=True)
class Rules:
    """Opens when of the last `window` calls, once there are `least`, so great a share went wrong.

    Wrong is what failed, and what took more than `slow_times` the median of the last calls that did not fail: slow ones
    belong to those, so that a machine that has become slow for good is the measure after a while. open_s doubles with
    every probe that fails, up to longest_open_s. probe_s: after so long a probe that never told its end is given up.
    """

    window: int = 100
    least: int = 20
    share: float = 0.5
    slow_times: float = 10.0
    open_s: float = 15.0
    longest_open_s: float = 120.0
    probes: int = 2
    probe_s: float = 300.0


class Permit:
    """Leave for one call. Tell how it ended, once: after that, or in another period, it counts for nothing."""

    def __init__(self, breaker: "Breaker", period: int, begin_s: float) -> None:
        self.breaker, self.begin_s = breaker, begin_s
        self.period: int | None = period  # None: settled

    def succeeded(self, took: float | None = None) -> None:
        """took: what is compared with other calls', in any unit; None where there is nothing to compare."""
        self.breaker.ended(self, ok=True, took=took)

    def failed(self) -> None:
        self.breaker.ended(self, ok=False)

    def give_back(self) -> None:
        """It ended by nobody's fault, or never began: that says nothing. A probe's place is free again."""
        self.breaker.ended(self, ok=None)


class Breaker:
    """name: what it stands before. told: called with the new state at every change, under the breaker's lock."""

    def __init__(
        self, name: str, clock: Callable[[], float], rules: Rules | None = None,
        told: Callable[[State], object] = lambda _state: None,
    ) -> None:  # fmt: skip
        self.name, self.clock, self.rules, self.told = name, clock, rules or Rules(), told
        self.lock = threading.RLock()
        self.state = State.CLOSED
        self.period = 0  # counts the changes of state: what began in an earlier one says nothing about this one
        self.good: deque[bool] = deque(maxlen=self.rules.window)  # how the last calls ended
        self.took: deque[float] = deque(maxlen=self.rules.window)  # of those that did not fail
        self.probing: set[Permit] = set()
        self.passed = 0  # probes that went well
        self.open_s = self.until_s = 0.0

    def permit(self) -> Permit | None:
        """Leave to make one call, which must tell how it ended; None: not now, come again after wait_s()."""
        with self.lock:
            if self.wait_s() > 0:
                return None
            if self.state is State.OPEN:
                self.change(State.HALF_OPEN)
            permit = Permit(self, self.period, self.clock())
            if self.state is State.HALF_OPEN:
                self.probing.add(permit)
            return permit

    def wait_s(self) -> float:
        """Seconds until a call would be let through; 0: now."""
        with self.lock:
            now_s = self.clock()
            if self.state is State.OPEN:
                return max(self.until_s - now_s, 0.0)
            if self.state is State.HALF_OPEN:
                self.probing = {one for one in self.probing if now_s - one.begin_s < self.rules.probe_s}
                return 0.0 if len(self.probing) + self.passed < self.rules.probes else BETWEEN_S
            return self.rules.longest_open_s if self.state is State.FORCED_OPEN else 0.0

    def force(self, state: State | None) -> None:
        """DISABLED or FORCED_OPEN, whatever happens; None takes that back: closed, and nothing is known yet."""
        with self.lock:
            self.change(state or State.CLOSED)

    def ended(self, permit: Permit, *, ok: bool | None, took: float | None = None) -> None:
        with self.lock:
            known = permit.period == self.period and (self.state is not State.HALF_OPEN or permit in self.probing)
            permit.period = None
            self.probing.discard(permit)
            if not known or ok is None:
                return
            good = ok and not self.slow(took)
            if ok and took is not None:
                self.took.append(took)
            if self.state is State.CLOSED:
                self.good.append(good)
                if len(self.good) >= self.rules.least and self.failure_share >= self.rules.share:
                    self.open(self.rules.open_s)
            elif self.state is State.HALF_OPEN:
                self.passed += good
                if not good:
                    self.open(min(2 * self.open_s, self.rules.longest_open_s))
                elif self.passed == self.rules.probes:
                    self.change(State.CLOSED)

    def slow(self, took: float | None) -> bool:
        if took is None or len(self.took) < self.rules.least:
            return False
        return took > self.rules.slow_times * median_low(self.took)

    @property
    def failure_share(self) -> float:
        """Of the last calls; 0 where there were none."""
        return self.good.count(False) / max(len(self.good), 1)

    def open(self, open_s: float) -> None:
        self.open_s, self.until_s = open_s, self.clock() + open_s
        self.change(State.OPEN)

    def change(self, state: State) -> None:
        self.state, self.period, self.passed = state, self.period + 1, 0
        self.good.clear()
        self.probing.clear()
        self.told(state)
