"""Which loads are run, in which order: every cell of load × prompt length × answer length, in rounds that turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from config import UserError

LIMITS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Cell:
    """One load. Of clients and rate one is given: a closed or an open loop. rate: requests/s."""

    clients: int | None
    rate: float | None
    arrival: str | None
    prompt_tokens: int | None
    new_tokens: int | None
    requests: int

    @property
    def load(self) -> dict[str, Any]:
        """As a record holds it; equal for equal loads."""
        kind = "closed" if self.clients else "open"
        return {
            "kind": kind, "concurrency": self.clients, "rate": self.rate, "arrival": self.arrival,
            "prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "requests": self.requests,
        }  # fmt: skip

    def closed(self, clients: int) -> "Cell":
        return replace(self, clients=clients, rate=None, arrival=None)

    def open(self, rate: float, arrival: str) -> "Cell":
        return replace(self, clients=None, rate=rate, arrival=arrival)

    @property
    def label(self) -> str:
        who = f"{self.clients} clients" if self.clients else f"{self.rate:g} requests/s"
        return f"{who}, {self.prompt_tokens} → {self.new_tokens}"


def turning(cells: Sequence[Cell], rounds: int) -> Iterator[Cell]:
    """A B C, C B A, …: what the machine does meanwhile hits all alike."""
    for number in range(rounds):
        yield from cells if number % 2 == 0 else reversed(cells)


def keeps(figures: dict[str, Any], limits: Sequence[tuple[str, int, float]]) -> bool:
    """Whether a run stays within the limits: nothing measured and anything failed are no keeping."""
    found = [figures[f"{what}_s"] and figures[f"{what}_s"].get(f"p{p}") for what, p, _ in limits]
    return not figures["errors"] and all(
        value is not None and value <= most for value, (_, _, most) in zip(found, limits, strict=True)
    )


def limits(text: str) -> list[tuple[str, int, float]]:
    """ttft_p95=1.0,tpot_p95=0.1 -> [("ttft", 95, 1.0), …]. UserError."""
    found = []
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        what, _, percent = name.partition("_p")
        try:
            p, most = int(percent), float(value)
        except ValueError:
            p, most = 0, 0.0
        if what not in LIMITS or not 0 < p < 100 or not 0 < most < 1e6:
            raise UserError(
                f"{part.strip()!r} is no limit: write ttft_p95=1.0,tpot_p95=0.1, with {', '.join(LIMITS)}, a "
                "percentile below 100 and seconds."
            )
        found.append((what, p, most))
    return found
