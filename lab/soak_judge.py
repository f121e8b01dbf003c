"""What a soak's looks and laps say: whether memory grows, whether answers get slower, whether anything is left behind.

Growth is fitted, not eyeballed. Memory goes up and down with what is being done, and what it did a minute ago it does
again: neighbouring looks are no independent samples. So the slope is Theil and Sen's (the median of the slopes of all
pairs; Sen, JASA 63, 1968), which single peaks do not move, and its interval comes from whole stretches of residuals
drawn together (the moving-block bootstrap; Künsch, Annals of Statistics 17(3), 1989).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab.verdict import FEWEST_ROUNDS, verdict
from metrics import percentile

MIB = 1 << 20
HOUR_S = 3600.0
MOST_POINTS = 180  # looks are thinned to so many medians: a slope needs every pair
FEWEST_LOOKS = 12
DRAWS = 400
STRETCHES = 6  # a stretch is such a part of the series
WARM_UP = 0.1  # of the laps
SHORT_S, GROWN = 1200.0, 4 * MIB
GROWTH_PER_HOUR, DRIFT, SLACK, LET_IN = 1.0 * MIB, 0.10, 2, 0.999
Look = dict[str, Any]
Lap = dict[str, Any]
Pair = dict[str, Lap]  # the same visits: "old" and "new"


@dataclass(frozen=True)
class Judged:
    """A limit, what was measured, and whether it holds. None: the measurement could not tell."""

    what: str
    limit: str
    measured: str
    holds: bool | None

    @property
    def word(self) -> str:
        return {True: "holds", False: "FAILS", None: "NO VERDICT"}[self.holds]


# ---- growth


@dataclass(frozen=True)
class Slope:
    """Bytes an hour, with the 95 % interval, over so many hours."""

    per_hour: float
    low: float
    high: float
    hours: float


def slope(at_s: Sequence[float], sizes: Sequence[float], seed: int = 0) -> Slope | None:
    """How fast they grow. None below FEWEST_LOOKS looks."""
    if len(at_s) < FEWEST_LOOKS:
        return None
    x, y = thinned(np.asarray(at_s, float) / HOUR_S, np.asarray(sizes, float))
    before, after = np.triu_indices(len(x), 1)
    apart = x[after] - x[before]

    def theil_sen(values: np.ndarray) -> float:
        return float(np.median((values[after] - values[before]) / apart))

    found = theil_sen(y)
    line = np.median(y - found * x) + found * x
    drawn = [theil_sen(line + rest) for rest in stretches(y - line, seed)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Slope(found, float(low), float(high), float(x[-1] - x[0]))


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The medians of MOST_POINTS neighbouring groups."""
    if len(x) <= MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)
    return np.array([np.median(x[part]) for part in parts]), np.array([np.median(y[part]) for part in parts])


