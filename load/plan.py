"""Which loads are run, and which limits they are to keep."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from config import UserError
from lab.arrivals import Planned
from load.measures import PERCENTILES

LIMITS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Cell:
    """One load. clients: a closed loop. rate (requests/s), ramp (from, to, seconds) or recorded: an open one."""

    clients: int | None
    rate: float | None
    arrival: str | None
    prompt_tokens: int | None
    new_tokens: int | None
    requests: int
    ramp: tuple[float, float, float] | None = None
    recorded: tuple[Planned, ...] | None = None

    @property
    def load(self) -> dict[str, Any]:
        """As a record holds it; equal for equal loads."""
        kind = "closed" if self.clients else "ramp" if self.ramp else "replay" if self.recorded else "open"
        return {
            "kind": kind, "concurrency": self.clients, "rate": self.rate, "arrival": self.arrival,
            "prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "requests": self.requests,
            **({"ramp": list(self.ramp)} if self.ramp else {}),
        }  # fmt: skip

    def closed(self, clients: int) -> "Cell":
        return replace(self, clients=clients, rate=None, arrival=None)

    def open(self, rate: float, arrival: str) -> "Cell":
        return replace(self, clients=None, rate=rate, arrival=arrival)

    @property
    def label(self) -> str:
        if self.ramp or self.recorded:
            return f"{self.requests} requests, {self.load['kind']}"
        who = f"{self.clients} clients" if self.clients else f"{self.rate:g} requests/s"
        return f"{who}, {self.prompt_tokens} → {self.new_tokens}"


def keeps(figures: dict[str, Any], limits: Sequence[tuple[str, int, float]]) -> bool:
    """Whether a run stays within the limits: nothing measured and anything failed are no keeping."""
    found = [figures[f"{what}_s"] and figures[f"{what}_s"].get(f"p{p}") for what, p, _ in limits]
    return not figures["errors"] and all(
        value is not None and value <= most for value, (_, _, most) in zip(found, limits, strict=True)
    )


def ramp_of(text: str) -> tuple[float, float, float]:
    """1:8:60 -> from 1 to 8 requests/s in 60 s. UserError."""
    try:
        low, high, seconds = map(float, text.split(":"))
    except ValueError as error:
        raise UserError(f"{text!r} is no ramp: write 1:8:60, from 1 to 8 requests a second in 60 seconds.") from error
    return low, high, seconds


def precision_of(text: str) -> float:
    """5% -> 0.05. UserError."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not text.endswith("%") or not 0 < share < 1:
        raise UserError(f"{text!r} is no precision: write --until 5%, half the width of the interval of tokens/s.")
    return share


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
        if what not in LIMITS or p not in PERCENTILES or not 0 < most < 1e6:
            raise UserError(
                f"{part.strip()!r} is no limit: write ttft_p95=1.0,tpot_p95=0.1, with {', '.join(LIMITS)}, one of the "
                f"percentiles {', '.join(map(str, PERCENTILES))}, and seconds."
            )
        found.append((what, p, most))
    return found
