"""The self-check finds a client that reports what is, and every way in which one may not."""

from dataclasses import replace
from functools import partial

import pytest

from lab.client import closed_loop, open_loop
from load import selfcheck
from load.connection import Served
from load.script import Script
from load.selfcheck import Case, Row, check, checks_table, scripted, sentence, truth

pytestmark = pytest.mark.slow

CASE = Case("small", Script(first_s=0.02, gap_s=0.005, per_chunk=2), requests=4, new_tokens=8)
CLOSED = partial(closed_loop, clients=2)


def test_the_truth_of_stamps_made_by_hand():
    served = [
        Served("/", 0.0, 3, 200, [0.05, 0.06, 0.08], [1, 2, 1], 0.09),
        Served("/", 1.0, 3, 200, [1.07, 1.09, 1.12], [1, 2, 1], 1.13),
    ]
    assert truth(served) == pytest.approx(
        {
            "TTFT p50": 0.05,
            "TPOT p50": 0.01,
            "ITL p50": 0.02,
            "E2E p50": 0.08,
            "tokens/s": 8 / 1.12,
            "requests/s": 2 / 1.12,
        }
    )


def test_what_the_script_says_of_one_request():
    case = Case("by hand", Script(first_s=0.05, gap_s=0.02, per_chunk=4), new_tokens=32)
    expected = {"TTFT p50": 0.05, "TPOT p50": 0.14 / 31, "ITL p50": 0.02, "E2E p50": 0.19}
    assert scripted(case) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("true", "reported", "rate", "holds"),
    [(0.05, 0.0509, False, True), (0.05, 0.0489, False, False), (0.5, 0.5049, False, True), (0.5, 0.5051, False, False),
     (0.05, None, False, False), (100.0, 100.9, True, True), (100.0, 98.9, True, False), (0.05, 0.0509, True, False)],
)  # fmt: skip
def test_a_row_holds_within_a_millisecond_or_a_hundredth_and_a_rate_within_a_hundredth(true, reported, rate, holds):
    assert Row("", "", None, true, reported, rate).holds is holds


@pytest.mark.parametrize(
    "measure", [CLOSED, lambda url, bodies: open_loop(url, bodies, [0.03 * i for i in range(len(bodies))])]
)
def test_every_figure_of_a_plain_client_is_near_the_truth(measure):
    """Near by what a busy machine allows; how near it really is, the table says."""
    found = check(measure, [CASE, replace(CASE, script=replace(CASE.script, queue_s=0.01))])
    names = ["TTFT p50", "TPOT p50", "ITL p50", "E2E p50", "tokens/s", "requests/s"]
    assert [row.figure for row in found] == [*names, *names[:4], "queue p50", *names[4:]]
    assert all(row.reported is not None for row in found)
    assert all(abs(row.difference) < (row.true / 2 if row.rate else 0.1) for row in found)
    assert all(row.true >= row.scripted for row in found if row.figure in ("TTFT p50", "E2E p50")), "never early"
    assert next(row for row in found if row.figure == "queue p50").difference == pytest.approx(0.0, abs=1e-5)


def test_a_client_that_is_late_to_read_is_found_out():
    """Its TTFT and E2E are off by what it slept; the gaps between its pieces tell nothing of that."""

    def late(url, bodies):
        traces = CLOSED(url, bodies)
        for trace in traces:
            trace.pieces = [(moment + 0.1, piece) for moment, piece in trace.pieces]
        return traces

    found = check(late, [CASE])
    assert {"TTFT p50", "E2E p50"} <= {row.figure for row in found if not row.holds}
    by = {row.figure: row.difference for row in found}
    assert by["TTFT p50"] >= 0.1 and by["E2E p50"] >= 0.1


def test_requests_that_never_came_are_no_result():
    with pytest.raises(RuntimeError, match="4 requests were to be sent, and 3 came"):
        check(lambda url, bodies: CLOSED(url, bodies[:3]), [CASE])


def test_no_two_prompts_are_alike():
    prompts = [body["messages"][0]["content"] for body in selfcheck.bodies(CASE)]
    assert len(set(prompts)) == CASE.requests


def test_the_standard_cases_take_seconds():
    for case in selfcheck.CASES:
        assert case.requests * scripted(case)["E2E p50"] < 10
        assert case.requests >= 8 and case.new_tokens > case.script.per_chunk


def test_the_table_and_its_sentence():
    rows = [
        Row("first 50 ms", "TTFT p50", 0.05, 0.0501, 0.0505),
        Row("first 50 ms", "tokens/s", None, 100.0, 97.5, rate=True),
        Row("queue", "queue p50", 0.03, 0.03, None),
    ]
    assert checks_table(rows) == "\n".join(
        [
            "| server      | figure    |   scripted |      true |   reported |   difference | within 1 ms or 1 %   |",
            "|:------------|:----------|-----------:|----------:|-----------:|-------------:|:---------------------|",
            "| first 50 ms | TTFT p50  |  50.000 ms | 50.100 ms |  50.500 ms |     0.400 ms | yes                  |",
            "| first 50 ms | tokens    |          – |  100.00/s |    97.50/s |      -2.50/s | NO                   |",
            "| queue       | queue p50 |  30.000 ms | 30.000 ms |          – |            – | NO                   |",
        ]
    )
    assert sentence(rows[:1]) == "All 1 figures are within 1 ms or 1 % of what the servers did."
    assert sentence(rows) == ("2 of 3 figures are off: tokens/s of 'first 50 ms' (-2.50/s), queue p50 of 'queue' (–).")
