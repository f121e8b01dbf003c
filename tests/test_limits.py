"""Rate limits without sockets: what a key may draw, what it is told, and when it may come back."""

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.errors import ApiError
from service.limits import MINUTE_S, Bucket, RateLimits, duration

MOST = 600  # tokens a minute


def rates(**wishes: int) -> tuple[RateLimits, list[float]]:
    """Limits, and their clock's hands."""
    now = [0.0]
    return RateLimits(wishes.get("requests", 0), wishes.get("tokens", 0), lambda: now[0]), now


@given(st.lists(st.tuples(st.floats(0, 90), st.integers(1, MOST), st.floats(0, 1)), max_size=30))
@example([(0, MOST, 1), (60, MOST, 0), (0, MOST, 0)])
def test_no_window_of_time_holds_more_than_its_share(asked):
    """From any moment to any later one: at most a full bucket and what flows in, less what is given back in between."""
    limits, now = rates(tokens=MOST)
    moves, unused = [], 0.0  # (when, what was drawn or given back)
    for wait_s, amount, share in asked:
        now[0] += wait_s
        limits.give_back("key", "tokens", unused)
        moves.append((now[0], -unused))
        unused = 0.0
        with contextlib.suppress(ApiError):
            limits.draw("key", amount)
            moves.append((now[0], amount))
            unused = amount * share
    for first, (start_s, _) in enumerate(moves):
        drawn = 0.0
        for when_s, amount in moves[first:]:
            drawn += amount
            assert drawn <= MOST * (1 + (when_s - start_s) / MINUTE_S) + 1e-6


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, MOST + 50)), min_size=1, max_size=40))
@example([(0.0, 600), (0.0104, 1)])
@example([(0.0, 1)] * 7 + [(0.0, 601)])
@example([(0.0, 1)] * 6 + [(0.0, 80), (0.0, 600)])
def test_who_comes_back_when_told_to_is_let_in(asked):
    """And a refusal takes nothing: neither of the two buckets."""
    limits, now = rates(requests=7, tokens=MOST)
    for wait_s, amount in asked:
        now[0] += wait_s
        before = [limits.bucket("key", what).level for what in limits.most]
        try:
            limits.draw("key", amount)
            continue
        except ApiError as error:
            refusal = error
        assert (refusal.status, refusal.outcome) == (429, "rate_limited")
        assert [limits.bucket("key", what).level for what in limits.most] == before
        if amount > MOST:
            assert not refusal.retry and refusal.retry_after_s is None
        else:
            assert int(refusal.all_headers["retry-after"]) * 1e3 >= int(refusal.all_headers["retry-after-ms"])
            now[0] += int(refusal.all_headers["retry-after-ms"]) / 1e3 + 1e-9
            limits.draw("key", amount)


def test_keys_have_buckets_of_their_own_and_only_what_is_limited_has_one():
    limits, now = rates(requests=1)
    limits.draw("a", 10**9)
    limits.draw("b", 1)
    with pytest.raises(ApiError):
        limits.draw("a", 1)
    assert set(limits.buckets) == {("a", "requests"), ("b", "requests")}
    assert {name.rsplit("-", 1)[1] for name in limits.headers("a")} == {"requests"}
    now[0] -= 1000  # a clock that is set back gives nothing
    with pytest.raises(ApiError):
        limits.draw("a", 1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.25, "250ms"), (0.999, "999ms"), (1, "1s"), (12.4, "12s"), (59.7, "1m0s"), (360, "6m0s")],
)
def test_durations_read_as_openai_writes_them(seconds: float, text: str):
    assert duration(seconds) == text


# ---- worked out by hand


def test_a_bucket_fills_evenly_up_to_its_edge():
    bucket = Bucket(600, 100.0)
    assert (bucket.level, bucket.reset_s, bucket.wait_s(600)) == (600, 0.0, 0.0)
    bucket.level -= 300
    assert (bucket.reset_s, bucket.wait_s(300), bucket.wait_s(301), bucket.wait_s(600)) == (30.0, 0.0, 0.1, 30.0)
    assert bucket.wait_s(600.5) == float("inf")
    assert bucket.at(101.0) is bucket and bucket.level == 310
    assert bucket.at(101.0).level == 310, "the same moment again gives nothing"
    assert bucket.at(104.0).level == 340
    bucket.level = -60
    assert (bucket.reset_s, bucket.wait_s(0)) == (66.0, 6.0)
    assert bucket.at(1000.0).level == 600


