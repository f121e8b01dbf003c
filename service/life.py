"""The life of one request: when each thing happened, how it ended, and the parts that its time adds up to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.request import Timeline

PARTS = ("parse", "admit", "tokenize", "queue", "prefill", "decode", "between", "send")


@dataclass(eq=False)
class Life:
    """clock: the engine's, so that both speak of the same moments.

    marks: the moment at which each part ended, in the order in which they happened. outcome: how it is counted.
    """

    clock: Callable[[], float]
    id: str
    start_s: float = 0.0
    marks: dict[str, float] = field(default_factory=dict)
    send_blocked_s: float = 0.0
    outcome: str = "ok"
    error_code: str | None = None
    status: int = 0
    facts: dict[str, Any] = field(default_factory=dict)  # for the log line
    timelines: list[Timeline] = field(default_factory=list)

    def mark(self, part: str) -> None:
        self.marks[part] = self.clock()

    def split(self, end_s: float | None = None) -> dict[str, float]:
        """Seconds of each part; with "total", measured by itself, and "other", what is left of it.

        queue: from the engine's door to the first step. prefill and decode: in steps, up to the first token and after
        it. between: in the engine, but in no step. Of several answers, those of the longest-lived one.
        """
        end_s = self.clock() if end_s is None else end_s
        found, last = {}, self.start_s
        for part in ("parse", "admit", "tokenize"):
            if part in self.marks:
                found[part] = self.marks[part] - last
                last = self.marks[part]
        if self.timelines:
            found |= engine_parts(max(self.timelines, key=lambda line: line.finished or end_s), last, end_s)
        total = end_s - self.start_s
        return found | {"other": max(total - sum(found.values()), 0.0), "total": total}


def engine_parts(line: Timeline, asked_s: float, end_s: float) -> dict[str, float]:
    if line.admitted is None:
        return {"queue": (line.finished or end_s) - asked_s}
    first = line.tokens[0] if line.tokens else line.finished or end_s
    last = line.finished or end_s
    prefill = sum(end - start for start, end, _ in line.slices if end <= first)
    decode = sum(end - start for start, end, _ in line.slices if end > first)
    queue = line.admitted - asked_s
    return {"queue": queue, "prefill": prefill, "decode": decode, "between": last - asked_s - queue - prefill - decode,
            "deliver": end_s - last}  # fmt: skip


def server_timing(parts: dict[str, float], names: Sequence[str] | None = None) -> str:
    """The header of that name: milliseconds. https://www.w3.org/TR/server-timing/"""
    return ", ".join(f"{name};dur={seconds * 1e3:.2f}" for name, seconds in parts.items() if not names or name in names)
