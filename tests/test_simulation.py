"""Arrivals, prompts, and the simulator against traces worked out by hand."""

import threading
from concurrent.futures import Future
from itertools import pairwise
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher import DynamicBatcher
from lab.arrivals import OpenLoop, schedule
from lab.batch_window import break_even
from lab.prompts import exact, lengths, questions
from lab.simulation import Cost, simulate

pytestmark = pytest.mark.slow


def kind(size: int, window_s: float):
    return lambda generate, clock: DynamicBatcher(
        generate, size, window_s, 10**9, on_batch=lambda _: None, clock=clock, start=False
    )


def test_a_trace_worked_out_by_hand():
    """Batch 2, window 1 s; a batch of one takes 3 s, of two 4 s.

    0.0 A comes, its window is open until 1.0.       1.0 A leaves alone, done at 4.0.
    2.0 B comes, 3.0 C comes, 3.5 D comes.           4.0 B and C leave, done at 8.0.
    8.0 D leaves at once: its window was over at 4.5. Done at 11.0.
    20.0 E comes, 20.5 F comes: full at 20.5.        Done at 24.5.
    """
    dues = [0.0, 2.0, 3.0, 3.5, 20.0, 20.5]
    done = simulate(kind(2, 1.0), dues, [1] * 6, lambda batch: 2.0 + len(batch))
    assert done == [4.0, 8.0, 8.0, 11.0, 24.5, 24.5]


def test_without_a_window_a_lone_request_leaves_at_once_and_a_burst_fills_its_batches():
    assert simulate(kind(4, 0.0), [0.0, 10.0], [1, 1], lambda _: 3.0) == [3.0, 13.0]
    assert simulate(kind(4, 0.0), [0.0] * 6, [1] * 6, lambda _: 3.0) == [3.0] * 4 + [6.0] * 2


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 5), min_size=1, max_size=30),
    size=st.integers(1, 5),
    window=st.floats(0, 3),
)
def test_a_simulation_answers_everyone_in_order_and_never_faster_than_the_machine(gaps, size, window):
    dues = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    done = simulate(kind(size, window), dues, [1] * len(dues), lambda _: 1.0)
    assert done == sorted(done)
    assert all(d - due >= 1.0 - 1e-9 for d, due in zip(done, dues, strict=True))
    assert len(set(done)) * size >= len(dues)


def test_a_cost_is_a_straight_line_between_its_points():
    cost = Cost({1: 0.06, 2: 0.10, 6: 0.08}, {32: 0.14, 192: 0.30}, new_tokens=11)
    assert (cost.step(1), cost.step(4), cost.step(6)) == pytest.approx((0.06, 0.09, 0.08))
    assert cost.prefill(112) == pytest.approx(0.22)
    assert cost.prefill(1) == pytest.approx(0.06)  # a prefill of one position is a decode step
    assert cost.service_s([20, 32]) == pytest.approx(0.14 + 0.16 * 32 / 160 + 10 * 0.10)


def test_schedules_are_what_they_are_called():
    assert schedule("burst", 3, 5.0, seed=1) == [0, 0, 0]
    assert schedule("constant", 4, 2.0, seed=1) == [0, 0.5, 1.0, 1.5]
    moments = schedule("poisson", 20_000, 4.0, seed=1)
    gaps = [b - a for a, b in pairwise(moments)]
    assert mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert mean(gap > 0.25 for gap in gaps) == pytest.approx(0.3679, abs=0.02)  # exponential: e to the -1
    assert schedule("poisson", 9, 4.0, 1) == moments[:9] != schedule("poisson", 9, 4.0, 2)


def test_prompts_have_the_length_that_was_asked_for():
    def encode(text: str) -> list[int]:
        return list(text.encode())

    assert [len(exact(encode, n, 3)) for n in (1, 7, 5000)] == [1, 7, 5000]
    assert exact(encode, 40, 0) != exact(encode, 40, 1)
    assert len(questions()) == 32
    assert lengths("same", 9, 4) == [9] * 4
    mixed = lengths("mixed", 100, 64)
    assert min(mixed) == 25 and 95 <= max(mixed) <= 100 and abs(mean(mixed) - 62.5) < 2


def test_a_window_costs_its_length_where_nobody_comes_within_it():
    found = break_even(lambda cell: kind(cell[0], cell[1] / 1e3), Cost({1: 0.1, 8: 0.1}, {10: 0.1}, 2), 8, 50.0, [10])
    first = found["rows"][0]
    assert first["rate"] == pytest.approx(0.02 * found["capacity"])
    assert found["capacity"] == pytest.approx(8 / 0.2)
    assert 0.03 < first["delay_s"] <= 0.0501 and first["low_s"] > 0
    assert found["cannot_pay_below"] > first["rate"]


def test_an_open_loop_whose_send_fails_ends_and_says_so():
    ended = threading.Event()

    def send(i):
        if i == 1:
            raise RuntimeError("the queue is full")
        future = Future()
        future.set_result(None)
        return future

    with pytest.raises(RuntimeError, match="queue is full"), OpenLoop([0.0, 0.0], send, then=ended.set):
        assert ended.wait(5)


def test_an_open_loop_sends_at_its_moments_and_settles_when_it_is_left_early():
    futures = [Future() for _ in range(3)]
    sent, ended = [], threading.Event()

    def send(i):
        sent.append(i)
        if i == 0:
            futures[0].set_result(None)
        return futures[i]

    with OpenLoop([0.0, 0.01, 3600.0], send, then=ended.set) as loop:
        while len(sent) < 2:
            pass
    assert ended.is_set() and sent == [0, 1] and futures[1].cancelled()
    assert loop.done_s[0] >= loop.sent_s[0] >= loop.start_s and loop.sent_s[1] >= loop.start_s + 0.01
