"""What stands ready for when the engine cannot answer: its breaker, another server, kept answers, and their order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from service.breaker import Breaker, Rules, State
from service.errors import ApiError
from service.fallback import Fallback
from service.ladder import Ladder, Rung
from service.results import Results
from service.settings import ServeConfig

HELPED = ("shed_queue", "shed_memory", "shed_deadline", "shed_circuit")  # refusals that another answer may stand in for
FORCED = {"off": State.DISABLED, "open": State.FORCED_OPEN}
Told = Callable[[str, State], object]


@dataclass(frozen=True)
class Relief:
    """engine: the breaker before it. fallback, results: None where they are not configured."""

    engine: Breaker
    ladder: Ladder
    fallback: Fallback | None = None
    results: Results | None = None

    @property
    def breakers(self) -> list[Breaker]:
        return [self.engine] + ([self.fallback.breaker] if self.fallback else [])

    def may_help(self, refusal: ApiError) -> bool:
        """Whether somebody who would be turned away unheard might still get an answer."""
        somewhere = (self.fallback is not None and self.fallback.free) or bool(self.results and self.results.bytes)
        return refusal.outcome in HELPED and somewhere

    @property
    def open_to_all(self) -> bool:
        """Whether a new request would be answered, as far as circuits go. Kept answers are for a few only."""
        return self.engine.wait_s() == 0 or (self.fallback is not None and self.fallback.free)

    def refusal(self) -> ApiError:
        """For whom there is nothing left: the engine's circuit is open."""
        wait_s = self.engine.wait_s()
        why = "Most of the last requests failed here, so none is taken"
        if self.engine.state is State.FORCED_OPEN:
            why = "The engine here is switched off by order (--breaker open), so nothing is taken"
        return ApiError(
            503, "circuit_open", f"{why} for {wait_s:.1f} s: try again then.", retry=True,
            retry_after_s=wait_s, details={"limit_hit": "circuit", "retry_after_s": round(wait_s, 1)},
            outcome="shed_circuit",
        )  # fmt: skip

    @property
    def trouble(self) -> bool:
        """Whether a circuit is open, or about to be tried again."""
        return any(one.state not in (State.CLOSED, State.DISABLED) for one in self.breakers)

    def shown(self) -> dict[str, Any]:
        """For /health."""
        return {
            one.name: {"state": one.state, "failure_share": round(one.failure_share, 3), "calls": len(one.good),
                       "retry_after_s": round(one.wait_s(), 1)}
            for one in self.breakers
        }  # fmt: skip


def relief_of(
    settings: ServeConfig, about: Mapping[str, Any], places: int, clock: Callable[[], float], told: Told
) -> Relief:
    """As configured. told: called with the name of a breaker and its new state. UserError."""

    def breaker(name: str, longest_call_s: float) -> Breaker:
        return Breaker(name, clock, Rules(probe_s=longest_call_s), lambda state: told(name, state))

    engine, fallback, results = breaker("engine", settings.request_timeout), None, None
    if settings.breaker in FORCED:
        engine.force(FORCED[settings.breaker])
    if settings.fallback_url and settings.fallback_model:
        fallback = Fallback(
            settings.fallback_url, settings.fallback_model, settings.fallback_key(),
            silence_s=settings.fallback_timeout, most=places,
            breaker=breaker("fallback", settings.request_timeout), clock=clock,
        )  # fmt: skip
    if settings.result_cache_bytes:
        scope = {name: str(value) for name, value in about.items() if name not in ("created", "threads")}
        results = Results(settings.result_cache_bytes, settings.result_cache_ttl, scope, clock)
    there = {Rung.MAX_TOKENS: settings.degrade_max_tokens, Rung.MODEL: fallback, Rung.CACHED: results}
    ladder = Ladder([rung for rung, has in there.items() if has], settings.degrade_max_tokens, clock)
    return Relief(engine, ladder, fallback, results)
