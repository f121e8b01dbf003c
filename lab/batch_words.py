"""Day 2's answers in plain sentences, and the warnings that belong beside them, from a record of a batching sweep."""

from collections.abc import Callable
from statistics import mean, median

from lab import roofline
from lab.batch_figures import (
    LITTLE_SHARE,
    Cell,
    Record,
    Trial,
    baseline,
    cells,
    compared,
    conserved,
    full_batches,
    latencies_s,
    little_off,
    makespan_s,
    mean_latency_s,
    measured_steps,
    prediction_errors,
    same_tokens,
    scored,
    tokens_conserved,
    tokens_per_s,
)
from lab.verdict import FEWEST_ROUNDS, Verdict, steady_rounds
from metrics import ms

CHAT_LIMIT = 1.5  # whoever shares a full batch shall not wait much longer than one who has the machine alone
THROUGHPUT_ERROR, LATENCY_ERROR = 0.10, 0.15
DECIDED = ("FASTER", "SLOWER")


def sentences(record: Record) -> list[str]:
    """The answers to Day 2's question, from these numbers alone."""
    if len(cells(record)) < 2:
        return ["Only one cell was measured: there is nothing to compare it with.", *break_even(record)]
    return [*bought(record), *windows(record), *sweet_spots(record), *break_even(record), *predictions(record),
            *undecided(record)]  # fmt: skip


def name(cell: Cell) -> str:
    return f"batch {cell[0]}, window {cell[1]:g} ms"


def as_ratio(said: Verdict, rate: bool = False) -> str:
    """The ratio of times with its interval; rate: turned into one of rates."""
    if said.ratio is None:
        return "?"
    ends = (said.ratio, said.low, said.high)
    middle, low, high = (1 / ends[0], said.high and 1 / said.high, said.low and 1 / said.low) if rate else ends
    return f"{middle:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


# ---- what is bought, and who pays


def bought(record: Record) -> list[str]:
    """What the cell with the most throughput gives against the smallest batch, and which requests pay for it."""
    found = cells(record)
    best = max(found, key=lambda cell: median(map(tokens_per_s, found[cell])))
    base = baseline(record, best)
    if len({size for size, _ in found}) == 1:
        return []
    if best == base or base not in found:
        return ["No cell has more throughput than the smallest batch: nothing is bought here."]
    whole, latency = compared(record, best, base, makespan_s), compared(record, best, base, mean_latency_s)
    rates = [median(map(tokens_per_s, found[cell])) for cell in (best, base)]
    waits = [median(map(mean_latency_s, found[cell])) for cell in (base, best)]
    ask = "What is bought?" if whole.word == "FASTER" else "What is bought? Nothing that these rounds can show:"
    return [
        f"{ask} {name(best).capitalize()} delivers {rates[0]:.1f} tokens/s, batch {base[0]} {rates[1]:.1f}: throughput "
        f"×{as_ratio(whole, rate=True)}, {whole.word}. The average latency, queue included, is ×{as_ratio(latency)}, "
        f"{latency.word} (from {waits[0]:.2f} to {waits[1]:.2f} s).",
        who_pays(record, best, base),
    ]


def who_pays(record: Record, best: Cell, base: Cell) -> str:
    """The requests, by order of arrival, whose latency differs for sure; and the pace at which tokens come."""
    n = record["config"]["requests"]
    said = [compared(record, best, base, lambda trial, i=i: latencies_s(trial)[i]) for i in range(n)]
    later = [i for i in range(n) if said[i].word == "SLOWER"]
    sooner = [i for i in range(n) if said[i].word == "FASTER"]
    text = (
        f"Who pays? Request by request, against batch {base[0]}: {len(later)} of {n} are answered later, {len(sooner)} "
        f"sooner, {n - len(later) - len(sooner)} undecided."
    )
    if later and record["config"]["arrival"] == "burst" and later == list(range(len(later))):
        text += f" Those who pay stand first in the queue: the first one's latency is ×{as_ratio(said[0])}."
    if sooner:
        text += f" The last one's is ×{as_ratio(said[-1])}, {said[-1].word}."
    pace = compared(record, best, base, decode_step_s)
    if pace.word in DECIDED:
        steps = [median(map(decode_step_s, cells(record)[cell])) for cell in (best, base)]
        text += (
            f" And tokens come at another pace: {ms(steps[0], 0)} ms each instead of {ms(steps[1], 0)} "
            f"(×{as_ratio(pace)}), because a step serves several rows."
        )
    return text


def decode_step_s(trial: Trial) -> float:
    return median(step for batch in trial["batches"] for step in batch["decode_s"])


# ---- the window


