"""Day 2's figures from trials worked out by hand, its tables, its sentences, and the script as a user meets it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import batch_experiment
from experiments import mistakes
from lab import batch_figures as figures
from lab import batch_plots, batch_tables, batch_words, console
from lab.records import read_lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def trial(round_number: int, size: int, window_ms: float, step: float, requests: int = 4, late: float = 0.0) -> dict:
    """requests at 0 s; batches one after the other: window, prefill 1 s, three steps of `step` seconds each."""
    batches, done, clock = [], [], 0.0
    for first in range(0, requests, size):
        members = list(range(first, min(first + size, requests)))
        window = window_ms / 1e3 if first == 0 else 0.0
        start, end = clock + window + late, clock + window + late + 1 + 3 * step
        n = len(members)
        batches.append({"members": members, "idle_s": 0.0, "enqueued_s": [late] * n, "window_wait_s": [window] * n,
                        "started_s": start, "finished_s": end, "padding": 0, "prefill_s": 1.0, "decode_s": [step] * 3,
                        "drop_rows_s": []})  # fmt: skip
        done += [end] * len(members)
        clock, late = end, 0.0
    latencies = sum(done)
    return {
        "round": round_number, "run": "a", "batch_size": size, "window_ms": window_ms, "due_s": [0.0] * requests,
        "sent_s": [0.0] * requests, "done_s": done, "new_tokens": 4 * requests, "in_flight_s": latencies,
        "computed_positions": 48, "useful_positions": 48, "batches": batches, "answers": list("abcd")[:requests],
        "predicted": {"tokens_per_s": 1.1 * 4 * requests / max(done), "mean_latency_s": 0.9 * latencies / requests,
                      "batches": 2, "step_s": step, "prefill_s": 1.0},
        "usage": {"cpu_cores_mean": 1.9, "gpu_percent_mean": None}, "anchor_s": 0.05, "bytes_per_s": 30e9,
    }  # fmt: skip


def record(rounds: int = 6, step: dict[int, float] | None = None, sizes=(1, 2, 4), windows=(0.0, 10.0)) -> dict:
    """Steps get slower with rows, and a little with each round, alike for all cells."""
    steps = step or {1: 1.0, 2: 1.2, 4: 1.6}
    cells = [(size, window) for size in sizes for window in windows]
    return {
        "id": "batch_experiment-000000-abcdef", "cells": cells, "partial": False, "references": None,
        "config": {"requests": 4, "rounds": rounds, "arrival": "burst", "rate": 1.0, "max_new_tokens": 4},
        "model": {"name": "tiny", "dtype": "float32", "device": "cpu"}, "ceilings": {"flops_per_s": {"float32": 1e11}},
        "floors": {"1": {"flops": 10**9, "read_bytes": 3 * 10**9}}, "fit_sizes": [1, 3, 4],
        "calibrations": [{"round": r, "step_s": {"1": steps[1], "3": 1.4, "4": steps[4]}} for r in range(rounds)],
        "trials": [trial(r, *cell, steps[cell[0]] * (1 + 0.001 * r)) for r in range(rounds) for cell in cells],
    }  # fmt: skip


# ---- by hand


def test_latency_is_counted_from_due_and_its_parts_add_up():
    """Batch 2 of four requests, window 0.5 s: done at 0.5 + 1 + 3*2 = 7.5 and at 14.5."""
    one = trial(0, 2, 500.0, step=2.0)
    assert figures.latencies_s(one) == [7.5, 7.5, 14.5, 14.5]
    assert figures.makespan_s(one) == 14.5 and figures.mean_latency_s(one) == 11.0
    assert figures.tokens_per_s(one) == pytest.approx(16 / 14.5)
    parts = figures.parts_s(one)
    assert parts["queue wait"] == [0.5, 0.5, 7.5, 7.5] and parts["window wait"] == [0.5, 0.5, 0.0, 0.0]
    assert parts["prefill"] == [1.0] * 4 and parts["decode"] == [6.0] * 4
    assert figures.residuals_s(one) == pytest.approx([0] * 4) and figures.conserved(one)
    one["done_s"][3] += 0.5  # half a second that no part accounts for
    assert not figures.conserved(one)


def test_the_machines_time_adds_up_to_the_whole():
    found = figures.machine_s(trial(0, 2, 500.0, step=2.0))
    assert found["prefill"] == pytest.approx(2 / 4) and found["decode"] == pytest.approx(12 / 4)
    assert found["window"] == pytest.approx(0.5 / 4) and found["no request"] == found["rest"] == pytest.approx(0)
    assert figures.passes_per_token(trial(0, 2, 0.0, 1.0)) == 2 * 4 / 16


def test_littles_law_has_two_sources_and_notices_when_they_part():
    one = trial(0, 1, 0.0, step=1.0)
    assert figures.little_off(one) == pytest.approx(0)
    one["in_flight_s"] *= 1.2
    assert figures.little_off(one) == pytest.approx(0.2)


def test_a_cell_is_compared_with_the_smallest_batch_under_the_same_window_only():
    kept = record()
    assert figures.baseline(kept, (4, 10.0)) == (1, 10.0)
    said = figures.compared(kept, (4, 0.0), (1, 0.0), figures.makespan_s)
    assert said.word == "FASTER" and said.ratio == pytest.approx((1 + 4.8) / (4 * 4), rel=0.01)
    assert "more than one factor" in figures.compared(kept, (4, 10.0), (1, 0.0), figures.makespan_s).reason


def test_more_rounds_of_the_same_requests_certify_no_percentile():
    kept = record(rounds=50)
    assert not figures.certified_percentile(kept, 95)
    kept["config"]["requests"] = 132
    assert figures.certified_percentile(kept, 95) and not figures.certified_percentile(kept, 99)


def test_a_round_that_an_interruption_split_is_not_paired():
    kept = record()
    for one in kept["trials"][:3]:
        one["run"] = "before"
    pairs = figures.paired(kept, (4, 0.0), (1, 0.0))
    assert [ours["round"] for ours, _ in pairs] == [1, 2, 3, 4, 5]


def test_a_disturbed_trial_takes_its_pair_out_of_the_verdict_and_no_other():
    kept = record()
    next(t for t in kept["trials"] if (t["round"], t["batch_size"], t["window_ms"]) == (2, 4, 0.0))["anchor_s"] = 0.09
    assert figures.compared(kept, (4, 0.0), (1, 0.0), figures.makespan_s).dropped == 1
    assert figures.compared(kept, (2, 0.0), (1, 0.0), figures.makespan_s).dropped == 0


def test_positions_that_nobody_accounts_for_are_noticed():
    one = trial(0, 2, 0.0, 1.0)
    assert figures.tokens_conserved(one)
    one["computed_positions"] += 1
    assert not figures.tokens_conserved(one)


def test_sizes_that_were_calibrated_are_not_scored():
    kept = record()
    assert [figures.scored(kept, (size, 0.0)) for size in (1, 2, 4)] == [False, True, False]
    assert figures.prediction_errors(figures.cells(kept)[(2, 0.0)]) == pytest.approx((0.1, -0.1))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([1, 4, 8], [1, 2, 6, 8]), ([1, 4, 8, 16], [1, 2, 6, 12, 16]), ([4], [1, 4]), ([1, 2, 3], [1, 3])],
)
def test_the_middle_sizes_are_kept_out_of_the_calibration(sizes, expected):
    assert batch_experiment.fit_sizes(sizes) == expected


def test_the_line_of_steps_and_its_knee():
    kept = record(step={1: 1.1, 2: 1.2, 4: 1.4})
    kept["calibrations"] = [{"round": 0, "step_s": {"1": 1.1, "3": 1.3, "4": 1.4}}]
    line = figures.step_line(kept)
    assert (line.start, line.slope) == pytest.approx((1.0, 0.1), rel=0.02)
    assert "about 10 rows, beyond the sizes seen (up to 4)" in batch_tables.knee_line(kept)


# ---- tables and sentences


def page() -> str:
    kept = record()
    row = {"latency_s": 1.0, "delay_s": 0.01, "low_s": 0.009, "high_s": 0.011, "rate": 0.2}
    kept["window"] = {"size": 4, "window_ms": 10.0, "capacity": 2.0, "cannot_pay_below": 0.2, "pays_from": None,
                      "rows": [row, row | {"rate": 1.8, "low_s": -0.02}]}  # fmt: skip
    return "\n\n".join([*batch_tables.sections(kept, [50, 95]), *batch_words.sentences(kept)]) + "\n"


def test_the_page_is_the_golden_one():
    """To change it on purpose: PYTHONPATH=.:tests python -c "import test_batch as t; print(t.page(), end='')" """
    assert page() == (ROOT / "tests" / "golden" / "day2.md").read_text()


def test_the_owners_table_has_its_columns_and_marks_what_is_not_certified():
    text = batch_tables.owners_table(record(), [50, 95])
    for column in ("Batch Size", "Wait Window (ms)", "Avg Latency (s)", "P50 Latency (s)", "P95 Latency (s)",
                   "Throughput (req/s)", "(tokens/s)", "Notes"):  # fmt: skip
        assert column in text
    assert "P50, P95 not certified (n=4 a round)" in text


def test_other_tokens_void_the_row():
    kept = record()
    kept["trials"][5]["answers"] = ["a", "b", "c", "other"]
    assert batch_tables.owners_table(kept, [95]).count("TOKENS DIFFER: speed-up void") == 1
    assert any("its speed-up is void" in warning for warning in batch_words.warnings(kept))


def test_the_sentences_say_what_the_numbers_say():
    said = "\n".join(batch_words.sentences(record()))
    assert "Batch 4, window 0 ms delivers 2.8 tokens/s, batch 1 1.0: throughput ×2.76" in said
    # The first of four is answered after 5.8 s instead of 4; the other three sooner.
    assert "1 of 4 are answered later, 3 sooner, 0 undecided" in said
    assert "Those who pay stand first in the queue: the first one's latency is ×1.45 [1.45, 1.45]" in said
    assert "tokens come at another pace: 1,604 ms each instead of 1,002 (×1.60 [1.60, 1.60])" in said
    assert "Chat: batch 4" in said and "Offline work: batch 4" in said
    assert "Undecided: nothing." in said


def test_the_chat_rule_heeds_its_limit():
    said = "\n".join(batch_words.sentences(record(step={1: 1.0, 2: 1.2, 4: 2.4})))
    assert "Chat: batch 2;" in said  # a full batch of 4 takes 8.2 s, more than 1.5 times 4 s


def test_cells_that_cannot_be_told_apart_are_called_undecided():
    kept = record(step={1: 1.0, 2: 1.2, 4: 1.2})
    for one in kept["trials"]:
        if one["batch_size"] == 2:  # as fast as batch 4 on average, but with a spread of a third
            scale = (1.0 + 0.33 * (-1) ** one["round"]) * 0.5
            one["done_s"] = [moment * scale for moment in one["done_s"]]
    said = "\n".join(batch_words.sentences(kept))
    assert "Offline work: undecided between batch" in said


def test_a_window_that_never_pays_is_not_praised():
    kept = record()
    row = {"latency_s": 1.0, "delay_s": 0.01, "low_s": 0.009, "high_s": 0.011, "rate": 0.2}
    kept["window"] = {"size": 4, "window_ms": 10.0, "capacity": 2.0, "cannot_pay_below": 0.4, "pays_from": None,
                      "rows": [row, row | {"rate": 0.4}, row | {"rate": 0.6, "low_s": -0.1}]}  # fmt: skip
    said = "\n".join(batch_words.sentences(kept))
    assert "Up to 0.40 requests/s it cannot: it only delays, by 10.0 ms at 0.20/s" in said
    assert "At no rate does it lower the average latency for sure" in said
    assert "0.60" in batch_tables.window_table(kept)


@pytest.mark.parametrize("count", range(1, 13))
def test_whatever_was_finished_before_ctrl_c_can_be_printed(count, tmp_path):
    kept = record(rounds=6)
    kept["trials"], kept["partial"] = kept["trials"][:count], True
    assert batch_words.sentences(kept) and batch_tables.sections(kept, [95])
    assert isinstance(batch_words.warnings(kept), list)
    batch_plots.draw(kept, tmp_path)


def test_a_few_rounds_decide_nothing():
    said = "\n".join(batch_words.sentences(record(rounds=2)))
    assert "named from 6 rounds on" in said and "2 rounds show large differences only" in said and "FASTER" not in said
    assert "What is bought? Nothing that these rounds can show" in said


def test_one_cell_alone_is_compared_with_nothing():
    assert batch_words.sentences(record(sizes=(1,), windows=(0.0,))) == [
        "Only one cell was measured: there is nothing to compare it with."
    ]


def test_a_machine_that_was_disturbed_and_broken_laws_are_said():
    kept = record()
    kept["trials"][0]["anchor_s"] = 0.2
    kept["trials"][1]["in_flight_s"] *= 2
    said = "\n".join(batch_words.warnings(kept))
    assert "1 of 36 trials met a machine more than 15 % off" in said and "Little's law is off" in said


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    text = batch_plots.draw(record(), tmp_path)
    assert sorted(path.name.rsplit("-", 1)[1] for path in tmp_path.iterdir()) == ["throughput.png", "timeline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir()) and "timeline" in text


# ---- the script


@pytest.fixture
def tiny(checkpoint_folder, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr("lab.batch_window.SEEDS", 3)  # the simulation is tested by itself: here it only has to run
    return ["--model", str(checkpoint_folder), "--json", str(tmp_path / "x.jsonl"), "--notes-file",
            str(tmp_path / "notes.md"), "--requests", "4", "--batch-sizes", "1,2,4", "--max-new-tokens", "4",
            "--prompt-tokens", "8"]  # fmt: skip


def left_with(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        console.run(lambda: batch_experiment.main(argv))
    return left.value.code


@pytest.mark.parametrize("more", [[], ["--prompts", "mixed"], ["--arrival", "poisson", "--rate", "200"]])
def test_a_sweep_keeps_its_laws_and_gives_every_request_the_tokens_it_gets_alone(tiny, tmp_path, capsys, more):
    assert batch_experiment.main([*tiny, "--rounds", "2", "--note", "Seen.", *more]) == 0
    shown = capsys.readouterr().out
    for part in ("### Batching:", "### Against batch 1", "### Where a request's time goes", "### Laws",
                 "### Predicted, then measured", "### Batching ledger", "### c(b)", "### Does a window"):  # fmt: skip
        assert part in shown
    (kept,) = read_lines(tmp_path / "x.jsonl")
    assert len(kept["trials"]) == 2 * 6 and figures.same_tokens(kept, kept["trials"])
    for one in kept["trials"]:
        assert abs(figures.little_off(one)) < 0.5  # ten times the law: a shared machine
        assert one["computed_positions"] >= one["useful_positions"] == sum(kept["prompt_lengths"]) + 4 * 3
        assert sorted(i for batch in one["batches"] for i in batch["members"]) == [0, 1, 2, 3]
        if not more:
            assert one["computed_positions"] == one["useful_positions"]  # equal lengths: nothing is padded
    assert "Seen." in (tmp_path / "notes.md").read_text()


def test_cells_alternate_their_order_by_round(tiny, tmp_path):
    batch_experiment.main([*tiny, "--rounds", "2", "--windows-ms", "0"])
    (kept,) = read_lines(tmp_path / "x.jsonl")
    assert [(t["round"], t["batch_size"]) for t in kept["trials"]] == [(0, 1), (0, 2), (0, 4), (1, 4), (1, 2), (1, 1)]


def test_more_rounds_go_on_from_the_same_file(tiny, tmp_path, capsys):
    batch_experiment.main([*tiny, "--rounds", "1", "--windows-ms", "0"])
    batch_experiment.main([*tiny, "--rounds", "2", "--windows-ms", "0"])
    first, second = read_lines(tmp_path / "x.jsonl")
    assert second["trials"][:3] == first["trials"] and len(second["trials"]) == 6
    assert second["resumed_from"] == first["id"]
    assert f"Going on with [{first['id']}]: 3 trials of it are not run again" in capsys.readouterr().out
    batch_experiment.main([*tiny, "--rounds", "2", "--windows-ms", "0"])  # complete: a new run, not the old one again
    assert "resumed_from" not in read_lines(tmp_path / "x.jsonl")[2]


def test_another_sweep_in_the_same_file_is_not_mixed_in(tiny, tmp_path):
    batch_experiment.main([*tiny, "--rounds", "1", "--windows-ms", "0"])
    batch_experiment.main([*tiny, "--rounds", "2", "--windows-ms", "0", "--prompt-tokens", "9"])
    assert "resumed_from" not in read_lines(tmp_path / "x.jsonl")[1]


def test_ctrl_c_in_the_middle_keeps_what_was_measured_and_the_same_line_goes_on(tiny, tmp_path, monkeypatch, capsys):
    real, calls = batch_experiment.run_trial, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(batch_experiment, "run_trial", interrupted)
    assert left_with([*tiny, "--rounds", "2"]) == 130
    (partial,) = read_lines(tmp_path / "x.jsonl")
    assert partial["partial"] and len(partial["trials"]) == 4
    assert "PARTIAL" in capsys.readouterr().out
    monkeypatch.setattr(batch_experiment, "run_trial", real)
    assert batch_experiment.main([*tiny, "--rounds", "2"]) == 0
    whole = read_lines(tmp_path / "x.jsonl")[1]
    assert len(whole["trials"]) == 12 and whole["trials"][:4] == partial["trials"] and not whole["partial"]


def test_a_failing_batch_costs_no_finished_trial(tiny, tmp_path, monkeypatch):
    real, calls = batch_experiment.run_trial, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(batch_experiment, "run_trial", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        batch_experiment.main(tiny)
    (kept,) = read_lines(tmp_path / "x.jsonl")
    assert kept["partial"] and len(kept["trials"]) == 3


def test_a_prompt_at_the_edge_of_the_context_is_measured(tiny, tmp_path):
    assert batch_experiment.main([*tiny, "--prompt-tokens", "126", "--max-new-tokens", "2", "--rounds", "1"]) == 0
    assert len(read_lines(tmp_path / "x.jsonl")[0]["trials"]) == 6


def test_a_real_ctrl_c_ends_threads_and_leaves_a_record(tiny, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "batch_experiment.py", *tiny, "--rounds", "500"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in child.stdout:
        if line.startswith("| Prompt"):
            break
    threading_wait(child, 3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in err and "PARTIAL" in out
    assert read_lines(tmp_path / "x.jsonl")[0]["partial"]


def threading_wait(child: subprocess.Popen, seconds: float) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(seconds)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--batch-sizes", "0,4"], "--batch-sizes takes numbers of at least 1, and 0 is among them."),
        (["--batch-sizes", "one"], "--batch-sizes takes numbers with commas between them"),
        (["--windows-ms", "-1"], "--windows-ms takes numbers of at least 0, and -1.0 is among them."),
        (["--windows-ms", "nan"], "--windows-ms takes numbers of at least 0, and nan is among them."),
        (["--windows-ms", "inf"], "--windows-ms takes numbers up to 3.6e+06, and inf is among them."),
        (["--check-window", "--windows-ms", "0"], "--check-window needs a batch of more than one and a window above 0"),
        (["--requests", "3"], "--requests 3 can never fill a batch of 4"),
        (["--arrival", "flood"], "--arrival must be one of burst, poisson, constant, and is 'flood'."),
        (["--rate", "0"], "--rate must be at least 0.001, and is 0.0."),
        (["--rate", "inf"], "--rate must be at most 1000000.0, and is inf."),
        (["--rate", "nan"], "--rate must be at least 0.001, and is nan."),
        (["--percentiles", "100"], "--percentiles must lie between 1 and 100."),
        (["--rounds", "0"], "--rounds must be at least 1, and is 0."),
        (["--prompt-tokens", "126"], "The prompt has 126 tokens and 4 new ones are asked for"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(tiny, capsys, argv, sentence):
    assert left_with([*tiny, *argv]) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err and err.strip().count("\n") == 0


def test_json_dash_prints_one_record(checkpoint_folder, capsys):
    batch_experiment.main(["--model", str(checkpoint_folder), "--json", "-", "--quick", "--prompt-tokens", "4"])
    shown = capsys.readouterr().out
    assert json.loads(shown)["script"] == "batch_experiment" and shown.count("\n") == 1


@pytest.fixture
def a_rate_to_check(monkeypatch):
    """The simulation runs, but its answer is set: from a tiny model's noisy steps it may find no rate at all."""
    real = batch_experiment.batch_window.break_even
    monkeypatch.setattr(
        batch_experiment.batch_window, "break_even", lambda *args: real(*args) | {"cannot_pay_below": 40.0}
    )


