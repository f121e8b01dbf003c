"""B2 seen from outside: keys, ids, quotas."""

import base64
import time
from concurrent.futures import ThreadPoolExecutor

from conformance.judge import Verdict, each, not_applicable, otherwise, passed, refused, unsafe
from conformance.target import CHAT, Target
from conformance.transport import PLAIN
from conformance.wire import Reply, exchange, request

OPEN = ("/health", "/metrics")
SHOWN = ("/config", "/capacity", "/metrics", "/health", "/props", "/slots", "/v1/models", "/debug/requests", "/nothing")
CONTROLS = 3  # whether two requests meet in one step is chance
BOGUS = 1000  # keys that do not exist
MIB = 1 << 20
NO_KEYS = not_applicable("it asks for no key")


def asked_as(target: Target, said: str | None, path: str = CHAT) -> Reply:
    """With this Authorization, or none."""
    headers = [] if said is None else [f"Authorization: {said}"]
    return exchange(target.place, request(path, target.chat_body() if path == CHAT else None, *headers))


def wrong_keys(target: Target) -> Verdict:
    if not target.keys:
        return NO_KEYS
    basic = base64.b64encode(f"user:{target.keys[0]}".encode()).decode()
    wrong = (None, "Bearer wrong", "Bearer ", f"Basic {basic}", f"Bearer {target.keys[0][:-1]}")
    replies = [asked_as(target, said) for said in wrong]
    found = each(
        (repr(said)[:20], lambda reply=reply: refused(reply, 401)) for said, reply in zip(wrong, replies, strict=True)
    )
    if found.kind != "pass":
        return found
    if len({reply.body for reply in replies}) > 1:
        return otherwise("it tells what is wrong with a key")
    return passed() if "www-authenticate" in replies[0].headers else otherwise("401 without WWW-Authenticate")


def key_shown(target: Target) -> Verdict:
    if not target.keys:
        return NO_KEYS
    replies = [target.ask(path) for path in SHOWN] + [target.chat(max_tokens=0), asked_as(target, target.keys[0])]
    shown = [path for path, reply in zip((*SHOWN, "an error", "a refusal"), replies, strict=True)
             if target.keys[0].encode() in reply.body + repr(reply.headers).encode()]  # fmt: skip
    return unsafe(f"the key stands in {', '.join(shown)}") if shown else passed("in no answer; logs are not seen")


def open_paths(target: Target) -> Verdict:
    statuses = {path: asked_as(target, None, path).status for path in OPEN}
    wanted = {path: status for path, status in statuses.items() if status == 200}
    if target.keys and asked_as(target, None, "/v1/models").status == 200:
        return otherwise("/v1/models is told without a key")
    if len(wanted) == len(OPEN):
        return passed()
    return otherwise(", ".join(f"{status} for {path}" for path, status in statuses.items() if status != 200))


def strange_ids(target: Target) -> Verdict:
    def ask(theirs: str) -> Verdict:
        reply = target.ask(PLAIN, None, f"X-Request-Id: {theirs}")
        if reply.status >= 500:
            return unsafe(f"{reply.status}")
        back = reply.headers.get("x-request-id")
        if back is None:
            return otherwise("no x-request-id") if reply.status == 200 else passed()
        return otherwise("it comes back as it was") if same(back, theirs) else passed()

    def good() -> Verdict:
        back = target.ask(PLAIN, None, "X-Request-Id: mine-1").headers.get("x-request-id")
        return passed() if back == "mine-1" else otherwise(f"x-request-id is {back!r}")

    bad = (("20 kB", "x" * 20_000), ("1 MiB", "x" * MIB), ("emoji", "🙂"), ("a quoted one", 'a"b'))
    return each([("a good one", good), *((what, lambda theirs=theirs: ask(theirs)) for what, theirs in bad)])


def same(back: str, theirs: str) -> bool:
    return back.encode("latin-1", "replace") == theirs.encode() or back == theirs


def equal_ids(target: Target) -> Verdict:
    texts = ("Count: one, two,", "The capital of France is")
    alone = [target.chat(text, temperature=0, max_tokens=12).text for text in texts]

    def together(*ids: str) -> list[Reply]:
        def ask(text: str, theirs: str) -> Reply:
            return target.chat(text, f"X-Request-Id: {theirs}", temperature=0, max_tokens=12)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(ask, texts, ids))

    both = together("the-same", "the-same")
    if any(reply.status != 200 for reply in both):
        return unsafe(f"the two get {[reply.status for reply in both]}")
    if alone[0] != alone[1] and (both[0].text == alone[1] or both[1].text == alone[0]):
        return unsafe("one of them gets the text of the other")
    if [reply.text for reply in both] != alone:
        for _ in range(CONTROLS):
            if [reply.text for reply in together("one", "another")] != alone:
                return otherwise("two at once get other texts than alone, whatever their ids")
        return unsafe("their texts are not what each of them gets alone")
    ids = [(reply.json or {}).get("id") for reply in both]
    return passed() if ids[0] != ids[1] else otherwise("both answers have one id")


def over_quota(target: Target) -> Verdict:
    if target.limited is None:
        return not_applicable("it has no quotas")
    other = target.limited(3, 0)
    try:
        replies = [other.chat(max_tokens=1) for _ in range(5)]
    finally:
        other.close()
    if [reply.status for reply in replies] != [200] * 3 + [429] * 2:
        return otherwise(f"five requests of three a minute get {[reply.status for reply in replies]}")
    headers = replies[-1].headers
    missing = [
        name for name in ("retry-after", "x-ratelimit-remaining-requests", "x-should-retry") if name not in headers
    ]
    return otherwise(f"429 without {', '.join(missing)}") if missing else refused(replies[-1], 429)


def refunded(target: Target) -> Verdict:
    """A request may take 600 tokens and takes a few; the next one is told how many are left."""
    if target.limited is None:
        return not_applicable("it has no quotas")
    other = target.limited(0, 2000)
    try:
        first = other.chat("Say yes.", max_tokens=600, stop=["e"])
        second = other.chat(max_tokens=1)
    finally:
        other.close()
    left, used = int(second.headers.get("x-ratelimit-remaining-tokens", -1)), first.usage.get("total_tokens", 0)
    fair = 2000 - used - 200 <= left <= 2000  # the second one's own estimate is open
    return passed() if fair and used < 300 else otherwise(f"of 2000 tokens {left} are left after {used}")


def bogus_keys(target: Target) -> Verdict:
    if not target.keys:
        return NO_KEYS
    before, begin, statuses = target.memory(), time.monotonic(), set()
    for i in range(BOGUS):
        statuses.add(asked_as(target, f"Bearer bogus-{i}", "/v1/models").status)
        if time.monotonic() - begin > 30:
            return otherwise(f"only {i} answers in 30 s")
    grown = target.grown(before)
    if grown is not None and grown > 16 * MIB:
        return otherwise(f"its memory grew by {grown / MIB:.0f} MiB")
    if statuses != {401}:
        return otherwise(f"{sorted(statuses)}")
    return passed("its memory is not seen" if grown is None else "")


PROBES = {
    20: wrong_keys, 21: key_shown, 22: open_paths, 23: strange_ids, 24: equal_ids, 25: over_quota, 26: refunded,
    27: bogus_keys,
}  # fmt: skip
