"""What a run's stamps mean: traces worked out by hand, and laws that hold for any run."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.client import INTERRUPTED, Trace
from load import measures

START_S = 100.0


def trace(
    due: float, *pieces: tuple[float, object], sent: float | None = None, end: float | None = None, **more
) -> Trace:
    """Pieces: (seconds since the start, an event's data, or bytes as they stand)."""
    raw = [(START_S + at, data if isinstance(data, bytes) else event(data)) for at, data in pieces]
    last = START_S + (end if end is not None else pieces[-1][0] if pieces else due)
    return Trace(START_S + due, START_S + (due if sent is None else sent), last, more.pop("status", 200), raw, **more)


def event(data: object) -> bytes:
    return b"data: " + (b"[DONE]" if data == "[DONE]" else json.dumps(data).encode()) + b"\n\n"


def text(what: str, reason: str | None = None) -> dict:
    return {"choices": [{"text": what, "finish_reason": reason}]}


def usage(prompt: int, new: int, **more) -> dict:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": new, **more}}


ROLE = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}


def one(*arguments, **words) -> dict:
    return measures.measured([trace(*arguments, **words)], START_S)[0]


def test_the_times_of_a_stream_by_hand():
    """Due at 1.0, sent late at 1.1; a role at 1.2 is no token; tokens at 1.5, 1.6, 1.8; the rest at 1.81."""
    found = one(1.0, (1.2, ROLE), (1.5, text("a")), (1.6, text("b")), (1.8, text("c", "length")),
                (1.81, usage(7, 3)), (1.82, "[DONE]"), sent=1.1)  # fmt: skip
    assert found["ok"] and (found["prompt_tokens"], found["new_tokens"], found["counted_by"]) == (7, 3, "usage")
    assert measures.ttft(found) == pytest.approx(0.5) and measures.e2e(found) == pytest.approx(0.8)
    assert measures.tpot(found) == pytest.approx(0.15) and measures.gaps(found) == pytest.approx([0.1, 0.2])
    assert found["sent"] - found["due"] == pytest.approx(0.1)


def test_chunks_of_several_tokens_are_not_counted_as_tokens():
    found = one(0.0, (1.0, text("abcd")), (2.0, text("efgh", "length")), (2.0, usage(5, 8)), (2.0, "[DONE]"))
    assert measures.tpot(found) == pytest.approx(1.0 / 7)
    window = {"begin": 0.0, "end": 4.0}
    assert measures.figures([found], window)["output_tokens_per_s"] == pytest.approx(8 / 4)
    law = measures.tokens([found], 8)
    assert (law["pieces"], law["usage"], law["holds"]) == (2, 8, True)
    assert measures.tokens([found], 9)["holds"] is False


def test_a_tokenizer_counts_what_a_piece_holds():
    found = measures.measured([trace(0.0, (1.0, text("abc")), (2.0, text("d", "stop")))], START_S, len)[0]
    assert [tokens for _, tokens in found["chunks"]] == [3, 1]
    assert (found["new_tokens"], found["counted_by"]) == (4, "ids")


@pytest.mark.parametrize(
    "odd", [{"choices": None, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}, {"choices": [None]},
            {"choices": [{"text": 5}]}, {"choices": 7}, {"choices": [], "usage": [1]}, {"choices": [], "usage": "x"},
            {"choices": [], "usage": {"completion_tokens": "3", "prompt_tokens_details": 4, "timing": []}}]
)  # fmt: skip
def test_an_answer_of_another_form_costs_its_own_request_at_most(odd: dict):
    found = one(0.0, (1.0, text("a")), (1.5, odd), (2.0, text("b", "stop")), (2.0, "[DONE]"))
    assert found["ok"] or found["error"].startswith("malformed: ")
    assert measures.figures([found], {"begin": 0.0, "end": 3.0})["requests_per_s"] is not None


def test_a_token_that_is_thought_out_is_a_token():
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    said = {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}
    found = one(0.0, (1.0, thought), (2.0, said), (2.0, "[DONE]"))
    assert measures.ttft(found) == pytest.approx(1.0) and len(found["chunks"]) == 2


