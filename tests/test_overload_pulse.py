"""The overload's pulse: what is said of rounds whose truth is known, and once against a real service."""

from math import inf

import pytest

from experiments import overload_pulse
from lab import pulse_figures, pulse_model, pulse_plots, pulse_tables, pulse_words
from lab.pulse_model import Model
from lab.records import read_lines
from weights import tiny

BEGIN_S, END_S, LAST_S = 20.0, 30.0, 60.0
CAPACITY = {"slots": 4, "queue": 8, "decode_tokens_per_s_alone": 100.0, "decode_tokens_per_s": 200.0,
            "prefill_tokens_per_s": 1000.0}  # fmt: skip


def one(due: float, ttft: float = 0.1, kind: str = "served") -> dict:
    good = kind == "served"
    return {"due": due, "end": due + (2 * ttft if good else 0.01), "ttft": ttft if good else None,
            "e2e": 2 * ttft if good else None, "kind": kind}  # fmt: skip


def a_round(slow_s: float = 4.0, refused_s: float = 1.0) -> dict:
    """Ten a second, all alike; in the pulse thirty, of whom two in three are refused; it lingers for a while."""
    steady = [i / 10 for i in range(int(LAST_S * 10)) if not BEGIN_S <= i / 10 < END_S]
    requests = [
        one(due, kind="503 requests") if END_S <= due < END_S + refused_s
        else one(due, 2.0 if END_S <= due < END_S + slow_s else 0.1) for due in steady
    ]  # fmt: skip
    rush = [one(BEGIN_S + i / 30, 2.0, "served" if i % 3 == 0 else "503 requests") for i in range(300)]
    looks = [{"at": float(i), "running": 4, "waiting": 8 if BEGIN_S < i < END_S else 0} for i in range(60)]
    return {"requests": requests + rush, "looks": looks}


def a_record(count: int = 6, **more) -> dict:
    config = {"max_running": 4, "prompt_tokens": 32, "max_new_tokens": 16, "pulse": 3.0}
    return {"rounds": [a_round(**more) for _ in range(count)], "pulse_begin_s": BEGIN_S, "pulse_end_s": END_S,
            "round_s": LAST_S, "capacity_per_s": 12.0, "rate_per_s": 10.0, "capacity_after": CAPACITY,
            "config": config}  # fmt: skip


def test_recovery_is_when_those_who_come_are_served_as_those_before():
    record = a_record(slow_s=4.0)
    assert pulse_words.recoveries(record) == [4.0] * 6
    found = pulse_words.recovery(record)
    assert found.holds is True and found.measured.startswith("median 4.0 s [4.0, 4.0]")


def test_a_service_that_refuses_for_longer_than_it_is_slow_has_not_recovered():
    assert pulse_words.recoveries(a_record(slow_s=1.0, refused_s=6.0)) == [6.0] * 6


def test_slowness_that_does_not_end_is_no_recovery_and_the_limit_fails():
    record = a_record(slow_s=100.0)
    assert pulse_words.recoveries(record) == [inf] * 6
    assert pulse_words.recovery(record).holds is False
    assert "not in this run" in pulse_tables.recovery_table(record)


def test_twelve_seconds_are_too_long_and_five_rounds_too_few():
    assert pulse_words.recovery(a_record(slow_s=12.0)).holds is False
    assert pulse_words.recovery(a_record(count=5)).holds is None


def test_answers_in_the_overload_are_held_against_the_capacity():
    found = pulse_words.kept_up(a_record())
    assert found.holds is False and found.measured.startswith("52%")  # who is due in the last 4 s ends later
    assert pulse_words.kept_up(a_record() | {"capacity_per_s": 6.5}).holds is True


def test_targets_are_certified_by_their_number_and_not_before():
    half, most, served = pulse_words.targets(a_record(count=1))
    assert half.holds is True and most.holds is None and "too few to certify" in most.measured  # 300 answers
    half, most, served = pulse_words.targets(a_record())
    assert (half.holds, most.holds) == (True, True)
    assert served.holds is None  # 2,100 of 2,100: not yet 99.9 %
    assert pulse_words.availability(0, 4000).holds is True
    assert pulse_words.availability(40, 4000).holds is False


