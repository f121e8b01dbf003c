"""The figures of a batching sweep, from its raw samples. batch_experiment.py says how they are taken.

A trial is one cell (batch size, window) in one round: every request with the moments at which it was due, sent and done
on the caller's clock, and every batch with the moments of the batcher's and the phases of the model's. Seconds from the
trial's start.
"""

from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

from lab.fits import Line, line
from lab.verdict import Verdict, t_half_width, verdict
from metrics import certified

Trial = dict[str, Any]
Record = dict[str, Any]
Cell = tuple[int, float]  # batch size, window in ms

LAW_SHARE, LAW_S = 0.02, 1e-3  # conservation of time holds within 2 % or 1 ms
LITTLE_SHARE = 0.05


def cells(record: Record) -> dict[Cell, list[Trial]]:
    """Every cell with its trials by round."""
    found: dict[Cell, list[Trial]] = {}
    for trial in sorted(record["trials"], key=lambda t: t["round"]):
        found.setdefault((trial["batch_size"], trial["window_ms"]), []).append(trial)
    return {cell: found[cell] for cell in map(tuple, record["cells"]) if cell in found}


def references(record: Record) -> list[str]:
    """The hash of each request's answer when it is computed alone: a first trial of batch 1, or computed beforehand."""
    return record["references"] or next(t["answers"] for t in record["trials"] if t["batch_size"] == 1)


def same_tokens(record: Record, trials: Sequence[Trial]) -> bool:
    return all(trial["answers"] == references(record) for trial in trials)


# ---- one trial


def latencies_s(trial: Trial) -> list[float]:
    """Due to done, by request: waiting in the queue is part of it."""
    return [done - due for due, done in zip(trial["due_s"], trial["done_s"], strict=True)]


def makespan_s(trial: Trial) -> float:
    return max(trial["done_s"]) - min(trial["due_s"])


def mean_latency_s(trial: Trial) -> float:
    return mean(latencies_s(trial))


def tokens_per_s(trial: Trial) -> float:
    return trial["new_tokens"] / makespan_s(trial)


def requests_per_s(trial: Trial) -> float:
    return len(trial["due_s"]) / makespan_s(trial)


def parts_s(trial: Trial) -> dict[str, list[float]]:
    """By request: sent late, queue wait (of it: window wait), prefill, decode, rows dropped. All measured on their own.

    A batch answers all its members when its last row ends, so its phases are every member's phases.
    """
    names = ("late", "queue wait", "window wait", "prefill", "decode", "drop rows")
    found = {name: [0.0] * len(trial["due_s"]) for name in names}
    for batch in trial["batches"]:
        for place, request in enumerate(batch["members"]):
            found["late"][request] = batch["enqueued_s"][place] - trial["due_s"][request]
            found["queue wait"][request] = batch["started_s"] - batch["enqueued_s"][place]
            found["window wait"][request] = batch["window_wait_s"][place]
            found["prefill"][request] = batch["prefill_s"]
            found["decode"][request] = sum(batch["decode_s"])
            found["drop rows"][request] = sum(batch["drop_rows_s"])
    return found


def residuals_s(trial: Trial) -> list[float]:
    """What each latency holds beyond its parts. The window is inside the queue wait."""
    parts = parts_s(trial)
    summed = zip(*(values for name, values in parts.items() if name != "window wait"), strict=True)
    return [latency - sum(values) for latency, values in zip(latencies_s(trial), summed, strict=True)]


def conserved(trial: Trial) -> bool:
    return all(
        abs(residual) <= max(LAW_SHARE * latency, LAW_S)
        for residual, latency in zip(residuals_s(trial), latencies_s(trial), strict=True)
    )


def littles(trial: Trial) -> tuple[float, float]:
    """(mean in flight by the batcher's own counter, throughput * mean latency by the caller's stamps)."""
    return trial["in_flight_s"] / makespan_s(trial), requests_per_s(trial) * mean_latency_s(trial)


def little_off(trial: Trial) -> float:
    inside, product = littles(trial)
    return inside / product - 1


def fill(trial: Trial) -> float:
    """Mean share of a batch's places that were taken."""
    return mean(len(batch["members"]) / trial["batch_size"] for batch in trial["batches"])


def tokens_conserved(trial: Trial) -> bool:
    """What the network computed = what the requests needed + what the batcher says it padded."""
    padding = sum(batch["padding"] for batch in trial["batches"])
    return trial["computed_positions"] == trial["useful_positions"] + padding


def latest_s(trial: Trial) -> float:
    """How late the sender was at worst: whether the load was really the one asked for."""
    return max(sent - due for sent, due in zip(trial["sent_s"], trial["due_s"], strict=True))


def full_batches(trial: Trial) -> list[dict[str, Any]]:
    return [batch for batch in trial["batches"] if len(batch["members"]) == trial["batch_size"]]


def padding_share(trial: Trial) -> float:
    """The share of all positions that the network computed for no request."""
    return 1 - trial["useful_positions"] / trial["computed_positions"]


