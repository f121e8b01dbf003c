"""One server that is looked at from outside: where it is, how it is asked, and whether it still lives."""

import re
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from conformance.judge import Verdict, each, refused
from conformance.wire import PATIENCE_S, Hung, Reply, answer, exchange, opened, request, sent

CHAT, LEGACY = "/v1/chat/completions", "/v1/completions"
ALIVE_S = 30.0  # within which a plain request is answered by a server that is well
BUSY_S = 15.0  # of work, for what is called a long answer
LONG_TOKENS = (200, 1500)  # that it has at least, and at most
IDLE_SHARE = 0.25  # of a core: less than this is not computing
GREEDY = {"temperature": 0, "max_tokens": 8}
PLAIN_S = 1.0  # that this takes at most on two cores that do nothing else
MOST_PATIENT = 6.0
SMALL_CONTEXT = 2048  # tokens that a context has at least, where it is not known


@dataclass
class Target:
    """A server.

    long: fields that make an answer go on to its max_tokens. keys: those that it lets in; none where it asks for none.
    process: where it was started here, so that memory, CPU time and its end can be looked at. limited: starts another
    one with a quota of so many requests and tokens a minute, and gives its place.
    """

    name: str
    place: tuple[str, int]
    model: str
    keys: tuple[str, ...] = ()
    long: dict[str, Any] = field(default_factory=dict)
    context: int | None = None  # in tokens, where it is known
    capacity: int | None = None  # slots and places in the queue, where they are known
    process: subprocess.Popen | None = None
    limited: Callable[[int, int], "Target"] | None = None
    close: Callable[[], None] = lambda: None
    greedy: str | None = None  # its answer to a fixed question; None where that has no known form
    rest_share: float = 0.0  # of a core that it takes when nobody asks
    slow: float = 1.0  # times longer than on a machine of its own things take here, about: patience is as much longer
    long_tokens: int = LONG_TOKENS[1]
    serial: bool = False  # whether it computes one answer after the other

    # ---- asking

    def headers(self, key: str | None = None) -> list[str]:
        """Of every request. key: another than the first."""
        found = key if key is not None else next(iter(self.keys), None)
        return [f"Authorization: Bearer {found}"] if found is not None else []

    def raw(self, path: str, body: Any = None, *headers: str, **wishes: Any) -> bytes:
        return request(path, body, *self.headers(), *headers, **wishes)

    def ask(
        self, path: str, body: Any = None, *headers: str, patience_s: float = PATIENCE_S,
        until: Callable[[bytes], bool] = lambda _: False, **wishes: Any,
    ) -> Reply:  # fmt: skip
        return exchange(self.place, self.raw(path, body, *headers, **wishes), patience_s * self.slow, until=until)

    def chat_body(self, text: Any = "hello", **wishes: Any) -> dict[str, Any]:
        body = {"model": self.model, "max_tokens": 4, "messages": [{"role": "user", "content": text}], **wishes}
        return {name: value for name, value in body.items() if value is not ABSENT}

    def chat(self, text: Any = "hello", *headers: str, patience_s: float = PATIENCE_S, **wishes: Any) -> Reply:
        return self.ask(CHAT, self.chat_body(text, **wishes), *headers, patience_s=patience_s)

    def peek(self, text: Any = "hello", **wishes: Any) -> Reply:
        """The beginning of a stream, and then we leave: enough to see whether a request is taken."""
        body = self.chat_body(text, **wishes, stream=True)
        return self.ask(CHAT, body, until=lambda seen: seen.count(b"\n\n") >= 2)

    def refusals(self, wishes: Iterable[dict[str, Any]], *statuses: int) -> Verdict:
        """Chat requests, each of which must be refused."""
        return each(
            (told(wish), lambda wish=wish: refused(self.peek(**wish), *(statuses or (400,)))) for wish in wishes
        )

    def long_text(self, tokens: int) -> str:
        """About so many, or half of the context where that is less."""
        return "word " * min(tokens, (self.context or SMALL_CONTEXT) // 2)

    def open_chat(self, text: str = "hello", *headers: str, room: int | None = None, **wishes: Any) -> Any:
        """A connection with a request on it, whose answer nobody has read yet."""
        connection = opened(self.place, room=room)
        sent(connection, self.raw(CHAT, self.chat_body(text, **wishes), *headers))
        return connection

    # ---- looking

    def family(self) -> list[psutil.Process]:
        if self.process is None or self.process.poll() is not None:
            return []
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def cpu_s(self) -> float:
        """CPU seconds of its processes so far."""
        found = 0.0
        for one in self.family():
            with suppress(psutil.NoSuchProcess):
                found += sum(one.cpu_times()[:2])
        return found

    def memory(self) -> int | None:
        """Bytes that its processes hold; None where they are not seen."""
        if self.process is None:
            return None
        found = 0
        for one in self.family():
            with suppress(psutil.NoSuchProcess):
                found += one.memory_info().rss
        return found

    def grown(self, before: int | None) -> int | None:
        """Bytes more than before; None where that is not seen."""
        now = self.memory()
        return None if now is None or before is None else now - before

    def share(self, seconds: float = 0.5) -> float:
        """Of a core that it takes now."""
        begin, before = time.monotonic(), self.cpu_s()
        time.sleep(seconds)
        return (self.cpu_s() - before) / (time.monotonic() - begin)

    def idle_after(self, patience_s: float, share: float | None = None) -> float | None:
        """Seconds until it computes no more; None when it still does after that time.

        share: of a core, above which it counts as computing; by default IDLE_SHARE more than when nobody asks.
        """
        begin, limit = time.monotonic(), self.rest_share + IDLE_SHARE if share is None else share
        while time.monotonic() - begin < patience_s:
            at = time.monotonic() - begin
            if self.share() < limit:
                return at
        return None

    def ended(self) -> str | None:
        """How its process ended; None while it runs, or is somebody else's."""
        status = None if self.process is None else self.process.poll()
        if status is None:
            return None
        return f"its process was ended by signal {-status}" if status < 0 else f"its process ended with status {status}"

    def meet(self) -> None:
        """Learn what it answers when all is well, and how quickly. Hung, OSError."""
        self.chat(patience_s=120)  # the first one warms up
        reply = self.chat("The capital of France is", patience_s=120, **GREEDY)
        self.greedy, self.slow = reply.known_text, min(max(reply.took_s / PLAIN_S, 1.0), MOST_PATIENT)
        rate = GREEDY["max_tokens"] / max(reply.took_s, 1e-3)
        self.long_tokens = int(min(max(rate * BUSY_S, LONG_TOKENS[0]), LONG_TOKENS[1]))
        self.serial = self.waits_its_turn()
        if self.process is not None:
            self.idle_after(60)
            self.rest_share = self.share(1.0)

    def waits_its_turn(self) -> bool:
        """Whether a plain request waits until a stream that began before it has ended.

        That the stream has ended by then is not enough: a quick server is done with both in no time.
        """
        alone = self.chat(patience_s=120, max_tokens=1)
        wishes = {"stream": True, "max_tokens": self.long_tokens // 3, **self.long}
        with self.open_chat("Count to a hundred.", **wishes) as connection:
            first_event(connection, 120)
            beside = self.chat(patience_s=120, max_tokens=1)
            connection.settimeout(0.0)
            seen = b""
            with suppress(OSError):  # no more for now
                while piece := connection.recv(1 << 20):
                    seen += piece
        return finished(seen) and beside.took_s > 2 * alone.took_s

    def harm(self) -> str | None:
        """What is wrong with it now; None when it answers as it did at first."""
        if dead := self.ended():
            return dead
        try:
            reply = self.chat("The capital of France is", patience_s=ALIVE_S, **GREEDY)
        except (Hung, OSError) as why:
            return self.ended() or f"afterwards a plain request fails: it {why}"
        if reply.status != 200:
            return f"afterwards a plain request gets {reply.status or 'no answer'}"
        return None if reply.known_text == self.greedy else "afterwards the same greedy prompt has another text"


ABSENT = object()  # a field that is left out


def told(wish: dict[str, Any]) -> str:
    """A request's unusual fields in a few words."""
    words = []
    for name, value in wish.items():
        text = "none" if value is ABSENT else repr(value)
        words.append(f"{name} {text if len(text) < 40 else text[:36] + '…'}")
    return " ".join(words)


def first_event(connection: Any, patience_s: float = PATIENCE_S) -> Reply:
    """Of a stream that has been asked for on this connection: until something was said."""
    return answer(connection, patience_s, until=lambda seen: b'"content"' in seen and seen.count(b"\n\n") >= 2)


def finished(raw: bytes) -> bool:
    """Whether an answer has come to its end."""
    return re.search(rb'"finish_reason": ?"', raw) is not None
