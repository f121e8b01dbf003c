"""What became of the requests while replicas died: kinds of ends, figures, tables and sentences, from a record.

A request has begun once a byte of its answer has come. Before that it may be sent to another replica, after it never:
so one that had not begun must be answered, and one that had begun may end early, but not unseen.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lab.client import Trace
from metrics import NONE, certified, number, percentile, table

Record = dict[str, Any]
Request = dict[str, Any]
Kill = dict[str, Any]

KINDS = {
    "answered": "came whole",
    "cut": "had begun, ended early, and its client sees an error",
    "silent": "had begun, ended early, and looks whole",
    "refused": "was told no, before it began",
    "lost": "got nothing at all",
}
OVERLOADED = "server_overloaded"
PHASES = ("before", "during", "after")
BEFORE_S, AFTER_S = 3, 12  # around a kill, second by second


def kind_of(trace: Trace) -> str:
    """Which of KINDS."""
    if trace.complete:
        return "answered"
    if trace.status == 200:
        return "cut" if trace.error is not None or error_event(trace) else "silent"
    return "refused" if trace.status and trace.error is None else "lost"


def error_event(trace: Trace) -> bool:
    """Whether its stream says that something is wrong."""
    try:
        return any("error" in data for _, data in trace.events)
    except ValueError:  # half an event, or none: that much is to be seen
        return True


def told(trace: Trace, start_s: float) -> Request:
    """The plain numbers of one request that a record holds; seconds from the start."""
    first = trace.pieces[0][0] - start_s if trace.pieces else None
    return {
        "due": trace.due_s - start_s, "sent": trace.sent_s - start_s, "first": first, "end": trace.end_s - start_s,
        "ttft": trace.ttft_s if trace.status == 200 and trace.streamed else None, "status": trace.status,
        "kind": kind_of(trace), "error": trace.error or refusal(trace), "replica": trace.headers.get("x-served-by"),
    }  # fmt: skip


def refusal(trace: Trace) -> str | None:
    """The code of the error object that was its whole answer."""
    try:
        return trace.events[0][1]["error"]["code"] if trace.status != 200 else None
    except (ValueError, LookupError, TypeError):
        return None


# ---- figures


def phase_of(record: Record, request: Request) -> str:
    """during an outage, which may outlast its round; else before or after its own round's kill, by when it was due."""
    due, kills = request["due"], record["kills"]
    if any(kill["killed"] <= due and (kill["up"] is None or due < kill["up"]) for kill in kills):
        return "during"
    kill = next((one for one in kills if due < one["round_end"]), kills[-1])
    return "before" if due < kill["killed"] else "after"


def failed(requests: Sequence[Request]) -> list[Request]:
    """Those that had not begun and were not answered."""
    return [one for one in requests if one["kind"] in ("refused", "lost")]


def of_kind(requests: Sequence[Request], kind: str) -> list[Request]:
    return [one for one in requests if one["kind"] == kind]


def in_second(requests: Sequence[Request], kills: Sequence[Kill], second: int) -> list[Request]:
    """Due in this second after a kill, of all kills."""
    return [
        one for one in requests if any(kill["killed"] + second <= one["due"] < kill["killed"] + second + 1
                                       for kill in kills)
    ]  # fmt: skip


# ---- tables


def sections(record: Record) -> list[str]:
    return [kills_table(record), seconds_table(record), latency_table(record)]


def kills_table(record: Record) -> str:
    rows = [
        (
            kill["replica"], number(kill["killed"], 1), number(gap(kill, "killed", "down"), 2),
            number(gap(kill, "started", "ready"), 1), number(gap(kill, "ready", "up"), 1),
            number(gap(kill, "killed", "up"), 1), number(kill["sent_again"], 0), *in_round(record, kill),
        )
        for kill in record["kills"]
    ]  # fmt: skip
    columns = [("killed", "left"), ("at (s)", "right"), ("seen as down after (s)", "right"), ("start (s)", "right"),
               ("back in rotation (s)", "right"), ("away in all (s)", "right"), ("sent again", "right"),
               ("not begun, failed", "right"), ("begun, cut with an error", "right"),
               ("begun, cut unseen", "right")]  # fmt: skip
    words = (
        "A replica is killed with signal 9 in the middle of each round, left dead, and started again. Sent again: "
        "requests that HAProxy gave to the other replica, before a byte of an answer had come."
    )
    return f"### The kills\n\n{words}\n\n" + table(columns, rows)


def gap(kill: Kill, begin: str, end: str) -> float | None:
    return None if kill[begin] is None or kill[end] is None else kill[end] - kill[begin]


