"""Day 3's tables, from a record of the KV cache experiment."""

from statistics import mean, median

from lab import kv_figures as figures
from lab.fits import LAWS, Growth
from lab.kv_figures import Cell, Record, cells, compared, interval_of_mean
from lab.kv_ledger import BLOCK
from metrics import NONE, mb, ms, number, span, table

COARSE = 5e6  # bytes: pages and the C library's own share make RssAnon useless below


def sections(record: Record) -> list[str]:
    found = [owners_table(record), against_table(record), law_table(record), ledger_table(record), fit_table(record)]
    found += [probes_table(record)] if "growth" in record else []
    return [*found, *([share_table(record)] if record.get("shares") else [])]


def owners_table(record: Record) -> str:
    """The table of the owner's plan, with first and last step, the bytes held, and what theory allows."""
    found, rows = cells(record), []
    several = len({cell.attention for cell in found}) > 1
    for cell in (Cell(*row) for row in record["cells"]):
        kind = cell.cache + (f", {cell.attention}" if several else "")
        if cell not in found:
            why = record["skipped"].get(cell.name, "not run: interrupted")
            rows.append((cell.prompt_len, kind, *[NONE] * 9, why))
            continue
        trials = found[cell]
        least = figures.least_s(record, cell)
        totals = [trial["total_s"] for trial in trials]
        rows.append(
            (
                cell.prompt_len,
                kind,
                number(mean(totals), 3),
                span(interval_of_mean(totals), 3, 1),
                ms(mean(map(figures.token_s, trials))),
                number(mean(trial["prefill_s"] for trial in trials), 3),
                ms(median(trial["decode_s"][0] for trial in trials)),
                ms(median(trial["decode_s"][-1] for trial in trials)),
                mb(trials[0]["kv_bytes"]),
                took(record, cell),
                f"{least['total']:.3f} ({least['total'] / mean(totals):.0%})" if least else NONE,
                "; ".join(notes(record, cell)),
            )
        )
    columns = [("Prompt Length", "right"), ("KV Cache", "left"), ("Total Time (s)", "right"),
               ("95 % interval", "right"), ("Avg Token Latency (ms)", "right"), ("Prefill Time (s)", "right"),
               ("first step ms", "right"),
               ("last step ms", "right"), ("KV MB", "right"), ("peak MB", "right"), ("roofline s (reached)", "right"),
               ("Notes", "left")]  # fmt: skip
    return (
        f"### KV cache: {record['config']['new_tokens']} new tokens after prompts of these lengths\n\n"
        + table(columns, rows)
        + "\n\nAvg Token Latency: the mean decode step, the prefill not in it. Intervals: Student's t over the rounds. "
        "Roofline: prefill and all steps at the bandwidth and the matrix rate read around each run. Peak: the most "
        f"memory that the warm-up of this cell took, beyond the weights and all else held before "
        f"({'the GPU allocator' if record['model']['device'] == 'cuda' else 'resident memory'})."
    )


def took(record: Record, cell: Cell) -> str:
    size = record["took"].get(cell.name)
    return NONE if size is None else mb(size, 0)


def notes(record: Record, cell: Cell) -> list[str]:
    trials = cells(record)[cell]
    found = [f"{len(trials)} rounds" if len(trials) > 1 else "1 round"]
    if not figures.same_tokens(record, cell.prompt_len):
        found.append("TOKENS DIFFER: void")
    if not all(map(figures.conserved, trials)):
        found.append("conservation of time BROKEN")
    if any(trial["kv_bytes"] != figures.expected_bytes(record, trial) for trial in trials):
        found.append(f"KV is not the formula's {mb(figures.expected_bytes(record, trials[0]))} MB")
    return found


