"""The card's bandwidth is within 10 % of two threads that each reduce half of a 1 GB numpy array, interleaved."""

import threading
import time
from statistics import median

import numpy as np
import torch

from benchmarks.claim import Claim, rounds
from config import PromptConfig
from lab.ceilings import Probe
from lab.console import progress
from lab.verdict import interleaved, verdict

ROUNDS = 12
SIZE = 1 << 30


def two_halves(data: np.ndarray) -> float:
    """Seconds that two threads need to read the array, each the half of it; the median of five."""
    times = []
    for _ in range(5):
        halves = [threading.Thread(target=np.max, args=(part,)) for part in np.array_split(data, 2)]
        start = time.perf_counter()
        for half in halves:
            half.start()
        for half in halves:
            half.join()
        times.append(time.perf_counter() - start)
    return median(times)


def claims(config: PromptConfig) -> list[Claim]:
    if torch.get_num_threads() != 2:
        why = f"PyTorch uses {torch.get_num_threads()} threads here: use --threads 2 to compare"
        return [Claim("bandwidth of the card", "within 10 % of numpy on 1 GB", why, None)]
    data = np.ones(SIZE // 4, np.float32)
    cpu = torch.device("cpu")
    probe = Probe(cpu)
    variants = [lambda: SIZE / probe.bytes_per_s(repeats=15), lambda: two_halves(data)]
    list(interleaved(variants, 1))
    count = rounds(config, ROUNDS)
    seconds = list(progress(interleaved(variants, count), count, "bandwidth"))
    said = verdict(*zip(*seconds, strict=True), noise=0.10)
    rates = [SIZE / median(column) / 1e9 for column in zip(*seconds, strict=True)]
    text = f"{rates[0]:.1f} against {rates[1]:.1f} GB/s, time ×{said.ratio:.3f} [{said.low:.3f}, {said.high:.3f}]"
    inside, outside = said.low >= 0.9 and said.high <= 1.1, said.high < 0.9 or said.low > 1.1
    holds = True if inside else False if outside else None
    return [Claim("bandwidth of the card", "within 10 % of numpy on 1 GB", text, holds)]
