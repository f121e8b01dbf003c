"""The circuit breaker by itself: number by number, against a plain model at random, and from many threads."""

import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from service.breaker import BETWEEN_S, Breaker, Permit, Rules, State

FEW = Rules(window=6, least=4, share=0.5, slow_times=10, open_s=15, longest_open_s=50, probes=2, probe_s=100)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def calls(breaker: Breaker, *ends: bool | None, took: float | None = None) -> None:
    for end in ends:
        permit = breaker.permit()
        assert permit is not None
        tell(permit, end, took)


def tell(permit: Permit, end: bool | None, took: float | None = None) -> None:
    if end is None:
        permit.give_back()
    elif end:
        permit.succeeded(took)
    else:
        permit.failed()


def opened(clock: Clock, told: Callable[[State], object] = lambda _state: None) -> Breaker:
    breaker = Breaker("engine", clock, told=told)
    calls(breaker, *[False] * 20)
    assert breaker.state is State.OPEN
    return breaker


# ---- closed


def test_it_opens_with_the_twentieth_call_when_half_of_them_failed(clock):
    breaker = Breaker("engine", clock)
    calls(breaker, *[True] * 10, *[False] * 9)
    assert (breaker.state, breaker.wait_s()) == (State.CLOSED, 0) and breaker.failure_share == 9 / 19
    calls(breaker, False)
    assert (breaker.state, breaker.name) == (State.OPEN, "engine") and breaker.permit() is None


def test_less_than_half_opens_nothing(clock):
    breaker = Breaker("engine", clock)
    calls(breaker, *[True] * 11, *[False] * 10)
    assert breaker.state is State.CLOSED
    calls(breaker, False)
    assert breaker.state is State.OPEN


def test_only_the_last_hundred_calls_count(clock):
    breaker = Breaker("engine", clock)
    calls(breaker, *[True] * 1000, *[False] * 49)
    assert (breaker.state, breaker.failure_share) == (State.CLOSED, 0.49)
    calls(breaker, False)
    assert breaker.state is State.OPEN


def test_what_was_given_back_says_nothing(clock):
    breaker = Breaker("engine", clock)
    calls(breaker, *[None] * 500)
    assert breaker.failure_share == 0 and breaker.state is State.CLOSED
    calls(breaker, *[False] * 19, *[None] * 5)
    assert breaker.state is State.CLOSED and breaker.failure_share == 1


def test_a_permit_tells_its_end_once(clock):
    breaker = Breaker("engine", clock)
    permits = [breaker.permit() for _ in range(10)]
    for permit in permits * 3:
        permit.failed()
    assert breaker.state is State.CLOSED
    for permit in permits:
        permit.succeeded()
    assert breaker.failure_share == 1


def test_calls_ten_times_slower_than_the_median_count_as_failed(clock):
    breaker = Breaker("engine", clock)
    calls(breaker, *[True] * 60, took=2.0)
    calls(breaker, *[True] * 19, took=20.0)
    assert breaker.failure_share == 0  # exactly ten times is not slower
    calls(breaker, *[True] * 19, took=20.1)
    assert breaker.state is State.CLOSED and breaker.failure_share == 19 / 98


def test_a_slow_majority_opens_it_and_then_is_the_measure(clock):
    breaker = Breaker("engine", clock)
    calls(breaker, *[True] * 20, took=1.0)
    calls(breaker, *[True] * 19, took=11.0)
    assert breaker.state is State.CLOSED
    calls(breaker, True, took=11.0)
    assert breaker.state is State.OPEN
    clock.now_s += 15
    calls(breaker, True, took=11.0)  # half and half: the quicker half still is the measure
    assert breaker.state is State.OPEN
    clock.now_s += 30
    calls(breaker, True, True, took=11.0)  # slow for good is the new normal
    assert breaker.state is State.CLOSED


def test_before_there_are_twenty_to_compare_with_nothing_is_slow(clock):
    breaker = Breaker("engine", clock)
    calls(breaker, *[True] * 19, took=1.0)
    calls(breaker, True, took=100.0)
    assert breaker.failure_share == 0
    calls(breaker, True, took=100.0)
    assert breaker.failure_share == 1 / 21


def test_slow_is_measured_by_the_last_hundred_calls(clock):
    breaker = Breaker("engine", clock)
    calls(breaker, *[True] * 200, took=1.0)
    calls(breaker, *[True] * 100, took=9.0)
    calls(breaker, *[True] * 10, took=50.0)
    assert breaker.failure_share == 0
    calls(breaker, *[True] * 10, took=91.0)
    assert breaker.failure_share == 0.1


def test_calls_without_a_time_are_not_compared(clock):
    breaker = Breaker("engine", clock)
    calls(breaker, *[True] * 20, took=1.0)
    calls(breaker, *[True] * 20)
    calls(breaker, *[False] * 5)
    assert breaker.failure_share == 5 / 45 and len(breaker.took) == 20


# ---- open, and half open


