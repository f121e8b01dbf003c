"""Day 1: the figures of a request worked out by hand, its tables letter by letter, its sentences, its warnings."""

import copy
import itertools
from functools import partial
from pathlib import Path

import pytest

import infer
from lab import request_tables, request_words
from lab.request_figures import conserved, residual_s, share, shares_of_ceiling, stage_s, tpot_s
from metrics import timed
from tokenizer import BytesCodec, Tokenizer

GOLDEN = Path(__file__).parent / "golden"


def run(prefill: float = 0.10, step: float = 0.05, steps: int = 4, lost: float = 0.0002) -> dict:
    """A request whose parts are known: everything but prefill and decode takes 1.1 ms, and `lost` is in no part."""
    parts = {"tokenize": 0.0005, "to_device": 0.0, "prefill": prefill, "to_host": 0.0001, "detokenize": 0.0005}
    decode = [step * (1 + i / 100) for i in range(steps)]
    return parts | {"decode": decode, "ttft": 0.0005 + prefill, "total": sum(parts.values()) + sum(decode) + lost}


def record() -> dict:
    """What infer.py keeps of a run: 20 prompt tokens, 5 new ones, six warm runs, on a machine with round figures."""
    return {
        "config": {"warmup": 1, "runs": 6}, "prompt_tokens": 20, "partial": False, "same_tokens": True,
        "stopped": False,
        "model": {"name": "m", "device": "cpu", "dtype": "float32", "parameters": 100_000_000, "timing_only": False},
        "ceilings": {"bytes_per_s": 20e9, "flops_per_s": {"float32": 100e9}},
        "floors": {"prefill": {"tokens": 20, "flops": 4_000_000_000, "read_bytes": 400_000_000},
                   "decode": {"tokens": 1, "flops": 200_000_000, "read_bytes": 401_000_000}},
        "load": {"load_tokenizer": 0.25, "load_model": 1.5}, "timer_cost_s": 2e-6,
        "cold": run(prefill=0.4),
        "runs": [run(0.10 + i / 1000, 0.05 + i / 10000) for i in range(6)],
        "run_ceilings": [[20e9, 100e9]] * 6,
        "ledger": [["Python starts", 0.02], ["imports (torch, transformers, …)", 2.5], ["load_model", 1.5]],
        "memory": {"weight_bytes": 400_000_000, "kv_bytes_per_token": 36_864, "kv_tokens": 24,
                   "kv_predicted_bytes": 884_736, "kv_held_bytes": 884_736, "vram_peak_bytes": None},
        "usage": {"rss_peak_bytes": 900_000_000, "probe_bytes": 268_435_456, "samples": 12, "cpu_cores_mean": 1.9,
                  "gpu_missing": "no driver"},
    }  # fmt: skip


def page(rec: dict) -> str:
    tables = [request_tables.theory_table(rec), request_tables.stats_table(rec), request_tables.latency_lines(rec),
              request_tables.ledger_table(rec), request_tables.memory_table(rec)]  # fmt: skip
    return "\n\n".join([*tables, "\n".join(request_words.sentences(rec))]) + "\n"


def test_the_tables_and_sentences_read_as_they_always_did():
    assert page(record()) == (GOLDEN / "day1.md").read_text()


# ---- figures


def test_figures_of_one_request_by_hand():
    one = run(prefill=0.1, step=0.05, steps=2, lost=0.003)
    assert stage_s(one, "decode") == pytest.approx(0.05 + 0.0505)
    assert one["total"] == pytest.approx(0.0005 + 0.1 + 0.0001 + 0.0005 + 0.1005 + 0.003)
    assert residual_s(one) == pytest.approx(0.003)
    assert tpot_s(one) == pytest.approx((one["total"] - 0.1005) / 2)
    assert share(one, "prefill") == pytest.approx(0.1 / one["total"])


def test_time_per_output_token_of_a_single_token_does_not_exist():
    """0 here would be read as a measurement."""
    assert tpot_s(run(steps=0)) is None


def test_conservation_of_time_allows_two_percent_or_a_millisecond_and_no_more():
    assert conserved(run(lost=0.0009)) and not conserved(run(prefill=0.001, step=0.001, lost=0.0011))
    assert conserved(run(prefill=1.0, lost=0.02)) and not conserved(run(prefill=1.0, lost=0.03))


def test_shares_of_the_ceiling_by_hand():
    """Prefill: 4 GFLOP in 0.1 s = 40 of 100 GFLOP/s. Decode: 401 MB in a mean step of 50.75 ms = 7.9 of 20 GB/s."""
    shares = shares_of_ceiling(record())
    assert shares["prefill MFU"][0] == pytest.approx(0.40)
    assert shares["decode MBU"][0] == pytest.approx(0.401 / (0.05 * 1.015) / 20)