def in_round(record: Record, kill: Kill) -> tuple[int, int, int]:
    mine = [one for one in record["requests"] if kill["round_start"] <= one["due"] < kill["round_end"]]
    return len(failed(mine)), len(of_kind(mine, "cut")), len(of_kind(mine, "silent"))


def seconds_table(record: Record) -> str:
    rows = []
    for second in range(-BEFORE_S, AFTER_S):
        asked = in_second(record["requests"], record["kills"], second)
        if not asked:
            continue
        whole = len(of_kind(asked, "answered"))
        ttfts = [one["ttft"] for one in asked if one["ttft"] is not None]
        rows.append((f"{second:+d}", len(asked), whole, len(of_kind(asked, "cut")), len(failed(asked)),
                     number(whole / len(asked), 1, 100), number(max(ttfts), 3) if ttfts else NONE))  # fmt: skip
    columns = [("due in second", "right"), ("asked", "right"), ("whole", "right"), ("cut", "right"),
               ("failed", "right"), ("availability (%)", "right"), ("greatest TTFT (s)", "right")]  # fmt: skip
    words = "Seconds from the kill, all kills together. Availability: answered whole, of those due in that second."
    return f"### Second by second\n\n{words}\n\n" + table(columns, rows)


def latency_table(record: Record) -> str:
    rows, few = [], set()
    for phase in PHASES:
        mine = [one for one in record["requests"] if phase_of(record, one) == phase]
        whole = of_kind(mine, "answered")
        streams = [one["ttft"] for one in whole if one["ttft"] is not None]
        ends = [one["end"] - one["due"] for one in whole]
        few |= {phase for values in (streams, ends) if not certified(len(values), 95)}
        rows.append((phase, len(mine), number(100 * len(whole) / len(mine) if mine else None, 1),
                     *(quantile(values, p) for values in (streams, ends) for p in (50, 95))))  # fmt: skip
    columns = [("due", "left"), ("requests", "right"), ("answered whole (%)", "right"), ("TTFT p50 (s)", "right"),
               ("p95", "right"), ("E2E p50 (s)", "right"), ("p95", "right")]  # fmt: skip
    words = "During: from a kill until both replicas take requests again. Latencies from when a request was due."
    if few:
        words += f" So few requests support no p95 of other runs: {', '.join(p for p in PHASES if p in few)}."
    return f"### Latency before, during and after\n\n{words}\n\n" + table(columns, rows)


def quantile(values: Sequence[float], p: float) -> str:
    return number(percentile(values, p), 3) if values else NONE


# ---- sentences


def sentences(record: Record) -> list[str]:
    requests, kills = record["requests"], record["kills"]
    bad, cut, silent = failed(requests), of_kind(requests, "cut"), of_kind(requests, "silent")
    again = [kill["sent_again"] for kill in kills]
    resent = f"{'at least ' if None in again else ''}{sum(filter(None, again))}"
    said = [
        f"Nothing that had not begun fails: {'HOLDS' if not bad else 'BROKEN'}, {len(bad)} of {len(requests)} requests "
        f"under {len(kills)} kills; {resent} were sent again to the other replica."
    ]
    if bad:
        why = Counter(f"{one['status']} {one['error']}" for one in bad)
        said.append("What they were told: " + ", ".join(f"{count} times {what}" for what, count in why.most_common(3))
                    + (". Overloaded is not lost: one replica cannot carry this load, try a lower --rate."
                       if any(OVERLOADED in what for what in why) else "."))  # fmt: skip
    said.append(
        f"What had begun ends with a visible error: {'HOLDS' if not silent else 'BROKEN'}, "
        f"{len(cut + silent)} ended early and {len(silent)} of them unseen."
    )
    missed = record.get("config", {}).get("kills", len(kills)) - len(kills)
    if record.get("error"):
        said.append(f"The kills ended with an error: {record['error']}")
    elif missed and not record["partial"]:
        said.append(f"{missed} rounds had no kill: a replica was away for longer. Try a longer --period.")
    downs = [gap(kill, "killed", "down") for kill in kills if kill["down"] is not None]
    ups = [gap(kill, "killed", "up") for kill in kills if kill["up"] is not None]
    if len(downs) < len(kills) or len(ups) < len(kills):
        said.append("Not every kill was seen, or not every replica came back, before the run ended.")
    if downs and ups:
        said.append(
            f"Seen as down after {number(max(downs), 2)} s at most, back in rotation {number(max(ups), 1)} s after the "
            "kill at most, the time that it was left dead and the model's loading among it."
        )
    whole = len(of_kind(requests, "answered"))
    said.append(f"Availability over the whole run: {number(100 * whole / len(requests), 2)} % of the requests.")
    return said
