"""The tables of an overload's pulse, from its record."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lab import pulse_figures as figures
from lab.pulse_figures import SERVED, Phase, Request
from lab.pulse_words import recoveries, seconds
from lab.soak_judge import Judged
from metrics import NONE, certified, ms, number, percentile, table

Record = dict[str, Any]


def sections(record: Record, found: Sequence[Judged]) -> list[str]:
    return [phases_table(record), refusals_table(record), recovery_table(record), judged_table(found)]


# ---- what happened


def phases_table(record: Record) -> str:
    rows = [phase_row(record, phase) for phase in figures.phases(record)]
    columns = [("part of a round", "left"), ("asked/s", "right"), ("answered/s", "right"), ("refused", "right"),
               ("failed", "right"), ("TTFT p50 (ms)", "right"), ("p99", "right"), ("E2E p50 (ms)", "right"),
               ("p99", "right"), ("n", "right")]  # fmt: skip
    said = (
        f"Open loop, Poisson. The capacity is {number(record['capacity_per_s'], 2)} requests/s, which "
        f"{record['config']['max_running']} slots serve to clients who wait for their answers. {len(record['rounds'])} "
        "rounds together; answered/s counts ends in the part, latencies count from due, of those due in it. A p99 with "
        "* stands on too few answers to say much of another run."
    )
    return "### What happened\n\n" + said + "\n\n" + table(columns, rows)


def phase_row(record: Record, phase: Phase) -> tuple:
    rounds = [one["requests"] for one in record["rounds"]]
    length = (phase.end_s - phase.begin_s) * len(rounds)
    due = [one for requests in rounds for one in figures.due_in(requests, phase.begin_s, phase.end_s)]
    good, turned = figures.served(due), sum(refused(one) for one in due)
    rate = sum(figures.goodput(requests, phase) for requests in rounds) / len(rounds)
    mark = "" if certified(len(good), 99) else "*"
    waits = []
    for name in ("ttft", "e2e"):
        values = [one[name] for one in good if one[name] is not None]
        waits += [ms(percentile(values, 50)), ms(percentile(values, 99)) + mark] if values else [NONE, NONE]
    failed = len(due) - len(good) - turned
    return (phase.name, number(len(due) / length, 2), number(rate, 2), turned, failed, *waits, f"{len(good):,}")


def refused(request: Request) -> bool:
    return request["kind"].startswith(("503 ", "429 "))


def refusals_table(record: Record) -> str:
    requests = [one for part in record["rounds"] for one in part["requests"] if one["kind"] != SERVED]
    rows = []
    for kind, count in Counter(one["kind"] for one in requests).most_common():
        took = [one["end"] - one["due"] for one in requests if one["kind"] == kind]
        mark = "" if certified(count, 99) else "*"
        rows.append((kind, f"{count:,}", ms(percentile(took, 50)), ms(percentile(took, 99)) + mark, ms(max(took))))
    columns = [("not served", "left"), ("requests", "right"), ("told after p50 (ms)", "right"), ("p99", "right"),
               ("at the latest", "right")]  # fmt: skip
    said = "From due to the end of the refusal, which names the limit that was hit."
    return "### Who was refused\n\n" + said + "\n\n" + (table(columns, rows) if rows else "Nobody was.")


# ---- back to what it was


def recovery_table(record: Record) -> str:
    before = figures.usual(record["rounds"], record["pulse_begin_s"])
    rows = []
    for i, (one, took) in enumerate(zip(record["rounds"], recoveries(record), strict=True)):
        queue = [look["waiting"] for look in one["looks"] if look["waiting"] is not None]
        turned = sum(refused(request) for request in one["requests"])
        late = [request["due"] for request in one["requests"] if refused(request)]
        last = max(late) - record["pulse_end_s"] if late else None
        rows.append((i + 1, seconds(took), number(last), number(max(queue, default=None), 0), f"{turned:,}"))
    columns = [("round", "right"), ("recovered after (s)", "right"), ("last refusal after (s)", "right"),
               ("longest queue", "right"), ("refused", "right")]  # fmt: skip
    said = (
        f"Seconds from the pulse's end. Recovered: from then on, for {figures.STAYS_S:g} s, every window of "
        f"{figures.WIDTH_S:g} s is no worse than the worst one before the pulse was in any round: p99 of TTFT "
        f"{ms(before.ttft_s)} ms, {before.refused:.0%} not served."
    )
    return "### How soon it was what it was\n\n" + said + "\n\n" + table(columns, rows)


def judged_table(found: Sequence[Judged]) -> str:
    columns = [("what", "left"), ("wanted", "left"), ("measured", "left"), ("", "left")]
    said = "The last three are of the steady parts: before the pulse, and later than ten seconds after it."
    return (
        "### What is wanted\n\n"
        + said
        + "\n\n"
        + table(columns, [(j.what, j.limit, j.measured, j.word) for j in found])
    )
