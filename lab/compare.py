"""Two load records side by side: what differs between them, and whether B is faster than A.

A record may hold several runs of one load; those are its rounds. Round i of A is paired with round i of B, and
lab/verdict.py says what the pairs support. Ratios are B / A: of a latency, below 1 is better; of a throughput, above 1.
The two records ran one after the other, not in turns: a drift of the machine between them counts as a difference.
That is said on every table.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from config import UserError
from lab.load_runs import (
    RATES,
    Record,
    Run,
    answer_length,
    failed_share,
    load_words,
    more_is_better,
    rounds_by_load,
    value,
)
from lab.verdict import FEW_CONFIDENCE, FEWEST_ROUNDS, Verdict, t_half_width, verdict
from metrics import NONE, number, table

TIMES = ("ttft", "tpot", "itl", "e2e")  # less is better
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
SHOWN = ("throughput", "ttft", "tpot", "e2e")  # a latency without a statistic is its median
ONE_AFTER_THE_OTHER = (
    "The rounds are paired by their order. A and B ran one after the other, not in turns: if the machine changed in "
    "between, that counts as a difference."
)

# Settings that say where a record goes, where the server is, how often something is measured, or which loads are run:
# those are compared run by run. What the prompts are shows in their hash.
NO_FACTOR = {
    "json", "note", "notes_file", "url", "start", "api_key", "recalibrate", "trace", "breakdown", "quick", "selfcheck",
    "runs", "warmup", "rounds", "until", "requests", "seconds", "timeout", "seed", "prompt", "prompt_file",
    "concurrency", "rate", "arrival", "ramp", "replay_file", "sweep", "find_slo", "slo", "formulas",
    "prompt_tokens", "max_new_tokens",
}  # fmt: skip
MACHINE = ("CPU", "Cores", "Threads in use", "GPU", "Versions", "Commit")
# Of what a server tells of itself: what changes from start to start, or follows from another value.
CHANGES_BY_ITSELF = {"created", "started", "uptime_s", "pid", "port", "host", "url", "kv_blocks", "free_bytes"}
FOLLOWS = {"kept", "weight_bytes", "kv_bytes_per_token"}
FAILED_SHARE, LENGTH_SHARE = 0.01, 0.02  # above these, failures or answer lengths make two runs unlike


# ---- what differs


def factors(a: Record, b: Record) -> list[str]:
    """What differs besides the numbers, by name: settings, model, prompts, machine, versions, the server's settings."""
    found = {name: (x, y) for name, x, y in (*settings_of(a, b), *surroundings_of(a, b), *servers_of(a, b)) if x != y}
    if "model hash" in found:
        found.pop("model", None)
    return [f"{name} ({said(x)} → {said(y)})" for name, (x, y) in found.items()]


def settings_of(a: Record, b: Record) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted((a["config"].keys() | b["config"].keys()) - NO_FACTOR):
        yield name, a["config"].get(name), b["config"].get(name)


def surroundings_of(a: Record, b: Record) -> Iterator[tuple[str, Any, Any]]:
    for name in MACHINE:
        yield name, a["card"].get(name), b["card"].get(name)
    yield "prompt set", a.get("prompt_set_hash"), b.get("prompt_set_hash")
    yield "model hash", *((r.get("model") or {}).get("hash") for r in (a, b))


