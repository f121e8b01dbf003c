"""Day 2. Dynamic batching: whoever arrives within a short window is computed together.

A decode step reads every weight once, however many requests it serves. So requests are worth collecting: the first one
that waits opens a window; the batch leaves when it is full or when the window is over. Whoever came first leaves first.
The price is the waiting, and that a batch ends for all its members at once.

    python3 batcher.py                                   # requests arrive, batches form, one line each
    python3 batcher.py --rate 20 --max-batch-size 8      # a busier hour
    python3 batch_experiment.py                          # what it buys, and who pays
"""

from config import LONGEST_WINDOW_MS, ModelConfig, check_packages, knob

if __name__ == "__main__":
    check_packages()

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

log = logging.getLogger("batcher")
Generate = Callable[[list[Any]], Sequence[Any]]  # requests -> answers in the same order; an exception is an answer too


class QueueFull(Exception):
    """The queue holds max_queue requests already. The caller may try again later; nothing was enqueued."""


class BatcherClosed(Exception):
    """The batcher takes no more requests, or was closed without draining while this one waited."""


@dataclass(frozen=True)
class Waiting:
    """A request in the queue. number counts the submits; enqueued_s is the batcher's clock."""

    number: int
    request: Any
    future: Future
    enqueued_s: float


@dataclass(frozen=True)
class Batch:
    """A batch that ran. Moments are readings of the batcher's clock, in seconds.

    free_since_s: since when the worker had nothing to do. padding: positions that were computed for no request.
    refused: members whose own answer was an exception.
    """

    id: int
    members: tuple[int, ...]
    enqueued_s: tuple[float, ...]
    free_since_s: float
    started_s: float
    finished_s: float
    padding: int | None
    refused: int
    failed: str | None

    def queue_waits_s(self) -> list[float]:
        return [self.started_s - enqueued for enqueued in self.enqueued_s]

    def window_waits_s(self) -> list[float]:
        """The part of each wait during which a worker was free: the window's price. The rest is the load's."""
        return [self.started_s - max(enqueued, self.free_since_s) for enqueued in self.enqueued_s]

    def line(self) -> str:
        """One JSON object: what a log collector keeps of this batch."""
        return json.dumps(
            {
                "event": "batch",
                "batch": self.id,
                "size": len(self.members),
                "requests": self.members,
                "queue_wait_s": [round(wait, 6) for wait in self.queue_waits_s()],
                "window_wait_s": [round(wait, 6) for wait in self.window_waits_s()],
                "execution_s": round(self.finished_s - self.started_s, 6),
                "padding": self.padding,
                "refused": self.refused,
                "failed": self.failed,
            }
        )


