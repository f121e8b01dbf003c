"""Day 2's tables, from a record of a batching sweep."""

from collections.abc import Sequence
from statistics import mean, median

from lab import roofline
from lab.batch_figures import (
    Cell,
    Record,
    Trial,
    baseline,
    calibrated,
    cells,
    certified_percentile,
    compared,
    conserved,
    fill,
    interval_of_mean,
    latencies_s,
    latest_s,
    little_off,
    machine_s,
    makespan_s,
    mean_latency_s,
    measured_steps,
    padding_share,
    parts_s,
    passes_per_token,
    pooled_latencies_s,
    prediction_errors,
    requests_per_s,
    residuals_s,
    same_tokens,
    scored,
    step_curve,
    step_line,
    tokens_conserved,
    tokens_per_s,
)
from lab.verdict import Verdict
from metrics import NONE, ms, number, percentile, span, table

OPEN_LOOP = (
    "Opening and drain are inside: every round begins and ends with an empty queue. While the machine keeps up, the "
    "throughput is only the rate at which requests came."
)
CELL = [("Batch Size", "right"), ("Wait Window (ms)", "right")]


def sections(record: Record, percentiles: Sequence[float]) -> list[str]:
    found = [owners_table(record, percentiles), against_table(record), parts_table(record), laws_table(record),
             prediction_table(record), ledger_table(record), step_table(record)]  # fmt: skip
    return [*found, *([window_table(record)] if "window" in record else [])]


def head(cell: Cell) -> tuple[str, str]:
    return str(cell[0]), f"{cell[1]:g}"


def owners_table(record: Record, percentiles: Sequence[float]) -> str:
    """The table of the owner's plan: what each policy gives, over all rounds."""
    rows = []
    for cell, trials in cells(record).items():
        pooled = pooled_latencies_s(trials)
        averages = [mean_latency_s(trial) for trial in trials]
        rows.append(
            (
                *head(cell),
                number(mean(averages), 3),
                span(interval_of_mean(averages), 3, 1),
                *(number(percentile(pooled, p), 3) for p in percentiles),
                number(median(map(requests_per_s, trials)), 2),
                number(median(map(tokens_per_s, trials)), 1),
                "; ".join(notes(record, trials, percentiles)),
            )
        )
    columns = [*CELL, ("Avg Latency (s)", "right"), ("95 % interval", "right"),
               *((f"P{p:g} Latency (s)", "right") for p in percentiles),
               ("Throughput (req/s)", "right"), ("(tokens/s)", "right"), ("Notes", "left")]  # fmt: skip
    config = record["config"]
    return (
        f"### Batching: {config['requests']} requests, {config['max_new_tokens']} new tokens each, "
        f"{arrivals_of(record)}\n\n" + table(columns, rows) + "\n\n"
        "Latency: from due to done, so waiting in the queue counts. Average and interval: over the rounds' means "
        "(Student's t). Throughput: the median round. Percentiles: nearest rank over all rounds' requests."
        + ("" if config["arrival"] == "burst" else " " + OPEN_LOOP)
    )


def arrivals_of(record: Record) -> str:
    config = record["config"]
    rate = "" if config["arrival"] == "burst" else f" at {config['rate']:g} requests/s"
    return f"arriving as {config['arrival']}{rate} (open loop)"


def notes(record: Record, trials: Sequence[Trial], percentiles: Sequence[float]) -> list[str]:
    found = [f"{len(trials)} rounds"]
    weak = [f"P{p:g}" for p in percentiles if not certified_percentile(record, p)]
    if weak:
        found.append(f"{', '.join(weak)} not certified (n={record['config']['requests']} a round)")
    if not same_tokens(record, trials):
        found.append("TOKENS DIFFER: speed-up void")
    return found


