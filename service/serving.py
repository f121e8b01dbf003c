"""A request's way through the service: admitted, tokenised, handed to the engine, followed to its end.

    checked, kept answers (app.py, detour.py) -> rate limits -> ladder -> breaker -> admission -> tokenised
        -> engine -> streamed or gathered -> closed

Whatever happens on the way, the last step is the same: what is still computed for it is cancelled, and its places are
given back.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from engine.answer import Answer
from engine.request import Refusal, Sampling
from service.admission import Admission, Ticket
from service.breaker import Permit
from service.bridge import Bridge, Stream
from service.errors import ApiError, invalid, too_long
from service.ladder import ALL, Rung
from service.life import Life
from service.limits import RateLimits
from service.prompts import Prompts
from service.quarantine import fingerprint, shown
from service.relief import Relief
from service.schemas import MOST_CHOICES, ChatRequest, CompletionRequest
from service.settings import ServeConfig

LEGACY_NEW_TOKENS = 16  # what OpenAI's completions endpoint gives without a limit
UNLIMITED = 1 << 20  # the context to reckon with where a model names none
WELL = ("stop", "length")  # how an answer ends that is one
POLL_S = 0.05  # how often a drain looks whether everybody has gone


@dataclass(eq=False)
class Job:
    """One admitted request. deadline_s: a reading of the clock. drawn: tokens taken from its rate limit. permit: the
    breaker wants to know how it ended. cap: of its new tokens. paced: what Serving.paced was when it came in.
    """

    asked: ChatRequest | CompletionRequest
    life: Life
    key: str
    ticket: Ticket
    deadline_s: float
    drawn: int
    permit: Permit
    cap: int
    paced: tuple[int, float]
    stream: Stream = field(default_factory=Stream)
    prompt_tokens: int = 0
    ended_by: ApiError | None = None  # somebody else ends it: the service itself
    hung: bool = False  # its time was over in a step that did not end

    @property
    def degraded(self) -> str | None:
        return self.life.facts.get("degraded")

    @property
    def answers(self) -> list[Answer]:
        return self.stream.answers


class Serving:
    """The parts of the service, wired. clock: the engine's."""

    def __init__(
        self, settings: ServeConfig, bridge: Bridge, prompts: Prompts, admission: Admission, limits: RateLimits,
        relief: Relief, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.settings, self.bridge, self.prompts, self.relief = settings, bridge, prompts, relief
        self.admission, self.limits, self.clock = admission, limits, clock
        self.jobs: set[Job] = set()
        self.paced = (0, 0.0)  # steps so far, and the sum of how many times longer than foreseen each one took

    @property
    def context(self) -> int:
        return self.bridge.engine.context or UNLIMITED

    # ---- in

    def knock(self, life: Life) -> None:
        """Keep a place for a request whose body is there, unread. ApiError 503: there is none, whatever it asks."""
        self.admission.knock(life.facts["key"])
        life.at_door = True

    def step_aside(self, life: Life) -> None:
        """Give up the place at the door: it asks for a ticket now, or it has ended."""
        if life.at_door:
            self.admission.step_aside()
        life.at_door = False

    async def admit(
        self, asked: ChatRequest | CompletionRequest, life: Life, key: str, patience_s: float, retry: bool,
        accepted: frozenset[Rung] = ALL,
    ) -> Job:  # fmt: skip
        """A place, then the tokens. ApiError: there is no place, or the request cannot be served as it is."""
        with life.part("admit", life.parsed_s):  # in a task of its own, whose turn comes after others'
            job = self.entered(asked, life, key, patience_s, retry, accepted)
        try:
            with life.part("tokenize"):
                ids = await self.prompts.ids(asked)
            counted_s = self.clock()
            self.hand_over(job, ids)
            life.parts["admit"] += job.answers[0].request.timeline.arrived - counted_s
        except BaseException:
            self.close(job)
            raise
        return job

    def entered(
        self, asked: ChatRequest | CompletionRequest, life: Life, key: str, patience_s: float, retry: bool,
        accepted: frozenset[Rung],
    ) -> Job:  # fmt: skip
        n, new = asked.n or 1, self.new_tokens(asked, 0)
        most = min(self.admission.limits.places, MOST_CHOICES)
        if n > most:
            raise invalid(f"n can be at most {most} here.", "n")
        if new >= self.context:
            raise too_long("some", new, self.context, "max_tokens")
        if self.prompts.surely_longer_than(asked, self.context):
            raise too_long(f"more than {self.context}", new, self.context, prompt_name(asked))
        estimate = min(self.prompts.estimate(asked), self.context)
        wanted, new = new, self.capped(new, accepted)
        drawn = estimate + n * new
        self.limits.draw(key, drawn)
        self.step_aside(life)
        left_s = max(life.start_s + patience_s - self.clock(), 0.0)  # its body took some of it
        permit = self.relief.engine.permit()
        try:
            if permit is None:
                raise self.relief.refusal()
            ticket = self.admission.enter(
                answers=n, prompt_tokens=estimate, new_tokens=new, deadline_s=left_s, key=key, retry=retry
            )
        except BaseException:
            if permit is not None:
                permit.give_back()
            self.limits.give_back(key, "requests", 1)
            self.limits.give_back(key, "tokens", drawn)
            raise
        life.admitted_s = self.clock()
        life.facts |= {"predicted_wait": round(ticket.predicted_s, 4), "deadline": round(patience_s, 3),
                       "queue_pos": len(self.admission.waiting) - 1}  # fmt: skip
        if new < wanted:
            self.relief.ladder.used(Rung.MAX_TOKENS)
            life.facts["degraded"] = f"max_tokens={new}"
        cap = new if new < wanted else self.context
        job = Job(asked, life, key, ticket, life.start_s + patience_s, drawn, permit, cap, self.paced)
        self.jobs.add(job)
        return job

    def feel(self) -> None:
        """Tell the ladder how full the house is: by its places, or by what a newcomer would wait."""
        if Rung.MAX_TOKENS not in self.relief.ladder.there:
            return
        limits, wait_s = self.admission.limits, self.admission.crowd().wait_s
        waiting = max(self.admission.answers - limits.slots, 0)  # whoever has a free slot does not wait
        self.relief.ladder.feel(max(waiting / limits.queued, wait_s / limits.patience_s))

    def capped(self, new: int, accepted: frozenset[Rung]) -> int:
        """New tokens of an answer of which so many are wanted, as the ladder stands."""
        self.feel()
        return self.relief.ladder.most_tokens(new, accepted)

    def hand_over(self, job: Job, ids: list[int]) -> None:
        """To the engine. ApiError when it cannot take these tokens."""
        asked, name = job.asked, prompt_name(job.asked)
        if not ids:
            raise invalid("The prompt is empty: say something.", name)
        new = self.new_tokens(asked, len(ids))
        if len(ids) + new > self.context:
            raise too_long(len(ids), new, self.context, name)
        new = min(new, job.cap)
        try:
            self.admission.correct(job.ticket, len(ids), new)
        except ApiError:
            self.limits.give_back(job.key, "requests", 1)
            raise
        try:
            sampling = asked.sampling(new)
            print = self.fingerprint(job, ids, sampling)
            job.stream = self.bridge.submit(ids, sampling, asked.n or 1, self.salt(job), print)
        except Refusal as why:
            raise invalid(str(why), self.blamed(asked, str(why))) from why
        job.prompt_tokens = len(ids)  # from here on it pays for them
        self.admission.handed_over(job.ticket, job.stream)
        job.stream.when_done = lambda: self.admission.is_done(job.ticket)
        job.life.requests = [answer.request for answer in job.answers]

    def fingerprint(self, job: Job, ids: list[int], sampling: Sampling) -> bytes:
        """Of its input, for the quarantine. ApiError 400 when that is refused."""
        quarantine = self.bridge.quarantine
        if not quarantine.on:
            return b""
        found = fingerprint(ids, sampling)
        if quarantine.suspected(found):
            job.life.facts["fingerprint"] = shown(found)
        quarantine.check(found)
        return found

    def salt(self, job: Job) -> str:
        """Whose prefixes it may share: with a salt of its own, those of the same key that give the same one."""
        own = job.asked.cache_salt
        if own is not None:
            return f"{job.key}:{own}"
        return job.key if self.settings.isolate_keys else ""

    def blamed(self, asked: ChatRequest | CompletionRequest, why: str) -> str:
        """The field that a refusal of the engine's is about."""
        if why.startswith("seed"):  # of the last of several answers: the i-th has seed + i
            return "seed"
        most = self.bridge.engine.vocabulary
        wrong = most is not None and any(int(token) >= most for token in asked.logit_bias or ())
        return "logit_bias" if wrong else prompt_name(asked)

    def new_tokens(self, asked: ChatRequest | CompletionRequest, prompt_tokens: int) -> int:
        """What was asked for, else what there is room for within the default."""
        if asked.new_tokens is not None:
            return asked.new_tokens
        most = LEGACY_NEW_TOKENS if isinstance(asked, CompletionRequest) else self.settings.max_new_tokens
        return max(min(most, self.context - prompt_tokens - 1), 1)

    # ---- along

    async def follow(self, job: Job) -> AsyncIterator[bool]:
        """True whenever there is something new, and once more at the end; False after `heartbeat` seconds of silence.

        ApiError when it fails, takes too long, or is ended by the service.
        """
        stream, beat_s = job.stream, self.settings.heartbeat
        while True:
            stream.changed.clear()
            done = stream.done  # asked before what is new is taken: nothing comes after the end
            self.raise_if_ended(job)
            yield True
            if done:
                return
            left_s = self.limit_s(job) - self.clock()
            if left_s <= 0:  # asked every time: where a reader is slow, there is always something new
                raise self.out_of_time(job)
            try:
                async with asyncio.timeout(min(left_s, beat_s)):
                    await stream.changed.wait()
            except TimeoutError:
                if self.clock() < self.limit_s(job):
                    yield False

    def limit_s(self, job: Job) -> float:
        """Until when something must have happened: while it waits the queue's patience counts too."""
        queue_end_s = job.life.admitted_s + self.settings.queue_timeout
        return job.deadline_s if job.stream.started else min(job.deadline_s, queue_end_s)

    def out_of_time(self, job: Job) -> ApiError:
        job.stream.why = "deadline"
        job.hung = self.bridge.stalled_s() > self.settings.stall_after
        done = job.stream.delivered
        what = f"{done} new tokens were computed" if job.stream.started else "it never left the queue"
        return ApiError(
            504, "deadline_exceeded", f"The time for this request is over ({what}): ask for less, or wait longer.",
            details={"prompt_tokens": job.prompt_tokens, "completion_tokens": done}, outcome="timeout",
        )  # fmt: skip

    def raise_if_ended(self, job: Job) -> None:
        if job.ended_by is not None:
            raise job.ended_by
        error = next((answer.request.error for answer in job.answers if answer.request.error), None)
        if error is not None:
            job.stream.why = "engine_error"
            if job.stream.fingerprint:
                job.life.facts["fingerprint"] = shown(job.stream.fingerprint)
            insides = f"{type(error).__name__}: {error}"  # for the log: a client learns nothing of them
            job.life.facts["error"] = insides[:500]
            raise ApiError(
                500, "engine_error", "The engine failed on this request; the server's log has the reason under its id.",
                retry=True, outcome="engine_error",
            )  # fmt: skip

    # ---- out

    def close(self, job: Job) -> None:
        """However it ended: nothing is computed for it any more, and its places are free."""
        if job not in self.jobs:
            return
        self.jobs.remove(job)
        self.judge(job)
        self.bridge.cancel(job.stream, job.stream.why)
        self.admission.leave(job.ticket)
        self.limits.give_back(job.key, "tokens", job.drawn - job.prompt_tokens - job.stream.delivered)

    def judge(self, job: Job) -> None:
        """Tell the breaker what the engine made of it. Who left, was refused, or only waited too long says nothing."""
        requests = [answer.request for answer in job.answers]
        if job.hung or any(request.error for request in requests):
            job.permit.failed()
        elif requests and all(answer.done and answer.request.finish_reason in WELL for answer in job.answers):
            steps, times = (now - then for now, then in zip(self.paced, job.paced, strict=True))
            job.permit.succeeded(times / steps if steps else None)
        else:
            job.permit.give_back()

    @property
    def busy(self) -> bool:
        return bool(self.jobs or (self.relief.fallback and self.relief.fallback.calls))

    async def drain(self, patience_s: float) -> None:
        """Let nobody in, wait for those inside, then end what is left."""
        self.admission.closed = "drain"
        end_s = self.clock() + patience_s
        while self.busy and self.clock() < end_s:
            await asyncio.sleep(POLL_S)
        self.end_all()
        while self.busy and self.clock() < end_s + 1.0:
            await asyncio.sleep(POLL_S)

    def end_all(self) -> None:
        ended = ApiError(503, "server_shutting_down", "The server is shutting down: ask another one.", retry=True,
                         retry_after_s=1.0, outcome="shed_drain")  # fmt: skip
        for call in list(self.relief.fallback.calls) if self.relief.fallback else ():
            call.end(ended)
        for job in self.jobs:
            job.ended_by = ended
            job.stream.why = "drain"
            job.stream.changed.set()


def prompt_name(asked: ChatRequest | CompletionRequest) -> str:
    return "messages" if isinstance(asked, ChatRequest) else "prompt"
