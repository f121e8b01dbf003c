"""The engine on a thread of its own, behind a face that a process of its own could have too.

The event loop asks (submit, cancel) and is told when there is something new; neither waits for the other. What a step
brought is handed to the loop in one call: news is collected per step, not per token. The loop is told when the next
step's arithmetic begins, which needs no Python: told before, it would take the interpreter's lock (the GIL) from the
planning of that step.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from engine.answer import Answer
from engine.engine import Engine, StepTimes
from engine.request import Choice, Request, Sampling, Status, StepFailed
from service.foretelling import Seat
from service.quarantine import Quarantine, shown

LOG = logging.getLogger(__name__)
SOONEST_S, LATEST_S = 0.01, 1.0  # between two engines that fail one after the other
STEPS_KEPT = 1_000
IDLE_S = 1.0  # an idle engine looks around that often: whether it is to end


@dataclass(eq=False)
class Stream:
    """The answers to one prompt, on their way to the event loop. changed: set when there is something new, or an end;
    when_done: called at the end.

    why: the reason for giving it up, for the ledger of waste. fingerprint: of its input, where that is of interest.
    """

    answers: list[Answer] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = "disconnect"
    fingerprint: bytes = b""
    when_done: Callable[[], object] = lambda: None

    @property
    def done(self) -> bool:
        return all(answer.done for answer in self.answers)

    @property
    def started(self) -> bool:
        """Whether the engine has begun to compute it."""
        return bool(self.answers) and self.answers[0].request.timeline.admitted is not None

    @property
    def delivered(self) -> int:
        """New tokens so far, of all answers."""
        return sum(len(answer.choices) for answer in self.answers)

    def seats(self) -> list[Seat]:
        """Of the answers that the engine has. Those that follow the first come to its queue when that has a token."""
        there = self.answers[: 1 if self.answers[0].followers else None]
        return [seat_of(answer.request) for answer in there if not answer.done]

    def ended(self) -> list[tuple[int, bool]]:
        """Of answers that have new tokens and end now: how many, and whether they might have had more."""
        requests = [answer.request for answer in self.answers if answer.choices]
        return [(len(request.answer), request.finish_reason != "length") for request in requests]

    def found(self) -> int | None:
        """Tokens of the prompt that were in the prefix cache when the engine began; None before that."""
        return self.answers[0].request.reused if self.started else None


def seat_of(request: Request) -> Seat:
    """As the foretelling wants it. In the middle of a step, what the step began with."""
    known, prompt = len(request.tokens), len(request.prompt)
    return Seat(
        max(known - request.computed, 1), known - prompt, request.sampling.max_new_tokens, known,
        request.status is Status.RUNNING,
    )  # fmt: skip


def hear(news: Iterable[Stream]) -> None:
    """In the event loop: of these streams there is something new."""
    for stream in news:
        stream.changed.set()
        if stream.done:
            stream.when_done()


class Area:
    """How many there are, integrated over time: counted up and down as they come and go, in whatever thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.lock = clock, threading.Lock()
        self.count, self.sum_s, self.since_s = 0, 0.0, clock()

    def change(self, by: int) -> None:
        with self.lock:
            now_s = self.clock()
            self.sum_s += self.count * (now_s - self.since_s)
            self.count, self.since_s = self.count + by, now_s

    def area_s(self, now_s: float) -> float:
        with self.lock:
            return self.sum_s + self.count * (now_s - self.since_s)


@dataclass(frozen=True)
class State:
    """What the engine looks like now. kv_held: blocks that requests hold."""

    waiting: int = 0
    running: int = 0
    kv_held: int = 0
    kv_blocks: int = 0