def against_table(record: Record) -> str:
    """Each kind of cache against none, same prompt and kernel."""
    rows = []
    for cell in cells(record):
        base = cell.other("off")
        if cell == base or base not in cells(record):
            continue
        if not figures.same_tokens(record, cell.prompt_len):
            rows.append((cell.prompt_len, cell.cache, NONE, "VOID", NONE, "VOID", "their tokens differ"))
            continue
        whole, step = compared(record, cell, base, figures.total_s), compared(record, cell, base, figures.token_s)
        rows.append((cell.prompt_len, cell.cache, times(whole), whole.word, times(step), step.word, whole.reason))
    columns = [("Prompt Length", "right"), ("KV Cache", "left"), ("total, × faster", "right"), ("verdict", "left"),
               ("step, × faster", "right"), ("verdict", "left"), ("", "left")]  # fmt: skip
    return "### With a cache against without\n\n" + (table(columns, rows) if rows else "One kind of cache only.")


def times(said) -> str:
    """How many times less time: the ratio turned round."""
    if said.ratio is None:
        return NONE
    return f"{1 / said.ratio:.2f}" + ("" if said.low is None else f" [{1 / said.high:.2f}, {1 / said.low:.2f}]")


def law_table(record: Record) -> str:
    """Each law's error on points that it has not seen, for every growth that was looked at."""
    rows = [law_row(what, growth) for what, growth in growths(figures.valid(record))]
    columns = [("what grows, with what", "left"), ("seen from", "right"), ("to", "right"),
               *((f"{name} %", "right") for name in LAWS), ("law (n in tokens, seconds)", "left"),
               ("predicts as well", "left")]  # fmt: skip
    return (
        "### By which law does it grow? (error on held-out points)\n\n" + table(columns, rows) + "\n\n"
        "The law named is the simplest that is not shown to predict worse than the best (t test, 5 %); others of which "
        "that is true stand beside it. Held out in turn: for steps all of one prompt length, else blocks of "
        "neighbours, so that the ends are predicted from the rest."
    )


def growths(record: Record) -> list[tuple[str, Growth | None]]:
    found = []
    for cache, attention in kinds(record):
        kind = f"cache {cache}" + (f", {attention}" if len({a for _, a in kinds(record)}) > 1 else "")
        found.append((f"{kind}: decode step, with context", figures.step_growth(record, cache, attention)))
        found.append((f"{kind}: total, with prompt length", figures.total_growth(record, cache, attention)))
        longest = max(cell.prompt_len for cell in cells(record) if (cell.cache, cell.attention) == (cache, attention))
        growth = figures.length_growth(record, Cell(longest, cache, attention))
        found.append((f"{kind}: total, with new tokens (prompt {longest})", growth))
    return found


def kinds(record: Record) -> list[tuple[str, str]]:
    return list(dict.fromkeys((cell.cache, cell.attention) for cell in cells(record)))


def law_row(what: str, growth: Growth | None) -> tuple:
    if growth is None:
        return (what, NONE, NONE, *[NONE] * len(LAWS), "too few places for a law", "")
    others = ", ".join(name for name in growth.alike if name != growth.law.name)
    span = (f"{end:g}" for end in growth.span)
    return (what, *span, *(error(growth.errors[name]) for name in LAWS), str(growth.law), others)


def error(value: float) -> str:
    return f"{value * 100:,.1f}" if value < 100 else f"{value * 100:.0e}"


def ledger_table(record: Record) -> str:
    """The formula for known shapes, and what grouped queries save."""
    own = record["ledger"]
    rows = [("this model", own["layers"], own["heads"], own["kv_heads"], own["head_dim"], f"{own['token_bytes']:,}",
             mb(own["token_bytes"] * 1000), f"×{own['heads'] / own['kv_heads']:.0f}")]  # fmt: skip
    for shape in own["shapes"]:
        rows.append(
            (shape["name"], shape["layers"], shape["heads"], shape["kv_heads"], shape["head_dim"],
             f"{shape['token_bytes']:,}", mb(shape["token_bytes"] * 1000),
             f"×{shape['if_every_head_had_its_own'] / shape['token_bytes']:.0f}")
        )  # fmt: skip
    columns = [("shape", "left"), ("layers", "right"), ("heads", "right"), ("KV heads", "right"), ("head dim", "right"),
               ("bytes a token", "right"), ("MB for 1,000 tokens", "right"),
               ("saved by sharing heads", "right")]  # fmt: skip
    return (
        f"### KV ledger: 2 × layers × KV heads × head dim × {own['itemsize']} bytes\n\n" + table(columns, rows) + "\n\n"
        "Where KV heads are fewer than heads, several query heads share one (grouped-query attention, "
        "arXiv 2305.13245)."
    )


