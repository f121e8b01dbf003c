"""What the runs say, in sentences: nothing that an interval does not carry is called a difference."""

from collections.abc import Sequence
from typing import Any

from lab.verdict import verdict
from load.tables import load_name, shape_name
from metrics import number

BUSY = 0.8  # of one core: a client that needs more may be what is measured
LATE_S = 0.01


def sentences(record: dict[str, Any]) -> list[str]:
    runs = record["runs"]
    said = [*found_rate(runs), *against_first(runs), *broken(runs)] or ["No two loads to compare: see the tables."]
    return [*said, ceiling_sentence(record.get("client_ceiling"))]


def ceiling_sentence(most: dict[str, Any] | None) -> str:
    if most is None:
        return "What this client can do at most is not known here: run `python3 load_test.py --selfcheck` once."
    requests, pieces = f"{most['requests_per_s']:,.0f} requests/s", f"{most['pieces_per_s']:,.0f} pieces/s"
    reached = "so much it reached against a server that only answers."
    if most.get("at_least", True):  # one that was kept before this was asked had reached all that was sent
        return (
            f"A run is this client's own limit above {requests}: {reached} It takes at least {pieces}, too: no more "
            "were sent."
        )
    return f"A run is this client's own limit above {requests} or {pieces}: {reached}"


def against_first(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Every load against the first one of its shape: by rounds where there are some, else as two points."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(f"{load_name(run['load'])}, {shape_name(run['load'])}", []).append(run)
    said, firsts = [], {}
    for name, same in groups.items():
        base, first = firsts.setdefault(shape_name(same[0]["load"]), (name, same))
        if first is same:
            continue
        said += [sentence(name, same, base, first)]
    return said


def sentence(name: str, same: Sequence[dict], base: str, first: Sequence[dict]) -> str:
    rates = [[run["figures"]["output_tokens_per_s"] for run in some] for some in (same, first)]
    waits = [[(run["figures"]["ttft_s"] or {}).get("p50") for run in some] for some in (same, first)]
    return f"{name}, against {base}: tokens/s {compared(*rates)}; first token {compared(*waits)}."


def compared(above: Sequence[float | None], below: Sequence[float | None]) -> str:
    """above / below by rounds: a verdict; a single pair is a point, and no verdict is made of it."""
    pairs = [(a, b) for a, b in zip(above, below, strict=False) if a and b]
    if not pairs:
        return "not measured"
    if len(pairs) < 3:
        a, b = pairs[0]
        return f"×{a / b:.2f} (one point: no verdict; use --rounds 6)"
    found = verdict([a for a, _ in pairs], [b for _, b in pairs])
    return f"×{found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}] (n={found.rounds})"


def found_rate(runs: Sequence[dict[str, Any]]) -> list[str]:
    tried = [run for run in runs if "keeps" in run]
    if not tried:
        return []
    kept = [run["load"]["rate"] for run in tried if run["keeps"]]
    missed = [run["load"]["rate"] for run in tried if not run["keeps"]]
    best = number(max(kept), 2) if kept else "none that was tried"
    least = number(min(missed), 2) if missed else "none that was tried"
    return [f"The largest rate that keeps the limits: {best} requests/s; the smallest that does not: {least}."]


def broken(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What makes a run doubtful."""
    said = []
    for run in runs:
        name, found, wall = load_name(run["load"]), run["figures"], run["client"]
        for law, what in (
            ("little", "Little's law is off"),
            ("tokens", "the server counted other tokens than arrived"),
        ):
            if run["laws"][law]["holds"] is False:
                said.append(f"{name}: {what}: do not quote this run.")
        share = wall["cpu_s"] / wall["wall_s"]
        if share > BUSY:
            said.append(f"{name}: this client used {share:.0%} of a core: it may be what was measured.")
        late = found["schedule_delay_s"]
        if run["load"]["rate"] and late and late["p99"] > LATE_S:
            said.append(f"{name}: requests left up to {late['p99'] * 1e3:.0f} ms (p99) late: latency counts from due.")
        if run["window"]["class"] == "growing" and run["load"]["rate"]:
            said.append(f"{name}: ever more requests were in flight: its latencies grow with the length of the run.")
        if run["ended"] == "over-saturated":
            said.append(f"{name}: stopped, since the server falls ever further behind.")
        if found["errors"]:
            said.append(f"{name}: not answered: {', '.join(f'{n} {kind}' for kind, n in found['errors'].items())}.")
    return said
