"""The service's parts put together around an engine, a real one or a test's."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from engine.engine import Engine
from service.admission import Admission, Limits
from service.books import Books
from service.breaker import State
from service.bridge import Bridge
from service.house import House
from service.keys import Keys
from service.life import Tracing
from service.limits import RateLimits
from service.machine import memory_share
from service.observe import Lives, Metrics, RequestLog
from service.prompts import Prompts
from service.quarantine import Quarantine
from service.rates import Rates
from service.relief import relief_of
from service.serving import UNLIMITED, Serving
from service.settings import ServeConfig
from service.watch import Watch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Model:
    """What is served. engine: makes one with nothing in it. about: name, hash and the rest of what may be known."""

    engine: Callable[[], Engine]
    prompts: Prompts
    rates: Rates
    about: dict[str, Any]


def assembled(
    settings: ServeConfig, model: Model, *, log: TextIO | None = None, clock: Callable[[], float] = time.perf_counter,
    memory_used: Callable[[], float] = memory_share,
) -> House:  # fmt: skip
    about = {"created": int(time.time())} | model.about
    metrics = Metrics(
        {name: str(about.get(name, "")) for name in ("name", "hash", "kernel", "weights", "device", "torch")}
    )
    bridge = Bridge(model.engine, clock, Quarantine(settings.quarantine_minutes, clock))
    keys = Keys(settings.keys())
    context = bridge.engine.context or UNLIMITED
    limits = Limits(
        settings.max_running, settings.queued, settings.max_queued_tokens or context * settings.max_running,
        settings.queue_timeout, keys=max(len(keys.hashes), 1), step_tokens=settings.max_tokens,
    )  # fmt: skip
    request_log = RequestLog(log or sys.stderr, metrics.log_lost)

    def told(name: str, state: State) -> None:
        metrics.breaker_transitions.labels(name, state).inc()
        request_log.write("breaker", name=name, state=state)

    serving = Serving(
        settings, bridge, model.prompts, Admission(limits, model.rates),
        RateLimits(settings.requests_per_minute, settings.tokens_per_minute, clock),
        relief_of(settings, about, limits.places, clock, told), clock,
    )  # fmt: skip
    serving.admission.foreteller.step_age_s = bridge.step_age_s
    traces = traces_of(settings, about)
    books = Books(metrics, request_log, Lives(), model.prompts.decode if settings.log_prompts else None, traces)
    return House(serving, keys, books, Watch(serving, metrics, memory_used), about, traces)


def traces_of(settings: ServeConfig, about: dict[str, Any]) -> Tracing | None:
    if settings.otlp_endpoint is None:
        return None
    from service.tracing import Traces  # here: its packages are not everybody's

    return Traces(settings.otlp_endpoint, about)


def on_passing_thread(work: Callable[[], Result]) -> Result:
    """What the work gives, done on a thread that ends with it.

    For loading and probing a model that another thread will compute with. OpenMP keeps a team for every thread that
    ever used it; once the teams together have more threads than there are cores, none spins at a barrier any more, each
    sleeps, and waking up takes longer than the work between two barriers (libgomp, config/linux/wait.h:
    gomp_throttled_spin_count_var). A thread that ends takes its team along.
    """
    found: Future[Result] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    thread = threading.Thread(target=run, name="loading", daemon=True)  # daemon: Ctrl-C need not wait for it
    thread.start()
    thread.join()
    return found.result()


class LogHandler(logging.Handler):
    """What libraries and tracebacks say, as lines of the same log: nobody's text can look like a line of its own."""

    def __init__(self, log: RequestLog) -> None:
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log.write("log", level=record.levelname.lower(), logger=record.name, message=self.format(record))