def against_table(record: Record) -> str:
    """Each cell against the smallest batch under the same window: times as ratios, below 1 is better."""
    rows = []
    for cell in cells(record):
        base = baseline(record, cell)
        if cell == base:
            rows.append((*head(cell), "1 (the baseline)", "", "1 (the baseline)", ""))
            continue
        whole, latency = compared(record, cell, base, makespan_s), compared(record, cell, base, mean_latency_s)
        rows.append(
            (*head(cell), gain(whole), f"{whole.word}{told(whole)}", ratio(latency), f"{latency.word}{told(latency)}")
        )
    columns = [
        *CELL,
        ("throughput ×", "right"),
        ("verdict", "left"),
        ("average latency ×", "right"),
        ("verdict", "left"),
    ]
    n = cells(record) and max(len(trials) for trials in cells(record).values())
    return (
        f"### Against batch {min(map(tuple, record['cells']))[0]} under the same window (paired by round, n={n})\n\n"
        + table(columns, rows)
    )


def gain(said: Verdict) -> str:
    """A ratio of times as a ratio of throughputs."""
    if said.ratio is None:
        return NONE
    return f"{1 / said.ratio:.2f}" + ("" if said.low is None else f" [{1 / said.high:.2f}, {1 / said.low:.2f}]")


def ratio(said: Verdict) -> str:
    if said.ratio is None:
        return NONE
    return f"{said.ratio:.2f}" + ("" if said.low is None else f" [{said.low:.2f}, {said.high:.2f}]")


def told(said: Verdict) -> str:
    dropped = f" ({said.dropped} rounds dropped)" if said.dropped else ""
    return dropped + (f": {said.reason}" if said.reason else "")


def parts_table(record: Record) -> str:
    """Where the time of a request goes: the mean over the requests, the median over the rounds."""
    rows = []
    for cell, trials in cells(record).items():
        parts = [{name: mean(values) for name, values in parts_s(trial).items()} for trial in trials]
        medians = {name: median(part[name] for part in parts) for name in parts[0]}
        cpu = [t["usage"]["cpu_cores_mean"] for t in trials if t["usage"]["cpu_cores_mean"] is not None]
        gpu = [t["usage"]["gpu_percent_mean"] for t in trials if t["usage"]["gpu_percent_mean"] is not None]
        rows.append(
            (
                *head(cell),
                *(number(medians[name], 3) for name in ("queue wait", "window wait", "prefill", "decode")),
                number(median(map(mean_latency_s, trials)), 3),
                f"{mean(map(fill, trials)):.0%}",
                f"{mean(map(padding_share, trials)):.1%}",
                number(mean(cpu) if cpu else None, 2),
                number(mean(gpu) if gpu else None, 0),
            )
        )
    columns = [*CELL, ("queue wait s", "right"), ("of it window s", "right"), ("prefill s", "right"),
               ("decode s", "right"), ("latency s", "right"), ("batch fill", "right"), ("padding", "right"),
               ("CPU cores", "right"), ("GPU %", "right")]  # fmt: skip
    return (
        "### Where a request's time goes\n\n" + table(columns, rows) + "\n\n"
        "Each column: the median of the rounds' means. Window: the part of the wait during which the worker was free. "
        "Padding: the share of all computed positions that belonged to no request."
    )


def laws_table(record: Record) -> str:
    """What every cell checks on itself."""
    rows = []
    for cell, trials in cells(record).items():
        worst = max(
            (abs(r), r, latency) for t in trials for r, latency in zip(residuals_s(t), latencies_s(t), strict=True)
        )
        off = max(map(little_off, trials), key=abs)
        computed, useful = (sum(t[f"{name}_positions"] for t in trials) for name in ("computed", "useful"))
        padding = sum(batch["padding"] for trial in trials for batch in trial["batches"])
        rows.append(
            (
                *head(cell),
                f"{ms(worst[1], 2)} of {ms(worst[2], 0)}",
                "holds" if all(map(conserved, trials)) else "BROKEN",
                f"{off:+.2%}",
                "holds" if abs(off) <= 0.05 else "BROKEN",
                f"{computed:,} = {useful:,} + {padding:,}",
                "holds" if all(map(tokens_conserved, trials)) else "BROKEN",
                "equal" if same_tokens(record, trials) else "DIFFER",
            )
        )
    columns = [*CELL, ("largest residual ms", "right"), ("conservation", "left"),
               ("in flight / (rate × latency)", "right"), ("Little", "left"),
               ("positions: computed = useful + padding", "right"), ("tokens", "left"),
               ("answers", "left")]  # fmt: skip
    return (
        "### Laws\n\n" + table(columns, rows) + "\n\n"
        "Conservation: late + queue wait + prefill + decode = latency, within 2 % or 1 ms for every request. Little: "
        "the mean in flight by the batcher's own counter against the caller's stamps, within 5 % (the worst round). "
        "Positions: counted at the network's door = needed by the requests + padded by the batcher's log. Answers: "
        f"those of each request alone. The sender was at worst {ms(max(map(latest_s, record['trials'])), 2)} ms late."
    )


