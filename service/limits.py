"""Rate limits: how many requests and tokens a minute each key may have, and what clients are told about it.

A bucket fills evenly and is drawn from; tokens are drawn by estimate, and what was not used is given back when the
request ends. The well-kept libraries for this have no way to give back, so this one is our own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from service.errors import ApiError

MINUTE_S = 60.0


@dataclass
class Bucket:
    """Holds up to `most`, and gains that much in a minute. level is below 0 when more was used than estimated."""

    most: float
    now_s: float
    level: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = self.most

    def at(self, now_s: float) -> "Bucket":
        """Filled up to this moment."""
        self.level = min(self.level + max(now_s - self.now_s, 0.0) * self.most / MINUTE_S, self.most)
        self.now_s = now_s
        return self

    def wait_s(self, amount: float) -> float:
        """Seconds until so much can be drawn; infinity when it never can."""
        if amount > self.most:
            return float("inf")
        return max(amount - self.level, 0.0) * MINUTE_S / self.most

    @property
    def reset_s(self) -> float:
        """Seconds until it is full."""
        return (self.most - self.level) * MINUTE_S / self.most


class RateLimits:
    """requests, tokens: a minute, for each key; 0 = no limit. Only known keys come here: memory is bounded."""

    def __init__(self, requests: int, tokens: int, clock: Callable[[], float]) -> None:
        self.most = {"requests": requests, "tokens": tokens}
        self.clock = clock
        self.buckets: dict[tuple[str, str], Bucket] = {}

    def bucket(self, key: str, what: str) -> Bucket | None:
        if not self.most[what]:
            return None
        now_s = self.clock()
        return self.buckets.setdefault((key, what), Bucket(self.most[what], now_s)).at(now_s)

    def draw(self, key: str, tokens: int) -> None:
        """One request of about so many tokens; all or nothing. ApiError 429, with the longer of both waits."""
        wanted = {"requests": 1, "tokens": tokens}
        waits_s = {what: self.bucket(key, what).wait_s(wanted[what]) for what in wanted if self.most[what]}
        longest = max(waits_s, key=waits_s.__getitem__, default=None)
        if longest is not None and waits_s[longest]:
            raise self.refusal(key, longest, wanted[longest], waits_s[longest])
        for what, amount in wanted.items():
            self.give_back(key, what, -amount)

    def give_back(self, key: str, what: str, amount: float) -> None:
        """What was drawn and not used; less than nothing when more was used."""
        if bucket := self.bucket(key, what):
            bucket.level = min(bucket.level + amount, bucket.most)

    def headers(self, key: str) -> dict[str, str]:
        """OpenAI's: limit, what is left, and how long until all of it is there again."""
        found = {}
        for what in self.most:
            if bucket := self.bucket(key, what):
                found |= {
                    f"x-ratelimit-limit-{what}": str(int(bucket.most)),
                    f"x-ratelimit-remaining-{what}": str(max(int(bucket.level), 0)),
                    f"x-ratelimit-reset-{what}": duration(bucket.reset_s),
                }
        return found

    def known_headers(self, key: str) -> dict[str, str]:
        """The same for a key that has drawn before; nothing for others, and nothing is kept for them."""
        return self.headers(key) if any((key, what) in self.buckets for what in self.most) else {}

    def told_with(self, error: ApiError, key: str) -> ApiError:
        """The error with what is known of this key's limits; a copy, because several may be told the same."""
        return replace(error, headers=self.known_headers(key) | dict(error.headers))

    def refusal(self, key: str, what: str, amount: int, wait_s: float) -> ApiError:
        never = wait_s == float("inf")
        asks = f" and this request asks for {amount}" if what == "tokens" else ""
        advice = "ask for less, it can never be served so" if never else f"try again in {wait_s:.1f} s"
        return ApiError(
            429, "rate_limit_exceeded", f"This key may have {self.most[what]} {what} a minute{asks}: {advice}.",
            retry=not never, retry_after_s=None if never else wait_s, headers=self.headers(key), outcome="rate_limited",
        )  # fmt: skip


def duration(seconds: float) -> str:
    """As OpenAI writes it: 250ms, 12s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1e3)}ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
