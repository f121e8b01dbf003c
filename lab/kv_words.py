"""Day 3's answers in plain sentences, and the warnings that belong beside them, from a record of the experiment."""

from statistics import mean

from lab import kv_figures as figures
from lab import roofline
from lab.fits import Growth
from lab.kv_figures import Cell, Record, cells, compared
from lab.kv_tables import kinds, times
from lab.verdict import FEWEST_ROUNDS, steady_rounds
from metrics import ms

TURNS, TURN_TOKENS = 10, 50  # a chat: so many turns, with so many tokens asked and answered in each


def sentences(record: Record) -> list[str]:
    """The answers to Day 3's question, from these numbers alone. Prompts whose tokens differ have no say."""
    record = figures.valid(record)
    if not record["trials"]:
        return ["No prompt gave the same tokens in every way, so nothing can be said."]
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
        without, with_it = (short(mean(map(figures.total_s, found[cell]))) for cell in (off, on))
        lines.append(f"prompt {on.prompt_len}: {with_it} s instead of {without}, ×{times(said)} {said.word}")
    if not lines:
        return ["Cache on and off were not both measured, so nothing can be said of what it saves."]
    return [f"When does the cache save you? {record['config']['new_tokens']} new tokens take {'; '.join(lines)}."]


def laws(record: Record) -> list[str]:
    lines = []
    for cache, attention in kinds(record):
        growth = figures.step_growth(record, cache, attention)
        what = "Without a cache" if cache == "off" else f"With the {cache} cache"
        what += f" ({attention})" if len({a for _, a in kinds(record)}) > 1 else ""
        if growth is None:
            lines.append(f"{what}: too few contexts for a law of growth.")
            continue
        over = f"over contexts of {growth.span[0]:g} to {growth.span[1]:g} tokens"
        if growth.law.name == "constant":
            seen = f"no growth is seen{slope(record, cache, attention)}"
            lines.append(f"{what} a decode step takes {ms(growth.law(0))} ms {over}: {seen}.")
            continue
        article = "an" if growth.law.name == "exponential" else "a"
        lines.append(
            f"{what} a decode step grows by {article} {growth.law.name} law {over}: {growth.law} seconds"
            f"{power(record, cache, attention)}. {rejected(growth)}"
        )
    return lines


def power(record: Record, cache: str, attention: str) -> str:
    """The growth as one power of the context, for those who ask "linear or quadratic?"."""
    p, half = figures.step_exponent(record, cache, attention)
    return f"; as one power of the context, n^{p:.2f}" + ("" if half is None else f" ± {max(half, 0.01):.2f} (rounds)")


def slope(record: Record, cache: str, attention: str) -> str:
    """By how much a step may grow all the same."""
    each, half = figures.step_slope(record, cache, attention)
    return "" if half is None else f" ({1e6 * each:+.1f} ± {1e6 * half:.1f} ms for 1,000 tokens, by rounds)"


def rejected(growth: Growth) -> str:
    """What the held-out points say of the exponential, which the plan expected."""
    if growth.law.name == "exponential":
        return "Over this range it is exponential."
    if "exponential" in growth.alike:
        return "An exponential is not rejected: over this range it predicts about as well."
    ratio = growth.errors["exponential"] / growth.errors[growth.law.name]
    many = "over 100" if ratio > 100 else f"{ratio:.1f}"
    return f"Exponential growth is rejected: its error on prompts it has not seen is {many} times as large."


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
    low, high = laws[0].span
    beyond = f"; measured: {low:g} to {high:g}" if reach > high or low > TURN_TOKENS else ""
    return [
        f"A chat of {TURNS} turns ({TURN_TOKENS} tokens asked and {TURN_TOKENS} answered in each, up to {reach} tokens "
        f"of context{beyond}) spends {short(costs[0])} s on its decode steps with the cache and {short(costs[1])} s "
        "without it, by the fitted laws."
    ]


def eaten(record: Record) -> list[str]:
    own = record["ledger"]
    fit = ", ".join(f"{count:,} requests of {int(n):,} tokens" for n, count in own["fit"].items())
    return [
        f"When does it eat your memory? {own['token_bytes']:,} bytes a token: the cache outgrows the weights "
        f"({short(own['weight_bytes'] / 1e6)} MB) at {own['outgrows_at']:,.0f} tokens over all requests. Into the "
        f"{own['free_bytes'] / 1e9:.1f} GB free here fit {fit}, and each step then reads all of it."
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
        known = None not in (low["decode"], high["decode"])
        steps = f", and {low['decode']:.1%} and {high['decode']:.1%} of a decode step" if known else ""
        lines.append(
            f"Why FlashAttention exists: at {low['tokens']} and {high['tokens']} tokens attention proper is "
            f"{low['prefill']:.1%} and {high['prefill']:.1%} of a prefill{steps}. Its work in a prefill grows with the "
            "square of the length, everything else with the length; written plainly, so does the memory of its scores."
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
        what = f"{rounds} rounds decide large differences only" if rounds > 2 else "1 or 2 rounds decide nothing"
        found.append(f"{what}: use --rounds {FEWEST_ROUNDS} before quoting.")
    if any(trial["kv_bytes"] != figures.expected_bytes(record, trial) for trial in trials):
        found.append(
            "the cache's tensors are not what the formula says (a sliding window?): the ledger is an upper bound."
        )
    for cell, why in record["skipped"].items():
        found.append(f"{cell}: {why}.")
    reached = {}
    for cell, mine in cells(record).items():
        least = figures.least_s(record, cell)
        if least:
            reached[cell.name] = least["total"] / mean(map(figures.total_s, mine))
    found.append(roofline.impossible(reached))
    anchors = [trial["anchor_s"] for trial in trials]
    off = len(anchors) - len(steady_rounds(anchors))
    if off:
        found.append(
            f"{off} of {len(trials)} trials met a machine more than 15 % off its usual speed: it was disturbed. Close "
            f"other programs and try --rounds {2 * rounds}."
        )
    return [warning for warning in found if warning]


def short(value: float) -> str:
    """Three digits: seconds of a chat and of a tiny model alike."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
