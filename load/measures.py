"""What the stamps of a run mean. Every figure is made from raw stamps of single requests, never from other figures.

TTFT: from due to the first piece of text. E2E: from due to the last. TPOT: (E2E - TTFT) / (tokens - 1). ITL: the
raw gaps between pieces. Counting from due and not from sent keeps the time that a request waited for a late sender.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from lab.client import INTERRUPTED, Trace
from metrics import certified, percentile

Request = dict[str, Any]  # one request of a run, in plain numbers; seconds since the run began
Window = dict[str, Any]
PERCENTILES = (50, 90, 95, 99)
FEWEST = 5  # requests that a window must hold to be one
ODD = (ValueError, TypeError, AttributeError, KeyError)  # what reading an answer of another form may raise
GROWING = 1.5  # times as many in flight in its last third as in its first: it never settled
LITTLE_OFF = 0.05
SAID = 400  # bytes kept of what a server said to a failed request: its words, their code, the limit that was hit


def measured(traces: Sequence[Trace], start_s: float, count: Callable[[str], int] | None = None) -> list[Request]:
    """Each trace as plain numbers. count: tokens of a piece of text, where a tokenizer is at hand; else each piece is
    one, and the server's own usage says how many there were in all.
    """
    return [request_of(i, trace, start_s, count) for i, trace in enumerate(traces)]


def request_of(i: int, trace: Trace, start_s: float, count: Callable[[str], int] | None) -> Request:
    error = error_of(trace)
    try:
        content, usage = (trace.content if trace.streamed else []), dict(trace.usage or {})
        chunks = [[since(moment, start_s), count(text) if count else 1] for moment, text in content]
    except ODD as odd:
        error, chunks, usage = error or f"malformed: {odd}", [], {}
    new, by = whole_number(usage.get("completion_tokens")), "usage"
    if new is None:
        new, by = sum(tokens for _, tokens in chunks) or None, "ids" if count else "chunks"
    return {
        "i": i, "due": since(trace.due_s, start_s), "sent": since(trace.sent_s, start_s),
        "end": since(trace.end_s, start_s),
        "status": trace.status, "error": error, "ok": error is None, "chunks": chunks,
        "prompt_tokens": whole_number(usage.get("prompt_tokens")),
        "cached_tokens": told(usage, "prompt_tokens_details", "cached_tokens"), "new_tokens": new,
        "counted_by": by, "choice_times": choice_times(trace, start_s),
        "queue": told(usage, "timing", "queue"), "retries": trace.attempts - 1,
    }  # fmt: skip


def since(moment: float, start_s: float) -> float:
    """Seconds since the run began; to a microsecond, which is less than a clock reading is good for."""
    return round(moment - start_s, 6)


def choice_times(trace: Trace, start_s: float) -> list[float]:
    """When each event with a choice came, with text or not: what other tools take for tokens (load/formulas.py)."""
    try:
        return (
            [since(moment, start_s) for moment, data in trace.events if data.get("choices")] if trace.streamed else []
        )
    except ODD:
        return []


def told(usage: dict[str, Any], part: str, name: str) -> float | None:
    """A number inside a part of usage that not every server has."""
    inner = usage.get(part)
    value = inner.get(name) if isinstance(inner, dict) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def error_of(trace: Trace) -> str | None:
    """None for a whole answer; else the kind of failure, in a word or two, and what was said of it."""
    if trace.error is not None:
        return trace.error
    if trace.status != 200:
        return f"{trace.status}: {said(trace)}"
    try:
        events = [data for _, data in trace.events]
        failure = next((data["error"] for data in events if data.get("error")), None)
        ended = any(choice.get("finish_reason") for data in events for choice in data.get("choices") or ())
    except ODD as error:
        return f"malformed: {error}"
    if failure is not None:
        return f"error event: {failure}"[:300]
    if trace.complete:
        return None
    return None if ended else "cut: the stream ended without a finish_reason and without [DONE]"


def said(trace: Trace) -> str:
    return b"".join(piece for _, piece in trace.pieces)[:SAID].decode(errors="replace")


# ---- of one request


def ttft(request: Request) -> float | None:
    return request["chunks"][0][0] - request["due"] if request["chunks"] else None


def e2e(request: Request) -> float:
    """To the last token; of an answer in one piece, to its end."""
    last = request["chunks"][-1][0] if request["chunks"] else request["end"]
    return last - request["due"]


def tpot(request: Request) -> float | None:
    """None for an answer of one token, and for one that came in one piece: there is nothing between its tokens."""
    new, chunks = request["new_tokens"], request["chunks"]
    if not new or new < 2 or len(chunks) < 2:
        return None
    return (chunks[-1][0] - chunks[0][0]) / (new - 1)


def gaps(request: Request) -> list[float]:
    return [after - before for (before, _), (after, _) in pairwise(request["chunks"])]


# ---- the window


def steady(requests: Sequence[Request], clients: int | None = None) -> Window:
    """The part of a run in which the load was what was asked for.

    The opening wave is left out: until every client has had its first answer, or in an open loop until the first
    request has been answered. So is the end: from the last start on, fewer and fewer are in flight. class: steady;
    growing, when ever more were in flight; whole, when too few requests are left and all of them are taken.
    """
    asked = [one for one in requests if one["error"] != INTERRUPTED]
    if not asked:
        return {"begin": 0.0, "end": 0.0, "class": "whole", "inside": 0}
    ends = sorted(one["end"] for one in asked)
    begin = ends[min(clients or 1, len(ends)) - 1]
    end = max(one["due"] for one in asked)
    inside = within(asked, begin, end)
    if len(inside) < max(FEWEST, clients or 0):
        begin, end = min(one["due"] for one in asked), ends[-1]
        return {"begin": begin, "end": end, "class": "whole", "inside": len(asked)}
    third = (end - begin) / 3
    first, last = overlap(asked, begin, begin + third), overlap(asked, end - third, end)
    kind = "growing" if clients is None and last > GROWING * first + 1 else "steady"
    return {"begin": begin, "end": end, "class": kind, "inside": len(inside)}


def within(requests: Sequence[Request], begin: float, end: float) -> list[Request]:
    """Those that were due in it."""
    return [one for one in requests if begin <= one["due"] <= end]


def overlap(requests: Sequence[Request], begin: float, end: float) -> float:
    """Mean number in flight, from the stamps of each request; one that waits to be sent again is in flight."""
    spent = (min(one["end"], end) - max(one["due"], begin) for one in requests)
    return sum(max(seconds, 0.0) for seconds in spent) / (end - begin) if end > begin else 0.0


# ---- of a run


def figures(requests: Sequence[Request], window: Window, limits: "dict[str, float] | None" = None) -> dict[str, Any]:
    """The run's figures. limits: seconds that TTFT, TPOT, E2E of a request must stay within to be good."""
    begin, end = window["begin"], window["end"]
    inside = [one for one in within(requests, begin, end) if one["error"] != INTERRUPTED]
    good = [one for one in inside if one["ok"]]
    length = end - begin or None
    pieces = [(moment, tokens) for one in requests for moment, tokens in exact(one) if begin < moment <= end]
    # An end that opens the window belongs to what was before it: of the ends of a closed loop it would be one too many.
    ended = [one for one in requests if one["ok"] and begin < one["end"] <= end]
    asked, cached = (
        [one[name] for one in good if one[name] is not None] for name in ("prompt_tokens", "cached_tokens")
    )
    asked_there = [one["prompt_tokens"] for one in ended if one["prompt_tokens"] is not None]
    sent = sorted(one["due"] if one["retries"] else one["sent"] for one in inside)  # kept is when it left the last time
    return {
        "ttft_s": spread([value for one in good if (value := ttft(one)) is not None]),
        "tpot_s": spread([value for one in good if (value := tpot(one)) is not None]),
        "itl_s": spread([gap for one in good for gap in gaps(one)]),
        "e2e_s": spread([e2e(one) for one in good]),
        "queue_s": spread([one["queue"] for one in good if one["queue"] is not None]),
        "schedule_delay_s": spread([one["sent"] - one["due"] for one in inside if not one["retries"]]),
        "requests_per_s": length and len(ended) / length,
        "output_tokens_per_s": length and sum(tokens for _, tokens in pieces) / length,
        "prompt_tokens_per_s": sum(asked_there) / length if length and asked_there else None,
        "goodput_per_s": None if limits is None or not length else sum(meets(one, limits) for one in ended) / length,
        "achieved_rate": (len(sent) - 1) / (sent[-1] - sent[0]) if len(sent) > 1 and sent[-1] > sent[0] else None,
        "errors": dict(Counter(one["error"].partition(":")[0] for one in inside if not one["ok"])),
        "retries": sum(one["retries"] for one in inside),
        "new_tokens": sum(one["new_tokens"] or 0 for one in good),
        "cached_tokens": sum(cached) if cached else None,
        "prompt_tokens": sum(asked) if asked else None,
    }  # fmt: skip


