"""The scripts as a user meets them: output, records, bad input, pipes, locales, Ctrl-C."""

import fcntl
import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from statistics import median

import pytest

import infer
import inspect_prefill_decode
from experiments import mistakes
from lab import console
from lab.records import read_lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def left_with(main, argv: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        console.run(lambda: main(argv))
    return left.value.code


@pytest.fixture
def paths(tmp_path) -> list[str]:
    """Arguments that keep a test's records out of the project."""
    return ["--json", str(tmp_path / "results" / "x.jsonl"), "--notes-file", str(tmp_path / "notes.md")]


@pytest.fixture
def tiny(checkpoint_folder, paths) -> list[str]:
    return ["--model", str(checkpoint_folder), *paths]


# ---- what is printed and kept


def test_infer_prints_every_section_and_keeps_every_sample(tiny, tmp_path, capsys):
    assert infer.main([*tiny, "--max-new-tokens", "8", "--ignore-eos", "--note", "I saw it."]) == 0
    shown = capsys.readouterr().out
    for part in ("### Card", "### Model", "### What theory allows", "### Answer", "### STATS", "### Per-token latency",
                 "### Cold-start ledger", "### Memory", "### Verdict", "Where is the time?", "Which wall binds decode?",
                 "Conservation of time"):  # fmt: skip
        assert part in shown
    (kept,) = read_lines(tmp_path / "results" / "x.jsonl")
    assert (kept["script"], len(kept["runs"]), kept["partial"], kept["schema"]) == ("infer", 6, False, 1)
    assert all(len(run["decode"]) == 7 for run in kept["runs"])
    assert kept["memory"]["kv_held_bytes"] == kept["memory"]["kv_predicted_bytes"]
    assert kept["model"]["hash"] in shown and kept["output_hash"] in shown and kept["id"] in shown
    notes = (tmp_path / "notes.md").read_text()
    assert "I saw it." in notes and kept["id"] in notes and "### STATS" in notes
    assert read_lines(tmp_path / "results" / "cited.jsonl") == [kept]


def test_stages_of_a_real_run_add_up(tiny, capsys, tmp_path):
    infer.main([*tiny, "--max-new-tokens", "20", "--ignore-eos"])
    (kept,) = read_lines(tmp_path / "results" / "x.jsonl")
    for run in kept["runs"]:
        parts = sum(run[s] for s in ("tokenize", "to_device", "prefill", "to_host", "detokenize")) + sum(run["decode"])
        assert 0 <= run["total"] - parts < max(0.02 * run["total"], 0.01)  # ten times the law: a shared machine
        assert run["tokenize"] + run["to_device"] + run["prefill"] <= run["ttft"] <= run["total"]
    assert capsys.readouterr().err.count("conservation") == 0


def test_json_dash_prints_one_record_and_no_table(checkpoint_folder, capsys):
    infer.main(["--model", str(checkpoint_folder), "--json", "-", "--quick", "--max-new-tokens", "3"])
    shown = capsys.readouterr().out
    assert json.loads(shown)["script"] == "infer" and shown.count("\n") == 1


def test_random_weights_say_timing_only_and_show_no_text(checkpoint_folder, paths, capsys):
    infer.main(["--model", f"random:{checkpoint_folder}", *paths, "--quick", "--max-new-tokens", "4"])
    shown = capsys.readouterr().out
    assert "TIMING ONLY" in shown and "(not shown: the weights are random" in shown
    assert "4 new tokens" in shown  # no end token stops them


def test_the_same_seed_gives_the_same_output_hash(checkpoint_folder, capsys):
    def output(seed: int) -> str:
        infer.main(["--model", f"random:{checkpoint_folder}", "--json", "-", "--quick", "--seed", str(seed)])
        return json.loads(capsys.readouterr().out)["output_hash"]

    assert output(1) == output(1) != output(2)


def test_attention_kernels_give_the_same_tokens(checkpoint_folder, capsys):
    def output(kind: str) -> str:
        infer.main(["--model", str(checkpoint_folder), "--json", "-", "--quick", "--attention", kind, "--ignore-eos"])
        return json.loads(capsys.readouterr().out)["output_hash"]

    assert output("sdpa") == output("eager")


def test_breakdown_and_trace(tiny, tmp_path, capsys):
    trace = tmp_path / "t.json"
    infer.main([*tiny, "--quick", "--breakdown", "--trace", str(trace), "--max-new-tokens", "4", "--ignore-eos"])
    shown = capsys.readouterr().out
    assert "### Breakdown: time by part of the network" in shown and "aten::" in shown
    assert "traceEvents" in json.loads(trace.read_text())


def test_inspect_shows_shapes_the_growing_cache_and_proves_its_tokens(tiny, tmp_path, capsys):
    assert inspect_prefill_decode.main([*tiny, "--raw", "--max-new-tokens", "6", "--ignore-eos"]) == 0
    shown = capsys.readouterr().out
    prompt = len("Explain why batching improves GPU utilization.")
    assert f"(1, {prompt}, 257)" in shown and f"2 layers × 2 × (1, 2, {prompt}, 16)" in shown
    assert "All 6 tokens equal those of transformers' generate(), in each of 5 runs." in shown
    (kept,) = read_lines(tmp_path / "results" / "x.jsonl")
    assert kept["runs"][0]["cache_tokens"] == [prompt + i for i in range(1, 6)]


def test_inspect_says_so_when_the_tokens_differ(tiny, capsys, monkeypatch):
    import torch

    wrong = torch.tensor([[1, 2, 3]])
    monkeypatch.setattr(inspect_prefill_decode, "transformers_generate", lambda *_, **__: wrong)
    inspect_prefill_decode.main([*tiny, "--max-new-tokens", "3", "--ignore-eos"])
    assert (
        "DIFFERENT from transformers' generate() at new token 1: the times below are void." in capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["cold", "unsynced", "folded"])
def test_each_mistake_is_shown_beside_the_right_figure(name, tiny, capsys, tmp_path):
    assert mistakes.main([name, *tiny, "--quick"]) == 0
    shown = capsys.readouterr().out
    assert "with the mistake" in shown and "Right: " in shown
    (kept,) = read_lines(tmp_path / "results" / "x.jsonl")
    assert kept["question"] == f"mistake-{name}" and kept["samples"]


def test_a_clock_without_synchronisation_reads_too_little(tiny, tmp_path):
    mistakes.main(["unsynced", *tiny])
    (kept,) = read_lines(tmp_path / "results" / "x.jsonl")
    for stats in kept["samples"]:
        assert median(stats["submitted"]) < 0.5 * median(stats["done"])


# ---- bad input: one sentence, status 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prompt", ""], "The prompt is empty"),
        (["--prompt", "x" * 200], "context of 128"),
        (["--max-new-tokens", "500"], "500 new ones are asked for"),
        (["--max-new-tokens", "0"], "must be at least 1"),
        (["--device", "cuda"], "is not available here"),
        (["--dtype", "float8"], "--dtype"),
        (["--trace", "/proc/no/trace.json", "--quick"], "/proc/no/trace.json cannot be written"),
        (["--note", "x", "--notes-file", "/proc/notes.md"], "cannot be written"),
        (["--json", "/proc/x.jsonl"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tiny, argv, says, capsys):
    if "cuda" in argv and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU here")
    assert left_with(infer.main, [*tiny, *argv]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(said) == 1 and says in said[0]


def test_a_model_without_a_tokenizer_is_one_sentence(checkpoint_folder, tmp_path, paths, capsys):
    folder = shutil.copytree(checkpoint_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert left_with(infer.main, ["--model", str(folder), *paths]) == 2
    assert "holds no usable tokenizer" in capsys.readouterr().err


# ---- processes


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "infer.py"), *arguments]


def test_output_into_head_is_quiet_and_the_record_is_kept(checkpoint_folder, tmp_path):
    record = tmp_path / "x.jsonl"
    words = " ".join(command("--model", str(checkpoint_folder), "--quick", "--json", str(record)))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} | head -n 3"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("# Day 1")
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert done.returncode == 141
    (kept,) = read_lines(record)  # the reader went away before the first run; what was asked for was measured
    assert len(kept["runs"]) == 3 and not kept["partial"]


def test_a_terminal_that_knows_only_ascii_gets_ascii(checkpoint_folder, tmp_path):
    done = subprocess.run(
        command("--model", str(checkpoint_folder), "--quick", "--json", str(tmp_path / "x.jsonl")),
        capture_output=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode("ascii")
    assert "run 1 " in text and "95 % interval" in text and "?" not in text.split("### Per-token latency")[1][:200]
    assert json.loads((tmp_path / "x.jsonl").read_text())


def test_a_full_disk_behind_stdout_is_one_sentence(checkpoint_folder, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("--model", str(checkpoint_folder), "--quick", "--json", str(tmp_path / "x.jsonl")),
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2
    assert "the output could not be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_prints_and_saves_what_was_measured_and_marks_it(tmp_path, checkpoint_folder):
    """stderr is a terminal here, so that the progress bar tells when the first run is over."""
    record, (master, slave) = tmp_path / "x.jsonl", os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a terminal of no width gets no bar
    process = subprocess.Popen(
        command("--model", str(checkpoint_folder), "--runs", "100000", "--json", str(record), "--max-new-tokens", "30"),
        stdout=subprocess.PIPE, stderr=slave, text=True,
    )  # fmt: skip
    seen, deadline = b"", time.monotonic() + 90
    while not re.search(rb"[1-9]\d*/100000", seen):
        assert time.monotonic() < deadline and process.poll() is None, seen
        if select.select([master], [], [], 1)[0]:
            seen += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    while select.select([master], [], [], 0)[0]:
        seen += os.read(master, 1 << 16)
    assert process.returncode == 130
    assert "PARTIAL: interrupted" in out and "### STATS" in out
    assert b"Traceback" not in seen
    (kept,) = read_lines(record)
    assert kept["partial"] and 1 <= len(kept["runs"]) < 100000


def test_ctrl_c_during_the_warm_up_keeps_the_cold_request(monkeypatch, capsys, tiny, tmp_path):
    """It was a TypeError: the utilisation of a GPU that was never sampled was formatted as a number."""
    real, calls = infer.one_request, []

    def once(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(infer, "one_request", once)
    assert left_with(infer.main, tiny) == 130
    assert "one cold run supports no conclusion" in capsys.readouterr().out
    (kept,) = read_lines(tmp_path / "results" / "x.jsonl")
    assert kept["partial"] and kept["cold"]["prefill"] > 0


def test_ctrl_c_in_a_mistake_keeps_its_requests(monkeypatch, capsys, tiny, tmp_path):
    real, calls = mistakes.decode_step, []

    def some(*arguments):
        calls.append(1)
        if len(calls) > 40:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(mistakes, "decode_step", some)
    assert left_with(mistakes.main, ["folded", *tiny]) == 130
    (kept,) = read_lines(tmp_path / "results" / "x.jsonl")
    assert kept["partial"] and len(kept["samples"]) == 2
    assert "decode speed" in capsys.readouterr().out


def test_ctrl_c_before_anything_was_measured_says_so(monkeypatch, capsys, tiny):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "find", interrupted)
    assert left_with(infer.main, tiny) == 130
    assert "interrupted before anything was measured" in capsys.readouterr().err
