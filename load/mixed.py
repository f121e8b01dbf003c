"""A mixed load, as strangers make it: chats and completions, streams and whole answers, those who leave, and nonsense.

An open loop: each visit at its own moment, whatever becomes of the others. What everybody wanted, and what became of
it, is kept by kind, so that the visitors' books can be laid beside the service's own.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count, takewhile
from string import ascii_lowercase
from typing import Any

import orjson

from lab.arrivals import moments
from lab.client import INTERRUPTED, Body, Client, Trace
from lab.wire import connected
from load.texts import about

CHAT, COMPLETIONS, NOWHERE = "/v1/chat/completions", "/v1/completions", "/v1/answers"
LEAVERS, NONSENSE, STREAMS, CHATS, TWINS, SHARED, WARM = 0.2, 0.05, 0.6, 0.5, 0.1, 0.3, 0.3  # shares of all visits
SHORTEST, LONGEST = 16, 240  # characters of a prompt
PREFIX = 100  # characters of a shared beginning
WORDS = 40  # of a talker's prompt
LEAST_STAY_S = 0.002
TIMEOUT_S = 120.0
IDLE = 4  # connections that never ask for anything
WRONG_KEY = "sk-somebody-else"
Door = tuple[str, str]  # path, key


@dataclass(frozen=True)
class Visit:
    """due_s: since the beginning. kind: stream, whole, nonsense, leaver. stays_s: of a leaver. expects: the status."""

    due_s: float
    kind: str
    door: Door
    body: Any
    expects: int = 200
    stays_s: float | None = None
    rush: bool = False  # part of an overload: it may be refused


# What is wrong, and the status that says so. A Fragment is written as it stands.
WRONG: tuple[tuple[Any, int], ...] = (
    (orjson.Fragment(b'{"model": '), 400),
    ({"temperature": 3}, 400),
    ({"max_tokens": 0}, 400),
    ({"max_tokens": 10_000_000}, 400),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400),
    ({"what_is_this": 1}, 400),
    ({"top_p": "much"}, 400),
    ({"model": "nobody"}, 404),
)


class Visitors:
    """Makes visits. longest_new: tokens of an answer, at most. usual_s: what one takes; who leaves has left by then."""

    def __init__(self, model: str, keys: Sequence[str], longest_new: int, seed: int) -> None:
        self.model, self.keys, self.longest_new, self.seed = model, list(keys), longest_new, seed
        self.numbers = count()
        self.usual_s, self.spoken = 0.1, 0

    def lap(self, number: int, rate: float, seconds: float, rush: bool = False) -> list[Visit]:
        """Poisson arrivals for so long; another number, other arrivals and other visitors."""
        dice = random.Random(f"{self.seed} {number} {rush}")
        dues = takewhile(lambda due: due < seconds, moments("poisson", rate, dice.randrange(2**31)))
        return [self.visit(dice, due, rush) for due in dues]

    def stayers(self) -> Iterator[Visit]:
        """Those who ask sensibly and stay, without an end: for measuring what can be done."""
        dice = random.Random(f"{self.seed} stayers {next(self.numbers)}")
        while True:
            yield self.sensible(dice, 0.0, False)

    def talkers(self) -> Iterator[Visit]:
        """Those who use words that nobody has used before, without an end. spoken: how many there were."""
        dice = random.Random(f"{self.seed} talkers")
        while True:
            text = " ".join("".join(dice.choices(ascii_lowercase, k=6)) for _ in range(WORDS))
            self.spoken += WORDS
            body = {"model": self.model, "prompt": text, "max_tokens": 2, "ignore_eos": True}
            yield Visit(0.0, "whole", (COMPLETIONS, dice.choice(self.keys)), body)

    def visit(self, dice: random.Random, due_s: float, rush: bool) -> Visit:
        chance = dice.random()
        if chance < NONSENSE:
            return self.nonsense(dice, due_s, rush)
        one = self.sensible(dice, due_s, rush)
        if chance >= NONSENSE + LEAVERS:
            return one
        stays_s = max(dice.uniform(0, self.usual_s), LEAST_STAY_S)
        long = one.body | {"max_tokens": self.longest_new}  # so that few are answered before they leave
        return Visit(due_s, "leaver", one.door, long, stays_s=stays_s, rush=rush)

    def sensible(self, dice: random.Random, due_s: float, rush: bool) -> Visit:
        chat, stream = dice.random() < CHATS, dice.random() < STREAMS
        body: Body = {
            "model": self.model, **self.asked(dice, chat), "max_tokens": dice.randint(2, self.longest_new),
            "stream": stream, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        if dice.random() < WARM:
            body |= {"temperature": 0.8, "seed": dice.randrange(1000)}
        if dice.random() < TWINS:
            body["n"] = 2
        door = (CHAT if chat else COMPLETIONS, dice.choice(self.keys))
        return Visit(due_s, "stream" if stream else "whole", door, body, rush=rush)

    def asked(self, dice: random.Random, chat: bool) -> Body:
        """A text of its own, or one of three beginnings with an end of its own."""
        number, size = next(self.numbers), round(SHORTEST * (LONGEST / SHORTEST) ** dice.random())
        own = f"{self.seed}-{number:x} {about('', f'{self.seed} {number}', size)}"[:size]
        shared = dice.random() < SHARED
        text = about("", f"beginning {dice.randrange(3)}", PREFIX)[:PREFIX] + own if shared else own
        return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}

    def nonsense(self, dice: random.Random, due_s: float, rush: bool) -> Visit:
        one, choice = self.sensible(dice, due_s, rush), dice.randrange(len(WRONG) + 2)
        (path, key), body, expects = one.door, one.body, 0
        if choice == len(WRONG):
            key, expects = WRONG_KEY, 401
        elif choice > len(WRONG):
            path, expects = NOWHERE, 404
        else:
            wrong, expects = WRONG[choice]
            body = body | wrong if isinstance(wrong, dict) else wrong
        return Visit(due_s, "nonsense", (path, key), body, expects, rush=rush)


@dataclass
class Lap:
    """What became of some visits. doubtful: requests sent again because their connection had been closed meanwhile, so
    that nobody knows whether the first one arrived.
    """

    ended: list[tuple[Visit, Trace]] = field(default_factory=list)
    start_s: float = 0.0

    @property
    def doubtful(self) -> int:
        return sum(trace.attempts - 1 for _, trace in self.ended)

    async def run(self, url: str, visits: Sequence[Visit]) -> None:
        """All of them, each at its moment. Leaving early, by Ctrl-C, keeps what has ended."""
        flying: set[asyncio.Task] = set()
        async with AsyncExitStack() as stack:
            doors = Doors(url, stack)
            idle = [await connected((await doors.client((CHAT, ""))).place) for _ in range(IDLE)]
            self.start_s = time.perf_counter()
            try:
                for one in visits:
                    await asyncio.sleep(max(self.start_s + one.due_s - time.perf_counter(), 0))
                    task = asyncio.create_task(self.send(await doors.client(one.door), one))
                    flying.add(task)
                    task.add_done_callback(flying.discard)
                await asyncio.gather(*flying)
            finally:
                for task in list(flying):
                    task.cancel()
                await asyncio.gather(*flying, return_exceptions=True)
                for wire in idle:
                    wire.transport.close()

    async def send(self, client: Client, one: Visit) -> None:
        due_s = self.start_s + one.due_s
        asking = asyncio.create_task(client.ask(one.body, due_s))
        try:
            if one.stays_s is not None:
                await asyncio.wait({asking}, timeout=one.stays_s)
                asking.cancel()
            trace = await asking
        except asyncio.CancelledError:
            asking.cancel()
            trace = await asking
        self.ended.append((one, trace))


class Doors:
    """A client for every path and key, opened when it is first needed."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url, self.stack = url, stack
        self.clients: dict[Door, Client] = {}

    async def client(self, door: Door) -> Client:
        if door not in self.clients:
            path, key = door
            authorised = {"Authorization": f"Bearer {key}"} if key else {}
            client = Client(self.url + path, authorised, TIMEOUT_S)
            self.clients[door] = await self.stack.enter_async_context(client)
        return self.clients[door]


