"""The figures of the KV cache experiment, from its raw samples. kv_experiment.py says how they are taken.

A trial is one cell (prompt length, kind of cache, attention kernel) in one round: the prefill, and every decode step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean, median
from typing import Any

from lab import roofline
from lab.fits import Growth, exponent, growth, line
from lab.verdict import Verdict, t_half_width, verdict

Trial = dict[str, Any]
Record = dict[str, Any]
LAW_SHARE, LAW_S = 0.02, 1e-3  # conservation of time holds within 2 % or 1 ms


@dataclass(frozen=True)
class Cell:
    """One row of the matrix. cache: off, dynamic or static."""

    prompt_len: int
    cache: str
    attention: str

    @classmethod
    def of(cls, trial: Trial) -> "Cell":
        return cls(trial["prompt_len"], trial["cache"], trial["attention"])

    @property
    def name(self) -> str:
        return f"{self.prompt_len} {self.cache} {self.attention}"

    def as_list(self) -> list:
        return [self.prompt_len, self.cache, self.attention]

    def other(self, cache: str) -> "Cell":
        return Cell(self.prompt_len, cache, self.attention)


def cells(record: Record) -> dict[Cell, list[Trial]]:
    """Every cell that ran, with its trials by round."""
    found: dict[Cell, list[Trial]] = {}
    for trial in sorted(record["trials"], key=lambda t: t["round"]):
        found.setdefault(Cell.of(trial), []).append(trial)
    return {cell: found[cell] for cell in (Cell(*row) for row in record["cells"]) if cell in found}


# ---- one trial


def total_s(trial: Trial) -> float:
    return trial["total_s"]


def token_s(trial: Trial) -> float:
    """Mean decode step: the prefill is not in it."""
    return mean(trial["decode_s"])


def residual_s(trial: Trial) -> float:
    """What the total, which has its own two clock readings, holds beyond prefill and steps."""
    return trial["total_s"] - trial["prefill_s"] - sum(trial["decode_s"])


def conserved(trial: Trial) -> bool:
    return abs(residual_s(trial)) <= max(LAW_SHARE * trial["total_s"], LAW_S)


def same_tokens(record: Record, prompt_len: int) -> bool:
    """Whether all kinds of cache and kernels gave the same tokens for this prompt, in every round."""
    return len({trial["tokens"] for trial in record["trials"] if trial["prompt_len"] == prompt_len}) <= 1


def valid(record: Record) -> Record:
    """The record without the prompts whose tokens differ: no figure, law or sentence may rest on those."""
    return record | {"trials": [t for t in record["trials"] if same_tokens(record, t["prompt_len"])]}


def expected_bytes(record: Record, trial: Trial) -> int:
    """By the formula: a growing cache holds all tokens but the last, which is never read; a fixed one its room."""
    tokens = trial["prompt_len"] + len(trial["decode_s"]) + (trial["cache"] == "static")
    return 0 if trial["cache"] == "off" else tokens * record["ledger"]["token_bytes"]


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """95 %, by Student's t over the rounds; None below two."""
    if len(values) < 2:
        return None
    half = t_half_width(values)
    return mean(values) - half, mean(values) + half


# ---- cells against cells


def compared(record: Record, a: Cell, b: Cell, figure: Callable[[Trial], float]) -> Verdict:
    """Cell a against cell b by a figure in seconds, paired by round; rounds that an interruption split are left out."""
    found = cells(record)
    theirs = {(trial["round"], trial["run"]): trial for trial in found.get(b, [])}
    pairs = [(t, theirs[t["round"], t["run"]]) for t in found.get(a, []) if (t["round"], t["run"]) in theirs]
    return verdict(
        [figure(ours) for ours, _ in pairs],
        [figure(other) for _, other in pairs],
        anchors=[mean(one["anchor_s"] for one in pair) for pair in pairs] or None,
    )


# ---- laws


def contexts(trial: Trial) -> list[int]:
    """Tokens that attention looks at in each decode step: the prompt, and every new token so far."""
    return [trial["prompt_len"] + i + 1 for i in range(len(trial["decode_s"]))]


