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
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from typing import Protocol

from service.errors import ApiError

SOONEST_S, LATEST_S = 0.5, 60.0  # of Retry-After
LARGEST_SHARE = 0.9  # of the house that one key may fill, where there are several
MOST_RETRIES = 0.1  # of those admitted while others wait (the retry budget of the SRE book, chapter 21)
FRESH_S = 0.05  # how old the figures of a refusal may be
REMEMBERED = 100  # admissions that the retry budget looks back on


@dataclass(frozen=True)
class Limits:
    """slots: answers computed at once. queued: answers that may wait. tokens: what all in the house may add up to.

    patience_s: the longest predicted wait in the queue that is still let in. shared: several keys share the house.
    """

    slots: int
    queued: int
    tokens: int
    patience_s: float
    shared: bool = False

    @property
    def places(self) -> int:
        return self.slots + self.queued


@dataclass
class Rates:
    """What the engine does, as measured: seconds of a step with so many answers in it, and prompt tokens a second.

    drift: how much slower it has become since then, learned from every step.
    """

    step_s: float
    each_s: float
    prefill_tokens_s: float
    drift: float = 1.0

    def step(self, answers: int) -> float:
        return (self.step_s + self.each_s * answers) * self.drift

    def prefill(self, tokens: int) -> float:
        return tokens / self.prefill_tokens_s * self.drift

    def learn(self, tokens: int, answers: int, took_s: float) -> None:
        """A step of so many tokens for so many answers. Slowly: single steps are noisy, and one may hang."""
        prompt_tokens = tokens - answers  # the others' one token each is in step()
        slower = took_s / (self.step(answers) + self.prefill(prompt_tokens))  # than by what is known so far
        self.drift = min(max(self.drift * (0.98 + 0.02 * min(max(slower, 0.5), 2.0)), 0.1), 100.0)


class Progress(Protocol):
    """What is known of an admitted request, once the engine has it."""

    @property
    def started(self) -> bool: ...

    @property
    def delivered(self) -> int: ...