def exact(request: Request) -> list[tuple[float, float]]:
    """(when, tokens) of each piece; where the server counted more or fewer than there were pieces, all in proportion.

    Of an answer in one piece all tokens come at its end.
    """
    chunks, new = request["chunks"], request["new_tokens"] or 0
    if not request["ok"]:
        return []
    if not chunks:
        return [(request["end"], new)] if new else []
    share = new / sum(tokens for _, tokens in chunks)
    return [(moment, tokens * share) for moment, tokens in chunks]


def meets(request: Request, limits: dict[str, float]) -> bool:
    """What was not measured does not meet a limit; but a single token has nothing between its tokens."""
    between = 0.0 if request["new_tokens"] == 1 and request["chunks"] else tpot(request)
    found = {"ttft": ttft(request), "tpot": between, "e2e": e2e(request) if request["new_tokens"] else None}
    return request["ok"] and all(found[name] is not None and found[name] <= most for name, most in limits.items())


def spread(samples: Sequence[float]) -> dict[str, Any] | None:
    """Order statistics; certified: the percentiles that so many samples support. None: nothing was measured."""
    if not samples:
        return None
    found = {f"p{p}": percentile(samples, p) for p in PERCENTILES}
    sure = [f"p{p}" for p in PERCENTILES if certified(len(samples), p)]
    return found | {"mean": mean(samples), "max": max(samples), "n": len(samples), "certified": sure}


