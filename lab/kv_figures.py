"""The figures of the KV cache experiment, from its raw samples. kv_experiment.py says how they are taken.

A trial is one cell (prompt length, kind of cache, attention kernel) in one round: the prefill, and every decode step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from lab import roofline
from lab.fits import Growth, exponent, growth
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


def step_points(record: Record, cache: str, attention: str, rounds: Sequence[int] | None = None) -> dict[int, float]:
    """Context -> the median over the rounds of a decode step there. The first step of a run is left out.

    It is often a slow one (a shape that comes for the first time), and would bend a law at each prompt length.
    """
    found: dict[int, list[float]] = {}
    for trial in record["trials"]:
        if (trial["cache"], trial["attention"]) == (cache, attention) and (rounds is None or trial["round"] in rounds):
            for context, seconds in list(zip(contexts(trial), trial["decode_s"], strict=True))[1:]:
                found.setdefault(context, []).append(seconds)
    return {context: median(found[context]) for context in sorted(found)}


def step_growth(record: Record, cache: str, attention: str) -> Growth | None:
    """The law by which a decode step grows with its context; None where there are too few contexts."""
    return grown(step_points(record, cache, attention))


def step_exponent(record: Record, cache: str, attention: str) -> tuple[float, float | None]:
    """(p of step ~ context^p, half its 95 % interval over the rounds)."""
    turns = sorted({trial["round"] for trial in record["trials"]})
    each = [step_points(record, cache, attention, [turn]) for turn in turns]
    found = [exponent(list(points), list(points.values())) for points in each if len(points) > 1]
    return mean(found), t_half_width(found) if len(found) > 1 else None


def total_growth(record: Record, cache: str, attention: str) -> Growth | None:
    """The law by which the total time grows with the prompt length."""
    found = {
        cell.prompt_len: median(map(total_s, trials))
        for cell, trials in cells(record).items()
        if (cell.cache, cell.attention) == (cache, attention)
    }
    return grown(found)


def length_growth(record: Record, cell: Cell) -> Growth | None:
    """The law by which the time until the n-th new token grows with n, at one prompt length."""
    trials = cells(record).get(cell, [])
    if not trials:
        return None
    steps = [median(t["decode_s"][i] for t in trials) for i in range(min(len(t["decode_s"]) for t in trials))]
    first = median(trial["prefill_s"] for trial in trials)
    return grown({n + 2: first + math.fsum(steps[: n + 1]) for n in range(len(steps))} | {1: first})


def grown(points: dict[int, float]) -> Growth | None:
    try:
        return growth(list(points), list(points.values()))
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
