"""--breakdown: runs the hooks and the profiler of lab/breakdown.py over one request, and prints what they saw."""

from collections.abc import Callable
from statistics import median
from typing import Any

from lab import console
from lab.breakdown import PARTS, breakdown, profiled
from lab.verdict import verdict
from metrics import mb, ms, number, table

ROUNDS = 6
STEPS = 16  # decode steps a round; the parts' shares settle within a few


def measure(net: Any, ids: Any, prefill: Callable, decode_step: Callable, new_tokens: int, trace: str | None) -> dict:
    """net: the module; ids (1, T) on its device; prefill(ids) and decode_step(token, cache) -> (token, cache)."""
    steps = max(min(STEPS, new_tokens - 1), 0)
    first, step = lambda: prefill(ids), lambda state: decode_step(*state)
    found = breakdown(net, ids.device, first, step, steps, console.progress(range(ROUNDS), ROUNDS, "breakdown"))
    return {
        "phases": found,
        "operators": profiled(ids.device, first, step, steps, trace),
        "steps": steps,
        "trace": trace,
    }


def tables(found: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            "### Breakdown: time by part of the network",
            parts_table(found["phases"]),
            hook_price(found["phases"]),
            f"### Breakdown: the slowest operators of one prefill and {found['steps']} decode steps",
            operators_table(found["operators"]),
            *([f"Timeline written to {found['trace']}: open it in https://ui.perfetto.dev."] if found["trace"] else []),
        ]
    )


def parts_table(phases: dict[str, dict]) -> str:
    """Per part: time and share in each phase; for decode also the bytes of its weights and how fast they were read."""
    rows = []
    for part in (*PARTS, "total"):
        cells: list[str] = [part]
        for found in phases.values():
            whole = sum(found["parts_s"].values())
            seconds = whole if part == "total" else found["parts_s"][part]
            cells += [ms(seconds, 2), f"{seconds / whole:.0%}"]
        last = phases.get("decode")
        size = last and (sum(last["weight_bytes"].values()) if part == "total" else last["weight_bytes"][part])
        seconds = last and (sum(last["parts_s"].values()) if part == "total" else last["parts_s"][part])
        cells += [mb(size or None), number(size / seconds / 1e9 if size else None)]
        rows.append(cells)
    heads = [cell for phase in phases for cell in ((f"{phase} ms", "right"), ("share", "right"))]
    columns = [("part", "left"), *heads, ("weights MB", "right"), ("decode reads GB/s", "right")]
    return table(columns, rows)


def hook_price(phases: dict[str, dict]) -> str:
    lines = []
    for phase, found in phases.items():
        said = verdict(found["hooked_s"], found["plain_s"])
        within = "within 5 %" if said.ratio and 0.95 <= said.ratio <= 1.05 else "MORE THAN 5 % apart: read shares only"
        lines.append(
            f"{phase}{', all steps' if phase == 'decode' else ''}: {ms(median(found['hooked_s']), 2)} ms with "
            f"hooks, {ms(median(found['plain_s']), 2)} ms without (medians); mean ratio by round {said.ratio:.3f} "
            f"[{said.low:.3f}, {said.high:.3f}], {within}."
        )
    lines.append("framework = the phase minus its parts: masks, cache bookkeeping, residual sums, Python in between.")
    return "\n".join(lines)


def sentence(found: dict[str, Any], bytes_per_s: float) -> str | None:
    """Whether the kernels or the framework around them keep decode from its wall; None without decode steps."""
    decode = found["phases"].get("decode")
    if decode is None:
        return None
    whole = sum(decode["parts_s"].values())
    heavy = sum(decode["parts_s"][part] for part in ("attention", "MLP", "head"))
    rate = sum(decode["weight_bytes"].values()) / heavy
    framework = decode["parts_s"]["framework"] / whole
    told = (
        f"Why does decode not reach its wall? Attention, MLP and head hold the weights: they take {heavy / whole:.0%} "
        f"of a step and read them at {rate / 1e9:.1f} of {bytes_per_s / 1e9:.1f} GB/s. The framework between the parts "
        f"takes {framework:.0%}. "
    )
    apart = verdict(decode["hooked_s"], decode["plain_s"]).ratio
    if apart is not None and not 0.95 <= apart <= 1.05:
        return told + "But the runs with and without hooks differ by more than 5 %: no verdict, run it again."
    if heavy / whole > 0.5 and rate < 0.7 * bytes_per_s:
        return told + "So it is the kernels: they read far below what this machine can."
    if framework > 0.3:
        return told + "So it is the framework: Python and the launching of kernels, not the arithmetic."
    return told + "No single part is to blame."


def operators_table(operators: list[dict], most: int = 8) -> str:
    whole = sum(o["own_s"] for o in operators)
    rows = [(o["operator"], o["calls"], ms(o["own_s"], 2), f"{o['own_s'] / whole:.0%}") for o in operators[:most]]
    rest = sum(o["own_s"] for o in operators[most:])
    rows.append(
        (
            f"{len(operators[most:])} others",
            sum(o["calls"] for o in operators[most:]),
            ms(rest, 2),
            f"{rest / whole:.0%}",
        )
    )
    return table([("operator", "left"), ("calls", "right"), ("own ms", "right"), ("share", "right")], rows)