def window_pairs(record: Record) -> dict[int, Verdict]:
    """Batch size -> the longest window against the shortest, by average latency."""
    found = cells(record)
    spans = sorted({window for _, window in found})
    sizes = sorted({size for size, _ in found})
    pairs = {size: ((size, spans[-1]), (size, spans[0])) for size in sizes if len(spans) > 1}
    return {size: compared(record, a, b, mean_latency_s) for size, (a, b) in pairs.items() if a in found and b in found}


def windows(record: Record) -> list[str]:
    pairs = window_pairs(record)
    if not pairs:
        return []
    spans = sorted({window for _, window in cells(record)})
    told = "; ".join(f"batch {size} ×{as_ratio(said)} {said.word}" for size, said in pairs.items())
    one = (
        " A batch of one is full at once: no window opens for it, and its ratio shows the noise." if 1 in pairs else ""
    )
    return [f"What does a window of {spans[-1]:g} ms do to the average latency, against {spans[0]:g} ms? {told}.{one}"]


def break_even(record: Record) -> list[str]:
    found = record.get("window")
    if not found:
        return []
    costs = [row for row in found["rows"] if row["rate"] <= (found["cannot_pay_below"] or 0)]
    text = (
        f"When does a window of {found['window_ms']:g} ms pay (batch {found['size']}, Poisson, simulated from c(b))? "
    )
    if costs:
        text += (
            f"Up to {costs[-1]['rate']:.2f} requests/s it cannot: it only delays, by {ms(costs[0]['delay_s'])} ms at "
            f"{costs[0]['rate']:.2f}/s and {ms(costs[-1]['delay_s'])} at {costs[-1]['rate']:.2f}/s. "
        )
    if found["pays_from"] is None:
        text += (
            "At no rate does it lower the average latency for sure: while a worker is busy, requests collect anyway."
        )
    else:
        text += f"It first lowers the average latency for sure at {found['pays_from']:.2f} requests/s."
    if "check" not in found:
        return [text + " (Simulated only; --check-window runs half and twice the rate.)"]
    return [text]


# ---- which batch for what


def sweet_spots(record: Record) -> list[str]:
    """One batch size for each use, by a rule that is said, under the shortest window."""
    found = cells(record)
    window = min(window for _, window in found)
    row = sorted(cell for cell in found if cell[1] == window)
    fewest = min(len(found[cell]) for cell in row)
    if len(row) < 2:
        return []  # nothing to choose from
    if fewest < FEWEST_ROUNDS:
        return [f"Sweet spots for chat, API and offline work are named from {FEWEST_ROUNDS} rounds on."]
    load = record["config"]["arrival"]
    spots = [chat(record, row)] if all(full_batches(trial) for cell in row for trial in found[cell]) else []
    spots.append(chosen(record, row, mean_latency_s, "an API under this load", "the lowest average latency"))
    if load == "burst":
        spots.append(chosen(record, row, makespan_s, "offline work", "the most throughput"))
    return [f"Sweet spots, from this load only ({load}, window {window:g} ms). " + " ".join(spots)]


def chat(record: Record, row: list[Cell]) -> str:
    base, found = row[0], cells(record)
    kept = [base, *(c for c in row[1:] if (compared(record, c, base, service_s).high or 9) <= CHAT_LIMIT)]
    services = ", ".join(f"{cell[0]}: {median(map(service_s, found[cell])):.2f} s" for cell in row)
    return (
        f"Chat: batch {kept[-1][0]}; rule: the largest whose full batch takes, with 95 % confidence, at most "
        f"{CHAT_LIMIT} times as long as batch {base[0]}'s, since that is what those feel who share it ({services})."
    )


def service_s(trial: Trial) -> float:
    """The median time from a full batch's start to its end."""
    return median(batch["finished_s"] - batch["started_s"] for batch in full_batches(trial))


def chosen(record: Record, row: list[Cell], figure: Callable[[Trial], float], use: str, rule: str) -> str:
    """The best cell of a row, if the rounds tell it from all others; the smallest of those that are equal for sure."""
    found = cells(record)
    best = min(row, key=lambda cell: median(map(figure, found[cell])))
    others = {cell: compared(record, best, cell, figure) for cell in row if cell != best}
    evidence = "; ".join(f"against batch {cell[0]} ×{as_ratio(said)} {said.word}" for cell, said in others.items())
    open_ones = [str(cell[0]) for cell, said in others.items() if said.word not in ("FASTER", "WITHIN NOISE")]
    if open_ones:
        pick = f"undecided between batch {best[0]} and {', '.join(open_ones)}"
    else:
        pick = f"batch {min([best, *(cell for cell, said in others.items() if said.word == 'WITHIN NOISE')])[0]}"
    return f"{use[0].upper()}{use[1:]}: {pick}; rule: {rule} ({evidence})."


# ---- predictions


