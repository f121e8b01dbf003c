"""What a client may send: OpenAI's fields, each with its limits. What is not offered is refused by name, never ignored.

Strict: "0.5" is no number and 1.0 no integer, as OpenAI has it. Limits bound what a client can make the server hold.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from engine.request import Sampling
from service.errors import ApiError, invalid

MOST_MESSAGES, MOST_PARTS, MOST_STOPS, MOST_BIASES, MOST_CHOICES = 2048, 64, 4, 300, 8
MOST_METADATA, MOST_FIELDS = 16, 100
UNSUPPORTED = {
    "tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "response_format", "audio",
    "prediction", "modalities", "reasoning_effort", "verbosity", "web_search_options", "best_of", "suffix", "echo",
    "prompt_logprobs", "tool_calls", "tool_call_id", "structured_outputs", "guided_json", "use_beam_search",
}  # fmt: skip
WITHOUT_EFFECT = {"response_format": {"type": "text"}, "modalities": ["text"], "best_of": 1, "echo": False}

SALT = "keys and values of a common beginning are shared only with requests of the same API key and the same salt"

Short = Annotated[str, Field(max_length=512)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]

# One thing or a list of them. Which is meant is decided first, so that an error is about that.
ONE_OR_MORE = Discriminator(lambda value: "more" if isinstance(value, list) else "one")
Stops = Annotated[
    Annotated[Stop, Tag("one")] | Annotated[list[Stop], Field(max_length=MOST_STOPS), Tag("more")], ONE_OR_MORE
]
# fail_fast: a list of a million wrong things must not become a million errors, of which one is told.
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
Prompt = Annotated[Annotated[str, Tag("one")] | Annotated[Tokens, Tag("more")], ONE_OR_MORE]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def few_fields(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > MOST_FIELDS:
            raise ValueError(f"can have {MOST_FIELDS} fields at most, and has {len(given)}")
        return given


class Part(Strict):
    type: Literal["text"]
    text: str


Parts = Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=MOST_PARTS)]
Content = Annotated[Annotated[str, Tag("one")] | Annotated[Parts, Tag("more")], ONE_OR_MORE]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Short | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted: padding against listeners, which plain HTTP has none to hide from


class Asked(Strict):
    """What both endpoints take. None is as good as left out."""

    model: Short
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)] | None = (
        None
    )
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: Short | None = None
    metadata: Annotated[dict[Short, Short], Field(max_length=MOST_METADATA)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Short | None = None
    prompt_cache_key: Short | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=512, description=SALT)] | None = None

    @field_validator("logit_bias", "metadata", mode="before")
    @classmethod
    def few_entries(cls, given: Any, info: ValidationInfo) -> Any:
        most = MOST_BIASES if info.field_name == "logit_bias" else MOST_METADATA
        if isinstance(given, dict) and len(given) > most:
            raise ValueError(f"can have {most} entries at most, and has {len(given)}")
        return given

    @field_validator("logit_bias")
    @classmethod
    def keys_are_token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        wrong = next((key for key in bias or () if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
        if wrong is not None:
            raise ValueError(f"keys must be token ids, and {wrong[:20]!r} is none")
        return bias

    @field_validator("store", mode="before")
    @classmethod
    def zero_is_not_false(cls, store: Any) -> Any:
        if store is not None and not isinstance(store, bool):  # Literal compares by ==, and 0 == False
            raise ValueError("must be true or false")
        return store

    @model_validator(mode="after")
    def options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: set stream to true")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives to tell of each token; None: no log probabilities at all."""
        raise NotImplementedError

    def sampling(self, new_tokens: int) -> Sampling:
        """The engine's words for it. OpenAI draws at temperature 1 unless told otherwise."""
        given = {
            name: getattr(self, name)
            for name in ("top_k", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
            if getattr(self, name) is not None
        }
        return Sampling(
            max_new_tokens=new_tokens, temperature=1.0 if self.temperature is None else self.temperature,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()}, seed=self.seed,
            logprobs=self.top_logprobs_wanted, stop=self.stops, ignore_eos=bool(self.ignore_eos), **given,
        )  # fmt: skip


class ChatRequest(Asked):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def one_limit(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set it to true")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def texts(self) -> list[str]:
        return [message.text for message in self.messages]


class CompletionRequest(Asked):
    """prompt: one text, or one list of token ids."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    @property
    def texts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else []


Kind = TypeVar("Kind", ChatRequest, CompletionRequest)


def parsed(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body. No NaN, no lone surrogates, no endless nesting; of two equal keys the last counts."""
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The body is no valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(found, dict):
        raise invalid(f"The body must be a JSON object, and is a {type(found).__name__}.", code="invalid_json")
    return found


def validated(kind: type[Kind], body: dict[str, Any], *, ignore_unknown: bool) -> tuple[Kind, list[str]]:
    """(the request, the names that were ignored). ApiError 400 with the field that is wrong."""
    ignored = []
    for name in [name for name in body if name not in kind.model_fields]:
        if body[name] is None or body[name] == WITHOUT_EFFECT.get(name, ...):
            del body[name]
        elif name in UNSUPPORTED:
            raise invalid(f"{name} is not supported here: leave it out.", name, "unsupported_parameter")
        elif ignore_unknown:
            ignored.append(name)
            del body[name]
    try:
        return kind.model_validate(body), ignored
    except ValidationError as error:
        raise explained(error) from error


def explained(error: ValidationError) -> ApiError:
    """The first thing that pydantic found, in a sentence of ours."""
    first = error.errors(include_url=False, include_context=True)[0]
    where = [
        part for part in first["loc"] if isinstance(part, int) or part in KNOWN_NAMES or not first["loc"].index(part)
    ]
    param = ".".join(str(part)[:64] for part in where) or None
    last = str(first["loc"][-1])[:64] if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        param = param if len(first["loc"]) == 1 else f"{param}.{last}"  # a name that the client made up
        if last in UNSUPPORTED:
            return invalid(f"{last} is not supported here: leave it out.", param, "unsupported_parameter")
        return invalid(f"{param} is no field of this endpoint: leave it out.", param, "unknown_parameter")
    if first["type"] == "literal_error" and last == "type":
        return invalid(f"{param}: only text parts are understood here.", param, "unsupported_content")
    if first["type"] == "int_type" and first["loc"][:2] == ("prompt", "more"):
        return invalid("A list as prompt holds token ids: send a request of its own for each text.", param)
    what = first["msg"].removeprefix("Value error, ")
    return invalid(f"{param}: {what[0].lower()}{what[1:]}." if param else f"{what}.", param)


KNOWN_NAMES = {
    name for kind in (ChatRequest, CompletionRequest, Message, Part, StreamOptions) for name in kind.model_fields
}