async def busy(url: str, visits: Iterator[Visit], clients: int, seconds: float) -> tuple[float, int]:
    """(visits a second that so many clients get through in so long, each of them always waiting for an answer; how many
    requests had to be sent again because a connection had been closed).
    """
    end_s, done, doubtful = time.perf_counter() + seconds, 0, 0

    async def one(doors: Doors) -> None:
        nonlocal done, doubtful
        while time.perf_counter() < end_s:
            visit = next(visits)
            trace = await (await doors.client(visit.door)).ask(visit.body)
            done += trace.complete and time.perf_counter() <= end_s
            doubtful += trace.attempts - 1

    async with AsyncExitStack() as stack:
        doors = Doors(url, stack)
        await asyncio.gather(*(one(doors) for _ in range(clients)))
    return done / seconds, doubtful


def became(one: Visit, trace: Trace) -> str:
    """In a word: answered, refused (there was no room), left, turned away (as it should be), or what went wrong."""
    if trace.error == INTERRUPTED:
        return "left"
    if trace.error is not None:
        return f"failed: {trace.error.partition(':')[0]}"
    if one.kind == "nonsense" and trace.status == one.expects:
        return "turned away"
    if trace.status == 503:
        return "refused"
    if trace.complete and one.expects == 200:
        return "answered"
    return f"failed: {trace.status} where {one.expects} was due"
