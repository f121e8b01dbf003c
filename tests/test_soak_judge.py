"""What a soak's judge says of series whose truth is known: it finds a leak in the noise, and accuses nobody else."""

import numpy as np
import pytest

from lab import soak_judge
from lab.soak_judge import MIB

HOURS, EVERY_S = 2.0, 10.0


def looks(leak_mib_per_hour: float, noise: str = "white", seed: int = 0, hours: float = HOURS) -> list[dict]:
    """Memory over two hours. white: every look by itself; waves: what comes, stays for minutes."""
    dice, count = np.random.default_rng(seed), round(hours * 3600 / EVERY_S)
    wild = dice.normal(0, 1.0 if noise == "white" else 0.15, count)
    if noise == "waves":
        for i in range(1, count):
            wild[i] += 0.95 * wild[i - 1]
    at = np.arange(count) * EVERY_S
    sizes = (200 + leak_mib_per_hour * at / 3600 + wild) * MIB
    return [{"at": float(a), "bytes": float(b)} for a, b in zip(at, sizes, strict=True)]


def lap(p99: float, anchor_s: float = 0.01) -> dict:
    figure = {"p50": p99 / 3, "p99": p99, "n": 1000, "certified": ["p50", "p99"]}
    return {"ttft_s": figure, "e2e_s": figure, "anchor_s": anchor_s}


def rest(at: float = 0.0, **other: int) -> dict:
    found = {"ok": True, "files": 10, "threads": 7, "tasks": 4, "written": 100, "doubtful": 0, "scrape_s": 0.01}
    return {"at": at, "broken": [], "outcomes": {"ok": 90, "cancelled": 10}} | found | other


@pytest.mark.parametrize("noise", ["white", "waves"])
@pytest.mark.parametrize("seed", range(5))
def test_a_leak_of_five_mib_an_hour_is_found_in_the_noise(noise, seed):
    assert soak_judge.memory(looks(5.0, noise, seed)).holds is False


@pytest.mark.parametrize("noise", ["white", "waves"])
@pytest.mark.parametrize("seed", range(5))
def test_memory_that_only_wavers_is_no_leak(noise, seed):
    assert soak_judge.memory(looks(0.0, noise, seed)).holds is not False
    assert soak_judge.memory(looks(0.0, "white", seed)).holds is True


def test_growth_that_lies_on_the_limit_gets_no_verdict():
    assert [soak_judge.memory(looks(1.0, "waves", seed)).holds for seed in range(8)].count(None) >= 5


def test_a_single_peak_moves_no_slope():
    found = looks(0.0)
    found[-1]["bytes"] += 500 * MIB
    assert soak_judge.memory(found).holds is True


def test_a_short_run_proves_nothing_but_a_large_leak():
    assert soak_judge.memory(looks(0.0, hours=0.1)).holds is None
    assert (
        "too short, give it 20 min" in soak_judge.memory(looks(20.0, hours=0.1)).measured
    )  # 2 MiB: a cache may be that
    assert soak_judge.memory(looks(200.0, hours=0.1)).holds is False  # 20 MiB in six minutes


def test_too_few_looks_are_no_series():
    found = soak_judge.memory(looks(5.0)[:5])
    assert found.holds is None and found.measured == "5 looks; 12 are needed"


def pairs(ratio: float, noise: float, count: int = 12, seed: int = 0) -> list[dict]:
    """A machine that becomes half as fast again meanwhile, and a service that is so many times as slow as a new one."""
    dice = np.random.default_rng(seed)
    found = []
    for i in range(count):
        old, new = np.exp(dice.normal(0, noise, 2)) * 0.1 * (1 + 0.5 * i / count)
        found.append({"old": lap(ratio * float(old)), "new": lap(float(new))})
    return found


def test_a_service_that_is_a_third_slower_than_a_new_one_has_aged_whatever_the_machine_did():
    assert soak_judge.aged(pairs(1.0, 0.03), "ttft_s").holds is True
    assert soak_judge.aged(pairs(1.3, 0.03), "ttft_s").holds is False


def test_wild_latencies_get_no_verdict_and_are_told_how_many_more_pairs_there_must_be():
    found = [soak_judge.aged(pairs(1.0, 0.8, seed=seed), "e2e_s") for seed in range(100, 120)]
    open_ones = [one for one in found if one.holds is None]
    assert len(open_ones) >= 17 and all("more rounds" in one.measured for one in open_ones)