def predictions(record: Record) -> list[str]:
    found = cells(record)
    errors = {cell: prediction_errors(trials) for cell, trials in found.items() if scored(record, cell)}
    if not errors:
        return ["No cell's batch size was kept out of the calibration, so no prediction is scored."]
    off = [cell for cell, e in errors.items() if abs(e[0]) > THROUGHPUT_ERROR or abs(e[1]) > LATENCY_ERROR]
    text = (
        f"Predicted before it was run: of {len(errors)} scored cells {len(errors) - len(off)} are within "
        f"{THROUGHPUT_ERROR:.0%} in throughput and {LATENCY_ERROR:.0%} in average latency."
    )
    return [" ".join([text, *(why_off(record, cell) for cell in off)])]


def why_off(record: Record, cell: Cell) -> str:
    """Predicted against measured, part by part, so that the part that missed is seen."""
    trials = cells(record)[cell]
    throughput, latency = prediction_errors(trials)
    formed = [mean(len(t["batches"]) for t in trials), mean(t["predicted"]["batches"] for t in trials)]
    text = (
        f"{name(cell).capitalize()} is off by {throughput:+.0%} and {latency:+.0%}: it formed {formed[0]:.1f} batches "
        f"(predicted {formed[1]:.1f})"
    )
    full = [batch for trial in trials for batch in full_batches(trial)]
    if full:
        step, prefill = median(step for b in full for step in b["decode_s"]), median(b["prefill_s"] for b in full)
        said = [median(trial["predicted"][part] for trial in trials) for part in ("step_s", "prefill_s")]
        text += (
            f"; a full one's step took {ms(step)} ms (predicted {ms(said[0])}) and its prefill {ms(prefill)} ms "
            f"(predicted {ms(said[1])})"
        )
    return text + "."


# ---- what is left open


def undecided(record: Record) -> list[str]:
    """What these rounds could not tell, and how many more would."""
    fewest = min(len(trials) for trials in cells(record).values())
    if fewest < FEWEST_ROUNDS:
        return [f"Undecided: all but what is decided above; {fewest} rounds show large differences only (use 6)."]
    open_ones = []
    for cell in cells(record):
        base = baseline(record, cell)
        if cell == base or base not in cells(record):
            continue
        for what, figure in (("throughput", makespan_s), ("average latency", mean_latency_s)):
            said = compared(record, cell, base, figure)
            if said.word == "NO VERDICT":
                open_ones.append(f"{what} of {name(cell)} against batch {base[0]} ({said.reason})")
    for size, said in window_pairs(record).items():
        if said.word == "NO VERDICT":
            open_ones.append(f"the window at batch {size} ({said.reason})")
    return [f"Undecided: {'; '.join(open_ones) or 'nothing'}."]


def warnings(record: Record) -> list[str]:
    """What must be known before these numbers are quoted, each with its remedy."""
    found, rounds = [], record["config"]["rounds"]
    trials = [*record["trials"], *record.get("window", {}).get("check", [])]
    if not all(map(conserved, trials)):
        found.append("conservation of time is broken (see Laws): do not quote these numbers, and report this as a bug.")
    if not all(map(tokens_conserved, trials)):
        found.append(
            "the network computed other positions than requests and padding account for: report this as a bug."
        )
    if any(abs(little_off(trial)) > LITTLE_SHARE for trial in trials):
        found.append("Little's law is off by more than 5 % in a trial (see Laws): its window or its stamps are wrong.")
    if not same_tokens(record, trials):
        found.append("a batch gave other tokens than a request alone: its speed-up is void. Try --dtype float32.")
    if rounds < FEWEST_ROUNDS:
        found.append(f"{rounds} rounds support no verdict: use --rounds {FEWEST_ROUNDS} or more before quoting.")
    found.append(roofline.impossible(shares_of_roofline(record)))
    anchors = [trial["anchor_s"] for trial in trials]
    off = len(anchors) - len(steady_rounds(anchors))
    if off:
        found.append(
            f"{off} of {len(trials)} trials met a machine more than 15 % off its usual speed: it was disturbed. Close "
            f"other programs and try --rounds {2 * rounds}."
        )
    return [warning for warning in found if warning]


def shares_of_roofline(record: Record) -> dict[str, float]:
    """How near a step of so many rows came to the least time that this machine allows."""
    rate = record["ceilings"]["flops_per_s"].get(record["model"]["dtype"])
    bandwidth = max(trial["bytes_per_s"] for trial in record["trials"])
    found = {}
    for rows, steps in measured_steps(record).items():
        work = record["floors"].get(str(rows))
        if work and rate:
            least = roofline.floor(work["flops"], work["read_bytes"], rate, bandwidth).least_s
            found[f"a step of {rows} rows"] = least / median(steps)
    return found
