"""Schedules of requests: their statistics over fixed seeds, ramps, and recorded loads with their mistakes."""

import math
from itertools import islice, pairwise
from random import Random
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from config import UserError
from lab.arrivals import LEAST_CV, MOST_CV, Arrival, Planned, gap, moments, parse_arrival, ramp, replay, schedule

SEEDS = range(20)


def gaps(kind: str, seed: int, requests: int = 2001, rate: float = 4.0) -> list[float]:
    return [b - a for a, b in pairwise(schedule(kind, requests, rate, seed))]


def test_gaps_between_poisson_arrivals_are_exponential():
    """At 5 % one seed in twenty fails by chance: five or more of twenty do so once in 400 times, and these do not."""
    failed = [seed for seed in SEEDS if kstest(gaps("poisson", seed), "expon", args=(0, 1 / 4.0)).pvalue < 0.05]
    assert len(failed) < 5


@pytest.mark.parametrize("kind", ["gamma:0.5", "gamma:2", "constant"])
def test_the_same_test_finds_gaps_that_are_not_exponential(kind: str):
    assert all(kstest(gaps(kind, seed), "expon", args=(0, 1 / 4.0)).pvalue < 1e-6 for seed in SEEDS)


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5, 4.0])
def test_gamma_gaps_have_the_coefficient_of_variation_that_was_asked(cv: float):
    pooled = [one for seed in SEEDS for one in gaps(f"gamma:{cv}", seed)]
    assert stdev(pooled) / mean(pooled) == pytest.approx(cv, rel=0.06)


@pytest.mark.parametrize("cv", [0.3, 2.5, 4.0])
def test_gaps_of_gamma_follow_its_distribution_and_not_another_of_the_same_variation(cv: float):
    """The gaps themselves: as differences of moments the smallest of them would be rounded to 0."""
    chance = Random(0)
    found = [gap(Arrival("gamma", cv), 4.0, chance) for _ in range(5000)]
    assert kstest(found, "gamma", args=(cv**-2, 0, cv**2 / 4.0)).pvalue > 0.05


@pytest.mark.parametrize("kind", ["poisson", "gamma:0.3", "gamma:2.5", "constant"])
def test_the_mean_rate_is_the_one_asked(kind: str):
    pooled = [one for seed in SEEDS for one in gaps(kind, seed)]
    cv = parse_arrival(kind).cv
    # Four standard errors of a mean of 40,000 gaps.
    assert mean(pooled) == pytest.approx(0.25, rel=4 * cv / math.sqrt(len(pooled)) + 1e-9)


def test_constant_arrivals_are_multiples_of_one_gap_to_the_last_bit():
    """A sum of gaps would drift: ten thousand times 0.1 is not 1000 in floating point."""
    assert schedule("constant", 10_001, 10.0, seed=7) == [i / 10 for i in range(10_001)]


def test_gamma_of_one_is_poisson_itself_and_a_burst_comes_at_once():
    assert schedule("gamma:1", 50, 3.0, 5) == schedule("poisson", 50, 3.0, 5)
    assert schedule("burst", 3, 3.0, 5) == [0.0] * 3


@pytest.mark.parametrize("kind", ["poisson", "gamma:2.5"])
def test_a_seed_gives_its_schedule_again_and_another_seed_another(kind: str):
    assert schedule(kind, 20, 2.0, 1) == schedule(kind, 20, 2.0, 1) != schedule(kind, 20, 2.0, 2)
    assert list(islice(moments(kind, 2.0, 1), 20)) == schedule(kind, 20, 2.0, 1)


