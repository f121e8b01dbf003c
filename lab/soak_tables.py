"""The tables of a soak, from its record."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from lab.soak_judge import MIB, Judged, Lap, Look, Pair, warm
from metrics import NONE, ms, number, table

Record = dict[str, Any]
KINDS = {
    "stream": "asked for a stream", "whole": "asked for a whole answer", "leaver": "left in the middle, or meant to",
    "nonsense": "asked nonsense", "rush": "came in a rush",
}  # fmt: skip


def sections(record: Record) -> list[str]:
    found = [ends_table(record), latency_table(record), held_table(record)]
    return [*found, pairs_table(record["pairs"])] if record["pairs"] else found


def ends_table(record: Record) -> str:
    """Who came, and what became of them."""
    words = sorted({word for ends in record["kinds"].values() for word in ends})
    rows = []
    for kind, told in KINDS.items():
        ends = record["kinds"].get(kind, {})
        if ends:
            rows.append(
                (told, f"{sum(ends.values()):,}", *(f"{ends[word]:,}" if word in ends else NONE for word in words))
            )
    stayed, answered = (sum(lap[name] for lap in record["laps"]) for name in ("stayed", "answered"))
    most, rate = record["most_per_s"], record["rate_per_s"]
    said = (
        f"An open loop of {number(rate)} requests/s, {rate / most:.0%} of the {number(most)} that the same visitors "
        f"get through when they wait for their answers. Outside rushes {answered:,} of {stayed:,} sensible requests "
        f"were answered ({answered / max(stayed, 1):.3%})."
    )
    columns = [("visitors who", "left"), ("in all", "right"), *((word, "right") for word in words)]
    return "### Who came\n\n" + said + "\n\n" + table(columns, rows)


def latency_table(record: Record) -> str:
    laps = record["laps"][warm(record["laps"]) :]
    third = len(laps) // 3
    parts = {"first third": laps[:third], "second third": laps[third : len(laps) - third],
             "last third": laps[len(laps) - third :] if third else []}  # fmt: skip
    rows = [(name, len(part), *latencies(part), pace(part)) for name, part in parts.items() if part]
    columns = [("after the warm-up", "left"), ("laps", "right"), ("answers a lap", "right"), ("TTFT p50 (ms)", "right"),
               ("p99", "right"), ("E2E p50 (ms)", "right"), ("p99", "right"), ("fixed work (ms)", "right")]  # fmt: skip
    few = [lap for lap in laps if lap["e2e_s"] and "p99" not in lap["e2e_s"]["certified"]]
    note = f" In {len(few)} of {len(laps)} laps there are too few answers for a certified p99." if few else ""
    told = (
        "Open loop; from due. Of each lap the percentile, of the laps the median. Fixed work: a hash of 8 MiB in this "
        f"client, by its own CPU time; it tells how fast the machine was.{note}"
    )
    return f"### How long they waited\n\n{told}\n\n" + table(columns, rows)


def latencies(laps: Sequence[Lap]) -> list[str]:
    counts = [lap["e2e_s"]["n"] for lap in laps if lap["e2e_s"]]
    cells = [f"{median(counts):,.0f}" if counts else NONE]
    for figure in ("ttft_s", "e2e_s"):
        known = [lap[figure] for lap in laps if lap[figure]]
        cells += [ms(median(one[p] for one in known)) if known else NONE for p in ("p50", "p99")]
    return cells


def pace(laps: Sequence[Lap]) -> str:
    known = [lap["anchor_s"] for lap in laps if lap["anchor_s"]]
    return ms(median(known)) if known else NONE


def pairs_table(pairs: Sequence[Pair]) -> str:
    told = (
        "The same visits, sent to the old service and to one that had just started, in turns: what differs is age, and "
        "not the machine, which changes in hours, too."
    )
    rows = [(name, len(pairs), *latencies([pair[key] for pair in pairs]))
            for name, key in (("the old service", "old"), ("a new one", "new"))]  # fmt: skip
    columns = [("service", "left"), ("laps", "right"), ("answers a lap", "right"), ("TTFT p50 (ms)", "right"),
               ("p99", "right"), ("E2E p50 (ms)", "right"), ("p99", "right")]  # fmt: skip
    return f"### Old and new\n\n{told}\n\n" + table(columns, rows)


def held_table(record: Record) -> str:
    rests, looks = record["rests"], record["looks"]
    ready = [] if record["ready_s"] is None else [one for one in rests if one["at"] >= record["ready_s"]]
    told = {"when it had started": looks[0]}
    told |= {"when all caches were full": rests[0]} if rests else {}
    told |= {"after the warm-up": ready[0], "at the end": ready[-1]} if ready else {}
    rows = [(name, *row_of(one)) for name, one in told.items()]
    busiest = {
        name: max((one.get(name, 0) for one in looks), default=0) for name in ("bytes", "files", "threads", "tasks")
    }
    rows.append(("the most while it was asked", *row_of(busiest | {"at": None})))
    columns = [("look", "left"), ("minute", "right"), ("RssAnon + VmSwap (MiB)", "right"), ("files", "right"),
               ("threads", "right"), ("tasks", "right")]  # fmt: skip
    pool = (
        f"Before anything counts its memory for keys and values ({record['kv_tokens']:,} tokens) is written once, and "
        "its tokenizer has seen more words than it remembers."
    )
    return f"### What its process held\n\n{pool}\n\n" + table(columns, rows)


def row_of(look: Look) -> list[str]:
    minute = NONE if look["at"] is None else number(look["at"] / 60)
    return [
        minute,
        number(look["bytes"] / MIB, 2),
        *(str(look.get(name, NONE)) for name in ("files", "threads", "tasks")),
    ]


def judged_table(found: Sequence[Judged]) -> str:
    rows = [(one.what, one.limit, one.measured, one.word) for one in found]
    columns = [("what", "left"), ("limit", "left"), ("measured", "left"), ("", "left")]
    return "### What must hold\n\n" + table(columns, rows)
