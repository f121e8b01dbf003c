"""Day 1's tables, from a record of timed requests: the same text comes out of a record measured a year ago."""

import json
from collections.abc import Sequence
from statistics import median
from typing import Any

from lab.request_figures import (
    STAGES,
    Record,
    card_ceilings,
    conserved,
    floors_of,
    residual_s,
    shares_of_ceiling,
    stage_s,
    tpot_s,
)
from metrics import NONE, blocks, mb, median_interval, ms, number, span, table


def quoted(text: str, most: int = 200) -> str:
    """A text on one line, its line ends and quotes escaped, and cut when it is long."""
    return json.dumps(text if len(text) <= most else text[:most] + "…", ensure_ascii=False).replace("|", "\\|")


def card_table(card: dict[str, str]) -> str:
    return "### Card\n\n" + table([("item", "left"), ("value", "left")], list(card.items()))


def model_table(record: Record) -> str:
    """The second half of the card: which model ran, from which weights, on what, and with which prompt."""
    model = record["model"]
    kind = " (TIMING ONLY: random weights)" if model["timing_only"] else ""
    rows = [
        (
            "Model",
            f"{model['name']}, {model['parameters'] / 1e6:.1f} M parameters, {model['attention']} attention{kind}",
        ),
        ("Weights", f"{model['origin']}; hash {model['hash']}"),
        ("Device, dtype", f"{model['device']}, {model['dtype']} ({model['dtype_reason']})"),
        ("Prompt", f"{record['prompt_tokens']} tokens ({record['template']}): {quoted(record['prompt'])}"),
    ]
    return "### Model\n\n" + table([("item", "left"), ("value", "left")], rows)


