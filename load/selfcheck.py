"""Does the load generator measure what is? Its figures of golden servers, beside what those servers really did.

A server's stamps are the truth: when a request was read, and when each piece of its answer was written. What the
script asked for stands beside it, so that a server that was late itself cannot be taken for a client that was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lab.client import Body, Client, Trace
from load import drive
from load.connection import CHAT, Served
from load.golden import started
from load.measures import figures, measured
from load.script import MODEL, Script
from metrics import NONE, number, percentile, table

Measure = Callable[[str, Sequence[Body]], Sequence[Trace]]  # the address to ask, and what; the traces of all requests

OFF_S, OFF_SHARE = 1e-3, 0.01  # so far may a value be off: the greater of the two; of a rate, the share only


@dataclass(frozen=True)
class Case:
    """A script, and how it is asked."""

    name: str
    script: Script
    requests: int = 12
    new_tokens: int = 32


CASES = (
    Case("first 50 ms, gap 10 ms", Script(first_s=0.05, gap_s=0.01)),
    Case("first 200 ms, gap 2 ms", Script(first_s=0.2, gap_s=0.002)),
    Case("4 tokens a piece, gap 20 ms", Script(first_s=0.05, gap_s=0.02, per_chunk=4)),
    Case("queue 30 ms of 80 ms", Script(first_s=0.08, gap_s=0.01, queue_s=0.03)),
)


@dataclass(frozen=True)
class Row:
    """One figure of one case. scripted: as the script has it, where it says so; true: as the server did it."""

    case: str
    figure: str
    scripted: float | None
    true: float
    reported: float | None
    rate: bool = False

    @property
    def difference(self) -> float | None:
        return None if self.reported is None else self.reported - self.true

    @property
    def holds(self) -> bool:
        """A figure that was not reported does not."""
        allowed = OFF_SHARE * abs(self.true)
        return self.difference is not None and abs(self.difference) <= (allowed if self.rate else max(OFF_S, allowed))


def check(measure: Measure, cases: Sequence[Case] = CASES) -> list[Row]:
    """Every case on a server of its own, in a process of its own."""
    return [row for case in cases for row in checked(measure, case)]


def checked(measure: Measure, case: Case) -> list[Row]:
    with started(case.script) as golden:
        traces = measure(golden.url + CHAT, bodies(case))
        served = golden.served
    if len(served) != case.requests:
        raise RuntimeError(f"{case.name}: {case.requests} requests were to be sent, and {len(served)} came.")
    start_s = min(trace.due_s for trace in traces)
    requests = measured(traces, start_s)
    end = max(request["end"] for request in requests)
    window = {"begin": 0.0, "end": end, "class": "whole", "inside": len(requests)}
    return rows(case, truth(served), figures(requests, window))


def closed(url: str, asked: Sequence[Body]) -> list[Trace]:
    """Four clients."""
    return drive.closed(Client(url), asked, 4).traces


def opened(url: str, asked: Sequence[Body]) -> list[Trace]:
    """Twenty requests a second, evenly."""
    return drive.opened(Client(url), asked, [i / 20 for i in range(len(asked))]).traces


def bodies(case: Case) -> list[Body]:
    """No two prompts are alike."""
    return [
        {"model": MODEL, "messages": [{"role": "user", "content": f"Request number {i}."}], "stream": True,
         "max_tokens": case.new_tokens, "stream_options": {"include_usage": True}}
        for i in range(case.requests)
    ]  # fmt: skip


def truth(served: Sequence[Served]) -> dict[str, float]:
    """The medians, and the rate, from the server's stamps."""
    length = max(one.written_s[-1] for one in served) - min(one.arrival_s for one in served)
    return {
        "TTFT p50": middle([one.written_s[0] - one.arrival_s for one in served]),
        "TPOT p50": middle([(one.written_s[-1] - one.written_s[0]) / (sum(one.tokens) - 1) for one in served]),
        "ITL p50": middle([after - before for one in served for before, after in pairwise(one.written_s)]),
        "E2E p50": middle([one.written_s[-1] - one.arrival_s for one in served]),
        "tokens/s": sum(sum(one.tokens) for one in served) / length,
        "requests/s": len(served) / length,
    }


def middle(samples: Sequence[float]) -> float:
    return percentile(samples, 50)


def scripted(case: Case) -> dict[str, float]:
    """The same of one request, if the server is never late. A rate depends on the client as well."""
    script = case.script
    later_s = script.gap_s * ((case.new_tokens - 1) // script.per_chunk)  # from the first piece to the last
    return {"TTFT p50": script.first_s, "TPOT p50": later_s / (case.new_tokens - 1), "ITL p50": script.gap_s,
            "E2E p50": script.first_s + later_s}  # fmt: skip


def rows(case: Case, true: dict[str, float], found: dict[str, Any]) -> list[Row]:
    said = scripted(case)
    names = {"TTFT p50": "ttft_s", "TPOT p50": "tpot_s", "ITL p50": "itl_s", "E2E p50": "e2e_s"}
    lines = [Row(case.name, name, said[name], true[name], median_of(found, field)) for name, field in names.items()]
    if case.script.queue_s is not None:  # the server's word, which the client has to pass on
        queue_s = case.script.queue_s
        lines.append(Row(case.name, "queue p50", queue_s, queue_s, median_of(found, "queue_s")))
    rates = {"tokens/s": "output_tokens_per_s", "requests/s": "requests_per_s"}
    return lines + [Row(case.name, name, None, true[name], found[field], rate=True) for name, field in rates.items()]


def median_of(found: dict[str, Any], field: str) -> float | None:
    spread = found.get(field)
    return spread and spread["p50"]


# ---- what is printed


def checks_table(rows: Sequence[Row]) -> str:
    columns = [("server", "left"), ("figure", "left"), ("scripted", "right"), ("true", "right"), ("reported", "right"),
               ("difference", "right"), ("within 1 ms or 1 %", "left")]  # fmt: skip
    return table(columns, [line(row) for row in rows])


def line(row: Row) -> tuple[str, ...]:
    values = (row.scripted, row.true, row.reported, row.difference)
    digits, scale, unit = (2, 1.0, "/s") if row.rate else (3, 1e3, " ms")
    shown = [number(value, digits, scale, unit) for value in values]
    return (row.case, row.figure.partition("/s")[0], *shown, "yes" if row.holds else "NO")


def sentence(rows: Sequence[Row]) -> str:
    """What the table says."""
    wrong = [row for row in rows if not row.holds]
    if not wrong:
        return f"All {len(rows)} figures are within 1 ms or 1 % of what the servers did."
    where = ", ".join(
        f"{row.figure} of '{row.case}' ({NONE if row.reported is None else line(row)[5]})" for row in wrong
    )
    return f"{len(wrong)} of {len(rows)} figures are off: {where}."
