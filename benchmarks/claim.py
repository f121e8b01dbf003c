"""A claim: what is promised, what was measured just now, and whether it held."""

from collections.abc import Sequence
from dataclasses import dataclass

from config import PromptConfig
from metrics import table


@dataclass(frozen=True)
class Claim:
    what: str
    promised: str
    measured: str
    holds: bool | None  # None: the measurement could not tell
    skipped: bool = False  # there was nothing to measure it with

    @property
    def word(self) -> str:
        return "left out" if self.skipped else {True: "holds", False: "FAILS", None: "undecided"}[self.holds]


def rounds(config: PromptConfig, full: int) -> int:
    """With --quick a third of the rounds: enough to see that a benchmark runs, seldom enough for its verdict."""
    return max(full // 3, 6) if config.quick else full


def claims_table(claims: Sequence[Claim]) -> str:
    rows = [(c.what, c.promised, c.measured, c.word) for c in claims]
    return table([("claim", "left"), ("promised", "left"), ("measured here", "left"), ("", "left")], rows)
