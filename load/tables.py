"""The runs as people read them. A percentile that its samples do not support carries a mark."""

from collections.abc import Sequence
from typing import Any

from load import formulas
from metrics import NONE, SAMPLE_FLOOR, mb, ms, number, table

Run = dict[str, Any]
MARK = "°"


def load_name(load: dict[str, Any]) -> str:
    if load["kind"] == "closed":
        return f"closed, {load['concurrency']} client{'s' * (load['concurrency'] != 1)}"
    if load["kind"] == "open":
        return f"open, {load['rate']:g}/s {load['arrival']}"
    if load["kind"] == "ramp":
        low, high, seconds = load["ramp"]
        return f"open, {low:g} to {high:g}/s in {seconds:g} s, {load['arrival']}"
    return f"open, {load['requests']} recorded requests"


def shape_name(load: dict[str, Any]) -> str:
    return f"{load['prompt_tokens'] or '?'} → {load['new_tokens'] or '?'}"


def stat(found: dict[str, Any] | None, name: str) -> str:
    """A percentile in ms."""
    if found is None:
        return NONE
    return ms(found[name]) + ("" if name in found["certified"] else MARK)


def latency_table(runs: Sequence[Run]) -> str:
    columns = [("load", "left"), ("prompt → new", "left"), ("n", "right")]
    columns += [(f"{what} {p} (ms)", "right") for what in ("TTFT", "TPOT", "E2E") for p in ("p50", "p95", "p99")]
    rows = []
    for run in runs:
        found = run["figures"]
        n = found["e2e_s"]["n"] if found["e2e_s"] else 0
        cells = [stat(found[f"{what}_s"], p) for what in ("ttft", "tpot", "e2e") for p in ("p50", "p95", "p99")]
        rows.append((load_name(run["load"]), shape_name(run["load"]), n, *cells))
    floors = ", ".join(f"p{p} {n}" for p, n in SAMPLE_FLOOR.items())
    marked = any(MARK in str(cell) for row in rows for cell in row)
    note = f"\n\n{MARK} says little about the next run: fewer samples than such a percentile needs ({floors})."
    return "### Latency, from when each request was due\n\n" + table(columns, rows) + (note if marked else "")


def throughput_table(runs: Sequence[Run]) -> str:
    columns = [
        ("load", "left"), ("prompt → new", "left"), ("window", "left"), ("tokens/s", "right"), ("requests/s", "right"),
        ("prompt tokens/s", "right"), ("goodput/s", "right"), ("in flight", "right"), ("queue p50 (ms)", "right"),
        ("prompt cached", "right"), ("errors", "left"), ("retries", "right"),
    ]  # fmt: skip
    rows = []
    for run in runs:
        found, window = run["figures"], run["window"]
        errors = ", ".join(f"{count} {kind}" for kind, count in found["errors"].items()) or "0"
        known = found["prompt_tokens"] and found["cached_tokens"] is not None
        share = found["cached_tokens"] / found["prompt_tokens"] if known else None
        rows.append((
            load_name(run["load"]), shape_name(run["load"]),
            f"{window['class']}, {number(window['end'] - window['begin'])} s", number(found["output_tokens_per_s"]),
            number(found["requests_per_s"], 2), number(found["prompt_tokens_per_s"]), number(found["goodput_per_s"], 2),
            number(run["laws"]["little"]["in_flight"]), stat(found["queue_s"], "p50").removesuffix(MARK),
            number(share, 0, 100, " %"), errors, found["retries"],
        ))  # fmt: skip
    return "### Throughput, within the window\n\n" + table(columns, rows)


def laws_table(runs: Sequence[Run]) -> str:
    """What each run checked on itself."""
    columns = [
        ("load", "left"), ("in flight, counted", "right"), ("from the stamps", "right"), ("Little", "left"),
        ("the server's count", "right"),
        ("tokens: pieces", "right"), ("usage", "right"), ("server", "right"), ("tokens", "left"),
        ("sent late p99 (ms)", "right"), ("rate asked", "right"), ("reached", "right"), ("client CPU", "right"),
        ("server CPU", "right"), ("server RAM (MB)", "right"), ("server GPU (MB)", "right"),
    ]  # fmt: skip
    rows = []
    for run in runs:
        little, tokens, found, wall = run["laws"]["little"], run["laws"]["tokens"], run["figures"], run["client"]
        used = run["server"] or {}
        server = used["cpu_s"] / wall["wall_s"] if used else None
        rows.append((
            load_name(run["load"]), number(little["in_flight"], 2), number(little["throughput_x_latency"], 2),
            word(little["holds"]), number(little.get("server"), 1),
            number(tokens["pieces"], 0), number(tokens["usage"], 0), number(tokens["server"], 0),
            word(tokens["holds"]), stat(found["schedule_delay_s"], "p99").removesuffix(MARK),
            number(found["requested_rate"], 2), number(found["achieved_rate"], 2) if found["requested_rate"] else NONE,
            number(wall["cpu_s"] / wall["wall_s"], 0, 100, " %"), number(server, 0, 100, " %"),
            mb(used.get("rss_peak_bytes"), 0), mb(used.get("gpu_peak_bytes"), 0),
        ))  # fmt: skip
    return "### What the runs say of themselves\n\n" + table(columns, rows)


def line(run: Run) -> str:
    """A run in one line, for whoever watches."""
    found, errors = run["figures"], sum(run["figures"]["errors"].values())
    return (
        f"{load_name(run['load'])}, {shape_name(run['load'])}: {number(found['output_tokens_per_s'])} tokens/s, "
        f"TTFT p50 {stat(found['ttft_s'], 'p50')}, E2E p50 {stat(found['e2e_s'], 'p50')} ms, {errors} errors"
    )


def others_table(runs: Sequence[Run], tool: str) -> str:
    """The same stamps in another tool's formulas, under its own names."""
    express = {"vllm": formulas.as_vllm, "guidellm": formulas.as_guidellm}[tool]
    found = [express(run["requests"]) for run in runs]
    columns = [(f"as {tool}", "left"), *((load_name(run["load"]), "right") for run in runs)]
    rows = [(name, *(number(one.get(name), 3) for one in found)) for name in found[0]]
    return f"### In the formulas of {tool}, over the whole run\n\n" + table(columns, rows)


def word(holds: bool | None) -> str:
    return {True: "holds", False: "BROKEN", None: "not asked"}[holds]