# ---- laws


def little(
    requests: Sequence[Request], samples: Sequence[tuple[float, int]], window: Window,
    server: Sequence[dict[str, float]] = (),
) -> dict[str, Any]:  # fmt: skip
    """Mean in flight, once as a counter saw it that was looked at all along, once from the stamps (Little's law).

    Both are the client's: it holds unless requests were lost or stamps are wrong. server: looks at the server's own
    counters; their mean stands beside it, and is not judged: a look a second is a rough mean of a short run.
    """
    begin, end = window["begin"], window["end"]
    seen = [flying for moment, flying in samples if begin <= moment <= end]
    there = [
        look["running"] + look.get("waiting", 0) for look in server if "running" in look and begin <= look["at"] <= end
    ]
    found = {
        "throughput_x_latency": (stamps := overlap(requests, begin, end)),
        "server": mean(there) if there else None,
    }
    if not seen or not stamps:
        return {"in_flight": None, "off": None, "holds": None} | found
    counted = mean(seen)
    off = abs(counted - stamps) / stamps
    return {"in_flight": counted, "off": off, "holds": off <= LITTLE_OFF} | found


def tokens(requests: Sequence[Request], server: float | None) -> dict[str, Any]:
    """New tokens as pieces, as the answers' usage and as the server's own counter have them.

    server: what that counter grew by. It counts the tokens of failed answers too, so the law is asked only of runs
    without failures.
    """
    pieces = sum(count for one in requests for _, count in one["chunks"])
    told = [one["new_tokens"] for one in requests if one["counted_by"] == "usage"]
    usage = sum(told) if told else None
    whole = all(one["ok"] for one in requests)
    holds = None if usage is None or server is None or not whole else server == usage
    return {"pieces": pieces, "usage": usage, "server": server, "holds": holds}
