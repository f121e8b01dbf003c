"""The figures of serving the same requests in several ways, from raw moments. experiments/ways.py takes them.

A trial is one way in one round. For every request: when it was due, when it began to be computed, when its asker had
each token. Seconds from the first due. Definitions: TTFT = first token - due; TPOT = (last - first) / (tokens - 1);
E2E = last token - due; ITL = the gaps between tokens.
"""

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from lab.verdict import Verdict, verdict

Trial = dict[str, Any]
Record = dict[str, Any]


def ways(record: Record) -> dict[str, list[Trial]]:
    """Every way with its trials by round."""
    found: dict[str, list[Trial]] = {name: [] for name in record["ways"]}
    for trial in sorted(record["trials"], key=lambda one: one["round"]):
        found[trial["way"]].append(trial)
    return {name: trials for name, trials in found.items() if trials}


def ttft_s(trial: Trial) -> list[float]:
    return [tokens[0] - due for tokens, due in zip(trial["token_s"], trial["due_s"], strict=True)]


def e2e_s(trial: Trial) -> list[float]:
    return [done - due for done, due in zip(trial["done_s"], trial["due_s"], strict=True)]


def tpot_s(trial: Trial) -> list[float]:
    """Of the requests whose tokens came one by one; none where the whole answer came at once."""
    if not trial.get("streamed", True):
        return []
    return [(tokens[-1] - tokens[0]) / (len(tokens) - 1) for tokens in trial["token_s"] if len(tokens) > 1]


def itl_s(trial: Trial) -> list[float]:
    return [after - before for tokens in trial["token_s"] for before, after in pairwise(tokens)]


def makespan_s(trial: Trial) -> float:
    return max(trial["done_s"]) - min(trial["due_s"])


def tokens_per_s(trial: Trial) -> float:
    return trial["new_tokens"] / makespan_s(trial)


def same_answers(record: Record, trials: Sequence[Trial]) -> int | None:
    """Requests, over all rounds, whose tokens are those of the first way; None where the tokens are not known."""
    if any(trial["answers"] is None for trial in trials):
        return None
    wanted = ways(record)[record["ways"][0]][0]["answers"]
    return sum(a == b for trial in trials for a, b in zip(trial["answers"], wanted, strict=True))


def waste(trial: Trial) -> float | None:
    """Computed positions that nobody needed (padding, rows that had ended, work done twice), as a share of all."""
    computed = trial["computed_positions"]
    return None if computed is None else 1 - trial["useful_positions"] / computed


FIGURES = {
    "time for all": makespan_s,
    "average TTFT": lambda trial: mean(ttft_s(trial)),
    "average E2E": lambda trial: mean(e2e_s(trial)),
}


def compared(record: Record, name: str, other: str, figure: str) -> Verdict:
    """Way `name` against way `other` in one of FIGURES, paired by round."""
    found, of = ways(record), FIGURES[figure]
    mine = {trial["round"]: of(trial) for trial in found[name]}
    theirs = {trial["round"]: of(trial) for trial in found[other]}
    rounds = sorted(mine.keys() & theirs.keys())
    return verdict([mine[r] for r in rounds], [theirs[r] for r in rounds])


# ---- where a request's time goes in the engine


def split_s(trial: Trial, i: int) -> dict[str, float]:
    """Request i of an engine's trial: queue, prefill, decode, and the moments between its steps. They add up to E2E."""
    line, due = trial["timelines"][i], trial["due_s"][i]
    first = trial["token_s"][i][0]
    slices = line["slices"]
    prefill = sum(end - start for start, end, _ in slices if start < first)
    decode = sum(end - start for start, end, _ in slices if start >= first)
    between = sum(after[0] - before[1] for before, after in pairwise(slices))
    return {
        "sent late": line["arrived_s"] - due,
        "queue": slices[0][0] - line["arrived_s"],
        "prefill": prefill,
        "decode": decode,
        "between steps": between,
    }


def unaccounted_s(trial: Trial, i: int) -> float:
    """What is missing between the parts and the E2E that the asker saw: delivery, and nothing else."""
    return e2e_s(trial)[i] - sum(split_s(trial, i).values())


def step_overheads_s(trial: Trial) -> list[float]:
    """Seconds of each step outside the forward pass: planning and delivering."""
    return [(planned - start) + (end - computed) for start, planned, computed, end, *_ in trial["steps"]]