def prediction_table(record: Record) -> str:
    """What the simulation said before each cell ran, beside what came."""
    rows = []
    for cell, trials in cells(record).items():
        off, latency_off = prediction_errors(trials)
        rows.append(
            (
                *head(cell),
                number(median(t["predicted"]["tokens_per_s"] for t in trials), 1),
                number(median(map(tokens_per_s, trials)), 1),
                f"{off:+.1%}",
                number(median(t["predicted"]["mean_latency_s"] for t in trials), 3),
                number(median(map(mean_latency_s, trials)), 3),
                f"{latency_off:+.1%}",
                "yes" if scored(record, cell) else "no: c(b) was calibrated at this size",
            )
        )
    columns = [*CELL, ("predicted tokens/s", "right"), ("measured", "right"), ("error", "right"),
               ("predicted latency s", "right"), ("measured", "right"), ("error", "right"),
               ("scored", "left")]  # fmt: skip
    return (
        "### Predicted, then measured\n\n" + table(columns, rows) + "\n\n"
        "Predicted by the batcher itself on a clock that jumps, with step times taken at batch sizes "
        f"{', '.join(map(str, record['fit_sizes']))} at the beginning of each round. Error: the median of the rounds'."
    )


def ledger_table(record: Record) -> str:
    """Where the gain comes from: the worker's time for each request."""
    rows = []
    for cell, trials in cells(record).items():
        parts = [machine_s(trial) for trial in trials]
        shown = {name: median(part[name] for part in parts) for name in parts[0]}
        rows.append(
            (
                *head(cell),
                number(mean(map(passes_per_token, trials)), 3),
                *(ms(shown[name]) for name in shown),
                ms(median(makespan_s(t) / len(t["due_s"]) for t in trials)),
            )
        )
    columns = [*CELL, ("passes per new token", "right"), ("prefill ms", "right"), ("decode ms", "right"),
               ("window ms", "right"), ("no request ms", "right"), ("rest ms", "right"),
               ("in all ms", "right")]  # fmt: skip
    return (
        "### Batching ledger: the machine's time for each request\n\n" + table(columns, rows) + "\n\n"
        "Every pass reads every weight once, so passes per new token are weight reads per new token."
    )


def step_table(record: Record) -> str:
    """c(b): a decode step by its rows, the line through it, and how far each is from what this machine could do."""
    fitted, in_cells, line = calibrated(record), measured_steps(record), step_line(record)
    bandwidth = median(trial["bytes_per_s"] for trial in record["trials"])
    rate = record["ceilings"]["flops_per_s"].get(record["model"]["dtype"])
    rows = []
    for b in sorted({*fitted, *in_cells}):
        taken, source = (fitted[b], "calibration") if b in fitted else (in_cells[b], "cells")
        work = record["floors"].get(str(b))
        floor = roofline.floor(work["flops"], work["read_bytes"], rate, bandwidth) if work and rate else None
        step = median(taken)
        rows.append(
            (
                b,
                ms(step),
                f"{min(taken) * 1e3:,.1f}–{max(taken) * 1e3:,.1f}",
                ms(step / b),
                ms(line.start + line.slope * b),
                ms(floor.least_s) if floor else NONE,
                floor.wall if floor else NONE,
                f"{floor.least_s / step:.0%}" if floor else NONE,
                source,
            )
        )
    columns = [("rows b", "right"), ("step c(b) ms", "right"), ("least–greatest", "right"), ("ms a token", "right"),
               ("line ms", "right"), ("roofline ms", "right"), ("wall", "left"), ("of roofline", "right"),
               ("measured in", "left")]  # fmt: skip
    return "### c(b): what a decode step costs, by its rows\n\n" + table(columns, rows) + "\n\n" + knee_line(record)