def servers_of(a: Record, b: Record) -> Iterator[tuple[str, Any, Any]]:
    """What the servers tell of themselves; of one that tells nothing, its address."""
    ours, theirs = (r.get("server") or {} for r in (a, b))
    yield "model", ours.get("model"), theirs.get("model")
    yield "kind of server", ours.get("kind"), theirs.get("kind")
    about = [dict(leaves(server.get("about") or {})) for server in (ours, theirs)]
    if not all(about):
        yield "server", ours.get("url"), theirs.get("url")
        return
    for path in sorted(about[0].keys() | about[1].keys()):
        name = path.split(".")[-1]
        if path.split(".")[0] not in FOLLOWS and not {name, *path.split(".")} & (CHANGES_BY_ITSELF | FOLLOWS):
            yield "model hash" if name == "hash" else name, about[0].get(path), about[1].get(path)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def said(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


def unlike(a: Sequence[Run], b: Sequence[Run]) -> list[str]:
    """Failures and shorter answers make a server look fast: where they differ, nothing else is compared."""
    found, (x, y) = [], (failed_share(a), failed_share(b))
    if abs(x - y) > FAILED_SHARE:
        found.append(f"failed requests ({x:.1%} → {y:.1%})")
    x, y = answer_length(a), answer_length(b)
    if x and y and abs(y / x - 1) > LENGTH_SHARE:
        found.append(f"answer length ({x:.1f} → {y:.1f} tokens)")
    return found


# ---- the comparison


@dataclass(frozen=True)
class Row:
    """One figure under one load. verdict: of B against A; ratio, low and high: B / A of the figure itself."""

    load: str
    figure: str
    a: float | None
    b: float | None
    verdict: Verdict
    ratio: float | None
    low: float | None
    high: float | None
    gate: str = ""  # holds, worse, no verdict; empty where no gate asks

    def cells(self) -> tuple[str, ...]:
        rate = more_is_better(self.figure)
        shown = [number(x, 2 if rate else 1, 1.0 if rate else 1e3) for x in (self.a, self.b)]
        why = f": {self.verdict.reason.partition(': ')[0]}" if self.verdict.reason else ""  # the factors stand above
        name = f"{self.figure}, {'per s' if rate else 'ms'}"
        return self.load, name, *shown, self.change, f"{self.verdict.word} (n={self.verdict.rounds}){why}", self.gate

    @property
    def change(self) -> str:
        if self.ratio is None:
            return NONE
        return f"×{self.ratio:.3f}" + ("" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]")

    def said(self) -> str:
        return f"B is {self.verdict.word} in {self.figure}, {self.change} (n={self.verdict.rounds})"


@dataclass(frozen=True)
class Comparison:
    a: str
    b: str
    factors: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    gate_missed: bool = False  # a load of A that B should have been held against was not run

    @property
    def status(self) -> int:
        """0: every gate holds, or none was asked. 1: something is worse than its gate. 3: a gate has no verdict."""
        gates = {row.gate for row in self.rows}
        return 1 if "worse" in gates else 3 if "no verdict" in gates or self.gate_missed else 0

    def text(self) -> str:
        columns = [("load", "left"), ("figure", "left"), ("A", "right"), ("B", "right"), ("B / A", "left"),
                   ("B is", "left"), ("gate", "left")]  # fmt: skip
        differs = "; ".join(self.factors) or "nothing that the records know of"
        head = f"A = [{self.a}], B = [{self.b}]. What differs: {differs}."
        return "\n\n".join([head, table(columns, [row.cells() for row in self.rows]), *self.notes])

    def sentences(self) -> list[str]:
        """One for every figure under every load."""
        return [f"{row.load}: {row.said()}." for row in self.rows]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"status": self.status}


def compare(a: Record, b: Record, gates: dict[str, float] | None = None) -> Comparison:
    """Every load that both records hold, figure by figure. UserError where they share none."""
    gates = gates or {}
    if a["id"] == b["id"]:
        raise UserError(f"A and B are both [{a['id']}]: name two records.")
    ours, theirs = rounds_by_load(a), rounds_by_load(b)
    common = [load for load in ours if load in theirs]
    if not common:
        raise UserError(
            f"No load was run in both: [{a['id']}] holds {loads_said(a)}, [{b['id']}] holds {loads_said(b)}. "
            "Run one of them again with the other's load."
        )
    differs = factors(a, b)
    figures = list(dict.fromkeys([*SHOWN, *gates]))
    rows = [
        row_of(ours[load], theirs[load], figure, differs, gates.get(figure)) for load in common for figure in figures
    ]
    alone = {"A": [load for load in ours if load not in theirs], "B": [load for load in theirs if load not in ours]}
    notes = [ONE_AFTER_THE_OTHER]
    notes += [f"{len(some)} of the loads of {side} were not run in the other." for side, some in alone.items() if some]
    notes += [f"[{r['id']}] is partial: it was interrupted." for r in (a, b) if r.get("partial")]
    return Comparison(a["id"], b["id"], tuple(differs), tuple(rows), tuple(notes), bool(gates and alone["A"]))


