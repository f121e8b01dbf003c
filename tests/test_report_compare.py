"""Two load records against each other: words, factors, gates and exit statuses, on numbers known by hand."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from load_records import record, run

import report
from config import UserError
from infer import InferConfig
from lab import compare, load_runs
from lab.compare import gates_of
from lab.records import append_line, read_lines
from load_test import LoadConfig


def rounds(ttfts: list[float], **more) -> list[dict]:
    return [run(ttft=ttft, **more) for ttft in ttfts]


STEADY = [0.200, 0.201, 0.199, 0.200, 0.202, 0.198]


def row(found: compare.Comparison, figure: str) -> compare.Row:
    return next(row for row in found.rows if row.figure == figure)


def test_half_the_time_in_six_rounds_is_faster_and_the_ratio_is_b_over_a():
    found = compare.compare(record(rounds(STEADY)), record(rounds([x / 2 for x in STEADY]), 2))
    assert row(found, "ttft").verdict.word == "FASTER"
    assert row(found, "ttft").ratio == pytest.approx(0.5)
    assert row(found, "ttft").low == pytest.approx(0.5) and row(found, "ttft").high == pytest.approx(0.5)
    assert (row(found, "ttft").a, row(found, "ttft").b) == (0.2, 0.1)
    assert row(found, "tpot").verdict.word == "WITHIN NOISE"  # equal to the last digit


def test_more_throughput_is_faster_although_its_ratio_is_above_one():
    a, b = rounds(STEADY, tpot=0.1), rounds(STEADY, tpot=0.05)
    found = row(compare.compare(record(a), record(b, 2)), "throughput")
    assert found.verdict.word == "FASTER" and found.ratio > 1.5
    back = row(compare.compare(record(b), record(a, 2)), "throughput")
    assert back.verdict.word == "SLOWER" and back.ratio == pytest.approx(1 / found.ratio)


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_rounds_give_no_verdict_and_the_reason(count: int):
    found = compare.compare(record(rounds([0.2] * count)), record(rounds([0.1] * count), 2), gates_of("ttft:+5%"))
    verdict = row(found, "ttft").verdict
    assert verdict.word == "NO VERDICT" and "rounds are needed" in verdict.reason
    assert found.status == 3


def test_runs_are_compared_with_runs_of_the_same_load_only():
    a, b = [run(1, ttft=0.2), run(4, ttft=0.4)], [run(4, ttft=0.4), run(8, ttft=0.8)]
    found = compare.compare(record(a), record(b, 2))
    assert {r.load for r in found.rows} == {"4 at once · 128 + 32 tokens"}
    with pytest.raises(UserError, match="No load was run in both"):
        compare.compare(record([run(1)]), record([run(8)], 2))


def test_one_factor_is_named_and_two_refuse_the_verdict():
    fast = rounds([x / 2 for x in STEADY])
    card = record([])["card"]
    one = record(fast, 2, about={"hash": "0123456789ab", "settings": {"max_running": 32}})
    found = compare.compare(record(rounds(STEADY)), one)
    assert found.factors == ("max_running (16 → 32)",) and row(found, "ttft").verdict.word == "FASTER"
    two = one | {"card": card | {"Versions": "Python 3.12.1"}}
    found = compare.compare(record(rounds(STEADY)), two, gates_of("ttft:+5%"))
    verdict = row(found, "ttft").verdict
    assert verdict.word == "NO VERDICT" and "Versions" in verdict.reason and "max_running" in verdict.reason
    assert found.status == 3


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"prompt_set_hash": "bb22"}, "prompt set (aa11 → bb22)"),
        ({"card": {**record([])["card"], "CPU": "another"}}, "CPU (a processor → another)"),
        ({"config": {"seed": 1, "retries": 2}}, "retries (none → 2)"),
        ({"server": record([], about={"hash": "ffff00001111", "settings": {"max_running": 16}})["server"]},
         "model hash (0123456789ab → ffff00001111)"),
    ],
)  # fmt: skip
def test_every_kind_of_factor_is_seen(change: dict, name: str):
    assert compare.factors(record([run()]), record([run()], 2, **change)) == [name]


def test_where_the_record_went_and_how_long_the_server_ran_are_no_factors():
    about = {"hash": "0123456789ab", "settings": {"max_running": 16}, "uptime_s": 1.0, "kv_blocks": 8283}
    other = record([run()], 2, about=about | {"uptime_s": 9.0, "kv_blocks": 8287})
    other["config"] = {"url": "http://127.0.0.1:8001", "seed": 0, "json": "x.jsonl"}
    assert compare.factors(record([run()], about=about), other) == []


def test_what_is_no_factor_is_a_setting_of_the_scripts_whose_records_are_compared():
    known = {f.name for kind in (LoadConfig, InferConfig) for f in fields(kind)}
    assert known >= compare.NO_FACTOR
    assert known - compare.NO_FACTOR >= {"endpoint", "shared_prefix", "turns", "eos", "retries", "threads", "dtype"}


def test_failures_and_shorter_answers_void_a_verdict():
    broken = rounds([0.1] * 6)
    for one in broken:
        one["requests"][0]["ok"] = False
        for request in one["requests"]:
            request["new_tokens"] = 16
    verdict = row(compare.compare(record(rounds(STEADY)), record(broken, 2)), "ttft").verdict
    assert verdict.word == "NO VERDICT"
    assert "failed requests (0.0% → 12.5%)" in verdict.reason and "answer length (32.0 → 16.0 tokens)" in verdict.reason


@pytest.mark.parametrize("spoil", [{"ok": False}, {"new_tokens": 16}])
def test_failures_alone_and_short_answers_alone_decide_nothing_and_hold_no_gate(spoil: dict):
    spoilt = rounds([x / 2 for x in STEADY])
    for one in spoilt:
        for request in one["requests"][: None if "new_tokens" in spoil else 4]:
            request |= spoil
    found = compare.compare(record(rounds(STEADY)), record(spoilt, 2), gates_of("ttft:+5%"))
    assert row(found, "ttft").verdict.word == "NO VERDICT" and found.status == 3


def test_a_gate_is_not_held_by_what_is_left_over():
    gone = rounds(STEADY)
    for one in gone[:2]:
        one["figures"]["output_tokens_per_s"] = 0.0
    found = compare.compare(record(rounds(STEADY)), record(gone, 2), gates_of("throughput:-3%"))
    assert row(found, "throughput").verdict.reason == "not measured in both in 2 of 6 rounds" and found.status == 3
    both = [*rounds(STEADY), *(run(8, ttft=x) for x in STEADY)]
    found = compare.compare(record(both), record(rounds(STEADY), 2), gates_of("ttft:+5%"))
    assert found.status == 3 and "1 of the loads of A were not run in the other." in found.notes
    with pytest.raises(UserError, match="name two records"):
        compare.compare(record(both), record(both))


def test_a_record_with_a_part_missing_is_one_sentence(tmp_path: Path):
    torn = record([run()])
    del torn["runs"][0]["window"], torn["verdicts"]
    notes = saved(tmp_path, torn)
    with pytest.raises(UserError, match="lacks verdicts, runs"):
        load_runs.find("load_test-261122-000001", tmp_path / "results")
    with pytest.raises(UserError, match="lacks verdicts"):
        report.main(["--notes-file", str(notes)])


@pytest.mark.parametrize(
    ("factor", "spread", "status"),
    [
        (1.00, 0.00, 0),  # equal: all of the interval is inside the gate
        (1.20, 0.00, 1),  # all of it beyond
        (1.05, 0.20, 3),  # the point stands on the gate and the interval on both sides
        (1.00, 0.40, 3),  # a point inside the gate does not decide: its interval is wide
    ],
)
def test_the_gate_is_decided_by_the_interval(factor: float, spread: float, status: int):
    other = [x * factor * (1 + spread * (-1) ** i) for i, x in enumerate(STEADY)]
    found = compare.compare(record(rounds(STEADY)), record(rounds(other), 2), gates_of("ttft:+5%"))
    assert found.status == status


def test_a_fall_of_throughput_beyond_the_gate_is_worse_and_a_rise_holds():
    slow, fast = rounds(STEADY, tpot=0.1), rounds(STEADY, tpot=0.05)
    gate = gates_of("throughput:-3%")
    assert compare.compare(record(fast), record(slow, 2), gate).status == 1
    assert compare.compare(record(slow), record(fast, 2), gate).status == 0


def test_a_gated_figure_that_was_not_measured_has_no_verdict():
    silent = rounds(STEADY)
    for one in silent:
        one["figures"]["tpot_s"] = None
    found = compare.compare(record(rounds(STEADY)), record(silent, 2), gates_of("tpot_p95:+5%"))
    assert found.status == 3 and row(found, "tpot_p95").verdict.reason == "not measured in both"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("throughput", "is not understood"),
        ("throughput:-3", "is not understood"),
        ("", "is not understood"),
        ("ttft:+5%,", "is not understood"),
        ("speed:-3%", "knows no figure 'speed'"),
        ("ttft_p42:+3%", "knows no figure 'ttft_p42'"),
        ("throughput:+3%", "write throughput:-3%"),
        ("ttft:-3%", "write ttft:+3%"),
        ("ttft:3%", "write ttft:+3%"),
        ("ttft:+3%,ttft:+4%", "stands there twice"),
        ("throughput:-100%", "may not lose all"),
    ],
)
def test_mixed_up_gates_are_refused_in_one_sentence(text: str, says: str):
    with pytest.raises(UserError, match=re.escape(says)):
        gates_of(text)


def test_gates_become_the_worst_ratio_allowed():
    assert gates_of("throughput:-3%, ttft_p95:+5%,e2e:0%") == {"throughput": 0.97, "ttft_p95": 1.05, "e2e": 1.0}


def saved(folder: Path, *records: dict) -> Path:
    for one in records:
        append_line(folder / "results" / "load_test.jsonl", one)
    (folder / "notes.md").write_text("# Notes\n")
    return folder / "notes.md"


def test_the_command_takes_ids_their_beginnings_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    notes = saved(tmp_path, record(rounds(STEADY)), record(rounds([x / 2 for x in STEADY]), 2))
    lone = tmp_path / "lone.jsonl"
    append_line(lone, record(rounds(STEADY), 3))
    assert report.main(["compare", "load_test-261122-000001", str(lone), "--notes-file", str(notes)]) == 0
    assert "A = [load_test-261122-000001], B = [load_test-261122-000003]" in capsys.readouterr().out
    beginnings = ["compare", "load_test-261122-000001", "load_test-261122-000002", "--notes-file", str(notes)]
    assert report.main([*beginnings, "--gate", "ttft:+5%", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == 0 and found["rows"][1]["verdict"]["word"] == "FASTER"
    back = ["compare", beginnings[2], beginnings[1], "--notes-file", str(notes), "--gate", "ttft:+5%"]
    assert report.main(back) == 1


def test_a_comparison_in_the_notes_has_a_figure_and_a_record_that_its_numbers_are_checked_against(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    a = [run(n, ttft=x) for x in STEADY for n in (1, 4)]
    b = [run(n, ttft=x / 2) for x in STEADY for n in (1, 4)]
    notes = saved(tmp_path, record(a, model={"name": "m", "dtype": "f", "device": "cpu", "origin": "o", "hash": "h"}))
    append_line(tmp_path / "results" / "load_test.jsonl", record(b, 2, model={
        "name": "m", "dtype": "f", "device": "cpu", "origin": "o", "hash": "h"}))  # fmt: skip
    asked = ["compare", "load_test-261122-000001", "load_test-261122-000002", "--notes-file", str(notes)]
    assert report.main([*asked, "--note", "Half the time."]) == 0
    *rests_on, kept = read_lines(tmp_path / "results" / "cited.jsonl")
    assert [one["id"] for one in rests_on] == kept["of"] == asked[1:3]
    assert f"Record [{kept['id']}]" in capsys.readouterr().out
    text = notes.read_text()
    assert "4 at once · 128 + 32 tokens: B is FASTER in ttft, ×0.500 [0.500, 0.500] (n=6)." in text
    assert "Half the time." in text and (tmp_path / "results" / "figures" / f"{kept['id']}-compared.png").is_file()
    assert report.main(["claims", "--notes-file", str(notes)]) == 0
    notes.write_text(text.replace("×0.500 [0.500, 0.500] (n=6).", "×0.400 [0.500, 0.500] (n=6)."))
    assert report.main(["claims", "--notes-file", str(notes)]) == 1, "and a number that was touched is found"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare"], "takes two records"),
        (["claims", "--note"], "belongs to compare"),
        (["compare", "load_test-261122-000001"], "takes two records"),
        (["claims", "x"], "belongs to compare"),
        (["compare", "nothing", "load_test-261122-000001"], "No record in .* begins with 'nothing'"),
        (["compare", "load_test", "load_test-261122-000001"], "begins 2 ids"),
    ],
)
def test_misuse_is_one_sentence(tmp_path: Path, arguments: list[str], says: str):
    notes = saved(tmp_path, record([run()]), record([run()], 2))
    with pytest.raises(UserError, match=says):
        report.main([*arguments, "--notes-file", str(notes)])


def test_records_of_another_schema_or_kind_are_refused(tmp_path: Path):
    notes = saved(tmp_path, record([run()], 1, schema=2), record([run()], 2, kind="other", script="mistakes"))
    for one, says in (("load_test-261122-000001", "schema 2"), ("load_test-261122-000002", "record of mistakes")):
        with pytest.raises(UserError, match=says):
            load_runs.find(one, notes.parent / "results")


def test_records_of_infer_are_compared_run_by_run():
    def made(number: int, total: float) -> dict:
        runs = [{"ttft": 0.1, "total": total, "decode": [0.05] * 9} for _ in range(6)]
        return record([], number, script="infer", kind=None, prompt_tokens=38, ids=list(range(10))) | {"runs": runs}

    found = compare.compare(load_runs.checked(made(1, 2.0)), load_runs.checked(made(2, 1.0)))
    assert row(found, "e2e").verdict.word == "FASTER" and row(found, "e2e").ratio == pytest.approx(0.5)
    assert row(found, "tpot").a == pytest.approx(1.9 / 9)
