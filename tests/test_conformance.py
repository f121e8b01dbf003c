"""The conformance card: the matrix is whole, its numbers are counted rightly, and every judge can say no."""

import contextlib
import json
import re
import subprocess
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from stand_kit import strict

from config import UserError
from conformance import __main__ as main_module
from conformance import servers, suite, tables
from conformance.__main__ import main
from conformance.judge import Kind, Verdict, each, otherwise, passed, refused, unsafe
from conformance.look import IN_TURN
from conformance.matrix import STARTS, cases, groups, numbers_of
from conformance.plugin import OUT
from conformance.suite import Found, Outcome
from conformance.target import Target
from conformance.wire import Hung, Reply
from lab import console

# ---- the matrix


def test_the_matrix_has_74_cases_of_six_groups_each_with_words_of_its_own():
    assert sorted(cases()) == list(range(1, 75))
    assert {case.group for case in cases().values()} == set(groups()) == set(STARTS)
    assert len({case.case for case in cases().values()}) == 74 and all(case.expected for case in cases().values())
    assert {number for number, case in cases().items() if case.changed} == {23, 44, 50, 63}


def test_every_case_has_a_test_of_its_number():
    names = re.findall(r"^(?:async )?def (test_b\d\w+)", "\n".join(map(Path.read_text, suite.files())), re.MULTILINE)
    covered = {number for name in names for number in numbers_of(name)}
    assert covered == set(cases())


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("test_b9_a_slow_body", (9,)), ("test_b67_b68_a_stream_that_breaks", (67, 68)),
        ("test_b1_2_10_what", (1, 2, 10)),
        ("test_b33_to_36_the_limits", (33, 34, 35, 36)), ("test_b62_200_connections", (62,)), ("test_batch", ()),
        ("test_b67_http_1_0_gets_no_chunks", (67,)), ("test_what_b9_is", ()), ("test_b70", (70,)),
    ],
)  # fmt: skip
def test_a_tests_name_begins_with_its_numbers(name: str, numbers: tuple[int, ...]):
    assert numbers_of(name) == numbers


# ---- the card of the tests

TESTS = """
import pytest
def test_b1_holds(): pass
def test_b1_b2_does_not(): assert 1 == 2
@pytest.mark.skip(reason="no such program here")
def test_b3_cannot_be_told(): pass
@pytest.fixture
def broken(): raise OSError("no disk")
def test_b4_has_a_broken_fixture(broken): pass
@pytest.mark.parametrize("number", [5, 6])
def test_b5_6_rows(number): assert number == 5
def test_of_no_case(): assert False
"""


