"""How long a newcomer will wait for its first token: the engine's own rule, played forward with numbers only.

Who runs gets a token in every step; what a step has room for beside them are prompts, in pieces, in the order in which
they came; a slot is free when its answer has its last token, and the first in the queue takes it (engine/scheduler.py).
What a step costs is learned (rates.py), and so is how long answers become: most are given more tokens than they use.

Not known here, and so not foretold: a prefix that is found in the cache by one and not by another (the usual one is
known), memory for keys and values that runs out before the slots do, and who comes later into the same step.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from statistics import median
from typing import NamedTuple

from service.rates import Rates

BUCKETS = 32  # of lengths, each twice as long as the one before
REMEMBERED = 0.99  # of what is known of lengths, when one more answer has ended: the last hundred count
GOLDEN = 0.6180339887498949
SPREAD = 64
LATELY = 20  # of those who were handed to the engine: how long that takes
# How early each of those inside ends, of all that could be: spread evenly over however many there are, the first in the
# middle (multiples of the golden ratio). As the logarithm of the part that lasts longer.
LUCK = [-math.log(1 - (0.5 + GOLDEN * i) % 1) for i in range(SPREAD)]


class Seat(NamedTuple):
    """An answer, as the engine has it: tokens to compute before its next one, new tokens so far and at the most, tokens
    known; whether it runs, or waits; seconds until the engine has it, while it is still being prepared.
    """

    missing: int
    done: int
    most: int
    known: int
    running: bool
    late_s: float = 0.0


class Foretold(NamedTuple):
    """Seconds from now: until its first step begins, and until it has its first token."""

    start_s: float
    first_token_s: float


class Lengths:
    """How many new tokens answers have, learned from those that ended: a life table.

    For lengths of 1, 2-3, 4-7 ... tokens: how many tokens were seen there, and how many of them were an answer's last
    although it was given more. Answers that used all they were given tell only that they did not end before.
    """

    def __init__(self) -> None:
        self.seen = [0.0] * BUCKETS
        self.ended = [0.0] * BUCKETS
        self.early = False  # whether any answer has ended before it had to
        self.rate = [0.0] * BUCKETS  # of ending, with each token
        self.sums = [0.0] * (BUCKETS + 1)  # of the rate over all tokens before the bucket

    def learn(self, tokens: int, early: bool) -> None:
        """An answer ended after so many new tokens; early: it was given more."""
        last = tokens.bit_length() - 1
        for i in range(BUCKETS):
            here = min(max(tokens + 1 - 2**i, 0), 2**i)
            self.seen[i] = self.seen[i] * REMEMBERED + here
            self.ended[i] = self.ended[i] * REMEMBERED + (early and i == last)
            self.rate[i] = self.ended[i] / (self.seen[i] + 1)
            self.sums[i + 1] = self.sums[i] + self.rate[i] * 2**i
        self.early = self.early or early

    def left(self, done: int, most: int, luck: float) -> int:
        """New tokens still to come to an answer that has `done` of at most `most`, at least one. luck: one of LUCK."""
        if not self.early:
            return max(most - done, 1)
        end = self.sum_to(done) + luck
        if end >= self.sum_to(most):
            return max(most - done, 1)
        i = bisect_left(self.sums, end) - 1  # the bucket in which it is used up
        return max(math.ceil(2**i - 1 + (end - self.sums[i]) / self.rate[i]) - done, 1)

    def sum_to(self, tokens: int) -> float:
        """Of the rates of the first so many tokens."""
        i = (tokens + 1).bit_length() - 1
        return self.sums[i] + self.rate[i] * (tokens + 1 - 2**i)


@dataclass
class Foreteller:
    """slots: answers computed at once. budget: tokens of a step, at most. step_age_s: how long ago the step began that
    is being computed; None while there is none.
    """

    rates: Rates
    slots: int
    budget: int
    step_age_s: Callable[[], float | None] = lambda: None
    lengths: Lengths = field(default_factory=Lengths)
    shared: float = 0.0  # tokens of a prompt that are found in the prefix cache, as it was with the last ones
    handed_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATELY))  # from being let in to the engine

    def foretold(self, seats: Iterable[Seat], prompt_tokens: int, behind: int = 0) -> Foretold:
        """For somebody with such a prompt, who comes behind these seats. behind: so many more come at the same moment,
        and are prepared after him; their prompts are unknown, and taken to be like his.
        """
        play = Play(self.rates.costs(), self.slots, self.budget)
        for seat, left in self.lasting(seats):
            play.seat(seat, left, 0 if seat.running else self.found(seat.missing))
        return play.until(prompt_tokens, self.found(prompt_tokens), self.step_age_s(), behind, self.hand_s)

    @property
    def hand_s(self) -> float:
        """From being let in until the engine has it: its text is read and counted."""
        return median(self.handed_s) if self.handed_s else 0.0

    def learn_found(self, tokens: int) -> None:
        """So many tokens of a prompt were found in the prefix cache."""
        self.shared += (tokens - self.shared) * (1 - REMEMBERED)

    def found(self, prompt_tokens: int) -> int:
        """How many of such a prompt's will be: of the beginning that most have in common. The last is computed."""
        return max(min(round(self.shared), prompt_tokens - 1), 0)

    def lasting(self, seats: Iterable[Seat]) -> Iterator[tuple[Seat, int]]:
        """Each with the new tokens that are still to come to it."""
        for i, seat in enumerate(seats):
            yield seat, self.lengths.left(seat.done, seat.most, LUCK[i % SPREAD])


