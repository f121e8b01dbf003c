"""Day 3: the same tokens with every kind of cache, exact bytes, figures worked out by hand, and the script."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

import kv_experiment
from config import UserError
from experiments import mistakes
from lab import console, kv_ledger, kv_plots, kv_probes, kv_tables, kv_words
from lab import kv_figures as figures
from lab.kv_figures import Cell
from lab.records import read_lines
from model import decode_step, ids_tensor, kv_cache_bytes, prefill, recompute, static_cache, transformers_generate
from weights.random_init import SHAPES

pytestmark = pytest.mark.slow


def prompt_of(length: int) -> list[int]:
    return torch.randint(1, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist()


# ---- one run


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 7, 33])
def test_all_kinds_of_cache_and_kernels_give_the_tokens_of_transformers(any_model, length, attention):
    expected = transformers_generate(any_model, ids_tensor([prompt_of(length)]), max_new_tokens=12)[0].tolist()
    any_model.net.set_attn_implementation(attention)
    try:
        runs = [
            kv_experiment.run_experiment(
                length,
                kind != "off",
                model=any_model,
                prompt=prompt_of(length),
                new_tokens=12,
                static_tokens=length + 12 if kind == "static" else None,
            )
            for kind in kv_experiment.KINDS
        ]
    finally:
        any_model.net.set_attn_implementation("sdpa")
    assert [run["tokens"] for run in runs] == [expected] * 3
    assert all(len(run["decode_s"]) == 11 and run["prompt_len"] == length for run in runs)
    assert all(run["total_s"] >= run["prefill_s"] + sum(run["decode_s"]) for run in runs)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_bytes_held_are_exactly_the_formulas(family):
    model = tiny_model(family)
    run = kv_experiment.run_experiment(10, True, model=model, prompt=prompt_of(10), new_tokens=5)
    layers, kv_heads, head_dim = (2, 4, 8) if family == "gpt2" else (2, 2, 8)
    assert run["kv_bytes"] == 2 * layers * kv_heads * head_dim * 4 * 14  # the fifth new token is never read
    assert kv_ledger.token_bytes(layers, kv_heads, head_dim, 4) == model.kv_bytes_per_token()
    assert kv_experiment.run_experiment(10, False, model=model, prompt=prompt_of(10), new_tokens=5)["kv_bytes"] == 0
    room = static_cache(model, 40)
    prefill(model, ids_tensor([prompt_of(10)]), cache=room)
    assert kv_cache_bytes(room) == 40 * model.kv_bytes_per_token()  # all of it, from the first token on


def test_without_a_cache_every_step_reads_the_whole_context(llama, monkeypatch):
    widths = []
    monkeypatch.setattr(
        kv_experiment, "recompute", lambda model, ids: widths.append(ids.shape[1]) or recompute(model, ids)
    )
    kv_experiment.run_experiment(6, False, model=llama, prompt=prompt_of(6), new_tokens=4)
    assert widths == [6, 7, 8, 9]


@pytest.mark.parametrize(("length", "new"), [(0, 5), (-3, 5), (5, 0)])
def test_impossible_runs_are_refused(llama, length, new):
    with pytest.raises(UserError, match="both must be at least 1"):
        kv_experiment.run_experiment(length, True, model=llama, prompt=[1], new_tokens=new)


def test_a_run_says_what_it_lacks(llama):
    for given, sentence in (
        ({"model": llama}, "A prompt of 5 tokens is asked for, and none is given"),
        ({"model": llama, "prompt": [1, 2]}, "the given one has 2"),
        ({"model": llama, "prompt": [1] * 5, "new_tokens": 252}, "a context of 256"),
        ({"model": llama, "prompt": [1] * 5, "static_tokens": 9}, "static_tokens needs"),
    ):
        with pytest.raises(UserError, match=sentence):
            kv_experiment.run_experiment(5, True, **given)


def test_a_run_knows_its_peak(llama):
    peak = kv_experiment.run_experiment(5, True, model=llama, prompt=[1] * 5, new_tokens=3)["peak_bytes"]
    assert peak is None or peak > 10**8  # this process with PyTorch in it


# ---- small measurements

LINUX_ONLY = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
CPU = torch.device("cpu")


@LINUX_ONLY
def test_memory_that_is_taken_is_seen_and_what_was_freed_is_not_counted_as_there():
    scrap = [torch.ones(2**18) for _ in range(40)]
    del scrap  # 40 MB that the C library may keep for later
    kv_probes.trim()
    before = kv_probes.held_bytes(CPU)
    kept = [torch.ones(2**20) for _ in range(10)]  # 42 MB
    grew = kv_probes.held_bytes(CPU) - before
    assert grew == pytest.approx(sum(t.nbytes for t in kept), rel=0.05)


@LINUX_ONLY
def test_a_peak_that_is_over_before_the_block_ends_is_seen():
    with kv_probes.Peak(CPU) as peak:
        torch.ones(25 * 10**6).sum()  # 100 MB, for a moment
    assert peak.above == pytest.approx(10**8, rel=0.1) and peak.whole > peak.above


@LINUX_ONLY
def test_reserving_takes_what_the_formula_says():
    model = SimpleNamespace(kv_bytes_per_token=lambda: 30_000, device=CPU)
    found = kv_probes.reserved(model, [10, 60], 40)
    assert found["maximum_formula"] == 16 * 100 * 30_000 and found["used"] < found["blocks_formula"]
    for name in ("maximum", "blocks"):
        assert found[name] == pytest.approx(found[f"{name}_formula"], rel=0.05)


def test_probes_that_would_take_too_much_are_left_out(monkeypatch, any_model):
    monkeypatch.setattr(kv_probes, "free_bytes", lambda _device: 10_000)
    assert kv_probes.reserved(any_model, [10], 40) is None
    read = partial(prefill, any_model)
    assert kv_probes.growth(read, ids_tensor([prompt_of(50)]), kv_cache_bytes, CPU) is None


ESTIMATED = """
import sys
sys.path[:0] = sys.argv[1:]
from test_kv import *
for attention in ("sdpa", "eager"):
    model = tiny_model("llama", hidden_size=256, intermediate_size=1024, max_position_embeddings=2048)
    model.net.set_attn_implementation(attention)
    ids = ids_tensor([prompt_of(1500)])
    prefill(model, ids)
    kv_probes.trim()
    with kv_probes.Peak(CPU) as peak:
        prefill(model, ids)
    print(peak.above, kv_ledger.needed_bytes(model, Cell(1500, "dynamic", attention), 1500))