def ceilings_line(ceilings: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {rate / 1e9:,.1f}" for name, rate in ceilings["flops_per_s"].items())
    return f"reads memory at {ceilings['bytes_per_s'] / 1e9:.1f} GB/s; multiplies matrices at {rates} GFLOP/s"


def theory_table(record: Record) -> str:
    """Printed before anything is measured: what each phase must do, and the least time that takes here."""
    rows, ceilings = [], card_ceilings(record)
    for phase, floor in floors_of(record, ceilings).items() if ceilings else ():
        work = record["floors"][phase]
        rows.append(
            (
                phase,
                work["tokens"],
                number(work["flops"], 2, 1e-9),
                mb(work["read_bytes"]),
                ms(floor.compute_s),
                ms(floor.memory_s),
                floor.wall,
                ms(floor.least_s),
            )
        )
    columns = [
        ("one forward pass", "left"),
        ("tokens in", "right"),
        ("GFLOP", "right"),
        ("reads MB", "right"),
        ("by compute ms", "right"),
        ("by memory ms", "right"),
        ("wall", "left"),
        ("at least ms", "right"),
    ]
    return "### What theory allows\n\n" + table(columns, rows)


def stats_table(record: Record) -> str:
    """The STATS table: each stage cold, warm with an interval, per token, and as a share of its ceiling."""
    runs, cold, prompt = record["runs"], record["cold"], record["prompt_tokens"]
    steps = len(cold["decode"])
    ceiling = {name: f"{name.split()[1]} {median(values):.0%}" for name, values in shares_of_ceiling(record).items()}
    rows: list[tuple] = [
        (name, NONE, 1, ms(record["load"][name]), *[NONE] * 5) for name in ("load_tokenizer", "load_model")
    ]
    tokens = {"tokenize": prompt, "prefill": prompt, "decode": steps, "detokenize": steps + 1}
    for stage in STAGES:
        if stage == "decode" and not steps:
            rows.append((stage, *[NONE] * 8))
            continue
        count = tokens.get(stage) or None
        rows.append(
            row(
                stage,
                count,
                [stage_s(run, stage) for run in runs],
                stage_s(cold, stage),
                ceiling.get({"prefill": "prefill MFU", "decode": "decode MBU"}.get(stage, ""), NONE),
            )
        )
    rows.append(row("total", None, [run["total"] for run in runs], cold["total"]))
    rows.append(row("TTFT", None, [run["ttft"] for run in runs], cold["ttft"]))
    if steps:
        rows.append(row("TPOT", 1, [tpot_s(run) for run in runs], tpot_s(cold)))
    rows.append(row("residual", None, [residual_s(run) for run in runs], residual_s(cold)))
    columns = [
        ("stage", "left"),
        ("tokens", "right"),
        ("runs", "right"),
        ("cold ms", "right"),
        ("median ms", "right"),
        ("95 % interval ms", "right"),
        ("ms/token", "right"),
        ("tokens/s", "right"),
        ("of ceiling", "right"),
    ]
    return "### STATS\n\n" + table(columns, rows) + "\n\n" + stats_legend(record)


def row(stage: str, tokens: int | None, warm: Sequence[float], cold: float, ceiling: str = NONE) -> tuple:
    middle = median(warm) if warm else None
    small = stage in ("tokenize", "to_device", "to_host", "detokenize", "residual")
    digits = 3 if small else 1
    per_token = middle / tokens if middle is not None and tokens and not small else None
    rate = 1 / per_token if per_token and stage in ("prefill", "decode") else None
    return (
        stage,
        tokens or NONE,
        len(warm),
        ms(cold, digits),
        ms(middle, digits),
        span(median_interval(warm), digits) if warm else NONE,
        ms(per_token, 2),
        number(rate),
        ceiling,
    )


def stats_legend(record: Record) -> str:
    runs, steps = record["runs"], len(record["cold"]["decode"])
    blocks_per_run = steps + 7
    worst = max(runs, key=lambda run: abs(residual_s(run)), default=record["cold"])
    lines = [
        "cold = the first request of this process, kept apart. Interval: of the median, by order statistics; a dash "
        "means fewer than 6 runs. total = its own two clock readings, without model loading.",
        f"Conservation of time: the largest residual is {ms(residual_s(worst), 3)} ms of {ms(worst['total'])} ms "
        f"({'holds' if all(map(conserved, runs)) else 'BROKEN: these numbers do not add up'}; the law allows 2 % or "
        f"1 ms). Timer: {record['timer_cost_s'] * 1e6:.1f} µs a block, {blocks_per_run} blocks a run = "
        f"{ms(record['timer_cost_s'] * blocks_per_run, 2)} ms.",
    ]
    if record["model"]["device"] == "cpu":
        lines.append("to_device and to_host move nothing here: the ids already lie in the memory that the CPU reads.")
    return "\n".join(lines)


def latency_lines(record: Record) -> str:
    """Every decode step of every run as one character, all runs on one scale."""
    runs = record["runs"] or [record["cold"]]
    steps = [step for run in runs for step in run["decode"]]
    if not steps:
        return "### Per-token latency\n\nOne token was generated: there was no decode step."
    least, greatest = min(steps), max(steps)
    lines = [f"run {i} {blocks(run['decode'], least, greatest)}" for i, run in enumerate(runs, 1)]
    head = f"{len(steps)} decode steps, ▁ = {ms(least)} ms, █ = {ms(greatest)} ms, median {ms(median(steps))} ms:"
    return "### Per-token latency\n\n" + head + "\n\n```\n" + "\n".join(lines) + "\n```"


def ledger_table(record: Record) -> str:
    """From the start of the process to the first token, and how much of each first time is only the first time."""
    rows, at = [], 0.0
    for name, seconds in record["ledger"]:
        at += seconds
        rows.append((name, ms(seconds), number(at, 2)))
    columns = [("cold start", "left"), ("ms", "right"), ("clock s", "right")]
    return "### Cold-start ledger\n\n" + table(columns, rows)


def memory_table(record: Record) -> str:
    memory, usage = record["memory"], record["usage"]
    rows = [
        ("weights", mb(memory["weight_bytes"]), f"{record['model']['parameters'] / 1e6:.1f} M parameters"),
        (
            "KV cache, predicted",
            mb(memory["kv_predicted_bytes"], 2),
            f"{memory['kv_bytes_per_token']:,} bytes a token × {memory['kv_tokens']} tokens",
        ),
        ("KV cache, held", mb(memory["kv_held_bytes"], 2), "bytes of the cache's tensors"),
        (
            "peak RSS during the runs",
            mb(usage["rss_peak_bytes"], 0),
            f"{usage['samples']} samples; {mb(usage['probe_bytes'], 0)} MB of it are the bandwidth probe's",
        ),
    ]
    if memory["vram_peak_bytes"] is not None:
        rows.append(("peak VRAM", mb(memory["vram_peak_bytes"], 0), "PyTorch's allocator"))
    busy = f"{number(usage['cpu_cores_mean'], 2)} cores"
    gpu = usage["gpu_missing"] or (
        f"{number(usage['gpu_percent_mean'], 0)} % busy, {number(usage['gpu_watts_mean'], 0)} W, "
        f"{mb(usage['gpu_peak_bytes'], 0)} MB of the device in use"
    )
    line = f"Meanwhile: CPU {busy} on average; GPU: {'N/A, ' if usage['gpu_missing'] else ''}{gpu}."
    columns = [("memory", "left"), ("MB", "right"), ("from", "left")]
    return "### Memory\n\n" + table(columns, rows) + "\n\n" + line
