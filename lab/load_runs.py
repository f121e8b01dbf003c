"""Load records: found by their ids, and the figures of their runs. A run is one load once; equal loads are rounds."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from config import UserError
from lab.records import SCHEMA, read_lines

Record = dict[str, Any]
Run = dict[str, Any]

RATES = {"throughput": "output_tokens_per_s", "requests": "requests_per_s"}  # more is better


# ---- finding a record


def find(name: str, results: Path) -> Record:
    """The record of this id, or of the only id that begins so, or the last one of this file. UserError."""
    if Path(name).is_file():
        records = read_lines(Path(name))
        if not records:
            raise UserError(f"{name} holds no record: give a file that a script of this kit wrote, or an id.")
        return checked(records[-1])
    found = {r["id"]: r for r in all_records(results) if str(r["id"]).startswith(name)}
    if name in found:
        return checked(found[name])
    if not found:
        raise UserError(f"No record in {results} begins with {name!r}, and no such file exists: check the id.")
    if len(found) > 1:
        raise UserError(f"{name!r} begins {len(found)} ids ({', '.join(sorted(found)[:3])}, …): give more of it.")
    return checked(next(iter(found.values())))


def all_records(results: Path) -> list[Record]:
    return [record for path in sorted(results.glob("*.jsonl")) for record in read_lines(path)]


def checked(record: Record) -> Record:
    """The record, if it is one that can be compared. UserError."""
    if record.get("schema") != SCHEMA:
        raise UserError(
            f"[{record['id']}] has schema {record.get('schema')!r} and this version reads {SCHEMA}: measure it anew."
        )
    if record.get("script") == "infer" and record.get("runs"):
        return as_load(record)
    if record.get("kind") != "load" or not record.get("runs"):
        raise UserError(
            f"[{record['id']}] is a record of {record.get('script')}: only those of load_test.py and infer.py are "
            "compared here."
        )
    missing = [name for name in ("card", "config", "time", "verdicts") if name not in record]
    for name in ("load", "requests", "window", "figures"):
        missing += [f"runs.{name}" for run in record["runs"] if name not in run][:1]
    if missing:
        raise UserError(f"[{record['id']}] lacks {', '.join(missing)}: it is no whole load record; measure it anew.")
    return record


def as_load(record: Record) -> Record:
    """A record of infer.py in the form of a load record: each of its runs is a round of one request."""
    load = {"kind": "one request", "prompt_tokens": record["prompt_tokens"], "new_tokens": len(record["ids"])}
    runs = []
    for one in record["runs"]:
        steps = len(one["decode"])
        figures = {"ttft_s": {"p50": one["ttft"], "n": 1}, "e2e_s": {"p50": one["total"], "n": 1}}
        figures["tpot_s"] = {"p50": (one["total"] - one["ttft"]) / steps, "n": 1} if steps else None
        figures["output_tokens_per_s"] = (steps + 1) / one["total"]
        runs.append({"load": load, "requests": [], "figures": figures})
    return record | {"kind": "load", "runs": runs}


# ---- figures of a run


def load_of(run: Run) -> tuple:
    """What tells loads apart, without what was not asked for."""
    return tuple(sorted((k, str(v)) for k, v in run["load"].items() if v is not None))


def load_words(run: Run) -> str:
    """'4 at once · 128 + 32 tokens', '2 requests/s poisson · …'"""
    load = run["load"]
    if load.get("concurrency") is not None:
        level = f"{load['concurrency']:g} at once"
    elif load.get("rate") is not None:
        level = f"{load['rate']:g} requests/s {load.get('arrival') or ''}".strip()
    else:
        level = str(load.get("kind"))
    return f"{level} · {load.get('prompt_tokens')} + {load.get('new_tokens')} tokens"


def rounds_by_load(record: Record) -> dict[tuple, list[Run]]:
    found: dict[tuple, list[Run]] = {}
    for run in record["runs"]:
        found.setdefault(load_of(run), []).append(run)
    return found


def value(run: Run, figure: str) -> float | None:
    """'throughput', 'ttft' (its median), 'ttft_p95', … of one run; None where it was not measured."""
    if figure in RATES:
        return run["figures"].get(RATES[figure]) or None
    name, _, statistic = figure.partition("_")
    return (run["figures"].get(f"{name}_s") or {}).get(statistic or "p50") or None


def over_rounds(runs: Sequence[Run], figure: str) -> float | None:
    """The value of the median round."""
    found = [x for x in (value(run, figure) for run in runs) if x is not None]
    return median(found) if found else None


def level(run: Run) -> tuple[str, float] | None:
    """On which axis a load stands, and where."""
    load = run["load"]
    if load.get("concurrency") is not None:
        return "requests at once", load["concurrency"]
    return ("requests/s", load["rate"]) if load.get("rate") is not None else None


def shape(run: Run) -> str:
    return f"{run['load'].get('prompt_tokens')} + {run['load'].get('new_tokens')} tokens"


def more_is_better(figure: str) -> bool:
    return figure in RATES


def failed_share(runs: Sequence[Run]) -> float:
    asked = [request for run in runs for request in run["requests"]]
    return sum(not request["ok"] for request in asked) / len(asked) if asked else 0.0


def answer_length(runs: Sequence[Run]) -> float | None:
    lengths = [r["new_tokens"] for run in runs for r in run["requests"] if r["ok"] and r["new_tokens"] is not None]
    return mean(lengths) if lengths else None


def stage_seconds(run: Run) -> tuple[float, float] | None:
    """Seconds that the run's requests spent in prefill and in decode; None where the server does not tell the queue."""
    done = [r for r in run["requests"] if r["ok"] and r["chunks"]]
    if not done or any(r["queue"] is None for r in done):
        return None
    prefill = sum(max(r["chunks"][0][0] - r["sent"] - r["queue"], 0.0) for r in done)
    return prefill, sum(r["chunks"][-1][0] - r["chunks"][0][0] for r in done)


def cost_per_1k(run: Run, price: float) -> tuple[float | None, float | None]:
    """(1,000 prompt tokens, 1,000 new tokens) in the price's money. Without stage times, all goes to the output."""
    new, asked = run["figures"].get("output_tokens_per_s"), run["figures"].get("prompt_tokens_per_s")
    if not new:
        return None, None
    a_second, seconds = price / 3600, stage_seconds(run)
    if seconds is None or not asked or not sum(seconds):
        return None, 1000 * a_second / new
    share = seconds[0] / sum(seconds)
    return 1000 * a_second * share / asked, 1000 * a_second * (1 - share) / new
