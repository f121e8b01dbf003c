"""How good the foretold wait is: chats of mixed lengths at several loads and in bursts, judged by the service's log.

Predicted is what the service said when it let a request in; real is the time from then to its first token, both as its
log has them. The error is their difference as a part of the real wait, waits below 50 ms counted as 50 ms. What the
service learns from comes before: the requests that its capacity is found with. Answers end where the model ends them,
which nobody knows when they begin; and once as late as they may, which leaves what can be known.
"""

import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.claim import Claim
from benchmarks.serve_process import OurService
from config import PromptConfig, UserError
from lab import client
from lab.arrivals import schedule
from lab.console import progress
from lab.prompts import questions
from metrics import percentile
from service.books import TINY_S

LOADS = (0.7, 1.0, 1.5)  # of the capacity
PROMISED = 0.25
FIRST = 72  # requests, of as many clients as there are slots: what it can do, and what it learns from
BURST, BURSTS = 40, 3
SHORT_STEPS = 128  # prompt tokens that may be in somebody else's step
MOST_NEW = (16, 32, 64, 96)


def claims(config: PromptConfig) -> list[Claim]:
    return [
        judged(config, "as it is"),
        judged(config, "every answer as long as it may be", ignore_eos=True),
        judged(config, f"--max-tokens {SHORT_STEPS}", "--max-tokens", str(SHORT_STEPS)),
    ]


def judged(config: PromptConfig, how: str, *options: str, ignore_eos: bool = False) -> Claim:
    """One service, all loads."""
    cells = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        service = OurService(config.model, "--log-file", str(log), *options)
        try:
            chats = Chats(service.get("/v1/models")["data"][0]["id"], ignore_eos)
            url = service.url + "/v1/chat/completions"
            rate = found_rate(client.closed_loop(url, chats.some(FIRST), service.get("/capacity")["slots"]))
            seconds = 15.0 if config.quick else 45.0
            plans = {f"load {load:g}": schedule("poisson", max(int(load * rate * seconds), 10), load * rate, seed)
                     for seed, load in enumerate(LOADS)}  # fmt: skip
            plans |= {f"burst {i + 1}": [0.0] * BURST for i in range(1 if config.quick else BURSTS)}
            for name, arrivals_s in progress(plans.items(), len(plans), how):
                begin = log.stat().st_size
                traces = client.open_loop(url, chats.some(len(arrivals_s)), arrivals_s)
                cells[name] = errors(log, begin, sum(trace.complete for trace in traces))
        finally:
            service.close()
    return claim(how, cells)


class Chats:
    """One to ten questions at once, each chat beginning differently; answers of at most 16 to 96 tokens. ignore_eos: of
    so many.
    """

    def __init__(self, model: str, ignore_eos: bool) -> None:
        self.model, self.ignore_eos, self.dice, self.count = model, ignore_eos, random.Random(0), 0

    def some(self, count: int) -> list[dict[str, Any]]:
        return [self.one() for _ in range(count)]

    def one(self) -> dict[str, Any]:
        self.count += 1
        asked = " ".join(self.dice.sample(questions(), round(10 ** self.dice.random())))
        return {
            "model": self.model, "messages": [{"role": "user", "content": f"{self.count}. {asked}"}],
            "max_tokens": self.dice.choice(MOST_NEW), "temperature": 0.8, "seed": self.count, "stream": True,
            "ignore_eos": self.ignore_eos,
        }  # fmt: skip


def found_rate(traces: Sequence[client.Trace]) -> float:
    """Answers a second, from the first quarter of them to the last."""
    ends = sorted(trace.end_s for trace in traces if trace.complete)
    if len(ends) < FIRST // 2:
        raise UserError("Most requests failed, so no prediction was checked: see how serve.py does by hand.")
    low, high = len(ends) // 4, 3 * len(ends) // 4
    return (high - low) / (ends[high] - ends[low])


def errors(log: Path, begin: int, count: int) -> list[float]:
    """Of the requests that the log tells of after byte `begin`, once it tells of so many that ended well."""
    end_s = time.perf_counter() + 10
    while True:
        with log.open("rb") as lines:
            lines.seek(begin)
            told = [json.loads(line) for line in lines if line.endswith(b"\n")]
        known = [line for line in told if line.get("real_wait") is not None]
        if len(known) >= count or time.perf_counter() > end_s:
            return [abs(one["predicted_wait"] - one["real_wait"]) / max(one["real_wait"], TINY_S) for one in known]
        time.sleep(0.1)


def claim(how: str, cells: dict[str, list[float]]) -> Claim:
    found = sorted(error for cell in cells.values() for error in cell)
    each = "; ".join(f"{name} {percentile(sorted(cell), 90):.0%} of {len(cell)}" for name, cell in cells.items())
    p90 = percentile(found, 90)
    return Claim(
        f"the foretold wait for the first token, {how}",
        f"p90 of the error < {PROMISED:.0%}",
        f"p50 {percentile(found, 50):.0%}, p90 {p90:.0%} of {len(found)} let in ({each})",
        p90 < PROMISED,
    )
