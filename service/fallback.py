"""Another server that speaks OpenAI's protocol, for what the engine here cannot take.

Asked only before the first byte of an answer, and never twice. Of what comes back only what an answer consists of is
passed on: its errors, headers and names are its own business, and go to the log. It is told how much time the client
has left, and not to hand the request on itself: two servers may be each other's fallback.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson

from lab.client import data_of
from lab.wire import Place
from service.breaker import Breaker, Permit
from service.errors import ApiError
from service.incoming import Incoming, Unusable
from service.schemas import ChatRequest, CompletionRequest

MOST_BYTES = 16 << 20  # of an answer in one piece, and of an event
LONGEST_NAME = 32  # characters of a role or a reason
# Nobody else's business, or said in words of our own.
OURS = {"model", "stream_options", "user", "metadata", "store", "service_tier", "safety_identifier",
        "prompt_cache_key", "cache_salt"}  # fmt: skip
ASKERS_FAULT = (400, 413, 415, 422)  # says nothing about the other server
Asked = ChatRequest | CompletionRequest
Part = dict[str, Any]


class Fallback:
    """url: what stands before /chat/completions. silence_s: how long nothing may come. most: calls at a time."""

    def __init__(
        self, url: str, model: str, key: str | None, *, silence_s: float, most: int, breaker: Breaker,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.url, self.model, self.silence_s, self.most = url.rstrip("/"), model, silence_s, most
        self.breaker, self.clock = breaker, clock
        self.headers = {"x-allow-degraded": "none", "Connection": "close"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.calls: set[Call] = set()

    @property
    def free(self) -> bool:
        return len(self.calls) < self.most and self.breaker.wait_s() == 0

    @staticmethod
    def understands(asked: Asked) -> bool:
        """Token ids are one model's own."""
        return not asked.logit_bias and not (isinstance(asked, CompletionRequest) and isinstance(asked.prompt, list))

    async def ask(self, asked: Asked, new_tokens: int, deadline_s: float) -> "Call":
        """A call whose first event has come, or all of an answer in one piece. Unusable; ApiError 504."""
        permit = self.breaker.permit() if len(self.calls) < self.most else None
        if permit is None:
            raise Unusable("not asked: its circuit is open, or enough is on its way to it")
        call = Call(self, permit, asked, deadline_s)
        self.calls.add(call)
        try:
            await call.begin(self.body(asked, new_tokens))
        except BaseException:
            call.close()
            raise
        return call

    def body(self, asked: Asked, new_tokens: int) -> bytes:
        """As the client said it, with its limit on tokens spelled out."""
        said = asked.model_dump(exclude_unset=True, exclude_none=True, exclude=OURS)
        if asked.new_tokens is None:
            said["max_tokens"] = new_tokens
        if asked.stream:
            said["stream_options"] = {"include_usage": True}
        return orjson.dumps(said | {"model": self.model})

    def place(self, chat: bool, left_s: float) -> Place:
        path = "/chat/completions" if chat else "/completions"
        return Place.of(self.url + path, self.headers | {"x-request-deadline-ms": str(max(int(left_s * 1e3), 1))})