@given(
    kind=st.sampled_from(["poisson", "constant", "burst", "gamma:0.2", "gamma:3"]),
    requests=st.integers(0, 50),
    rate=st.floats(0.01, 1e4),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_schedule_begins_at_zero_never_goes_back_and_has_every_request(kind, requests, rate, seed):
    dues = schedule(kind, requests, rate, seed)
    assert len(dues) == requests and dues == sorted(dues) and all(map(math.isfinite, dues))
    assert dues[:1] in ([], [0.0])


# ---- what is typed


@given(st.floats(LEAST_CV, MOST_CV))
def test_every_allowed_coefficient_of_variation_is_read_as_written(cv: float):
    assert parse_arrival(f"gamma:{cv!r}") == Arrival("gamma", cv)


@given(st.text() | st.text(alphabet="0123456789.-+einfa_ ").map("gamma:".__add__))
def test_whatever_is_typed_is_read_or_told_in_one_sentence(text: str):
    try:
        arrival = parse_arrival(text)
    except UserError as error:
        assert str(error).endswith(".")
    else:
        assert arrival.kind in ("poisson", "constant", "burst") or LEAST_CV <= arrival.cv <= MOST_CV


@pytest.mark.parametrize("text", ["", "gamma", "gamma:", "gamma:x", "gamma:0", "gamma:-1", "gamma:nan", "gamma:inf",
                                  "Poisson", "poisson:2", "gamma:2:3"])  # fmt: skip
def test_what_is_no_arrival_is_refused(text: str):
    with pytest.raises(UserError, match=r"gamma"):
        parse_arrival(text)


# ---- ramps


@pytest.mark.parametrize(("start", "end"), [(0.0, 10.0), (10.0, 0.0), (2.0, 8.0), (5.0, 5.0)])
def test_a_ramp_has_in_every_window_the_requests_that_its_rate_gives(start: float, end: float):
    """Over 200 seeds, a window of a fifth of 100 s: 200 * its integral, within four standard deviations."""
    pooled = [moment for seed in range(200) for moment in ramp(start, end, 100.0, seed)]
    for left in range(0, 100, 20):
        expected = 200 * 20 * (start + (end - start) * (left + 10) / 100)
        found = sum(left <= moment < left + 20 for moment in pooled)
        assert abs(found - expected) < 4 * math.sqrt(expected)


def test_counts_of_a_ramp_spread_as_those_of_independent_users_do():
    """Variance = mean in a Poisson process: 500 requests, so a standard deviation of 22, over 200 seeds."""
    counts = [len(ramp(0.0, 10.0, 100.0, seed)) for seed in range(200)]
    assert stdev(counts) == pytest.approx(math.sqrt(500), rel=0.2)


def test_an_even_ramp_worked_out_by_hand():
    """From 0 to 2 requests/s in 4 s: t**2 / 4 requests are due by t, so the first four at 2, sqrt(8), sqrt(12), 4."""
    assert ramp(0.0, 2.0, 4.0, 0, "constant") == pytest.approx([2, math.sqrt(8), math.sqrt(12), 4])


@given(
    rates=st.tuples(st.floats(0, 50), st.floats(0, 50)).filter(lambda r: max(r) > 0.01),
    duration=st.floats(0.1, 20),
    kind=st.sampled_from(["poisson", "constant", "gamma:2"]),
)
def test_a_ramp_stays_in_its_time_and_never_goes_back(rates, duration, kind):
    dues = ramp(*rates, duration, 3, kind)
    assert dues == sorted(dues) and all(0 <= due <= duration for due in dues)


@pytest.mark.parametrize("given", [(-1.0, 2.0, 3.0), (0.0, 0.0, 3.0), (1.0, 2.0, 0.0), (1.0, math.nan, 3.0),
                                   (math.nan, 1.0, 3.0), (1.0, 2.0, math.inf), (1.0, math.inf, 3.0)])  # fmt: skip
def test_what_is_no_ramp_is_refused(given):
    with pytest.raises(UserError, match="A ramp goes from"):
        ramp(*given, seed=0)


def test_a_burst_is_no_ramp():
    with pytest.raises(UserError, match="A burst has no rate"):
        ramp(1.0, 2.0, 3.0, 0, "burst")


# ---- recorded loads

GOOD = [Planned(0.0, 12, 3), Planned(0.0, 1, 1), Planned(2.5, 400, 64)]


@pytest.mark.parametrize("text", [
    '{"at": 0, "prompt_tokens": 12, "new_tokens": 3}\n\n{"at": 0, "prompt_tokens": 1, "new_tokens": 1, "user": "x"}\n'
    '{"new_tokens": 64, "prompt_tokens": 400.0, "at": 2.5}',
    "at,prompt_tokens,new_tokens\n0,12,3\n0,1,1\n\n2.5,400,64\n",
    "\ufeffuser, new_tokens, at, prompt_tokens\r\nx, 3, 0, 12\r\ny, 1, 0.0, 1\r\nz, 64, 25e-1, 400\r\n",
])  # fmt: skip
def test_a_recorded_load_is_read_in_both_forms(tmp_path, text: str):
    file = tmp_path / "load"
    file.write_bytes(text.encode())
    assert replay(file) == GOOD


CSV, JSON = "at,prompt_tokens,new_tokens\n", '{"at": 1, "prompt_tokens": 2, "new_tokens": 3}\n'


@pytest.mark.parametrize(("text", "said"), [
    ("", "holds no requests"),
    (" \n\n", "holds no requests"),
    (CSV, "holds no requests"),
    ("1,2,3\n", "line 1 names no column"),
    (CSV + "2,1,1\n1,1,1\n", "line 3: at goes back from 2 to 1"),
    (JSON + JSON.replace("1", "0.5"), "line 2: at goes back from 1 to 0.5"),
    (CSV + "-1,1,1\n", "line 2: at is -1"),
    (CSV + "1700000000,1,1\n", "line 2: at is 1.7e"),
    (CSV + "nan,1,1\n", "line 2: at is nan"),
    (CSV + "0,-3,1\n", "line 2: prompt_tokens is -3"),
    (CSV + "0,3,0\n", "line 2: new_tokens is 0"),
    (CSV + "0,2.5,1\n", "line 2: prompt_tokens is 2.5"),
    (CSV + "0,inf,1\n", "line 2: prompt_tokens is inf"),
    (CSV + "soon,1,1\n", "line 2: at is 'soon', which is no number"),
    (CSV + "0,1\n", "line 2 has no new_tokens"),
    (JSON + "{", "line 2 is no JSON"),
    (JSON + "[1]", "line 2 is no JSON object"),
    ('{"at": 1, "prompt_tokens": 2}', "line 1 has no new_tokens"),
    ('{"at": true, "prompt_tokens": 2, "new_tokens": 1}', "line 1: at is 'True'"),
    ('{"at": 0, "prompt_tokens": [2], "new_tokens": 1}', "line 1: prompt_tokens is '\\[2\\]'"),
])  # fmt: skip
def test_a_mistake_in_a_recorded_load_names_the_file_and_the_line(tmp_path, text: str, said: str):
    file = tmp_path / "load"
    file.write_text(text)
    with pytest.raises(UserError, match=said) as found:
        replay(file)
    assert str(file) in str(found.value) and str(found.value).endswith(".")


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        replay(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no UTF-8 text"):
        replay(tmp_path / "binary")


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: (CSV + text).encode()))
def test_any_bytes_are_a_recorded_load_or_one_sentence(tmp_path_factory, data: bytes):
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_bytes(data)
    try:
        assert replay(file)
    except UserError as error:
        assert str(error).endswith(".")
