"""Who may come in. Decided before anything is tokenised, in one step that nobody can come between.

A request that is admitted will be served; one that would wait too long is told so at once, with the numbers. Short
queues are kinder than long ones: what is refused now can go elsewhere, what waits in vain cannot (Beyer et al., Site
Reliability Engineering, 2016, chapter 21).

Plain numbers and a clock that is handed in: no HTTP, no asyncio, no engine.
"""

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from service.errors import ApiError
from service.foretelling import Foreteller, Foretold, Seat
from service.rates import Rates

SOONEST_S, LATEST_S = 0.5, 60.0  # of Retry-After
KEPT_SHARE = 0.1  # of the house that no key may fill alone, where there are several; and a place for each other one,
MOST_KEPT = 0.5  # up to so much
MOST_RETRIES = 0.1  # of those admitted while others wait (the retry budget of the SRE book, chapter 21)
FRESH_S = 0.05  # how old the figures of a refusal may be
REMEMBERED = 100  # admissions that the retry budget looks back on


@dataclass(frozen=True)
class Limits:
    """slots: answers computed at once. queued: answers that may wait. tokens: what all in the house may add up to.

    patience_s: the longest predicted wait in the queue that is still let in. keys: so many share the house.
    step_tokens: computed in one step.
    """

    slots: int
    queued: int
    tokens: int
    patience_s: float
    keys: int = 1
    step_tokens: int = 512

    @property
    def places(self) -> int:
        return self.slots + self.queued


class Progress(Protocol):
    """What is known of an admitted request, once the engine has it.

    seats: its answers that the engine has and that have not ended. ended: of the others, how many new tokens they had,
    and whether they ended before they had to. found: tokens of its prompt that were in the prefix cache; None before
    it has started.
    """

    @property
    def started(self) -> bool: ...

    def seats(self) -> list[Seat]: ...

    def ended(self) -> list[tuple[int, bool]]: ...

    def found(self) -> int | None: ...


@dataclass(eq=False)
class Ticket:
    """A place in the house. new_tokens: of each answer, at the most. predicted_s: the wait foreseen when it came in, at
    entered_s by the clock. done: the engine's part is, and a reader who takes his time keeps nobody out.
    """

    answers: int
    prompt_tokens: int
    new_tokens: int
    key: str = ""
    predicted_s: float = 0.0
    entered_s: float = 0.0
    progress: Progress | None = None
    done: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answers * self.new_tokens

    @property
    def started(self) -> bool:
        return self.progress is not None and self.progress.started

    def seats(self) -> list[Seat]:
        if self.progress is not None:
            return self.progress.seats()
        return [Seat(max(self.prompt_tokens, 1), 0, self.new_tokens, self.prompt_tokens, False)]


@dataclass(frozen=True)
class Crowd:
    """Who is inside, for refusals: answers, how many of them wait, what they may add up to in tokens; the rate at which
    tokens come, how long until the next one leaves, and what a newcomer would wait.
    """

    seen_s: float
    answers: int
    waiting: int
    tokens: int
    tokens_per_s: float
    room_s: float
    wait_s: float