@pytest.mark.slow
def test_a_case_passes_only_when_all_its_tests_do(tmp_path):
    (tmp_path / "test_small.py").write_text(TESTS)
    place = tmp_path / "out.json"
    command = suite.command([tmp_path / "test_small.py"], "--rootdir", str(tmp_path))
    path = {"PYTHONPATH": str(ROOT), OUT: str(place), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert ran.returncode == 1 and "1 deselected" in ran.stdout, ran.stdout + ran.stderr
    found = suite.card(json.loads(place.read_text()))
    assert [found[number].outcome for number in range(1, 8)] == [
        Outcome.FAIL, Outcome.FAIL, Outcome.SKIPPED, Outcome.FAIL, Outcome.PASS, Outcome.FAIL, Outcome.MISSING,
    ]  # fmt: skip
    assert found[1].tests == 2 and "test_b1_b2_does_not: assert 1 == 2" in found[1].why
    assert "no such program here" in found[3].why and "no disk" in found[4].why


def test_the_card_counts_what_it_shows():
    found = {number: Found(Outcome.PASS, 2) for number in cases()}
    found |= {7: Found(Outcome.FAIL, 1, 0.1, "why not"), 74: Found(Outcome.MISSING)}
    card = tables.suite_card(found).splitlines()
    assert [part.strip() for part in card[2].split("|")[1:-1]] == [
        "B1 Transport and framing", "1–19", "●●●●● ●✗●●● ●●●●● ●●●●", "18", "1", "0", "0", "37",
    ]  # fmt: skip
    assert [part.strip() for part in card[8].split("|")[1:-1]] == ["all", "1–74", "", "72", "1", "0", "1", "145"]
    rest = tables.suite_rest(found)
    assert "why not" in rest and "no test has this number" in rest and rest.count("\n") == 3
    assert tables.suite_rest(dict.fromkeys(cases(), Found(Outcome.PASS, 1))) == ""


# ---- verdicts


def reply(status: int, body: bytes = b'{"error": {"message": "no"}}') -> Reply:
    return Reply(status, {}, body)


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (reply(400), Kind.PASS, ""), (reply(422), Kind.OTHERWISE, "422"), (reply(200, b"{}"), Kind.OTHERWISE, "200"),
        (reply(400, b'{"detail": "no"}'), Kind.OTHERWISE, "400 without OpenAI's error object"),
        (reply(400, b'{"error": NaN}'), Kind.OTHERWISE, "400 without OpenAI's error object"),
        (reply(500), Kind.UNSAFE, "500"), (reply(503), Kind.UNSAFE, "503"),
        (reply(501), Kind.OTHERWISE, "501"), (Reply(), Kind.OTHERWISE, "the connection closed without an answer"),
        (reply(400, b"Traceback (most recent call last)"), Kind.UNSAFE, "400 with a traceback"),
        (reply(200, b'data: {"error": {"message": "x"}}\n\n'), Kind.OTHERWISE, "200, and an error inside the stream"),
    ],
)  # fmt: skip
def test_a_refusal_is_judged_by_status_and_form_and_safety_by_itself(answer: Reply, kind: Kind, says: str):
    assert refused(answer, 400) == Verdict(kind, says)


def test_of_several_verdicts_the_worst_counts_and_a_hang_ends_the_asking():
    def hang() -> Verdict:
        raise Hung("did not answer within 20 s")

    assert each([("a", passed), ("b", lambda: otherwise("200")), ("c", lambda: otherwise("200"))]) == otherwise(
        "200 for b, c (1 of 3 as wanted)"
    )
    found = each([("a", lambda: otherwise("200")), ("b", hang), ("c", lambda: pytest.fail("asked after a hang"))])
    assert found == unsafe("it did not answer within 20 s for b (0 of 2 as wanted)")
    assert each([("a", passed), ("b", passed)]) == passed()


# ---- the tables and the command line

LOOKED = {
    "ours": {number: passed() for number in cases()},
    "another": {number: otherwise("200 for x") if number < 60 else unsafe("500") for number in range(1, 74)}
    | {74: Verdict(Kind.UNSEEN, "hidden")},
}  # fmt: skip


def test_the_comparison_counts_both_questions_of_what_was_seen():
    rows = tables.looks_totals(LOOKED).splitlines()[2:]
    assert [[part.strip() for part in row.split("|")[1:-1]] for row in rows] == [
        ["ours", "74 of 74", "74 of 74", "0", "0"], ["another", "0 of 73", "59 of 73", "1", "0"],
    ]  # fmt: skip
    card = tables.looks_card(LOOKED)
    assert "◐◐◐◐◐ ◐◐◐◐◐ ◐◐◐◐◐ ◐◐◐◐" in card and "✗✗✗✗✗ ✗·" in card
    assert tables.looks_rest("ours", LOOKED["ours"]).endswith("All as wanted.")
    assert tables.looks_rest("another", LOOKED["another"]).count("\n") == 2 + 2 + 73 - 1
    assert "hidden" in tables.unseen_reasons(LOOKED) and "another |" in tables.unseen_reasons(LOOKED)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--suite", "--start", "ours"], "different looks"), (["--name", "x"], "--url"),
        (["--cases", "75"], "up to 74"),
        (["--url", "ftp://x", "--json", "-"], "no address"),
        (["--url", "http://127.0.0.1:1", "--json", "-"], "Nothing answers"),
    ],
)  # fmt: skip
def test_a_wrong_wish_is_one_sentence(words: list[str], says: str):
    with pytest.raises(UserError, match=re.escape(says)):
        main(words)


