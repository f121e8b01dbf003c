"""Answers that the engine does not compute: kept ones, and those of another server.

kept before (x-cache: hit) -> [limits, breaker, admission: serving.py] -> refused: another server, a stale answer
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from service.errors import ApiError
from service.fallback import Asked, Call, Fallback
from service.incoming import Unusable
from service.ladder import Rung
from service.life import Life, server_timing
from service.protocol import Reply, told_usage
from service.relief import HELPED
from service.results import Kept, Wishes
from service.sending import END, HEARTBEAT, Events, event, unless_left, whole
from service.serving import Job, Serving

FAILED = ApiError(
    502, "fallback_failed", "The server that stood in for this one failed on this answer: ask again.", retry=True,
    outcome="upstream_error",
)  # fmt: skip


@dataclass
class Errand:
    """One checked request, and what its answer needs. headers: of its answer. accepted: rungs. kept_as: in results."""

    http: Request
    asked: Asked
    life: Life
    key: str
    deadline_s: float
    reply: Reply
    accepted: frozenset[Rung]
    headers: dict[str, str] = field(default_factory=dict)
    wishes: Wishes = field(default_factory=Wishes)
    kept_as: str | None = None


class Detours:
    """gone: what is to be done when the client of a stream has left."""

    def __init__(self, serving: Serving, gone: Any) -> None:
        self.serving, self.relief, self.gone = serving, serving.relief, gone

    # ---- kept answers

    def kept(self, errand: Errand) -> Response | None:
        """An answer that is there already. It is drawn from the key's limits, and takes no place. ApiError 429."""
        results = self.relief.results
        if results is None:
            return None
        with errand.life.part("cache"):
            named = results.name(errand.asked, errand.key, self.serving.new_tokens(errand.asked, 0))
            errand.kept_as = named if errand.wishes.write else None
            found = results.find(named) if named and errand.wishes.read else None
        if found is not None:
            return self.from_kept(errand, found)
        if errand.kept_as:
            errand.headers["x-cache"] = "miss"
        return None

    def stale(self, errand: Errand) -> Response | None:
        """What is older than it should be, in place of nothing at all (RFC 5861, stale-if-error)."""
        found = self.relief.results.find(errand.kept_as, stale=True) if errand.kept_as and errand.wishes.read else None
        if found is None:
            return None
        return self.from_kept(errand, found, stale=True)

    def from_kept(self, errand: Errand, kept: Kept, stale: bool = False) -> Response:
        life, reply = errand.life, errand.reply
        with life.part("cache"):
            self.serving.limits.draw(errand.key, kept.prompt_tokens + kept.completion_tokens)
            if stale:
                self.degraded(errand, Rung.CACHED, "cached")
            self.serving.step_aside(life)
            life.facts |= {"cache": "hit", "prompt_tokens": kept.prompt_tokens, "cached_tokens": kept.prompt_tokens,
                           "completion_tokens": kept.completion_tokens}  # fmt: skip
            headers = self.serving.limits.headers(errand.key) | errand.headers
            headers |= {"x-cache": "hit", "age": str(int(kept.age_s))}
        parts = life.split()
        usage = told_usage(kept.prompt_tokens, kept.completion_tokens, kept.prompt_tokens, parts)
        if errand.asked.stream:
            return Events(
                told_again(reply, kept, usage), headers, gone=lambda: self.gone(errand.http), ended=lambda: None
            )
        answer = reply.shell("chat.completion" if reply.chat else "text_completion")
        return whole(answer | {"choices": kept.choices, "usage": usage},
                     headers=headers | {"server-timing": server_timing(parts)})  # fmt: skip

    def keep(self, errand: Errand, job: Job, usage: dict[str, Any]) -> None:
        """The engine's answer, unless it would have been longer without the cap."""
        cut = job.degraded and any(answer.request.finish_reason == "length" for answer in job.answers)
        if errand.kept_as and not cut:
            once_more = Reply(**vars(errand.reply) | {"told_chars": {}})  # a stream has told its log probabilities
            choices = [once_more.whole_choice(i, answer) for i, answer in enumerate(job.answers)]
            self.relief.results.keep(errand.kept_as, choices, usage)

    # ---- instead of a refusal

    async def instead(self, errand: Errand, refusal: ApiError) -> Response:
        """What the ladder has for a request that the engine does not take; else the refusal is raised."""
        if refusal.outcome in HELPED:
            for rung in self.relief.ladder.below(errand.accepted):
                found = await self.handed_on(errand) if rung is Rung.MODEL else self.stale(errand)
                if found is not None:
                    return found
        raise refusal

    def degraded(self, errand: Errand, rung: Rung, how: str) -> None:
        self.relief.ladder.used(rung)
        errand.life.facts["degraded"] = errand.headers["x-degraded"] = how

    async def handed_on(self, errand: Errand) -> Response | None:
        """The other server's answer, or the beginning of its stream; None when it has none."""
        fallback, asked, serving = self.relief.fallback, errand.asked, self.serving
        if not (fallback.free and fallback.understands(asked)):
            return None
        new = serving.new_tokens(asked, 0)
        drawn = serving.prompts.estimate(asked) + (asked.n or 1) * new
        serving.limits.draw(errand.key, drawn)
        serving.step_aside(errand.life)
        try:
            with errand.life.part("fallback"):
                call = await unless_left(errand.http.receive, fallback.ask(asked, new, errand.deadline_s))
        except BaseException as why:
            serving.limits.give_back(errand.key, "tokens", drawn)
            if not isinstance(why, Unusable):
                raise
            errand.life.facts["fallback_error"] = str(why)
            serving.limits.give_back(errand.key, "requests", 1)
            return None
        call.closed = lambda: self.settle(errand, call, drawn)
        try:
            self.degraded(errand, Rung.MODEL, f"model={fallback.model}")
            errand.headers = serving.limits.headers(errand.key) | errand.headers
            return self.answer_of(errand, call, fallback)
        except BaseException:
            call.close()
            raise

    def answer_of(self, errand: Errand, call: Call, fallback: Fallback) -> Response:
        reply = errand.reply
        reply.model, reply.fingerprint = fallback.model, "fallback"
        call.beat_s = self.serving.settings.heartbeat
        if call.stream:
            return Events(passed_on(errand, call), errand.headers, gone=lambda: self.gone(errand.http),
                          ended=call.close)  # fmt: skip
        call.close()
        answer = reply.shell("chat.completion" if call.chat else "text_completion")
        return whole(answer | {"choices": call.choices, "usage": usage_of(errand, call)}, headers=errand.headers)

    def settle(self, errand: Errand, call: Call, drawn: int) -> None:
        """What was drawn by estimate is put right; of a stream that broke off, by what came."""
        spent = (call.prompt_tokens or 0) + call.completion_tokens
        self.serving.limits.give_back(errand.key, "tokens", drawn - spent)
        errand.life.facts |= {"prompt_tokens": call.prompt_tokens, "completion_tokens": call.completion_tokens}
        took_so_far(errand, call)


async def told_again(reply: Reply, kept: Kept, usage: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    for chunk in kept.events(reply):
        yield event(chunk)
    if reply.tells_usage:
        yield event(reply.chunk([], usage=usage))
    yield END


async def passed_on(errand: Errand, call: Call) -> AsyncGenerator[bytes, None]:
    """The other server's stream. When something goes wrong there is no [DONE]."""
    reply = errand.reply
    try:
        yield event(reply.chunk(call.first))
        async for choices in call.events:
            yield event(reply.chunk(choices)) if choices else HEARTBEAT
        if reply.tells_usage and call.prompt_tokens is not None:
            yield event(reply.chunk([], usage=usage_of(errand, call)))
        yield END
    except Unusable as why:
        errand.life.facts["fallback_error"] = str(why)
        raise replace(FAILED) from why
    finally:
        call.close()


def usage_of(errand: Errand, call: Call) -> dict[str, Any]:
    took_so_far(errand, call)
    return told_usage(call.prompt_tokens, call.completion_tokens, 0, errand.life.split())


def took_so_far(errand: Errand, call: Call) -> None:
    errand.life.parts["fallback"] = call.clock() - call.begin_s
