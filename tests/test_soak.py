"""The soak of experiments/soak.py in three minutes: requests of all kinds leave nothing behind; a leak is found."""

import os
import signal
import sys
import threading
from statistics import median

import pytest

from config import ROOT, UserError
from experiments import soak
from lab import soak_judge, soak_plots
from lab.records import read_lines
from lab.soak_judge import MIB

pytestmark = pytest.mark.slow

GROWN = 4 * MIB  # after the warm-up, in all: pages that the allocator keeps come and go by less
SHORT = ("--look", "0.5", "--probe-s", "2", "--max-new-tokens", "12")

# serve.py, with a service that keeps every answer, and beside it what an unbounded cache would hold of it.
KEEPS_ALL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from service.serving import Serving
import serve

kept, close = [], Serving.close

def close_and_keep(self, job):
    if job in self.jobs:
        kept.append((job, bytearray(64 * 1024)))
    close(self, job)

Serving.close = close_and_keep
serve.main()
"""


def of(record: dict) -> dict[str, soak_judge.Judged]:
    return {one.what: one for one in soak_judge.judged(record)}


def test_three_minutes_of_strangers_leave_nothing_behind(tmp_path, capsys):
    """150 s, in which some 5,000 requests pass on a slow machine and 50,000 on a quiet one. It ended with the 5,000th
    once: on a quiet machine that was after seconds, in which the service was still filling what it keeps.
    """
    file = tmp_path / "soak.jsonl"
    argv = ["--minutes", "2.5", "--lap", "6", "--rush", "4", "--load", "0.8", "--pairs", "1", "--json", str(file)]
    status = soak.main([*SHORT, *argv])
    told = capsys.readouterr().out
    (record,) = read_lines(file)
    failed = [sentence for sentence in record["verdicts"] if ": FAILS (" in sentence]
    failed = [one for one in failed if not one.startswith(("p99", "who comes outside a rush"))]
    assert not failed, failed  # what a busy machine has time for is not judged here
    assert status in (0, 1) and "### What its process held" in told
    held = of(record)
    for what in ("open files", "threads", "asyncio tasks", "the service's outcomes add up to the requests",
                 "the laws of tokens, blocks and Little", "every visit ends as it should",
                 "a fixed prompt's answer (greedy), first against last"):  # fmt: skip
        assert held[what].holds is True, held[what]
    ready = [one["bytes"] for one in record["rests"] if one["at"] >= record["ready_s"] > 0]
    assert median(ready[-3:]) - ready[0] < GROWN, ready
    (pair,) = record["pairs"]
    assert pair["old"]["asked"] == pair["new"]["asked"] > 100 and "### Old and new" in told, "the same for both"
    assert "-soak.png" in soak_plots.draw(record, tmp_path)
    ends, asked = record["kinds"], sum(record["ends"].values())
    assert asked > 1000 and record["rests"][-1]["at"] > 100
    calm = {kind: sum(found.values()) for kind, found in ends.items() if kind != "rush"}
    assert 0.15 < calm["leaver"] / sum(calm.values()) < 0.25 and 0.03 < calm["nonsense"] / sum(calm.values()) < 0.07
    assert ends["leaver"]["left"] > 0.5 * calm["leaver"] and ends["rush"]["refused"] > 0


def test_a_service_that_keeps_every_answer_is_found_out():
    config = soak.SoakConfig(minutes=0.5, lap=4.0, look=0.5, rush=0, pairs=0, probe_s=2.0, max_new_tokens=12)
    record = soak.new_record(config)
    soak.soaked(config, record, command=(sys.executable, "-c", KEEPS_ALL))
    found = of(record)["RssAnon + VmSwap after the warm-up"]
    assert found.holds is False, found


def test_what_was_seen_of_a_service_that_is_killed_is_told(tmp_path, capsys, monkeypatch):
    visits, pids, init = soak.Soak.visits, [], soak.Soak.__init__

    def noting(self, config, record, service, keep):
        pids.append(service.pid)
        init(self, config, record, service, keep)

    def killed(self, number: int):
        if number == 1:
            threading.Timer(1.0, os.kill, (pids[0], signal.SIGKILL)).start()
        return visits(self, number)

    monkeypatch.setattr(soak.Soak, "__init__", noting)
    monkeypatch.setattr(soak.Soak, "visits", killed)
    file = tmp_path / "soak.jsonl"
    status = soak.main([*SHORT, "--minutes", "5", "--lap", "4", "--rush", "0", "--pairs", "0", "--json", str(file)])
    (record,) = read_lines(file)
    assert status == 1 and record["partial"] and "it ended after" in record["ended"] and record["laps"]
    assert of(record)["the service is there to the end"].holds is False
    assert "the service is there to the end: FAILS" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file], "what was kept meanwhile has gone"


def test_a_new_service_that_does_not_start_costs_the_old_one_nothing(tmp_path, capsys, monkeypatch):
    start, starts = soak.started, []

    def only_once(*arguments):
        starts.append(arguments)
        if len(starts) > 1:
            raise UserError("serve.py did not start.")
        return start(*arguments)

    monkeypatch.setattr(soak, "started", only_once)
    file = tmp_path / "soak.jsonl"
    soak.main([*SHORT, "--minutes", "0.1", "--lap", "3", "--rush", "0", "--pairs", "1", "--json", str(file)])
    (record,) = read_lines(file)
    assert len(starts) == 2 and record["laps"] and record["pairs"] == [] and not record["partial"]
    assert "no new service to compare with: serve.py did not start." in capsys.readouterr().err
    assert of(record)["p99 of E2E, in turns with a new service"].holds is None


def test_ctrl_c_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    visits = soak.Soak.visits

    def interrupted(self, number: int):
        if number == 1:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        return visits(self, number)

    monkeypatch.setattr(soak.Soak, "visits", interrupted)
    file = tmp_path / "soak.jsonl"
    status = soak.main([*SHORT, "--minutes", "5", "--lap", "4", "--rush", "0", "--pairs", "0", "--json", str(file)])
    (record,) = read_lines(file)
    assert status == 130 and record["partial"] and len(record["laps"]) == 2
    assert sum(record["ends"].values()) == sum(lap["asked"] for lap in record["laps"]) > 0
    assert "PARTIAL: interrupted" in capsys.readouterr().out