class Call:
    """One request to it. close() it, whatever happens; closed: called then, once.

    ended_by: somebody else ends it: the service itself. choices: of an answer in one piece. first: of a stream, its
    first event. beat_s: after so much silence an empty event is told.
    """

    def __init__(self, fallback: Fallback, permit: Permit, asked: Asked, deadline_s: float) -> None:
        self.fallback, self.permit, self.deadline_s = fallback, permit, deadline_s
        self.chat, self.stream, self.clock = isinstance(asked, ChatRequest), bool(asked.stream), fallback.clock
        self.begin_s, self.beat_s = self.clock(), 1.0
        self.incoming = Incoming(fallback.silence_s, fallback.clock)
        self.ended_by: ApiError | None = None
        self.closed: Callable[[], object] = lambda: None
        self.choices: list[Part] = []
        self.first: list[Part] = []
        self.prompt_tokens: int | None = None
        self.completion_tokens = 0  # until it tells them: pieces of text
        self.events = self.read_events()

    # ---- along

    async def begin(self, body: bytes) -> None:
        left_s = self.left_s()
        try:
            await self.incoming.ask(self.fallback.place(self.chat, left_s), body, left_s)
        except Unusable as why:
            self.left_s()  # the client's time, and no fault of the other server
            raise self.failed(why) from why
        if self.stream:
            self.first = await self.next_event()
        else:
            await self.read_whole()

    async def next_event(self) -> list[Part]:
        async for choices in self.events:
            if choices:
                return choices
        raise self.failed("empty: a stream that says nothing")

    async def read_events(self) -> AsyncIterator[list[Part]]:
        """The choices of each event; an empty list at times of silence. Unusable unless [DONE] came at last."""
        rest = b""
        while (piece := await self.piece()) != b"":
            if piece is None:
                yield []
                continue
            *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
            if len(rest) > MOST_BYTES:
                raise self.failed("malformed: an event without an end")
            for one in whole:
                if one.strip() == b"data: [DONE]":
                    self.succeeded()
                    return
                if choices := self.understood(one):
                    yield choices
        raise self.failed("cut: the stream ended without [DONE]")

    async def read_whole(self) -> None:
        raw = b""
        while (piece := await self.piece()) != b"":
            raw += piece or b""
            if len(raw) > MOST_BYTES:
                raise self.failed("malformed: an answer without an end")
        self.choices = self.understood(b"data:" + raw.replace(b"\n", b" "))
        if not self.choices or self.prompt_tokens is None:
            raise self.failed("malformed: no choices, or no usage")
        self.succeeded()

    async def piece(self) -> bytes | None:
        """As Incoming.piece(), of an answer that is one. Unusable; ApiError."""
        if self.ended_by is not None:
            raise self.ended_by
        try:
            found = await self.incoming.piece(min(self.beat_s, self.left_s()))
        except Unusable as why:
            raise self.failed(why) from why
        if (status := self.incoming.status) not in (0, 200):
            raise self.failed(f"status {status}", counts=status not in ASKERS_FAULT)
        return found

    def understood(self, event: bytes) -> list[Part]:
        """The choices in an event; of its usage a note is taken. Unusable."""
        try:
            data = data_of(event)
            if data is None:
                return []
            if data.get("error"):
                raise ValueError("it tells of an error")
            if usage := data.get("usage"):
                self.prompt_tokens, self.completion_tokens = whole(usage["prompt_tokens"]), whole(
                    usage["completion_tokens"]
                )  # fmt: skip
            choices = [cleaned(one, self.chat, self.stream) for one in data.get("choices") or ()]
            orjson.dumps(choices)  # half a surrogate, or a number that is too long, could not be passed on
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self.failed(f"malformed: {error!r}") from error
        self.completion_tokens += len(choices) if self.prompt_tokens is None else 0
        return choices

    def left_s(self) -> float:
        """ApiError 504 when the client's time is over."""
        left_s = self.deadline_s - self.clock()
        if left_s <= 0:
            raise ApiError(504, "deadline_exceeded", "The time for this request is over: ask for less, or wait longer.",
                           outcome="timeout")  # fmt: skip
        return left_s

    # ---- its end

    def succeeded(self) -> None:
        """Compared with other calls by seconds a token: long answers take longer."""
        self.permit.succeeded((self.clock() - self.begin_s) / max(self.completion_tokens, 1))

    def failed(self, why: object, *, counts: bool = True) -> Unusable:
        if counts:
            self.permit.failed()
        return Unusable(str(why)[:500])

    def end(self, error: ApiError) -> None:
        self.ended_by = error
        self.incoming.wake()

    def close(self) -> None:
        if self in self.fallback.calls:
            self.fallback.calls.remove(self)
            self.permit.give_back()
            self.incoming.close()
            self.closed()


# ---- what of an answer is passed on


def cleaned(choice: Part, chat: bool, stream: bool) -> Part:
    """Index, text, log probabilities and reason, each of its kind. ValueError and the like when it is none of that."""
    name = "text" if not chat else "delta" if stream else "message"
    given, reason = choice.get(name), choice.get("finish_reason")
    if chat:
        role = given.get("role", None if stream else "assistant")
        said = ({"role": short(role)} if role else {}) | {"content": text(given.get("content"))}
    else:
        said = text(given)
    return {
        "index": whole(choice.get("index", 0)), name: said,
        "logprobs": choice.get("logprobs"), "finish_reason": None if reason is None else short(reason),
    }  # fmt: skip


def text(value: Any) -> str:
    if not isinstance(value, str | None):
        raise ValueError("no text")
    return value or ""


def short(value: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_NAME:
        raise ValueError("no name")
    return value


def whole(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError("no count")
    return value