class InFlight:
    """How many requests are inside, integrated over time: the batcher's own side of Little's law."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.lock = clock, threading.Lock()
        self.count, self.request_s, self.since = 0, 0.0, clock()

    def change(self, by: int) -> None:
        with self.lock:
            now = self.clock()
            self.request_s += self.count * (now - self.since)
            self.count, self.since = self.count + by, now


class DynamicBatcher:
    """Collects requests into batches and hands them to generate, one batch at a time, first come first served.

    generate(requests) returns one answer per request, in order; it runs on the batcher's own thread. If it raises, the
    members of that batch get the exception and the next batch runs. length(request) is what padding is counted in.

    start=False makes no thread. Then a thread of yours calls serve(), which returns after close(). With PyTorch on a
    CPU that should be the thread that computed before: every thread that computes gets its own OpenMP team, and two
    teams on the cores of one slow each other down, even in turn (benchmarks/batched_decode.py measures by how much).
    Tests and simulations, on a clock of their own, drive it by leaves_at() and run_next().
    """

    def __init__(
        self,
        generate: Generate,
        max_batch_size: int,
        max_wait_s: float = 0.010,
        max_queue: int = 256,
        *,
        length: Callable[[Any], int] | None = None,
        on_batch: Callable[[Batch], None] = lambda batch: log.info(batch.line()),
        clock: Callable[[], float] = time.perf_counter,
        start: bool = True,
    ) -> None:
        if max_batch_size < 1 or max_queue < 1 or not 0 <= max_wait_s <= threading.TIMEOUT_MAX:
            raise ValueError(
                "a batcher needs room for a request and a finite window of 0 s or more: "
                f"max_batch_size={max_batch_size}, max_queue={max_queue}, max_wait_s={max_wait_s}"
            )
        self.generate, self.length, self.on_batch, self.clock = generate, length, on_batch, clock
        self.max_batch_size, self.max_wait_s, self.max_queue = max_batch_size, max_wait_s, max_queue
        self.in_flight = InFlight(clock)
        self.waiting: deque[Waiting] = deque()
        self.changed = threading.Condition()  # guards waiting, submitted and closing
        self.submitted, self.batches, self.closing = 0, 0, False
        self.free_since_s = clock()
        self.ended = threading.Event()
        self.server: threading.Thread | None = None  # the thread that runs serve()
        self.thread = threading.Thread(target=self.serve, name="batcher", daemon=True) if start else None
        if self.thread:
            self.server = self.thread
            self.thread.start()

    # ---- callers

    def submit(self, request: Any) -> Future:
        """Enqueue; the future yields the answer or the failure of its batch. QueueFull, BatcherClosed.

        A future that is cancelled before its batch left is never computed.
        """
        future: Future = Future()
        with self.changed:
            if self.closing:
                raise BatcherClosed("this batcher is closed: submit to another one")
            if len(self.waiting) >= self.max_queue:
                raise QueueFull(f"{self.max_queue} requests wait already: try again later")
            self.in_flight.change(+1)
            self.waiting.append(Waiting(self.submitted, request, future, self.clock()))
            self.submitted += 1
            self.changed.notify()
        future.add_done_callback(self.settled)
        return future

    def settled(self, future: Future) -> None:
        """Runs once for every request, when it is answered, failed or cancelled. A cancelled one leaves the queue."""
        self.in_flight.change(-1)
        if not future.cancelled():
            return
        with self.changed:
            mine = [waiting for waiting in self.waiting if waiting.future is future]
            for waiting in mine:
                self.waiting.remove(waiting)
        if mine:  # else take() found it cancelled and has told those who wait for it
            future.set_running_or_notify_cancel()

    async def predict(self, request: Any) -> Any:
        """submit() for asyncio. Cancelling the task that awaits it cancels the request."""
        return await asyncio.wrap_future(self.submit(request))

    def close(self, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Take no more requests. drain: answer those that wait; else they fail with BatcherClosed.

        Returns whether the worker has ended. A batch that runs is never cut off, so without timeout_s this lasts as
        long as generate does. Called again, or from inside a batch, it does no harm.
        """
        self.refuse(waiting_too=not drain)
        with self.changed:
            driven = self.server is None  # nobody serves, and from here on nobody will
            self.server = self.server or threading.current_thread()
        if driven:
            while self.run_next():
                pass
            self.ended.set()
        elif self.server is not threading.current_thread():
            self.ended.wait(timeout_s)
            if self.thread and self.ended.is_set():
                self.thread.join()
        return self.ended.is_set()

    def refuse(self, waiting_too: bool) -> None:
        """Take no more requests; waiting_too: those in the queue fail as well."""
        with self.changed:
            self.closing = True
            dropped = list(self.waiting) if waiting_too else []
            if waiting_too:
                self.waiting.clear()
            self.changed.notify_all()
        for waiting in dropped:
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(BatcherClosed("the batcher was closed before this request's batch left"))

    def __enter__(self) -> "DynamicBatcher":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    # ---- the policy: when does a batch leave, and with whom?

    def leaves_at(self) -> float | None:
        """The moment at which a free worker takes the next batch if no one else comes; None while nobody waits."""
        if not self.waiting:
            return None
        first = self.waiting[0].enqueued_s
        if self.closing:  # nobody can join any more
            return first
        if len(self.waiting) < self.max_batch_size:
            return first + self.max_wait_s
        return min(first + self.max_wait_s, self.waiting[self.max_batch_size - 1].enqueued_s)

    def take(self) -> list[Waiting]:
        """The next batch, out of the queue. From here on its members cannot be cancelled."""
        taken: list[Waiting] = []
        while self.waiting and len(taken) < self.max_batch_size:
            first = self.waiting.popleft()
            if first.future.set_running_or_notify_cancel():
                taken.append(first)
        return taken

    # ---- the worker

    def serve(self) -> None:
        """Run batches on this thread until the batcher is closed and, where it drains, empty."""
        with self.changed:
            if self.ended.is_set():
                return
            if self.server not in (None, threading.current_thread()):
                raise RuntimeError("another thread serves this batcher already")
            self.server = threading.current_thread()
        try:
            while self.wait_until_due():
                self.run_next()
        finally:
            self.refuse(waiting_too=True)  # after Ctrl-C some still wait, and nobody would serve them
            self.ended.set()

    def wait_until_due(self) -> bool:
        """Sleep until a batch must leave; False when the batcher is closed and nobody waits."""
        with self.changed:
            while True:
                leaves_at = self.leaves_at()
                if leaves_at is None and self.closing:
                    return False
                wait_s = None if leaves_at is None else leaves_at - self.clock()
                if wait_s is not None and wait_s <= 0:
                    return True
                self.changed.wait(wait_s)

    def run_next(self) -> bool:
        """Run the next batch at once, whatever the window says. False when nobody waited."""
        taken: list[Waiting] = []
        try:
            with self.changed:
                taken = self.take()
            if taken:
                self.run(taken)
        finally:
            for waiting in taken:  # Ctrl-C may strike anywhere: nobody is left waiting for an answer that never comes
                if not waiting.future.done():
                    waiting.future.set_exception(BatcherClosed("interrupted while this request's batch ran"))
        return bool(taken)

    def run(self, taken: list[Waiting]) -> None:
        started, failed, interrupt = self.clock(), None, None
        try:
            answers = list(self.generate([waiting.request for waiting in taken]))
            if len(answers) != len(taken):
                raise RuntimeError(f"generate returned {len(answers)} answers for {len(taken)} requests")
        except BaseException as error:  # SystemExit too: the thread must live for the next batch
            answers, failed = [error] * len(taken), f"{type(error).__name__}: {error}"
            interrupt = error if isinstance(error, KeyboardInterrupt) and self.thread is None else None
        finished = self.clock()
        for waiting, answer in zip(taken, answers, strict=True):
            if isinstance(answer, BaseException):
                waiting.future.set_exception(answer)
            else:
                waiting.future.set_result(answer)
        refused = [isinstance(answer, Exception) and failed is None for answer in answers]
        self.report(taken, started, finished, failed, refused)
        self.free_since_s = self.clock()
        if interrupt:  # Ctrl-C reaches the main thread only, and there it belongs to whoever called serve()
            raise interrupt

    def report(
        self, taken: list[Waiting], started: float, finished: float, failed: str | None, refused: list[bool]
    ) -> None:
        try:
            computed = [waiting for waiting, out in zip(taken, refused, strict=True) if not out]
            lengths = [self.length(waiting.request) for waiting in computed] if self.length else []
            batch = Batch(
                id=self.batches,
                members=tuple(waiting.number for waiting in taken),
                enqueued_s=tuple(waiting.enqueued_s for waiting in taken),
                free_since_s=self.free_since_s,
                started_s=started,
                finished_s=finished,
                padding=len(lengths) * max(lengths) - sum(lengths) if lengths else None,
                refused=sum(refused),
                failed=failed,
            )
            self.batches += 1
            self.on_batch(batch)
        except Exception:  # a log that fails must not stop the batches
            log.exception("the batch was answered, but its log line failed")