def fit_table(record: Record) -> str:
    """How many requests fit into what is free now, and where the cache outgrows the weights."""
    own = record["ledger"]
    context = record["model"]["context"]
    rows = [
        (f"{int(n):,}" + ("" if context is None or int(n) <= context else " (over the context)"),
         mb(int(n) * own["token_bytes"]), f"{count:,}")
        for n, count in own["fit"].items()
    ]  # fmt: skip
    columns = [("tokens a request", "right"), ("KV MB each", "right"), ("requests that fit", "right")]
    return (
        f"### How many fit into the {own['free_bytes'] / 1e9:.1f} GB that are free now\n\n"
        + table(columns, rows)
        + "\n\n"
        f"The cache outgrows the weights ({mb(own['weight_bytes'], 0)} MB) at {own['outgrows_at']:,.0f} tokens, all "
        "requests together."
    )


def probes_table(record: Record) -> str:
    """Formula, tensors and the process; the longest for all against blocks."""
    grew, kept, rows = record["growth"], record["reserved"], []
    if grew:
        predicted = grew["tokens"] * record["ledger"]["token_bytes"]
        rows.append((f"{grew['tokens']:,} tokens in {grew['caches']} caches", mb(predicted), mb(grew["tensor_bytes"]),
                     *against(grew["grew_bytes"], predicted), ""))  # fmt: skip
    for key, name in (("maximum", "the longest length for each"), ("blocks", f"blocks of {BLOCK} tokens")):
        if kept:
            empty = 1 - kept["used"] / kept[f"{key}_formula"]
            rows.append((f"{kept['requests']} requests of up to {kept['longest']}: {name}", mb(kept[f"{key}_formula"]),
                         NONE, *against(kept[key], kept[f"{key}_formula"]), f"{empty:.0%}"))  # fmt: skip
    columns = [("what is held", "left"), ("formula MB", "right"), ("tensors MB", "right"),
               ("the process grew MB", "right"), ("against the formula", "right"), ("never used", "right")]  # fmt: skip
    resolution = "" if record["model"]["device"] == "cuda" else "; under 5 MB its resolution is too coarse to judge by"
    return (
        "### Formula against memory\n\n"
        + (table(columns, rows) if rows else "Too little memory is free for it.")
        + "\n\nGrowth: the GPU allocator's count, or on a CPU anonymous resident memory (RssAnon, whole pages of 4 KiB"
        f"{resolution}). The requests need a quarter of the longest length to all of it, evenly spread; a cache in "
        "blocks leaves empty only the rest of each last block."
    )


def against(grew: int, predicted: int) -> tuple[str, str]:
    """(MB, how far off) of what the process grew by; too small a growth is not judged."""
    return mb(grew), f"{grew / predicted - 1:+.1%}" if predicted > COARSE else NONE


def share_table(record: Record) -> str:
    """Attention's own operators against everything, by context."""
    rows = [
        (
            f"{row['tokens']:,}",
            *(NONE if row[key] is None else f"{row[key]:.1%}" for key in ("prefill", "decode", "copying")),
        )
        for row in record["shares"]
    ]
    columns = [("context", "right"), ("of a prefill", "right"), ("of a decode step", "right"),
               ("copying, of a decode step", "right")]  # fmt: skip
    return (
        f"### Attention's share ({record['config']['attention'].split(',')[0]})\n\n" + table(columns, rows) + "\n\n"
        "Scores, softmax and weighted sum, without the projections, by the profiler's operators. Copying: every cat, "
        "copy and clone, among them the cache that is copied to grow and keys that are repeated for grouped heads."
    )
