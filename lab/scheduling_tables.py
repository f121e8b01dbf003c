"""Tables and sentences of the scheduling experiment, from a record: who waits for whom under which setting."""

from collections.abc import Callable
from itertools import pairwise
from statistics import mean, median

from lab.serving_figures import Record, Trial, e2e_s, tokens_per_s, tpot_s, ttft_s, ways
from lab.serving_tables import pooled, ratio
from lab.verdict import Verdict, verdict
from metrics import ms, number, percentile, table

WHOLE = "whole prompts"


def sections(record: Record) -> list[str]:
    return [budget_table(record), running_table(record)]


# ---- a long prompt among chats: the last request of each trial is the long one


def chat_gaps_s(trial: Trial) -> list[float]:
    """The gaps between tokens of everybody but the long prompt."""
    return [after - before for tokens in trial["token_s"][:-1] for before, after in pairwise(tokens)]


def disturbed(trial: Trial) -> bool:
    """Whether some chat was in the middle of its answer while the long prompt was computed."""
    start, end = trial["timelines"][-1]["slices"][0][0], trial["timelines"][-1]["slices"][-1][1]
    return any(tokens[0] < start and tokens[-1] >= end for tokens in trial["token_s"][:-1])


def worst_gap_s(trial: Trial) -> float:
    return max(chat_gaps_s(trial))


def long_ttft_s(trial: Trial) -> float:
    return ttft_s(trial)[-1]


def against(record: Record, name: str, other: str, of: Callable[[Trial], float]) -> Verdict:
    """Cell `name` against cell `other`, paired by round."""
    found = ways(record)
    mine, theirs = ({trial["round"]: of(trial) for trial in found[cell]} for cell in (name, other))
    rounds = sorted(mine.keys() & theirs.keys())
    return verdict([mine[r] for r in rounds], [theirs[r] for r in rounds])


def budget_cells(record: Record) -> list[str]:
    return [name for name in ways(record) if name.startswith("budget") or name == WHOLE]


def running_cells(record: Record) -> list[str]:
    return [name for name in ways(record) if name.startswith("running")]


def budget_table(record: Record) -> str:
    rows = []
    for name in budget_cells(record):
        trials = ways(record)[name]
        gaps = pooled(trials, chat_gaps_s)
        rows.append(
            (
                name,
                ms(median(gaps)),
                ms(percentile(gaps, 99)),
                ms(median(map(worst_gap_s, trials))),
                "" if name == WHOLE else ratio(against(record, name, WHOLE, worst_gap_s)),
                ms(median(map(long_ttft_s, trials)), 0),
                "" if name == WHOLE else ratio(against(record, name, WHOLE, long_ttft_s)),
                number(mean(map(tokens_per_s, trials)), 1),
            )
        )
    config = record["config"]
    columns = [("max tokens in a step", "left"), ("chats' ITL p50 (ms)", "right"), ("p99", "right"),
               ("longest gap", "right"), ("times shorter than whole", "left"), ("long prompt's TTFT (ms)", "right"),
               ("times sooner than whole", "left"), ("tokens/s", "right")]  # fmt: skip
    return (
        f"### A prompt of {config['long_prompt']} tokens comes while {config['chats']} chats are answered\n\n"
        "ITL: the gap between two tokens of a chat. The longest gap and the TTFT are medians of the rounds.\n\n"
        + table(columns, rows)
    )


def running_table(record: Record) -> str:
    rows = []
    for name in running_cells(record):
        trials = ways(record)[name]
        latencies = pooled(trials, e2e_s)
        rows.append(
            (
                name.removeprefix("running "),
                number(mean(map(tokens_per_s, trials)), 1),
                ms(median(pooled(trials, tpot_s))),
                *(number(percentile(pooled(trials, ttft_s), p), 2) for p in (50, 95)),
                *(number(percentile(latencies, p), 2) for p in (50, 95, 99)),
            )
        )
    columns = [("max running", "right"), ("tokens/s", "right"), ("TPOT p50 (ms)", "right"), ("TTFT p50 (s)", "right"),
               ("p95", "right"), ("E2E p50 (s)", "right"), ("p95", "right"), ("p99", "right")]  # fmt: skip
    count = len(e2e_s(ways(record)[running_cells(record)[0]][0])) * len(ways(record)[running_cells(record)[0]])
    return (
        f"### A burst of {record['config']['requests']} requests\n\n{count} requests in all rounds of a cell: the p99 "
        f"is the slowest {'one' if count <= 100 else f'{count // 100 + 1} of them'}.\n\n" + table(columns, rows)
    )


# ---- sentences


def sentences(record: Record) -> list[str]:
    return [*about_budgets(record), *about_running(record), *same_tokens(record)]


def about_budgets(record: Record) -> list[str]:
    said, found = [], ways(record)
    if not all(map(disturbed, found[WHOLE])):
        return [
            "The chats had ended before the long prompt was computed, so it kept nobody waiting: no verdict on "
            "budgets. Raise --max-new-tokens."
        ]
    whole = median(map(worst_gap_s, found[WHOLE]))
    usual = median(pooled(found[WHOLE], chat_gaps_s))
    said.append(
        f"A prompt of {record['config']['long_prompt']} tokens computed whole keeps every chat waiting for "
        f"{ms(whole, 0)} ms, {whole / usual:.0f} times the usual gap between two tokens."
    )
    for name in budget_cells(record)[:-1]:
        gap, first = against(record, name, WHOLE, worst_gap_s), against(record, name, WHOLE, long_ttft_s)
        if gap.word == "FASTER":
            price = {"SLOWER": f"{first.ratio:.2f} times later", "FASTER": f"{1 / first.ratio:.2f} times sooner"}
            said.append(
                f"With {name.replace('budget', 'at most')} tokens in a step the longest gap is {1 / gap.ratio:.1f} "
                f"times shorter [{1 / gap.high:.1f}, {1 / gap.low:.1f}], and the long prompt's first token comes "
                f"{price.get(first.word, 'at a time that cannot be told apart')}."
            )
        else:
            said.append(f"{name.capitalize()} against whole prompts, longest gap: {gap}.")
    return said


def about_running(record: Record) -> list[str]:
    """From cell to cell, as long as more is delivered."""
    cells = running_cells(record)
    said = []
    for before, after in pairwise(cells):
        change = against(record, after, before, lambda trial: 1 / tokens_per_s(trial))
        slower = against(record, after, before, lambda trial: median(tpot_s(trial)))
        few, many = before.removeprefix("running "), after.removeprefix("running ")
        if change.low is None:
            said.append(f"From {few} to {many} requests at once: {change}.")
            continue
        said.append(
            f"From {few} to {many} requests at once: tokens/s times {1 / change.ratio:.2f} [{1 / change.high:.2f}, "
            f"{1 / change.low:.2f}] ({change.word}), each request's tokens {slower.ratio:.2f} times as far apart."
        )
    return said


def same_tokens(record: Record) -> list[str]:
    for cells in (budget_cells(record), running_cells(record)):
        answers = {tuple(trial["answers"]) for name in cells for trial in ways(record)[name]}
        if len(answers) > 1:
            return ["The settings changed somebody's tokens: that must not be."]
    return ["No setting changed anybody's tokens."]
