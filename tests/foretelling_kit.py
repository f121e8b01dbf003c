"""A house without sockets and without waiting: the real admission, scheduler and engine on a clock that a law moves.

Every step costs what a hidden law says, with noise; requests arrive in the middle of steps, as they do. Nothing here
knows the service's own idea of what a step costs.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.engine import Engine
from engine.kv_blocks import Blocks
from engine.request import Choice, Sampling
from engine.scheduler import Scheduler
from service.admission import Admission, Limits, Ticket
from service.bridge import Stream
from service.errors import ApiError
from service.rates import Rates

SLOTS, QUEUED, BUDGET = 16, 32, 512
END = 1  # the token that ends an answer


@dataclass
class Wish:
    """Somebody who comes. length: new tokens after which the answer would end by itself."""

    due_s: float
    prompt: int
    most: int
    length: int


class Law:
    """What a step costs: not quite the straight line that the service believes in, and noisy."""

    def __init__(self, seed: int, noise: float = 0.08, slower: Callable[[float], float] = lambda _: 1.0) -> None:
        self.dice, self.noise, self.slower = random.Random(seed), noise, slower

    def step_s(self, slices: Sequence, now_s: float) -> float:
        prompts = sum(part.count for part in slices if part.count > 1)
        read = sum(part.start + part.count for part in slices)
        exact = 0.02 + 0.004 * len(slices) ** 0.9 + prompts / 600 + prompts**2 * 3e-7 + 4e-6 * read
        hiccup = 3.0 if self.dice.random() < 0.005 else 1.0
        return exact * self.slower(now_s) * hiccup * self.dice.lognormvariate(0, self.noise)


class Town:
    """clock() is the time of everything. Runs until everybody who was let in has been served."""

    def __init__(self, wishes: Sequence[Wish], law: Law, rates: Rates, budget: int = BUDGET) -> None:
        self.now_s, self.law, self.coming = 0.0, law, sorted(wishes, key=lambda wish: wish.due_s)
        self.begun_s: float | None = None
        self.lengths: dict = {}
        scheduler = Scheduler(Blocks(10_000, reuse=False), max_running=SLOTS, max_tokens=budget)
        self.engine = Engine(self, scheduler, eos_ids=frozenset({END}), clock=self.clock)
        rates.clock = self.clock
        limits = Limits(SLOTS, QUEUED, 10**6, 60.0, step_tokens=budget)
        self.admission = Admission(limits, rates, lambda: 1.0, clock=self.clock)
        self.admission.foreteller.step_age_s = lambda: None if self.begun_s is None else self.now_s - self.begun_s
        self.waits: list[tuple[float, float, float]] = []  # (when it came, foretold, real)
        self.refused = 0

    def clock(self) -> float:
        return self.now_s

    def run(self, slices: Sequence) -> list:
        """The engine's runner: whoever comes meanwhile is asked in at his time."""
        self.begun_s, end_s = self.now_s, self.now_s + self.law.step_s(slices, self.now_s)
        self.let_come(end_s)
        self.now_s = end_s
        return [self.next_token(part) for part in slices]

    def next_token(self, part) -> Choice | None:
        if not part.last:
            return None
        done = len(part.request.tokens) - len(part.request.prompt) + 1
        return Choice(END if done >= self.lengths[part.request] else 5)

    def forget(self, request) -> None:
        pass

    def let_come(self, until_s: float) -> None:
        while self.coming and self.coming[0].due_s <= until_s:
            wish = self.coming.pop(0)
            self.now_s = max(self.now_s, wish.due_s)
            self.admission.at_door = sum(other.due_s == wish.due_s for other in self.coming[:QUEUED])
            self.ask(wish)
            self.admission.at_door = 0

    def ask(self, wish: Wish) -> None:
        try:
            ticket = self.admission.enter(
                answers=1, prompt_tokens=wish.prompt, new_tokens=wish.most, deadline_s=600.0
            )  # fmt: skip
        except ApiError:
            self.refused += 1
            return
        came_s, stream = self.now_s, Stream()

        def listener(answer, choice) -> None:
            if choice is None:
                self.waits.append((came_s, ticket.predicted_s, answer.request.timeline.tokens[0] - came_s))
                self.leaving.append(ticket)

        answer = self.engine.submit([7] * wish.prompt, Sampling(max_new_tokens=wish.most), listener=listener)
        self.lengths[answer.request] = wish.length
        stream.answers = [answer]
        ticket.progress = stream

    def live(self) -> list[tuple[float, float, float]]:
        """(when he came, the wait that was foretold, the real one) of everybody who was let in."""
        self.leaving: list[Ticket] = []
        while True:
            if self.engine.step():
                times = self.engine.steps[-1]
                self.begun_s = None
                self.admission.rates.learn(times.tokens, times.requests, times.end - times.start, times.context)
                for ticket in self.leaving:
                    self.admission.leave(ticket)
                self.leaving.clear()
            elif self.coming:
                self.let_come(self.coming[0].due_s)
            else:
                return self.waits


def crowd(seed: int, count: int, per_s: float, start_s: float = 0.0) -> list[Wish]:
    """Prompts of 8 to 384 tokens, answers of at most 16 to 96; six in ten end before that. Poisson arrivals."""
    dice, due_s, found = random.Random(seed), start_s, []
    for _ in range(count):
        due_s += dice.expovariate(per_s) if per_s else 0.0
        most = dice.choice((16, 32, 64, 96))
        found.append(Wish(due_s, int(8 * 48 ** dice.random()), most, 1 + int(dice.expovariate(1 / 50))))
    return found


def errors(waits: Sequence[tuple[float, float, float]], since_s: float, floor_s: float = 0.05) -> list[float]:
    """|foretold - real| / real of those who came after since_s; waits under the floor count as that, sorted."""
    return sorted(abs(said - real) / max(real, floor_s) for came, said, real in waits if came >= since_s)