@pytest.mark.usefixtures("a_rate_to_check")
def test_checking_the_window_runs_both_rates_with_and_without_it(tiny, tmp_path, capsys):
    batch_experiment.main([*tiny, "--rounds", "2", "--batch-sizes", "4", "--windows-ms", "0,5", "--check-window"])
    (kept,) = read_lines(tmp_path / "x.jsonl")
    check = kept["window"]["check"]
    rates = sorted({trial["rate"] for trial in check})
    assert rates == [20.0, 80.0]
    assert len(check) == 2 * 2 * 2 and {trial["window_ms"] for trial in check} == {0.0, 5.0}
    shown = capsys.readouterr().out
    assert "Checked by running, the same arrivals" in shown and "about 0 minutes" in shown


@pytest.mark.usefixtures("a_rate_to_check")
def test_an_interrupted_window_check_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    argv = [*tiny, "--rounds", "2", "--batch-sizes", "4", "--windows-ms", "0,5", "--check-window"]
    real, calls = batch_experiment.run_trial, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 7:  # four cells, two trials of the check
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(batch_experiment, "run_trial", interrupted)
    assert left_with(argv) == 130
    monkeypatch.setattr(batch_experiment, "run_trial", real)
    assert batch_experiment.main(argv) == 0
    first, second = read_lines(tmp_path / "x.jsonl")
    assert len(first["window"]["check"]) == 2 and len(second["window"]["check"]) == 8
    assert second["window"]["check"][:2] == first["window"]["check"] and len(second["trials"]) == 4


@pytest.mark.parametrize("mistake", ["order", "exec-only", "mean-of-p95"])
def test_batching_mistakes_are_made_and_told(checkpoint_folder, tmp_path, capsys, mistake):
    argv = [mistake, "--model", str(checkpoint_folder), "--json", str(tmp_path / "m.jsonl"), "--max-new-tokens", "3"]
    assert mistakes.main([*argv, "--runs", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Wrong:" in shown and "Right:" in shown
    (kept,) = read_lines(tmp_path / "m.jsonl")
    assert len(kept["samples"]) == 3 and kept["question"] == f"mistake-{mistake}"


def test_execution_time_alone_hides_the_queue():
    from experiments.batch_mistakes import exec_only

    sample = {"1": trial(0, 1, 0.0, 1.0), "4": trial(0, 2, 0.0, 1.2), "8": trial(0, 4, 0.0, 1.6)}
    rows, said = exec_only([sample] * 3)
    assert rows[0][1:3] == ("4.000", "10.000")  # four alone, 4 s each, one after the other: 4, 8, 12, 16
    assert rows[-1][1:3] == ("1.45", "0.58") and "the conclusion is turned round" in said[0]
