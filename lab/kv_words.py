"""Day 3's answers in plain sentences, and the warnings that belong beside them, from a record of the experiment."""

from statistics import median

from lab import kv_figures as figures
from lab import roofline
from lab.fits import Growth
from lab.kv_figures import Cell, Record, cells, compared
from lab.kv_tables import kinds, times
from lab.verdict import FEWEST_ROUNDS, steady_rounds
from metrics import mb, ms

TURNS, TURN_TOKENS = 10, 50  # a chat: so many turns, with so many tokens asked and answered in each


def sentences(record: Record) -> list[str]:
    """The answers to Day 3's question, from these numbers alone."""
    return [*saved(record), *laws(record), *break_even(record), *chat(record), *eaten(record), *shares(record)]


def pairs(record: Record) -> list[tuple[Cell, Cell]]:
    """(with a growing cache, without one) for each prompt length that has both, with the first kernel."""
    found = cells(record)
    kernel = next(iter(found)).attention
    on = [cell for cell in found if cell.cache != "off" and cell.attention == kernel]
    first = on[0].cache if on else ""
    return [(cell, cell.other("off")) for cell in on if cell.cache == first and cell.other("off") in found]


def saved(record: Record) -> list[str]:
    found, lines = cells(record), []
    for on, off in pairs(record):
        said = compared(record, on, off, figures.total_s)
        seconds = [median(map(figures.total_s, found[cell])) for cell in (off, on)]
        lines.append(
            f"prompt {on.prompt_len}: {seconds[1]:.2f} s instead of {seconds[0]:.2f}, ×{times(said)} {said.word}"
        )
    if not lines:
        return ["Cache on and off were not both measured, so nothing can be said of what it saves."]
    return [f"When does the cache save you? {record['config']['new_tokens']} new tokens take {'; '.join(lines)}."]


def laws(record: Record) -> list[str]:
    lines = []
    for cache, attention in kinds(record):
        growth = figures.step_growth(record, cache, attention)
        if growth is None:
            lines.append(f"Cache {cache}: too few contexts for a law of growth.")
            continue
        what = "Without a cache" if cache == "off" else f"With the {cache} cache"
        what += f" ({attention})" if len({a for _, a in kinds(record)}) > 1 else ""
        over = f"over contexts of {growth.span[0]:g} to {growth.span[1]:g} tokens"
        if growth.law.name == "constant":
            lines.append(
                f"{what} a decode step takes {ms(growth.law(0))} ms {over}: no growth is told from the "
                f"scatter of {growth.errors['constant']:.0%}, so no other law is named."
            )
            continue
        p, half = figures.step_exponent(record, cache, attention)
        uncertain = "" if half is None else f" ± {half:.2f}"
        lines.append(
            f"{what} a decode step grows by a {growth.law.name} law {over}: {growth.law} seconds; as one power of the "
            f"context, n^{p:.2f}{uncertain}. {rejected(growth)}"
        )
    return lines


def rejected(growth: Growth) -> str:
    """What the held-out points say of the exponential, which the plan expected."""
    if growth.law.name == "exponential":
        return "It is exponential over this range."
    ratio = growth.errors["exponential"] / growth.errors[growth.law.name]
    if ratio > 1.5:
        return f"Exponential growth is rejected: its error on points it has not seen is {ratio:.1f} times as large."
    return "Over this range an exponential predicts about as well: the range is too narrow, or the growth too small."


def break_even(record: Record) -> list[str]:
    """The context from which a step with the cache is the cheaper one, by the fitted laws."""
    found = pairs(record)
    if not found:
        return []
    on, off = (figures.step_growth(record, found[0][i].cache, found[0][i].attention) for i in (0, 1))
    if on is None or off is None:
        return []
    low, high = int(off.span[0]), int(off.span[1])
    if off.law(low) > on.law(low):
        return [
            f"Break-even: at the shortest context measured, {low} tokens, a step without the cache takes "
            f"{ms(off.law(low))} ms and one with it {ms(on.law(low))}: if there is a break-even, it lies below."
        ]
    at = next((n for n in range(low, high + 1) if off.law(n) > on.law(n)), None)
    return [
        f"Break-even: a step with the cache is cheaper from a context of about {at} tokens on, by the fitted laws."
        if at
        else f"Break-even: up to {high} tokens a step with the cache was not the cheaper one."
    ]


