"""timed() costs less than 5 µs a block, and timing every step costs less than 1 % of decode."""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

from benchmarks.claim import Claim, rounds
from config import PromptConfig
from lab.console import progress
from lab.verdict import interleaved, verdict
from metrics import Stats, synchronize, timer_cost_s
from model import Model, generate, ids_tensor, load

ROUNDS = 16
NEW_TOKENS = 16


def decode_seconds(model: Model, ids, stats: Stats | None) -> Callable[[], float]:
    def run() -> float:
        synchronize()
        start = time.perf_counter()
        generate(model, ids, max_new_tokens=NEW_TOKENS, stats=stats)
        synchronize()
        return time.perf_counter() - start

    return run


def claims(config: PromptConfig) -> list[Claim]:
    model, _, prompt = load(replace(config, max_new_tokens=NEW_TOKENS))
    ids = ids_tensor([prompt]).to(model.device)
    stats: Stats = {}
    variants = [decode_seconds(model, ids, stats), decode_seconds(model, ids, None)]
    list(interleaved(variants, 1))  # warms both up
    count = rounds(config, ROUNDS)
    seconds = list(progress(interleaved(variants, count), count, "timer"))
    said = verdict(*zip(*seconds, strict=True), noise=0.03)
    cost = timer_cost_s()
    share = cost / median(stats["decode"])
    return [
        Claim("one timed() block", "< 5 µs", f"{cost * 1e6:.1f} µs", cost < 5e-6),
        Claim(
            f"timing every step, {model.name}", "< 1 % of decode",
            f"{share:.4%} of a step by its own cost; timed / untimed runs: {said}",
            share < 0.01 and said.word != "SLOWER",
        ),
    ]  # fmt: skip
