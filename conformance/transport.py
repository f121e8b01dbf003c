"""B1 seen from outside: what comes over the wire before anybody knows what is wanted."""

import gzip
import json
import select
import socket
import time
from contextlib import suppress
from math import inf

from conformance.judge import Verdict, each, otherwise, passed, refused, unsafe
from conformance.target import CHAT, Target
from conformance.wire import Hung, answer, exchange, opened, sent

BAD_STATUS = (400,)
SLOW_S = 40.0  # that a slow sender goes on at most: the matrix wants an end after 30 s
PLAIN = "/health"  # for what is about headers and connections: all of them have it
WAITS_S = 5.0  # for somebody who might go on reading, or answer
OTHERS_S = 5.0  # that they wait at most while somebody is slow
MIB = 1 << 20


def bodies(target: Target, *raws: tuple[str, bytes], patience_s: float = 20.0) -> Verdict:
    """Bodies that are no request, each of which is refused."""
    return each(
        (what, lambda raw=raw: refused(target.ask(CHAT, raw, patience_s=patience_s), *BAD_STATUS)) for what, raw in raws
    )


def malformed(target: Target) -> Verdict:
    found = bodies(target, ('{"a":', b'{"a":'))
    reply = target.ask(CHAT, b'{"a":' + b"x" * 5000)
    return found if len(reply.body) <= 1024 else otherwise(f"a reply of {len(reply.body)} bytes")


def empty(target: Target) -> Verdict:
    return bodies(target, ("nothing", b""))


def no_object(target: Target) -> Verdict:
    return bodies(target, ("[]", b"[]"), ('"x"', b'"x"'), ("null", b"null"))


def other_type(target: Target) -> Verdict:
    def ask(kind: str) -> Verdict:
        return refused(target.ask(CHAT, target.chat_body(), f"Content-Type: {kind}"), 415, 400)

    return each((kind, lambda kind=kind: ask(kind)) for kind in ("text/plain", "application/x-www-form-urlencoded"))


def too_large(target: Target) -> Verdict:
    with opened(target.place) as connection:
        head = target.raw(CHAT, b"", f"Content-Length: {1 << 30}").replace(b"Content-Length: 0\r\n", b"")
        sent(connection, head)
        try:
            reply = answer(connection, WAITS_S * target.slow)
        except Hung:
            return otherwise("it waits for a gibibyte")
        verdict = refused(reply, 413)
        return verdict if verdict.kind != "pass" or ended(connection) else otherwise("413, and the connection goes on")


