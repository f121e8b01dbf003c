"""The two routes that answer: what was asked is understood, admitted, followed, and told whole or as a stream.

understood -> kept answers -> serving.admit(): limits, ladder, breaker, admission, tokens -> engine -> told
                                   refused -> detours.instead(): another server, a stale answer, or the refusal
"""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import Response

from engine.request import Choice
from service.detour import Detours, Errand
from service.errors import ApiError
from service.house import House
from service.ladder import HEADER, allowed
from service.life import Life, server_timing
from service.protocol import Reply, usage
from service.results import Wishes
from service.schemas import ChatRequest, CompletionRequest, parsed, validated
from service.sending import END, HEARTBEAT, ClientLeft, Events, event, unless_left, whole
from service.serving import Job, Serving

MOST_NAMED = 20  # fields in x-ignored-params
Asked = type[ChatRequest] | type[CompletionRequest]


def add_completions(app: FastAPI, house: House) -> None:
    serving, settings = house.serving, house.serving.settings
    detours = Detours(serving, gone)

    async def complete(http: Request, kind: Asked) -> Response:
        life: Life = http.state.life
        life.routed()
        with life.part("parse"):
            asked, ignored = understood(http, kind)
        life.parsed_s = life.clock()
        key = life.facts["key"]
        patience = patience_s(http, settings.request_timeout, bool(asked.stream))
        retry = is_retry(http)
        life.facts |= {"stream": bool(asked.stream), "model": house.name, "retry": retry}
        reply = Reply(
            f"{'chatcmpl' if kind is ChatRequest else 'cmpl'}-{life.id.removeprefix('req-')}", house.name,
            kind is ChatRequest, house.about["hash"], serving.prompts.token, asked.top_logprobs_wanted is not None,
            bool(asked.stream_options and asked.stream_options.include_usage),
        )  # fmt: skip
        errand = Errand(
            http, asked, life, key, life.start_s + patience, reply, allowed(http.headers.get(HEADER)),
            {"x-ignored-params": listed(ignored)} if ignored else {}, Wishes.of(http.headers.get("cache-control")),
        )  # fmt: skip
        try:
            if (kept := detours.kept(errand)) is not None:
                return kept
            try:
                job = await unless_left(http.receive, serving.admit(asked, life, key, patience, retry, errand.accepted))
            except ApiError as refusal:
                return await detours.instead(errand, refusal)
            errand.headers |= serving.limits.headers(key) | ({"x-degraded": job.degraded} if job.degraded else {})
            if asked.stream:
                return Events(streamed(serving, job, errand, detours), errand.headers, gone=lambda: gone(http),
                              ended=lambda: serving.close(job))  # fmt: skip
            return await unless_left(http.receive, gathered(serving, job, errand, detours))
        except ApiError as error:
            raise serving.limits.told_with(error, key) from error
        except ClientLeft:
            gone(http)
            return Response(status_code=499)  # nginx's number for it: nobody reads it

    def understood(http: Request, kind: Asked) -> tuple[ChatRequest | CompletionRequest, list[str]]:
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "content_type", "Send JSON, with Content-Type: application/json.")
        asked, ignored = validated(kind, parsed(http.state.body), ignore_unknown=settings.ignore_unknown)
        if asked.model != house.name:
            raise ApiError(
                404, "model_not_found", f"There is no model {asked.model!r} here, only {house.name!r}.", "model"
            )
        return asked, ignored

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await complete(http, ChatRequest)

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await complete(http, CompletionRequest)


async def gathered(serving: Serving, job: Job, errand: Errand, detours: Detours) -> Response:
    try:
        async for _ in serving.follow(job):
            for answer in job.answers:
                answer.catch_up()  # piece by piece: a long text at once would keep everybody waiting
        parts = job.life.split()
        found = errand.reply.whole(job.answers, told := usage(job.prompt_tokens, job.answers, parts))
        detours.keep(errand, job, told)
        return whole(found, headers=errand.headers | {"server-timing": server_timing(parts)})
    finally:
        serving.close(job)


async def streamed(serving: Serving, job: Job, errand: Errand, detours: Detours) -> AsyncGenerator[bytes, None]:
    """The events of one reply: none before its first text or the first sign of life. When something goes wrong there is
    no [DONE].
    """
    reply = errand.reply
    openings = map(reply.opening, range(len(job.answers)))
    opening = b"".join(event(one) for one in openings if one is not None)  # goes out with whatever is first
    try:
        told_so_far, ended = [0] * len(job.answers), set()
        async for anything_new in serving.follow(job):
            if not anything_new:
                yield HEARTBEAT
                continue
            for i, answer in enumerate(job.answers):
                done = answer.done and answer.request.error is None  # else follow() raises it at once
                fresh: list[Choice] = answer.choices[told_so_far[i] :]
                text = answer.new_text() if fresh or done else ""
                if text or (done and fresh):  # tokens without text of their own yet are told with the text
                    told_so_far[i] += len(fresh)
                    yield opening + event(reply.text(i, text, fresh))
                    opening = b""
                if done and i not in ended:
                    ended.add(i)
                    yield event(reply.ending(i, answer))
        told = usage(job.prompt_tokens, job.answers, job.life.split())
        detours.keep(errand, job, told)
        if reply.tells_usage:
            yield event(reply.chunk([], usage=told))
        yield END
    except ApiError as error:
        serving.close(job)  # before its limits are told: what it did not use is there again
        raise serving.limits.told_with(error, job.key) from error
    finally:
        serving.close(job)


def listed(names: Sequence[str]) -> str:
    """Names that a client made up, fit for a header: in ASCII, on one line, and not endless."""
    return ",".join(quote(name[:64], safe="") for name in names[:MOST_NAMED])


def gone(http: Request) -> None:
    life: Life = http.state.life
    life.failed("cancelled", "client_stalled" if http.scope["state"].get("stalled") else "client_left")
    life.status = 499


def patience_s(http: Request, most_s: float, stream: bool) -> float:
    """How long the client will wait, as far as it says so. ApiError 400.

    x-stainless-read-timeout, which OpenAI's clients send: the longest silence; a stream breaks it with heartbeats.
    """
    said = http.headers.get("x-request-deadline-ms")
    if said is not None:
        if not (said.isascii() and said.isdigit() and int(said[:12]) > 0):
            raise ApiError(400, "invalid_value", "x-request-deadline-ms must be a whole number of milliseconds.")
        most_s = min(most_s, int(said[:12]) / 1e3)
    if not stream:
        with contextlib.suppress(ValueError):
            silence_s = float(http.headers.get("x-stainless-read-timeout", "inf"))
            most_s = min(most_s, silence_s) if silence_s > 0 else most_s
    return most_s


def is_retry(http: Request) -> bool:
    count = http.headers.get("x-stainless-retry-count", "0")
    return count.isascii() and count.isdigit() and int(count[:6]) > 0