# ---- a small live demonstration


@dataclass(frozen=True)
class DemoConfig(ModelConfig):
    max_batch_size: int = knob(4, "requests in a batch at most", least=1)
    max_wait_ms: float = knob(
        10.0, "the window: how long the first request waits for others", least=0.0, most=LONGEST_WINDOW_MS
    )
    requests: int = knob(12, "requests that arrive", least=1, quick=6)
    rate: float = knob(3.0, "requests per second, at random moments (Poisson)", least=0.01, most=1e6)
    max_new_tokens: int = knob(16, "new tokens of each request at most", least=1, quick=8)
    json: bool = knob(False, "print the structured log lines instead, one JSON object a batch")


def main(argv: list[str] | None = None) -> int:
    config = DemoConfig.from_cli(__doc__, argv)
    from lab.arrivals import OpenLoop, schedule  # here: they load torch, which the batcher itself can do without
    from lab.prompts import questions
    from model import generate_batch, load_pair

    model, tokenizer = load_pair(config)
    prompts = [tokenizer.encode(question) for question in islice(cycle(questions()), config.requests)]
    stops = model.stops(ignore_eos=False)

    def generate(batch: list[list[int]]) -> Sequence[Any]:
        return generate_batch(
            model, batch, max_new_tokens=config.max_new_tokens, eos_ids=stops, pad_id=tokenizer.pad_id
        )

    generate(prompts[: config.max_batch_size])  # the cold one, before the clock starts
    start = time.perf_counter()

    def say(text: str) -> None:
        print(text if config.json else f"{time.perf_counter() - start:7.3f} s  {text}", flush=True)

    def send(number: int) -> Future:
        if not config.json:
            say(f"request {number} arrives: {len(prompts[number])} tokens")
        return batcher.submit(prompts[number])

    batcher = DynamicBatcher(
        generate,
        config.max_batch_size,
        config.max_wait_ms / 1e3,
        max_queue=config.requests,
        length=len,
        on_batch=lambda batch: say(batch.line() if config.json else told(batch)),
        start=False,
    )
    with OpenLoop(schedule("poisson", config.requests, config.rate, config.seed), send, then=batcher.close) as users:
        batcher.serve()
    return show_answers(config, model, tokenizer, users.futures)


def told(batch: Batch) -> str:
    """A batch in one line for people."""
    waits = ", ".join(f"{wait:.3f}" for wait in batch.queue_waits_s())
    return (
        f"batch {batch.id} is done: requests {', '.join(map(str, batch.members))}; waited {waits} s (window "
        f"{max(batch.window_waits_s()):.3f}); ran {batch.finished_s - batch.started_s:.3f} s; {batch.padding} padding"
        + (f"; FAILED {batch.failed}" if batch.failed else "")
    )


def show_answers(config: DemoConfig, model: Any, tokenizer: Any, futures: list[Future]) -> int:
    """Each request's own answer, or why it has none."""
    if not config.json and not model.timing_only:
        print()
        for number, future in enumerate(futures):
            answer = future.exception() or json.dumps(tokenizer.decode(future.result()), ensure_ascii=False)
            print(f"request {number}: {answer}")
    return 0


if __name__ == "__main__":
    from lab import console

    console.run(main)
