"""B4 seen from outside: more than there is room for, and clients in a hurry."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from statistics import quantiles

from conformance.judge import Verdict, not_applicable, otherwise, passed, refused, unsafe
from conformance.target import CHAT, Target
from conformance.wire import Hung, Reply, exchange, request

BURST = 80  # at once, where the capacity is not known: ten times the eight that the servers here are started with
BURST_PATIENCE_S = 60.0
REFUSAL_S = 1.0  # a refusal is cheap: 50 ms where nobody else computes
LOAD_S = 4.0  # for which clients go on asking
ROOM = 4  # answers at once that keep it busy
GOODPUT = 0.9
TOKENS = 16
LONG_PROMPT = 1500  # tokens, where the context is that long


def together(target: Target, count: int, text: str, *headers: str, **wishes) -> list[Reply | None]:
    """The answers to so many requests at the same moment; None where none came."""
    barrier = threading.Barrier(count)

    def one(i: int) -> Reply | None:
        barrier.wait(30)
        with suppress(Hung, OSError):
            return target.chat(f"{text} {i}", *headers, patience_s=BURST_PATIENCE_S, **wishes)
        return None

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def burst(target: Target) -> Verdict:
    count = 10 * target.capacity if target.capacity else BURST
    replies = together(target, count, "Number", max_tokens=TOKENS)
    good = [reply for reply in replies if reply is not None and reply.status == 200]
    away = [reply for reply in replies if reply is not None and reply.status in (503, 429)]
    if lost := count - len(good) - len(away):
        return unsafe(f"{lost} of {count} get neither an answer nor a refusal within {BURST_PATIENCE_S:.0f} s")
    if not away:
        return otherwise(f"all {count} are let in; the last one waits {max(reply.took_s for reply in good):.0f} s")
    if target.capacity and len(good) < 0.8 * target.capacity:  # a key may not have all of it
        return otherwise(f"{len(good)} are served where {target.capacity} have room")
    slow = quantiles([reply.took_s for reply in away], n=100)[98] if len(away) > 1 else away[0].took_s
    if slow > REFUSAL_S * target.slow:
        return otherwise(f"a refusal takes {slow:.1f} s")
    told = {reply.headers.get("retry-after-ms", reply.headers.get("retry-after")) for reply in away}
    if None in told:
        return otherwise("refused without Retry-After")
    return passed(f"{len(good)} served, {len(away)} refused within {slow * 1e3:.0f} ms")


def sustained(target: Target) -> Verdict:
    """Tokens a second: from clients that just keep it busy, and from four times as many."""
    rates: dict[int, float] = {ROOM: 0.0, 4 * ROOM: 0.0}
    for clients in (*rates, *rates):  # in turns, so that a machine that grows slower does not decide
        found = tokens_per_s(target, clients)
        if found is None:
            return unsafe("an answer is neither whole nor refused")
        rates[clients] += found
    alone, over = rates.values()
    if not alone:
        return otherwise(f"it serves none of {ROOM} clients")
    says = f"{100 * over / alone:.0f} % of the tokens that it serves when it is just busy"
    return passed(says) if over >= GOODPUT * alone else otherwise(says)


def tokens_per_s(target: Target, clients: int) -> float | None:
    """Of whole answers, from clients that go on asking for LOAD_S. None when one of them was failed.

    Every answer that was begun counts, and so does the time until the last one ends. A fixed time would cut off a whole
    wave of a server that computes all answers at once, and hardly anything of one that computes a few at a time.
    """
    begin = time.monotonic()

    def insist(i: int) -> int | None:
        found = 0
        while time.monotonic() - begin < LOAD_S:
            with suppress(Hung):
                reply = target.chat(f"Client {i}: tell me a story.", max_tokens=TOKENS, patience_s=60, **target.long)
                if reply.status == 200:
                    found += TOKENS
                    continue
                if reply.status in (503, 429):
                    time.sleep(0.05)
                    continue
            return None
        return found

    with ThreadPoolExecutor(clients) as pool:
        counts = list(pool.map(insist, range(clients)))
    return None if None in counts else sum(counts) / (time.monotonic() - begin)


def tiny_and_huge(target: Target) -> Verdict:
    """Tiny ones, one after the other, beside one whose prompt is long: all are served, in whatever order."""
    with ThreadPoolExecutor(1) as pool:
        huge = pool.submit(target.chat, target.long_text(LONG_PROMPT), patience_s=120)
        time.sleep(0.2)
        waits = []
        for i in range(20):
            reply = target.chat(f"{i}", patience_s=120, max_tokens=2)
            if reply.status != 200:
                return (
                    unsafe(f"a tiny one gets {reply.status}") if reply.status >= 500 else otherwise(f"{reply.status}")
                )
            waits.append(reply.took_s)
        large = huge.result()
    if large.status != 200:
        return refused(large, 0)
    return passed(f"the huge one takes {large.took_s:.1f} s, a tiny one beside it {max(waits):.1f} s at most")


def two_keys(target: Target) -> Verdict:
    if len(target.keys) < 2:
        return not_applicable("it does not know its clients apart")
    over = threading.Event()

    def flood(_: int) -> None:
        while not over.is_set():
            with suppress(Hung, OSError):
                if target.chat("flood", max_tokens=TOKENS, **target.long).status != 200:
                    time.sleep(0.02)

    raw = request(CHAT, target.chat_body("quiet", max_tokens=2), *target.headers(target.keys[1]))
    with ThreadPoolExecutor(3 * ROOM) as pool:
        for i in range(3 * ROOM):
            pool.submit(flood, i)
        try:
            time.sleep(1)
            quiet = [paced(target, raw) for _ in range(10)]
        finally:
            over.set()
    good = sum(reply is not None and reply.status == 200 for reply in quiet)
    return passed(f"{good} of 10") if good >= 9 else otherwise(f"the other key is served {good} times of 10")


def paced(target: Target, raw: bytes) -> Reply | None:
    time.sleep(0.3)
    try:
        return exchange(target.place, raw)
    except Hung:
        return None


def hurry(target: Target) -> Verdict:
    """OpenAI's client tells how long it will wait. Nobody can compute 400 tokens in 20 ms."""
    begin = time.monotonic()
    reply = target.chat(
        "Tell me a story.", "x-stainless-read-timeout: 0.02", max_tokens=400, patience_s=90, **target.long
    )
    took = time.monotonic() - begin
    if reply.status in (503, 504):
        return (
            passed()
            if reply.error and took < REFUSAL_S * target.slow
            else otherwise(f"{reply.status} after {took:.1f} s")
        )
    if reply.status == 200:
        return otherwise(f"it computes for {took:.0f} s for a client that said it waits 20 ms")
    return refused(reply, 503)


PROBES = {51: burst, 52: sustained, 53: tiny_and_huge, 54: two_keys, 55: hurry}
