"""Day 2's answers in plain sentences, and the warnings that belong beside them, from a record of a batching sweep."""

from collections.abc import Callable
from statistics import mean, median

from lab.batch_figures import (
    LITTLE_SHARE,
    Cell,
    Record,
    Trial,
    baseline,
    cells,
    compared,
    conserved,
    latencies_s,
    little_off,
    makespan_s,
    mean_latency_s,
    prediction_errors,
    same_tokens,
    scored,
    step_curve,
    tokens_per_s,
)
from lab.verdict import FEWEST_ROUNDS, Verdict, steady_rounds
from metrics import ms

ONE_NEVER_WAITS = " A batch of one is full at once: under it no window opens, and its ratio shows the noise."
CHAT_LIMIT = 1.5  # a person who chats shall not wait much longer than one who has the machine to themselves
THROUGHPUT_ERROR, LATENCY_ERROR = 0.10, 0.15


def sentences(record: Record) -> list[str]:
    """The answers to Day 2's question, from these numbers alone."""
    found = cells(record)
    if len(found) < 2:
        return ["Only one cell was measured: there is nothing to compare it with."]
    return [*bought(record), *windows(record), *sweet_spots(record), *break_even(record), *predictions(record),
            *undecided(record)]  # fmt: skip


def name(cell: Cell) -> str:
    return f"batch {cell[0]}, window {cell[1]:g} ms"


def bought(record: Record) -> list[str]:
    """What the cell with the most throughput gives against batch 1, and which requests pay for it."""
    found = cells(record)
    best = max(found, key=lambda cell: median(map(tokens_per_s, found[cell])))
    base = baseline(record, best)
    if best == base or base not in found:
        return ["No cell has more throughput than the smallest batch: batching bought nothing here."]
    whole, latency = compared(record, best, base, makespan_s), compared(record, best, base, mean_latency_s)
    rates = [median(map(tokens_per_s, found[cell])) for cell in (best, base)]
    return [
        f"What is bought? {name(best).capitalize()} delivers {rates[0]:.1f} tokens/s, batch {base[0]} {rates[1]:.1f}: "
        f"throughput ×{turned(whole)}, {whole.word}. The average latency, queue included, is ×{shown(latency)}, "
        f"{latency.word} (from {median(map(mean_latency_s, found[base])):.2f} to "
        f"{median(map(mean_latency_s, found[best])):.2f} s).",
        who_pays(record, best, base),
    ]


def who_pays(record: Record, best: Cell, base: Cell) -> str:
    """The requests that are answered later than under the baseline: same request, same round."""
    found = cells(record)
    pairs = [
        (after - before, i)
        for ours, theirs in zip(found[best], found[base], strict=False)
        for i, (after, before) in enumerate(zip(latencies_s(ours), latencies_s(theirs), strict=True))
    ]
    later, sooner = [p for p in pairs if p[0] > 0], [p for p in pairs if p[0] <= 0]
    curve, text = step_curve(record), "Who pays? "
    text += (
        f"{len(later)} of {len(pairs)} requests are answered later than under batch {base[0]}, on average by "
        f"{mean(delay for delay, _ in later):.2f} s: those that would have been served first. "
        if later
        else f"None of {len(pairs)} requests is answered later than under batch {base[0]}. "
    )
    if sooner:
        text += f"{len(sooner)} are answered sooner, on average by {-mean(delay for delay, _ in sooner):.2f} s. "
    first = compared(record, best, base, lambda trial: latencies_s(trial)[0])
    last = compared(record, best, base, lambda trial: latencies_s(trial)[-1])
    text += f"The first request's latency is ×{shown(first)}, {first.word}; the last one's ×{shown(last)}, {last.word}."
    if {best[0], base[0]} <= curve.keys():
        text += (
            f" And everyone's tokens come at a slower pace: {ms(curve[best[0]], 0)} ms each instead of "
            f"{ms(curve[base[0]], 0)}, because a step serves {best[0]} rows."
        )
    return text


def shown(said: Verdict) -> str:
    if said.ratio is None:
        return "?"
    return f"{said.ratio:.2f}" + ("" if said.low is None else f" [{said.low:.2f}, {said.high:.2f}]")


def turned(said: Verdict) -> str:
    """A ratio of times as one of rates."""
    if said.ratio is None:
        return "?"
    return f"{1 / said.ratio:.2f}" + ("" if said.low is None else f" [{1 / said.high:.2f}, {1 / said.low:.2f}]")


def windows(record: Record) -> list[str]:
    """The longest window against the shortest, at each batch size."""
    found, lines = cells(record), []
    spans = sorted({window for _, window in found})
    if len(spans) < 2:
        return []
    for size in sorted({size for size, _ in found}):
        a, b = (size, spans[-1]), (size, spans[0])
        if a in found and b in found:
            said = compared(record, a, b, mean_latency_s)
            lines.append(f"batch {size} ×{shown(said)} {said.word}")
    return [
        f"What does a window of {spans[-1]:g} ms do to the average latency, against {spans[0]:g} ms? "
        f"{'; '.join(lines)}." + (ONE_NEVER_WAITS if min(found)[0] == 1 else "")
    ]


