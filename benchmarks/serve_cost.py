"""What the service costs around the engine: its start, a request's time outside the model, watching, the event loop."""

import asyncio
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.claim import Claim
from benchmarks.serve_process import OurService
from config import PromptConfig
from lab import client
from serve import model_of
from service.app import make_app
from service.assembly import assembled, on_passing_thread
from service.house import House
from service.server import Server
from service.settings import ServeConfig

PROMPT, NEW, LONG = 64, 16, 4_000
STREAMS = 4


def claims(config: PromptConfig) -> list[Claim]:
    return [start_claim(config), *outside_claims(config), *inside_claims(config)]


def start_claim(config: PromptConfig) -> Claim:
    """Files and the measured capacity are warm: not the first start on a machine."""
    seconds = []
    for _ in range(4):
        service = OurService(config.model)
        service.close()
        seconds.append(service.ready_s)
    return Claim(
        "process start to serving",
        "≤ 5 s",
        f"{median(seconds[1:]):.2f} s (median of 3, warm)",
        median(seconds[1:]) <= 5,
    )


def outside_claims(config: PromptConfig) -> list[Claim]:
    """A request's time less the engine's steps, and less the moments between them, which are claimed by themselves."""
    service, count = OurService(config.model), 20 if config.quick else 60
    try:
        name, url = service.get("/v1/models")["data"][0]["id"], service.url + "/v1/completions"
        one = client.closed_loop(url, bodies(name, count), 1)[5:]
        alone = [outside_s(trace, trace.usage["timing"]["total"]) for trace in one]
        seen = [outside_s(trace, trace.e2e_s) for trace in one]
        four = client.closed_loop(url, bodies(name, count * 2), STREAMS)[STREAMS * 2 :]
        gap = median(trace.usage["timing"]["between"] / NEW for trace in four)
        late = sorted(alone)[int(len(alone) * 0.9)]
    finally:
        service.close()
    return [
        Claim("the server's time for a request outside the model", "p50 < 3 ms",
              f"p50 {median(alone) * 1e3:.2f} ms, p90 {late * 1e3:.2f} ms of {len(alone)}; by the client's clock, "
              f"its own work and the network included, p50 {median(seen) * 1e3:.2f} ms",
              median(alone) < 3e-3),
        Claim(f"between two steps, {STREAMS} streams", "< 0.2 ms", f"{gap * 1e3:.3f} ms", gap < 0.2e-3),
    ]  # fmt: skip


def bodies(name: str, count: int, prompt: int = PROMPT, new: int = NEW) -> list[dict[str, Any]]:
    return [
        {"model": name, "prompt": [500 + i, *range(1000, 1000 + prompt - 1)], "max_tokens": new, "temperature": 0,
         "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        for i in range(count)
    ]  # fmt: skip


def outside_s(trace: client.Trace, total_s: float) -> float:
    timing = trace.usage["timing"]
    return total_s - timing["prefill"] - timing["decode"] - timing["between"]


# ---- from inside


def inside_claims(config: PromptConfig) -> list[Claim]:
    settings = ServeConfig(model=config.model, port=0, threads=config.threads)
    with Path("/dev/null").open("w") as log:
        house = on_passing_thread(lambda: assembled(settings, model_of(settings), log=log))
        with running(house) as (url, server):
            return [telemetry_claim(house, url), lag_claim(house, server, url)]


@contextmanager
def running(house: House) -> Iterator[tuple[str, Server]]:
    """The service on a thread of this process."""
    addresses: list[str] = []
    server = Server(make_app(house), house, addresses.append)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not addresses:
        time.sleep(0.01)
    try:
        yield addresses[0], server
    finally:
        server.should_exit = True
        thread.join()


def telemetry_claim(house: House, url: str) -> Claim:
    """The CPU time of everything that only watches, by the clock of the thread it runs in."""
    spent = {"steps": 0.0, "requests": 0.0, "scrapes": 0.0}
    house.serving.bridge.watch = counted(house.serving.bridge.watch, spent, "steps")
    house.books.measure = counted(house.books.measure, spent, "requests")
    house.books.facts = counted(house.books.facts, spent, "requests")
    house.books.log.write = counted(house.books.log.write, spent, "requests")
    house.watch.refresh = counted(house.watch.refresh, spent, "scrapes")
    engine = house.serving.bridge.engine
    begin = len(engine.steps)
    client.closed_loop(url + "/v1/completions", bodies(house.name, 96), 16)
    for _ in range(3):
        with urllib.request.urlopen(url + "/metrics"):
            pass
    steps_s = sum(step.end - step.start for step in list(engine.steps)[begin:])
    share = sum(spent.values()) / steps_s
    parts = ", ".join(f"{name} {seconds / steps_s:.2%}" for name, seconds in spent.items())
    return Claim("CPU time of all telemetry", "< 2 % of the steps' time", f"{share:.2%} ({parts})", share < 0.02)


def counted(call: Any, spent: dict[str, float], name: str) -> Any:
    def timed(*arguments: Any, **words: Any) -> Any:
        start = time.thread_time()
        try:
            return call(*arguments, **words)
        finally:
            spent[name] += time.thread_time() - start

    return timed


def lag_claim(house: House, server: Server, url: str) -> Claim:
    """How late the event loop is, while a long text is tokenised and computed."""
    lags: list[float] = []
    stop = threading.Event()

    async def look() -> None:
        loop = asyncio.get_running_loop()
        while not stop.is_set():
            due = loop.time() + 0.005
            await asyncio.sleep(0.005)
            lags.append(loop.time() - due)

    looking = asyncio.run_coroutine_threadsafe(look(), server.loop)
    text = " ".join(f"word{i}" for i in range(LONG // 3))
    body = {
        "model": house.name,
        "prompt": text,
        "max_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    trace = client.closed_loop(url + "/v1/completions", [body], 1)[0]
    stop.set()
    looking.result()
    p99 = sorted(lags)[int(len(lags) * 0.99) - 1]
    tokens = trace.usage["prompt_tokens"] if trace.complete else 0
    return Claim(
        f"event-loop lag while a prompt of {tokens:,} tokens is tokenised and computed",
        "p99 < 20 ms",
        f"p50 {median(lags) * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms, worst {max(lags) * 1e3:.1f} ms of {len(lags)}",
        p99 < 0.02 and tokens >= 3_000,
    )