@dataclass(eq=False)
class Ticket:
    """A place in the house. new_tokens: of each answer, at the most. predicted_s: the wait foreseen when it came in."""

    answers: int
    prompt_tokens: int
    new_tokens: int
    key: str = ""
    predicted_s: float = 0.0
    progress: Progress | None = None

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answers * self.new_tokens

    @property
    def started(self) -> bool:
        return self.progress is not None and self.progress.started

    @property
    def left(self) -> float:
        """New tokens of an answer that are still to come, at the most."""
        done = self.progress.delivered / self.answers if self.progress else 0
        return max(self.new_tokens - done, 0)

    @property
    def prompt_left(self) -> int:
        return 0 if self.progress is not None and self.progress.delivered else self.prompt_tokens


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
    crowd_seen: "Crowd | None" = None

    @property
    def waiting(self) -> list[Ticket]:
        return [ticket for ticket in self.inside if not ticket.started]

    @property
    def answers(self) -> int:
        return sum(ticket.answers for ticket in self.inside)

    @property
    def tokens(self) -> int:
        return sum(ticket.tokens for ticket in self.inside)

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
        ticket = Ticket(answers, prompt_tokens, new_tokens, key)
        if self.inside and self.tokens + ticket.tokens > self.limits.tokens * self.share(key):
            raise self.full("tokens", self.predicted_wait_s(answers, prompt_tokens), deadline_s)
        if retry and self.waiting and self.retried.count(True) >= MOST_RETRIES * REMEMBERED:
            raise self.full("retries", self.predicted_wait_s(answers, prompt_tokens), deadline_s)
        ticket.predicted_s = self.predicted_wait_s(answers, prompt_tokens)
        queue_s = self.predicted_wait_s(answers, 0)  # without its own prompt, which is no waiting
        if self.inside and queue_s > self.limits.patience_s * self.share(key):
            raise self.full("wait", ticket.predicted_s, deadline_s)
        service_s = (new_tokens - 1) * self.rates.step(self.busy(answers))
        if ticket.predicted_s + service_s > deadline_s:
            raise self.unreachable(ticket.predicted_s, service_s, deadline_s)
        if self.waiting:
            self.retried.append(retry)
        self.inside.append(ticket)
        self.crowd_seen = None
        return ticket

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
        room = self.limits.places * self.share(key)
        if self.answers + self.at_door + answers > max(room, 1):
            raise self.full("requests", self.crowd().wait_s, None)

    def knock(self, key: str) -> None:
        """Keep one place, until step_aside(): of a burst exactly as many go on as there are places."""
        self.check_door(key)
        self.at_door += 1
        self.crowd_seen = None

    def step_aside(self) -> None:
        self.at_door -= 1
        self.crowd_seen = None

    def share(self, key: str) -> float:
        """The part of the house that this key may fill: not all, so that another one's first request finds room."""
        others = self.limits.shared and any(ticket.key == key for ticket in self.inside)
        return LARGEST_SHARE if others else 1.0

    def correct(self, ticket: Ticket, prompt_tokens: int, new_tokens: int) -> None:
        """What the tokenizer counted, in place of the estimate."""
        ticket.prompt_tokens, ticket.new_tokens = prompt_tokens, new_tokens
        self.crowd_seen = None

    def leave(self, ticket: Ticket) -> None:
        """However it ended. Leaving twice is nothing."""
        if ticket in self.inside:
            self.inside.remove(ticket)
            self.crowd_seen = None

    # ---- foretelling

    def busy(self, more: int = 0) -> int:
        """Slots in use, with so many more answers."""
        return min(self.answers + more, self.limits.slots)

    def predicted_wait_s(self, answers: int, prompt_tokens: int) -> float:
        """Seconds until a newcomer's first token: until enough slots are free, and all prompts before it are computed.

        Each slot is freed when its answer has its last token; those who wait take the first slot that is free. Prompts
        are computed in between, at the rate of prefill, whoever's they are.
        """
        step_s = self.rates.step(max(self.busy(answers), 1))
        slots = [ticket.left * step_s for ticket in self.inside if ticket.started for _ in range(ticket.answers)]
        slots = sorted(slots)[: self.limits.slots]
        slots += [0.0] * (self.limits.slots - len(slots))
        heapify(slots)
        for ticket in self.waiting:
            for _ in range(ticket.answers):
                heapreplace(slots, slots[0] + ticket.new_tokens * step_s)
        start = sorted(slots)[min(answers, len(slots)) - 1]
        prompts = prompt_tokens + sum(ticket.prompt_left for ticket in self.inside)
        return start + self.rates.prefill(prompts) + step_s

    def crowd(self) -> Crowd:
        """Who is inside. Looked at again when somebody came or went, and a few times a second: a flood of refusals
        must cost next to nothing.
        """
        now_s = self.clock()
        if self.crowd_seen is None or now_s - self.crowd_seen.seen_s > FRESH_S:
            busy = self.busy()
            step_s = self.rates.step(max(busy, 1))
            room_s = min((ticket.left * step_s for ticket in self.inside if ticket.started), default=SOONEST_S)
            wait_s = self.predicted_wait_s(1, 0)
            answers, waiting = self.answers + self.at_door, len(self.waiting) + self.at_door
            self.crowd_seen = Crowd(now_s, answers, waiting, self.tokens, busy / step_s, room_s, wait_s)
        return self.crowd_seen

    # ---- refusing

    def full(self, limit: str, wait_s: float, deadline_s: float | None) -> ApiError:
        crowd = self.crowd()
        what = {
            "requests": "as many requests as it can", "tokens": "as many tokens as it can",
            "wait": "all it can for now",
            "retries": "all it can, and repeated requests come last",
        }  # fmt: skip
        return self.refusal(
            "server_overloaded",
            f"The server holds {what[limit]} ({crowd.answers} requests, {crowd.tokens} tokens; a newcomer would wait "
            f"about {wait_s:.1f} s): try again later.",
            limit, crowd.room_s, "shed_queue", predicted_wait_s=wait_s, deadline_s=deadline_s,
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