class Play:
    """The engine's next steps. One answer to be decoded is (the step after which it ends, its context before step 0);
    one whose prompt is computed [tokens missing, new tokens to come, tokens computed]; who is coming (when, the same).
    """

    def __init__(self, costs: tuple[float, float, float, float], slots: int, budget: int) -> None:
        self.fixed_s, self.each_s, self.prompt_s, self.read_s = costs
        self.slots, self.budget = slots, budget
        self.step, self.time_s = 0, 0.0
        self.decoding: list[tuple[int, int]] = []  # a heap
        self.context = 0  # of them together, before step 0
        self.prompts: list[list[int]] = []
        self.queue: deque[list[int]] = deque()
        self.coming: deque[tuple[float, list[int]]] = deque()

    def seat(self, seat: Seat, left: int, found: int) -> None:
        """found: tokens that it need not compute."""
        if seat.running and seat.missing <= 1:
            self.decoding.append((left, seat.known))
            self.context += seat.known
            return
        one = [seat.missing - found, left, seat.known - seat.missing + found]
        if seat.running:
            self.prompts.append(one)
        else:
            self.coming.append((seat.late_s, one))

    def until(
        self, prompt_tokens: int, found: int, step_age_s: float | None, behind: int, hand_s: float
    ) -> Foretold:  # fmt: skip
        """When one more, with such a prompt, has its first token. Those behind him may be in his steps: the engine does
        not wait for them.
        """
        heapify(self.decoding)
        if step_age_s is not None and (self.decoding or self.prompts):  # who waits is not in the step that has begun
            self.advance()
            self.time_s = max(self.time_s - step_age_s, 0.0)
        missing, start_s = max(prompt_tokens - found, 1), None
        own, *others = [[missing, 1, found] for _ in range(1 + behind)]
        for i, one in enumerate([own, *others], 1):
            self.coming.append((i * hand_s, one))
        while own[0]:
            self.seat_who_came()
            begin_s = self.time_s
            self.advance()
            if start_s is None and own[0] < missing:
                start_s = begin_s
        return Foretold(start_s, self.time_s)

    def seat_who_came(self) -> None:
        """In their order: nobody overtakes."""
        if not (self.decoding or self.prompts or self.queue):
            self.time_s = max(self.time_s, self.coming[0][0])  # an idle engine begins with the first
        while self.coming and self.coming[0][0] <= self.time_s:
            self.queue.append(self.coming.popleft()[1])
        while self.queue and len(self.decoding) + len(self.prompts) < self.slots:
            self.prompts.append(self.queue.popleft())

    def advance(self) -> None:
        """One step; or all up to the next end, when no prompt is to be computed, nobody comes and no step has begun."""
        if self.prompts:
            self.mixed_step()
        else:
            self.decode(1 if self.step == 0 or self.coming else self.decoding[0][0] - self.step)
        while self.decoding and self.decoding[0][0] <= self.step:
            self.context -= heappop(self.decoding)[1]

    def decode(self, steps: int) -> None:
        count = len(self.decoding)
        read = steps * (self.context + count * self.step) + count * steps * (steps - 1) // 2
        self.time_s += steps * (self.fixed_s + self.each_s * count) + self.read_s * read
        self.step += steps

    def mixed_step(self) -> None:
        """What is left of the budget goes to prompts. Who has all of its own gets its first new token."""
        room, answers, tokens = self.budget - len(self.decoding), len(self.decoding), 0
        read = self.context + answers * self.step
        self.step += 1
        for one in self.prompts:
            take = min(one[0], room)
            if not take:
                break
            one[0] -= take
            one[2] += take
            room, answers, tokens, read = room - take, answers + 1, tokens + take - 1, read + one[2]
            if not one[0]:
                base = one[2] + 1 - self.step  # its new token is one more
                heappush(self.decoding, (self.step + one[1] - 1, base))
                self.context += base
        self.time_s += self.fixed_s + self.each_s * answers + self.prompt_s * tokens + self.read_s * read
        self.prompts = [one for one in self.prompts if one[0]]
