"""The load generators' mistakes are made on purpose, and the right figure beside them is the true one."""

import pytest

from experiments import load_mistakes, mistakes
from lab.records import read_lines

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mistake", ["coordinated-omission", "chunks", "role-chunk", "warm-cache", "opening-wave"])
def test_load_mistakes_are_made_and_told(checkpoint_folder, tmp_path, capsys, mistake, monkeypatch):
    monkeypatch.setattr(load_mistakes, "REQUESTS", 4)
    monkeypatch.setattr(load_mistakes, "WAVES", 2)
    monkeypatch.setattr(load_mistakes, "WARM_PROMPT", 60)  # the test model's context is short
    monkeypatch.setitem(mistakes.OWN_PROMPTS, "warm-cache", (*mistakes.OWN_PROMPTS["warm-cache"][:2], 60))
    argv = [mistake, "--model", str(checkpoint_folder), "--json", str(tmp_path / "m.jsonl"), "--max-new-tokens", "3"]
    assert mistakes.main([*argv, "--runs", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Wrong:" in shown and "Right:" in shown
    (kept,) = read_lines(tmp_path / "m.jsonl")
    assert len(kept["samples"]) == 3 and kept["question"] == f"mistake-{mistake}"


def test_the_queue_that_a_late_sender_hides():
    sample = load_mistakes.late_sender(None, None, None, 0)
    assert sorted(sample["from_sent"])[-3] < 3 * load_mistakes.ANSWER_S, "a machine may stand still twice"
    assert sample["from_due"][-1] > 0.5  # 24 answers of 0.1 s, due within 1.6 s


def test_four_tokens_an_event_are_four():
    sample = load_mistakes.in_fours(None, None, None, 0)
    assert (sample["pieces"], sample["tokens"]) == (8, 32)


def test_a_role_is_no_token():
    sample = load_mistakes.role_first(None, None, None, 0)
    assert sample["event"] < 0.1 < sample["text"]
