"""Sends the requests of one run, as fast as its load says, and looks at what is in flight all along.

Closed loop: so many clients, each waiting for its answer before it asks again; a slow server is asked less. Open loop:
by a schedule that was fixed before, whatever becomes of the answers; a slow server gets a queue. These are different
experiments, and every table says which it was.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from lab.client import Body, Client, Trace
from load import measures
from load.clock import new_loop

LOOK_S = 0.02  # between two looks at what is in flight
AWAKE_S = 0.001
MOST_OPENED = 64  # connections made before an open loop begins
OVERDUE_S = 10.0  # for so long at the least a load is given a chance
GROWN, AND_MORE = 1.5, 8  # in flight now against half way, and half way against a quarter: it will never settle


async def moment(due_s: float) -> None:
    """Wait until then. The last millisecond awake: a sleep ends late, by as much as a machine needs to wake up."""
    await asyncio.sleep(max(due_s - time.perf_counter() - AWAKE_S, 0))
    while time.perf_counter() < due_s:
        await asyncio.sleep(0)


class Talk(Protocol):
    """A conversation: the next request depends on the answer to the last one."""

    def opening(self) -> Body: ...

    def reply(self, answer: str) -> Body | None: ...


@dataclass
class Ran:
    """What a run left. samples: (when, how many were in flight). why: what ended it before its time, else None."""

    traces: list[Trace] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)
    start_s: float = 0.0
    end_s: float = 0.0
    cpu_s: float = 0.0
    why: str | None = None

    @property
    def interrupted(self) -> bool:
        return self.why == "interrupted"


class Drive:
    """One run. see(drive): called now and then while it runs, for whoever watches."""

    def __init__(self, client: Client, see: Callable[["Drive"], object] = lambda _drive: None) -> None:
        self.client, self.see = client, see
        self.found = Ran()
        self.flying = 0
        self.ending = False
        self.tasks: set[asyncio.Task] = set()

    # ---- loads

    async def closed(self, bodies: Iterable[Body | Talk], clients: int, seconds: float | None = None) -> Ran:
        """Until the bodies are used up, or for so many seconds. A conversation is one client's, from turn to turn."""
        left = iter(bodies)

        async def one() -> None:
            for body in left:
                if self.ending or (seconds and time.perf_counter() - self.found.start_s >= seconds):
                    return
                await (self.send(body, time.perf_counter()) if isinstance(body, dict) else self.talk(body))

        return await self.run([one] * clients, clients)

    async def open(self, bodies: Sequence[Body], dues_s: Sequence[float], rising: bool = False) -> Ran:
        """Each at its moment after the start. rising: the rate is to grow, so what is in flight may grow with it."""

        async def starter() -> None:
            sending = []
            for body, due_s in zip(bodies, dues_s, strict=True):
                due_s += self.found.start_s
                await moment(due_s)
                if self.ending:
                    break
                sending.append(self.spawn(self.send(body, due_s)))
            await asyncio.gather(*sending)

        return await self.run([starter], min(len(bodies), MOST_OPENED), watched=not rising)

    # ---- one run

    async def run(
        self, parts: Sequence[Callable[[], Awaitable[None]]], connections: int, watched: bool = False
    ) -> Ran:  # fmt: skip
        async with self.client:
            await self.client.open(connections)
            self.found.start_s, cpu_s = time.perf_counter(), time.process_time()
            looking = asyncio.create_task(self.look(watched))
            with self.told_to_end():
                ended = await asyncio.gather(*(self.spawn(part()) for part in parts), return_exceptions=True)
            looking.cancel()
            with suppress(asyncio.CancelledError):  # but not what went wrong in it
                await looking
            self.found.end_s, self.found.cpu_s = time.perf_counter(), time.process_time() - cpu_s
        for error in ended:
            if isinstance(error, Exception):  # not one that was cancelled: a fault of this program
                raise error
        self.see(self)
        return self.found

    def spawn(self, part: Awaitable[None]) -> asyncio.Task:
        task = asyncio.ensure_future(part)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def send(self, body: Body, due_s: float) -> Trace:
        self.flying += 1
        try:
            trace = await self.client.ask(body, due_s)
            self.found.traces.append(trace)
            return trace
        finally:
            self.flying -= 1

    async def talk(self, talk: Talk) -> None:
        body = talk.opening()
        while body is not None and not self.ending:
            trace = await self.send(body, time.perf_counter())
            if measures.error_of(trace) is not None:  # there is no answer to go on from
                return
            body = talk.reply("".join(text for _, text in trace.content))

    async def look(self, watched: bool) -> None:
        next_s = 0.0
        while True:
            await asyncio.sleep(LOOK_S)
            now_s = time.perf_counter()
            self.found.samples.append((now_s, self.flying))
            if now_s >= next_s:
                next_s = now_s + 0.25
                self.see(self)
                if watched and self.over_saturated(now_s):
                    self.end("over-saturated")

    def over_saturated(self, now_s: float) -> bool:
        """Whether ever more are in flight: what is measured from there on is the length of the run."""
        samples = self.found.samples
        if now_s - self.found.start_s < OVERDUE_S:
            return False
        quarter, half, last = (samples[len(samples) * part // 4 - 1][1] for part in (1, 2, 4))
        return last > GROWN * half + AND_MORE and half > GROWN * quarter

    def end(self, why: str) -> None:
        """What is in flight is given up; all that was measured is kept."""
        self.ending, self.found.why = True, self.found.why or why
        for task in list(self.tasks):
            task.cancel()

    @contextmanager
    def told_to_end(self):
        """The first Ctrl-C ends the run and keeps it; a second one is Python's own.

        So it is with SIGTERM where the script takes it for Ctrl-C; elsewhere that ends the process.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, numbers = asyncio.get_running_loop(), [signal.SIGINT]
        if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
            numbers.append(signal.SIGTERM)

        def pythons_own() -> None:
            for number in numbers:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.default_int_handler)

        def first() -> None:
            pythons_own()
            self.end("interrupted")

        for number in numbers:
            loop.add_signal_handler(number, first)
        try:
            yield
        finally:
            pythons_own()


def closed(client: Client, bodies: Iterable[Body], clients: int, seconds: float | None = None, **more) -> Ran:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(Drive(client, **more).closed(bodies, clients, seconds))


def opened(
    client: Client, bodies: Sequence[Body], dues_s: Sequence[float], *, rising: bool = False, **more
) -> Ran:  # fmt: skip
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(Drive(client, **more).open(bodies, dues_s, rising))
