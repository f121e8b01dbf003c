"""Who may come in. Decided before anything is tokenised, in one step that nobody can come between.

A request that is admitted will be served; one that would wait too long is told so at once, with the numbers. Short queues
are kinder than long ones: what is refused now can go elsewhere, what waits in vain cannot (Beyer et al., Site Reliability
Engineering, 2016, chapter 21).

Plain numbers and a clock that is handed in: no HTTP, no asyncio, no engine.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heapreplace

from service.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """slots: answers computed at once. queued: requests that may wait. tokens: what all requests in the house may add up to.

    patience_s: the longest predicted wait that is still let in.
    """

    slots: int
    queued: int
    tokens: int
    patience_s: float


@dataclass
class Rates:
    """What the engine does, as measured: seconds of a step with so many answers in it, and prompt tokens a second."""

    step_s: float
    each_s: float
    prefill_tokens_s: float

    def step(self, answers: int) -> float:
        return self.step_s + self.each_s * answers


@dataclass(eq=False)
class Ticket:
    """A place in the house. tokens: what the request may grow to; answers: how many slots it takes.

    predicted_s: the wait that was foreseen when it came in. started: its first token is computed; left: new tokens that
    are still to come, at the most.
    """

    answers: int
    prompt_tokens: int
    new_tokens: int
    came_s: float
    predicted_s: float = 0.0
    started: bool = False
    delivered: int = 0
    retried: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answers * self.new_tokens

    @property
    def left(self) -> int:
        return max(self.new_tokens - self.delivered, 0)


@dataclass
class Admission:
    """The books: who is in, and what a newcomer would have to wait for."""

    limits: Limits
    rates: Rates
    clock: Callable[[], float]
    jitter: Callable[[], float] = field(default=lambda: random.uniform(0.8, 1.2))
    inside: list[Ticket] = field(default_factory=list)  # in the order in which they came
    open: bool = True

    @property
    def waiting(self) -> list[Ticket]:
        return [ticket for ticket in self.inside if not ticket.started]

    @property
    def answers(self) -> int:
        return sum(ticket.answers for ticket in self.inside)

    @property
    def tokens(self) -> int:
        return sum(ticket.tokens for ticket in self.inside)

    def enter(self, *, answers: int, prompt_tokens: int, new_tokens: int, deadline_s: float, retried: int = 0) -> Ticket:
        """A ticket, or an ApiError 503 that says which limit was hit and when to come back.

        prompt_tokens: an estimate will do; correct() puts it right. deadline_s: seconds that the asker will wait.
        """
        ticket = Ticket(answers, prompt_tokens, new_tokens, self.clock(), retried=retried)
        if not self.open:
            raise self.refusal("shutting_down", "The server is shutting down: ask another one.", "drain", 1.0, "shed_drain")
        if self.answers + answers > self.limits.slots + self.limits.queued:
            raise self.full("requests", ticket, deadline_s)
        if self.tokens + ticket.tokens > self.limits.tokens and self.inside:
            raise self.full("tokens", ticket, deadline_s)
        ticket.predicted_s = self.predicted_wait_s(answers, prompt_tokens)
        if ticket.predicted_s > self.limits.patience_s:
            raise self.full("wait", ticket, deadline_s)
        service_s = prompt_tokens / self.rates.prefill_tokens_s + new_tokens * self.rates.step(self.busy_slots(answers))
        if ticket.predicted_s + service_s > deadline_s:
            raise self.refusal(
                "deadline_unreachable",
                f"You will wait {deadline_s:.1f} s, and this request would take about {ticket.predicted_s:.1f} s of waiting "
                f"and {service_s:.1f} s of computing: ask for fewer tokens, or wait longer.",
                "deadline", ticket.predicted_s, "shed_deadline", ticket.predicted_s, deadline_s,
            )  # fmt: skip
        self.inside.append(ticket)
        return ticket

    def correct(self, ticket: Ticket, prompt_tokens: int, new_tokens: int) -> None:
        """What the tokenizer counted, in place of the estimate."""
        ticket.prompt_tokens, ticket.new_tokens = prompt_tokens, new_tokens

    def leave(self, ticket: Ticket) -> None:
        """However it ended. Leaving twice is nothing."""
        if ticket in self.inside:
            self.inside.remove(ticket)

    def busy_slots(self, more: int = 0) -> int:
        return min(self.answers + more, self.limits.slots)

    def predicted_wait_s(self, answers: int, prompt_tokens: int) -> float:
        """Seconds until a newcomer's first token: until enough slots are free, and all prompts before it are computed.

        Each slot is freed when its answer has its last token; those who wait take the first slot that is free. Prompts
        are computed in between, at the rate of prefill, whoever's they are.
        """
        step_s = self.rates.step(self.busy_slots(answers))
        slots = [ticket.left * step_s for ticket in self.inside if ticket.started for _ in range(ticket.answers)]
        slots = sorted(slots)[: self.limits.slots]
        slots += [0.0] * (self.limits.slots - len(slots))
        heapify(slots)
        for ticket in self.waiting:
            for _ in range(ticket.answers):
                heapreplace(slots, slots[0] + ticket.new_tokens * step_s)
        start = sorted(slots)[min(answers, len(slots)) - 1]
        prompts = prompt_tokens + sum(ticket.prompt_tokens for ticket in self.waiting)
        return start + prompts / self.rates.prefill_tokens_s

    def full(self, limit: str, ticket: Ticket, deadline_s: float) -> ApiError:
        wait_s = self.predicted_wait_s(ticket.answers, ticket.prompt_tokens)
        what = {"requests": "as many requests as it can", "tokens": "as many tokens as it can", "wait": "all it can for now"}
        return self.refusal(
            "server_overloaded",
            f"The server holds {what[limit]} ({self.answers} requests, {self.tokens} tokens; a newcomer would wait about "
            f"{wait_s:.1f} s): try again later.",
            limit, self.until_room_s(), "shed_queue", wait_s, deadline_s,
        )  # fmt: skip

    def until_room_s(self) -> float:
        """When the next one will leave, by the same reckoning."""
        step_s = self.rates.step(self.busy_slots())
        lefts = [ticket.left * step_s for ticket in self.inside if ticket.started]
        return min(lefts, default=0.5) if lefts else 0.5

    def refusal(
        self, code: str, message: str, limit: str, after_s: float, outcome: str, wait_s: float | None = None,
        deadline_s: float | None = None,
    ) -> ApiError:  # fmt: skip
        """503: with Retry-After spread a little, so that those who were refused together do not come back together."""
        after_s = min(max(after_s, 0.5), 60.0) * self.jitter()
        details = {
            "limit_hit": limit,
            "requests": self.answers,
            "waiting": len(self.waiting),
            "queued_tokens": self.tokens,
            "drain_rate_tok_s": round(self.busy_slots() / self.rates.step(max(self.busy_slots(), 1)), 1),
            "retry_after_s": round(after_s, 1),
        }
        details |= {} if wait_s is None else {"predicted_wait_s": round(wait_s, 2)}
        details |= {} if deadline_s is None else {"deadline_s": round(deadline_s, 1)}
        return ApiError(
            503, code, message, retry=code != "deadline_unreachable", retry_after_s=after_s, details=details,
            outcome=outcome,
        )  # fmt: skip