def test_open_says_how_long_and_tries_again_when_it_is_over(clock):
    breaker = opened(clock)
    assert breaker.wait_s() == 15
    clock.now_s += 14.5
    assert breaker.wait_s() == 0.5 and breaker.permit() is None and breaker.state is State.OPEN
    clock.now_s += 0.5
    assert breaker.wait_s() == 0 and breaker.state is State.OPEN  # nobody has asked yet
    assert breaker.permit() is not None and breaker.state is State.HALF_OPEN
    clock.now_s += 1e6
    assert opened(clock).wait_s() == 15


def test_half_open_lets_exactly_two_through_and_closes_when_they_went_well(clock):
    breaker = opened(clock)
    clock.now_s += 15
    first, second = breaker.permit(), breaker.permit()
    assert first and second and breaker.permit() is None and breaker.wait_s() == BETWEEN_S == 1
    first.succeeded()
    assert breaker.permit() is None and breaker.state is State.HALF_OPEN
    second.succeeded()
    assert breaker.state is State.CLOSED and breaker.failure_share == 0
    calls(breaker, *[False] * 19)
    assert breaker.state is State.CLOSED  # it begins anew
    calls(breaker, False)
    assert breaker.wait_s() == 15  # and from the shortest wait


def test_each_probe_that_fails_doubles_the_wait_up_to_two_minutes(clock):
    breaker, waits = opened(clock), []
    for _ in range(5):
        waits.append(breaker.wait_s())
        clock.now_s += waits[-1]
        calls(breaker, False)
    assert waits == [15, 30, 60, 120, 120]


def test_a_slow_probe_has_failed(clock):
    breaker = Breaker("engine", clock)
    calls(breaker, *[True] * 20, took=1.0)
    calls(breaker, *[False] * 20)
    clock.now_s += 15
    calls(breaker, True, took=11.0)
    assert breaker.state is State.OPEN and breaker.wait_s() == 30


def test_a_probe_that_is_cancelled_gives_its_place_back(clock):
    breaker = opened(clock)
    clock.now_s += 15
    first, second = breaker.permit(), breaker.permit()
    first.give_back()
    assert breaker.wait_s() == 0
    third = breaker.permit()
    assert third is not None and breaker.permit() is None
    second.succeeded()
    third.succeeded()
    assert breaker.state is State.CLOSED


def test_a_probe_that_never_tells_its_end_is_given_up_and_counts_no_more(clock):
    breaker = opened(clock)
    clock.now_s += 15
    lost, other = breaker.permit(), breaker.permit()
    clock.now_s += 299.9
    assert breaker.permit() is None
    clock.now_s += 0.1
    assert breaker.wait_s() == 0
    replacing = breaker.permit()
    assert replacing is not None
    lost.failed()  # too late: it is nobody's probe any more
    other.succeeded()
    assert breaker.state is State.HALF_OPEN
    replacing.succeeded()
    assert breaker.permit() is not None and breaker.state is State.HALF_OPEN  # one of the two was enough too late


def test_what_began_before_a_change_says_nothing_after_it(clock):
    breaker = Breaker("engine", clock)
    old = [breaker.permit() for _ in range(40)]
    calls(breaker, *[False] * 20)
    for permit in old[:10]:
        permit.succeeded(1.0)
    assert breaker.state is State.OPEN and not breaker.took
    clock.now_s += 15
    probe = breaker.permit()
    for permit in old[10:20]:
        permit.succeeded()
    old[20].failed()
    assert breaker.state is State.HALF_OPEN
    probe.succeeded()
    calls(breaker, True)
    assert breaker.state is State.CLOSED
    for permit in old[21:]:
        permit.failed()
    assert breaker.state is State.CLOSED and breaker.failure_share == 0


# ---- forced, told, and from threads


def test_disabled_lets_everybody_through_and_forced_open_nobody(clock):
    breaker = Breaker("engine", clock)
    breaker.force(State.DISABLED)
    calls(breaker, *[False] * 200)
    assert (breaker.state, breaker.wait_s()) == (State.DISABLED, 0)
    breaker.force(State.FORCED_OPEN)
    clock.now_s += 1e6
    assert breaker.permit() is None and breaker.wait_s() == 120
    breaker.force(None)
    calls(breaker, *[False] * 19)
    assert breaker.state is State.CLOSED


def test_every_change_is_told(clock):
    told: list[State] = []
    breaker = opened(clock, told.append)
    clock.now_s += 15
    calls(breaker, False)
    clock.now_s += 30
    calls(breaker, True, True)
    assert told == [State.OPEN, State.HALF_OPEN, State.OPEN, State.HALF_OPEN, State.CLOSED]


def test_b74_of_many_threads_that_ask_at_once_exactly_two_are_probes(clock):
    for _ in range(20):
        breaker, start, found = opened(clock), threading.Barrier(16), []
        clock.now_s += 15

        def ask(breaker=breaker, start=start, found=found) -> None:
            start.wait()
            found.append(breaker.permit())

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(permit is not None for permit in found) == 2


