"""What a batching policy would do, without running the model: the real batcher on a clock that only jumps.

The batcher that is simulated is the one that is measured: it is handed in. Only two things are replaced: its clock, and
generate(), which here takes as long as a cost model says. Arrivals go on while a batch "runs", as they do in truth.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Cost:
    """What a batch costs, from a few measured points; straight lines between them.

    step_s: rows -> seconds of one decode step. prefill_s: positions, padding included -> seconds of one prefill.
    """

    step_s: dict[int, float]
    prefill_s: dict[int, float]
    new_tokens: int

    def step(self, rows: float) -> float:
        return between(self.step_s, rows)

    def prefill(self, positions: float) -> float:
        # A prefill of one position is a decode step: the least that any pass takes.
        return between({1: self.step(1), **self.prefill_s}, positions)

    def service_s(self, lengths: Sequence[int]) -> float:
        """Seconds from a batch's start to its end, for prompts of these lengths."""
        return self.prefill(len(lengths) * max(lengths)) + (self.new_tokens - 1) * self.step(len(lengths))


def between(points: dict[int, float], x: float) -> float:
    xs = sorted(points)
    return float(np.interp(x, xs, [points[key] for key in xs]))


class JumpingClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def simulate(
    make_batcher: Callable[[Callable, Callable[[], float]], Any],
    dues_s: Sequence[float],
    lengths: Sequence[int],
    service_s: Callable[[Sequence[int]], float],
) -> list[float]:
    """The moment at which each request is answered.

    make_batcher(generate, clock) -> a batcher without a thread. dues_s: arrival times, ascending. lengths: in tokens.
    """
    clock, done = JumpingClock(), [0.0] * len(dues_s)
    coming = deque(range(len(dues_s)))

    def pass_until(moment: float) -> None:
        while coming and dues_s[coming[0]] <= moment:
            arrive(coming.popleft())
        clock.now = max(clock.now, moment)

    def arrive(i: int) -> None:
        clock.now = max(clock.now, dues_s[i])
        batcher.submit(i).add_done_callback(lambda _: done.__setitem__(i, clock.now))

    def generate(batch: list[int]) -> list[int]:
        pass_until(clock.now + service_s([lengths[i] for i in batch]))
        return batch

    batcher = make_batcher(generate, clock)
    while coming or batcher.waiting:
        leaves_at = batcher.leaves_at()
        next_arrival = dues_s[coming[0]] if coming else math.inf
        if leaves_at is None or next_arrival <= leaves_at:
            pass_until(next_arrival)
        else:
            pass_until(leaves_at)
            batcher.run_next()
    return done