def knee_line(record: Record) -> str:
    line = step_line(record)
    curve = step_curve(record)
    if len(curve) < 2:
        return "One size only: no line, and no knee."
    worst = max(abs((line.start + line.slope * b) / seconds - 1) for b, seconds in curve.items())
    said = (
        f"The line: {ms(line.start)} ms that all rows share + {ms(line.slope, 2)} ms a row, at most {worst:.0%} off "
        "what was measured. "
    )
    if line.start <= 0:
        return said + "No shared part was found: rows cost from the first one on, and batching buys nothing here."
    if line.slope <= 0:
        return said + "A row costs nothing that could be measured: the knee lies beyond these sizes."
    knee = line.start / line.slope
    where = f", beyond the sizes seen (up to {max(curve)})" if knee > max(curve) else ""
    return said + f"The knee, where the rows together cost as much as what they share: about {knee:.0f} rows{where}."


def window_table(record: Record) -> str:
    """Whether a window can pay, by rate of arrivals."""
    found = record["window"]
    rows = [
        (number(row["rate"], 2), f"{row['rate'] / found['capacity']:.0%}", number(row["latency_s"], 3),
         f"{row['delay_s'] * 1e3:+,.1f}", between_ms((row["low_s"], row["high_s"]), 1))
        for row in found["rows"]
    ]  # fmt: skip
    columns = [("requests/s", "right"), ("of capacity", "right"), ("latency without a window s", "right"),
               ("a window adds ms", "right"), ("interval", "right")]  # fmt: skip
    text = (
        f"### Does a window of {found['window_ms']:g} ms pay? Batch {found['size']}, Poisson arrivals, simulated from "
        "c(b)\n\n" + table(columns, rows)
    )
    return text + ("\n\n" + check_table(found) if "check" in found else "")


def decided(interval: tuple[float, float] | None, predicted: Sequence[float]) -> str:
    if interval is None:
        return "NO VERDICT: more rounds are needed"
    low, high = interval
    if low > 0 or high < 0:
        return "a window DELAYS" if low > 0 else "a window HELPS"
    inside = low <= mean(predicted) <= high
    needed = ((high - low) / 2 / max(abs(mean(predicted)), 1e-4)) ** 2
    return f"NO VERDICT: the prediction lies {'in' if inside else 'OUTSIDE'} the interval; ×{needed:,.0f} the rounds"


def between_ms(interval: tuple[float, float] | None, digits: int) -> str:
    """An interval whose ends may be negative."""
    return NONE if interval is None else "[{:+,.{d}f}, {:+,.{d}f}]".format(*(1e3 * end for end in interval), d=digits)


def check_table(found: dict) -> str:
    """Measured differences with their intervals; what they cannot decide says how many rounds might."""
    rows = []
    for rate in sorted({trial["rate"] for trial in found["check"]}):
        by_window = {
            w: [t for t in found["check"] if t["rate"] == rate and t["window_ms"] == w]
            for w in (0.0, found["window_ms"])
        }
        pairs = list(zip(*by_window.values(), strict=False))
        measured = [mean_latency_s(b) - mean_latency_s(a) for a, b in pairs]
        predicted = [b["predicted"]["mean_latency_s"] - a["predicted"]["mean_latency_s"] for a, b in pairs]
        if pairs:
            means = (f"{mean(values) * 1e3:+,.0f}" for values in (predicted, measured))
            interval = interval_of_mean(measured)
            rows.append((number(rate, 2), len(pairs), *means, between_ms(interval, 0), decided(interval, predicted)))
    columns = [("requests/s", "right"), ("rounds", "right"), ("predicted: a window adds ms", "right"),
               ("measured", "right"), ("95 % interval", "right"), ("", "left")]  # fmt: skip
    return "Checked by running, the same arrivals with and without the window:\n\n" + table(columns, rows)