def machine_s(trial: Trial) -> dict[str, float]:
    """Where the worker's time went, for each request: phases, waiting for the window, nobody there, the rest.

    All but the rest are measured on their own; the rest is what the whole holds beyond them.
    """
    n, batches = len(trial["due_s"]), trial["batches"]
    phases = {
        "prefill": sum(batch["prefill_s"] for batch in batches),
        "decode": sum(sum(batch["decode_s"]) for batch in batches),
        "window": sum(max(batch["window_wait_s"]) for batch in batches),
        "no request": sum(batch["idle_s"] for batch in batches),
    }
    return {name: value / n for name, value in phases.items()} | {
        "rest": (makespan_s(trial) - sum(phases.values())) / n
    }


def passes_per_token(trial: Trial) -> float:
    """Forward passes, each of which reads every weight once, for each new token."""
    return sum(1 + len(batch["decode_s"]) for batch in trial["batches"]) / trial["new_tokens"]


# ---- cells against cells


def compared(record: Record, a: Cell, b: Cell, figure: Callable[[Trial], float]) -> Verdict:
    """Cell a against cell b by a figure in seconds, paired by round."""
    pairs = paired(record, a, b)
    return verdict(
        [figure(ours) for ours, _ in pairs],
        [figure(theirs) for _, theirs in pairs],
        anchors=[mean(one["anchor_s"] for one in pair) for pair in pairs] or None,
        factors=[name for name, x, y in zip(("batch size", "window"), a, b, strict=True) if x != y],
    )


def paired(record: Record, a: Cell, b: Cell) -> list[tuple[Trial, Trial]]:
    """The trials of both cells, round by round. A round that an interruption split is left out: hours lie between."""
    found = cells(record)
    theirs = {(trial["round"], trial["run"]): trial for trial in found.get(b, [])}
    ours = found.get(a, [])
    return [(one, theirs[one["round"], one["run"]]) for one in ours if (one["round"], one["run"]) in theirs]


def baseline(record: Record, cell: Cell) -> Cell:
    """What a cell is compared with: the smallest batch under the same window, so that one factor differs."""
    return min(map(tuple, record["cells"]))[0], cell[1]


def pooled_latencies_s(trials: Sequence[Trial]) -> list[float]:
    return [latency for trial in trials for latency in latencies_s(trial)]


def certified_percentile(record: Record, p: float) -> bool:
    """By the requests of one round. Another round repeats the same burst, or begins with an empty queue again."""
    return certified(record["config"]["requests"], p)


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """95 %, by Student's t over the rounds; None below two."""
    if len(values) < 2:
        return None
    return mean(values) - t_half_width(values), mean(values) + t_half_width(values)


# ---- c(b): what a step costs by its rows


def calibrated(record: Record) -> dict[int, list[float]]:
    """Rows -> the median decode step of each round's calibration."""
    found: dict[int, list[float]] = {}
    for calibration in record["calibrations"]:
        for rows, seconds in calibration["step_s"].items():
            found.setdefault(int(rows), []).append(seconds)
    return dict(sorted(found.items()))


def measured_steps(record: Record) -> dict[int, list[float]]:
    """Rows -> the median decode step of each trial's batches that had so many rows, from the cells themselves."""
    found: dict[int, list[float]] = {}
    for trial in record["trials"]:
        by_rows: dict[int, list[float]] = {}
        for batch in trial["batches"]:
            if not batch["drop_rows_s"]:
                by_rows.setdefault(len(batch["members"]), []).extend(batch["decode_s"])
        for rows, steps in by_rows.items():
            if steps:
                found.setdefault(rows, []).append(median(steps))
    return dict(sorted(found.items()))


def step_curve(record: Record) -> dict[int, float]:
    """c(b) from all that was measured: calibrations, and cells for the sizes that were kept out of them."""
    points = {rows: median(values) for rows, values in measured_steps(record).items()}
    return dict(sorted((points | {rows: median(values) for rows, values in calibrated(record).items()}).items()))


def step_line(record: Record) -> Line:
    """c(b) = what all rows share + what a row adds, by least squares over all measured sizes."""
    curve = step_curve(record)
    return line(list(curve), list(curve.values())) if len(curve) > 1 else Line(next(iter(curve.values())), 0.0)


# ---- predictions


def scored(record: Record, cell: Cell) -> bool:
    """A cell counts as predicted only where its batch size was kept out of the calibration."""
    return cell[0] not in record["fit_sizes"]


def prediction_errors(trials: Sequence[Trial]) -> tuple[float, float]:
    """(throughput, mean latency): the median over rounds of predicted / measured - 1."""
    throughput = median(trial["predicted"]["tokens_per_s"] / tokens_per_s(trial) - 1 for trial in trials)
    latency = median(trial["predicted"]["mean_latency_s"] / mean_latency_s(trial) - 1 for trial in trials)
    return throughput, latency
