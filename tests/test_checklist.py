"""The progress wall is derived from records; ticking touches nothing but boxes and evidence."""

import json

import pytest

import report
from lab import console
from lab.checklist import BATCH, BY_HAND, DAY1, ITEMS, KV, observations, states, ticked
from lab.records import append_line

CHECKLIST = (
    "| Day | Item | Status | Evidence |\n|---|---|---|---|\n"
    "| Day1 | 记录硬件 + dtype 假设 (hardware) | ☐ |  |\n"
    "| Day2 | 写出 trade-off 结论（牺牲谁换谁） | ☐ | my log |\n"
)
NOTE = "## Experiment: {question}\n\n- **Evidence**: [{id}]\n\n**Verdict**\n\n**Observations**\n\n{words}\n"


def made(question: str, number: int = 1, **more) -> dict:
    return {"id": f"x-261121-{number:06x}", "question": question, "partial": False} | more


def done(notes: str, records: list[dict]) -> list[str]:
    return [state.item.chinese for state in states(notes, records) if state.done]


def test_nothing_is_done_without_a_record_and_every_missing_row_says_what_it_lacks():
    wall = states("", [])
    assert len(wall) == len(ITEMS) and not any(state.done for state in wall)
    assert wall[0].missing == f"no whole record of {DAY1}: run python3 infer.py --note"


def test_a_whole_record_proves_its_rows_and_a_partial_one_none():
    weak = ({"partial": True}, {"config": {"quick": True}}, {"model": {"timing_only": True}})
    assert [done("", [made(DAY1, **more)]) for more in weak] == [[], [], []]
    assert len(done("", [made(DAY1)])) == 4
    assert done("", [made(BY_HAND)]) == ["拆解 generate：prefill vs decode loop"]


def test_a_row_that_asks_for_a_conclusion_needs_words_under_observations():
    conclusion = "写出 trade-off 结论（牺牲谁换谁）"
    record = made(BATCH, trials=[{"batch_size": 1}, {"batch_size": 4}])
    empty, written = (NOTE.format(question=BATCH, id=record["id"], words=w) for w in ("", "Batch 8 pays."))
    assert conclusion not in done("", [record]) and conclusion not in done(empty, [record])
    assert conclusion in done(written, [record])
    assert conclusion in done(written.replace("\n", "\r\n"), [record])


def test_a_row_that_compares_needs_a_record_that_does():
    three = "表格化 latency/throughput，对比 3 组 batch"
    both_ways = "绘制 prompt 长度 × latency 表格"
    assert three not in done("", [made(BATCH, trials=[{"batch_size": 8}] * 3)])
    assert three in done("", [made(BATCH, trials=[{"batch_size": n} for n in (1, 4, 8)])])
    whole = [{"prompt_len": n, "cache": kind, "tokens": n} for n in (10, 50, 200) for kind in ("off", "dynamic")]
    assert both_ways in done("", [made(KV, trials=whole)])
    assert both_ways not in done("", [made(KV, trials=whole[:5])])
    assert both_ways not in done("", [made(KV, trials=[*whole[:5], whole[5] | {"tokens": "others"}])])


def test_the_evidence_of_a_conclusion_is_the_record_that_holds_it():
    records = [made(BATCH, n, trials=[{"batch_size": 1}, {"batch_size": 4}]) for n in (1, 2)]
    notes = NOTE.format(question=BATCH, id=records[0]["id"], words="Batch 8 pays.")
    (state,) = (s for s in states(notes, records) if s.item.group == "Batch" and s.item.conclusion)
    assert state.evidence == (records[0]["id"],)


def test_half_a_record_in_notes_has_no_observations():
    assert observations("## Experiment: x\n- **Evidence**: [x-1]\n**Obs") == {"x-1": ""}
    assert observations("## Experiment: x\n- **Date**: 20") == {}
    assert observations("no records at all") == {}


def test_ticking_sets_boxes_and_evidence_and_keeps_every_other_byte():
    wall = states("", [made(DAY1)])
    text, found = ticked("# Mine\r\n\r\n" + CHECKLIST.replace("\n", "\r\n") + "☐ not a row", wall)
    assert found == 2
    assert text == (
        "# Mine\r\n\r\n| Day | Item | Status | Evidence |\r\n|---|---|---|---|\r\n"
        "| Day1 | 记录硬件 + dtype 假设 (hardware) | ☑ | [x-261121-000001] |\r\n"
        "| Day2 | 写出 trade-off 结论（牺牲谁换谁） | ☐ | my log |\r\n☐ not a row"
    )
    assert ticked(text, wall)[0] == text  # a second time changes nothing


def test_a_row_whose_record_is_gone_is_opened_again():
    text, _ = ticked(CHECKLIST.replace("☐", "☑"), states("", []))
    assert "☑" not in text


@pytest.mark.parametrize("content", [b"", b"# no checklist\n", b"\xff\xfe broken", CHECKLIST.encode()])
def test_the_wall_appears_whatever_stands_in_notes(content, tmp_path, capsys):
    path = tmp_path / "notes.md"
    path.write_bytes(content)
    append_line(tmp_path / "results" / "cited.jsonl", made(DAY1))
    assert report.main(["checklist", "--notes-file", str(path), "--write"]) == 0
    shown = capsys.readouterr()
    assert "4 of 16 done." in shown.out
    assert ("no checklist row" in shown.err) == (content != CHECKLIST.encode())
    assert (path.read_bytes() == content) == (content != CHECKLIST.encode())


def test_json_is_for_machines(tmp_path, capsys):
    (tmp_path / "notes.md").write_text("")
    report.main(["checklist", "--json", "--notes-file", str(tmp_path / "notes.md")])
    wall = json.loads(capsys.readouterr().out)
    assert [state["done"] for state in wall] == [False] * 16


def test_missing_notes_are_one_sentence_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        console.run(lambda: report.main(["checklist", "--notes-file", str(tmp_path / "absent.md")]))
    assert left.value.code == 2
    assert "cannot be read" in capsys.readouterr().err