@dataclass(frozen=True)
class Steps:
    """Decode steps by context, in tokens and seconds; run: the prompt length that each was measured after."""

    context: list[int]
    seconds: list[float]
    run: list[int]


def steps(record: Record, cache: str, attention: str, turn: int | None = None) -> Steps:
    """The median over the rounds (or one round's) of each decode step. The first step of a run is left out.

    It is often a slow one (a shape that comes for the first time), and would bend a law at each prompt length.
    """
    found: dict[tuple[int, int], list[float]] = {}
    for trial in record["trials"]:
        if (trial["cache"], trial["attention"]) == (cache, attention) and turn in (None, trial["round"]):
            for context, seconds in list(zip(contexts(trial), trial["decode_s"], strict=True))[1:]:
                found.setdefault((context, trial["prompt_len"]), []).append(seconds)
    order = sorted(found)
    return Steps([context for context, _ in order], [median(found[key]) for key in order], [run for _, run in order])


def step_growth(record: Record, cache: str, attention: str) -> Growth | None:
    """The law by which a decode step grows with its context; None where there are too few contexts.

    Whole prompt lengths are held out, so that a run in a slow minute cannot vouch for itself.
    """
    found = steps(record, cache, attention)
    return grown(found.context, found.seconds, found.run)


def by_round(record: Record, cache: str, attention: str, figure: Callable[[Steps], float]) -> list[float]:
    """A figure of each round's steps alone; rounds that an interruption left without some prompts are left out."""
    each = [steps(record, cache, attention, turn) for turn in sorted({trial["round"] for trial in record["trials"]})]
    most = max((len(set(found.run)) for found in each), default=0)
    return [figure(found) for found in each if len(set(found.run)) == most and len(found.context) > 1]


def step_exponent(record: Record, cache: str, attention: str) -> tuple[float, float | None]:
    """(p of step ~ context^p, half its 95 % interval over the rounds)."""
    found = by_round(record, cache, attention, lambda one: exponent(one.context, one.seconds))
    return mean(found), t_half_width(found) if len(found) > 1 else None


def step_slope(record: Record, cache: str, attention: str) -> tuple[float, float | None]:
    """(seconds that a step grows by with each token of context, half its 95 % interval over the rounds)."""
    found = by_round(record, cache, attention, lambda one: line(one.context, one.seconds).slope)
    return mean(found), t_half_width(found) if len(found) > 1 else None


def total_growth(record: Record, cache: str, attention: str) -> Growth | None:
    """The law by which the total time grows with the prompt length."""
    found = {
        cell.prompt_len: mean(map(total_s, trials))
        for cell, trials in cells(record).items()
        if (cell.cache, cell.attention) == (cache, attention)
    }
    return grown(list(found), list(found.values()))


def length_growth(record: Record, cell: Cell) -> Growth | None:
    """The law by which the time until the n-th new token grows with n, at one prompt length."""
    trials = cells(record).get(cell, [])
    if not trials:
        return None
    each = [mean(column) for column in zip(*(trial["decode_s"] for trial in trials), strict=True)]
    sums = list(accumulate(each, initial=mean(trial["prefill_s"] for trial in trials)))
    return grown(list(range(1, len(sums) + 1)), sums)


def grown(x: Sequence[float], y: Sequence[float], groups: Sequence[int] | None = None) -> Growth | None:
    try:
        return growth(x, y, groups)
    except ValueError:
        return None


# ---- what theory allows


def least_s(record: Record, cell: Cell) -> dict[str, float] | None:
    """The roofline's least time of a cell: prefill, mean decode step, total. None where the work is not known."""
    work = record["floors"].get(cell.name)
    trials = cells(record)[cell]
    if not work:
        return None
    rate, bandwidth = (median(trial[name] for trial in trials) for name in ("flops_per_s", "bytes_per_s"))
    first = roofline.floor(*work["prefill"], rate, bandwidth).least_s
    steps = [roofline.floor(flops, size, rate, bandwidth).least_s for flops, size in work["steps"]]
    return {"prefill": first, "step": mean(steps), "total": first + math.fsum(steps)}
