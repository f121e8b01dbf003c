"""The interface's description at /openapi.json, from the models that check requests: the two cannot disagree."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service.schemas import ChatRequest, CompletionRequest

BODIES = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
REFUSALS = {
    "400": "what was asked for is wrong", "401": "the API key is missing or wrong", "404": "there is no such model",
    "408": "the body came too slowly", "413": "the body is too large", "415": "the body is no JSON",
    "429": "the key's rate limit", "500": "the engine failed", "503": "no room, or not in time", "504": "out of time",
}  # fmt: skip
ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"],
        "properties": {
            "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
            "code": {"type": "string"}, "details": {"type": "object"},
        },
    }},
}  # fmt: skip
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
USAGE = {
    "type": "object", "required": [*COUNTS, "timing"],
    "properties": {name: {"type": "integer", "minimum": 0} for name in COUNTS},
}  # fmt: skip
ANSWER = {
    "type": "object", "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"}, "object": {"enum": ["chat.completion", "text_completion"]},
        "created": {"type": "integer"}, "model": {"type": "string"}, "usage": USAGE,
        "choices": {"type": "array", "minItems": 1, "items": {
            "type": "object", "required": ["index", "finish_reason"],
            "properties": {"index": {"type": "integer"}, "finish_reason": {"enum": ["stop", "length"]}},
        }},
    },
}  # fmt: skip


def described(app: FastAPI, model: str) -> None:
    """Give the application its description. model: the only name that a request may say."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = description(app, model)
        return app.openapi_schema

    app.openapi = describe  # ty: ignore


def description(app: FastAPI, model: str) -> dict[str, Any]:
    found = get_openapi(title=app.title, version="1", routes=app.routes)
    _, models = models_json_schema(
        [(kind, "validation") for kind in BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    found["components"] = {
        "schemas": models["$defs"] | {"Error": ERROR, "Answer": ANSWER},
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    for kind in BODIES.values():
        fields = found["components"]["schemas"][kind.__name__]["properties"]
        fields["model"] = {"const": model}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            describe_operation(path, operation)
    return found


def describe_operation(path: str, operation: dict[str, Any]) -> None:
    refusal = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    if path in BODIES:
        answer = {"$ref": "#/components/schemas/Answer"}
        body = {"$ref": f"#/components/schemas/{BODIES[path].__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
        operation["responses"] = {"200": {
            "description": "the answer, or its events with stream",
            "content": {"application/json": {"schema": answer}, "text/event-stream": {}},
        }}  # fmt: skip
        operation["responses"] |= {status: {"description": what} | refusal for status, what in REFUSALS.items()}
        operation["security"] = [{"key": []}]
    else:
        operation["responses"] = {"200": {"description": "as it is now"}} | {
            "4XX": {"description": "refused"} | refusal, "503": {"description": "not now"},
        }  # fmt: skip