def test_an_answer_without_tokens_is_no_good_one():
    limits = {"ttft": 5.0, "tpot": 5.0, "e2e": 5.0}
    empty = one(0.0, (1.0, text("", "stop")), (1.0, "[DONE]"))
    assert empty["ok"] and not measures.meets(empty, limits)
    lump = one(0.0, (1.0, text("abcd", "stop")), (1.0, usage(5, 4)), (1.0, "[DONE]"))
    assert measures.tpot(lump) is None and not measures.meets(lump, limits) and measures.meets(lump, {"ttft": 5.0})
    single = one(0.0, (1.0, text("a", "stop")), (1.0, usage(5, 1)), (1.0, "[DONE]"))
    assert measures.meets(single, limits) and not measures.meets(single, {"ttft": 0.5})


def test_of_the_ends_of_a_closed_loop_the_one_that_opens_the_window_is_not_counted():
    """One client, each answer takes a second and has one token: one request and one token a second, exactly."""
    requests = [measures.measured([trace(i, (i + 1, text("a", "length")), (i + 1, usage(9, 1)), (i + 1, "[DONE]"))],
                                  START_S)[0] for i in range(11)]  # fmt: skip
    window = measures.steady(requests, 1)
    found = measures.figures(requests, window)
    assert window["class"] == "steady" and found["requests_per_s"] == pytest.approx(1.0)
    assert found["output_tokens_per_s"] == pytest.approx(1.0) and found["prompt_tokens_per_s"] == pytest.approx(9.0)


def test_the_rate_reached_is_that_of_the_sending():
    late = [one(i, (2 * i + 1, text("a", "stop")), (2 * i + 1, "[DONE]"), sent=2 * i) for i in range(5)]
    assert measures.figures(late, {"begin": 0.0, "end": 20.0})["achieved_rate"] == pytest.approx(0.5)


def test_what_a_server_does_not_tell_is_missing_and_not_nothing():
    silent = one(0.0, (1.0, text("a", "stop")), (1.0, "[DONE]"))
    found = measures.figures([silent], {"begin": 0.0, "end": 2.0})
    assert (found["prompt_tokens_per_s"], found["prompt_tokens"], found["cached_tokens"]) == (None, None, None)


def test_waiting_to_be_sent_again_is_being_in_flight():
    again = [one(0.0, (3.0, text("a", "stop")), (3.0, "[DONE]"), sent=2.0, attempts=2)]
    law = measures.little(again, [(t / 10, 1) for t in range(30)], {"begin": 0.0, "end": 3.0},
                          [{"at": 1.0, "running": 0.0, "waiting": 1.0}, {"at": 2.5, "running": 2.0}])  # fmt: skip
    assert law["holds"] and law["in_flight"] == law["throughput_x_latency"] == pytest.approx(1.0)
    assert law["server"] == pytest.approx(1.5)


def test_zero_never_means_missing():
    whole = one(0.0, (2.0, json.dumps(text("abc", "stop") | {"usage": {"completion_tokens": 3}}).encode()))
    assert whole["ok"] and measures.ttft(whole) is None and measures.tpot(whole) is None
    assert measures.e2e(whole) == pytest.approx(2.0)
    single = one(0.0, (1.0, text("a", "length")), (1.0, usage(5, 1)), (1.0, "[DONE]"))
    assert measures.ttft(single) == pytest.approx(1.0) and measures.tpot(single) is None
    found = measures.figures([whole], {"begin": 0.0, "end": 2.0})
    assert found["ttft_s"] is None and found["tpot_s"] is None and found["queue_s"] is None


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("cut", lambda: trace(0.0, (1.0, text("a")))),
        (None, lambda: trace(0.0, (1.0, text("a", "stop")))),  # some servers send no [DONE]
        ("malformed", lambda: trace(0.0, (1.0, b"data: {nonsense\n\n"), (1.0, "[DONE]"))),
        ("malformed", lambda: trace(0.0, (1.0, b"data: [1]\n\n"), (1.0, "[DONE]"))),
        ("error event", lambda: trace(0.0, (1.0, text("a")), (1.1, {"error": {"message": "no"}}), (1.1, "[DONE]"))),
        ("503", lambda: trace(0.0, (1.0, b'{"error": {"message": "full"}}'), status=503)),
        ("timeout", lambda: trace(0.0, status=0, error="timeout: too late")),
        ("connect", lambda: trace(0.0, status=0, error="connect: nobody there")),
        ("disconnected", lambda: trace(0.0, status=0, error="disconnected: gone")),
        (INTERRUPTED, lambda: trace(0.0, (1.0, text("a")), error=INTERRUPTED)),
    ],
)
def test_failures_by_their_kind(kind, made):
    found = measures.measured([made()], START_S)[0]
    assert found["ok"] is (kind is None)
    assert (found["error"] or "").partition(":")[0] == (kind or "")


