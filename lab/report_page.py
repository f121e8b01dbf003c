"""The report of the newest load record: a list of blocks, printed as Markdown and as one HTML page that asks nobody.

Everything that came from a record is text here, and is escaped where it is printed.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from config import UserError
from lab import compare, compare_figure, load_runs, report_figures
from lab.load_runs import Record, Run, cost_per_1k, level, load_words, over_rounds, rounds_by_load, shape
from lab.report_render import Block
from metrics import NONE, ms, number

PERCENTILES = ("p50", "p90", "p95", "p99")
KNEE = (
    "The knee is the load at which throughput divided by latency (tokens/s by E2E p50) is greatest: beyond it, latency "
    "grows by a larger factor than throughput."
)


# ---- choosing


def load_records(results: Path) -> list[Record]:
    """Every whole load record, oldest first. UserError when there is none."""
    found = {r["id"]: r for r in load_runs.all_records(results) if r.get("kind") == "load" and r.get("runs")}
    usable = [load_runs.checked(r) for r in found.values() if r.get("schema") == load_runs.SCHEMA]
    if not usable:
        raise UserError(
            f"No load record in {results}: make one with `python3 load_test.py --start --concurrency 1,4` (or "
            "--url URL), then run this again."
        )
    return sorted(usable, key=lambda r: str(r.get("time")))


def baseline_of(records: Sequence[Record], chosen: str = "") -> Record | None:
    """What the newest record is compared with: the one asked for, else the newest earlier one with a load in common."""
    newest = records[-1]
    loads = rounds_by_load(newest).keys()
    if chosen:
        return next((r for r in records if r["id"].startswith(chosen)), None)
    return next((r for r in reversed(records[:-1]) if loads & rounds_by_load(r).keys()), None)


# ---- the knee


def knee_of(points: Sequence[tuple[float, float]]) -> int | None:
    """Which point has the greatest throughput / latency; None below three points."""
    if len(points) < 3:
        return None
    return max(range(len(points)), key=lambda i: points[i][0] / points[i][1])


# ---- the parts of the report


def blocks_of(records: Sequence[Record], price: float, chosen: str = "") -> list[Block]:
    record = records[-1]
    return [
        *opening(record),
        *load_part(record),
        *percentile_part(record),
        *frontier_part(record),
        *timeline_part(record),
        *comparison_part(record, baseline_of(records, chosen)),
        *cost_part(record, price),
        *rests_part(record),
    ]


def opening(record: Record) -> list[Block]:
    server, card = record.get("server") or {}, record["card"]
    model = (server.get("about") or {}).get("model") or server.get("model")
    partial = " It is partial: the run was interrupted." if record.get("partial") else ""
    items = [
        f"Record [{record['id']}] of {record['time'][:16]}.{partial}",
        f"Model {model_words(model)} on a server of kind {server.get('kind') or 'unknown'}, "
        f"{server.get('url') or 'at an unknown address'}.",
        f"Machine: {card.get('CPU')}; {card.get('Cores')}; GPU {card.get('GPU')}; commit {card.get('Commit')}.",
        f"Command: {record.get('command')}",
    ]
    return [Block("heading", "What the service does under load"), Block("list", items)]


def model_words(model: Any) -> str:
    """Our service tells all about its model, others its name at most."""
    if not isinstance(model, dict):
        return str(model or "unknown")
    told = [f"{name} {model[name]}" for name in ("weights", "cache", "kernel", "device", "hash") if model.get(name)]
    return f"{model.get('name') or 'unknown'} ({'; '.join(told)})" if told else str(model.get("name") or "unknown")


def load_part(record: Record) -> list[Block]:
    """A picture per axis: closed loops against requests at once, open loops against the rate. They never share one."""
    loads = [runs for runs in rounds_by_load(record).values() if level(runs[0])]
    blocks = [Block("heading", "Throughput and latency against load")]
    for axis in dict.fromkeys(level(runs[0])[0] for runs in loads):
        throughput: report_figures.Series = {}
        latency: report_figures.Series = {}
        tail: report_figures.Series = {}
        for runs in (runs for runs in loads if level(runs[0])[0] == axis):
            for series, figure in ((throughput, "throughput"), (latency, "e2e"), (tail, "e2e_p99")):
                y = over_rounds(runs, figure)
                if y is not None:
                    series.setdefault(shape(runs[0]), []).append((level(runs[0])[1], y))
        if throughput and latency:
            caption = f"Against {axis}; each point is the median of its rounds. Series: prompt + new tokens."
            blocks.append(Block("figure", (report_figures.against_load(throughput, latency, tail, axis), caption)))
    columns = ["load", "rounds", "requests", "failed", "output tokens/s", "requests/s", "in flight", "window"]
    rows = [
        [load_words(runs[0]), len(runs), sum(len(run["requests"]) for run in runs),
         sum(not r["ok"] for run in runs for r in run["requests"]), number(over_rounds(runs, "throughput"), 1),
         number(over_rounds(runs, "requests"), 2), number(runs[0]["figures"].get("mean_in_flight"), 1),
         ", ".join(dict.fromkeys(run["window"]["class"] for run in runs))]
        for runs in rounds_by_load(record).values()
    ]  # fmt: skip
    return [*blocks, Block("table", (columns, rows))]


def percentile_part(record: Record) -> list[Block]:
    blocks = [Block("heading", "TTFT, TPOT and E2E, ms")]
    for name in ("ttft", "tpot", "e2e"):
        rows = [
            [load_words(runs[0]), samples(runs, name), *(percentile_cell(runs, name, p) for p in PERCENTILES)]
            for runs in rounds_by_load(record).values()
        ]
        blocks.append(Block("table", ([name.upper(), "n a round", *PERCENTILES], rows)))
    note = (
        "Each is the median round's percentile of raw samples. * = not certified: so few samples say little about the "
        "next run."
    )
    return [*blocks, Block("text", note)]


def samples(runs: Sequence[Run], name: str) -> str:
    counts = sorted({(run["figures"].get(f"{name}_s") or {}).get("n", 0) for run in runs})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"


def percentile_cell(runs: Sequence[Run], name: str, p: str) -> str:
    found = over_rounds(runs, f"{name}_{p}")
    sure = all(p in ((run["figures"].get(f"{name}_s") or {}).get("certified") or ()) for run in runs)
    return ms(found) + ("" if sure or found is None else "*")


def frontier_part(record: Record) -> list[Block]:
    """The shape with the most load levels: latency against throughput, and the knee."""
    by_shape: dict[tuple[str, str], list[tuple[float, float, float, str]]] = {}
    for runs in rounds_by_load(record).values():
        place, x, y = level(runs[0]), over_rounds(runs, "throughput"), over_rounds(runs, "e2e")
        if place and x is not None and y is not None:
            by_shape.setdefault((place[0], shape(runs[0])), []).append((place[1], x, y, f"{place[1]:g}"))
    blocks = [Block("heading", "Latency–throughput frontier")]
    if not by_shape:
        return [*blocks, Block("text", "No load has both throughput and latency.")]
    (axis, tokens), found = max(by_shape.items(), key=lambda item: len(item[1]))
    points = [(x, y, name) for _, x, y, name in sorted(found)]
    knee = knee_of([point[:2] for point in points])
    if knee is None:
        where = f"{len(points)} load levels are too few to look for a knee: run at least three."
    else:
        edge = knee in (0, len(points) - 1)
        where = f"{KNEE} Here: {axis} = {points[knee][2]} ({points[knee][0]:.1f} tokens/s at {points[knee][1]:.2f} s)."
        where += " That is the edge of what was run: the knee may lie beyond." if edge else ""
    caption = f"{tokens}; the numbers are {axis}. [{record['id']}]"
    return [*blocks, Block("figure", (report_figures.frontier(points, knee), caption)), Block("text", where)]


def timeline_part(record: Record) -> list[Block]:
    drawable = [run for run in record["runs"] if any(r["ok"] and r["chunks"] for r in run["requests"])]
    if not drawable:
        return []
    run = max(
        drawable, key=lambda one: (one["load"].get("concurrency") or 0, one["figures"].get("mean_in_flight") or 0)
    )
    caption = (
        f"{load_words(run)}, the first {report_figures.LONGEST_TIMELINE} answered requests at most. [{record['id']}]"
    )
    return [Block("heading", "The requests of one run"), Block("figure", (report_figures.timeline(run), caption))]


def comparison_part(record: Record, baseline: Record | None) -> list[Block]:
    heading = Block("heading", "Baseline against this record")
    if baseline is None or baseline["id"] == record["id"]:
        return [heading, Block("text", "No earlier load record has a load in common, so there is nothing to compare.")]
    try:
        found = compare.compare(baseline, record)
    except UserError as error:
        return [heading, Block("text", str(error))]
    differs = "; ".join(found.factors) or "nothing that the records know of"
    rows = [list(row.cells()[:-1]) for row in found.rows]
    axis = compare_figure.axis_of(baseline, record)
    drawing = report_figures.svg(compare_figure.drawn(baseline, record, axis), "compared") if axis else None
    caption = f"Dashed: A [{found.a}]. Drawn through: B [{found.b}]. Each point is the median of its rounds."
    return [
        heading,
        Block("text", f"A = [{found.a}], the baseline; B = [{found.b}]. What differs: {differs}."),
        *([Block("figure", (drawing, caption))] if drawing else []),
        Block("table", (["load", "figure", "A", "B", "B / A", "B is"], rows)),
        *(Block("text", note) for note in found.notes),
    ]


# ---- cost


def cost_part(record: Record, price: float) -> list[Block]:
    heading = Block("heading", "Cost per 1,000 tokens")
    if not price:
        return [heading, Block("text", "Give --machine-price, per hour, to have it here.")]
    rows, split = [], True
    for runs in rounds_by_load(record).values():
        costs = [cost_per_1k(run, price) for run in runs]
        cells = [
            median(found) if found else None for found in ([c[i] for c in costs if c[i] is not None] for i in (0, 1))
        ]
        split &= cells[0] is not None
        rows.append([load_words(runs[0]), *(number(cell, 6) for cell in cells)])
    how = (
        f"The machine costs {price:g} an hour; both columns are in that money. A second of the machine is split "
        "between input and output as its requests' time was between prefill and decode."
    )
    missing = (
        f" {NONE}: the server does not tell its queue, so the stages are not known and all is charged to the output."
    )
    columns = ["load", "1k tokens in", "1k tokens out"]
    return [heading, Block("table", (columns, rows)), Block("text", how + ("" if split else missing))]


# ---- what it rests on


def rests_part(record: Record) -> list[Block]:
    """Every load with its n and whether its laws hold; then the record's own sentences."""
    rows = []
    for runs in rounds_by_load(record).values():
        inside = [run["window"].get("inside") for run in runs]
        rows.append(
            [load_words(runs[0]), len(runs), " ".join(str(n) for n in inside),
             law_word(runs, "little"), law_word(runs, "tokens")]
        )  # fmt: skip
    columns = ["load", "rounds", "requests inside the window", "Little's law", "token law"]
    source = Block("text", f"Every figure above is from [{record['id']}], unless it names another record.")
    blocks = [Block("heading", "What this rests on"), source, Block("table", (columns, rows))]
    if record["verdicts"]:
        blocks.append(Block("list", list(record["verdicts"])))
    return blocks


def law_word(runs: Iterable[Run], name: str) -> str:
    known = [
        law["holds"]
        for law in ((run.get("laws") or {}).get(name) for run in runs)
        if law and law.get("holds") is not None
    ]
    return NONE if not known else "holds" if all(known) else f"BROKEN in {known.count(False)} of {len(known)}"
