"""Quoted figures are found again in their records; what was changed, forgotten or made up is named with its line."""

from pathlib import Path

import pytest

import report
from lab.claim_documents import figures_of, passages_of
from lab.claims import check
from lab.records import append_line

ID = "benchmarks-261121-aaaaaa"
RECORD = {
    "schema": 1, "id": ID, "script": "benchmarks", "question": "claims", "partial": False,
    "config": {"windows_ms": "0,10"}, "card": {"RAM": "25.3 GB"}, "verdicts": ["decode: holds"],
    "claims": [
        {"what": "decode", "promised": "≥ 4 × batch 1", "measured": "×4.40 [4.17, 4.64] (n=12): 58.0 tokens/s",
         "holds": True},
        {"what": "first token", "promised": "≤ 5 s", "measured": "1.234 s", "holds": False},
    ],
}  # fmt: skip
NOTES = f"""# Notes

## Experiment: claims

- **Hardware**: RAM 25.3 GB
- **Evidence**: [{ID}]

**Metrics**

| claim       | promised      | measured here                            |       |
|:------------|:--------------|:-----------------------------------------|:------|
| decode      | ≥ 4 × batch 1 | ×4.40 [4.17, 4.64] (n=12): 58.0 tokens/s | holds |
| first token | ≤ 5 s         | 1.234 s                                  | FAILS |

**Verdict**

- decode: holds

**Observations**

Decode gains ×4.4, the first token takes 1.23 s; a window of 10 ms was set.
"""


def problems(text: str, name: str = "notes.md", record: dict = RECORD) -> list[str]:
    return list(check({name: text}, [record]).problems)


def test_a_true_record_holds_and_its_figures_are_counted():
    found = check({"notes.md": NOTES}, [RECORD])
    assert found.problems == () and found.unchecked == 0
    assert found.checked == 7  # RAM, ×4.40, 58.0, 1.234 s; ×4.4, 1.23 s and 10 ms


@pytest.mark.parametrize(
    ("true", "false", "line", "says"),
    [
        ("takes 1.23 s", "takes 1.33 s", 21, "'1.33 s' is not among what"),
        ("gains ×4.4,", "gains ×4.5,", 21, "'×4.5' is not among what"),
        ("- decode: holds", "- decode: FAILS", 17, "not one of its record's verdicts"),
        ("58.0 tokens/s |", "85.0 tokens/s |", 12, "not one that its record prints"),
        ("| FAILS |", "| holds |", 13, "not one that its record prints"),
    ],
)
def test_a_changed_figure_is_found_with_its_line(true: str, false: str, line: int, says: str):
    found = problems(NOTES.replace(true, false))
    assert any(problem.startswith(f"notes.md:{line}: ") and says in problem for problem in found), found


def test_an_id_that_no_record_has_is_found():
    found = problems(NOTES + "\nSee [benchmarks-261121-bbbbbb] too.\n")
    assert found == ["notes.md:23: [benchmarks-261121-bbbbbb] is in no line of results/cited.jsonl"]


def test_a_figure_without_an_id_is_found_and_one_in_its_row_paragraph_or_section_is_enough():
    bare = "# Title [x]\n\n## Part\n\nThe first token takes 1.234 s.\n"
    assert problems(bare, "README.md") == ["README.md:5: '1.234 s' names no [id], and neither does its section"]
    for named in (
        f"# Title\n\nThe first token takes 1.234 s `[{ID}]`.\n",
        f"# Title\n\n## Part\n\nRecord [{ID}].\n\nThe first token takes 1.234 s.\n",
        f"# Title\n\n## Part\n\nRecord [{ID}].\n\n### Inner\n\nThe first token takes 1234 ms.\n",
        f"# T\n\n| what | takes | record |\n|--|--|--|\n| first | 1.2 s | [{ID}] |\n",
    ):
        assert problems(named, "README.md") == []


def test_a_title_covers_no_section_below_it():
    text = f"# Title\n\nRecord [{ID}].\n\n## Part\n\nIt takes 1.234 s.\n"
    assert len(problems(text, "README.md")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "The law allows 2 % of it, at most 5 s.",
        "With a 95 % interval.",
        "Start it with `--window 77 ms`.",
        "It took 9.9 s elsewhere. <!-- no record: another machine -->",
        "```\n77 ms\n```",
        "| claim | promised |\n|--|--|\n| a | 77 ms |",
        "On 2 cores, 38 tokens, version 1.2.3.",
    ],
)
def test_limits_settings_code_and_marked_lines_are_no_claims(text: str):
    assert problems(f"# Title\n\n{text}\n", "README.md") == []


