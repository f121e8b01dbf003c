"""The routes. Each is short: what to check, whom to ask, what to answer."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException

from engine.request import Choice
from service.errors import ApiError
from service.keys import NOBODY, Keys
from service.life import Life, server_timing
from service.observe import Lives, Metrics
from service.protocol import Reply, usage
from service.schemas import ChatRequest, CompletionRequest, parsed, validated
from service.serving import Job, Serving

OPEN = ("/health", "/health/live", "/health/ready", "/metrics")  # asked by machines that have no key
ALLOWED = {405: "method_not_allowed", 404: "not_found"}


def make_app(serving: Serving, keys: Keys, metrics: Metrics, lives: Lives, about: dict[str, Any]) -> FastAPI:
    """about: what clients may know of the model and the machine."""
    settings = serving.settings
    app = FastAPI(title="llm-infer-baseline", docs_url=None, redoc_url=None)
    name = settings.served_name or about["name"]

    # ---- completions

    async def complete(http: Request, kind: type, chat: bool) -> Response:
        life: Life = http.state.life
        key = keys.check(http.headers.get("authorization"))
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "content_type", "Send JSON, with Content-Type: application/json.")
        body = parsed(http.state.body)
        life.mark("parse")
        asked, ignored = validated(kind, body, ignore_unknown=settings.ignore_unknown)
        if asked.model != name:
            raise ApiError(404, "model_not_found", f"There is no model {asked.model!r} here: {name} is served.", "model")
        life.facts |= {"key": key[:8], "stream": bool(asked.stream), "ignored": ignored}
        job = await serving.admit(asked, life, patience_s(http, settings.request_timeout, bool(asked.stream)), retries(http))
        reply = Reply(
            f"{'chatcmpl' if chat else 'cmpl'}-{life.id.removeprefix('req-')}", name, chat, about["hash"],
            lambda token: serving.prompts.decode([token]), asked.top_logprobs_wanted is not None,
        )  # fmt: skip
        headers = {"x-ignored-params": ",".join(ignored)} if ignored else {}
        if asked.stream:
            return EventSourceResponse(
                streamed(job, reply), sep="\n", ping=settings.heartbeat, send_timeout=settings.send_timeout,
                headers={**headers, "x-accel-buffering": "no", "cache-control": "no-cache"},
            )  # fmt: skip
        return await gathered(http, job, reply, headers)

    async def gathered(http: Request, job: Job, reply: Reply, headers: dict[str, str]) -> Response:
        try:
            async with leaving(http):
                async for _, stream in serving.follow(job):
                    stream.take()
            parts = job.life.split()
            found = reply.whole(job.answers, usage(job.prompt_tokens, job.answers, parts))
            return Response(orjson.dumps(found), media_type="application/json", headers=headers | {"server-timing": server_timing(parts)})
        finally:
            serving.close(job)

    async def streamed(job: Job, reply: Reply) -> AsyncIterator[ServerSentEvent]:
        try:
            for i in range(len(job.streams)):
                if (opening := reply.opening(i)) is not None:
                    yield event(opening)
            pending: dict[int, list[Choice]] = {}
            async for i, stream in serving.follow(job):
                fresh = pending.pop(i, []) + stream.take()
                text = stream.answer.new_text()
                if text or (fresh and (reply.logprobs or stream.done)):
                    yield event(reply.text(i, text, fresh))
                elif fresh:
                    pending[i] = fresh  # no text is certain yet: its tokens are told with the text
                if stream.done and stream.answer.request.error is None:
                    yield event(reply.ending(i, stream.answer))
            if job.asked.stream_options and job.asked.stream_options.include_usage:
                yield event(reply.chunk([], usage=usage(job.prompt_tokens, job.answers, job.life.split())))
            yield ServerSentEvent("[DONE]")
        except ApiError as error:  # the status is sent already; [DONE] would say that all is well
            job.life.outcome, job.life.error_code = error.outcome, error.code
            yield event(error.body)
        finally:
            serving.close(job)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await complete(http, ChatRequest, True)

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await complete(http, CompletionRequest, False)

    @app.get("/v1/models")
    async def models(http: Request) -> Any:
        keys.check(http.headers.get("authorization"))
        return {"object": "list", "data": [{"id": name, "object": "model", "created": about["created"], "owned_by": "llm-infer-baseline"}]}

    # ---- for those who run it

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def event(data: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(orjson.dumps(data).decode())


@contextlib.asynccontextmanager
async def leaving(http: Request) -> AsyncIterator[None]:
    """Cancels what is inside when the client closes the connection."""
    yield  # to be written