def stretches(rest: np.ndarray, seed: int) -> list[np.ndarray]:
    """DRAWS series as long as this one, each put together from stretches of it."""
    dice, n = np.random.default_rng(seed), len(rest)
    length = max(n // STRETCHES, 2)
    found = []
    for _ in range(DRAWS):
        begins = dice.integers(0, n - length + 1, -(-n // length))
        found.append(np.concatenate([rest[begin : begin + length] for begin in begins])[:n])
    return found


def memory(looks: Sequence[Look], limit: float = GROWTH_PER_HOUR, seed: int = 0) -> Judged:
    """looks: after the warm-up. In a short run a single page is megabytes an hour: there only GROWN in all is a leak,
    and nothing is a proof that there is none.
    """
    what, said = "RssAnon + VmSwap after the warm-up", f"grows by less than {limit / MIB:g} MiB/h"
    found = slope([one["at"] for one in looks], [one["bytes"] for one in looks], seed)
    if found is None:
        return Judged(what, said, f"{len(looks)} looks; {FEWEST_LOOKS} are needed", None)
    long_enough = found.hours * HOUR_S >= SHORT_S
    leaks = found.low > limit and (long_enough or found.low * found.hours > GROWN)
    holds = False if leaks else True if found.high < limit and long_enough else None
    numbers = f"{found.per_hour / MIB:+.2f} MiB/h [{found.low / MIB:+.2f}, {found.high / MIB:+.2f}]"
    short = "" if long_enough or leaks else f": too short, give it {SHORT_S / 60:.0f} min"
    return Judged(what, said, f"{numbers} over {found.hours * 60:.0f} min{short}", holds)


# ---- slower with age


def aged(pairs: Sequence[Pair], figure: str, percent: str = "p99", limit: float = DRIFT) -> Judged:
    """The old service against one that has just started, which were sent the same visits in turns.

    Not its last hours against its first ones: in two hours a machine changes, too. (One became slower once, and so did
    every answer; a service that started then was as slow as the old one.)
    """
    what, said = f"{percent} of {NAMES[figure]}, in turns with a new service", f"less than {limit:.0%} slower"
    silent = sum(not (pair["old"][figure] and pair["new"][figure]) for pair in pairs)
    if silent or not pairs:
        told = f"in {silent} of {len(pairs)} pairs of laps nobody was answered" if silent else "there was no new one"
        return Judged(what, said, told, None)
    found = verdict(
        [pair["old"][figure][percent] for pair in pairs], [pair["new"][figure][percent] for pair in pairs], noise=limit
    )
    holds = None
    if found.high is not None and found.rounds >= FEWEST_ROUNDS:
        holds = True if found.high < 1 + limit else False if found.low > 1 + limit else None
    told = str(found)
    if holds is not None:  # a narrower question than the verdict's word answers, so it may be settled before it
        told = f"×{found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}] (n={found.rounds} pairs)"
    return Judged(what, said, told, holds)


NAMES = {"ttft_s": "TTFT", "e2e_s": "E2E"}


# ---- what is left behind


def flat(rests: Sequence[Look], name: str, slack: int = SLACK) -> Judged:
    """rests: looks while nobody is there, the first one of them right after the warm-up."""
    said = f"as after the warm-up, ±{slack}, whenever nobody is there"
    what = {"files": "open files", "threads": "threads", "tasks": "asyncio tasks"}[name]
    values = [one[name] for one in rests if one.get("ok")]
    if len(values) < 2:
        return Judged(what, said, "no two looks to compare", None)
    off = max(abs(value - values[0]) for value in values)
    return Judged(what, said, f"{values[0]} then, {min(values)} to {max(values)} in {len(values)} looks", off <= slack)


ADD_UP = "the service's outcomes add up to the requests"


def books(rests: Sequence[Look]) -> Judged:
    """Every rest holds how many requests were written by then, and how many ends of requests the service has counted.

    A request whose connection turned out to be closed is sent again: whether the first one arrived, nobody knows.
    """
    rests = [one for one in rests if one["ok"]]
    if not rests:
        return Judged(ADD_UP, "at every rest", "no rest at which it told them", None)
    wrong = [one for one in rests if not one["written"] - one["doubtful"] <= counted(one) <= one["written"]]
    last = rests[-1]
    doubt = f", of them {last['doubtful']} sent again" if last["doubtful"] else ""
    told = f"{counted(last):,} outcomes, {last['written']:,} requests written{doubt}"
    worst = f"; at {wrong[0]['at']:.0f} s {counted(wrong[0]):,} for {wrong[0]['written']:,}" if wrong else ""
    return Judged(ADD_UP, "at every rest", told + worst, not wrong)


def counted(look: Look) -> int:
    return sum(look["outcomes"].values())


def laws(looks: Sequence[Look]) -> Judged:
    broken = sorted({name for one in looks for name in one.get("broken", ())})
    silent = sum(not one["ok"] for one in looks)
    scrapes = [one["scrape_s"] for one in looks if one["ok"]]
    told = f"broken: {', '.join(broken)}" if broken else f"in {len(scrapes)} looks"
    told += f"; no metrics in {silent} looks" if silent else ""
    told += f"; a scrape took {1e3 * percentile(scrapes, 99):.0f} ms (p99)" if scrapes else ""
    return Judged("the laws of tokens, blocks and Little", "hold at every look", told, not broken and not silent)


def restarts(looks: Sequence[Look]) -> Judged:
    count = max((one.get("restarts", 0) for one in looks), default=0)
    return Judged("engines that had to be replaced", "none", str(count), count == 0)


def as_expected(ends: dict[str, int]) -> Judged:
    """ends: how visits ended, by the words of load/mixed.py."""
    failed = {word: number for word, number in ends.items() if word.startswith("failed")}
    told = ", ".join(f"{number} {word}" for word, number in failed.items())
    return Judged("every visit ends as it should", "no failure", told or f"none of {sum(ends.values()):,}", not failed)


def let_in(kinds: dict[str, dict[str, int]]) -> Judged:
    """Who comes outside a rush, at half of what can be served, finds room. A machine that stops for half a second, as
    virtual ones do, may have some refused.
    """
    calm = sum((Counter(ends) for kind, ends in kinds.items() if kind != "rush"), Counter())
    asked, refused = calm.total(), calm["refused"]
    holds = asked > 0 and refused <= (1 - LET_IN) * asked
    return Judged(
        "who comes outside a rush is let in", f"{LET_IN:.1%}", f"{refused:,} of {asked:,} were refused", holds
    )


def same_answer(first: str, last: str | None) -> Judged:
    """last: None when nobody asked again; empty when there was no answer."""
    equal = None if last is None else first == last
    told = "not asked again" if last is None else "identical" if equal else f"{first!r} became {last!r}"
    return Judged("a fixed prompt's answer (greedy), first against last", "the same bytes", told, equal)


# ---- all of it


def warm(laps: Sequence[Lap]) -> int:
    """How many laps are the warm-up."""
    return min(max(round(WARM_UP * len(laps)), 1), len(laps))


def judged(record: dict[str, Any]) -> list[Judged]:
    """record: laps, looks and rests of a soak, by experiments/soak.py. ready_s: None when the warm-up did not end."""
    ready_s = float("inf") if record["ready_s"] is None else record["ready_s"]
    looks = [one for one in record["looks"] if one["at"] >= ready_s]
    rests = [one for one in record["rests"] if one["at"] >= ready_s]
    found = [memory(looks, record["limit_bytes_per_hour"], record["config"]["seed"])]
    found += [flat(rests, name) for name in ("files", "threads", "tasks")]
    found += [aged(record["pairs"], figure) for figure in ("ttft_s", "e2e_s")]
    found += [books(record["rests"])] if record["rests"] else []
    found += [laws([*record["looks"], *record["rests"]]), restarts(record["looks"])]
    found += [as_expected(record["ends"]), let_in(record["kinds"])]
    if record.get("ended"):
        found.append(Judged("the service is there to the end", "always", record["ended"], False))
    return [*found, same_answer(*record["probes"])]
