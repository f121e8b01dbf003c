"""B5 seen from outside: clients that leave, stop reading or read slowly. Whether it computes on, its CPU time tells."""

import asyncio
import importlib.util
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from conformance.judge import Verdict, each, otherwise, passed, refused, unsafe, unseen, worst
from conformance.target import CHAT, Target, finished, first_event
from conformance.transport import to_the_end
from conformance.wire import PATIENCE_S, Hung, exchange, opened, sent

STOPS_S = 3.0  # two steps of the model, ten times over
SEND_TIMEOUT_S = 26.0  # the matrix wants an end after 20 s
SEEN_SHARE = 0.05  # of a core: so much is computing, also where others take most of it
READS_S = 10.0  # byte by byte
STORM = 200
FILLS = 300_000  # bytes: more than the kernels of both sides take for a reader with no room
LONG_PROMPT = 3000  # tokens, where the context is that long
MIB = 1 << 20
NOT_OURS = unseen("its process was not started here, so its CPU time and memory are not known")
NO_STREAM = unseen("no long stream could be had")
TOO_LITTLE = unseen("in that time it says too little to fill a connection")
LINES = {"logprobs": True, "top_logprobs": 20}  # for each token


def long_chat(target: Target, text: str = "Write a very long story.", **wishes: Any) -> socket.socket:
    return target.open_chat(text, **{"max_tokens": target.long_tokens, **target.long, **wishes})


def left(target: Target, *connections: socket.socket) -> Verdict:
    """These close, in this order, while it computes for them."""
    busy = target.share() - target.rest_share
    for connection in connections:
        connection.close()
    if busy < SEEN_SHARE:
        return unseen("it has computed all of it before the client can leave")
    return stops(target, STOPS_S, target.rest_share + busy / 3)


def stops(target: Target, allowed_s: float, share: float | None = None) -> Verdict:
    """Now that everybody has left. share: of a core, above which it counts as computing."""
    idle_s = target.idle_after(40, share)
    if idle_s is None:
        return otherwise("it still computes 40 s later")
    return passed() if idle_s <= allowed_s * target.slow else otherwise(f"it computes on for {idle_s:.0f} s")


def leaves_queue(target: Target) -> Verdict:
    """Four that are served, two that wait: the waiting ones leave first."""
    if target.process is None:
        return NOT_OURS
    served = [long_chat(target, f"Story {i}", stream=True) for i in range(4)]
    waiting = [long_chat(target, f"Waiting {i}") for i in range(2)]
    time.sleep(0.5)
    return left(target, *waiting, *served)


def leaves(target: Target) -> Verdict:
    """Each in its own phase. What is over too soon to be seen says nothing."""
    if target.process is None:
        return NOT_OURS

    def in_prefill() -> Verdict:
        return left(target, long_chat(target, target.long_text(LONG_PROMPT)))

    def in_decode() -> Verdict:
        connection = long_chat(target, stream=True)
        first_event(connection, 60 * target.slow)
        return left(target, connection)

    def in_whole_answer() -> Verdict:
        return left(target, long_chat(target))

    phases = (("a prompt", in_prefill), ("a stream", in_decode), ("a whole answer", in_whole_answer))
    found = [(what, look()) for what, look in phases]
    seen = [(what, verdict) for what, verdict in found if verdict.kind != "not visible"]
    return worst(seen) if seen else found[0][1]


def storm(target: Target) -> Verdict:
    raw = [target.raw(CHAT, target.chat_body(f"{i}", max_tokens=200, stream=bool(i), **target.long)) for i in range(2)]
    for i in range(STORM):
        with suppress(ConnectionResetError), opened(target.place) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset
            sent(connection, (b"", raw[0][:100], raw[0], raw[1])[i % 4])
            if i % 8 > 3:
                time.sleep(0.005)
    return NOT_OURS if target.process is None else stops(target, 5.0)


def half_close(target: Target) -> Verdict:
    """Both are clean: a full reply, or an end that does not look like one."""
    for stream in (False, True):
        with target.open_chat("half", stream=stream) as connection:
            connection.shutdown(socket.SHUT_WR)
            raw, closed = to_the_end(connection, 30.0)
        if raw[9:10] == b"5":
            return unsafe(raw[9:12].decode())
        if finished(raw):
            return passed("a full reply")
        if not closed:
            return otherwise("neither a reply nor an end within 30 s")
    return passed("given up, and nothing looks complete")


@contextmanager
def long_stream(target: Target, *forms: dict[str, Any]) -> Iterator[socket.socket | None]:
    """A stream that has begun, for a reader with room for kilobytes; None where none of these forms is served."""
    for form in forms:
        wishes = {"stream": True, "max_tokens": target.long_tokens, **form, **target.long}
        with target.open_chat("Write a very long story.", room=2048, **wishes) as connection:
            if first_event(connection, 60 * target.slow).status == 200:
                yield connection
                return
    yield None