"""


@LINUX_ONLY
def test_the_estimate_is_not_below_what_a_prefill_takes():
    """1,500 tokens of 256 numbers stand out. In a process of its own: a long life leaves holes in memory."""
    folders = (str(Path(__file__).parent), str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", ESTIMATED, *folders], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        above, estimated = map(int, line.split())
        assert above > 10**7
        assert estimated > 0.8 * above


def test_shares_are_of_the_operators_own_time():
    rows = [{"operator": "aten::mm", "own_s": 6.0}, {"operator": "aten::_flash_attention", "own_s": 3.0},
            {"operator": "aten::cat", "own_s": 1.0}]  # fmt: skip
    assert kv_probes.share_of(rows, kv_probes.ATTENTION) == pytest.approx(0.3)
    assert kv_probes.share_of(rows, kv_probes.COPYING) == pytest.approx(0.1)


@pytest.mark.parametrize("room", [0, 1, 20])
def test_profiles_stay_inside_the_context(room):
    """GPT-2's positions end at its context: one step too many is an IndexError, or worse on a GPU."""
    gpt2 = tiny_model("gpt2")
    ids = ids_tensor([prompt_of(256 - room)])
    found = kv_probes.attention_share(CPU, partial(prefill, gpt2), partial(decode_step, gpt2), ids, room)
    assert 0 < found["prefill"] < 1 and (found["decode"] is None) == (room == 0)


# ---- by formula


def test_known_shapes_are_what_their_papers_say():
    """SmolLM2: 3 KV heads of 9; distilgpt2: every head has its own; Llama 7B in float16: half a megabyte a token."""
    rows = {name: kv_ledger.shape_row(name, SHAPES[name], 2) for name in ("distilgpt2", "SmolLM2-135M", "llama-7b")}
    assert rows["distilgpt2"]["token_bytes"] == 2 * 6 * 12 * 64 * 2 == rows["distilgpt2"]["if_every_head_had_its_own"]
    assert rows["SmolLM2-135M"]["token_bytes"] * 3 == rows["SmolLM2-135M"]["if_every_head_had_its_own"]
    assert rows["llama-7b"]["token_bytes"] == 524_288


