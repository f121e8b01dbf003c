"""This machine's walls, measured: how fast it reads memory, and how many FLOPs per second it multiplies matrices with.

A datasheet says what a machine could do; a laptop or a virtual machine is in none. Both probes run at the best rate
that plain code reaches here, and everything this kit calls "of the ceiling" is a share of these two numbers.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
import torch
from torch.nn.functional import linear  # what the network's layers call; a @ a may be another kernel

from config import UserError, cache_dir, keep
from metrics import synchronize

READ_BYTES = 256 << 20  # far outside a laptop's caches; a server's L3 of 256 MB or more would flatter it
GPU_READ_BYTES = 4 << 30
ANCHOR_REPEATS = 9  # three were so short that the anchor itself strayed by 15 %
VERSION = 3  # raise it when a probe changes, so that kept values are measured anew


@dataclass(frozen=True)
class Ceilings:
    """bytes_per_s: memory read bandwidth. flops_per_s: GEMM rate per dtype name. seconds: what measuring took.

    gemm_size: per dtype name, the matrix size that reached the rate.
    """

    bytes_per_s: float
    flops_per_s: dict[str, float]
    gemm_size: dict[str, int]
    measured_at: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Anchor:
    """The two ceilings at one moment, and the seconds that one reading and one matrix product took together."""

    bytes_per_s: float
    flops_per_s: float
    seconds: float


def times_s(call: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


class Probe:
    """Reads memory as fast as plain code can, with as many threads as the arithmetic uses.

    CPU: each thread takes the maximum of its part of a numpy array. (A matrix-vector product in PyTorch reaches half of
    this on some machines; a ceiling taken from it would flatter every figure below it.) GPU: the sum of a large tensor.
    The memory is taken once and held: on a virtual machine, taking it anew costs more than reading it thirty times.
    """

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        self.device = device
        if device.type == "cpu":
            self.data = np.ones((size or READ_BYTES) // 4, np.float32)
            self.parts = np.array_split(self.data, torch.get_num_threads())
            self.pool = ThreadPoolExecutor(len(self.parts))
        else:
            self.data = torch.ones((size or gpu_read_bytes(device)) // 4, device=device)
        self.read()  # starts the threads, or chooses the kernel

    def read(self) -> None:
        if self.device.type == "cpu":
            list(self.pool.map(np.max, self.parts))
        else:
            self.data.sum()

    def bytes_per_s(self, repeats: int) -> float:
        return self.data.nbytes / median(times_s(self.read, repeats))

    def anchor(self, dtype: torch.dtype, gemm_size: int) -> Anchor:
        """About 150 ms of fixed work: how the machine is at this moment. gemm_size: the size that calibration chose.

        Bandwidth drifts by up to two times between minutes on shared hosts. So a measured block is read against the
        larger of the values before and after it, and a round whose anchor stands out is dropped.
        """
        a = torch.randn(gemm_size, gemm_size, device=self.device).to(dtype)
        linear(a, a)
        read_s, gemm_s = (median(times_s(work, ANCHOR_REPEATS)) for work in (self.read, lambda: linear(a, a)))
        return Anchor(self.data.nbytes / read_s, 2 * gemm_size**3 / gemm_s, read_s + gemm_s)


def gpu_read_bytes(device: torch.device) -> int:
    """What the probe takes of a GPU: far outside its L2, and at most a quarter of what is free."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if free < 512 << 20:
        raise UserError(
            f"Only {free / 1e6:.0f} MB of GPU memory are free, too little to measure its bandwidth: free some."
        )
    return min(GPU_READ_BYTES, free // 4)


def gemm_rate(
    device: torch.device, dtype: torch.dtype, budget_s: float = 0.4, largest: int = 8192
) -> tuple[float, int]:
    """(FLOPs per second, size) of the square matrix product that runs fastest within the time budget.

    A format that the CPU only emulates can be a hundred times slower than float32, so the size starts small. A ceiling
    is what the machine can do: the fastest repeat counts, so that a busy moment does not lower it.
    """
    best, best_size, size, deadline = 0.0, 0, 256, time.perf_counter() + budget_s
    while size <= largest:
        a = torch.randn(size, size, device=device).to(dtype)
        linear(a, a)  # the first product of a shape also chooses its kernel
        fastest = min(times_s(lambda a=a: linear(a, a), repeats=5))
        if 2 * size**3 / fastest > best:
            best, best_size = 2 * size**3 / fastest, size
        next_s = 6 * 8 * fastest  # the next size takes 8 times as long, and runs 6 times
        if next_s > 2.0 or (size >= 1024 and time.perf_counter() + next_s > deadline):
            break
        size *= 2
    return best, best_size


def measure(device: torch.device) -> Ceilings:
    """All ceilings of a device, in under five seconds."""
    start = time.perf_counter()
    bandwidth = Probe(device).bytes_per_s(repeats=15)
    rates, sizes = {}, {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        try:
            name = str(dtype).removeprefix("torch.")
            rates[name], sizes[name] = gemm_rate(device, dtype)
        except RuntimeError:  # this device cannot multiply in this format: no ceiling, and none is printed
            continue
    return Ceilings(bandwidth, rates, sizes, measured_at=time.time(), seconds=time.perf_counter() - start)


def kept(device: torch.device, machine: str, recalibrate: bool = False) -> Ceilings:
    """The ceilings of this machine, measured at the first call and then kept in the user's cache.

    machine: what must be equal for a kept value to hold (processor, threads, versions).
    """
    path = cache_dir() / "ceilings.json"
    key = f"v{VERSION} {device} {machine}"
    try:
        known = json.loads(path.read_text())
        if not recalibrate:
            return Ceilings(**known[key])
    except (OSError, ValueError, KeyError, TypeError):
        known = known if "known" in locals() and isinstance(known, dict) else {}
    ceilings = measure(device)
    keep(path, json.dumps({**known, key: asdict(ceilings)}, indent=1))
    return ceilings
