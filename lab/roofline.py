"""What theory allows: the least time a phase can take on this machine, and which wall sets it.

A phase must do so many FLOPs and read so many bytes. Whichever takes longer at the machine's measured best rates is the
wall it is bound by, and the least time it can take (Williams, Waterman, Patterson 2009, "Roofline").
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    """compute_s and memory_s: what the FLOPs and the bytes alone take at the measured ceilings."""

    compute_s: float
    memory_s: float

    @property
    def least_s(self) -> float:
        return max(self.compute_s, self.memory_s)

    @property
    def wall(self) -> str:
        return "compute" if self.compute_s >= self.memory_s else "memory"


def floor(flops: int, read_bytes: int, flops_per_s: float, bytes_per_s: float) -> Floor:
    return Floor(flops / flops_per_s, read_bytes / bytes_per_s)


def of_ceiling(work: float, seconds: float, per_s: float) -> float:
    """MFU or MBU: the share of the measured ceiling that was reached. Above 1 a model or the ceiling is wrong."""
    return work / seconds / per_s


def impossible(shares: dict[str, float]) -> str | None:
    """A warning when a share of a ceiling exceeds 1: then the count of bytes, or the ceiling, is wrong."""
    over = [f"{name} {share:.0%}" for name, share in shares.items() if share > 1]
    if not over:
        return None
    return (
        f"{', '.join(over)} of a ceiling is impossible: the ceiling was read too low (another process, a slow minute), "
        "or part of the data came from the CPU's cache. Use --recalibrate on an idle machine; do not quote this share."
    )
