"""Tables and sentences of serving the same requests in several ways, from a record."""

from collections.abc import Sequence
from statistics import mean, median

from lab.batch_figures import interval_of_mean
from lab.serving_figures import (
    FIGURES,
    Record,
    Trial,
    compared,
    e2e_s,
    same_answers,
    split_s,
    step_overheads_s,
    tokens_per_s,
    tpot_s,
    ttft_s,
    unaccounted_s,
    waste,
    ways,
)
from lab.verdict import Verdict
from metrics import NONE, certified, ms, number, percentile, span, table


def sections(record: Record) -> list[str]:
    return [ways_table(record), against_table(record), split_table(record)]


def ways_table(record: Record) -> str:
    rows = []
    for name, trials in ways(record).items():
        rates = [tokens_per_s(trial) for trial in trials]
        tpots = pooled(trials, tpot_s)
        wasted = [w for w in map(waste, trials) if w is not None]
        equal, asked = same_answers(record, trials), sum(len(trial["due_s"]) for trial in trials)
        rows.append(
            (
                name,
                number(mean(rates), 1),
                span(interval_of_mean(rates), 1, 1),
                *(number(percentile(pooled(trials, ttft_s), p), 2) for p in (50, 95)),
                ms(median(tpots)) if tpots else NONE,
                *(number(percentile(pooled(trials, e2e_s), p), 2) for p in (50, 95)),
                number(mean(wasted), 0, 100, " %") if wasted else NONE,
                NONE if equal is None else f"{equal} of {asked}",
            )
        )
    columns = [("served by", "left"), ("tokens/s", "right"), ("95 % interval", "right"), ("TTFT p50 (s)", "right"),
               ("p95", "right"), ("TPOT p50 (ms)", "right"), ("E2E p50 (s)", "right"), ("p95", "right"),
               ("computed in vain", "right"), ("same answers", "right")]  # fmt: skip
    count = sum(len(trial["due_s"]) for trial in next(iter(ways(record).values())))
    marks = [f"p{p}" for p in (95,) if not certified(count, p)]
    lines = [
        "New tokens per second over the time from the first due to the last token, mean of the rounds. "
        f"{count} requests in all rounds of a way."
        + (f" So few support no {', '.join(marks)} of other runs." if marks else ""),
        "A way that does not stream hands over whole answers: its TTFT is its E2E. Computed in vain: padding, rows "
        "that had ended, work done twice.",
    ]
    return "### The same requests, served in several ways\n\n" + "\n".join(lines) + "\n\n" + table(columns, rows)


def pooled(trials: Sequence[Trial], of) -> list[float]:
    return [value for trial in trials for value in of(trial)]


def ratio(said: Verdict) -> str:
    """How many times less time, with its interval."""
    if said.ratio is None:
        return said.word
    if said.low is None:
        return f"{said.word} {1 / said.ratio:.2f}"
    return f"{said.word} {1 / said.ratio:.2f} [{1 / said.high:.2f}, {1 / said.low:.2f}]"


def against_table(record: Record) -> str:
    """The engine against every other way: how many times less."""
    ours = record["ours"]
    rows = [
        (name, *(ratio(compared(record, ours, name, figure)) for figure in FIGURES))
        for name in ways(record)
        if name != ours
    ]
    columns = [(f"{ours} against", "left"), *((f"times less {figure}", "left") for figure in FIGURES)]
    return (
        "### How many times less\n\nPaired by round, 95 % intervals. FASTER, SLOWER, WITHIN NOISE or NO VERDICT is "
        "said of the engine.\n\n" + table(columns, rows)
    )


def split_table(record: Record) -> str:
    """The mean request of the engine, by what it waited for."""
    trials = ways(record)[record["ours"]]
    splits = [split_s(trial, i) for trial in trials for i in range(len(trial["due_s"]))]
    total = mean(pooled(trials, e2e_s))
    rows = [
        (name, ms(mean(s[name] for s in splits)), share(mean(s[name] for s in splits), total)) for name in splits[0]
    ]
    rest = [unaccounted_s(trial, i) for trial in trials for i in range(len(trial["due_s"]))]
    rows += [("unaccounted", ms(mean(rest), 2), share(mean(rest), total)), ("E2E", ms(total), "100.0 %")]
    overheads = pooled(trials, step_overheads_s)
    sizes = [step[5] for trial in trials for step in trial["steps"]]
    return (
        "### Where a request's time goes in the engine\n\nMean of all requests. Prefill and decode are the steps that "
        "a request was in, with everybody else's tokens in them.\n\n"
        + table([("part", "left"), ("ms", "right"), ("share", "right")], rows)
        + f"\n\n{len(overheads)} steps of {mean(sizes):.1f} requests on average. Planning a step and delivering its "
        f"tokens takes {ms(median(overheads), 2)} ms (median; greatest {ms(max(overheads), 2)})."
    )


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}".replace("%", " %")


# ---- sentences


def sentences(record: Record) -> list[str]:
    found, ours = ways(record), record["ours"]
    said = []
    for name in found:
        if name == ours:
            continue
        whole, first = (compared(record, ours, name, figure) for figure in ("time for all", "average TTFT"))
        if whole.word == "NO VERDICT":
            said.append(f"Against {name}: no verdict on the time for all ({whole.reason}).")
            continue
        said.append(
            f"Against {name}: all requests are answered in {1 / whole.ratio:.2f} times less time {bounds(whole)} "
            f"({whole.word}); the first token comes {1 / first.ratio:.2f} times sooner on average {bounds(first)} "
            f"({first.word})."
        )
    others = {
        name: sum(len(t["due_s"]) for t in trials) - equal
        for name, trials in found.items()
        if (equal := same_answers(record, trials)) is not None
    }
    different = [f"{name} ({count} other answers)" for name, count in others.items() if count]
    unknown = [name for name in found if name not in others]
    asked = len(record["trials"][0]["due_s"])
    said.append(
        f"{'All ways' if not unknown else 'All ways whose tokens are known'} gave the same tokens to all {asked} "
        "requests."
        if not different
        else f"Not all tokens are those of {record['ways'][0]}: {'; '.join(different)}. Where two tokens "
        "are nearly as likely, the order in which a sum is rounded decides, and 16-bit weights or caches decide sooner."
    )
    said.append(conservation(found[ours]))
    return said


def bounds(said: Verdict) -> str:
    return "" if said.low is None else f"[{1 / said.high:.2f}, {1 / said.low:.2f}]"


def conservation(trials: Sequence[Trial]) -> str:
    worst = max(abs(unaccounted_s(trial, i)) for trial in trials for i in range(len(trial["due_s"])))
    law = "holds" if worst < 2e-3 else "is BROKEN"
    return (
        f"Conservation of time {law}: queue, prefill, decode and the moments between steps add up to what the asker "
        f"saw, to {worst * 1e3:.2f} ms in the worst of the engine's requests."
    )
