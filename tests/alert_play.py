"""A play in which everything goes wrong that the alerts are for, one service for each kind of trouble.

    well       is asked all the time and has nothing
    slow       its engine is held until its house is full, then slow, then it fails every few steps
    odd        its books are wrong, its log cannot be written, its clients leave, its loop is late, its memory short
    process    serve.py itself: killed, and started again

All four play at the same time; an act ends when the alerts that it is for have fired.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from process_kit import started, until
from prometheus_kit import Prometheus, free_port, watching
from service_kit import Later, Served, served
from step_kit import one_step

from service.breaker import State
from service.limits import RateLimits

PATIENCE_S = 60.0  # for an alert that should take five to fifteen


@dataclass
class Play:
    """fired: each alert's name and job, as they were first seen firing."""

    prometheus: Prometheus
    fired: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        while not self.over.wait(0.2):
            for alert in self.prometheus.firing():
                self.fired.setdefault((alert["labels"]["alertname"], alert["labels"]["job"]), alert)

    def until(self, job: str, *names: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while missing := [name for name in names if (name, job) not in self.fired]:
            assert not self.over.is_set(), f"{job}: another act failed"
            assert time.monotonic() < end, f"{job}: {', '.join(missing)} did not fire; {sorted(self.fired)} did"
            time.sleep(0.05)


@contextlib.contextmanager
def repeated(*acts: Callable[[], Any], every_s: float = 0.0) -> Iterator[None]:
    """Each act again and again, in a thread of its own, until the block ends."""
    over = threading.Event()

    def repeat(act: Callable[[], Any]) -> None:
        while not over.wait(every_s):
            act()

    threads = [Later(lambda act=act: repeat(act)) for act in acts]
    try:
        yield
    finally:
        over.set()
        for one in threads:
            one.result()


# ---- the four


def well(here: Served, play: Play) -> None:
    here.runner.pace_s = 0.002
    acts = (lambda: here.chat("one"), lambda: here.chat("two", stream=True), lambda: here.complete("three"))
    with repeated(*acts, every_s=0.05):
        play.over.wait(3 * PATIENCE_S)


def slow(here: Served, play: Play) -> None:
    job, breaker = "llmserve-slow", here.house.serving.relief.engine
    breaker.force(State.DISABLED)  # its turn comes
    here.runner.hold()
    held = [here.later(here.chat, f"{i:09}", max_tokens=8) for i in range(8)]
    here.until(lambda: here.admission.answers == len(held))
    while here.bridge.seen().kv_held < 8:  # the first came alone; the others are let in by later steps
        one_step(here)
    with repeated(here.chat, every_s=0.1):
        play.until(job, "LlmServeEngineStalled", "LlmServeNotReady", "LlmServeNobodyReady", "LlmServeQueueFull",
                   "LlmServeKvCacheAlmostFull", "LlmServeRefusing", "LlmServeErrorBudgetBurning",
                   "LlmServeDegraded")  # fmt: skip
    here.runner.pace_s = 0.3
    here.runner.go()
    with repeated(*[lambda i=i: here.chat(f"{i:09} slowly", max_tokens=8) for i in range(8)]):
        play.until(job, "LlmServeFirstTokenSlow", "LlmServeTokensSlow")
        here.runner.pace_s = 0.01
    assert {one.result().status for one in held} == {200}

    numbers = itertools.count()

    def fail_soon() -> None:
        here.runner.faults[f"step {here.runner.steps + 3}"] = RuntimeError("broken")

    breaker.force(None)
    acts = [lambda: here.chat(f"{next(numbers):09}")] * 3  # one input that fails twice is quarantined: "hello"
    with repeated(*acts, here.chat, every_s=0.02), repeated(fail_soon, every_s=0.05):
        play.until(job, "LlmServeEngineErrors", "LlmServeEngineReplaced", "LlmServeQuarantine", "LlmServeBreakerOpen")
    here.runner.faults.clear()
    breaker.force(None)


class Full:
    """A log on a full disk."""

    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")


def leave(here: Served) -> None:
    """Ask for much, and go when it begins."""
    with here.send_chat("much", stream=True, max_tokens=20) as connection:
        connection.recv(4096)


def odd(here: Served, play: Play, memory: list[float]) -> None:
    job, house, bridge, rates = "llmserve-odd", here.house, here.bridge, here.admission.rates
    here.runner.pace_s, house.watch.laws_s = 0.01, 0.0

    def foretell_too_much() -> None:
        rates.step_s, rates.slower = 5.0, [0.0] * 4

    before, log = rates.step_s, house.books.log.stream
    house.books.log.stream, bridge.useful = Full(), bridge.useful + 5
    acts = (here.chat, lambda: leave(here), lambda: leave(here), foretell_too_much)
    late = repeated(lambda: here.server.loop.call_soon_threadsafe(time.sleep, 0.15), every_s=0.3)
    with repeated(*acts, every_s=0.02), late:
        play.until(job, "LlmServeLawBroken", "LlmServeLogLinesLost", "LlmServePredictionOff", "LlmServeWaste",
                   "LlmServeEventLoopLate")  # fmt: skip
    house.books.log.stream, bridge.useful, rates.step_s = log, bridge.useful - 5, before
    unlimited, house.serving.limits = house.serving.limits, RateLimits(1, 0, house.serving.clock)
    with repeated(here.chat, every_s=0.1):
        play.until(job, "LlmServeRateLimiting")
    house.serving.limits = unlimited
    memory[0] = 0.97
    with repeated(here.chat, every_s=0.1):
        play.until(job, "LlmServeMemoryShort")
    memory[0] = 0.5
    here.until(lambda: here.admission.closed is None)


def process(folder: Path, place: Path, port: int, play: Play) -> None:
    """Its first life ends here; the caller began it."""
    play.until("llmserve-process", "LlmServeDown", "LlmServeNobodyReady")
    with started(folder, "--port", str(port), place=place / "second"):
        play.until("llmserve-process", "LlmServeRestarted")


# ---- the stage


@contextlib.contextmanager
def played(folder: Path, place: Path) -> Iterator[Play]:
    """The whole play; what Prometheus has seen of it can be asked when it is over."""
    port, memory = free_port(), [0.5]
    with contextlib.ExitStack() as watched:
        with contextlib.ExitStack() as stage:
            first = stage.enter_context(started(folder, "--port", str(port), place=place / "first"))
            settings = {
                "well": {}, "odd": {"memory_used": lambda: memory[0]},
                "slow": {"kv_blocks": 8, "stall_after": 0.2, "queue_timeout": 120.0, "degrade_max_tokens": 64},
            }  # fmt: skip
            services = {}
            for name, wishes in settings.items():
                services[f"llmserve-{name}"] = here = stage.enter_context(served(folder, **wishes))
                for _ in range(2):  # all its threads are there before the next one counts them
                    here.house.serving.prompts.pool.submit(time.sleep, 0.05)
            jobs = {job: here.port for job, here in services.items()} | {"llmserve-process": port}
            play = Play(watched.enter_context(watching(place / "prometheus", jobs)))
            looking = Later(play.look)
            here = services["llmserve-well"]
            calm = Later(lambda: well(here, play))
            try:
                here.until(lambda: len(play.prometheus.series("llmserve_ready")) == 4, "for all to be scraped")
                assert not play.fired
                first.popen.kill()
                acts = [
                    Later(lambda: slow(services["llmserve-slow"], play)),
                    Later(lambda: odd(services["llmserve-odd"], play, memory)),
                    Later(lambda: process(folder, place, port, play)),
                ]
                until(lambda: all(act.done for act in acts) or any(act.error for act in acts), patience_s=180)
                for error in [act.error for act in acts if act.error]:
                    raise error
            finally:
                play.over.set()
                calm.result()
                looking.result()
                play.prometheus.stop_scraping()
        yield play
