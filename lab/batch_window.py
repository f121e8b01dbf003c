"""Is there a rate of arrivals at which waiting for others pays? Simulated from c(b), before it is measured.

A window delays whoever comes while the worker is free, and helps only if someone else comes within it. While the worker
is busy requests collect by themselves, window or not. So at low rates a window only costs, at high rates it does
nothing, and in between it may pay. "Pays" here means: a lower mean latency than without a window.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from statistics import mean
from typing import Any

from lab.arrivals import schedule
from lab.console import progress
from lab.simulation import Cost, simulate
from lab.verdict import t_half_width

SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the rate that full batches can serve
SEEDS, REQUESTS = 20, 100
CONFIDENCE = 1 - 0.05 / len(SHARES)  # so many intervals are looked at that one in twenty would err by itself


def break_even(
    make_batcher: Callable[[tuple[int, float]], Callable],
    cost: Cost,
    size: int,
    window_ms: float,
    lengths: Sequence[int],
) -> dict[str, Any]:
    """What a window changes in the mean latency, by rate; both policies are given the same arrivals.

    cannot_pay_below: the greatest rate up to which it is shown only to delay; pays_from: the least at which it is shown
    to help. Between them the simulation does not tell it from no window.
    """
    many = [lengths[i % len(lengths)] for i in range(REQUESTS)]
    capacity = size / cost.service_s([max(lengths)] * size)
    rows = []
    for share in progress(SHARES, len(SHARES), "window"):
        rate = share * capacity
        delays, plain = [], []
        for seed in range(SEEDS):
            dues = schedule("poisson", REQUESTS, rate, seed)
            without, with_window = (
                mean(simulate(make_batcher((size, ms)), dues, many, cost.service_s)) - mean(dues)
                for ms in (0.0, window_ms)
            )
            delays.append(with_window - without)
            plain.append(without)
        half = t_half_width(delays, CONFIDENCE)
        rows.append({"rate": rate, "latency_s": mean(plain), "delay_s": mean(delays),
                     "low_s": mean(delays) - half, "high_s": mean(delays) + half})  # fmt: skip
    return {
        "size": size,
        "window_ms": window_ms,
        "capacity": capacity,
        "rows": rows,
        "cannot_pay_below": max((row["rate"] for row in takewhile(lambda row: row["low_s"] > 0, rows)), default=None),
        "pays_from": next((row["rate"] for row in rows if row["high_s"] < 0), None),
    }