def test_what_is_drawn_and_given_back_to_the_token():
    limits, now = rates(requests=3, tokens=600)
    limits.draw("key", 250)
    level = {what: limits.bucket("key", what).level for what in limits.most}
    assert level == {"requests": 2, "tokens": 350}
    limits.give_back("key", "tokens", 50)
    assert limits.bucket("key", "tokens").level == 400
    limits.give_back("key", "tokens", -500)
    assert limits.bucket("key", "tokens").level == -100, "more was used than was estimated"
    limits.give_back("key", "tokens", 10_000)
    assert limits.bucket("key", "tokens").level == 600, "and never more than a full bucket"
    now[0] = 20.0
    assert limits.bucket("key", "requests").level == 3


def test_headers_are_openais_to_the_letter():
    limits, now = rates(requests=3, tokens=600)
    assert limits.known_headers("key") == {} == limits.buckets
    limits.draw("key", 250)
    now[0] = 1.55
    told = {
        "x-ratelimit-limit-requests": "3", "x-ratelimit-remaining-requests": "2", "x-ratelimit-reset-requests": "18s",
        "x-ratelimit-limit-tokens": "600", "x-ratelimit-remaining-tokens": "365", "x-ratelimit-reset-tokens": "23s",
    }  # fmt: skip
    assert limits.headers("key") == limits.known_headers("key") == told
    assert limits.known_headers("other") == {}
    limits.give_back("key", "tokens", -500)
    assert limits.headers("key")["x-ratelimit-remaining-tokens"] == "0", "less than nothing is nothing"
    tokens_only, _ = rates(tokens=600)
    tokens_only.draw("key", 1)
    assert tokens_only.known_headers("key").keys() == {name for name in told if name.endswith("tokens")}


def test_an_error_is_told_with_the_limits_of_its_key_and_stays_as_it_was():
    limits, _ = rates(requests=3)
    limits.draw("key", 1)
    error = ApiError(503, "server_overloaded", "Full.", headers={"x-degraded": "none"})
    assert limits.told_with(error, "key").headers == limits.headers("key") | {"x-degraded": "none"}
    assert limits.told_with(error, "another").headers == error.headers == {"x-degraded": "none"}
    assert limits.told_with(error, "key").message == "Full."


def refusal(limits: RateLimits, tokens: int) -> ApiError:
    with pytest.raises(ApiError) as why:
        limits.draw("key", tokens)
    return why.value


def test_a_refusal_tells_which_limit_how_long_and_what_is_left():
    limits, _ = rates(requests=2, tokens=600)
    limits.draw("key", 600)
    error = refusal(limits, 100)
    assert (error.status, error.code, error.outcome) == (429, "rate_limit_exceeded", "rate_limited")
    assert error.message == "This key may have 600 tokens a minute and this request asks for 100: try again in 10.0 s."
    assert (error.retry, error.retry_after_s) == (True, 10.0) and error.headers == limits.headers("key")
    limits.give_back("key", "tokens", 600)
    limits.draw("key", 0)
    error = refusal(limits, 1)
    assert error.message == "This key may have 2 requests a minute: try again in 30.0 s."
    assert error.retry_after_s == 30.0


def test_of_both_limits_the_longer_wait_is_told():
    limits, _ = rates(requests=1, tokens=600)
    limits.draw("key", 600)
    assert refusal(limits, 599).retry_after_s == 60.0, "requests: tokens would be there in 59.9 s"
    assert "requests a minute" in refusal(limits, 599).message
    limits.give_back("key", "tokens", -60)
    error = refusal(limits, 590)
    assert (error.retry_after_s, "tokens a minute" in error.message) == (65.0, True)


def test_what_no_minute_ever_gives_is_refused_for_good():
    limits, _ = rates(tokens=600)
    error = refusal(limits, 601)
    assert error.message == (
        "This key may have 600 tokens a minute and this request asks for 601: ask for less, it can never be served so."
    )
    assert (error.retry, error.retry_after_s) == (False, None)
    limits.draw("key", 600)


def test_without_limits_everything_may_be_drawn_and_nothing_is_kept():
    limits, _ = rates()
    limits.draw("key", 10**9)
    limits.give_back("key", "tokens", 5)
    assert limits.bucket("key", "requests") is None is limits.bucket("key", "tokens")
    assert limits.headers("key") == {} == limits.buckets


def test_time_between_looks_counts_once_for_each_key():
    limits, now = rates(tokens=600)
    limits.draw("a", 600)
    now[0] = 6.0
    limits.draw("b", 600)
    now[0] = 12.0
    assert (limits.bucket("a", "tokens").level, limits.bucket("b", "tokens").level) == (120, 60)
    assert limits.bucket("a", "tokens") is limits.buckets["a", "tokens"]