def stops_reading(target: Target) -> Verdict:
    """An answer of megabytes, where it can be had."""
    before = target.memory()
    with long_stream(target, LINES | {"n": 2}, LINES, {}) as connection:  # others still have a slot
        if connection is None:
            return NO_STREAM
        slowest = others(target, SEND_TIMEOUT_S)
        rest, closed = to_the_end(connection, 2.0)
    grown = target.grown(before)
    if cut_off(rest, closed):
        return passed("closed")
    if len(rest) < FILLS and (closed or target.share() > target.rest_share + 0.5):
        return TOO_LITTLE
    waits = f"; others wait for up to {slowest:.0f} s" if slowest > 10 * target.slow else ""
    more = "" if grown is None else f", {grown / MIB:.0f} MiB more than before"
    return otherwise(f"not closed after {SEND_TIMEOUT_S:.0f} s{more}{waits}")


def cut_off(rest: bytes, closed: bool) -> bool:
    """Whether it was ended early. Where nothing is left to read it was short, and all of it came at once."""
    return closed and rest != b"" and not finished(rest)


def others(target: Target, seconds: float) -> float:
    """The longest that a plain request takes in this time. Where one waits for another anyhow, nothing is asked."""
    end, slowest = time.monotonic() + seconds, 0.0
    if target.serial:
        time.sleep(seconds)
    while time.monotonic() < end:
        begin = time.monotonic()
        target.chat(max_tokens=2, patience_s=60)
        slowest = max(slowest, time.monotonic() - begin)
        time.sleep(1.0)
    return slowest


def byte_by_byte(target: Target) -> Verdict:
    """A few bytes a second for some seconds: nobody else may notice, and it may well go on."""
    before = target.memory()
    with long_stream(target, LINES, {}) as connection:
        if connection is None:
            return NO_STREAM
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(others, target, READS_S)
            while not asking.done():
                with suppress(OSError):
                    connection.recv(1)
                time.sleep(0.5)
            slowest = asking.result()
        grown = target.grown(before)
        rest, closed = to_the_end(connection, 2.0, FILLS)
    if slowest > 10 * target.slow:
        return otherwise(f"others wait for {slowest:.0f} s meanwhile")
    if len(rest) < FILLS and not cut_off(rest, closed):
        return TOO_LITTLE
    if grown is None:
        return NOT_OURS
    return passed() if grown < 64 * MIB else otherwise(f"its memory grew by {grown / MIB:.0f} MiB")


def proxies(target: Target) -> Verdict:
    reply = target.ask(CHAT, target.chat_body(stream=True), "Accept-Encoding: gzip, br")
    if reply.status != 200:
        return refused(reply, 0)
    missing = []
    if "content-encoding" in reply.headers:
        missing.append("it compresses a stream")
    if reply.headers.get("x-accel-buffering") != "no":
        missing.append("no X-Accel-Buffering")
    if not reply.headers.get("content-type", "").startswith("text/event-stream"):
        missing.append("its content type is no event stream's")
    return otherwise(", ".join(missing)) if missing else passed("signs of life are not seen")


def openai_client(target: Target) -> Verdict:
    if importlib.util.find_spec("openai") is None:
        return unseen("OpenAI's client is not installed here")
    return each([("the client", lambda: typed(target)), ("HTTP/1.0", lambda: old_http(target))])


def typed(target: Target) -> Verdict:
    """Both ways of OpenAI's client: what it makes of an answer, a stream, an error."""
    import openai

    (host, port), patience_s = target.place, PATIENCE_S * target.slow
    wishes = {"base_url": f"http://{host}:{port}/v1", "api_key": next(iter(target.keys), "any"), "max_retries": 0,
              "timeout": patience_s}  # fmt: skip
    body: Any = target.chat_body(temperature=0, max_tokens=6)

    async def asynchronous() -> str:
        async with openai.AsyncOpenAI(**wishes) as client:
            return (await client.chat.completions.create(**body)).choices[0].message.content or ""

    try:
        with openai.OpenAI(**wishes) as client:
            whole = client.chat.completions.create(**body)
            chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
            models = [model.id for model in client.models.list()]
        other = asyncio.run(asynchronous())
    except openai.APIStatusError as error:
        return unsafe(f"{error.status_code}") if error.status_code >= 500 else otherwise(f"{error.status_code}")
    except openai.APITimeoutError as error:
        raise Hung(f"did not answer OpenAI's client within {patience_s:.3g} s") from error
    except openai.APIConnectionError:
        return otherwise("the connection closed without an answer")
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    text, usage = whole.choices[0].message.content or "", whole.usage
    wrong = {
        "a stream says another text": streamed.strip() != text.strip() or other != text,
        "no _request_id": not whole._request_id,
        "usage does not add up": usage is None or usage.total_tokens != usage.prompt_tokens + usage.completion_tokens,
        "no usage in a stream that was asked for it": not any(chunk.usage for chunk in chunks),
        "the model is not in its list": target.model not in models,
    }
    found = [what for what, is_so in wrong.items() if is_so]
    return otherwise(", ".join(found)) if found else passed()


def old_http(target: Target) -> Verdict:
    reply = exchange(target.place, target.raw(CHAT, target.chat_body(), version="1.0"))
    if reply.status != 200:
        return refused(reply, 0)
    return passed() if "transfer-encoding" not in reply.headers else otherwise("chunks, which HTTP/1.0 does not know")


PROBES = {60: leaves_queue, 61: leaves, 62: storm, 63: half_close, 66: proxies, 67: openai_client}
PATIENT = {64: stops_reading, 65: byte_by_byte}
