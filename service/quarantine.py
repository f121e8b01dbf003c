"""Inputs that end the engine are kept out: a client that repeats one must not make it end again and again.

Whoever was in a failed step is a suspect, from then on computed in passes of its own (engine.compute), so that its next
failure is nobody else's. An input is refused when it has failed twice and nobody else can have been it: blame must
intersect. Where everything fails, whoever it is, the engine itself is broken, and nobody is refused for that.

No text is kept, only hashes; how many of them has a limit. Plain numbers and a clock that is handed in.
"""

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from engine.request import Sampling
from service.errors import ApiError

MOST = 1000  # inputs that are remembered
STRIKES, SHARED_STRIKES = 2, 3  # failures until it is refused; and where it may have been somebody else each time
MINUTE_S = 60.0


def fingerprint(prompt: Sequence[int], sampling: Sampling) -> bytes:
    """A hash of what is computed: the tokens, and how the next one is chosen. How many are wanted, where they stop and
    how the dice fall (the seed) makes another answer of it, and no other input.
    """
    s = sampling
    choosing = (
        s.greedy, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.frequency_penalty,
        s.presence_penalty, sorted(s.logit_bias.items()), s.logprobs,
    )  # fmt: skip
    return hashlib.sha256(repr(choosing).encode() + array("q", prompt).tobytes()).digest()


@dataclass
class Suspect:
    """known_until_s: when it is forgotten. refused_until_s: when it is let in again, on its own and on probation."""

    strikes: int = 0
    known_until_s: float = 0.0
    refused_until_s: float = 0.0


class Quarantine:
    """minutes: how long an input is refused, and how long a suspect is remembered; 0 = nobody is suspected.

    Asked in the event loop and told in the engine's thread.
    """

    def __init__(self, minutes: float, clock: Callable[[], float], most: int = MOST) -> None:
        self.for_s, self.clock, self.most = minutes * MINUTE_S, clock, most
        self.suspects: OrderedDict[bytes, Suspect] = OrderedDict()  # who was last blamed stands last
        self.common: set[bytes] | None = None  # in every failure since a step last went well; None: it did
        self.lock = threading.Lock()
        self.refused = 0  # requests so far

    @property
    def on(self) -> bool:
        return self.for_s > 0

    def check(self, print: bytes) -> None:
        """ApiError 400 while this input is refused."""
        with self.lock:
            suspect = self.known(print)
            left_s = suspect.refused_until_s - self.clock() if suspect else 0.0
            if left_s <= 0:
                return
            self.refused += 1
        raise ApiError(
            400, "request_quarantined",
            f"The engine failed each time it computed this input, which is therefore not taken for another "
            f"{left_s / MINUTE_S:.1f} minutes: change the prompt, or ask the operator.",
            details={"quarantined_for_s": round(left_s, 1), "fingerprint": shown(print)},
        )  # fmt: skip

    def suspected(self, print: bytes) -> bool:
        """Whether it is to be computed alone."""
        with self.lock:
            return self.known(print) is not None

    def went_well(self) -> None:
        """A step, for somebody: what fails next fails on a working engine."""
        self.common = None

    def blame(self, passes: Sequence[Collection[bytes]], apart: bool = True) -> list[bytes]:
        """The inputs in each pass that failed in one step; those of them that are refused from now on. apart: whether
        suspects had passes of their own; where the engine failed around all of them, it may have been anybody.
        """
        with self.lock:
            refused, seen = [], set()
            for prints in passes:
                self.common = set(prints) if self.common is None else self.common & set(prints)
            for prints in passes:
                refused += self.struck(set(prints) - seen, apart)  # in one step nobody fails twice
                seen |= set(prints)
            return refused

    def struck(self, prints: set[bytes], apart: bool) -> list[bytes]:
        """Where suspects are among them, it was one of those; else all are suspects now."""
        now_s = self.clock()
        known = {print for print in prints if self.known(print)}
        blamed = (apart and known) or prints
        strikes = STRIKES if len(blamed) == len(known) == 1 else SHARED_STRIKES
        refused = []
        for print in sorted(blamed):
            suspect = self.suspects.setdefault(print, Suspect())
            suspect.strikes += 1
            suspect.known_until_s = now_s + self.for_s
            self.suspects.move_to_end(print)
            if print in self.common and suspect.strikes >= strikes:
                suspect.strikes = STRIKES - 1  # let in again, it has one failure left
                suspect.refused_until_s = now_s + self.for_s
                suspect.known_until_s = now_s + 2 * self.for_s
                refused.append(print)
        while len(self.suspects) > self.most:
            self.suspects.popitem(last=False)
        return refused

    def known(self, print: bytes) -> Suspect | None:
        suspect = self.suspects.get(print)
        if suspect is not None and suspect.known_until_s <= self.clock():
            del self.suspects[print]
            return None
        return suspect

    def counts(self) -> dict[str, int]:
        """How many inputs are refused, and how many more are suspected."""
        with self.lock:
            now_s = self.clock()
            alive = [one for one in self.suspects.values() if one.known_until_s > now_s]
        refused = sum(one.refused_until_s > now_s for one in alive)
        return {"quarantined": refused, "suspected": len(alive) - refused}


def shown(print: bytes) -> str:
    """What may be told of it: enough to find the same input again in a log."""
    return print.hex()[:12]
