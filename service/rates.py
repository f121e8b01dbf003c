"""What a step of the engine costs: measured at the start, and learned from every step since.

Four things cost time: that there is a step at all, each answer in it, each prompt token, and each token of context
whose keys and values are read. Each may have become slower than it was measured, and mostly all have together: a
machine that is busy elsewhere is slower at everything. A Kalman filter knows both (Kalman, Journal of Basic Engineering
82(1), 1960): steps of one kind move all four, steps of different kinds tell them apart.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

PARTS = range(4)  # the step, its answers, its prompt tokens, the context that is read
COMMON, OWN = 0.25, (0.05, 0.1, 0.1, 1.0)  # variances: how far off all, and each, may be (of logarithms)
NOISE = 0.02  # the same of a single step
FORGETTING = 0.002  # of what is known with each step: the machine changes
OUTLIER = 2.0  # standard deviations: a step that took longer still counts as that
SLOWEST = math.log(100)  # and the fastest: what is learned stays within so many times of what was measured
SHORTEST_S = 1e-9  # of a step: a clock may stand still
HALF_LIFE_S = 300.0  # of what was learned, while nothing is computed
CERTAIN = [[COMMON + OWN[i] * (i == j) for j in PARTS] for i in PARTS]  # before the first step


@dataclass
class Rates:
    """Seconds of a step, of each answer in it, prompt tokens a second, seconds for a token of context: as measured.

    A step of several tokens for an answer counts one of them with the answer, and the others as prompt tokens.
    """

    step_s: float
    each_s: float
    prefill_tokens_s: float
    read_s: float = 0.0
    clock: Callable[[], float] = time.perf_counter
    slower: list[float] = field(default_factory=lambda: [0.0 for _ in PARTS])  # logarithms: 0 is as it was measured
    doubt: list[list[float]] = field(default_factory=lambda: [list(row) for row in CERTAIN])  # their covariances
    learned_s: float | None = None  # when

    def costs(self) -> tuple[float, float, float, float]:
        """Seconds, as of now: of a step, an answer, a prompt token, a token of context."""
        lasting = self.lasting(self.clock())
        measured = (self.step_s, self.each_s, 1 / self.prefill_tokens_s, self.read_s)
        return tuple(measured[i] * math.exp(self.slower[i] * lasting) for i in PARTS)

    def lasting(self, now_s: float) -> float:
        """The part of what was learned that still counts: else the slow past of an hour ago would refuse somebody."""
        return 1.0 if self.learned_s is None else 0.5 ** (max(now_s - self.learned_s, 0.0) / HALF_LIFE_S)

    def step(self, answers: int, context: float = 0.0) -> float:
        """Seconds of a step with one token for each of so many answers, which read so much context together."""
        fixed, each, _, read = self.costs()
        return fixed + each * answers + read * context

    def prefill(self, tokens: int) -> float:
        """Seconds that so many prompt tokens add to the steps they are computed in."""
        return tokens * self.costs()[2]

    def as_measured(self, tokens: int, answers: int, context: int) -> float:
        """Seconds of such a step at the start, whatever was learned since."""
        prompt_s = (tokens - answers) / self.prefill_tokens_s
        return self.step_s + self.each_s * answers + prompt_s + self.read_s * context

    @property
    def drift(self) -> float:
        """How many times slower than measured a step of one answer has become."""
        return self.step(1) / (self.step_s + self.each_s)

    def learn(self, tokens: int, answers: int, took_s: float, context: int = 0) -> None:
        """A step of so many tokens for so many answers. A little of it: single steps are noisy, and one may hang."""
        now_s = self.clock()
        lasting = self.lasting(now_s)
        self.slower = [log * lasting for log in self.slower]
        self.learned_s = now_s
        costs, counts = self.costs(), (1, answers, tokens - answers, context)
        parts = [costs[i] * counts[i] for i in PARTS]
        share = [part / sum(parts) for part in parts]  # what the time's logarithm changes by, when the cost's does
        moves = [sum(row[j] * share[j] for j in PARTS) for row in self.doubt]
        variance = sum(moves[i] * share[i] for i in PARTS) + NOISE
        most = OUTLIER * math.sqrt(variance)
        surprise = min(max(math.log(max(took_s, SHORTEST_S) / sum(parts)), -most), most)
        for i in PARTS:
            self.slower[i] = min(max(self.slower[i] + moves[i] / variance * surprise, -SLOWEST), SLOWEST)
            for j in PARTS:
                surer = self.doubt[i][j] - moves[i] * moves[j] / variance
                self.doubt[i][j] = surer + (CERTAIN[i][j] - surer) * FORGETTING
