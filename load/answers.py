"""What a golden server answers, byte by byte and moment by moment, worked out before anything is sent."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from load.script import Fault, Script

# One token each, in turn. They hold what a careless reader trips over: several bytes a letter, quotes, an empty line
# inside of a text, and the word that begins an event.
WORDS = ("The", " café", " 你好", ' "said"', "\n\n", "data:", " 🙂", " \\ok", ".")
REFUSALS = {
    Fault.WRONG_MODEL: ("404 Not Found", "The model does not exist.", "model_not_found"),
    Fault.TOO_MANY: ("429 Too Many Requests", "Rate limit reached.", "rate_limit_exceeded"),
    Fault.UNAVAILABLE: ("503 Service Unavailable", "The server is overloaded.", "overloaded"),
}
BREAKS = (Fault.HANG_MIDWAY, Fault.DIE, Fault.CUT)


@dataclass(frozen=True)
class Asked:
    """What of a request its answer depends on."""

    chat: bool
    stream: bool
    usage: bool
    model: str
    prompt_tokens: int
    new_tokens: int


class Step(NamedTuple):
    """Bytes to write, so many seconds after the request. tokens: of the text in them; 0 where they hold none."""

    at_s: float
    data: bytes
    tokens: int = 0


class Ending(Enum):
    """What becomes of the connection."""

    NEXT = auto()  # it takes the next request
    CLOSE = auto()
    RESET = auto()
    HANG = auto()


class Plan(NamedTuple):
    """An answer. Its last step may hold no bytes: then it is the moment of its ending."""

    status: int
    steps: tuple[Step, ...]
    ending: Ending = Ending.NEXT


@lru_cache(maxsize=256)
def plan(script: Script, asked: Asked) -> Plan:
    """Made once for all requests that are alike."""
    fault = script.fault
    if fault == Fault.HANG:
        return Plan(0, (), Ending.HANG)
    if fault == Fault.HTML_500:
        page = b"<html><body><h1>Internal Server Error</h1></body></html>"
        return Plan(500, (Step(0.0, reply("500 Internal Server Error", page, kind="text/html")),))
    if fault in REFUSALS:
        status, message, code = REFUSALS[fault]
        retry = "" if fault == Fault.WRONG_MODEL else f"Retry-After: {script.retry_after_s}\r\n"
        return Plan(int(status[:3]), (Step(0.0, reply(status, error(message, code), retry)),))
    if asked.stream and script.stream and fault != Fault.NOT_A_STREAM:
        return streamed(script, asked)
    return in_one_piece(script, asked)


# ---- what is said


def text(tokens: int, start: int = 0) -> str:
    """The tokens from number start on, joined."""
    return "".join(WORDS[i % len(WORDS)] for i in range(start, start + tokens))


def count(script: Script, asked: Asked) -> int:
    """New tokens of the answer."""
    if script.fault == Fault.EMPTY:
        return 0
    return asked.new_tokens if script.tokens is None else script.tokens


def pieces(script: Script, asked: Asked) -> Iterator[tuple[float, str, int]]:
    """(when, what, how many tokens) of each piece of text."""
    tokens = count(script, asked)
    for i, start in enumerate(range(0, tokens, script.per_chunk)):
        size = min(script.per_chunk, tokens - start)
        yield script.first_s + i * script.gap_s, text(size, start), size


def usage(script: Script, asked: Asked) -> dict[str, Any]:
    new = count(script, asked)
    found: dict[str, Any] = {
        "prompt_tokens": asked.prompt_tokens, "completion_tokens": new, "total_tokens": asked.prompt_tokens + new,
    }  # fmt: skip
    return found if script.queue_s is None else found | {"timing": {"queue": script.queue_s}}


# ---- an answer in one piece


def in_one_piece(script: Script, asked: Asked) -> Plan:
    """It comes when the last piece of a stream would have come."""
    at_s = max((at_s for at_s, _, _ in pieces(script, asked)), default=script.first_s)
    new = count(script, asked)
    choice = {"message": {"role": "assistant", "content": text(new)}} if asked.chat else {"text": text(new)}
    told = {"usage": usage(script, asked)} if script.usage else {}
    kind = "chat.completion" if asked.chat else "text_completion"
    body = dumped(about(asked.model, kind) | {"choices": [{"index": 0, **choice, "finish_reason": "length"}]} | told)
    if script.fault == Fault.ERROR_EVENT:
        body = error("The engine failed.", "internal_error")
    if script.fault == Fault.MALFORMED:
        body = body[: len(body) // 2]
    whole = reply("200 OK", body, server_timing(script))
    if script.fault in BREAKS:
        return broken(script, [Step(at_s, whole[: -len(body) // 2]), Step(at_s + script.gap_s, b"")])
    if script.fault == Fault.SLOW_HEADERS:
        return Plan(200, (Step(0.0, whole[:40]), Step(at_s, whole[40:], new)))
    return Plan(200, (Step(at_s, whole, new),))


# ---- a stream


def streamed(script: Script, asked: Asked) -> Plan:
    """The head and the role come at once, or after the queue: neither is a token."""
    begin_s = script.queue_s or 0.0
    opening = head("200 OK", "text/event-stream", "Transfer-Encoding: chunked\r\n" + server_timing(script))
    role = event(asked, {"role": "assistant", "content": ""}) if script.role_chunk and asked.chat else b""
    steps = [Step(begin_s, opening + role)]
    if script.fault == Fault.SLOW_HEADERS:
        steps = [Step(0.0, opening[:40]), Step(script.first_s, opening[40:] + role)]
    if script.fault == Fault.EMPTY:
        steps += [Step(script.first_s + i * script.gap_s, event(asked, {"content": ""})) for i in range(3)]
    steps += [Step(at_s, piece(asked.chat, asked.model, said), n) for at_s, said, n in pieces(script, asked)]
    return disturbed(script, asked, steps)


def disturbed(script: Script, asked: Asked, steps: list[Step]) -> Plan:
    """The stream with its end, and with what goes wrong on its way there."""
    ending = tail(script, asked)
    texts = (i for i, step in enumerate(steps) if step.tokens)
    place = next(islice(texts, script.after, None), len(steps))  # where it happens
    at_s = steps[place - 1].at_s + script.gap_s  # a moment later: what was written before is read
    if script.fault in BREAKS:
        return broken(script, [*steps[:place], Step(at_s, b"")])
    if script.fault == Fault.MALFORMED:
        steps.insert(place, Step(steps[place - 1].at_s, framed(b'{"choices": [{"delta')))
    if script.fault == Fault.ERROR_EVENT:
        done = framed(b"[DONE]") if script.done else b""
        failed = framed(error("The engine failed.", "internal_error"))
        return Plan(200, (*steps[:place], Step(at_s, failed + done + b"0\r\n\r\n")))
    return Plan(200, (*steps, Step(max(steps[-1].at_s, script.first_s), ending)))


def broken(script: Script, steps: list[Step]) -> Plan:
    endings = {Fault.HANG_MIDWAY: Ending.HANG, Fault.DIE: Ending.RESET, Fault.CUT: Ending.CLOSE}
    return Plan(200, tuple(steps), endings[Fault(script.fault)])


def tail(script: Script, asked: Asked) -> bytes:
    """All that follows the last token, in one write: the reason, the usage, [DONE], the end of the body."""
    found = event(asked, {}, "length")
    if script.usage and asked.usage:
        kind = "chat.completion.chunk" if asked.chat else "text_completion"
        found += framed(dumped(about(asked.model, kind) | {"choices": [], "usage": usage(script, asked)}))
    if script.done and script.fault != Fault.NO_DONE:
        found += framed(b"[DONE]")
    return found + b"0\r\n\r\n"


def event(asked: Asked, delta: dict[str, Any], reason: str | None = None) -> bytes:
    """One chunk of an answer; text_completion's choices hold the text itself."""
    said = {"delta": delta} if asked.chat else {"text": delta.get("content", "")}
    kind = "chat.completion.chunk" if asked.chat else "text_completion"
    return framed(dumped(about(asked.model, kind) | {"choices": [{"index": 0, **said, "finish_reason": reason}]}))


@lru_cache(maxsize=256)
def piece(chat: bool, model: str, said: str) -> bytes:
    """A piece of text. Long answers say the same few again and again."""
    return event(Asked(chat, True, False, model, 0, 0), {"content": said})


# ---- bytes


def about(model: str, kind: str) -> dict[str, Any]:
    return {"id": "golden-0", "object": kind, "created": 0, "model": model}


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def error(message: str, code: str) -> bytes:
    return dumped({"error": {"message": message, "type": "error", "param": None, "code": code}})


def framed(data: bytes) -> bytes:
    """A server-sent event in an HTTP chunk of its own."""
    whole = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(whole), whole)


def server_timing(script: Script) -> str:
    """The header of that name: milliseconds. https://www.w3.org/TR/server-timing/"""
    return "" if script.queue_s is None else f"Server-Timing: queue;dur={script.queue_s * 1e3:.3f}\r\n"


def head(status: str, kind: str, more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}\r\n".encode()


def reply(status: str, body: bytes, more: str = "", kind: str = "application/json") -> bytes:
    return head(status, kind, f"Content-Length: {len(body)}\r\n{more}") + body