def test_the_ledger_of_a_small_model_by_hand(llama):
    own = kv_ledger.ledger(llama, 10**9, SHAPES)
    assert own["token_bytes"] == 256 and own["outgrows_at"] == llama.weight_bytes() / 256
    assert own["fit"]["128"] == 10**9 // (128 * 256)
    assert [kv_ledger.in_blocks(n) for n in (1, 16, 17)] == [16, 16, 32]


def test_floors_count_every_step_with_its_own_context(llama):
    found = kv_ledger.floors(llama, [Cell(10, "off", "sdpa"), Cell(10, "dynamic", "sdpa")], new_tokens=3)
    assert found["10 off sdpa"]["steps"][0] == (llama.flops(11, 0), llama.read_bytes(11, 0))
    assert found["10 dynamic sdpa"]["steps"] == [
        (llama.flops(1, 10), llama.read_bytes(1, 10)), (llama.flops(1, 11), llama.read_bytes(1, 11)),
    ]  # fmt: skip


# ---- figures and sentences, from trials worked out by hand


def trial(turn: int, prompt_len: int, cache: str, wobble: float = 0.0) -> dict:
    """Without a cache a step takes 10 ms and 1 ms for each token of context; with it always 20 ms."""
    steps = [(0.010 + 0.001 * (prompt_len + i + 1) if cache == "off" else 0.020) * (1 + wobble) for i in range(19)]
    first = 0.010 + 0.001 * prompt_len
    return {
        "round": turn, "run": "a", "prompt_len": prompt_len, "cache": cache, "attention": "sdpa", "prefill_s": first,
        "decode_s": steps, "total_s": first + sum(steps), "kv_bytes": 0 if cache == "off" else 256 * (prompt_len + 19),
        "tokens": f"hash{prompt_len}", "gpu_percent_mean": None, "anchor_s": 0.05,
        "bytes_per_s": 30e9, "flops_per_s": 1e11,
    }  # fmt: skip


def record(rounds: int = 6, lengths=(5, 40, 120, 400)) -> dict:
    found = [Cell(n, kind, "sdpa") for n in lengths for kind in ("off", "dynamic")]
    model = SimpleNamespace(
        heads=(2, 4, 2, 8), place=SimpleNamespace(dtype=torch.float32), kv_bytes_per_token=lambda: 256,
        weight_bytes=lambda: 256_000,
    )  # fmt: skip
    return {
        "id": "kv_experiment-000000-abcdef", "partial": False, "skipped": {},
        "cells": [cell.as_list() for cell in found],
        "config": {"new_tokens": 20, "rounds": rounds, "attention": "sdpa"},
        "model": {"name": "tiny", "dtype": "float32", "device": "cpu", "context": 1024},
        "floors": {cell.name: {"prefill": (10**9, 10**8), "steps": [(10**8, 10**8)] * 19} for cell in found},
        "ledger": kv_ledger.ledger(model, 10**9, SHAPES),
        "trials": [
            trial(turn, cell.prompt_len, cell.cache, 0.001 * ((turn * 7 + i) % 5 - 2))
            for turn in range(rounds)
            for i, cell in enumerate(found)
        ],
        "took": {cell.name: 10**7 * (1 + (cell.cache == "off")) for cell in found},
        "growth": {"caches": 4, "tokens": 1600, "tensor_bytes": 409_600, "grew_bytes": 420_000},
        "reserved": {"requests": 16, "longest": 420, "used": 1_000_000, "maximum": 1_720_000,
                     "maximum_formula": 1_720_320, "blocks": 1_030_000, "blocks_formula": 1_028_000},
        "shares": [{"tokens": 5, "prefill": 0.01, "decode": 0.02, "copying": 0.01},
                   {"tokens": 400, "prefill": 0.2, "decode": 0.1, "copying": 0.1}],
    }  # fmt: skip


