"""The waits of a service with slots, from what its steps were measured to take: for loads that were not tried.

Continuous batching in its barest form: each step gives every answer in a slot one token and takes as long as it takes
for so many; prompts of those who come in are computed in the same step, at the rate of prefill. Whoever finds all slots
and all places taken is refused.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lab.arrivals import schedule
from metrics import percentile

ARRIVALS = 4000
HALVINGS = 12


@dataclass(frozen=True)
class Model:
    """alone_s, together_s: a step with one answer, and with all slots taken. new: tokens of an answer."""

    slots: int
    queue: int
    alone_s: float
    together_s: float
    prefill_tokens_s: float
    prompt: int
    new: int

    @classmethod
    def of(cls, capacity: dict, prompt: int, new: int) -> "Model":
        """capacity: what /capacity says."""
        slots = capacity["slots"]
        return cls(slots, capacity["queue"], 1 / capacity["decode_tokens_per_s_alone"],
                   slots / capacity["decode_tokens_per_s"], capacity["prefill_tokens_per_s"], prompt, new)  # fmt: skip

    def step_s(self, answers: int, coming: int) -> float:
        """A step with so many answers in it, of which so many bring their prompt."""
        each_s = (self.together_s - self.alone_s) / max(self.slots - 1, 1)
        return self.alone_s + each_s * (answers - 1) + coming * self.prompt / self.prefill_tokens_s

    @property
    def least_s(self) -> float:
        """What an answer takes in an empty house."""
        return self.step_s(1, 1) + (self.new - 1) * self.alone_s


def waits(model: Model, dues_s: Sequence[float]) -> list[float | None]:
    """From due to the last token, of each; None: refused."""
    found: list[float | None] = [None] * len(dues_s)
    coming, waiting, running, now_s = deque(range(len(dues_s))), deque(), {}, 0.0
    while coming or waiting or running:
        if not waiting and not running:
            now_s = max(now_s, dues_s[coming[0]])
        while coming and dues_s[coming[0]] <= now_s:
            one = coming.popleft()
            if len(waiting) + len(running) < model.slots + model.queue:
                waiting.append(one)
        fresh = [waiting.popleft() for _ in range(min(model.slots - len(running), len(waiting)))]
        running |= dict.fromkeys(fresh, model.new)
        now_s += model.step_s(len(running), len(fresh))
        for one in list(running):
            running[one] -= 1
            if not running[one]:
                del running[one]
                found[one] = now_s - dues_s[one]
    return found


def foretold(model: Model, rate: float, p: float, seed: int = 0) -> float:
    """The p-th percentile of the time of whole answers at this rate."""
    found = waits(model, schedule("poisson", ARRIVALS, rate, seed))
    return percentile([one for one in found if one is not None], p)


def rate_for(model: Model, p: float, limit_s: float, most: float, seed: int = 0) -> float:
    """The largest rate, up to most, at which the p-th percentile keeps the limit; 0: not even a single request does."""
    if model.least_s >= limit_s:
        return 0.0
    kept, missed = 0.0, most
    if foretold(model, most, p, seed) < limit_s:
        return most
    for _ in range(HALVINGS):
        middle = (kept + missed) / 2
        kept, missed = (middle, missed) if foretold(model, middle, p, seed) < limit_s else (kept, middle)
    return kept