@dataclass
class Admission:
    """The books: who is in, and what a newcomer would have to wait for."""

    limits: Limits
    rates: Rates
    jitter: Callable[[], float] = field(default=lambda: random.uniform(0.8, 1.2))
    inside: list[Ticket] = field(default_factory=list)  # in the order in which they came
    at_door: int = 0  # let through the door, and not asked for a ticket yet: their bodies are being read
    closed: str | None = None  # why nobody is let in any more: "drain", or "memory" for a while
    retried: deque[bool] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    clock: Callable[[], float] = time.perf_counter
    crowd_seen: Crowd | None = None

    def __post_init__(self) -> None:
        self.foreteller = Foreteller(self.rates, self.limits.slots, self.limits.step_tokens)

    @property
    def waiting(self) -> list[Ticket]:
        return [ticket for ticket in self.inside if not ticket.started]

    @property
    def answers(self) -> int:
        return sum(ticket.answers for ticket in self.inside if not ticket.done)

    @property
    def tokens(self) -> int:
        return sum(ticket.tokens for ticket in self.inside if not ticket.done)

    def enter(
        self,
        *,
        answers: int,
        prompt_tokens: int,
        new_tokens: int,
        deadline_s: float,
        key: str = "",
        retry: bool = False,
    ) -> Ticket:
        """A ticket, or an ApiError 503 that says which limit was hit and when to come back.

        prompt_tokens: an estimate will do; correct() puts it right. deadline_s: seconds that the asker will wait.
        """
        self.check_door(key, answers)
        ticket = Ticket(answers, prompt_tokens, new_tokens, key, entered_s=self.clock())
        foretold = self.foretold(prompt_tokens)
        ticket.predicted_s = foretold.first_token_s
        if self.too_many_tokens(ticket):
            raise self.full("tokens", ticket.predicted_s, deadline_s)
        if retry and self.waiting and self.retried.count(True) + 1 > self.most_retries:
            raise self.full("retries", ticket.predicted_s, deadline_s)
        if self.inside and foretold.start_s > self.limits.patience_s * self.share(key):
            raise self.full("wait", ticket.predicted_s, deadline_s)
        service_s = (new_tokens - 1) * self.rates.step(self.busy(answers))
        if ticket.predicted_s + service_s > deadline_s:
            raise self.unreachable(ticket.predicted_s, service_s, deadline_s)
        if self.waiting:
            self.retried.append(retry)
        self.inside.append(ticket)
        self.crowd_seen = None
        return ticket

    @property
    def most_retries(self) -> float:
        """Of those let in lately while others waited, counting the one that asks: how many may have asked before.

        With half the queue taken, a tenth of those there were; before, a tenth of the hundred that are looked back on.
        """
        crowded = 2 * (sum(ticket.answers for ticket in self.waiting)) > self.limits.queued
        return MOST_RETRIES * min(len(self.retried) + 1 if crowded else REMEMBERED, REMEMBERED)

    def check_door(self, key: str = "", answers: int = 1) -> None:
        """ApiError 503 when nobody can come in, whatever is asked for: before a body is even read."""
        if self.closed == "drain":
            raise self.refusal(
                "server_shutting_down", "The server is shutting down: ask another one.", "drain", 1.0, "shed_drain"
            )
        if self.closed == "memory":
            raise self.refusal(
                "server_overloaded", "The server is short of memory: try again later.", "memory", 5.0, "shed_memory"
            )
        if self.answers + self.at_door + answers > max(self.room(key), 1):
            raise self.full("requests", self.crowd().wait_s, None)

    def knock(self, key: str) -> None:
        """Keep one place, until step_aside(): of a burst exactly as many go on as there are places."""
        self.check_door(key)
        self.at_door += 1
        self.crowd_seen = None

    def step_aside(self) -> None:
        self.at_door -= 1
        self.crowd_seen = None

    def room(self, key: str) -> float:
        """The places that this key may fill. Whoever is inside leaves some for the first requests of the others."""
        places, inside = self.limits.places, {ticket.key for ticket in self.inside}
        if self.limits.keys == 1 or key not in inside:
            return places
        absent = self.limits.keys - len(inside)
        return places - min(max(KEPT_SHARE * places, absent), MOST_KEPT * places)

    def share(self, key: str) -> float:
        """The same as a part of the house, for what is not counted in places."""
        return self.room(key) / self.limits.places

    def too_many_tokens(self, ticket: Ticket, instead_of: Ticket | None = None) -> bool:
        """Whether the others leave too little for it. Alone it may be larger than all that there is."""
        others = sum(one.tokens for one in self.inside if one is not instead_of and not one.done)
        return others > 0 and others + ticket.tokens > self.limits.tokens * self.share(ticket.key)

    def correct(self, ticket: Ticket, prompt_tokens: int, new_tokens: int) -> None:
        """What the tokenizer counted, in place of the estimate. ApiError 503 when there is no room for so much."""
        counted = replace(ticket, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        if counted.tokens > ticket.tokens and self.too_many_tokens(counted, ticket):
            raise self.full("tokens", ticket.predicted_s, None)
        ticket.prompt_tokens, ticket.new_tokens = prompt_tokens, new_tokens
        self.crowd_seen = None

    def handed_over(self, ticket: Ticket, progress: Progress) -> None:
        """The engine has it."""
        ticket.progress = progress
        self.foreteller.handed_s.append(self.clock() - ticket.entered_s)

    def is_done(self, ticket: Ticket) -> None:
        """The engine has nothing more to do for it."""
        ticket.done, self.crowd_seen = True, None

    def leave(self, ticket: Ticket) -> None:
        """However it ended. Leaving twice is nothing."""
        if ticket in self.inside:
            self.inside.remove(ticket)
            self.crowd_seen = None
            self.learn(ticket.progress)

    # ---- foretelling

    def learn(self, progress: Progress | None) -> None:
        """From one who leaves, for those who come."""
        if progress is None:
            return
        for tokens, early in progress.ended():
            self.foreteller.lengths.learn(tokens, early)
        if (found := progress.found()) is not None:
            self.foreteller.learn_found(found)

    def busy(self, more: int = 0) -> int:
        """Slots in use, with so many more answers."""
        return min(self.answers + more, self.limits.slots)

    def foretold(self, prompt_tokens: int) -> Foretold:
        """When a newcomer with such a prompt would have its first step, and its first token."""
        return self.foreteller.foretold(self.seats(), prompt_tokens, self.at_door)

    def seats(self) -> list[Seat]:
        since_s = self.clock() - self.foreteller.hand_s  # who came in later is not with the engine yet
        return [
            seat if ticket.progress is not None else seat._replace(late_s=max(ticket.entered_s - since_s, 0.0))
            for ticket in self.inside
            for seat in ticket.seats()
        ]

    def predicted_wait_s(self, prompt_tokens: int) -> float:
        """Seconds until a newcomer's first token."""
        return self.foretold(prompt_tokens).first_token_s

    def crowd(self) -> Crowd:
        """Who is inside. Looked at again when somebody came or went, and a few times a second: a flood of refusals
        must cost next to nothing.
        """
        now_s = self.clock()
        if self.crowd_seen is None or now_s - self.crowd_seen.seen_s > FRESH_S:
            busy = self.busy()
            step_s = self.rates.step(max(busy, 1))
            ends = (left * step_s for seat, left in self.foreteller.lasting(self.seats()) if seat.running)
            room_s = min(ends, default=SOONEST_S)
            wait_s = self.predicted_wait_s(0)
            answers, waiting = self.answers + self.at_door, len(self.waiting) + self.at_door
            self.crowd_seen = Crowd(now_s, answers, waiting, self.tokens, busy / step_s, room_s, wait_s)
        return self.crowd_seen

    # ---- refusing

    def full(self, limit: str, wait_s: float, deadline_s: float | None) -> ApiError:
        crowd = self.crowd()
        what = {
            "requests": "as many requests as it can", "tokens": "as many tokens as it can",
            "wait": "all it can for now",
            "retries": "all it can for now, and requests that are sent again come last: of those let in while others "
            f"wait, one in {1 / MOST_RETRIES:.0f} may be such",
        }  # fmt: skip
        return self.refusal(
            "server_overloaded",
            f"The server holds {what[limit]} ({crowd.answers} requests, {crowd.tokens} tokens; a newcomer would wait "
            f"about {wait_s:.1f} s): try again later.",
            limit, crowd.room_s, "shed_queue", predicted_wait_s=wait_s, deadline_s=deadline_s,
            **({"retries_let_in": self.retried.count(True), "let_in": len(self.retried)} if limit == "retries" else {}),
        )  # fmt: skip

    def unreachable(self, wait_s: float, service_s: float, deadline_s: float) -> ApiError:
        return self.refusal(
            "deadline_unreachable",
            f"You will wait {deadline_s:.1f} s, and this request would take about {wait_s:.1f} s to its first token "
            f"and {service_s:.1f} s from there: ask for fewer tokens, or wait longer.",
            "deadline", wait_s, "shed_deadline", predicted_wait_s=wait_s, deadline_s=deadline_s,
        )  # fmt: skip

    def refusal(
        self, code: str, message: str, limit: str, after_s: float, outcome: str, **numbers: float | None
    ) -> ApiError:
        """503: with Retry-After spread a little, so that those who were refused together do not come back together."""
        after_s = min(max(after_s, SOONEST_S), LATEST_S) * self.jitter()
        crowd = self.crowd()
        details = {
            "limit_hit": limit,
            "requests": crowd.answers,
            "queue_depth": crowd.waiting,
            "queued_tokens": crowd.tokens,
            "drain_rate_tok_s": round(crowd.tokens_per_s, 1),
            "retry_after_s": round(after_s, 1),
        }
        details |= {name: round(value, 2) for name, value in numbers.items() if value is not None}
        again = code != "deadline_unreachable"
        return ApiError(503, code, message, retry=again, retry_after_s=after_s, details=details, outcome=outcome)
