"""The figures of one timed request, from its raw samples. infer.py says how they are taken."""

from statistics import median
from typing import Any

from lab import roofline

STAGES = ("tokenize", "to_device", "prefill", "decode", "to_host", "detokenize")
LAW_SHARE, LAW_S = 0.02, 1e-3  # conservation of time holds within 2 % or 1 ms

Run = dict[str, Any]  # stage -> seconds; decode -> seconds of every step
Record = dict[str, Any]


def stage_s(run: Run, stage: str) -> float:
    return sum(run["decode"]) if stage == "decode" else run[stage]


def tpot_s(run: Run) -> float | None:
    """Time per output token after the first; None when there was only one."""
    return (run["total"] - run["ttft"]) / len(run["decode"]) if run["decode"] else None


def residual_s(run: Run) -> float:
    """What the total holds beyond its parts. The total has its own two clock readings."""
    return run["total"] - sum(stage_s(run, stage) for stage in STAGES)


def conserved(run: Run) -> bool:
    return abs(residual_s(run)) <= max(LAW_SHARE * run["total"], LAW_S)


def share(run: Run, stage: str) -> float:
    return stage_s(run, stage) / run["total"]


def shares_of_ceiling(record: Record) -> dict[str, list[float]]:
    """Per run: prefill MFU and decode MBU, each against the ceiling read around that very run."""
    floors, found = record["floors"], {"prefill MFU": [], "decode MBU": []}
    for run, (bytes_per_s, flops_per_s) in zip(record["runs"], record["run_ceilings"], strict=True):
        found["prefill MFU"].append(roofline.of_ceiling(floors["prefill"]["flops"], run["prefill"], flops_per_s))
        if run["decode"]:
            per_step = stage_s(run, "decode") / len(run["decode"])
            found["decode MBU"].append(roofline.of_ceiling(floors["decode"]["read_bytes"], per_step, bytes_per_s))
    return {name: values for name, values in found.items() if values}


def card_ceilings(record: Record) -> tuple[float, float] | None:
    """(bytes per second, FLOPs per second) as kept for this machine; None for a dtype that has no ceiling here."""
    rate = record["ceilings"]["flops_per_s"].get(record["model"]["dtype"])
    return None if rate is None else (record["ceilings"]["bytes_per_s"], rate)


def run_ceilings(record: Record) -> tuple[float, float]:
    """The same as read around the runs: the median run's."""
    bandwidths, rates = zip(*record["run_ceilings"], strict=True)
    return median(bandwidths), median(rates)


def floors_of(record: Record, ceilings: tuple[float, float]) -> dict[str, roofline.Floor]:
    """The least time of the prefill and of one decode step at these ceilings."""
    bytes_per_s, flops_per_s = ceilings
    return {
        phase: roofline.floor(work["flops"], work["read_bytes"], flops_per_s, bytes_per_s)
        for phase, work in record["floors"].items()
    }
