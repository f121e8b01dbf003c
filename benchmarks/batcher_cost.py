"""The batcher itself costs at most 0.5 ms a request, and loses none of 2,000 that 50 threads submit at once."""

import threading
import time
from concurrent.futures import Future
from statistics import median

from batcher import DynamicBatcher
from benchmarks.claim import Claim
from config import PromptConfig

THREADS, EACH = 50, 40


def round_trip_s(requests: int = 2000) -> float:
    """Seconds from submit() to the answer, one request at a time, with a generate that costs nothing."""
    samples = []
    with DynamicBatcher(lambda batch: batch, max_batch_size=8, max_wait_s=0) as batcher:
        for i in range(requests):
            start = time.perf_counter()
            batcher.submit(i).result()
            samples.append(time.perf_counter() - start)
    return median(samples)


def flood() -> tuple[float, int, bool]:
    """Each of 50 threads submits 40: (seconds a request, answers that came, whether each thread kept its order)."""
    ran: list[tuple[int, int]] = []
    futures: dict[int, list[Future]] = {thread: [] for thread in range(THREADS)}
    batcher = DynamicBatcher(lambda batch: ran.extend(batch) or batch, 8, 0.001, max_queue=THREADS * EACH)

    def submit(thread: int) -> None:
        for i in range(EACH):
            futures[thread].append(batcher.submit((thread, i)))

    threads = [threading.Thread(target=submit, args=(thread,)) for thread in range(THREADS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batcher.close()
    seconds = time.perf_counter() - start
    answered = sum(f.done() and f.result() == (t, i) for t, mine in futures.items() for i, f in enumerate(mine))
    in_order = all([i for t, i in ran if t == thread] == list(range(EACH)) for thread in range(THREADS))
    return seconds / (THREADS * EACH), answered, in_order


def claims(_config: PromptConfig) -> list[Claim]:
    trip = round_trip_s()
    each, answered, in_order = flood()
    return [
        Claim("the batcher, generate costing nothing", "≤ 0.5 ms a request",
              f"{trip * 1e3:.3f} ms from submit to answer, one at a time; {each * 1e3:.3f} ms a request in a flood",
              max(trip, each) <= 0.5e-3),
        Claim(f"{THREADS * EACH:,} submits from {THREADS} threads", "none lost, each thread's order kept",
              f"{answered:,} answered; order {'kept' if in_order else 'BROKEN'}",
              answered == THREADS * EACH and in_order),
    ]  # fmt: skip