class Bridge:
    """make: a new engine with nothing in it. One Bridge has one engine at a time, and one thread that drives it.

    The loop's side: submit(), cancel(), stop() and what can be read. The engine's side: everything under "in the
    engine's thread". watch: called there after every step with the engine and, unless there was nothing to do, the
    step's times.
    """

    def __init__(
        self, make: Callable[[], Engine], clock: Callable[[], float] = time.perf_counter,
        quarantine: Quarantine | None = None,
    ) -> None:  # fmt: skip
        self.make, self.clock = make, clock
        self.quarantine = quarantine or Quarantine(0, clock)
        self.engine = self.new_engine()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.wake = threading.Event()
        self.pause_s = 0.0  # before the next step: an engine that fails at once is not replaced in a hot loop
        self.swap = threading.Lock()  # held while an engine is asked, or replaced by another one
        self.ending = self.dropping = False
        self.news: set[Stream] = set()
        self.progress_s = clock()  # when the engine last began or ended a step
        self.working = False
        self.ready = True  # False while an engine is being replaced
        self.no_engine: str | None = None  # why it cannot be replaced, while that lasts
        self.restarts = 0
        self.past: Counter[str] = Counter()  # the counts of engines that were replaced
        self.wasted: Counter[str] = Counter()  # tokens computed for nobody, by reason
        self.in_house = Area(clock)  # answers that the engine has
        self.unfinished: dict[Answer, Stream] = {}  # the same ones
        self.failed: dict[Exception, list[bytes]] = {}  # passes that failed in this step -> whose inputs were in them
        self.residence_s = 0.0  # of those that have ended, from their own stamps
        self.useful = 0  # tokens computed for answers that were wanted to the end
        self.watch: Callable[[Engine, StepTimes | None], object] = lambda _engine, _times: None
        self.thread = threading.Thread(target=self.drive, name="engine", daemon=True)

    # ---- in the event loop

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, n: int = 1, salt: str = "", fingerprint: bytes = b""
    ) -> Stream:
        """n answers to one prompt. Refusal when it can never be served."""
        stream = Stream(fingerprint=fingerprint)

        def listener(answer: Answer, choice: Choice | None) -> None:
            self.news.add(stream)
            if choice is None:
                self.close_books(answer, stream)

        with self.swap:
            stream.answers = self.engine.prepared_many(prompt, sampling, n, salt=salt, listener=listener)
            self.unfinished |= dict.fromkeys(stream.answers, stream)
            self.set_apart(stream.answers, self.quarantine.suspected(fingerprint))
            self.in_house.change(n)
            self.engine.queue(stream.answers)
        self.wake.set()
        return stream

    def cancel(self, stream: Stream, why: str = "disconnect") -> None:
        """Give up what is not done. It holds nothing any more before the next step."""
        stream.why = why
        with self.swap:
            for answer in stream.answers:
                if not answer.done:
                    answer.cancel()
        self.wake.set()

    def drop_cache(self) -> None:
        """Give back what no request holds, before the next step."""
        self.dropping = True
        self.wake.set()

    def stop(self, patience_s: float = 5.0) -> bool:
        """End the thread, and with it all that it computes. False when it does not react: it hangs in a step."""
        self.ending = True
        self.wake.set()
        if self.thread.is_alive():
            self.thread.join(patience_s)
        return not self.thread.is_alive()

    def stalled_s(self) -> float:
        """For how long the present step has been computed; 0 while nothing is to be done."""
        return self.step_age_s() or 0.0

    def step_age_s(self) -> float | None:
        """The same; None while nothing is computed."""
        return self.clock() - self.progress_s if self.working else None

    def progress_at(self) -> float:
        """When the engine last began or ended a step, as a time of day."""
        return time.time() - (self.clock() - self.progress_s)

    def count(self, name: str) -> int:
        """One of the engine's counts, of all engines so far."""
        with self.swap:  # in the middle of a replacement the old engine's would count twice
            return self.past[name] + self.engine.counts[name]

    # ---- in the engine's thread

    def drive(self) -> None:
        while not self.ending:
            self.progress_s, self.working = self.clock(), True
            self.drop_if_told()
            busy = self.step()
            self.progress_s, self.working = self.clock(), False
            if not busy:
                self.tell()
                self.wake.wait(IDLE_S)
                self.wake.clear()

    def drop_if_told(self) -> None:
        if self.dropping:
            self.dropping = False
            try:
                self.engine.drop_cache()
            except Exception:  # it would have been a help, and is no duty
                LOG.exception("the engine's cache could not be given back")

    def step(self) -> bool:
        """One step. After one that failed as a whole, the engine is replaced: nobody knows in what state it is."""
        try:
            busy = self.engine.step()
        except Exception as error:  # not in the forward pass, whose requests are told: in the engine itself
            self.fail_running(error)
            self.blame(well=0, apart=False)
            self.tell()
            self.replace_engine()
            self.pause_s = min(max(2 * self.pause_s, SOONEST_S), LATEST_S)
            time.sleep(self.pause_s)
            return True
        self.pause_s = 0.0
        try:
            self.watch(self.engine, self.engine.steps[-1] if busy else None)
        except Exception:  # who only watches must not stop the work
            LOG.exception("the engine's step could not be watched")
        if self.engine.counts["failed_steps"]:
            self.blame(well=self.engine.steps[-1].requests - sum(map(len, self.failed.values())))
            self.tell()  # before: a new engine may take long
            self.replace_engine()
        elif busy:
            self.quarantine.went_well()
        self.failed.clear()
        return busy

    def blame(self, well: int, apart: bool = True) -> None:
        """Those whose inputs were in passes that failed. well: how many others of the same step did not fail. apart:
        whether suspects had passes of their own.
        """
        if not self.quarantine.on:
            return
        if well:
            self.quarantine.went_well()
        with self.swap:
            for found in self.quarantine.blame(list(self.failed.values()), apart):
                LOG.error("input %s failed the engine again: it is quarantined", shown(found))
            for answer, stream in self.unfinished.items():
                self.set_apart([answer], self.quarantine.suspected(stream.fingerprint))
        self.failed.clear()

    def set_apart(self, answers: Sequence[Answer], suspected: bool) -> None:
        for answer in answers:
            answer.request.alone = suspected

    def tell(self) -> None:
        """What is new since the last time, to the loop."""
        if not self.news:
            return
        news, self.news = self.news, set()
        try:
            self.loop.call_soon_threadsafe(hear, news)
        except RuntimeError:  # the loop has ended: nobody is there to be told
            self.ending = True

    def new_engine(self) -> Engine:
        engine = self.make()
        engine.before_compute = self.tell
        engine.steps = deque(maxlen=STEPS_KEPT)  # it runs for weeks, and the last one is what is looked at
        return engine

    def fail_running(self, error: Exception) -> None:
        engine, why = self.engine, StepFailed(f"the engine failed ({type(error).__name__}: {error})")
        why.__cause__ = error  # close_books() asks whether it was a lack of memory
        for request in list(engine.scheduler.running):
            request.error = why
            engine.finish(engine.answers[request], "error", engine.clock())

    def replace_engine(self) -> None:
        """A new engine on the same network. Whom the failure did not concern goes on in it."""
        self.ready = False
        old, new = self.engine, self.engine_at_last()
        if new is None:
            return
        with self.swap:
            old.hand_over_to(new)
            self.past += Counter(old.counts)
            self.engine = new
            self.restarts += 1
        self.ready = True

    def engine_at_last(self) -> Engine | None:
        """A new engine, however often it takes to get one; None when the bridge is to end meanwhile."""
        pause_s = SOONEST_S
        while not self.ending:
            try:
                new = self.new_engine()
            except Exception as error:  # a lack of memory passes, and a thread that ends helps nobody
                LOG.exception("no new engine could be made; the next try is in %.2f s", pause_s)
                self.no_engine = type(error).__name__
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LATEST_S)
            else:
                self.no_engine = None
                return new
        return None

    def close_books(self, answer: Answer, stream: Stream) -> None:
        """Whose tokens were for nothing, and why."""
        request = answer.request
        self.unfinished.pop(answer, None)
        if isinstance(request.error, StepFailed) and not isinstance(request.error.__cause__, MemoryError):
            self.failed.setdefault(request.error, []).append(stream.fingerprint)
        self.in_house.change(-1)
        self.residence_s += request.timeline.finished - request.timeline.arrived
        ended_well = request.finish_reason in ("stop", "length")
        useful = min(request.spent, request.computed - request.reused) if ended_well else 0
        self.useful += useful
        if request.spent > useful:
            reason = "preempt" if ended_well else stream.why if request.finish_reason == "cancelled" else "engine_error"
            self.wasted[reason] += request.spent - useful

    def seen(self) -> State:
        """As it is now, in the middle of a step too; for any thread."""
        scheduler = self.engine.scheduler
        blocks = scheduler.blocks
        return State(
            len(scheduler.waiting), len(scheduler.running), blocks.count - len(blocks.free), blocks.count,
        )  # fmt: skip