def test_the_laws_of_both_ways_are_found():
    kept = record()
    off, on = (figures.step_growth(kept, cache, "sdpa") for cache in ("off", "dynamic"))
    assert off.law.name == "linear" and off.law.numbers == pytest.approx((0.010, 0.001), rel=0.02)
    assert on.law.name == "constant" and on.law.numbers[0] == pytest.approx(0.020, rel=0.01)
    assert off.span == (7, 419)  # the first step of each run is left out
    p, half = figures.step_exponent(kept, "off", "sdpa")
    assert 0.7 < p < 1 and half < 0.05  # below 1: the 10 ms that do not grow are in it
    assert figures.total_growth(kept, "off", "sdpa").law.name == "linear"


def test_time_to_the_nth_token_starts_with_the_prefill():
    kept = record(rounds=1, lengths=(40,))
    growth = figures.length_growth(kept, Cell(40, "dynamic", "sdpa"))
    assert growth.law.name == "linear" and growth.law.numbers[1] == pytest.approx(0.020, rel=0.01)
    assert growth.law(1) == pytest.approx(0.050, rel=0.01)


def test_the_sentences_say_what_the_numbers_say():
    said = "\n".join(kv_words.sentences(record()))
    assert "prompt 400: 0.79 s instead of 8.39, ×10.6" in said and "FASTER" in said
    assert "Without a cache a decode step grows by a linear law over contexts of 7 to 419 tokens" in said
    assert "Exponential growth is rejected" in said
    assert "a step with the cache is cheaper from a context of about 11 tokens on" in said
    assert "A chat of 10 turns" in said and "measured: 7 to 419" in said
    assert "256 bytes a token: the cache outgrows the weights (0.256 MB) at 1,000 tokens" in said
    assert "42% of the memory empty, blocks of 16 tokens 3%" in said and "is 1.0% and 20.0% of a prefill" in said


def test_a_chat_is_summed_over_every_step_of_every_turn():
    """10 turns: in turn t the context runs from 100t + 50 to 100t + 99. With 20 ms each: 500 steps, 10 s."""
    said = "\n".join(kv_words.chat(record()))
    without = sum(0.010 + 0.001 * (100 * t + 50 + i) for t in range(10) for i in range(50))
    assert "spends 10 s on its decode steps with the cache and 267 s without it" in said and round(without) == 267


def test_other_tokens_void_the_row():
    kept = record()
    kept["trials"][3]["tokens"] = "other"  # prompt 40
    assert kv_tables.owners_table(kept).count("TOKENS DIFFER: void") == 2  # both ways of that prompt
    assert any("gave different tokens" in warning for warning in kv_words.warnings(kept))
    (row,) = (line for line in kv_tables.against_table(kept).splitlines() if "VOID" in line)
    assert row.split("|")[1].strip() == "40" and "FASTER" not in row
    said = "\n".join(kv_words.sentences(kept))
    assert "prompt 40:" not in said and "prompt 120:" in said
    for one in kept["trials"]:
        one["tokens"] = str(one["round"])
    assert kv_words.sentences(kept) == ["No prompt gave the same tokens in every way, so nothing can be said."]


def test_rounds_that_lack_a_prompt_have_no_say_in_the_exponent():
    whole, cut = record(), record()
    cut["trials"] = [t for t in cut["trials"] if t["round"] < 5 or t["prompt_len"] == 5]
    p, half = figures.step_exponent(cut, "off", "sdpa")
    assert p == pytest.approx(figures.step_exponent(whole, "off", "sdpa")[0], abs=0.01) and half < 0.05


def test_a_cache_that_is_not_the_formulas_is_told():
    kept = record()
    kept["trials"][1]["kv_bytes"] //= 2
    assert "KV is not the formula's" in kv_tables.owners_table(kept)
    assert any("sliding window" in warning for warning in kv_words.warnings(kept))


def test_lost_time_is_noticed():
    kept = record()
    assert all(map(figures.conserved, kept["trials"]))
    kept["trials"][0]["total_s"] *= 1.1
    assert not figures.conserved(kept["trials"][0])
    assert any("conservation of time is broken" in warning for warning in kv_words.warnings(kept))


def page() -> str:
    return "\n\n".join([*kv_tables.sections(record()), *kv_words.sentences(record())]) + "\n"


