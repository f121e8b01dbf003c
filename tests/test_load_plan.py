"""Which loads are run, and what is said of them: limits read exactly, words only where an interval carries them."""

import pytest

from config import UserError
from load import measures, plan, tables, words
from load.plan import Cell

CELL = Cell(4, None, None, 128, 32, 48)


def test_limits_are_read_exactly():
    assert plan.limits("ttft_p95=1.0,tpot_p50=0.1, e2e_p99=5") == [("ttft", 95, 1.0), ("tpot", 50, 0.1), ("e2e", 99, 5)]


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft_p95", "ttft=1", "ttft_p95=x", "p95=1", "ttft_p0=1", "ttft_p100=1", "ttft_p95=-1",
             "ttft_p95=0", "wait_p95=1", "ttft_p95=1,,tpot_p95=1", "ttft_p95=nan", "ttft_p95=inf", "95_ttft=1"]
)  # fmt: skip
def test_a_mixed_up_limit_is_named(text: str):
    with pytest.raises(UserError, match="is no limit: write ttft_p95"):
        plan.limits(text)


def figures(ttft: list[float], errors: dict | None = None, rate: float = 10.0) -> dict:
    return {"ttft_s": measures.spread(ttft), "tpot_s": None, "e2e_s": measures.spread(ttft), "errors": errors or {},
            "output_tokens_per_s": rate, "schedule_delay_s": None}  # fmt: skip


def test_a_limit_is_kept_only_by_what_was_measured():
    limits = plan.limits("ttft_p95=1.0")
    assert plan.keeps(figures([0.5] * 20), limits)
    assert not plan.keeps(figures([0.5] * 18 + [2.0] * 2), limits)
    assert not plan.keeps(figures([0.5] * 20, {"503": 1}), limits), "who refuses keeps no limit"
    assert not plan.keeps(figures([]), limits) and not plan.keeps(figures([0.5]), plan.limits("tpot_p95=1.0"))


def test_a_cell_says_what_it_is():
    opened = CELL.open(2.0, "poisson")
    assert (opened.load["kind"], opened.load["rate"], opened.load["concurrency"]) == ("open", 2.0, None)
    assert opened.closed(4) == CELL
    rising = Cell(None, None, "poisson", 128, 32, 9, plan.ramp_of("1:8:60"))
    assert rising.load["kind"] == "ramp" and tables.load_name(rising.load) == "open, 1 to 8/s in 60 s, poisson"


@pytest.mark.parametrize("text", ["", "1", "1:2", "a:b:c", "1:2:3:4"])
def test_a_mixed_up_ramp_is_named(text: str):
    with pytest.raises(UserError, match="is no ramp"):
        plan.ramp_of(text)


@pytest.mark.parametrize("text", ["5", "x%", "0%", "-1%", "100%", ""])
def test_a_mixed_up_precision_is_named(text: str):
    with pytest.raises(UserError, match="is no precision"):
        plan.precision_of(text)
    assert plan.precision_of("5%") == 0.05


def run(cell: Cell, rate: float, ttft: float = 0.1, **more) -> dict:
    laws = {"little": {"in_flight": 4.0, "throughput_x_latency": 4.0, "holds": True},
            "tokens": {"pieces": 10, "usage": 10, "server": 10, "holds": True}}  # fmt: skip
    return {"load": cell.load, "figures": figures([ttft] * 20, rate=rate), "laws": laws, "ended": None,
            "client": {"cpu_s": 0.1, "wall_s": 1.0}, "window": {"class": "steady"}} | more  # fmt: skip


def test_one_point_is_no_verdict_and_six_rounds_are():
    eight = CELL.closed(8)
    once = words.sentences({"runs": [run(CELL, 10.0), run(eight, 20.0)]})
    assert len(once) == 2 and "--selfcheck" in once[1] and "×2.00 (one point: no verdict" in once[0]
    runs = [run(cell, rate * wobble) for wobble in (1.0, 1.01, 0.99, 1.02, 0.98, 1.0)
            for cell, rate in ((CELL, 10.0), (eight, 20.0))]  # fmt: skip
    said = words.sentences({"runs": runs})[0]
    assert "tokens/s ×2.00 [" in said and "(n=6)" in said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"client": {"cpu_s": 0.95, "wall_s": 1.0}}, "95% of a core"),
        ({"window": {"class": "growing"}}, "ever more requests"),
        ({"ended": "over-saturated"}, "falls ever further behind"),
        ({"figures": figures([0.1], {"503": 3, "timeout": 1})}, "not answered: 3 503, 1 timeout"),
    ],
)
def test_what_makes_a_run_doubtful_is_said(more: dict, says: str):
    doubtful = run(CELL.open(2.0, "poisson"), 10.0) | more
    assert any(says in sentence for sentence in words.sentences({"runs": [doubtful]}))


def test_a_broken_law_forbids_quoting():
    made = run(CELL, 10.0)
    made["laws"]["little"]["holds"] = False
    assert "do not quote" in words.sentences({"runs": [made]})[0]


def test_a_percentile_without_its_samples_is_marked():
    few, many = measures.spread([0.1] * 20), measures.spread([0.1] * 200)
    assert (
        tables.stat(few, "p95") == "100.0°" and tables.stat(many, "p95") == "100.0" and tables.stat(None, "p95") == "–"
    )
