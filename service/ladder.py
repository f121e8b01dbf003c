"""What a request may get instead of a refusal, one rung after the other, and when.

    max_tokens   the house fills up: answers are cut at so many tokens, and its places are free sooner
    model        the engine cannot take it: another server answers, perhaps with a smaller model
    cached       nor can that one: an answer that was kept, and is older than it should be
                 then it is refused, as without a ladder

Above the first there will be one that switches drafting off, once the engine drafts. Every rung is off until it is
configured; what was done is told in x-degraded, and nobody gets it who says x-allow-degraded: none.

Plain numbers and a clock that is handed in: no HTTP, no engine.
"""

from collections import Counter
from collections.abc import Callable, Collection
from enum import StrEnum

from service.errors import invalid

TIGHT, EASY = 0.5, 0.25  # of the queue's places or patience: from the one the cap is on, below the other it may go
HOLD_S = 5.0  # for so long it must have been easy before the cap goes: it does not flap
HEADER = "x-allow-degraded"


class Rung(StrEnum):
    MAX_TOKENS = "max_tokens"
    MODEL = "model"
    CACHED = "cached"


ALL = frozenset(Rung)


def allowed(said: str | None) -> frozenset[Rung]:
    """The rungs that a client accepts: all unless it says otherwise. ApiError 400."""
    if said is None:
        return ALL
    words = {word.strip().lower() for word in said.split(",")}
    if words == {"none"}:
        return frozenset()
    if not words <= ALL:
        raise invalid(f"{HEADER} takes none, or some of {', '.join(Rung)} with commas between them.")
    return frozenset(map(Rung, words))


class Ladder:
    """there: the rungs that are configured. cap: new tokens of an answer while it is tight."""

    def __init__(self, there: Collection[Rung], cap: int, clock: Callable[[], float]) -> None:
        self.there, self.cap, self.clock = frozenset(there), cap, clock
        self.tight = False
        self.easy_since_s: float | None = None
        self.used_s: dict[Rung, float] = {}
        self.counts: Counter[Rung] = Counter()  # requests, by the rung that they got

    def feel(self, pressure: float) -> None:
        """How full the house is: 1 is as full as it may be. Asked at every request, and every second."""
        now_s = self.clock()
        if pressure >= EASY:
            self.easy_since_s = None
            self.tight = self.tight or pressure >= TIGHT
            return
        if self.easy_since_s is None:
            self.easy_since_s = now_s
        if now_s - self.easy_since_s >= HOLD_S:
            self.tight = False

    def most_tokens(self, wanted: int, accepted: Collection[Rung]) -> int:
        """New tokens of an answer of which so many are wanted."""
        capped = self.tight and Rung.MAX_TOKENS in self.there and Rung.MAX_TOKENS in accepted
        return min(wanted, self.cap) if capped else wanted

    def below(self, accepted: Collection[Rung] = ALL) -> list[Rung]:
        """What is left for a request that the engine does not take, in the order in which to try it."""
        return [rung for rung in (Rung.MODEL, Rung.CACHED) if rung in self.there and rung in accepted]

    def used(self, rung: Rung) -> None:
        self.used_s[rung] = self.clock()
        self.counts[rung] += 1

    def engaged(self, rung: Rung) -> bool:
        """Whether it is in use: the cap while it is tight, the others for some seconds after each request."""
        if rung is Rung.MAX_TOKENS:
            return self.tight and rung in self.there
        return rung in self.used_s and self.clock() - self.used_s[rung] < HOLD_S
