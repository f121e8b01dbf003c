"""The service with more to do than it can: how fast it refuses, and whether what it does serve suffers."""

import random
import selectors
import socket
import time
from collections.abc import Sequence
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import orjson

from benchmarks.claim import Claim, rounds
from benchmarks.serve_process import OurService
from config import PromptConfig
from lab import client
from lab.console import progress
from lab.verdict import interleaved, verdict

TENFOLD, NEW, PROMPT = 10, 16, 32
CLIENTS = 24  # more than there are slots: the highest throughput there is
SETTLE_S, WINDOW_S = 5.0, 20.0


def claims(config: PromptConfig) -> list[Claim]:
    service = OurService(config.model)
    try:
        found = service.get("/capacity")
        bodies = Bodies(service.get("/v1/models")["data"][0]["id"])
        places = found["slots"] + found["queue"]
        bursts = [refusal_claim(config, service, TENFOLD * size, places, bodies) for size in (found["slots"], places)]
        return [*bursts, *goodput_claims(config, service, found, bodies)]
    finally:
        service.close()


class Bodies:
    """Requests that all begin differently."""

    def __init__(self, model: str) -> None:
        self.model, self.dice = model, random.Random(0)

    def some(self, count: int, new: int = NEW, stream: bool = True) -> list[dict[str, Any]]:
        return [
            {"model": self.model, "prompt": [self.dice.randrange(500, 20_000) for _ in range(PROMPT)],
             "max_tokens": new, "temperature": 0, "stream": stream, "ignore_eos": True}
            for _ in range(count)
        ]  # fmt: skip


# ---- refusing


def refusal_claim(config: PromptConfig, service: OurService, size: int, places: int, bodies: Bodies) -> Claim:
    """So many requests at once: ten times what is computed at once, and ten times what there are places for."""
    waits, admitted = [], []
    for _ in range(rounds(config, 6)):
        refused, inside = burst(service.url, bodies.some(size, new=64))
        waits.append(refused)
        admitted.append(inside)
    worst = sorted(wait for run in waits for wait in run)
    p99 = worst[int(len(worst) * 0.99) - 1]
    return Claim(
        f"a refusal, {size} requests at once for {places} places",
        "p99 < 50 ms",
        f"p50 {median(worst) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms of {len(worst)}; admitted {sorted(set(admitted))}",
        p99 < 0.05 and set(admitted) == {places},
    )


def burst(url: str, bodies: Sequence[dict[str, Any]]) -> tuple[list[float], int]:
    """(seconds from sending to the answer, of those refused; how many were let in). Those are left alone then.

    Bare sockets, connected and accepted before, as those of clients that keep their connections: so that neither the
    client's own work nor the making of connections is what is measured.
    """
    place = urlsplit(url)
    sockets = [socket.create_connection((place.hostname, place.port)) for _ in bodies]
    time.sleep(1.0)
    sent: dict[socket.socket, float] = {}
    refused: list[float] = []
    try:
        with selectors.DefaultSelector() as waiting:
            for one, body in zip(sockets, bodies, strict=True):
                raw = orjson.dumps(body)
                head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                waiting.register(one, selectors.EVENT_READ)
                sent[one] = time.perf_counter()
                one.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            admitted = 0
            while len(refused) + admitted < len(sockets):
                for key, _ in waiting.select(timeout=60):
                    status = key.fileobj.recv(65536)[9:12]
                    moment = time.perf_counter()
                    waiting.unregister(key.fileobj)
                    if status == b"503":
                        refused.append(moment - sent[key.fileobj])
                    else:
                        admitted += 1
        return refused, admitted
    finally:
        for one in sockets:
            one.close()
        time.sleep(1.0)  # those who were let in are given up


# ---- serving


def goodput_claims(
    config: PromptConfig, service: OurService, capacity: dict[str, Any], bodies: Bodies
) -> list[Claim]:  # fmt: skip
    """Requests served a second: as many clients as it takes, then twice as many requests as that."""
    url = service.url + "/v1/completions"

    def peak() -> float:
        count = max(int(rate * (SETTLE_S + WINDOW_S)), CLIENTS)
        return per_second(client.closed_loop(url, bodies.some(count), CLIENTS))

    def overload() -> float:
        count = int(2 * rate * (SETTLE_S + WINDOW_S))
        traces = client.open_loop(url, bodies.some(count), [i / (2 * rate) for i in range(count)])
        seen.append(traces)
        return per_second(traces)

    seen: list[list[client.Trace]] = []
    rate = 5.0
    rate = peak()  # a first guess of the capacity, for the number of requests of a window
    count = rounds(config, 6)
    highest, doubled = zip(*progress(interleaved([peak, overload], count), count, "overload"), strict=True)
    said = verdict(highest, doubled)  # rates instead of times: overload's share of the peak, upside down
    low, high = 1 / said.high, 1 / said.low
    waits = sorted(trace.ttft_s for run in seen for trace in run if trace.complete)
    refusals = [trace for run in seen for trace in run if trace.status == 503]
    other = [trace for run in seen for trace in run if trace.status != 503 and not trace.complete]
    return [
        Claim(
            "goodput with twice as many requests as it can serve",
            "≥ 90 % of the peak",
            f"{1 / said.ratio:.0%} [{low:.0%}, {high:.0%}] (n={said.rounds}): {median(doubled):.2f} against "
            f"{median(highest):.2f} requests/s; {len(refusals)} refused, {len(other)} failed otherwise",
            False if other or high < 0.9 else True if low >= 0.9 else None,
        ),
        Claim(
            "first token of those let in, meanwhile",
            f"p99 ≤ the queue's {capacity['max_wait_s']:g} s",
            f"p50 {median(waits):.2f} s, p99 {waits[int(len(waits) * 0.99) - 1]:.2f} s of {len(waits)}",
            waits[int(len(waits) * 0.99) - 1] <= capacity["max_wait_s"],
        ),
    ]


def per_second(traces: list[client.Trace]) -> float:
    """Answers completed a second, between settling and the end of the window."""
    begin = min(trace.due_s for trace in traces) + SETTLE_S
    end = min(begin + WINDOW_S, max(trace.due_s for trace in traces))
    return sum(begin <= trace.end_s <= end for trace in traces if trace.complete) / (end - begin)
