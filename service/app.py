"""The routes. Each is short: what to check, whom to ask, what to answer."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from engine.request import Choice
from service.books import Books
from service.detour import Detours, Errand
from service.errors import ApiError
from service.guard import BROKEN, Guard, Headers, note_trace
from service.keys import Keys
from service.ladder import HEADER, allowed
from service.life import Life, Tracing, server_timing
from service.openapi import described
from service.page import add_page
from service.protocol import Reply, usage
from service.results import Wishes
from service.schemas import ChatRequest, CompletionRequest, parsed, validated
from service.sending import END, HEARTBEAT, ClientLeft, Events, event, told, unless_left, whole
from service.serving import Job, Serving
from service.watch import Watch

LONGEST_ID = 64
MOST_NAMED = 20  # fields in x-ignored-params
Asked = type[ChatRequest] | type[CompletionRequest]


@dataclass(frozen=True)
class House:
    """What the routes need. about: what may be known of the model and the machine."""

    serving: Serving
    keys: Keys
    books: Books
    watch: Watch
    about: dict[str, Any]
    traces: Tracing | None = None

    @property
    def name(self) -> str:
        """The model's, for clients."""
        return self.serving.settings.served_name or self.about["name"]


def make_app(house: House) -> Guard:
    """The ASGI application, with the guard around it. Its lifespan starts and ends the engine's thread."""
    settings, serving = house.serving.settings, house.serving

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        serving.bridge.start()
        async with house.watch.awake():
            yield
        house.books.settle()
        serving.bridge.stop()
        serving.prompts.pool.shutdown(wait=False, cancel_futures=True)
        if house.traces is not None:
            house.traces.stop()

    app = FastAPI(title="llm-infer-baseline", docs_url=None, redoc_url=None, lifespan=lifespan,
                  redirect_slashes=False)  # fmt: skip
    app.add_exception_handler(ApiError, explain)
    app.add_exception_handler(HTTPException, no_such_route)
    app.add_exception_handler(Exception, broken)
    if settings.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=[settings.cors_origin], allow_methods=["GET", "POST"],
                           allow_headers=["*"])  # fmt: skip
    add_completions(app, house)
    add_views(app, house)
    if settings.page:
        add_page(app)
    described(app, house.name)

    def ended(life: Life) -> None:
        serving.step_aside(life)
        house.books.close(life)

    return Guard(
        app, clock=serving.clock, door=door_of(house), ended=ended, refused=house.books.close_later,
        begun=note_trace if house.traces is None else house.traces.begin,
        max_body=settings.max_body, body_timeout=settings.body_timeout, cors_origin=settings.cors_origin,
    )  # fmt: skip


def door_of(house: House) -> Callable[[dict, Headers, Life], None]:
    """Who may go further, before a body is parsed: the key, then whether there is room at all."""

    def door(scope: dict, headers: Headers, life: Life) -> None:
        path, method = scope["path"], scope["method"]
        if method == "OPTIONS" or not path.startswith(("/v1/", "/config", "/capacity", "/debug/")):
            return
        life.facts["key"] = house.keys.check(headers.get("authorization"))
        if method == "POST" and life.endpoint in ("chat", "completions"):
            try:
                if scope["state"]["whole"]:
                    house.serving.knock(life)
                else:
                    house.serving.admission.check_door(life.facts["key"])
            except ApiError as refusal:
                if not house.serving.relief.may_help(refusal):
                    raise

    return door


# ---- completions


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
    """The events of one reply. What goes wrong on the way is an event too, and then there is no [DONE]."""
    reply = errand.reply
    try:
        for i in range(len(job.answers)):
            if (opening := reply.opening(i)) is not None:
                yield event(opening)
        told_so_far, ended = [0] * len(job.answers), set()
        async for anything_new in serving.follow(job):
            if not anything_new:
                yield HEARTBEAT
                continue
            for i, answer in enumerate(job.answers):
                done = answer.done
                fresh: list[Choice] = answer.choices[told_so_far[i] :]
                text = answer.new_text() if fresh or done else ""
                if text or (done and fresh):  # tokens without text of their own yet are told with the text
                    told_so_far[i] += len(fresh)
                    yield event(reply.text(i, text, fresh))
                if done and i not in ended:
                    ended.add(i)
                    yield event(reply.ending(i, answer))
        told = usage(job.prompt_tokens, job.answers, job.life.split())
        detours.keep(errand, job, told)
        if reply.tells_usage:
            yield event(reply.chunk([], usage=told))
        yield END
    except ApiError as error:  # the status has been sent
        job.life.failed(error.outcome, error.code)
        yield event(error.body)
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


# ---- for those who run it


def add_views(app: FastAPI, house: House) -> None:
    serving, watch = house.serving, house.watch

    @app.get("/v1/models")
    async def models() -> Response:
        return whole({"object": "list", "data": [model_card(house)]})

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> Response:
        if model != house.name:
            raise ApiError(
                404, "model_not_found", f"There is no model {model[:200]!r} here, only {house.name!r}.", "model"
            )
        return whole(model_card(house))

    @app.get("/health")
    async def health() -> Response:
        found = watch.health()
        return whole(found, 503 if found["status"] in ("stalled", "draining") else 200)

    @app.get("/health/live")
    async def live() -> Response:
        found = watch.alive()
        return whole(found, 503 if found["status"] == "stalled" else 200)

    @app.get("/health/ready")
    async def ready() -> Response:
        found = watch.admitting()
        return whole(found, 200 if found["ready"] else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        watch.refresh()
        house.books.settle()
        return Response(generate_latest(house.books.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/capacity")
    async def capacity() -> Response:
        return whole(watch.capacity() | {"prediction_error": house.books.grading(), "model": house.about})

    @app.get("/config")
    async def config() -> Response:
        return whole(serving.settings.shown())

    @app.get("/debug/requests")
    async def latest(http: Request) -> Response:
        house.books.settle()
        return whole({"requests": house.books.lives.latest(http.state.life.facts["key"])})

    @app.get("/debug/requests/{request_id}")
    async def one_life(http: Request, request_id: str) -> Response:
        house.books.settle()
        found = house.books.lives.get(request_id[:LONGEST_ID], http.state.life.facts["key"])
        if found is None:
            raise ApiError(404, "not_found", "No request of this id is remembered: the last ones are, by x-request-id.")
        return whole(found | {"timelines": [one.shown() for one in found["timelines"]]})


def model_card(house: House) -> dict[str, Any]:
    return {"id": house.name, "object": "model", "created": house.about["created"], "owned_by": "llm-infer-baseline",
            "max_model_len": house.serving.context}  # fmt: skip


# ---- errors


async def explain(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    http.state.life.failed(error.outcome, error.code)
    return told(error)


async def no_such_route(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, what = ("method_not_allowed", "take this method") if error.status_code == 405 else ("not_found", "exist")
    http.state.life.failed("client_error", code)
    message = f"{http.method[:16]} {http.url.path[:200]} does not {what} here."
    return told(ApiError(error.status_code, code, message, headers=error.headers or {}))


async def broken(_http: Request, _error: Exception) -> Response:
    """OpenAI's error object here too. The error itself goes on to the guard and to the log."""
    return told(BROKEN)