def test_an_interval_of_a_percentile_holds_it_and_needs_samples_above_it():
    samples = [float(i) for i in range(1, 1001)]
    low, high = pulse_figures.quantile_interval(samples, 50)
    assert low < 500 < high and high - low < 80
    low, high = pulse_figures.quantile_interval(samples, 99)
    assert 980 < low < 990 < high < 1000
    assert pulse_figures.quantile_interval(samples[:200], 99) is None


def test_a_share_needs_as_many_requests_as_the_binomial_says():
    assert 3600 < pulse_figures.requests_needed(0.999) < 3800  # two-sided: ln(0.025) / ln(0.999)


def test_the_barest_batching_has_waits_that_can_be_reckoned_by_hand():
    model = Model.of(CAPACITY, prompt=10, new=4)  # a step: 10 ms alone, 20 ms for four; a prompt takes 10 ms
    assert pulse_model.waits(model, [0.0]) == pytest.approx([0.05])  # 10 + 10 for the prompt, then three of 10 ms
    assert model.least_s == pytest.approx(0.05)
    burst = pulse_model.waits(model, [0.0] * 14)
    assert burst[:4] == pytest.approx([0.06 + 0.06] * 4)  # four prompts and 20 ms, then three of 20 ms
    assert burst[12:] == [None, None]  # four slots and eight places


def test_the_rate_at_which_a_limit_would_hold_is_found():
    model = Model.of(CAPACITY, prompt=10, new=4)
    assert pulse_model.rate_for(model, 50, 0.04, most=20.0) == 0.0  # an answer alone takes longer
    assert pulse_model.rate_for(model, 50, 10.0, most=20.0) == 20.0
    rate = pulse_model.rate_for(model, 99, 0.2, most=60.0)
    assert 0 < rate < 60
    assert pulse_model.foretold(model, rate, 99) < 0.2 <= pulse_model.foretold(model, 1.1 * rate, 99)


def test_what_a_missed_target_needs_is_said():
    record = a_record()
    found = pulse_words.judged(record)
    missed = [*found[:2], *(type(one)(one.what, one.limit, one.measured, False) for one in found[2:4]), found[4]]
    said = "\n".join(pulse_words.sentences(record, missed))
    assert "p50 of whole answers < 0.5 s: simulated to hold up to" in said
    assert "in 4.0 s; in 10 s a queue of 20" in said  # 8 places at 2 requests/s to spare
    assert "more requests without a failure would show it" in said


def test_the_tables_hold_what_happened():
    record = a_record()
    shown = "\n".join(pulse_tables.sections(record, pulse_words.judged(record)))
    for told in ("| overload ", "503 requests", "recovered after (s)", "p99 of whole answers"):
        assert told in shown


def test_the_picture_is_drawn_from_the_record(tmp_path):
    record = a_record() | {"id": "pulse-1", "model": {"name": "tiny"}}
    assert "pulse-1-pulse.png" in pulse_plots.draw(record, tmp_path)
    assert (tmp_path / "pulse-1-pulse.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_pulse_on_a_real_service_is_measured_and_kept(tmp_path, capsys, monkeypatch):
    folder = tiny.checkpoint(tmp_path / "tiny", 512)
    monkeypatch.setenv("LLM_INFER_THREADS", "1")
    file = tmp_path / "pulse.jsonl"
    argv = ["--before", "8", "--seconds", "2", "--after", "12", "--rounds", "1", "--capacity-s", "2", "--pulse", "4"]
    assert overload_pulse.main([*argv, "--model", str(folder), "--json", str(file)]) == 0
    assert "### How soon it was what it was" in capsys.readouterr().out
    (record,) = read_lines(file)
    (only,) = record["rounds"]
    kinds = {one["kind"] for one in only["requests"]}
    assert "served" in kinds and kinds <= {"served", "503 requests", "503 wait"}
    assert record["capacity_after"]["slots"] == 16 and any(look["running"] is not None for look in only["looks"])
