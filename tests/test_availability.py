"""What is said of a run in which replicas died, from traces and records made by hand."""

import pytest

from lab import availability
from lab.client import Trace

HALF = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
WHOLE = HALF + b"data: [DONE]\n\n"
TOLD = HALF + b'data: {"error":{"code":"server_shutting_down"}}\n\n'
REFUSED = b'{"error":{"code":"server_overloaded"}}'


@pytest.mark.parametrize(
    ("status", "raw", "error", "kind"),
    [
        (200, WHOLE, None, "answered"), (200, b'{"choices":[]}', None, "answered"),
        (200, HALF, "cut: the server closed the connection", "cut"), (200, TOLD, None, "cut"),
        (200, HALF, None, "silent"), (200, WHOLE, "cut: reset", "cut"),
        (503, REFUSED, None, "refused"), (0, b"", "disconnected: nobody", "lost"), (503, b"", "cut: reset", "lost"),
    ],
)  # fmt: skip
def test_an_end_is_of_one_kind(status, raw, error, kind):
    trace = Trace(0.0, status=status, pieces=[(1.0, raw)] if raw else [], error=error)
    assert availability.kind_of(trace) == kind


def request(due: float, kind: str, took_s: float = 0.5, error: str | None = None) -> dict:
    return {"due": due, "sent": due, "first": None, "end": due + took_s, "ttft": took_s / 5,
            "status": 503 if kind == "refused" else 200, "kind": kind, "error": error, "replica": "any"}  # fmt: skip


def record(*requests: dict) -> dict:
    kill = {"replica": "replica-1", "round_start": 0.0, "round_end": 10.0, "killed": 5.0, "down": 5.25, "started": 6.0,
            "ready": 7.5, "up": 8.0, "sent_again": 2}  # fmt: skip
    return {"requests": list(requests), "kills": [kill]}


def test_the_verdicts_hold_where_only_what_had_begun_is_cut():
    said = availability.sentences(record(*(request(i, "answered") for i in range(9)), request(4.9, "cut")))
    assert said == [
        "Nothing that had not begun fails: HOLDS, 0 of 10 requests under 1 kills; 2 were sent again to the other "
        "replica.",
        "What had begun ends with a visible error: HOLDS, 1 ended early and 0 of them unseen.",
        "Seen as down after 0.25 s at most, back in rotation 3.0 s after the kill at most, the time that it was left "
        "dead and the model's loading among it.",
        "Availability over the whole run: 90.00 % of the requests.",
    ]


def test_a_request_that_got_nothing_and_a_stream_that_ends_unseen_break_them():
    found = record(request(1, "answered"), request(2, "silent"), request(3, "refused", error="server_overloaded"))
    said = availability.sentences(found)
    assert "BROKEN, 1 of 3" in said[0] and "503 server_overloaded" in said[1] and "lower --rate" in said[1]
    assert "BROKEN, 1 ended early and 1 of them unseen" in said[2]


def test_the_tables_count_by_when_a_request_was_due():
    found = record(request(4.5, "cut"), request(5.5, "answered"), request(8.5, "answered"))
    kills, seconds, latency = availability.sections(found)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in seconds.splitlines() if line.startswith("| ")]
    assert rows[1:] == [["-1", "1", "0", "1", "0", "0.0", "0.100"], ["+0", "1", "1", "0", "0", "100.0", "0.100"],
                        ["+3", "1", "1", "0", "0", "100.0", "0.100"]]  # fmt: skip
    row = [cell.strip() for cell in kills.splitlines()[-1].split("|")[1:-1]]
    assert row == ["replica-1", "5.0", "0.25", "1.5", "0.5", "3.0", "2", "0", "1", "0"]
    counts = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in latency.splitlines() if "| " in line}
    assert (counts["before"], counts["during"], counts["after"]) == ("1", "1", "1")


def test_an_outage_that_outlasts_its_round_goes_on_in_the_next_one():
    found = record(request(9, "answered"), request(12, "answered"), request(14, "answered"), request(15.5, "answered"))
    (first,) = found["kills"]
    second = first | {"round_start": 10.0, "round_end": 20.0, "killed": 15.0, "up": None}
    found["kills"] = [first | {"up": 13.0}, second]
    assert [availability.phase_of(found, one) for one in found["requests"]] == ["during", "during", "before", "during"]


def test_what_is_not_known_of_a_kill_and_rounds_without_one_are_said():
    found = record(request(1, "answered")) | {"config": {"kills": 3}, "partial": False}
    found["kills"] += [found["kills"][0] | {"sent_again": None}]
    said = availability.sentences(found)
    assert said[0].endswith("under 2 kills; at least 2 were sent again to the other replica.")
    assert said[2] == "1 rounds had no kill: a replica was away for longer. Try a longer --period."
    assert not any("no kill" in one for one in availability.sentences(found | {"partial": True}))