@pytest.mark.parametrize(
    "text", ["It makes 999,999 tokens per second.", "It makes 4,321 tok/s.", "It takes 1.29 sec.",
             "It gains 77 percent.", "It takes **1.59** ms.", "It takes 1.59 μs.", "It changes by -73 ms.",
             "It makes 1.29k tokens/s.",
             "It is 3x faster.", "## It takes 7.7 ms", "~~~\n```\n~~~\nIt takes 7.7 ms."]
)  # fmt: skip
def test_a_figure_does_not_escape_by_its_form(text: str):
    assert len(problems(f"# Title\n\n{text}\n")) == 1


def test_rows_of_a_record_that_kept_its_print_are_compared_with_it():
    printed = "| load | tokens/s |\n|:--|--:|\n| 1 client | 97.3 |\n| 4 clients | 245.6 |"
    record = {"id": "load_test-261122-bbbbbb", "script": "load_test", "verdicts": [], "printed": printed,
              "runs": [{"figures": {"x": 111.1}}]}  # fmt: skip
    notes = f"# Notes\n\n## Experiment: load\n\n- **Evidence**: [{record['id']}]\n\n**Metrics**\n\n{printed}\n"
    assert problems(notes, record=record) == []
    assert "this row is not one" in problems(notes.replace("97.3", "245.6"), record=record)[0]
    assert problems(notes + "\nIt makes 111.1 tokens/s.\n", record=record), "only what was printed may be quoted"


def test_a_column_whose_header_has_a_unit_holds_figures():
    passages = passages_of("| way | p50 (ms) | n |\n|--|--|--|\n| a | 1,024.5 | 7 |\n")
    figures = [figure for passage in passages for figure in figures_of(passage)]
    assert [(f.line, f.numbers, f.unit) for f in figures] == [(3, ("1,024.5",), "ms")]


def test_a_copy_in_a_readme_must_be_one_too():
    """A changed cell may be another row's value, and so among the record's figures."""
    record = RECORD | {"verdicts": ["Where is the time? In decode: 94.7% of 58.0 ms."]}
    rows = [line for line in NOTES.split("\n") if line.startswith("|")]
    text = "\n".join(["# T", "", f"Record [{ID}].", "", *rows, "", "- Where is the time? In decode: 94.7% of 58.0 ms."])
    assert problems(text, "README.md", record) == []
    swapped = text.replace("| 1.234 s", "| 58.0 s").replace("94.7% of 58.0 ms", "58.0% of 94.7 ms")
    assert problems(swapped, "README.md", record) == [
        "README.md:8: this row is not one that its record prints",
        "README.md:10: this sentence is not one of its record's verdicts",
    ]


def test_the_interval_behind_a_ratio_belongs_to_it():
    wrong = NOTES.replace("gains ×4.4,", "gains ×4.40 [4.17, 4.99],")
    assert problems(wrong) == [f"notes.md:21: '×4.40 [4.17, 4.99]' is not among what [{ID}] holds"]


def test_tables_that_a_record_does_not_print_again_are_counted_and_not_passed_over():
    record = RECORD | {"script": "mistakes", "claims": [], "samples": [{"prefill": [0.5]}]}
    text = NOTES.replace("58.0", "77.7")
    found = check({"notes.md": text}, [record])
    assert found.unchecked > 0 and "more stand under an id" in found.text()


def test_chinese_sentences_are_read_too():
    assert problems("# 标题\n\n首 token 用 9.9 s，快 ×7.7。\n", "README.zh.md") == [
        "README.zh.md:3: '9.9 s' names no [id], and neither does its section",
        "README.zh.md:3: '×7.7' names no [id], and neither does its section",
    ]


def test_the_command_exits_with_one_when_a_figure_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    notes = tmp_path / "notes.md"
    append_line(tmp_path / "results" / "cited.jsonl", RECORD)
    notes.write_text(NOTES)
    assert report.main(["claims", "--notes-file", str(notes)]) == 0
    notes.write_text(NOTES.replace("takes 1.23 s", "takes 1.33 s"))
    assert report.main(["claims", "--notes-file", str(notes)]) == 1
    assert "notes.md:21: '1.33 s'" in capsys.readouterr().out
