"""Verdicts on what a server did with one case, and the questions that most of them are made of.

Two things are asked of every answer. Is it what this matrix wants? And where it is not: is it at least safe, that is,
no 5xx for what a client did wrong, no crash, no hang, and others are served as before? Servers may well differ in the
first; nobody wants them to fail in the second.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from conformance.wire import Hung, Reply


class Kind(StrEnum):
    """What was found. mark: one character for it in a card."""

    mark: str
    means: str

    def __new__(cls, name: str, mark: str, means: str) -> "Kind":
        kind = str.__new__(cls, name)
        kind._value_, kind.mark, kind.means = name, mark, means
        return kind

    PASS = "pass", "●", "as the matrix has it"
    OTHERWISE = "otherwise", "◐", "otherwise, and safe"
    UNSAFE = "unsafe", "✗", "a 5xx for a client's mistake, a crash, a hang, or others suffer"
    UNSEEN = "not visible", "·", "cannot be seen from outside"
    NONE = "not applicable", "–", "it has no such feature"


WORST_FIRST = (Kind.UNSAFE, Kind.OTHERWISE, Kind.PASS)


@dataclass(frozen=True)
class Verdict:
    """says: what came instead, or what was seen; ends in no full stop."""

    kind: Kind
    says: str = ""


def passed(says: str = "") -> Verdict:
    return Verdict(Kind.PASS, says)


def otherwise(says: str) -> Verdict:
    return Verdict(Kind.OTHERWISE, says)


def unsafe(says: str) -> Verdict:
    return Verdict(Kind.UNSAFE, says)


def unseen(why: str) -> Verdict:
    return Verdict(Kind.UNSEEN, why)


def not_applicable(why: str) -> Verdict:
    return Verdict(Kind.NONE, why)


def worst(verdicts: Iterable[tuple[str, Verdict]]) -> Verdict:
    """One verdict for several things that were tried: the worst, with the first three sentences of its kind."""
    found = list(verdicts)
    kind = next(kind for kind in WORST_FIRST if any(verdict.kind == kind for _, verdict in found))
    if kind == Kind.PASS:
        return passed("; ".join(dict.fromkeys(verdict.says for _, verdict in found if verdict.says)))
    alike: dict[str, list[str]] = {}  # what came -> for what
    for what, verdict in found:
        if verdict.kind == kind:
            alike.setdefault(verdict.says, []).append(what)
    told = [f"{says} for {shortened(whats)}" for says, whats in list(alike.items())[:3]]
    as_wanted = sum(verdict.kind == Kind.PASS for _, verdict in found)
    return Verdict(kind, "; ".join(told) + f" ({as_wanted} of {len(found)} as wanted)" * (len(found) > 1))


def shortened(whats: list[str]) -> str:
    return ", ".join(whats[:3]) + f" and {len(whats) - 3} more" * (len(whats) > 3)


def refused(reply: Reply, *statuses: int) -> Verdict:
    """Is it one of these statuses, with OpenAI's error object?"""
    if not reply.status:
        return otherwise("the connection closed without an answer")
    if reply.status >= 500 and reply.status not in (501, *statuses):
        return unsafe(f"{reply.status}")
    if b"Traceback (most recent call last)" in reply.body:
        return unsafe(f"{reply.status} with a traceback")
    if reply.status == 200 and reply.broken_inside:
        return otherwise("200, and an error inside the stream")
    if reply.status not in statuses:
        return otherwise(f"{reply.status}")
    return passed() if reply.error else otherwise(f"{reply.status} without OpenAI's error object")


def each(cases: Iterable[tuple[str, Callable[[], Verdict]]]) -> Verdict:
    """Try one after the other. A hang is a verdict too, and the last."""
    found: list[tuple[str, Verdict]] = []
    for what, attempt in cases:
        try:
            found.append((what, attempt()))
        except Hung as why:
            found.append((what, unsafe(f"it {why}")))
            break  # it may go on computing: what would be asked next would be judged by this
    return worst(found)