def loads_said(record: Record) -> str:
    words = list(dict.fromkeys(load_words(run) for run in record["runs"]))
    return ", ".join(words[:3]) + (", …" if len(words) > 3 else "")


def row_of(a: Sequence[Run], b: Sequence[Run], figure: str, differs: Sequence[str], worst: float | None) -> Row:
    """worst: the ratio B / A that the gate still allows; None without one."""
    rounds = [(value(x, figure), value(y, figure)) for x, y in zip(a, b, strict=False)]
    pairs = [(x, y) for x, y in rounds if x is not None and y is not None]
    seconds = [(1 / x, 1 / y) if more_is_better(figure) else (x, y) for x, y in pairs]
    decided = verdict([y for _, y in seconds], [x for x, _ in seconds], factors=differs)
    void = "; ".join(unlike(a, b))
    if len(pairs) < len(rounds):
        void = "not measured in both" + (f" in {len(rounds) - len(pairs)} of {len(rounds)} rounds" if pairs else "")
    if void:
        decided = Verdict("NO VERDICT", None, None, None, len(pairs), reason=void)
    logs = [math.log(y / x) for x, y in pairs]
    ratio = math.exp(mean(logs)) if logs else None
    low, high = interval(logs, 0.95) if len(logs) > 1 else (None, None)
    gate = "" if worst is None else gate_word(logs, worst, more_is_better(figure), bool(void) or len(differs) > 1)
    middles = [median([pair[i] for pair in pairs]) if pairs else None for i in (0, 1)]
    return Row(load_words(a[0]), figure, *middles, decided, ratio, low, high, gate)


def interval(logs: Sequence[float], confidence: float) -> tuple[float, float]:
    middle, half = mean(logs), t_half_width(logs, confidence)
    return math.exp(middle - half), math.exp(middle + half)


# ---- gates


def gates_of(text: str) -> dict[str, float]:
    """'throughput:-3%,ttft_p95:+5%' as figure -> the worst ratio B / A that is allowed. UserError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z0-9_]+)\s*:\s*([+-]?)(\d+(?:\.\d+)?)\s*%\s*", part)
        if not match:
            raise UserError(
                f"--gate {part.strip()!r} is not understood: write a figure and what it may lose, such as "
                "throughput:-3% or ttft_p95:+5%, with commas between several."
            )
        name, sign, percent = match[1], match[2], float(match[3])
        base, _, statistic = name.partition("_")
        if name not in RATES and not (base in TIMES and (statistic or "p50") in STATISTICS):
            raise UserError(
                f"--gate knows no figure {name!r}: it knows {', '.join(RATES)}, and {', '.join(TIMES)} with or "
                f"without one of _{', _'.join(STATISTICS)}."
            )
        wanted = "-" if more_is_better(name) else "+"
        if percent and sign != wanted:
            worse = "falling" if more_is_better(name) else "growing"
            raise UserError(
                f"--gate {part.strip()!r}: {name} gets worse by {worse}, so write {name}:{wanted}{match[3]}%."
            )
        if name in found or (more_is_better(name) and percent >= 100):
            why = "stands there twice" if name in found else "may not lose all of itself"
            raise UserError(f"--gate {part.strip()!r}: {name} {why}: write it once, with less than 100%.")
        found[name] = 1 - percent / 100 if more_is_better(name) else 1 + percent / 100
    return found


def gate_word(logs: Sequence[float], worst: float, more: bool, void: bool) -> str:
    """Decided by the interval, not by the point: all of it on the good side, all on the bad side, or neither.

    Three to five rounds must hold at 99 %, as in lab/verdict.py; fewer decide nothing.
    """
    if len(logs) < 3 or void:
        return "no verdict"
    low, high = interval(logs, 0.95 if len(logs) >= FEWEST_ROUNDS else FEW_CONFIDENCE)
    if more:
        low, high, worst = 1 / high, 1 / low, 1 / worst
    return "holds" if high <= worst else "worse" if low > worst else "no verdict"