class FakeCache:
    layers: tuple = ()


def counted_request(monkeypatch, new_tokens: int) -> dict:
    """one_request() on a clock that moves one second at each reading, with a model that needs no time."""
    import torch

    clock = itertools.count().__next__
    monkeypatch.setattr(infer, "timed", partial(timed, sync=lambda: None, clock=lambda: float(clock())))
    monkeypatch.setattr(infer, "prefill", lambda _model, _ids: (torch.tensor([[7]]), FakeCache()))
    monkeypatch.setattr(infer, "decode_step", lambda _model, token, cache: (token + 1, cache))
    model = type("M", (), {"stops": lambda *_: frozenset(), "device": torch.device("cpu")})()
    stats: dict = {}
    config = infer.InferConfig(max_new_tokens=new_tokens)
    answer = infer.one_request(model, Tokenizer(BytesCodec(), 0, "bytes"), "hi", config, stats)
    assert answer.ids == list(range(7, 7 + new_tokens))
    return infer.as_run(stats)


def test_every_stage_is_timed_once_and_every_decode_step(monkeypatch):
    """Clock readings by hand for 3 tokens: total opens at 0 and ttft at 1; each block is one second long; between
    blocks the clock is not read. ttft closes at 8, two decode steps, to_host, detokenize, and total closes at 17.
    """
    one = counted_request(monkeypatch, new_tokens=3)
    assert one == {
        "tokenize": 1, "to_device": 1, "prefill": 1, "decode": [1, 1], "to_host": 1, "detokenize": 1,
        "ttft": 7, "total": 17,
    }  # fmt: skip


def test_n_new_tokens_are_n_minus_one_decode_steps(monkeypatch):
    assert [len(counted_request(monkeypatch, n)["decode"]) for n in (1, 2, 9)] == [0, 1, 8]


# ---- words


def test_a_single_token_has_no_decode_to_compare_with():
    rec = record()
    rec["runs"] = [run(steps=0)] * 6
    rec["cold"] = run(steps=0)
    assert request_words.sentences(rec) == [
        "One new token was generated (as asked for): it came from prefill, so there is no decode to compare with."
    ]
    assert "there was no decode step" in request_tables.latency_lines(rec)
    assert "TPOT" not in request_tables.stats_table(rec)


def test_without_a_timed_run_nothing_is_concluded():
    rec = record() | {"runs": [], "run_ceilings": [], "partial": True}
    assert "one cold run supports no conclusion" in request_words.sentences(rec)[0]
    assert "| prefill" in request_tables.stats_table(rec)  # the cold value is still shown


def test_prefill_is_named_when_prefill_is_slower():
    rec = record()
    rec["runs"] = [run(prefill=2.0 + i / 100) for i in range(6)]
    assert "prefill is where the time goes" in request_words.sentences(rec)[0]


def test_a_dtype_without_a_ceiling_gets_no_wall():
    rec = record()
    rec["model"]["dtype"] = "float8"
    assert any("no wall can be named" in sentence for sentence in request_words.sentences(rec))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r["runs"][0].update(prefill=0.3), "the first timed prefill took 2.9x"),
        (lambda r: r.update(runs=[run(0.1 if i % 2 else 0.2) for i in range(6)]), "prefill is unsteady"),
        (lambda r: r["runs"][2].update(total=9.0), "conservation of time is broken"),
        (lambda r: r.update(same_tokens=False), "did not give the same tokens"),
        (lambda r: r.update(runs=r["runs"][:3], run_ceilings=r["run_ceilings"][:3]), "3 runs give no 95 % interval"),
        (lambda r: r.update(run_ceilings=[[1e9, 100e9]] * 6), "of a ceiling is impossible"),
        (lambda r: r.update(run_ceilings=[[10e9, 100e9]] * 6), "0.50 times the one kept on the card"),
        (
            lambda r: r.update(run_ceilings=[[20e9, 100e9]] * 5 + [[20e9, 50e9]]),
            "1 of 6 runs met a matrix rate more than",
        ),
    ],
)
def test_whatever_spoils_the_numbers_is_said_with_a_remedy(change, says):
    assert request_words.warnings(record()) == []
    spoiled = copy.deepcopy(record())
    change(spoiled)
    said = request_words.warnings(spoiled)
    assert any(says in warning for warning in said), said


def test_broken_conservation_is_shouted_in_the_table_too():
    rec = record()
    rec["runs"][2]["total"] = 9.0
    assert "BROKEN: these numbers do not add up" in request_tables.stats_table(rec)


def test_texts_in_tables_stay_on_one_line():
    assert request_tables.quoted('a\n"b" | c') == r'"a\n\"b\" \| c"'
    assert request_tables.quoted("x" * 300).endswith('…"')