def test_b74_a_wall_clock_that_jumps_an_hour_changes_nothing(monkeypatch):
    breaker = Breaker("engine", time.monotonic)
    calls(breaker, *[False] * 20)
    wall = time.time
    for jump_s in (3600, -3600):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: wall() + jump_s)
        assert 10 < breaker.wait_s() <= 15 and breaker.permit() is None


# ---- against a plain model


class Plain:
    """The same rules as they are read: all that ever happened in a list, and everything counted anew each time."""

    def __init__(self) -> None:
        self.state, self.period, self.wait_s, self.opened_s = "closed", 0, 0.0, 0.0
        self.happened: list[tuple[int, str, float | None]] = []  # (period, good | bad, took)
        self.times: list[float] = []
        self.out: dict[int, tuple[int, float]] = {}  # number of a permit -> its period, when it began

    def here(self, what: str) -> int:
        return sum(period == self.period and end == what for period, end, _ in self.happened)

    def would_pass(self, now_s: float) -> bool:
        if self.state == "open":
            return now_s >= self.opened_s + self.wait_s
        if self.state == "half_open":
            young = sum(period == self.period and now_s - begin < FEW.probe_s for period, begin in self.out.values())
            return young + self.here("good") < FEW.probes
        return self.state != "forced_open"

    def ask(self, number: int, now_s: float) -> None:
        if self.state == "open":
            self.to("half_open")
        self.out[number] = (self.period, now_s)

    def drop_lost(self, now_s: float) -> None:
        if self.state == "half_open":
            self.out = {n: (p, b) for n, (p, b) in self.out.items() if p != self.period or now_s - b < FEW.probe_s}

    def end(self, number: int, end: bool | None, took: float | None, now_s: float) -> None:
        period, _ = self.out.pop(number, (-1, 0.0))
        if end is None or period != self.period:
            return
        known = sorted(self.times[-FEW.window :])
        slow = end and took is not None and len(known) >= FEW.least and took > 10 * known[(len(known) - 1) // 2]
        self.times += [took] if end and took is not None else []
        self.happened.append((self.period, "good" if end and not slow else "bad", took))
        if self.state == "closed":
            last = [what for period, what, _ in self.happened if period == self.period][-FEW.window :]
            if len(last) >= FEW.least and last.count("bad") * 2 >= len(last):
                self.wait_s, self.opened_s = FEW.open_s, now_s
                self.to("open")
        elif self.state == "half_open" and self.here("bad"):
            self.wait_s, self.opened_s = min(2 * self.wait_s, FEW.longest_open_s), now_s
            self.to("open")
        elif self.state == "half_open" and self.here("good") == FEW.probes:
            self.to("closed")

    def to(self, state: str) -> None:
        self.state, self.period = state, self.period + 1


class BreakerMachine(RuleBasedStateMachine):
    permits = Bundle("permits")

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.told, self.count = Clock(), [], 0
        self.breaker = Breaker("any", self.clock, FEW, self.told.append)
        self.plain = Plain()

    @rule(target=permits)
    def ask(self):
        expected = self.plain.would_pass(self.clock.now_s)
        permit = self.breaker.permit()
        assert (permit is not None) == expected
        self.count += 1
        if expected:
            self.plain.ask(self.count, self.clock.now_s)
        return permit, self.count

    @rule(
        one=consumes(permits),
        end=strategies.sampled_from([True, True, False, False, None]),
        took=strategies.sampled_from([None, 1.0, 1.0, 9.0, 12.0]),
        twice=strategies.booleans(),
    )
    def end(self, one, end, took, twice):
        permit, number = one
        if permit is None:
            return
        for _ in range(1 + twice):
            tell(permit, end, took if end else None)
            self.plain.end(number, end, took, self.clock.now_s)

    @rule(seconds=strategies.sampled_from([1.0, 14.0, 15.0, 30.0, 50.0, 100.0]))
    def wait(self, seconds):
        self.clock.now_s += seconds

    @rule(state=strategies.sampled_from([State.DISABLED, State.FORCED_OPEN, None]))
    def force(self, state):
        self.breaker.force(state)
        self.plain.to(state or "closed")

    @invariant()
    def they_agree(self):
        now_s, plain = self.clock.now_s, self.plain
        plain.drop_lost(now_s)
        wait_s = self.breaker.wait_s()
        assert self.breaker.state == plain.state
        assert (wait_s == 0) == plain.would_pass(now_s)
        if plain.state == "open":
            assert wait_s == max(plain.opened_s + plain.wait_s - now_s, 0)
        last = [what for period, what, _ in plain.happened if period == plain.period][-FEW.window :]
        if plain.state == "closed":
            assert self.breaker.failure_share == last.count("bad") / max(len(last), 1)
        assert len(self.told) == plain.period


TestBreakerAgainstThePlainModel = BreakerMachine.TestCase
TestBreakerAgainstThePlainModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