def test_the_page_is_the_golden_one():
    """To change it on purpose: PYTHONPATH=.:tests python -c "import test_kv as t; print(t.page(), end='')" """
    assert page() == (Path(__file__).parent / "golden" / "day3.md").read_text()


def test_the_owners_table_has_its_columns():
    text = kv_tables.owners_table(record())
    for column in ("Prompt Length", "KV Cache", "Total Time (s)", "Avg Token Latency (ms)", "Prefill Time (s)", "Notes",
                   "first step ms", "last step ms", "KV MB"):  # fmt: skip
        assert column in text


@pytest.mark.parametrize("count", range(1, 9))
def test_whatever_was_finished_before_ctrl_c_can_be_printed(count, tmp_path):
    kept = record(rounds=1)
    kept["trials"], kept["partial"] = kept["trials"][:count], True
    del kept["growth"], kept["shares"], kept["reserved"]
    assert kv_words.sentences(kept) and kv_tables.sections(kept) and isinstance(kv_words.warnings(kept), list)
    kv_plots.draw(kept, tmp_path)


def test_the_figure_is_drawn(tmp_path):
    assert "kv.png" in kv_plots.draw(record(), tmp_path)
    assert next(tmp_path.iterdir()).read_bytes().startswith(b"\x89PNG")


# ---- the script


@pytest.fixture
def tiny(checkpoint_folder, tmp_path, monkeypatch) -> list[str]:
    """A small matrix; looks at the machine and profiles are cut short, since no test reads a time."""
    monkeypatch.setattr("lab.ceilings.ANCHOR_REPEATS", 1)
    monkeypatch.setattr("lab.kv_probes.PROFILES", 1)
    return ["--model", str(checkpoint_folder), "--json", str(tmp_path / "x.jsonl"), "--notes-file",
            str(tmp_path / "notes.md"), "--prompt-lens", "4,9,20,40", "--new-tokens", "5"]  # fmt: skip