def chat(record: Record) -> list[str]:
    """What a chat of some turns costs without a cache, from the fitted laws."""
    found = pairs(record)
    laws = [figures.step_growth(record, found[0][i].cache, found[0][i].attention) for i in (0, 1)] if found else []
    if not laws or None in laws:
        return []
    costs = []
    for growth in laws:
        contexts = [turn * 2 * TURN_TOKENS + TURN_TOKENS + i for turn in range(TURNS) for i in range(TURN_TOKENS)]
        costs.append(sum(growth.law(n) for n in contexts))
    reach = TURNS * 2 * TURN_TOKENS
    beyond = f", extrapolated beyond {laws[0].span[1]:g}" if reach > laws[0].span[1] else ""
    return [
        f"A chat of {TURNS} turns ({TURN_TOKENS} tokens asked and {TURN_TOKENS} answered in each, up to {reach} tokens "
        f"of context{beyond}) spends {costs[0]:.0f} s on its decode steps with the cache and {costs[1]:.0f} s without "
        "it, by the fitted laws."
    ]


def eaten(record: Record) -> list[str]:
    own = record["ledger"]
    fit = ", ".join(f"{count:,} of {int(n):,} tokens" for n, count in own["fit"].items())
    return [
        f"When does it eat your memory? {own['token_bytes']:,} bytes a token: the cache outgrows the weights "
        f"({mb(own['weight_bytes'], 0)} MB) at {own['outgrows_at']:,.0f} tokens over all requests. Into the "
        f"{own['free_bytes'] / 1e9:.1f} GB free here fit {fit}."
    ]


def shares(record: Record) -> list[str]:
    lines = []
    if record.get("reserved"):
        kept = record["reserved"]
        empty = [1 - kept["used"] / kept[f"{name}_formula"] for name in ("maximum", "blocks")]
        lines.append(
            f"Why paged KV exists: reserving the longest length for each of {kept['requests']} requests leaves "
            f"{empty[0]:.0%} of the memory empty, blocks of 16 tokens {empty[1]:.0%}."
        )
    if record.get("shares") and len(record["shares"]) > 1:
        low, high = record["shares"][0], record["shares"][-1]
        lines.append(
            f"Why FlashAttention exists: from {low['tokens']} to {high['tokens']} tokens, attention proper grows from "
            f"{low['prefill']:.1%} to {high['prefill']:.1%} of a prefill, and from {low['decode']:.1%} to "
            f"{high['decode']:.1%} of a decode step. In a prefill its work grows with the square of the length, and "
            "everything else with the length."
        )
    return lines


def warnings(record: Record) -> list[str]:
    """What must be known before these numbers are quoted, each with its remedy."""
    found, trials, rounds = [], record["trials"], record["config"]["rounds"]
    if not all(map(figures.conserved, trials)):
        found.append(
            "conservation of time is broken (see Notes): do not quote these numbers, and report this as a bug."
        )
    void = sorted({t["prompt_len"] for t in trials if not figures.same_tokens(record, t["prompt_len"])})
    if void:
        found.append(
            f"prompt {', '.join(map(str, void))}: the kinds of cache gave different tokens, so those rows are void. "
            "Try --dtype float32."
        )
    if rounds < FEWEST_ROUNDS:
        found.append(f"{rounds} rounds decide large differences only: use --rounds {FEWEST_ROUNDS} before quoting.")
    for cell, why in record["skipped"].items():
        found.append(f"{cell}: {why}.")
    reached = {}
    for cell, mine in cells(record).items():
        least = figures.least_s(record, cell)
        if least:
            reached[cell.name] = least["total"] / median(map(figures.total_s, mine))
    found.append(roofline.impossible(reached))
    anchors = [trial["anchor_s"] for trial in trials]
    off = len(anchors) - len(steady_rounds(anchors))
    if off:
        found.append(
            f"{off} of {len(trials)} trials met a machine more than 15 % off its usual speed: it was disturbed. Close "
            f"other programs and try --rounds {2 * rounds}."
        )
    return [warning for warning in found if warning]
