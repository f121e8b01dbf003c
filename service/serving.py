"""A request's way through the service: admitted, tokenised, handed to the engine, followed to its end.

    checked (app.py) -> rates -> admission -> tokenised -> engine -> streamed or gathered -> books closed

Whatever happens on the way, the last step is the same: what is still computed for it is cancelled, and its places are
given back.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from engine.request import Refusal, Sampling
from service.admission import Admission, Ticket
from service.bridge import Bridge, Stream
from service.errors import ApiError, invalid, too_long
from service.life import Life
from service.prompts import Prompts
from service.schemas import ChatRequest, CompletionRequest
from service.settings import ServeConfig

LEGACY_NEW_TOKENS = 16  # what OpenAI's completions endpoint gives without a limit


@dataclass(eq=False)
class Job:
    """One admitted request. deadline_s: a reading of the clock."""

    asked: ChatRequest | CompletionRequest
    life: Life
    ticket: Ticket
    deadline_s: float
    prompt_tokens: int = 0
    streams: list[Stream] = field(default_factory=list)

    @property
    def answers(self) -> list:
        return [stream.answer for stream in self.streams]


class Serving:
    """The parts of the service, wired. clock: the engine's."""

    def __init__(
        self, settings: ServeConfig, bridge: Bridge, prompts: Prompts, admission: Admission, clock: Callable[[], float]
    ) -> None:
        self.settings, self.bridge, self.prompts, self.admission, self.clock = settings, bridge, prompts, admission, clock

    @property
    def context(self) -> int:
        return self.bridge.engine.context or 1 << 20

    async def admit(self, asked: ChatRequest | CompletionRequest, life: Life, patience_s: float, retried: int) -> Job:
        """A place, then the tokens. ApiError: there is no place, or the request cannot be served as it is."""
        new, n = self.new_tokens(asked, 0), asked.n or 1
        estimate = min(self.prompts.estimate(asked), self.context)
        ticket = self.admission.enter(
            answers=n, prompt_tokens=estimate, new_tokens=new, deadline_s=patience_s, retried=retried
        )
        job = Job(asked, life, ticket, life.start_s + patience_s)
        life.mark("admit")
        try:
            ids = await self.prompts.ids(asked)
            life.mark("tokenize")
            job.prompt_tokens = len(ids)
            new = self.new_tokens(asked, len(ids))
            if not ids:
                raise invalid("The prompt is empty.", prompt_name(asked))
            if len(ids) + new > self.context:
                raise too_long(len(ids), new, self.context, prompt_name(asked))
            self.admission.correct(ticket, len(ids), new)
            job.streams = self.bridge.submit(ids, self.sampling(asked, new), n)
            life.timelines = [stream.answer.request.timeline for stream in job.streams]
        except Refusal as why:
            self.admission.leave(ticket)
            raise invalid(str(why), prompt_name(asked)) from why
        except BaseException:
            self.admission.leave(ticket)
            raise
        return job

    def new_tokens(self, asked: ChatRequest | CompletionRequest, prompt_tokens: int) -> int:
        if asked.new_tokens is not None:
            return asked.new_tokens
        most = LEGACY_NEW_TOKENS if isinstance(asked, CompletionRequest) else self.settings.max_new_tokens
        return max(min(most, self.context - prompt_tokens), 1)

    def sampling(self, asked: ChatRequest | CompletionRequest, new: int) -> Sampling:
        return asked.sampling(new)

    async def follow(self, job: Job) -> AsyncIterator[tuple[int, Stream]]:
        """(which answer, its stream) whenever one of them has something new. ApiError when it fails or takes too long."""
        left = dict(enumerate(job.streams))
        waits = {asyncio.create_task(stream.changed.wait()): i for i, stream in left.items()}
        try:
            while left:
                limit = self.limit_s(job)
                done, _ = await asyncio.wait(waits, timeout=max(limit - self.clock(), 0), return_when="FIRST_COMPLETED")
                if not done:
                    self.out_of_time(job)
                for task in done:
                    i = waits.pop(task)
                    stream = left[i]
                    yield i, stream
                    if stream.done and not stream.fresh:
                        del left[i]
                        self.raise_if_failed(stream)
                    else:
                        waits[asyncio.create_task(stream.changed.wait())] = i
        finally:
            for task in waits:
                task.cancel()

    def limit_s(self, job: Job) -> float:
        """Until when something must have happened: until it is started, the queue's patience; then the deadline."""
        started = any(stream.answer.request.timeline.admitted is not None for stream in job.streams)
        queue_end = job.life.start_s + self.settings.queue_timeout
        return job.deadline_s if started else min(job.deadline_s, queue_end)

    def out_of_time(self, job: Job) -> None:
        if self.clock() < self.limit_s(job):  # it was started meanwhile
            return
        started = any(stream.answer.request.timeline.admitted is not None for stream in job.streams)
        done = sum(len(stream.answer.choices) for stream in job.streams)
        what = f"{done} tokens were computed" if started else "it never left the queue"
        raise ApiError(
            504, "deadline_exceeded", f"The time for this request is over ({what}): ask for less, or wait longer.",
            details={"computed_tokens": done}, outcome="timeout",
        )  # fmt: skip

    def raise_if_failed(self, stream: Stream) -> None:
        error = stream.answer.request.error
        if error is not None:
            raise ApiError(500, "engine_error", f"The engine failed on this request: {error}", retry=True,
                           outcome="engine_error")  # fmt: skip

    def close(self, job: Job) -> None:
        """However it ended: nothing is computed for it any more, and its place is free."""
        self.bridge.cancel(job.streams)
        self.admission.leave(job.ticket)


def prompt_name(asked: ChatRequest | CompletionRequest) -> str:
    return "messages" if isinstance(asked, ChatRequest) else "prompt"


Sender = Callable[[dict], Awaitable[None]]
