"""Time what you name, keep every sample, and say what the samples support.

timed() is the only stopwatch of this kit. Medians and percentiles are computed when printing, never instead of
keeping the raw list. A statistic that the number of samples does not support is marked, not left out in silence.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from tabulate import tabulate

Stats = dict[str, list[float]]


def synchronize() -> None:
    """Wait for a GPU that a loaded torch has queued work on. GPU calls return before their work is done."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda"):
        return
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif sys.platform == "darwin" and torch.backends.mps.is_available():
        torch.mps.synchronize()


@contextmanager
def timed(
    name: str,
    stats: Stats,
    sync: Callable[[], None] = synchronize,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[None]:
    """Append the seconds this block took to stats[name].

    sync() runs on both sides: without it a block is charged for whatever was queued before, and not for its own work.
    A block that raises records nothing.
    """
    sync()
    start = clock()
    yield
    sync()
    stats.setdefault(name, []).append(clock() - start)


def timer_cost_s(blocks: int = 2000) -> float:
    """Seconds that one timed() block adds around the work it times: the median of empty blocks, seen from outside."""
    outside: list[float] = []
    inside: Stats = {}
    for _ in range(blocks):
        start = time.perf_counter()
        with timed("empty", inside):
            pass
        outside.append(time.perf_counter() - start)
    return median(outside)


# ---- what n samples can say

# Samples below which a percentile says little about the next run: about 6.64 / (1 - p), the early-stopping floors of
# MLPerf inference's rules.
SAMPLE_FLOOR: dict[float, int] = {90: 64, 95: 132, 99: 662}


def percentile(samples: Sequence[float], p: float) -> float:
    """The nearest-rank percentile: the smallest sample that at least p % of the samples do not exceed."""
    if not samples:
        raise ValueError("a percentile of no samples does not exist")
    return sorted(samples)[max(math.ceil(p / 100 * len(samples)), 1) - 1]


def certified(n: int, p: float) -> bool:
    """Whether n samples support the p-th percentile (SAMPLE_FLOOR)."""
    return n >= SAMPLE_FLOOR.get(p, math.ceil(round(664 / (100 - p), 6)))


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The narrowest pair of order statistics that holds the true median with this confidence; None below six samples.

    The number of samples under the true median is binomial (n, 1/2), whatever the samples' distribution
    (Conover, Practical Nonparametric Statistics, 3.2). With six samples the pair is the least and the greatest: 96.9 %.
    """
    n, ordered = len(samples), sorted(samples)
    outside, low = 0.0, -1
    for k in range(n // 2):
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 1 - confidence:
            break
        low = k
    return None if low < 0 else (ordered[low], ordered[n - 1 - low])


# ---- warnings carry their remedy


def cold_warning(samples: Sequence[float], what: str, warmup: int) -> str | None:
    """Says so when the first sample stands out from the rest: something was still warming up."""
    if len(samples) < 3:
        return None
    ratio = samples[0] / median(samples[1:])
    if ratio < 1.5:
        return None
    return (
        f"the first {what} took {ratio:.1f}x the median of the others: something was still warming up when the clock "
        f"started. This run had --warmup {warmup}; try --warmup {warmup + 2}."
    )


def unsteady_warning(samples: Sequence[float], what: str, runs: int) -> str | None:
    """Says so when the middle half of the samples is wider than a tenth of their median."""
    if len(samples) < 4:
        return None
    width = (percentile(samples, 75) - percentile(samples, 25)) / median(samples)
    if width < 0.10:
        return None
    return (
        f"{what} is unsteady: the middle half of {len(samples)} runs spans {width:.0%} of the median. Something else "
        f"used the machine, or its clock changed. Close other programs and try --runs {2 * runs}."
    )


# ---- tables

NONE = "–"  # not measured. Never 0, which is a measurement


def number(value: float | None, digits: int = 1, scale: float = 1.0, unit: str = "") -> str:
    """value * scale with that many decimals, or a dash for what was not measured."""
    return NONE if value is None else f"{value * scale:,.{digits}f}{unit}"


def ms(seconds: float | None, digits: int = 1) -> str:
    return number(seconds, digits, 1e3)


def mb(size: float | None, digits: int = 1) -> str:
    """Decimal megabytes, as bandwidths are: 10^6 bytes."""
    return number(size, digits, 1e-6)


def span(interval: tuple[float, float] | None, digits: int = 1, scale: float = 1e3) -> str:
    return NONE if interval is None else "–".join(f"{end * scale:,.{digits}f}" for end in interval)


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table that is also aligned as plain text. columns: (header, "left" or "right")."""
    headers, sides = zip(*columns, strict=True)
    return tabulate(rows, headers=headers, tablefmt="pipe", colalign=sides, disable_numparse=True)


def blocks(samples: Sequence[float], least: float, greatest: float) -> str:
    """One character a sample, ▁ at least and █ at greatest: a whole series at a glance, outliers included."""
    scale = 7 / (greatest - least) if greatest > least else 0
    return "".join("▁▂▃▄▅▆▇█"[round(min(max(value - least, 0), greatest - least) * scale)] for value in samples)