def test_without_a_new_service_or_without_answers_there_is_no_verdict():
    assert soak_judge.aged([], "e2e_s").holds is None
    found = pairs(1.0, 0.03)
    found[3]["new"]["e2e_s"] = None
    assert soak_judge.aged(found, "e2e_s").measured == "in 1 of 12 pairs of laps nobody was answered"


SILENT = {"ok": False, "at": 60.0, "scrape_s": 5.0}


def record_of(**other) -> dict:
    return {
        "laps": [lap(0.1) for _ in range(5)], "looks": [rest() | one for one in looks(0.0)], "ready_s": 0.0,
        "rests": [rest(), rest(60.0)], "limit_bytes_per_hour": MIB, "config": {"seed": 0}, "probes": ["a", "a"],
        "kinds": {"stream": {"answered": 50}}, "ends": {"answered": 50}, "pairs": pairs(1.0, 0.03),
    } | other  # fmt: skip


def words(record: dict) -> dict[str, bool | None]:
    return {one.what: one.holds for one in soak_judge.judged(record)}


def test_before_the_warm_up_has_ended_nothing_is_after_it():
    found = words(record_of(ready_s=None))
    assert found["RssAnon + VmSwap after the warm-up"] is None and found["open files"] is None
    assert words(record_of())["RssAnon + VmSwap after the warm-up"] is True


def test_a_service_that_ended_is_a_failure_and_so_is_one_that_does_not_answer_at_last():
    found = words(record_of(ended="it ended after 700 s: no process", rests=[rest(), SILENT]))
    assert found["the service is there to the end"] is False
    assert found["the laws of tokens, blocks and Little"] is False and found[soak_judge.ADD_UP] is True
    assert words(record_of(rests=[SILENT]))[soak_judge.ADD_UP] is None
    assert words(record_of(probes=["a", ""]))["a fixed prompt's answer (greedy), first against last"] is False


def test_a_service_that_refuses_whom_it_could_serve_is_found_out():
    """It leaves nothing behind, either, and is never slow."""
    told = "who comes outside a rush is let in"
    assert words(record_of(kinds={"stream": {"answered": 9990, "refused": 10}, "rush": {"refused": 90}}))[told] is True
    assert words(record_of(kinds={"stream": {"answered": 9980, "refused": 20}}))[told] is False
    assert words(record_of(kinds={}))[told] is False


@pytest.mark.parametrize("name", ["files", "threads", "tasks"])
def test_one_more_with_every_lap_is_a_leak_and_two_more_at_times_are_none(name):
    assert soak_judge.flat([rest(**{name: 10 + i}) for i in range(10)], name).holds is False
    assert soak_judge.flat([rest(**{name: 10 + i % 3}) for i in range(10)], name).holds is True
    assert soak_judge.flat([rest()], name).holds is None


def test_books_that_miss_a_request_do_not_add_up():
    assert soak_judge.books([rest(), rest()]).holds is True
    found = soak_judge.books([rest(), rest(60.0, written=101)])
    assert found.holds is False and "at 60 s 100 for 101" in found.measured
    assert soak_judge.books([rest(written=99)]).holds is False  # one counted twice
    assert soak_judge.books([rest(written=101, doubtful=1)]).holds is True


def test_a_broken_law_and_a_silent_service_are_told():
    assert soak_judge.laws([rest()]).holds is True
    assert soak_judge.laws([rest(), rest(broken=["little"])]).measured.startswith("broken: little")
    assert soak_judge.laws([rest(), rest(broken=["little"])]).holds is False
    assert soak_judge.laws([rest(), {"ok": False, "scrape_s": 5.0}]).holds is False


def test_ends_that_were_not_due_are_failures():
    assert soak_judge.as_expected({"answered": 90, "left": 9, "refused": 1}).holds is True
    found = soak_judge.as_expected({"answered": 90, "failed: cut": 2})
    assert found.holds is False and found.measured == "2 failed: cut"


def test_another_answer_to_the_same_prompt_is_a_failure():
    assert soak_judge.same_answer("a", "a").holds is True
    assert soak_judge.same_answer("a", "b").holds is False
    assert soak_judge.same_answer("a", None).holds is None