def left_with(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        console.run(lambda: kv_experiment.main(argv))
    return left.value.code


def test_the_default_matrix_prints_every_section_and_keeps_every_step(tiny, tmp_path, capsys):
    assert kv_experiment.main([*tiny, "--note", "Seen."]) == 0
    shown = capsys.readouterr().out
    for part in ("### KV cache:", "### With a cache against without", "### By which law", "### KV ledger",
                 "### How many", "### Formula against memory", "### Attention's share", "### Verdict"):  # fmt: skip
        assert part in shown
    (kept,) = read_lines(tmp_path / "x.jsonl")
    assert len(kept["trials"]) == 3 * 8 and all(len(t["decode_s"]) == 4 for t in kept["trials"])
    assert all(figures.same_tokens(kept, n) for n in (4, 9, 20, 40))
    assert kept["growth"]["tensor_bytes"] == 160 * kept["ledger"]["token_bytes"]
    assert "Seen." in (tmp_path / "notes.md").read_text()


def test_all_kinds_and_kernels_in_one_run(tiny, tmp_path):
    kv_experiment.main([*tiny, "--cache", "off,dynamic,static", "--attention", "sdpa,eager", "--rounds", "1"])
    (kept,) = read_lines(tmp_path / "x.jsonl")
    assert len(kept["trials"]) == 4 * 3 * 2 and all(figures.same_tokens(kept, n) for n in (4, 9, 20, 40))


def test_cells_alternate_and_more_rounds_go_on(tiny, tmp_path):
    argv = [*tiny, "--prompt-lens", "4,9"]
    kv_experiment.main([*argv, "--rounds", "1"])
    kv_experiment.main([*argv, "--rounds", "2"])
    first, second = read_lines(tmp_path / "x.jsonl")
    assert second["trials"][:4] == first["trials"] and second["resumed_from"] == first["id"]
    assert [(t["prompt_len"], t["cache"]) for t in second["trials"]] == [
        (4, "off"), (4, "dynamic"), (9, "off"), (9, "dynamic"), (9, "dynamic"), (9, "off"), (4, "dynamic"), (4, "off"),
    ]  # fmt: skip


def test_ctrl_c_keeps_finished_cells_and_the_same_line_goes_on(tiny, tmp_path, monkeypatch):
    real, calls = kv_experiment.Matrix.trial, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(kv_experiment.Matrix, "trial", interrupted)
    assert left_with([*tiny, "--rounds", "1"]) == 130
    monkeypatch.setattr(kv_experiment.Matrix, "trial", real)
    assert kv_experiment.main([*tiny, "--rounds", "1"]) == 0
    partial, whole = read_lines(tmp_path / "x.jsonl")
    assert partial["partial"] and len(partial["trials"]) == 3
    assert len(whole["trials"]) == 8 and whole["trials"][:3] == partial["trials"]


def test_a_length_over_the_context_is_a_skipped_row_and_the_others_run(tiny, tmp_path, capsys):
    assert kv_experiment.main([*tiny, "--prompt-lens", "4,125", "--rounds", "1"]) == 0
    shown = capsys.readouterr()
    assert "skipped: 130 tokens exceed the context of 128" in shown.out
    assert len(read_lines(tmp_path / "x.jsonl")[0]["trials"]) == 2


def test_an_absurd_length_is_a_skipped_row_at_once(tiny, tmp_path):
    assert kv_experiment.main([*tiny, "--prompt-lens", "4,900000", "--rounds", "1"]) == 0
    assert len(read_lines(tmp_path / "x.jsonl")[0]["trials"]) == 2


def test_a_cell_that_memory_cannot_hold_is_skipped_with_its_estimate(tiny, monkeypatch, capsys):
    monkeypatch.setattr("lab.kv_probes.free_bytes", lambda _device: 100_000_000)
    monkeypatch.setattr("lab.kv_ledger.needed_bytes", lambda _model, cell, _tokens: 2_500_000 * cell.prompt_len)
    assert kv_experiment.main([*tiny, "--rounds", "1"]) == 0
    assert "skipped: needs about 0.1 GB, and 0.1 GB are free" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--prompt-lens", "0"], "--prompt-lens takes numbers of at least 1, and 0 is among them."),
        (["--prompt-lens", "-5,10"], "--prompt-lens takes numbers of at least 1, and -5 is among them."),
        (["--prompt-lens", "ten"], "--prompt-lens takes numbers with commas between them"),
        (["--prompt-lens", "126,127"], "No prompt length fits: skipped: 131 tokens exceed the context of 128."),
        (["--cache", "on"], "--cache takes off, dynamic, static with commas between them, not 'on'."),
        (["--attention", "flash"], "--attention takes sdpa, eager with commas between them, not 'flash'."),
        (["--new-tokens", "1"], "--new-tokens must be at least 3, and is 1."),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(tiny, capsys, argv, sentence):
    flag = argv[0]
    given = tiny[: tiny.index(flag)] + tiny[tiny.index(flag) + 2 :] if flag in tiny else tiny
    assert left_with([*given, f"{flag}={argv[1]}"]) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err and err.strip().count("\n") == 0


def test_a_model_without_cache_support_is_refused(tmp_path, capsys):
    shape = {"model_type": "openai-gpt", "vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert left_with(["--model", f"random:{tmp_path}", "--attention", "eager"]) == 2
    assert "cannot keep a KV cache in transformers: name another model." in capsys.readouterr().err


def test_json_dash_prints_one_record(tiny, capsys):
    kv_experiment.main([*tiny, "--json", "-", "--quick", "--prompt-lens", "4,9"])
    shown = capsys.readouterr().out
    assert json.loads(shown)["question"] == "day3-kv-cache" and shown.count("\n") == 1


@pytest.mark.parametrize("mistake", ["warmup-shape", "mean-over-growth", "prefill-in-decode"])
def test_cache_mistakes_are_made_and_told(checkpoint_folder, tmp_path, capsys, mistake, monkeypatch):
    monkeypatch.setattr("experiments.kv_mistakes.LONG_PROMPT", 60)
    monkeypatch.setitem(mistakes.OWN_PROMPTS, "prefill-in-decode", (*mistakes.OWN_PROMPTS["prefill-in-decode"][:2], 60))
    argv = [mistake, "--model", str(checkpoint_folder), "--json", str(tmp_path / "m.jsonl"), "--max-new-tokens", "8"]
    assert mistakes.main([*argv, "--runs", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Wrong:" in shown and "ratio" in shown
    assert len(read_lines(tmp_path / "m.jsonl")[0]["samples"]) == 4
