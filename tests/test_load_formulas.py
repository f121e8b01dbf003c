"""Other tools' formulas on four requests that are worked out by hand."""

import pytest

from load.formulas import as_guidellm, as_vllm


def request(**given):
    whole = {"status": 200, "error": None, "ok": True, "counted_by": "usage", "queue": None, "retries": 0}
    return whole | given


# A: late by 0.5 s; one token a chunk.   B: two chunks carry five tokens, three and two.   C: an answer of one token.
# D: failed after one chunk. The run goes on until 6.0, when D fails.
A = request(due=0.0, sent=0.5, end=3.5, prompt_tokens=10, new_tokens=3, chunks=[[1.5, 1], [2.0, 1], [3.0, 1]])
B = request(due=1.0, sent=1.0, end=5.0, prompt_tokens=20, new_tokens=5, chunks=[[2.0, 3], [4.0, 2]])
C = request(due=2.0, sent=2.0, end=2.5, prompt_tokens=30, new_tokens=1, chunks=[[2.25, 1]])
D = request(due=3.0, sent=3.0, end=6.0, prompt_tokens=None, new_tokens=None, chunks=[[3.5, 1]], status=200,
            ok=False, error="cut: the stream ended")  # fmt: skip


def test_vllm_of_four_requests():
    """TTFT, from sent: A 1.0, B 1.0, C 0.25.  E2EL, to the last chunk: A 2.5, B 3.0, C 0.25.

    TPOT: A (2.5 - 1.0) / 2 = 0.75, B (3.0 - 1.0) / 4 = 0.5, C none.  ITL, by chunks: A 0.5 and 1.0, B 2.0, C none.
    Duration 0 to 6.0, D's end; D counts in nothing else. Tokens 3 + 5 + 1 = 9, prompts 10 + 20 + 30 = 60.
    P99 of three lies at place 0.99 * 2 = 1.98: E2EL 2.5 + 0.98 * 0.5 = 2.99; ITL 1.0 + 0.98 * 1.0 = 1.98; TTFT 1.0.
    P99 of TPOT's two lies at place 0.99: 0.5 + 0.99 * 0.25 = 0.7475. Its std: 0.125.
    Seconds since 0.5, A's send: chunks at 1.0, 1.5, 2.5 | 1.5, 3.5 | 1.75, so four in second 1.
    A touches 0 to 2, B 0 to 3, C (1.5 to 1.75) 1: all three in second 1.
    """
    found = as_vllm([A, B, C, D])
    assert {key: found[key] for key in ("completed", "failed", "total_input_tokens", "total_output_tokens")} == {
        "completed": 3, "failed": 1, "total_input_tokens": 60, "total_output_tokens": 9,
    }  # fmt: skip
    expected = {
        "duration": 6.0, "request_throughput": 3 / 6, "output_throughput": 9 / 6, "total_token_throughput": 69 / 6,
        "max_output_tokens_per_s": 4, "max_concurrent_requests": 3,
        "mean_ttft_ms": 750, "median_ttft_ms": 1000, "p99_ttft_ms": 1000, "std_ttft_ms": 353.5534,
        "mean_tpot_ms": 625, "median_tpot_ms": 625, "p99_tpot_ms": 747.5, "std_tpot_ms": 125,
        "mean_itl_ms": 3500 / 3, "median_itl_ms": 1000, "p99_itl_ms": 1980, "std_itl_ms": 623.6096,
        "mean_e2el_ms": 5750 / 3, "median_e2el_ms": 2500, "p99_e2el_ms": 2990, "std_e2el_ms": 1196.0583,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert set(found) == {*expected, "completed", "failed", "total_input_tokens", "total_output_tokens"}


def test_vllm_counts_events_without_text_where_the_trace_has_them():
    """A role at 1.0 and an end at 3.25 besides the texts at 1.5, 2.0 and 3.0.

    TTFT 0.5 and not 1.0; E2EL 2.75; TPOT (2.75 - 0.5) / 2 = 1.125; ITL 0.5, 0.5, 1.0, 0.25: mean 0.5625.
    """
    found = as_vllm([A | {"choice_times": [1.0, 1.5, 2.0, 3.0, 3.25]}])
    expected = {"mean_ttft_ms": 500, "mean_e2el_ms": 2750, "mean_tpot_ms": 1125, "mean_itl_ms": 562.5}
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_vllm_takes_other_percentiles_and_another_begin():
    """P50 of TTFT 1.0, 1.0 and 0.25; from 2.0 to 6.0 are 4 s."""
    found = as_vllm([A, B, C, D], percentiles=(50, 99.9), begin_s=2.0)
    assert found["p50_ttft_ms"] == 1000 and "p99.9_e2el_ms" in found and "p99_e2el_ms" not in found
    assert found["request_throughput"] == 3 / 4


def test_guidellm_of_four_requests():
    """From the first send, 0.5, to the last end, 6.0: 5.5 s.

    Latency: A 3.0, B 4.0, C 0.5 s.  TTFT: A 1.0, B 1.0, C 0.25.
    TPOT: A (3.0 - 0.5) / 3 = 0.8333 three times, B (4.0 - 1.0) / 5 = 0.6 five times, C 0.25 once; in order C at a
    share of 1/9, B at 6/9, A at 1: mean 5.75 / 9 = 0.6389, median B.
    ITL: A (3.0 - 1.5) / 2 = 0.75 twice, B (4.0 - 2.0) / 4 = 0.5 four times, C no weight: mean 3.5 / 6, median B, p95 A.
    Rates: 3 or 4 requests, 60 prompt tokens, 9 or (with D's chunk) 10 new ones.
    In flight, of all: 0.5 to 1 one, to 2 two, to 2.5 three, to 3 two, to 3.5 three, to 5 two, to 6 one:
    3.0 + 4.0 + 0.5 + 3.0 = 10.5 request seconds; of 5.5 s 1.5 at one, 3.0 at two, 1.0 at three.
    Without D: 3.0 + 4.0 + 0.5 = 7.5; none for 1 s, one for 0.5 + 1.5 = 2 s, two for 2 s, three for 0.5 s.
    """
    found = as_guidellm([A, B, C, D])
    expected = {
        "request_totals.successful": 3, "request_totals.errored": 1, "request_totals.total": 4,
        "request_latency.successful.mean": 2.5, "request_latency.successful.median": 3.0,
        "request_latency.successful.percentiles.p95": 4.0, "request_latency.successful.min": 0.5,
        "request_latency.successful.std_dev": 1.471960,
        "time_to_first_token_ms.successful.mean": 750, "time_to_first_token_ms.successful.median": 1000,
        "time_per_output_token_ms.successful.mean": 5750 / 9, "time_per_output_token_ms.successful.median": 600,
        "time_per_output_token_ms.successful.percentiles.p95": 2500 / 3,
        "time_per_output_token_ms.successful.percentiles.p10": 250,
        "inter_token_latency_ms.successful.mean": 3500 / 6, "inter_token_latency_ms.successful.median": 500,
        "inter_token_latency_ms.successful.percentiles.p95": 750, "inter_token_latency_ms.successful.max": 750,
        "requests_per_second.successful.mean": 3 / 5.5, "requests_per_second.total.mean": 4 / 5.5,
        "prompt_tokens_per_second.successful.mean": 60 / 5.5, "prompt_tokens_per_second.total.mean": 60 / 5.5,
        "output_tokens_per_second.successful.mean": 9 / 5.5, "output_tokens_per_second.total.mean": 10 / 5.5,
        "tokens_per_second.successful.mean": 69 / 5.5, "tokens_per_second.total.mean": 70 / 5.5,
        "request_concurrency.total.mean": 10.5 / 5.5, "request_concurrency.total.median": 2,
        "request_concurrency.successful.mean": 7.5 / 5.5, "request_concurrency.successful.median": 1,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_guidellm_tpot_holds_the_prefill_and_ours_does_not():
    """One second of prefill, then three tokens at once: TPOT is a third of a second for guidellm, 0 for vLLM."""
    one = request(due=0.0, sent=0.0, end=1.0, prompt_tokens=1, new_tokens=3, chunks=[[1.0, 1], [1.0, 2]])
    assert as_guidellm([one])["time_per_output_token_ms.successful.mean"] == pytest.approx(1000 / 3)
    assert as_vllm([one])["mean_tpot_ms"] == 0.0


def test_without_usage_guidellm_counts_chunks():
    """B without usage has two chunks: TPOT (4.0 - 1.0) / 2, ITL (4.0 - 2.0) / 1."""
    found = as_guidellm([B | {"new_tokens": None}])
    assert found["time_per_output_token_ms.successful.mean"] == pytest.approx(1500)
    assert found["inter_token_latency_ms.successful.mean"] == pytest.approx(2000)


def test_an_answer_in_one_piece_has_no_ttft_for_guidellm_and_is_failed_for_vllm():
    """(2.5 - 2.0) / 4 tokens each."""
    whole = C | {"chunks": [], "new_tokens": 4}
    found = as_guidellm([whole])
    assert found["time_per_output_token_ms.successful.mean"] == pytest.approx(125)
    assert found["time_to_first_token_ms.successful.mean"] == 0.0
    assert (as_vllm([whole])["completed"], as_vllm([whole])["failed"]) == (0, 1)


@pytest.mark.parametrize("requests", [[], [D]])
def test_where_nothing_succeeded_both_say_zero(requests):
    vllm, guidellm = as_vllm(requests), as_guidellm(requests)
    assert vllm["completed"] == vllm["mean_ttft_ms"] == vllm["p99_itl_ms"] == vllm["request_throughput"] == 0
    assert guidellm["request_totals.successful"] == guidellm["request_latency.successful.mean"] == 0
    assert guidellm["requests_per_second.successful.mean"] == 0
