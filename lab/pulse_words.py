"""What is said of an overload's pulse: whether it is over soon, which targets hold, and what the others would need."""

from collections.abc import Sequence
from math import isinf
from statistics import median
from typing import Any

from lab import pulse_figures as figures
from lab.pulse_figures import TARGET_S, Request
from lab.pulse_model import Model, foretold, rate_for
from lab.soak_judge import Judged
from lab.verdict import FEWEST_ROUNDS, Verdict, verdict
from metrics import median_interval, ms, number, percentile

Record = dict[str, Any]
TARGETS = (("p50 of whole answers", 50, 0.5), ("p99 of whole answers", 99, 2.0))
AVAILABLE = 0.999
KEPT_UP = 0.9  # of the capacity, during the overload

# ---- how soon it is what it was


def recoveries(record: Record) -> list[float]:
    before = figures.usual(record["rounds"], record["pulse_begin_s"])
    return [
        figures.recovery_s(one["requests"], record["pulse_end_s"], record["round_s"], before)
        for one in record["rounds"]
    ]


def seconds(value: float) -> str:
    return "not in this run" if isinf(value) else number(value)


def recovery(record: Record) -> Judged:
    found = recoveries(record)
    what, limit = "recovery after the pulse", f"within {TARGET_S:g} s"
    told = f"{', '.join(seconds(one) for one in found)} s in {len(found)} rounds"
    interval = median_interval(found)
    if interval is None:
        return Judged(what, limit, f"{told}: {FEWEST_ROUNDS} rounds are needed", None)
    low, high = interval
    holds = True if high <= TARGET_S else False if low > TARGET_S else None
    return Judged(what, limit, f"median {seconds(median(found))} s [{seconds(low)}, {seconds(high)}]: {told}", holds)


def kept_up(record: Record) -> Judged:
    """Goodput in the overload against the capacity."""
    overload = figures.phases(record)[1]
    rates = [figures.goodput(one["requests"], overload) for one in record["rounds"]]
    interval = median_interval(rates)
    share = [rate / record["capacity_per_s"] for rate in (median(rates), *(interval or ()))]
    told = f"{share[0]:.0%}" + (f" [{share[1]:.0%}, {share[2]:.0%}]" if interval else "") + f" (n={len(rates)})"
    holds = None if interval is None else True if share[1] >= KEPT_UP else False if share[2] < KEPT_UP else None
    return Judged("answers a second in the overload", f"≥ {KEPT_UP:.0%} of the capacity", told, holds)


def same_after(record: Record) -> Verdict:
    """The first tokens of the last part of a round against those before the pulse, medians paired by round."""
    before, *_, later = figures.phases(record)
    pairs = []
    for one in record["rounds"]:
        parts = [figures.served(figures.due_in(one["requests"], part.begin_s, part.end_s)) for part in (later, before)]
        if all(parts):
            pairs.append([median(request["ttft"] for request in part) for part in parts])
    return verdict([late for late, _ in pairs], [early for _, early in pairs])


# ---- targets


def steady_requests(record: Record) -> list[Request]:
    """Those due before the pulse, and those due when it should be over: at the steady rate."""
    first, *_, last = figures.phases(record)
    return [
        one for part in record["rounds"] for phase in (first, last)
        for one in figures.due_in(part["requests"], phase.begin_s, phase.end_s)
    ]  # fmt: skip


def targets(record: Record) -> list[Judged]:
    asked = steady_requests(record)
    times = [one["e2e"] for one in figures.served(asked)]
    found = []
    for what, p, limit_s in TARGETS:
        interval = figures.quantile_interval(times, p) if times else None
        measured = f"{ms(percentile(times, p))} ms" if times else "nobody was served"
        if interval is None:
            found.append(Judged(what, f"< {limit_s:g} s", f"{measured}, n={len(times):,}: too few to certify", None))
            continue
        low, high = interval
        holds = True if high < limit_s else False if low > limit_s else None
        found.append(Judged(what, f"< {limit_s:g} s", f"{measured} [{ms(low)}, {ms(high)}], n={len(times):,}", holds))
    return [*found, availability(len(asked) - len(times), len(asked))]


def availability(failed: int, asked: int) -> Judged:
    what, limit = "requests that are served", f"≥ {AVAILABLE:.1%}"
    if not asked:
        return Judged(what, limit, "nobody asked", None)
    low, high = figures.availability_interval(failed, asked)
    holds = True if low >= AVAILABLE else False if high < AVAILABLE else None
    told = f"{1 - failed / asked:.2%} [{low:.2%}, {high:.2%}], {failed} of {asked:,} were not"
    return Judged(what, limit, told, holds)


def judged(record: Record) -> list[Judged]:
    return [recovery(record), kept_up(record), *targets(record)]


# ---- what the missing ones need


def sentences(record: Record, found: Sequence[Judged]) -> list[str]:
    said = [f"{one.what}: {one.word} ({one.limit}): {one.measured}." for one in found]
    said += [
        queue_sentence(record),
        f"Median first token later than ten seconds after, against before: {same_after(record)}.",
    ]
    return said + needs(record, found)


def queue_sentence(record: Record) -> str:
    """The queue that the pulse leaves is worked off by what is left of the capacity: known before anything is run."""
    queue = record["capacity_after"]["queue"] if record["capacity_after"] else None
    spare = record["capacity_per_s"] - record["rate_per_s"]
    if queue is None:
        return "The service does not say how long its queue is."
    return (
        f"Foretold: the {number(spare, 2)} requests/s that the steady load leaves of the capacity work off a full "
        f"queue of {queue} in {number(queue / spare)} s; in {TARGET_S:g} s a queue of {number(TARGET_S * spare, 0)}."
    )


def needs(record: Record, found: Sequence[Judged]) -> list[str]:
    """What every target that is not shown to hold would need: from a simulation, checked where it was measured."""
    if not record["capacity_after"]:
        return []
    run = record["config"]
    model = Model.of(record["capacity_after"], run["prompt_tokens"], run["max_new_tokens"])
    times = [one["e2e"] for one in figures.served(steady_requests(record))]
    said = []
    for (what, p, limit_s), one in zip(TARGETS, found[2:4], strict=True):
        if times:
            told, truth = foretold(model, record["rate_per_s"], p), percentile(times, p)
            said.append(
                f"Simulated with the measured times of a step, {what} at {number(record['rate_per_s'], 2)} requests/s "
                f"is {ms(told)} ms; measured {ms(truth)} ms ({told / truth - 1:+.0%})."
            )
        if one.holds is not True:
            said.append(need(model, what, p, limit_s, record["capacity_per_s"]))
    asked = len(steady_requests(record))
    if found[4].holds is None:
        more = figures.requests_needed(AVAILABLE) - asked
        said.append(f"{AVAILABLE:.1%} served: {max(more, 0):,} more requests without a failure would show it.")
    elif found[4].holds is False:
        said.append(f"{AVAILABLE:.1%} served: not at this rate; the table of refusals says which limits were hit.")
    return said


def need(model: Model, what: str, p: int, limit_s: float, capacity: float) -> str:
    rate = rate_for(model, p, limit_s, capacity)
    wanted = f"{what} < {limit_s:g} s"
    if not rate:
        faster = model.least_s / limit_s
        return f"{wanted}: an answer alone takes {ms(model.least_s)} ms; steps {faster:.1f} times as fast are needed."
    return f"{wanted}: simulated to hold up to {number(rate, 2)} requests/s, {rate / capacity:.0%} of the capacity."
