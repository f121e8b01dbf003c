"""The routes. Each is short: what to check, whom to ask, what to answer."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from service.completions import add_completions
from service.errors import ApiError
from service.guard import BROKEN, Guard, Headers, note_trace
from service.house import House
from service.life import Life
from service.openapi import described
from service.page import add_page
from service.sending import told, whole

LONGEST_ID = 64


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
        kept=lambda: house.watch.connections.kept,
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