def test_a_peer_that_is_not_installed_is_left_out_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(servers, "PEERS", tmp_path)
    assert servers.lacking("ours") is None
    assert "install.sh llama_cpp" in (servers.lacking("llama-server") or "")


@pytest.mark.slow
def test_what_does_not_serve_is_ended(monkeypatch):
    monkeypatch.setattr(servers, "START_S", 0.3)
    before = psutil.Process().children()
    with pytest.raises(UserError, match="did not serve within"), contextlib.ExitStack() as undo:
        servers.started(undo, "it", ["sleep", "60"], servers.free_port())
    assert psutil.Process().children() == before


def test_a_server_that_cannot_be_started_is_one_sentence():
    with pytest.raises(UserError, match="it cannot be started: /no/program"), contextlib.ExitStack() as undo:
        servers.started(undo, "it", ["/no/program"], servers.free_port())


@pytest.mark.slow
def test_a_server_that_names_no_model_leaves_neither_a_process_nor_its_keys(monkeypatch, tmp_path):
    """Nobody serves at the port here, so that the question what its model is called fails."""
    ended = []
    monkeypatch.setattr(servers, "started", lambda undo, *told: undo.callback(ended.append, told[1]))
    with pytest.raises(UserError, match="names no model"):
        servers.ours(servers.Weights("x", tmp_path, None))
    keys = ended[0][ended[0].index("--api-keys-file") + 1]
    assert keys.name == "keys" and not keys.parent.exists()


@pytest.mark.slow
def test_a_server_by_its_address_is_looked_at_and_recorded(stand, capsys, tmp_path):
    one = stand(strict)
    url = "http://{}:{}".format(*one.socket.getsockname())
    out, notes = tmp_path / "out.jsonl", tmp_path / "notes.md"
    told = ["--json", str(out), "--note", "as hoped", "--notes-file", str(notes)]
    assert main(["--url", url, "--name", "mine", "--cases", "1,2,4", *told]) == 0
    page = capsys.readouterr().out
    assert "| mine     |" in page and "3 of 3" in page and "mine, from outside: 3 of 3 cases" in page
    record = json.loads(out.read_text())
    assert record["looks"]["mine"]["1"] == {"kind": "pass", "says": ""} and record["suite"] == {}
    assert "mine, from outside: 3 of 3 cases" in notes.read_text() and record["id"] in notes.read_text()


@pytest.mark.slow
def test_a_server_that_does_not_start_costs_no_other_its_card(stand, monkeypatch, capsys, tmp_path):
    """The finished card of the tests was lost too: nothing was saved, and one sentence was all that was said."""

    def fail() -> Target:
        raise UserError("another did not serve within 300 s.")

    monkeypatch.setattr(main_module, "starts", lambda _: [(fail, True), (stand(strict).target, True)])
    monkeypatch.setattr(main_module, "own_card", lambda _: {1: Found(Outcome.PASS, 1)})
    out = tmp_path / "out.jsonl"
    assert main(["--cases", "1", "--json", str(out)]) == 1
    assert "- another did not serve within 300 s." in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["looks"]["stand-in"]["1"]["kind"] == "pass" and record["suite"]["1"]["outcome"] == "pass"


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_found_of_the_server_that_is_looked_at(stand, monkeypatch, tmp_path):
    def interrupt(_: Target) -> Verdict:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "starts", lambda _: [(stand(strict).target, True)])
    monkeypatch.setitem(IN_TURN, 2, interrupt)
    out = tmp_path / "out.jsonl"
    assert main(["--start", "ours", "--cases", "1,2,3,31", "--json", str(out)]) == console.INTERRUPTED
    record = json.loads(out.read_text())
    assert record["partial"] and sorted(record["looks"]["stand-in"]) == ["1", "31"]