def test_failures_count_against_goodput_and_not_as_latency():
    good = one(0.0, (0.5, text("a")), (1.0, text("b", "length")), (1.0, usage(5, 2)), (1.0, "[DONE]"))
    slow = one(0.0, (3.0, text("a")), (4.0, text("b", "length")), (4.0, usage(5, 2)), (4.0, "[DONE]"))
    refused = one(0.0, (0.01, b"{}"), status=503)
    found = measures.figures([good, slow, refused], {"begin": 0.0, "end": 4.0}, {"ttft": 1.0})
    assert found["goodput_per_s"] == pytest.approx(1 / 4) and found["requests_per_s"] == pytest.approx(2 / 4)
    assert found["e2e_s"]["n"] == 2 and found["errors"] == {"503": 1}


def answered(due: float, took: float, **more) -> dict:
    return one(due, (due + took / 2, text("a")), (due + took, text("b", "length")), (due + took, usage(5, 2)),
               (due + took, "[DONE]"), **more)  # fmt: skip


def test_the_opening_wave_and_the_drain_are_outside_the_window():
    """Two clients, answers of one second: the first wave ends at 1.0, the last starts at 9.0."""
    requests = [answered(float(t), 1.0) for t in range(10) for _ in range(2)]
    window = measures.steady(requests, clients=2)
    assert (window["begin"], window["end"], window["class"]) == (pytest.approx(1.0), pytest.approx(9.0), "steady")
    assert window["inside"] == 18


def test_too_few_requests_make_no_window():
    requests = [answered(0.0, 1.0), answered(0.0, 2.0)]
    window = measures.steady(requests, clients=2)
    assert (window["class"], window["begin"], window["end"]) == ("whole", 0.0, pytest.approx(2.0))


def test_a_load_that_is_too_much_is_called_growing():
    falling_behind = [answered(i * 0.5, 0.5 + i * 0.4) for i in range(40)]
    keeping_up = [answered(i * 0.5, 0.9) for i in range(40)]
    assert measures.steady(falling_behind)["class"] == "growing"
    assert measures.steady(keeping_up)["class"] == "steady"


def test_little_compares_a_counter_with_the_stamps():
    requests = [answered(float(t), 2.0) for t in range(10)]
    window = {"begin": 2.0, "end": 9.0}
    right = [(t / 100, 2) for t in range(200, 900)]
    found = measures.little(requests, right, window)
    assert found["throughput_x_latency"] == pytest.approx(2.0) and found["holds"] is True
    assert measures.little(requests, [(moment, 3) for moment, _ in right], window)["holds"] is False
    assert measures.little(requests, [], window)["holds"] is None


def test_few_samples_certify_no_high_percentile():
    found = measures.spread([float(i) for i in range(70)])
    assert found["certified"] == ["p50", "p90"] and (found["p50"], found["max"], found["n"]) == (34.0, 69.0, 70)
    assert measures.spread([]) is None


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.floats(0.01, 5), st.lists(st.floats(0, 1), min_size=1, max_size=5)), min_size=1,
        max_size=20,
    )
)  # fmt: skip
def test_for_any_run_the_parts_agree(made):
    requests = []
    for due, first, more in made:
        moments = [due + first]
        for gap in more:
            moments.append(moments[-1] + gap)
        pieces = [(moment, text("x")) for moment in moments[:-1]] + [(moments[-1], text("x", "stop"))]
        requests.append(one(due, *pieces, (moments[-1], usage(3, len(moments))), (moments[-1], "[DONE]")))
    for request in requests:
        assert measures.ttft(request) + sum(measures.gaps(request)) == pytest.approx(measures.e2e(request))
        assert measures.tpot(request) * (request["new_tokens"] - 1) == pytest.approx(sum(measures.gaps(request)))
    window = measures.steady(requests)
    assert window["begin"] <= window["end"] and window["inside"] <= len(requests)
    begin, end = min(one["due"] for one in requests), max(one["end"] for one in requests)
    whole = measures.figures(requests, {"begin": begin, "end": end})
    spent = sum(request["end"] - request["sent"] for request in requests)
    assert measures.overlap(requests, begin, end) * (end - begin) == pytest.approx(spent)
    assert whole["output_tokens_per_s"] * (end - begin) == pytest.approx(sum(r["new_tokens"] for r in requests))
