"""The engine on a thread of its own, behind a face that a process of its own could have too.

The event loop asks (submit, cancel) and is told (tokens, ends); neither ever waits for the other. After each step, what
it brought is handed to the loop in one call: tokens are collected per step, not per request.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.answer import Answer
from engine.engine import Engine
from engine.request import Choice, Sampling, StepFailed

IDLE_S = 1.0  # an idle engine looks around that often: whether it is to end


@dataclass(eq=False)
class Stream:
    """One answer on its way to the event loop. changed: set when there is something new, tokens or the end."""

    answer: Answer
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    fresh: list[Choice] = field(default_factory=list)  # choices that nobody has taken yet
    done: bool = False

    def take(self) -> list[Choice]:
        """What has come since the last call."""
        self.changed.clear()
        fresh, self.fresh = self.fresh, []
        return fresh


class Bridge:
    """make: a new engine with nothing in it. One Bridge has one engine at a time, and one thread that drives it.

    The loop's side: submit(), cancel(), the figures. The engine's side: everything under "in the engine's thread".
    """

    def __init__(self, make: Callable[[], Engine], clock: Callable[[], float] = time.monotonic) -> None:
        self.make, self.clock = make, clock
        self.engine = make()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.wake = threading.Event()
        self.ending = False
        self.news: list[tuple[Stream, Choice | None]] = []
        self.progress_s = clock()  # when the engine last ended a step, or had nothing to do
        self.working = False
        self.restarts = 0
        self.ready = True  # False while an engine is being replaced
        self.on_step: Callable[[Engine], Any] = lambda _engine: None  # called in the engine's thread, after every step
        self.thread = threading.Thread(target=self.drive, name="engine", daemon=True)

    # ---- in the event loop

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def submit(self, prompt: Sequence[int], sampling: Sampling, n: int = 1, salt: str = "") -> list[Stream]:
        """n answers to one prompt. Refusal when it can never be served."""
        streams: dict[int, Stream] = {}

        def listener(answer: Answer, choice: Choice | None) -> None:
            self.news.append((streams[answer.request.number], choice))

        engine = self.engine
        answers = engine.prepared_many(prompt, sampling, n, salt=salt, listener=listener)
        streams |= {answer.request.number: Stream(answer) for answer in answers}
        engine.queue(answers)
        self.wake.set()
        return list(streams.values())

    def cancel(self, streams: Sequence[Stream]) -> None:
        """Give up what is not done. It holds nothing any more before the next step."""
        for stream in streams:
            if not stream.done:
                stream.answer.cancel()
        self.wake.set()

    def stop(self, patience_s: float = 5.0) -> bool:
        """End the thread, and with it all that it computes. False when it does not react: it hangs in a step."""
        self.ending = True
        self.wake.set()
        self.thread.join(patience_s)
        return not self.thread.is_alive()

    def stalled_s(self) -> float:
        """For how long a step that should end has not; 0 while nothing is to be done."""
        return self.clock() - self.progress_s if self.working else 0.0

    def deliver(self, news: list[tuple[Stream, Choice | None]]) -> None:
        for stream, choice in news:
            if choice is None:
                stream.done = True
            else:
                stream.fresh.append(choice)
            stream.changed.set()

    # ---- in the engine's thread

    def drive(self) -> None:
        while not self.ending:
            self.progress_s, self.working = self.clock(), True
            try:
                busy = self.engine.step()
            except Exception as error:  # not the forward pass, which fails its own requests: the house itself is broken
                self.replace_engine(error)
                busy = True
            self.progress_s, self.working = self.clock(), False
            self.on_step(self.engine)
            if self.news:
                news, self.news = self.news, []
                self.loop.call_soon_threadsafe(self.deliver, news)
            if not busy:
                self.wake.wait(IDLE_S)
                self.wake.clear()

    def replace_engine(self, error: Exception) -> None:
        """A new engine. Who was being computed is told the error; who only waited goes on in the new one."""
        self.ready = False
        old, self.engine = self.engine, self.make()
        self.restarts += 1
        for request, answer in list(old.answers.items()):
            if request in old.scheduler.waiting and not request.preemptions:
                self.engine.adopt(answer)
            else:
                request.error = StepFailed(f"the engine failed ({type(error).__name__}: {error})")
                old.finish(answer, "error", old.clock())
        self.ready = True
