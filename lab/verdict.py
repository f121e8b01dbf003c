"""Whether a difference is one. A claim needs an interval; without it the honest answer is "no verdict".

Two variants are run interleaved in rounds (A B, B A, A B, …), so that drift of the machine hits both alike, and are
compared by the ratio within each round. The mean of the log-ratios has a t interval.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

# Student's t, distribution and quantile; from here because scipy.stats takes a second more to import.
from scipy.special import stdtr, stdtrit

FEWEST_ROUNDS = 6
FEW_CONFIDENCE = 0.99  # what a claim from three to five rounds must hold at: so few may look alike by chance
ANCHOR_TOLERANCE = 0.15


@dataclass(frozen=True)
class Verdict:
    """word: FASTER, SLOWER, WITHIN NOISE or NO VERDICT, said of A against B; ratio = time of A / time of B."""

    word: str
    ratio: float | None
    low: float | None
    high: float | None
    rounds: int
    dropped: int = 0
    reason: str = ""
    noise: float = 0.05

    @property
    def not_slower(self) -> bool | None:
        """Whether A keeps up with B: its interval ends below 1 + noise. None where the rounds cannot say.

        A narrower question than the word answers ("is it faster, slower or equal?"), so it may be settled before it.
        """
        if self.word in ("FASTER", "WITHIN NOISE"):
            return True
        if self.word == "SLOWER":
            return False
        kept_up = self.high is not None and self.rounds >= FEWEST_ROUNDS and self.high < 1 + self.noise
        return True if kept_up else None

    def __str__(self) -> str:
        numbers = "" if self.ratio is None else f" ×{self.ratio:.3f}"
        numbers += "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        dropped = f", {self.dropped} dropped" if self.dropped else ""
        return f"{self.word}{numbers} (n={self.rounds}{dropped}){': ' + self.reason if self.reason else ''}"


def verdict(
    a_s: Sequence[float],
    b_s: Sequence[float],
    *,
    noise: float = 0.05,
    anchors: Sequence[float] | None = None,
    factors: Sequence[str] = (),
) -> Verdict:
    """A against B, both in seconds, paired by round: a_s[i] and b_s[i] ran next to each other.

    FASTER and SLOWER need the 95 % interval to exclude 1, or with three to five rounds the 99 % one.
    noise: ratios within 1 ± this count as equal. anchors: the time of a fixed piece of work around each round; from six
    rounds on, those more than 15 % off its median are dropped (with fewer, none can be called the odd one).
    factors: what differs between A and B; more than one, and no verdict.
    """
    if len(a_s) != len(b_s):
        raise ValueError(f"paired samples need equal numbers of rounds: {len(a_s)} and {len(b_s)}")
    steady = steady_rounds(anchors) if anchors and len(a_s) >= FEWEST_ROUNDS else range(len(a_s))
    logs = [math.log(a_s[i] / b_s[i]) for i in steady]
    n, dropped = len(logs), len(a_s) - len(logs)
    if len(factors) > 1:
        return Verdict(
            "NO VERDICT", None, None, None, n, dropped, f"more than one factor differs: {', '.join(factors)}"
        )
    if n < 2:
        alone = math.exp(logs[0]) if logs else None
        return Verdict("NO VERDICT", alone, None, None, n, dropped, f"at least {FEWEST_ROUNDS} rounds are needed")
    middle, half = mean(logs), t_half_width(logs)
    ratio, low, high = math.exp(middle), math.exp(middle - half), math.exp(middle + half)
    if n < FEWEST_ROUNDS and not (n >= 3 and abs(middle) > t_half_width(logs, FEW_CONFIDENCE)):
        why = f"{FEWEST_ROUNDS - n} more rounds are needed" + (f" ({dropped} were disturbed)" if dropped else "")
        return Verdict("NO VERDICT", ratio, low, high, n, dropped, why)
    if high < 1:
        word = "FASTER"
    elif low > 1:
        word = "SLOWER"
    elif low > 1 - noise and high < 1 + noise:
        word = "WITHIN NOISE"
    else:
        needed = rounds_needed(stdev(logs), noise)
        why = (
            f"about {needed - n} more rounds would show a difference of {noise:.0%}"
            if needed > n
            else f"the interval crosses the edge of ±{noise:.0%}: use {2 * n} rounds"
        )
        return Verdict("NO VERDICT", ratio, low, high, n, dropped, why, noise)
    return Verdict(word, ratio, low, high, n, dropped, noise=noise)


def t_half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    """Half the width of the t interval of the mean."""
    n = len(values)
    return float(stdtrit(n - 1, 0.5 + confidence / 2)) * stdev(values) / math.sqrt(n)


def steady_rounds(anchors: Sequence[float]) -> list[int]:
    """The rounds during which the machine was as fast as usual."""
    usual = median(anchors)
    return [i for i, value in enumerate(anchors) if abs(value / usual - 1) <= ANCHOR_TOLERANCE]


def rounds_needed(spread: float, difference: float, power: float = 0.9) -> int:
    """Rounds after which a difference of this size is found with this probability.

    spread: standard deviation of the log-ratios. The t test's power is taken at its centre, a shift of the t
    distribution by the expected statistic, which for these sizes is within a round of the exact noncentral one.
    """
    effect = abs(math.log1p(difference))
    for n in range(FEWEST_ROUNDS, 10_000):
        limit = float(stdtrit(n - 1, 0.975))
        if float(stdtr(n - 1, effect * math.sqrt(n) / max(spread, 1e-12) - limit)) >= power:
            return n
    return 10_000


def interleaved(variants: Sequence[Callable[[], float]], rounds: int) -> Iterable[list[float]]:
    """Run the variants once per round in turning order (A B C, C B A, …); yield each round's seconds in given order."""
    for number in range(rounds):
        order = range(len(variants)) if number % 2 == 0 else range(len(variants) - 1, -1, -1)
        seconds = {i: variants[i]() for i in order}
        yield [seconds[i] for i in range(len(variants))]
