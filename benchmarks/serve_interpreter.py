"""What it brings that whoever computes in Python keeps the interpreter for half a millisecond, not for Python's own 5.

Two services that differ in nothing else (serve.SWITCH_S), in turns. Chats: from as many clients as there are slots who
wait for their answers; then, one by one, at 0.6 of that rate; then at three times that rate, when most are refused.
"""

import time
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

from benchmarks.claim import Claim, rounds
from benchmarks.serve_prediction import Chats
from benchmarks.serve_process import OurService
from config import PromptConfig
from lab import client
from lab.arrivals import schedule
from lab.console import progress
from lab.verdict import Verdict, interleaved, verdict

STEADY, OVERLOAD = 0.6, 3.0  # of the capacity
NEW, WAITING = 16, 96
WINDOW_S, SETTLE_S = 10.0, 3.0
FASTER = {"FASTER": True, "WITHIN NOISE": False, "SLOWER": False}
PYTHONS_OWN = ("-c", "import sys, serve; serve.SWITCH_S = sys.getswitchinterval(); sys.exit(serve.main())")


def claims(config: PromptConfig) -> list[Claim]:
    services: list[OurService] = []
    try:
        services.append(OurService(config.model))
        services.append(OurService(config.model, program=PYTHONS_OWN))
        loads = Loads(services[0])
        for service in services:
            service.rest()
        variants = [partial(loads.on, service) for service in services]
        ((first, second),) = interleaved(variants, 1)  # warms both up
        loads.rate = min(first[0], second[0])
        count = rounds(config, 6)
        short, own = zip(*progress(interleaved(variants, count), count, "both at three loads"), strict=True)
        return compared(short, own)
    finally:
        for service in services:
            service.close()


class Loads:
    """rate: requests a second that a service has done for clients who wait."""

    def __init__(self, service: OurService) -> None:
        self.slots, self.rate, self.seed = service.get("/capacity")["slots"], 5.0, 0
        self.chats = Chats(service.get("/v1/models")["data"][0]["id"], ignore_eos=True)

    def on(self, service: OurService) -> tuple[float, float, float]:
        """(answers a second to clients who wait, median seconds of answers at a steady load, answers a second in the
        overload). RuntimeError when one that is not refused gets no answer.
        """
        url = service.url + "/v1/chat/completions"
        service.work()
        try:
            asked, start = self.some(WAITING), time.perf_counter()
            waiting = client.closed_loop(url, asked, self.slots)
            waiting_s = time.perf_counter() - start
            steady, crowd = (self.open_loop(url, share * self.rate) for share in (STEADY, OVERLOAD))
        finally:
            service.rest()
        lost = [one for one in (*waiting, *steady, *crowd) if not one.complete and one.status != 503]
        if lost:
            raise RuntimeError(f"{len(lost)} requests failed: {lost[0].status} {lost[0].error}")
        begin_s = min(one.due_s for one in crowd) + SETTLE_S
        served = sum(begin_s < one.end_s < begin_s + WINDOW_S - SETTLE_S for one in crowd if one.complete)
        whole = median(one.end_s - one.due_s for one in steady if one.complete)
        return WAITING / waiting_s, whole, served / (WINDOW_S - SETTLE_S)

    def open_loop(self, url: str, rate: float) -> list[client.Trace]:
        self.seed += 1
        arrivals_s = schedule("poisson", round(rate * WINDOW_S), rate, self.seed)
        return client.open_loop(url, self.some(len(arrivals_s)), arrivals_s)

    def some(self, count: int) -> list[dict[str, Any]]:
        return [chat | {"max_tokens": NEW} for chat in self.chats.some(count)]


def compared(short: Sequence[tuple[float, ...]], own: Sequence[tuple[float, ...]]) -> list[Claim]:
    """Short turns of the interpreter against Python's own: what Loads.on() found in each round."""
    waiting, steady, crowd = zip(zip(*short, strict=True), zip(*own, strict=True), strict=True)
    calm, whole, busy = verdict(*map(each, waiting)), verdict(*steady), verdict(*map(each, crowd))
    slower, faster = "answers are not slower", "answers come faster"
    return [
        claim("clients who wait", slower, calm, calm.not_slower, *waiting, "requests/s"),
        claim(f"{STEADY:g} of that rate", slower, whole, whole.not_slower, *steady, "s for half of them"),
        claim(f"{OVERLOAD:g} times that rate", faster, busy, FASTER.get(busy.word), *crowd, "requests/s"),
    ]


def each(rates: Sequence[float]) -> list[float]:
    """Seconds of one answer."""
    return [1 / rate for rate in rates]


def claim(
    where: str,
    promised: str,
    said: Verdict,
    holds: bool | None,
    short: Sequence[float],
    own: Sequence[float],
    unit: str,
) -> Claim:
    measured = f"{said}; {median(short):.2f} against {median(own):.2f} {unit}"
    return Claim(f"short turns of the interpreter against Python's own, {where}", promised, measured, holds)