def too_large_in_chunks(target: Target) -> Verdict:
    """Up to 64 MiB, until something comes back."""
    before, most, given = target.memory(), 0, 0
    with opened(target.place, WAITS_S * target.slow) as connection:
        head = target.raw(CHAT, b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
        sent(connection, head)
        try:
            while given < 64 * MIB and not select.select([connection], [], [], 0)[0]:
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                given += 65536
                most = max(most, target.grown(before) or 0) if given % MIB == 0 else most
            connection.sendall(b"0\r\n\r\n")
        except TimeoutError:
            return otherwise(f"after {given / MIB:.1f} MiB it neither reads on nor answers")
        except OSError:
            pass  # closed: there may be an answer all the same
        reply = answer(connection, 4 * WAITS_S * target.slow)
    grown = f", and its memory grew by {most / MIB:.0f} MiB" if most > 16 * MIB else ""
    verdict = refused(reply, 413)
    return Verdict(verdict.kind, verdict.says + f" after {given / MIB:.1f} MiB{grown}")


def short_body(target: Target) -> Verdict:
    with opened(target.place) as connection:
        sent(connection, target.raw(CHAT, b"{").replace(b"Content-Length: 1\r\n", b"Content-Length: 500\r\n"))
        connection.shutdown(socket.SHUT_WR)
        try:
            reply = answer(connection, 10.0)
        except Hung:
            return otherwise("the connection stays open")
    if reply.status >= 500:
        return unsafe(f"{reply.status}")
    return otherwise("200") if reply.status == 200 else passed()


def slow_headers(target: Target) -> Verdict:
    return dripped(target, b"GET /health HTTP/1.1\r\nX: ", 12.0)


def slow_body(target: Target) -> Verdict:
    head = target.raw(CHAT, b"{").replace(b"Content-Length: 1\r\n", b"Content-Length: 500\r\n")
    return dripped(target, head, 33.0)


def dripped(target: Target, begin: bytes, allowed_s: float) -> Verdict:
    """A letter a second, until the other side has enough of it; others are asked meanwhile."""
    start, slowest, verdict = time.monotonic(), 0.0, None
    with opened(target.place) as connection:
        sent(connection, begin)
        while (took := time.monotonic() - start) < min(SLOW_S, allowed_s + 5):
            if select.select([connection], [], [], 1.0)[0]:
                reply = answer(connection, 2.0)
                said = f"{reply.status} after {took:.0f} s" if reply.status else f"closed after {took:.0f} s"
                verdict = passed(said) if took < allowed_s else otherwise(said)
                break
            with suppress(OSError):
                connection.sendall(b"x")
            asked = time.monotonic()
            target.ask(PLAIN)
            slowest = max(slowest, time.monotonic() - asked)
    if slowest > OTHERS_S * target.slow:
        return unsafe(f"others wait for {slowest:.3g} s meanwhile")
    return verdict or otherwise(f"still open after {took:.0f} s")


def nested(target: Target) -> Verdict:
    return bodies(target, ("[[[…", b"[" * 100_000), ('{"a":{"a":…', b'{"a":' * 100_000), patience_s=10.0)


def encodings(target: Target) -> Verdict:
    text = json.dumps(target.chat_body())
    return bodies(
        target, ("UTF-16", text.encode("utf-16")), ("broken UTF-8", text.encode().replace(b"hello", b"\xff\xfe")),
        ("bytes of a surrogate", text.encode().replace(b"hello", b"\xed\xa0\x80")),
    )  # fmt: skip


def twice(target: Target) -> Verdict:
    raw = json.dumps(target.chat_body("Count to ten.", **target.long)).replace(
        '"max_tokens": 4', '"max_tokens": 2, "max_tokens": 3'
    )
    reply = target.ask(CHAT, raw.encode())
    if reply.status != 200:
        return refused(reply, 400)
    used = reply.usage.get("completion_tokens")
    return passed() if used == 3 else otherwise(f"of two max_tokens, 2 and 3, {used} tokens came")


def literals(target: Target) -> Verdict:
    text = json.dumps(target.chat_body(temperature=0.5))
    return bodies(target, *(
        (word, text.replace("0.5", word).encode()) for word in ("NaN", "Infinity", "-Infinity", "1e999")
    ))  # fmt: skip


def long_integer(target: Target) -> Verdict:
    return bodies(
        target, ("5,000 digits", json.dumps(target.chat_body(seed=5)).replace("5}", "9" * 5000 + "}").encode())
    )


def other_path(target: Target) -> Verdict:
    def wrong_method() -> Verdict:
        reply = target.ask(CHAT)
        verdict = refused(reply, 405)
        return verdict if verdict.kind != "pass" or "allow" in reply.headers else otherwise("405 without Allow")

    return each(
        [("an unknown path", lambda: refused(target.ask("/v2/nothing"), 404)), ("a wrong method", wrong_method)]
    )


def head_and_options(target: Target) -> Verdict:
    def head() -> Verdict:
        with opened(target.place) as connection:
            both = target.raw(PLAIN, method="HEAD") + target.raw(PLAIN, None, "Connection: close")
            sent(connection, both)
            raw, _ = to_the_end(connection)
        first, _, rest = raw.partition(b"\r\n\r\n")
        if b" 5" in first[:12]:
            return unsafe(first[9:12].decode())
        return passed() if not rest or rest.startswith(b"HTTP/1.1 ") else otherwise("a body after HEAD")

    def preflight() -> Verdict:
        asked = ("Origin: https://a.example", "Access-Control-Request-Method: POST")
        reply = exchange(target.place, target.raw(CHAT, None, *asked, method="OPTIONS"))
        return passed() if reply.status in (200, 204, 405, 400) else refused(reply, 405)

    return each([("HEAD", head), ("a preflight", preflight)])


def pipelined(target: Target) -> Verdict:
    with opened(target.place) as connection:
        good = target.raw(CHAT, target.chat_body())
        sent(connection, target.raw(CHAT, b"{") + good + target.raw(PLAIN, None, "Connection: close"))
        raw, _ = to_the_end(connection)
    statuses = [int(part[:3]) for part in raw.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]
    if any(status >= 500 for status in statuses):
        return unsafe(f"{statuses}")
    if len(statuses) == 3 and statuses[1:] == [200, 200]:
        return passed()
    return otherwise(f"three requests in one piece, the first one bad, get {statuses or 'no answer'}")


def many_headers(target: Target) -> Verdict:
    def ask(headers: list[str]) -> Verdict:
        return refused(target.ask(PLAIN, None, *headers), 431, 400)

    cases = (("64 KiB", ["X: " + "y" * 65536]), ("500 of them", [f"X-{i}: y" for i in range(500)]))
    return each((what, lambda headers=headers: ask(headers)) for what, headers in cases)


def compressed(target: Target) -> Verdict:
    bomb = gzip.compress(json.dumps(target.chat_body("0" * (8 * MIB))).encode())
    return refused(target.ask(CHAT, bomb, "Content-Encoding: gzip"), 415, 400)


def to_the_end(connection: socket.socket, patience_s: float = 20.0, most: float = inf) -> tuple[bytes, bool]:
    """(what came, whether the other side closed), until it closes, says nothing for so long, or said so many bytes."""
    connection.settimeout(patience_s)
    found = b""
    try:
        while len(found) < most and (piece := connection.recv(65536)):
            found += piece
    except TimeoutError:
        return found, False
    except OSError:
        return found, True  # a reset is an end too
    return found, len(found) < most


def ended(connection: socket.socket) -> bool:
    """Whether the other side has closed it, or does so in a moment."""
    return to_the_end(connection, 5.0)[1]


PROBES = {
    1: malformed, 2: empty, 3: no_object, 4: other_type, 5: too_large, 6: too_large_in_chunks, 7: short_body,
    10: nested, 11: encodings, 12: twice, 13: literals, 14: long_integer, 15: other_path, 16: head_and_options,
    17: pipelined, 18: many_headers, 19: compressed,
}  # fmt: skip
PATIENT = {8: slow_headers, 9: slow_body}  # they wait, mostly: run side by side