def sweet_spots(record: Record) -> list[str]:
    """One batch size for each use, by a rule that is said, under the shortest window."""
    found = cells(record)
    window = min(window for _, window in found)
    row = sorted(cell for cell in found if cell[1] == window)
    if len(row) < 2:
        return []
    if record["config"]["rounds"] < FEWEST_ROUNDS:
        return [f"Sweet spots for chat, API and offline work are named from {FEWEST_ROUNDS} rounds on."]
    base = row[0]
    kept = [base, *(cell for cell in row[1:] if held(compared(record, cell, base, service_s)))]
    services = {cell: median(map(service_s, found[cell])) for cell in row}
    listed = ", ".join(f"{cell[0]}: {services[cell]:.2f} s" for cell in row)
    return [
        f"Sweet spot for chat: batch {kept[-1][0]}. Rule: the largest whose batch takes, with 95 % confidence, at most "
        f"{CHAT_LIMIT} times as long as batch {base[0]}'s, because that is what a lone visitor feels ({listed}).",
        chosen(record, row, mean_latency_s, "API", "the lowest average latency under this load"),
        chosen(record, row, makespan_s, "offline work", "the most throughput"),
    ]


def held(said: Verdict) -> bool:
    return said.high is not None and said.high <= CHAT_LIMIT


def service_s(trial: Trial) -> float:
    """The median time from a batch's start to its end."""
    return median(batch["finished_s"] - batch["started_s"] for batch in trial["batches"])


def chosen(record: Record, row: list[Cell], figure: Callable[[Trial], float], use: str, rule: str) -> str:
    """The best cell of a row; of those that cannot be told from it, the smallest."""
    found = cells(record)
    best = min(row, key=lambda cell: median(map(figure, found[cell])))
    others = {cell: compared(record, best, cell, figure) for cell in row if cell != best}
    equal = [cell for cell, said in others.items() if said.word != "FASTER"]
    pick = min([best, *equal])
    evidence = "; ".join(f"against batch {cell[0]} ×{shown(said)} {said.word}" for cell, said in others.items())
    text = f"Sweet spot for {use}: batch {pick[0]}. Rule: {rule}. Batch {best[0]} has it ({evidence})"
    return text + (f"; the smallest that cannot be told from it is batch {pick[0]}." if pick != best else ".")


def break_even(record: Record) -> list[str]:
    found = record.get("window")
    if not found:
        return []
    text = (
        f"When does a window of {found['window_ms']:g} ms pay? Below {found['cannot_pay_below']:.2f} requests/s (batch "
        f"{found['size']}, Poisson, simulated from c(b)) it cannot: nobody comes within it, and it only delays. "
    )
    if found["pays_from"] is None:
        text += (
            "At no simulated rate does it lower the average latency: while the worker is busy, requests collect anyway."
        )
    else:
        text += f"It first lowers the average latency at {found['pays_from']:.2f} requests/s."
    if "check" not in found:
        return [text + " (Simulated only: --check-window runs half and twice that rate.)"]
    return [text + " It was run at half and at twice that rate; the table shows both."]


def predictions(record: Record) -> list[str]:
    found = cells(record)
    errors = {cell: prediction_errors(trials) for cell, trials in found.items() if scored(record, cell)}
    if not errors:
        return ["No cell's batch size was kept out of the calibration, so no prediction is scored."]
    off = {cell: e for cell, e in errors.items() if abs(e[0]) > THROUGHPUT_ERROR or abs(e[1]) > LATENCY_ERROR}
    text = (
        f"Predicted before it was run: of {len(errors)} scored cells {len(errors) - len(off)} are within "
        f"{THROUGHPUT_ERROR:.0%} in throughput and {LATENCY_ERROR:.0%} in average latency."
    )
    curve = step_curve(record)
    for cell, (throughput, latency) in off.items():
        neighbours = [b for b in record["fit_sizes"] if b != cell[0]]
        below, above = max(b for b in neighbours if b < cell[0]), min(b for b in neighbours if b > cell[0])
        straight = curve[below] + (curve[above] - curve[below]) * (cell[0] - below) / (above - below)
        text += (
            f" {name(cell).capitalize()} is off by {throughput:+.0%} and {latency:+.0%}: a step of {cell[0]} rows "
            f"takes {ms(curve.get(cell[0]))} ms where the line between {below} and {above} rows says {ms(straight)}."
        )
    return [text]


def undecided(record: Record) -> list[str]:
    """What these rounds could not tell, and how many more would."""
    if record["config"]["rounds"] < FEWEST_ROUNDS:
        return [f"Undecided: everything. Verdicts need {FEWEST_ROUNDS} rounds (--rounds {FEWEST_ROUNDS})."]
    open_ones = []
    for cell in cells(record):
        base = baseline(record, cell)
        if cell == base or base not in cells(record):
            continue
        for what, figure in (("throughput", makespan_s), ("average latency", mean_latency_s)):
            said = compared(record, cell, base, figure)
            if said.word == "NO VERDICT":
                open_ones.append(f"{what} of {name(cell)} ({said.reason})")
    if not open_ones:
        return ["Undecided against the smallest batch: nothing."]
    return [f"Undecided against the smallest batch: {'; '.join(open_ones)}."]


def warnings(record: Record) -> list[str]:
    """What must be known before these numbers are quoted, each with its remedy."""
    found, trials = [], record["trials"]
    rounds = record["config"]["rounds"]
    if not all(map(conserved, trials)):
        found.append("conservation of time is broken (see Laws): do not quote these numbers, and report this as a bug.")
    if any(abs(little_off(trial)) > LITTLE_SHARE for trial in trials):
        found.append("Little's law is off by more than 5 % in a trial (see Laws): its window or its stamps are wrong.")
    if not same_tokens(record, trials):
        found.append("a batch gave other tokens than a request alone: its speed-up is void. Try --dtype float32.")
    if rounds < 6:
        found.append(f"{rounds} rounds support no verdict: use --rounds 6 or more before quoting.")
    anchors = [trial["anchor_s"] for trial in trials]
    off = len(anchors) - len(steady_rounds(anchors))
    if off:
        found.append(
            f"{off} of {len(trials)} trials met a machine more than 15 % off its usual speed: it was disturbed. Close "
            f"other programs and try --rounds {2 * rounds}."
        )
    return found
