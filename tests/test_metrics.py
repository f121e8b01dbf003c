"""The stopwatch and what is computed from its samples, against values worked out by hand."""

import sys
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

import metrics
from metrics import (
    blocks,
    certified,
    cold_warning,
    median_interval,
    ms,
    number,
    percentile,
    table,
    timed,
    timer_cost_s,
    unsteady_warning,
)  # fmt: skip


def test_timed_records_the_block_and_nothing_else():
    ticks, stats = iter([10.0, 10.25]), {}
    with timed("prefill", stats, clock=lambda: next(ticks)):
        pass
    assert stats == {"prefill": [0.25]}


def test_timed_keeps_every_sample_in_order():
    ticks, stats = iter([0.0, 1.0, 5.0, 7.0]), {}
    for _ in range(2):
        with timed("step", stats, clock=lambda: next(ticks)):
            pass
    assert stats == {"step": [1.0, 2.0]}


def test_a_block_that_raises_records_nothing():
    stats: dict = {}
    with pytest.raises(RuntimeError), timed("broken", stats):
        raise RuntimeError
    assert stats == {}


def test_timed_waits_for_the_device_before_it_starts_and_before_it_stops():
    """Without the first wait a block pays for work queued before it; without the second it gets its own for nothing."""
    events: list[str] = []
    clock = lambda: events.append("clock") or 0.0  # noqa: E731
    with timed("x", {}, sync=lambda: events.append("sync"), clock=clock):
        events.append("work")
    assert events == ["sync", "clock", "work", "sync", "clock"]


def test_synchronize_uses_only_a_torch_that_is_loaded(monkeypatch):
    class Cuda:
        calls = 0

        def is_initialized(self) -> bool:
            return True

        def synchronize(self) -> None:
            Cuda.calls += 1

    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {"cuda": Cuda()}))
    metrics.synchronize()
    assert Cuda.calls == 1
    monkeypatch.delitem(sys.modules, "torch")
    metrics.synchronize()


def test_the_timer_knows_what_it_costs():
    """Ten times the limit of the benchmark: this only catches a stopwatch that has become something else."""
    assert 0 < timer_cost_s(blocks=200) < 50e-6


@pytest.mark.parametrize(("p", "expected"), [(0, 1), (50, 3), (60, 3), (61, 4), (95, 5), (100, 5)])
def test_a_percentile_is_one_of_the_samples(p, expected):
    assert percentile([5, 1, 4, 2, 3], p) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_at_least_p_percent_of_the_samples_do_not_exceed_the_percentile(samples, p):
    value = percentile(samples, p)
    assert value in samples
    assert sum(s <= value for s in samples) >= p / 100 * len(samples) - 1e-9


def test_percentiles_have_a_sample_floor():
    assert [certified(n, 95) for n in (16, 131, 132)] == [False, False, True]
    assert (certified(63, 90), certified(662, 99), certified(6639, 99.9), certified(6640, 99.9)) == (
        False, True, False, True)  # fmt: skip


def test_the_interval_of_the_median_follows_the_binomial_tables():
    """n = 6: 1 - 2/64 = 96.9 %; n = 5 reaches only 93.8 %; n = 10: the 2nd and the 9th value, 97.9 %."""
    assert median_interval([1, 2, 3, 4, 5]) is None
    assert median_interval([6, 5, 4, 3, 2, 1]) == (1, 6)
    assert median_interval(list(range(1, 11))) == (2, 9)


def test_the_interval_of_the_median_holds_it_as_often_as_it_says():
    import random

    chance, rng = 0, random.Random(0)
    for _ in range(2000):
        low, high = median_interval([rng.lognormvariate(0, 1) for _ in range(12)])
        chance += low <= 1.0 <= high  # the median of this distribution is exp(0)
    assert chance / 2000 >= 0.95 - 3 * (0.05 * 0.95 / 2000) ** 0.5


def test_a_cold_first_sample_is_flagged_with_what_to_type():
    said = cold_warning([3.0, 1.0, 1.0, 1.1], "timed prefill", warmup=1)
    assert "3.0x" in said and "try --warmup 3" in said
    assert cold_warning([1.2, 1.0, 1.0], "x", 1) is None


def test_unsteady_samples_are_flagged_and_steady_ones_are_not():
    rng = NormalDist(100, 1).samples(50, seed=1)
    assert unsteady_warning(rng, "decode", 6) is None
    said = unsteady_warning([100, 140, 100, 140, 90, 150], "decode", 6)
    assert "decode is unsteady" in said and "--runs 12" in said


def test_what_was_not_measured_is_a_dash_and_never_zero():
    assert (number(None), ms(None), ms(0.0)) == ("–", "–", "0.0")


def test_tables_are_markdown_and_aligned_also_with_chinese():
    text = table([("name", "left"), ("ms", "right")], [("预填充", "1.0"), ("decode", "12.5")])
    assert text == (
        "| name   |   ms |\n"
        "|:-------|-----:|\n"
        "| 预填充 |  1.0 |\n"
        "| decode | 12.5 |"
    )  # fmt: skip


def test_blocks_show_every_sample_on_a_common_scale():
    assert blocks([0, 1, 2, 7], 0, 7) == "▁▂▃█"
    assert blocks([1, 1], 1, 1) == "▁▁"
    assert blocks([-5, 99], 0, 7) == "▁█"
